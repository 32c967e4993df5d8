"""The kinds of layers in a file: those of one kind gain or lose alike from int8, so they are decided on together."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

_PRODUCTS = ("MatMul", "Gemm")
# What ONNX Runtime makes part of a layer.
_ABSORBED = (
    "Add",
    "BatchNormalization",
    "Clip",
    "Gelu",
    "HardSigmoid",
    "HardSwish",
    "LeakyRelu",
    "Mul",
    "Relu",
    "Sigmoid",
)


@dataclass(frozen=True)
class Kind:
    """Layers of one kind.

    Attributes:
        name: What they are.
        product: Whether they are matrix products, which have a dynamic int8 form that pays.
        nodes: The names of their nodes, in order.
        share: Their share of the float file's time.
    """

    name: str
    product: bool
    nodes: tuple[str, ...]
    share: float


def kinds_of(graph: onnx.GraphProto, times: Mapping[str, float]) -> list[Kind]:
    """The layers with constant weights by kind, those that take the most time first.

    Convolutions are told apart as the first one (few input channels), depthwise, grouped, of one value a channel (as in
    squeeze-and-excite), 1 x 1 and larger; products as those that widen, narrow or keep the width.

    Args:
        graph: Of a prepared file, with its shapes.
        times: Milliseconds of nodes by name, as the profiler gives them. A fused node goes by a name that begins with
            that of the node it does the work of, or of what it gives: a convolution with the activation after it by
            that activation's output.
    """
    weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    shapes = _shapes(graph)
    groups: dict[tuple[str, bool], list[str]] = defaultdict(list)
    for node in graph.node:
        if len(node.input) > 1 and node.input[1] in weights:
            if node.op_type == "Conv":
                groups[_convolution(node, weights[node.input[1]], shapes), False].append(node.name)
            elif node.op_type in _PRODUCTS:
                groups[_product(node, weights[node.input[1]]), True].append(node.name)
    total = sum(times.values()) or 1.0
    spent = _spent(_known_as(graph, {name for nodes in groups.values() for name in nodes}), times)
    kinds = [
        Kind(name, product, tuple(nodes), sum(spent[node] for node in nodes) / total)
        for (name, product), nodes in groups.items()
    ]
    return sorted(kinds, key=lambda kind: -kind.share)


def _convolution(node: onnx.NodeProto, weight: tuple[int, ...], shapes: Mapping[str, tuple[int | None, ...]]) -> str:
    group = next((entry.i for entry in node.attribute if entry.name == "group"), 1)
    if group > 1:
        return "depthwise convolutions" if weight[1] == 1 else "grouped convolutions"
    if weight[1] <= 4:
        return "the first convolution"
    if all(size == 1 for size in weight[2:]):
        given = shapes.get(node.input[0], ())
        return "squeeze-and-excite" if given[2:] and all(n == 1 for n in given[2:]) else "1 x 1 convolutions"
    return "convolutions"


def _product(node: onnx.NodeProto, weight: tuple[int, ...]) -> str:
    if len(weight) != 2:
        return "stacked products"
    transposed = any(entry.name == "transB" and entry.i for entry in node.attribute)
    given, wanted = (weight[1], weight[0]) if transposed else weight
    return "products that widen" if wanted > given else "products that narrow" if wanted < given else "products"


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int | None, ...]]:
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        dims = value.type.tensor_type.shape.dim
        found[value.name] = tuple(dim.dim_value if dim.HasField("dim_value") else None for dim in dims)
    return found


def _known_as(graph: onnx.GraphProto, layers: set[str]) -> dict[str, str]:
    """The layer that a name stands for: its own, those of its outputs, and of what activations after it give."""
    layer_of: dict[str, str] = {}
    for node in graph.node:
        if node.name in layers:
            owner: str | None = node.name
            layer_of[node.name] = node.name
        elif node.op_type in _ABSORBED:
            owner = next((layer_of[name] for name in node.input if name in layer_of), None)
        else:
            continue
        if owner is not None:
            layer_of |= dict.fromkeys(node.output, owner)
    return layer_of


def _spent(layer_of: Mapping[str, str], times: Mapping[str, float]) -> dict[str, float]:
    """The time of each layer: a profile's name is cut at its separators until it stands for one."""
    spent = dict.fromkeys(layer_of.values(), 0.0)
    for name, ms in times.items():
        stem = name
        while stem and stem not in layer_of:
            stem = re.sub(r"[_/ ]?[^_/ ]*$", "", stem)
        if stem:
            spent[layer_of[stem]] += ms
    return spent
