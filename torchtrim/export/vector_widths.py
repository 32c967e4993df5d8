"""Layers whose widths do not fill the processor's vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx

from torchtrim.export.wiring import Wiring

_FEW = 4  # channels of a picture: a first layer has what it has
_BY_NUMBER = {"QuantizeLinear", "DequantizeLinear", "Cast", "Add", "Mul", "Softmax", "LogSoftmax", "Sigmoid"}
# Where the weight is among the inputs, by operator.
_WEIGHT = {
    "Conv": 1, "MatMul": 1, "Gemm": 1, "ConvInteger": 1, "MatMulInteger": 1, "QLinearConv": 3, "QLinearMatMul": 3,
}  # fmt: skip


def vector_size(instructions: Sequence[str], *, integer: bool) -> int:
    """How many numbers the processor takes at once.

    Args:
        instructions: Its instruction sets, as in `Machine.instructions`.
        integer: Of int8; of float32 else.

    Example:
        >>> vector_size(("avx2",), integer=False), vector_size(("avx2", "avx512f"), integer=False)
        (8, 16)
        >>> vector_size(("avx2",), integer=True), vector_size(("asimd",), integer=False)
        (32, 4)
    """
    floats = 16 if "avx512f" in instructions else 8 if "avx2" in instructions else 4
    # Int8 kernels of wider processors work on halves of their vectors too.
    return min(32, 4 * floats) if integer else floats


def misfits(
    source: Wiring, optimised: Sequence[onnx.NodeProto], instructions: Sequence[str], waste: float
) -> Iterator[tuple[list[onnx.NodeProto], str, str]]:
    """The layers of a file of which a width leaves too many lanes empty.

    Args:
        source: The file's graph.
        optimised: The nodes that are run, whose weights may be padded already.
        instructions: The processor's instruction sets.
        waste: The share of the lanes that may stay empty.
    """
    run = {output: node for node in optimised for output in node.output} | {node.name: node for node in optimised}
    unpacked = {node.output[0]: node.input[0] for node in source.nodes if node.op_type == "DequantizeLinear"}
    for node in source.nodes:
        place = _WEIGHT.get(node.op_type)
        if place is None or len(node.input) <= place:
            continue
        name = node.input[place]
        # Behind a DequantizeLinear the weight is int8, and so is the product where both sides are.
        integer = "Integer" in node.op_type or "QLinear" in node.op_type or name in unpacked
        shape = source.weights.get(unpacked.get(name, name))
        where = _run_as(node, source, run)
        if shape is None or len(shape) < 2 or where is None:
            continue
        size = vector_size(instructions, integer=integer)
        for side, width in _widths(node, shape, ends=_ends(node, source)):
            full = -(-width // size) * size
            if 1 - width / full >= waste:
                kind = "int8" if integer else "float32"
                what = f"{width} {side}: {full - width} of {full} lanes stay empty ({kind}, {size} at once)"
                yield (
                    [where],
                    what,
                    _hint(size),
                )


def _hint(size: int) -> str:
    return (
        f"multiples of {size}: a wider layer may cost no more, and prune_channels(..., round_to={size}) keeps to them"
    )


def _widths(node: onnx.NodeProto, shape: tuple[int, ...], *, ends: bool) -> Iterator[tuple[str, int]]:
    if "Conv" in node.op_type:
        if not ends:
            yield "output channels", shape[0]
        if shape[1] > _FEW:  # not the first layer, and no depthwise one
            yield "input channels", shape[1]
        return
    flipped = any(entry.name == "transB" and entry.i for entry in node.attribute)
    reads, gives = (shape[-1], shape[-2]) if flipped else (shape[-2], shape[-1])
    yield "inputs", reads
    if not ends:
        yield "outputs", gives


def _ends(node: onnx.NodeProto, source: Wiring) -> bool:
    """Whether what it gives is the file's output, but for what is done to each number: a class has its column."""
    for _ in range(6):
        if source.ends(node):
            return True
        after = list(source.after(node))
        if len(after) != 1 or after[0].op_type not in _BY_NUMBER:
            return False
        node = after[0]
    return False


def _run_as(node: onnx.NodeProto, source: Wiring, run: dict[str, onnx.NodeProto]) -> onnx.NodeProto | None:
    """The node that is run in its place: ONNX Runtime names it after what it was fused with."""
    for _ in range(4):
        for name in filter(None, (node.name, f"{node.output[0]}_nchwc", node.output[0])):
            if name in run:
                return run[name]
        fused = next((other for name, other in run.items() if node.name and name.startswith(f"{node.name}_")), None)
        if fused is not None:
            return fused
        after = list(source.after(node))
        if len(after) != 1:
            return None
        node = after[0]
    return None
