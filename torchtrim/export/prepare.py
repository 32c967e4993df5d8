"""A float file made ready to be quantized: shapes, folded constants, the operators that have int8 kernels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from torchtrim.errors import ExportError
from torchtrim.export.quiet import quiet


def prepare(source: Path, destination: Path, *, external_data: bool = False) -> None:
    """Write a copy of a float file that computes the same and is ready to be calibrated and quantized.

    ONNX Runtime's pre-processing folds constants and batch norms and writes every shape. A mean over height and width
    becomes a GlobalAveragePool, which has an int8 kernel where ReduceMean has none. Every node gets a name of its own.

    Args:
        source: The float file.
        destination: Where the copy goes.
        external_data: Keep the weights beside the file (past 2 GB).

    Raises:
        ExportError: ONNX Runtime cannot read or fold the file.
    """
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        with quiet():
            # The exporter has written every shape already; ONNX Runtime's symbolic pass can only fail on them.
            quant_pre_process(
                source,
                destination,
                skip_symbolic_shape=True,
                save_as_external_data=external_data,
                all_tensors_to_one_file=external_data,
            )
            model = onnx.load(destination, load_external_data=False)
    except Exception as error:  # its parts raise what they like, and share no base class
        raise ExportError(
            f"ONNX Runtime cannot prepare this file: {type(error).__name__}: {error}", path=source.name
        ) from error
    _pool_means(model.graph)
    _name_nodes(model.graph)
    onnx.save(model, destination)


def _pool_means(graph: onnx.GraphProto) -> None:
    """ReduceMean over the two last of four dimensions to GlobalAveragePool, with a Flatten where they are dropped."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    ranks = {
        value.name: len(value.type.tensor_type.shape.dim)
        for value in (*graph.value_info, *graph.input)
        if value.type.tensor_type.HasField("shape")
    }
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "ReduceMean" or ranks.get(node.input[0]) != 4 or not _over_picture(node, constants):
            nodes.append(node)
            continue
        keep = next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
        pooled = node.output[0] if keep else f"{node.output[0]}_pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
        if not keep:
            nodes.append(helper.make_node("Flatten", [pooled], [node.output[0]], name=f"{node.name}_flat", axis=1))
            known = next((v for v in (*graph.value_info, *graph.output) if v.name == node.output[0]), None)
            if known is not None and known.type.tensor_type.HasField("shape"):
                value = graph.value_info.add()
                value.CopyFrom(known)
                value.name = pooled
                for _ in range(2):
                    value.type.tensor_type.shape.dim.add().dim_value = 1
    del graph.node[:]
    graph.node.extend(nodes)


def _over_picture(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "axes"), None)
    if axes is None and len(node.input) > 1 and node.input[1] in constants:
        axes = np.atleast_1d(numpy_helper.to_array(constants[node.input[1]])).tolist()
    return axes is not None and {axis % 4 for axis in axes} == {2, 3}


def _name_nodes(graph: onnx.GraphProto) -> None:
    taken = Counter(node.name for node in graph.node)
    used = set(taken)
    for number, node in enumerate(graph.node):
        if node.name and taken[node.name] == 1:
            continue
        name = node.name or f"{node.op_type}_{number}"
        while name in used:
            name = f"{name}_{number}"
        used.add(name)
        node.name = name
