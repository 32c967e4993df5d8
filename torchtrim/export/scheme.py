"""What an ONNX file computes in, told from its nodes and weights."""

from __future__ import annotations

import os
from collections.abc import Iterator

import onnx

from torchtrim.errors import ExportError

_DYNAMIC = ("DynamicQuantize", "MatMulInteger", "ConvInteger", "QAttention", "QEmbedLayerNormalization")
_STATIC = ("QLinear", "QGemm")  # operators with scales for both sides
_WEIGHTS = "weights"
_BLOCKS = ("MatMulNBits", "GatherBlockQuantized", "MatMulBnb4")
_HALVES = {onnx.TensorProto.FLOAT16: "fp16", onnx.TensorProto.BFLOAT16: "bf16"}


def scheme_of(path: str | os.PathLike[str]) -> str:
    """What a file computes in.

    Returns:
        `dynamic`: int8, activations quantized as it runs. `static`: int8, with fixed scales for activations.
        `weight_only`: weights of 4 or 8 bits that are multiplied as floats. `mixed`: more than one of these.
        `float32`, `float64`, `fp16` or `bf16` else.

    Raises:
        ExportError: Not an ONNX file.
    """
    try:
        graph = onnx.load(os.fspath(path), load_external_data=False).graph
    except Exception as error:  # protobuf's own kinds, and the system's
        raise ExportError(f"cannot be read as an ONNX file: {error}", path=path) from error
    schemes = set(_schemes(graph, set()))
    if _WEIGHTS in schemes:  # static files hold their weights so too
        schemes -= {_WEIGHTS}
        schemes |= set() if "static" in schemes else {"weight_only"}
    if schemes:
        return schemes.pop() if len(schemes) == 1 else "mixed"
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    for kind, name in _HALVES.items():
        if kind in types:
            return name
    return "float64" if onnx.TensorProto.DOUBLE in types and onnx.TensorProto.FLOAT not in types else "float32"


def _schemes(graph: onnx.GraphProto, outer: set[str]) -> Iterator[str]:
    constants = outer | {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        # What is computed from constants alone, as a reshaped weight, is one.
        if constants.issuperset(filter(None, node.input)):
            constants.update(node.output)
            if node.op_type == "DequantizeLinear":
                yield _WEIGHTS
        elif node.op_type.startswith(_DYNAMIC):
            yield "dynamic"
        elif node.op_type.startswith(_STATIC) or node.op_type == "QuantizeLinear":
            # A scale that is computed is one that changes with each input.
            fixed = len(node.input) < 2 or node.input[1] in constants
            yield "static" if fixed else "dynamic"
        elif node.op_type in _BLOCKS:
            yield "weight_only"
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _schemes(attribute.g, constants)
