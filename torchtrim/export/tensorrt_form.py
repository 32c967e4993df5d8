"""Quantize and dequantize pairs where TensorRT wants them."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import onnx
from onnx import helper, numpy_helper

WEIGHTED = ("Conv", "Gemm", "MatMul")


def residual_inputs(graph: onnx.GraphProto, int8: Collection[str]) -> dict[str, str]:
    """The Add nodes that TensorRT fuses into the int8 layer before them, each with the input that comes past it.

    One input is what an int8 layer gives, and stays as it is; the other, from further back, is what gets a pair. Adds
    of a constant are biases, and are left alone.

    Args:
        graph: The float graph.
        int8: The names of the layers in int8.
    """
    makers = {name: node for node in graph.node for name in node.output}
    constants = {tensor.name for tensor in graph.initializer}

    def layer(name: str) -> bool:
        maker = makers.get(name)
        return maker is not None and maker.op_type in WEIGHTED and maker.name in int8

    found: dict[str, str] = {}
    for node in graph.node:
        if node.op_type != "Add" or any(name in constants for name in node.input):
            continue
        one, other = node.input
        if layer(one) or layer(other):
            found[node.name] = other if layer(one) else one
    return found


def pair_residuals(
    graph: onnx.GraphProto, residuals: Mapping[str, str], ranges: Mapping[str, tuple[float, float]]
) -> None:
    """Put a symmetric int8 pair of its own before the second input of each residual Add.

    Args:
        graph: A QDQ graph; changed in place.
        residuals: What `residual_inputs` gave.
        ranges: The lowest and the highest value of each of these tensors.
    """
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        taken = residuals.get(node.name)
        if taken is not None and taken in node.input:
            low, high = ranges[taken]
            scale = max(abs(low), abs(high)) / 127 or 1.0
            label = f"{node.name}_residual"
            graph.initializer.append(numpy_helper.from_array(np.array(scale, np.float32), f"{label}_scale"))
            graph.initializer.append(numpy_helper.from_array(np.array(0, np.int8), f"{label}_zero_point"))
            parameters = [f"{label}_scale", f"{label}_zero_point"]
            nodes.append(helper.make_node("QuantizeLinear", [taken, *parameters], [f"{label}_q"], name=f"{label}_q"))
            nodes.append(
                helper.make_node("DequantizeLinear", [f"{label}_q", *parameters], [f"{label}_dq"], name=f"{label}_dq")
            )
            node.input[list(node.input).index(taken)] = f"{label}_dq"
        nodes.append(node)
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(copies)
