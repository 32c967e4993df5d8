"""An ONNX graph with its wires: who computes a tensor, who reads it, what is a weight."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

_INTEGER_PREFIXES = ("QLinear", "QGemm", "QAttention", "QOrdered", "QMoE", "MatMulInteger", "ConvInteger")
_INTEGER = {"DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QEmbedLayerNormalization", "MatMulIntegerToFloat"}
# They move numbers, and do so on int8 as well.
MOVES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Gather", "Split", "Concat"}


class Wiring:
    """A graph, to look around in.

    Args:
        graph: The graph.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.nodes = list(graph.node)
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.weights = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
        self._makers = {name: node for node in self.nodes for name in node.output if name}
        self._readers: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in filter(None, node.input):
                self._readers.setdefault(name, []).append(node)
            if node.op_type == "Constant":
                self.weights[node.output[0]] = tuple(node.attribute[0].t.dims)

    def before(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The nodes whose outputs it reads."""
        for name in node.input:
            if name in self._makers and name not in self.weights:
                yield self._makers[name]

    def after(self, node: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        """The nodes that read its outputs."""
        for name in node.output:
            yield from self._readers.get(name, ())

    def ends(self, node: onnx.NodeProto) -> bool:
        """Whether it gives an output of the graph."""
        return any(name in self.outputs for name in node.output)

    def is_weight(self, name: str) -> bool:
        """Whether a tensor is constant."""
        return name in self.weights


def is_integer(node: onnx.NodeProto) -> bool:
    """Whether a node computes in int8."""
    return node.op_type.startswith(_INTEGER_PREFIXES) or node.op_type in _INTEGER
