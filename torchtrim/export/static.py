"""Static int8: scales fixed from calibration, written as QuantizeLinear and DequantizeLinear pairs (QDQ)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from torchtrim.errors import ExportError, InputError
from torchtrim.export.calibration import Statistics
from torchtrim.export.int8_nodes import BETWEEN, COMPUTE, activations_of, int8_nodes, tensors_of
from torchtrim.export.quiet import quiet
from torchtrim.export.ranges import METHODS
from torchtrim.export.saving import save_model
from torchtrim.export.tensorrt_form import pair_residuals, residual_inputs
from torchtrim.export.trained import overrides
from torchtrim.export.weight_types import stacked_weights, weight_types

FORMS = ("cpu", "tensorrt")
_TYPES = ("uint8", "int8")


def quantize_static(
    prepared: Path,
    destination: Path,
    statistics: Statistics,
    *,
    nodes: Collection[str] | None = None,
    ops: Collection[str] = COMPUTE,
    between: Collection[str] = BETWEEN,
    method: str = "minmax",
    activations: str = "uint8",
    weights: str = "int8",
    per_channel: bool = True,
    reduce_range: bool = False,
    exact: float = 0.0,
    form: str = "cpu",
    levels: Mapping[str, int] | None = None,
    external_data: bool = False,
) -> int:
    """Write a static int8 copy of a prepared file.

    What a float node gives to float nodes stays float, also where an int8 node reads it too; what a Gemm or a MatMul
    gives to float nodes only, or as the file's output, is not rounded to 8 bits.

    Args:
        prepared: A float file that `prepare` wrote.
        destination: Where the int8 file goes.
        statistics: The calibration of its tensors (`calibration_tensors`).
        nodes: Only these nodes, and what lies between them; None: all of `ops` that have constant weights.
        ops: The operators to quantize.
        between: The operators that are quantized where they lie between int8 nodes.
        method: How the ranges are chosen: `minmax`, `entropy`, `percentile`, `mse`.
        activations: `uint8` or `int8`; both with a zero point.
        weights: `int8` (symmetric) or `uint8`; those of depthwise convolutions, and those with channels of nothing, are
            `int8` all the same.
        per_channel: One scale for each output channel of a weight.
        reduce_range: Weights in 7 bits, where sums of 8-bit products saturate. Those of depthwise convolutions, whose
            sums do not, keep 8.
        exact: With `reduce_range`, in the form `cpu`: the share of the multiplications, 0 to 1, whose weights keep
            8 bits too, unsigned.
        form: `cpu`, as ONNX Runtime's CPU provider fuses it. `tensorrt`: pairs of their own at the inputs of layers and
            of residual adds only, symmetric int8, float biases; TensorRT then fuses activation and add into the layer.
        external_data: Keep the weights beside the file (past 2 GB).

    Returns:
        How many nodes compute in int8 now: with `int8` kernels, or between int8 values.

    Raises:
        InputError: An unknown method, form, type or node; a tensor that was not calibrated.
        ExportError: ONNX Runtime cannot quantize the file.
    """
    _check(method, form, activations, weights)
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    tensorrt = form == "tensorrt"
    if tensorrt:
        activations, weights, reduce_range = "int8", "int8", False
    model = onnx.load(prepared)
    chosen, residuals, tensors = _plan(model.graph, nodes, ops, between, form)
    kinds = {node.op_type for node in model.graph.node if node.name in chosen}
    ranges = {name: statistics.range(name, method) for name in tensors}
    types = {"uint8": QuantType.QUInt8, "int8": QuantType.QInt8}
    options: dict[str, Any] = {
        "ActivationSymmetric": tensorrt,
        "WeightSymmetric": weights == "int8",
        "QuantizeBias": not tensorrt,
        "DedicatedQDQPair": tensorrt,
        "ForceQuantizeNoInputCheck": True,
        "OpTypesToExcludeOutputQuantization": sorted(kinds) if tensorrt else [],
        "TensorQuantOverrides": {},
    }
    if form == "cpu" and activations == "uint8" and (reduce_range or weights == "uint8"):
        types_of = weight_types(model, chosen, exact, unsigned=weights == "uint8", per_channel=per_channel)
        # A weight that was trained in so many steps keeps them.
        options["TensorQuantOverrides"] = {name: each for name, each in types_of.items() if name not in (levels or {})}
    if per_channel:
        options["TensorQuantOverrides"] |= stacked_weights(model, chosen, types[weights], reduce_range=reduce_range)
    if levels:
        options["TensorQuantOverrides"] |= overrides(model, levels, 64 if reduce_range else 127)
    asked = {name: (np.array(low, np.float32), np.array(high, np.float32)) for name, (low, high) in ranges.items()}
    try:
        with quiet():
            quantizer = QDQQuantizer(
                model,
                per_channel,
                reduce_range,
                types[weights],
                types[activations],
                TensorsData(CalibrationMethod.MinMax, asked),
                sorted(chosen),
                [],
                sorted(kinds),
                options,
            )
            if chosen:  # an empty list of nodes means every node to it
                quantizer.quantize_model()
            quantizer.model.topological_sort()
    except Exception as error:  # its parts raise what they like, and share no base class
        raise ExportError(
            f"ONNX Runtime cannot quantize this file: {type(error).__name__}: {error}", path=prepared.name
        ) from error
    written = quantizer.model.model
    drop_needless_pairs(written.graph, chosen, rounded=not tensorrt)
    if tensorrt:
        pair_residuals(written.graph, residuals, ranges)
    count = sum(node.name in chosen for node in written.graph.node)
    save_model(written, destination, external_data=external_data)
    return count


def calibration_tensors(
    prepared: Path,
    *,
    nodes: Collection[str] | None = None,
    ops: Collection[str] = COMPUTE,
    between: Collection[str] = BETWEEN,
    form: str = "cpu",
) -> list[str]:
    """The tensors of a prepared file whose ranges `quantize_static` needs, for the same nodes or fewer.

    Raises:
        InputError: A name that no node has.
    """
    graph = onnx.load(prepared, load_external_data=False).graph
    return _plan(graph, nodes, ops, between, form)[2]


def _plan(
    graph: onnx.GraphProto,
    nodes: Collection[str] | None,
    ops: Collection[str],
    between: Collection[str],
    form: str,
) -> tuple[set[str], dict[str, str], list[str]]:
    """The nodes to quantize, the residual adds that get a pair, and the tensors whose ranges are needed."""
    if form != "tensorrt":
        chosen = int8_nodes(graph, nodes=nodes, ops=ops, between=between)
        return chosen, {}, tensors_of(graph, chosen)
    chosen = int8_nodes(graph, nodes=nodes, ops=ops, between=())
    residuals = residual_inputs(graph, chosen)
    taken = [name for node in graph.node if node.name in chosen for name in activations_of(node)]
    known = set(tensors_of(graph, chosen))
    return chosen, residuals, list(dict.fromkeys([*(name for name in taken if name in known), *residuals.values()]))


def drop_needless_pairs(graph: onnx.GraphProto, int8: Collection[str], *, rounded: bool = True) -> None:
    """Give float values to the float nodes that read them, and take out the pairs that nothing reads any more.

    A pair at what a float node gives is for the int8 readers only. A pair at what a Gemm or a MatMul gives is taken
    out where no int8 node reads it: their kernels can give floats.

    Args:
        graph: A QDQ graph; changed in place.
        int8: The names of the nodes that compute in int8.
        rounded: Whether float nodes read the rounded values of int8 nodes that cannot give floats.
    """
    makers = {name: node for node in graph.node for name in node.output}
    outputs = {value.name for value in graph.output}
    pairs: list[tuple[onnx.NodeProto, str]] = []  # the second half of each pair, and the node that made what it takes
    for node in graph.node:
        if node.op_type == "DequantizeLinear" and node.input[0] in makers:
            quantize = makers[node.input[0]]
            if quantize.op_type == "QuantizeLinear":
                maker = makers.get(quantize.input[0])
                pairs.append((node, maker.name if maker is not None else ""))
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    kinds = {node.name: node.op_type for node in graph.node}
    for pair, maker in pairs:
        given, taken = pair.output[0], makers[pair.input[0]].input[0]
        inside = [reader for reader in readers[given] if reader.name in int8]
        if rounded and maker in int8 and (inside or kinds[maker] not in ("Gemm", "MatMul")):
            continue
        if given in outputs and taken in makers:
            # The output has the float value under its own name, as its float readers have; the pair gets another name.
            _rename([makers[taken]], taken, given, outputs=True)
            _rename(graph.node, taken, given)
            makers[given] = makers[taken]
            pair.output[0] = f"{given}_DequantizeLinear_Output"
            _rename(inside, given, pair.output[0])
        else:
            _rename([reader for reader in readers[given] if reader.name not in int8], given, taken)
    _drop_unread(graph, outputs)


def _rename(nodes: Iterable[onnx.NodeProto], old: str, new: str, *, outputs: bool = False) -> None:
    """Have nodes read, or give, a value by another name."""
    for node in nodes:
        names = node.output if outputs else node.input
        for place, name in enumerate(names):
            if name == old:
                names[place] = new


def _drop_unread(graph: onnx.GraphProto, outputs: set[str]) -> None:
    while True:
        read = Counter(name for node in graph.node for name in node.input)
        idle = [
            node
            for node in graph.node
            if node.op_type in ("QuantizeLinear", "DequantizeLinear")
            and not any(read[name] or name in outputs for name in node.output)
        ]
        if not idle:
            break
        for node in idle:
            graph.node.remove(node)
    kept = [tensor for tensor in graph.initializer if read[tensor.name]]
    if len(kept) < len(graph.initializer):
        copies = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in kept]
        del graph.initializer[:]
        graph.initializer.extend(copies)


def _check(method: str, form: str, activations: str, weights: str) -> None:
    for what, found, known in (
        ("calibration method", method, METHODS),
        ("form", form, FORMS),
        ("type of activations", activations, _TYPES),
        ("type of weights", weights, _TYPES),
    ):
        if found not in known:
            raise InputError(f"there is no such {what}", found=found, expected=", ".join(known))
