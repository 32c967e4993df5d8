"""Which nodes of a file compute in int8: those asked for, and what lies between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection

import onnx

from torchtrim.errors import InputError

COMPUTE = ("Conv", "Gemm", "MatMul")
# Between two int8 nodes these have an int8 kernel on ONNX Runtime's CPU provider, or move bytes about. HardSigmoid has
# none, but in hard swish a Mul follows it, which has.
BETWEEN = (
    "Add", "AveragePool", "Clip", "Concat", "Flatten", "GlobalAveragePool", "HardSigmoid", "LeakyRelu", "MaxPool",
    "Mul", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
_PART_OF_A_CONVOLUTION = ("Clip", "Relu")
_WEIGHTED = ("Conv", "Gemm", "MatMul")


def int8_nodes(
    graph: onnx.GraphProto,
    *,
    nodes: Collection[str] | None = None,
    ops: Collection[str] = COMPUTE,
    between: Collection[str] = BETWEEN,
) -> set[str]:
    """The names of the nodes to quantize.

    Those are the convolutions and products with constant weights (of `ops`, or the ones named), and every node of
    `between` that takes int8 values only and gives its own to one of these in the end: no float node is left in the
    middle of int8 ones. A Relu or Clip that alone reads an int8 convolution goes with it.

    Args:
        graph: Of a prepared file.
        nodes: The names of the nodes to quantize; None: all of `ops` that have constant weights. A named node may also
            be of another kind, or a product of two activations.
        ops: The operators that are worth it by themselves.
        between: The operators that follow.

    Raises:
        InputError: A name that no node has, or one of an operator that has no int8 form.
    """
    constants = {tensor.name for tensor in graph.initializer}
    by_name = {node.name: node for node in graph.node}
    if nodes is None:
        chosen = {node.name for node in graph.node if node.op_type in ops and _has_weights(node, constants)}
    else:
        unknown = [name for name in nodes if name not in by_name]
        if unknown:
            raise InputError("the file has no such nodes", found=unknown[:5], hint="the names in the prepared file")
        wrong = sorted({by_name[name].op_type for name in nodes} - {*COMPUTE, *BETWEEN})
        if wrong:
            raise InputError("operators that have no int8 form", found=wrong, expected=", ".join((*COMPUTE, *BETWEEN)))
        chosen = set(nodes)
    return chosen | _following(graph, chosen, constants, set(between))


def _has_weights(node: onnx.NodeProto, constants: Collection[str]) -> bool:
    return node.op_type not in _WEIGHTED or (len(node.input) > 1 and node.input[1] in constants)


def _following(
    graph: onnx.GraphProto, chosen: set[str], constants: Collection[str], between: Collection[str]
) -> set[str]:
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input)}

    def floats(node: onnx.NodeProto) -> list[str]:
        """The activations among its inputs; one whose type is not known counts as one."""
        return [
            name
            for name in node.input
            if name and name not in constants and types.get(name, onnx.TensorProto.FLOAT) == onnx.TensorProto.FLOAT
        ]

    # From the front: what can be had in int8, since an int8 node gives it or takes it.
    taken = {name for node in graph.node if node.name in chosen for name in activations_of(node)}
    given = {name for node in graph.node if node.name in chosen for name in node.output}
    able: set[str] = set()
    for node in graph.node:
        inputs = floats(node)
        if node.op_type in between and inputs and all(name in given or name in taken for name in inputs):
            if any(name in constants and node.op_type in ("Add", "Mul") for name in node.input):
                continue  # a constant operand is a scale or a shift by channel: 8 bits of it cost accuracy
            able.add(node.name)
            given.update(node.output)
    # From the back: of those, the ones that an int8 node reads from in the end.
    wanted: set[str] = set()
    for node in reversed(graph.node):
        if node.name in able and any(
            reader.name in chosen or reader.name in wanted for name in node.output for reader in readers[name]
        ):
            wanted.add(node.name)
    # An activation right behind a convolution is part of it, for float readers too: its range is the one to round to,
    # not the wider one before it.
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        maker = makers.get(node.input[0]) if node.op_type in _PART_OF_A_CONVOLUTION else None
        part = maker is not None and maker.op_type == "Conv" and maker.name in chosen
        if part and node.name in able and len(readers[node.input[0]]) == 1:
            wanted.add(node.name)
    return wanted


def tensors_of(graph: onnx.GraphProto, names: Collection[str]) -> list[str]:
    """The float activations that these nodes take and give: what to calibrate."""
    constants = {tensor.name for tensor in graph.initializer}
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.input, *graph.output)}
    found = [
        name
        for node in graph.node
        if node.name in names
        for name in (*node.input, *node.output)
        if name and name not in constants and types.get(name) == onnx.TensorProto.FLOAT
    ]
    return list(dict.fromkeys(found))


def activations_of(node: onnx.NodeProto) -> list[str]:
    """The inputs of a node that are neither weights nor biases by their place."""
    return list(node.input[:1]) if node.op_type in ("Conv", "Gemm") else list(node.input[:2])
