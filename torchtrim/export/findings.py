"""What keeps an ONNX file from being faster: one rule a function, each with what to try."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx

from torchtrim.export.profile import NodeTime, Profile
from torchtrim.export.wiring import Wiring, is_integer

_PAIR = {"QuantizeLinear", "DequantizeLinear"}
_FUSED_INTO_CONV = {"Relu", "Clip", "Sigmoid", "HardSigmoid", "LeakyRelu", "Tanh", "HardSwish"}  # by ONNX Runtime
_ALONE = {"Gelu", "QuickGelu", "Elu", "Selu", "Mish", "Softplus", "PRelu", "Celu", "Swish"}
_CONVS = {"Conv", "FusedConv", "NhwcFusedConv"}
_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm", "FusedGemm"}
_BETWEEN = {"Add", "Mul", "Div", "Sub", "Where", "Cast", "Dropout", "Identity", *_PAIR}  # of two products in attention
_MUCH = 0.05  # of the time, from which copying and casting is worth a word
_TINY = 16_384  # multiply-accumulates: a few microseconds of work, about what calling a node costs
_SLIGHT = {"width": 0.01, "tiny product": 0.01}  # the share of the time below which a rule keeps quiet
_WASTE = 0.1  # the share of the lanes that stay empty, from which a width is worth a word


@dataclass(frozen=True)
class Finding:
    """Something that costs time.

    Attributes:
        kind: The rule: `batch norm`, `activation`, `gelu`, `layer norm`, `attention`, `float island` (quantize and
            dequantize nodes that did not melt away), `unpacked weights`, `provider`, `dynamic convolution`, `width`,
            `copies` or `tiny product`.
        nodes: The nodes it is about.
        what: What is so.
        hint: What to try.
        ms: The milliseconds a run that these nodes take.
        share: Their share of the time of all nodes: the most that can be gained.
    """

    kind: str
    nodes: tuple[str, ...]
    what: str
    hint: str
    ms: float
    share: float


_Found: TypeAlias = "tuple[Sequence[onnx.NodeProto], str, str]"
_Rule: TypeAlias = "Callable[[_Graph], Iterator[_Found]]"


class _Graph(Wiring):
    """The optimised graph with its times, beside the graph of the file."""

    def __init__(self, profile: Profile, source: onnx.GraphProto, instructions: Sequence[str]) -> None:
        super().__init__(profile.graph)
        self.times = {node.name: node for node in profile.nodes}
        self.first = profile.providers[0] if profile.providers else ""
        self.source = Wiring(source)
        self.instructions = instructions

    def time(self, nodes: Iterable[onnx.NodeProto]) -> tuple[float, float]:
        known = [self.times[name] for name in {node.name for node in nodes} if name in self.times]
        return sum(node.ms for node in known), sum(node.share for node in known)

    def timed(self, node: onnx.NodeProto) -> NodeTime | None:
        return self.times.get(node.name)


def find(profile: Profile, source: onnx.GraphProto, instructions: Sequence[str]) -> tuple[Finding, ...]:
    """Everything that the rules find, the most time first; alike findings of one rule are one.

    Args:
        profile: The times, and the graph that was run.
        source: The graph of the file, before ONNX Runtime's optimisations.
        instructions: The processor's instruction sets, as in `Machine.instructions`.
    """
    graph = _Graph(profile, source, instructions)
    merged: dict[tuple[str, str, str], list[onnx.NodeProto]] = {}
    for kind, rule in _RULES.items():
        for nodes, what, hint in rule(graph):
            merged.setdefault((kind, what, hint), []).extend(nodes)
    found = [
        Finding(kind, tuple(dict.fromkeys(node.name or node.op_type for node in nodes)), what, hint, *graph.time(nodes))
        for (kind, what, hint), nodes in merged.items()
    ]
    worth = [finding for finding in found if finding.share >= _SLIGHT.get(finding.kind, 0.0)]
    return tuple(sorted(worth, key=lambda finding: -finding.ms))


def _batch_norms(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        if node.op_type == "BatchNormalization":
            before = next(graph.before(node), None)
            where = f"after {before.op_type}" if before is not None else "at the start"
            yield (
                [node],
                f"batch norm left by itself, {where}",
                "torchtrim.fuse_batchnorm before the export, where a layer with weights comes just before it",
            )


def _activations(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        before = next(graph.before(node), None)
        if before is not None and before.op_type.startswith("Reorder"):  # back from the blocked layout
            before = next(graph.before(before), None)
        if before is None or before.op_type not in _CONVS:
            continue
        if node.op_type in _FUSED_INTO_CONV:
            several = len(list(graph.after(before))) > 1 or graph.ends(before)
            why = "what the convolution gives is read elsewhere too" if several else "ONNX Runtime did not fuse it"
            hint = "read the activation's output in both places" if several else "a newer ONNX Runtime or opset="
            yield [node], f"{node.op_type} after a convolution is not fused: {why}", hint
        elif node.op_type in _ALONE:
            hint = "tt.replace it by ReLU or ReLU6, which are fused, and fine-tune"
            yield [node], f"{node.op_type} has no fused form with a convolution", hint


def _gelus(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        if node.op_type == "Erf":
            pieces = [node, *_near(graph, node, {"Add", "Mul", "Div"}, steps=2)]
            yield pieces, "GELU in loose pieces around Erf", "opset=20, where GELU is one operator"


def _layer_norms(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        if node.op_type != "Sqrt" or not any(each.op_type in {"Div", "Reciprocal"} for each in graph.after(node)):
            continue
        parts = _near(graph, node, {"Add", "ReduceMean", "Pow", "Sub", "Div", "Mul", "Reciprocal"}, steps=3)
        if any(each.op_type == "ReduceMean" for each in parts):
            hint = "opset=17 or later, where it is one operator; nn.LayerNorm in place of one's own"
            yield [node, *parts], "layer norm in loose pieces around ReduceMean and Sqrt", hint


def _near(graph: _Graph, start: onnx.NodeProto, ops: set[str], *, steps: int) -> list[onnx.NodeProto]:
    """The nodes of these operators that are joined to a node, at most so many wires away."""
    seen, edge = {id(start)}, [start]
    found: list[onnx.NodeProto] = []
    for _ in range(steps):
        reached = []
        for node in edge:
            for other in (*graph.before(node), *graph.after(node)):
                if id(other) not in seen and other.op_type in ops:
                    seen.add(id(other))
                    reached.append(other)
        found += reached
        edge = reached
    return found


def _attention(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        if node.op_type not in {"Softmax", "QLinearSoftmax"}:
            continue
        after, ahead = _through(graph, node, forward=True), _through(graph, node, forward=False)
        products = [each for part in (after, ahead) for each in part if "MatMul" in each.op_type]
        if len(products) >= 2:
            yield (
                [node, *after, *ahead],
                "attention in loose pieces: product, softmax, product",
                "onnxruntime.transformers.optimizer on the float file, before any quantization",
            )


def _through(graph: _Graph, start: onnx.NodeProto, *, forward: bool) -> list[onnx.NodeProto]:
    """What lies between a node and the next product, and that product."""
    found, edge = [], [start]
    for _ in range(6):
        reached = [other for node in edge for other in (graph.after(node) if forward else graph.before(node))]
        found += [other for other in reached if other.op_type in _BETWEEN or "MatMul" in other.op_type]
        if any("MatMul" in other.op_type for other in reached):
            return found
        edge = [other for other in reached if other.op_type in _BETWEEN]
    return []


def _pairs(graph: _Graph) -> Iterator[_Found]:
    """Regions of floats that int8 nodes, or the graph's ends, enclose."""
    seen: set[int] = set()
    for start in graph.nodes:
        if start.op_type != "DequantizeLinear" or id(start) in seen:
            continue
        if graph.is_weight(start.input[0]):
            continue
        region, edge = [], [start]
        seen.add(id(start))
        while edge:
            node = edge.pop()
            region.append(node)
            # A quantized tensor is where a region ends.
            ahead = () if node.op_type == "QuantizeLinear" else graph.after(node)
            behind = () if node.op_type == "DequantizeLinear" else graph.before(node)
            for other in (*ahead, *behind):
                if id(other) not in seen and not is_integer(other):
                    seen.add(id(other))
                    edge.append(other)
        yield from _region(graph, region)


def _region(graph: _Graph, region: Sequence[onnx.NodeProto]) -> Iterator[_Found]:
    floats = [node for node in region if node.op_type not in _PAIR]
    ends = [node for node in region if node.op_type == "QuantizeLinear"]
    if not floats and not ends:
        return  # the file's own outputs are floats
    spent = Counter[str]()
    for node in floats:
        spent[node.op_type] += round(graph.time([node])[0] * 1e6) + 1
    ops = ", ".join(op for op, _ in spent.most_common(4))
    pairs = [node for node in region if node.op_type in _PAIR]
    if not floats:
        where = ", ".join(sorted({node.op_type for pair in ends for node in graph.after(pair)}))
        yield (
            pairs,
            f"tensors are dequantized and quantized again before {where or 'the end'}",
            "one scale for both sides: calibrate the tensors that meet there together",
        )
    elif ends:
        yield (
            region,
            f"a float island between int8 nodes: {ops}",
            f"quantize {ops} as well where the accuracy allows it, or leave the nodes around it in float",
        )
    else:
        before = ", ".join(sorted({node.op_type for pair in pairs for node in graph.before(pair)}))
        yield (
            pairs,
            f"int8 turned back into floats for {ops}" + (f", after {before}" if before else ""),
            f"quantize {ops} as well, or leave the node before it in float",
        )


def _unpacked(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        if node.op_type == "DequantizeLinear" and graph.is_weight(node.input[0]):
            readers = ", ".join(sorted({each.op_type for each in graph.after(node)}))
            yield (
                [node],
                f"int8 weights are unpacked in every run, for a float {readers or 'output'}",
                "quantize the activation too, so that the product is int8; or float weights, if memory allows",
            )


def _providers(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        timed = graph.timed(node)
        if timed is not None and timed.provider and timed.provider != graph.first:
            what = f"{timed.op} runs on {timed.provider}, not on {graph.first}"
            yield [node], what, "an operator or a type that the provider has a kernel for; each change copies tensors"


def _dynamic_convolutions(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        if node.op_type == "ConvInteger":
            scales = [each for each in graph.before(node) if each.op_type == "DynamicQuantizeLinear"]
            yield (
                [node, *scales],
                "a convolution in dynamic int8, which is slower than in float",
                'quantize="static", or dynamic int8 of the matrix products alone',
            )


def _copies(graph: _Graph) -> Iterator[_Found]:
    hints = {
        "Cast": "one type for the whole graph: the weights' or the inputs'",
        "Transpose": "the layout that the next node wants, in the model; products that take a transposed operand",
        "ReorderInput": "widths that are multiples of the vector size, so that layers keep the blocked layout",
        "ReorderOutput": "widths that are multiples of the vector size, so that layers keep the blocked layout",
    }
    for op, hint in hints.items():
        nodes = [node for node in graph.nodes if node.op_type == op]
        share = graph.time(nodes)[1]
        if share > _MUCH:
            yield nodes, f"{op} only moves or converts numbers", hint


def _tiny(graph: _Graph) -> Iterator[_Found]:
    for node in graph.nodes:
        if node.op_type not in _PRODUCTS and "MatMul" not in node.op_type:
            continue
        timed = graph.timed(node)
        if timed is None or not timed.shapes:
            continue
        left = timed.shapes[0]
        right = graph.weights.get(node.input[1], timed.shapes[1] if len(timed.shapes) > 1 else ())
        work = math.prod(left) * (right[-1] if right else 1)
        if 0 < work < _TINY:
            hint = "merge it with its neighbours, or a larger batch: calling it costs more than computing it"
            yield [node], f"a {timed.op} of fewer than {_TINY:,} multiply-accumulates", hint


def _widths(graph: _Graph) -> Iterator[_Found]:
    from torchtrim.export.vector_widths import misfits

    yield from misfits(graph.source, graph.nodes, graph.instructions, _WASTE)


_RULES: dict[str, _Rule] = {
    "batch norm": _batch_norms,
    "activation": _activations,
    "gelu": _gelus,
    "layer norm": _layer_norms,
    "attention": _attention,
    "float island": _pairs,
    "unpacked weights": _unpacked,
    "provider": _providers,
    "dynamic convolution": _dynamic_convolutions,
    "width": _widths,
    "copies": _copies,
    "tiny product": _tiny,
}
