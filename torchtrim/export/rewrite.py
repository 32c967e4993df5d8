"""An ONNX file that is written anew, node by node: constants looked up, names kept apart, what nobody reads dropped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from torchtrim.export.saving import save_model

FLOATS = {onnx.TensorProto.FLOAT: np.float32, onnx.TensorProto.FLOAT16: np.float16}


class Rewrite:
    """A file whose nodes are read in order, and kept or replaced.

    Nodes inside the branches of an `If` or a `Loop` are kept as they are.

    Args:
        source: The file.
    """

    def __init__(self, source: Path) -> None:
        self.model = onnx.load(source)
        self.opset = next(int(entry.version) for entry in self.model.opset_import if entry.domain in ("", "ai.onnx"))
        self.types = _types(source, self.model)
        self._nodes: list[onnx.NodeProto] = []
        self._initializers = {tensor.name: tensor for tensor in self.model.graph.initializer}
        self._producers = {name: node for node in self.model.graph.node for name in node.output}
        self._taken = set(self._initializers) | set(self._producers)
        self._taken |= {value.name for value in self.model.graph.input}
        self._arrays: dict[str, NDArray[Any] | None] = {}

    @property
    def nodes(self) -> list[onnx.NodeProto]:
        """The nodes of the file as it was."""
        return list(self.model.graph.node)

    def constant(self, name: str) -> NDArray[Any] | None:
        """The value of a tensor that is the same in every run, also one that is transposed first; None for another."""
        if name not in self._arrays:
            self._arrays[name] = self._read(name)
        return self._arrays[name]

    def is_computed(self, name: str) -> bool:
        """Whether a tensor is what a node gives, and not a weight or an input of the file."""
        return name in self._producers

    def keep(self, node: onnx.NodeProto) -> None:
        """Go on with a node as it is."""
        self._nodes.append(node)

    def add(self, op: str, inputs: list[str], output: str, **attributes: Any) -> str:
        """Write a new node with one output.

        Returns:
            The output's name: the one asked for where it is free, or else one like it.
        """
        name = self.fresh(output)
        self._nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def put(self, op: str, inputs: list[str], output: str, **attributes: Any) -> None:
        """Write a new node that gives a tensor that the file has already, in place of the node that gave it."""
        self._nodes.append(helper.make_node(op, inputs, [output], name=self.fresh(f"{output}_{op}"), **attributes))

    def store(self, name: str, array: NDArray[Any]) -> str:
        """Write a new constant, under that name or one like it, and return its name."""
        return self.store_proto(numpy_helper.from_array(array, self.fresh(name)))

    def store_proto(self, tensor: onnx.TensorProto) -> str:
        """Write a new constant that numpy has no type for; its name must be fresh."""
        self._initializers[tensor.name] = tensor
        return str(tensor.name)

    def fresh(self, name: str) -> str:
        """A name like this one that no tensor has; it is taken then."""
        free, number = name, 1
        while free in self._taken:
            free, number = f"{name}_{number}", number + 1
        self._taken.add(free)
        return free

    def finish(self) -> onnx.ModelProto:
        """The file as it is now, without constants and nodes that nobody reads."""
        graph = self.model.graph
        read = {value.name for value in graph.output}
        kept: list[onnx.NodeProto] = []
        for node in reversed(self._nodes):
            if any(name in read for name in node.output):
                kept.append(node)
                read |= set(names_read(node))
        del graph.node[:]
        graph.node.extend(reversed(kept))
        del graph.initializer[:]
        graph.initializer.extend(tensor for name, tensor in self._initializers.items() if name in read)
        known = {name for node in kept for name in node.output}
        described = [value for value in graph.value_info if value.name in known]
        del graph.value_info[:]
        graph.value_info.extend(described)
        return self.model

    def save(self, destination: Path, *, external_data: bool = False) -> onnx.ModelProto:
        """Write the file, without constants and nodes that nobody reads, and return it.

        Args:
            destination: Where it goes.
            external_data: Keep the weights beside it (past 2 GB); the model returned is without them then.
        """
        model = self.finish()
        save_model(model, destination, external_data=external_data)
        return model

    def _read(self, name: str) -> NDArray[Any] | None:
        if name in self._initializers:
            array: NDArray[Any] = numpy_helper.to_array(self._initializers[name])
            return array
        node = self._producers.get(name)
        if node is None or node.domain not in ("", "ai.onnx"):
            return None
        if node.op_type == "Constant":
            value = attribute(node, "value")
            return numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else None
        if node.op_type in ("Identity", "Transpose"):
            before = self.constant(node.input[0])
            if before is None or node.op_type == "Identity":
                return before
            return np.ascontiguousarray(before.transpose(attribute(node, "perm")))
        return None


def sort_nodes(graph: onnx.GraphProto) -> None:
    """Put the nodes of a graph in an order in which each comes after what it reads, and otherwise as they were."""
    maker = {name: place for place, node in enumerate(graph.node) for name in node.output if name}
    needs = [{maker[name] for name in names_read(node) if name in maker} for node in graph.node]
    order: list[int] = []
    done: set[int] = set()
    for place in range(len(needs)):
        waiting = [place]
        while waiting:
            if waiting[-1] in done:
                waiting.pop()
                continue
            missing = sorted(needs[waiting[-1]] - done - {waiting[-1]})
            if missing:
                waiting.extend(missing[::-1])
            else:
                done.add(waiting[-1])
                order.append(waiting.pop())
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes[place] for place in order)


def names_read(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors that a node reads, also from inside its branches."""
    yield from node.input
    for entry in node.attribute:
        if entry.type == onnx.AttributeProto.GRAPH:
            for inner in entry.g.node:
                yield from names_read(inner)
            yield from (value.name for value in entry.g.output)


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:
    """The value of a node's attribute."""
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), default)


def _types(source: Path, model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor that is known. The weights are left out of it, since they may be past 2 GB."""
    graph = onnx.shape_inference.infer_shapes(onnx.load(source, load_external_data=False)).graph
    types = {tensor.name: int(tensor.data_type) for tensor in model.graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            types[value.name] = int(value.type.tensor_type.elem_type)
    return types
