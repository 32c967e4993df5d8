"""Equal ranges in channels, without another result: scales moved from activations and weights into their neighbours."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from torchtrim.errors import InputError
from torchtrim.export.calibration import Statistics
from torchtrim.export.saving import save_whole

_ROUNDS = 20
_LEAST, _MOST = 1e-3, 1e3  # how far one scale may go


def smoothing_tensors(prepared: Path) -> dict[str, int]:
    """The tensors whose channels `smooth` has to know, with the axis: for `calibrate(..., channels=)`."""
    graph = _Graph(onnx.load(prepared))
    return {norm.output[0]: -1 for norm, _ in _smoothable(graph)}


def smooth(prepared: Path, destination: Path, statistics: Statistics, *, alpha: float = 0.5) -> int:
    """Move the outliers of activations into weights, where a LayerNormalization feeds nothing but products.

    SmoothQuant (Xiao et al., 2022): the norm's scale and bias are divided by `s`, the rows of the weights that read it
    are multiplied by it, with `s = max|x|^alpha / max|w|^(1 - alpha)` by channel. The file computes the same.

    Args:
        prepared: A float file that `prepare` wrote.
        destination: Where the changed copy goes.
        statistics: Its calibration, with `channels=smoothing_tensors(prepared)`.
        alpha: How much of the range is moved: 0 none, 1 all.

    Returns:
        How many norms were changed.

    Raises:
        InputError: `alpha` is not between 0 and 1, or a tensor was not calibrated by channel.
    """
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 <= alpha <= 1:
        raise InputError("alpha is a number between 0 and 1", found=alpha)
    graph = _Graph(onnx.load(prepared))
    pairs = _smoothable(graph)
    for norm, products in pairs:
        activations = statistics.channel_largest(norm.output[0])
        weights = np.max([np.abs(_rows(graph, product)).max(1) for product in products], axis=0)
        live = (activations > 0) & (weights > 0)
        s = np.ones_like(activations)
        s[live] = activations[live] ** alpha / weights[live] ** (1 - alpha)
        s = np.clip(s, _LEAST, _MOST)
        for place in range(1, len(norm.input)):
            graph.scale(norm, place, 1 / s)
        for product in products:
            graph.scale(product, 1, s[None, :] if _transposed(product) else s[:, None])
    graph.save(destination)
    return len(pairs)


def equalise_layers(prepared: Path, destination: Path) -> int:
    """Give the weights of neighbouring convolutions equal ranges, channel by channel.

    Cross-layer equalisation (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    2019): channel `i` of a convolution is divided by `s = sqrt(r1 / r2)`, and what the next one does with it is
    multiplied by it, where `r1` and `r2` are the largest weights on both sides. With nothing or a Relu between them,
    and no other reader, the file computes the same. Depthwise convolutions take part on both sides. Pairs that share a
    convolution are worked on in turn until nothing moves.

    Args:
        prepared: A float file that `prepare` wrote.
        destination: Where the changed copy goes.

    Returns:
        How many pairs there are.
    """
    graph = _Graph(onnx.load(prepared))
    pairs = _neighbours(graph)
    for _ in range(_ROUNDS):
        moved = 0.0
        for first, second in pairs:
            ours = graph.array(first.input[1])
            theirs = graph.array(second.input[1])
            groups = _groups(second)
            r1 = np.abs(ours).reshape(len(ours), -1).max(1)
            r2 = _by_input(np.abs(theirs), groups)
            live = (r1 > 0) & (r2 > 0)
            s = np.ones_like(r1)
            s[live] = np.clip(np.sqrt(r1[live] / r2[live]), _LEAST, _MOST)
            graph.scale(first, 1, (1 / s).reshape(-1, *[1] * (ours.ndim - 1)))
            if len(first.input) > 2 and first.input[2]:
                graph.scale(first, 2, 1 / s)
            graph.scale(second, 1, _to_input(s, theirs.shape, groups))
            moved = max(moved, float(np.abs(np.log(s)).max()))
        if moved < 1e-3:
            break
    graph.save(destination)
    return len(pairs)


@dataclass
class _Graph:
    """A graph with its constants as arrays; one that several nodes read is copied before it is changed for one."""

    model: onnx.ModelProto
    makers: dict[str, onnx.NodeProto] = field(init=False)
    readers: dict[str, list[onnx.NodeProto]] = field(init=False)
    outputs: set[str] = field(init=False)

    def __post_init__(self) -> None:
        graph = self.model.graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._changed: dict[str, NDArray[np.float64]] = {}
        self.makers = {name: node for node in graph.node for name in node.output}
        self.readers = defaultdict(list)
        for node in graph.node:
            for name in node.input:
                self.readers[name].append(node)
        self.outputs = {value.name for value in graph.output}

    def constant(self, name: str) -> bool:
        tensor = self._tensors.get(name)
        return tensor is not None and tensor.data_type == onnx.TensorProto.FLOAT

    def array(self, name: str) -> NDArray[np.float64]:
        if name not in self._changed:
            return np.asarray(numpy_helper.to_array(self._tensors[name]), np.float64)
        return self._changed[name]

    def scale(self, node: onnx.NodeProto, place: int, factor: NDArray[np.float64]) -> None:
        """Multiply one of a node's constants."""
        name = node.input[place]
        if len(self.readers[name]) > 1:
            copy = f"{name}_of_{node.name}"
            tensor = self.model.graph.initializer.add()
            tensor.CopyFrom(self._tensors[name])
            tensor.name = copy
            self._tensors[copy] = tensor
            if name in self._changed:
                self._changed[copy] = self._changed[name]
            self.readers[name].remove(node)
            self.readers[copy] = [node]
            node.input[place] = name = copy
        self._changed[name] = self.array(name) * factor

    def save(self, path: Path) -> None:
        for name, array in self._changed.items():
            self._tensors[name].CopyFrom(numpy_helper.from_array(array.astype(np.float32), name))
        save_whole(self.model, path)


def _smoothable(graph: _Graph) -> list[tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    """Norms over the last axis with constant scale and bias, that feed nothing but products with constant weights."""
    found = []
    for node in graph.model.graph.node:
        if node.op_type != "LayerNormalization" or _attribute(node, "axis", -1) != -1 or len(node.output) != 1:
            continue
        given = node.output[0]
        readers = graph.readers[given]
        constants = [name for name in node.input[1:] if name]
        if (
            given not in graph.outputs
            and readers
            and len({id(reader) for reader in readers}) == len(readers)
            and len(constants) == len(node.input) - 1
            and all(graph.constant(name) and graph.array(name).ndim == 1 for name in constants)
            and all(_is_product(graph, reader, given) for reader in readers)
        ):
            found.append((node, readers))
    return found


def _is_product(graph: _Graph, node: onnx.NodeProto, given: str) -> bool:
    if node.op_type not in ("MatMul", "Gemm") or node.input[0] != given or not graph.constant(node.input[1]):
        return False
    return graph.array(node.input[1]).ndim == 2 and not _attribute(node, "transA", 0)


def _transposed(node: onnx.NodeProto) -> bool:
    return node.op_type == "Gemm" and bool(_attribute(node, "transB", 0))


def _rows(graph: _Graph, node: onnx.NodeProto) -> NDArray[np.float64]:
    """A product's weights, one row for each channel that goes in."""
    weights = graph.array(node.input[1])
    return weights.T if _transposed(node) else weights


def _neighbours(graph: _Graph) -> list[tuple[onnx.NodeProto, onnx.NodeProto]]:
    pairs = []
    for second in graph.model.graph.node:
        if second.op_type != "Conv" or not graph.constant(second.input[1]):
            continue
        name = second.input[0]
        alone = name not in graph.outputs and len(graph.readers[name]) == 1
        first = graph.makers.get(name)
        if first is not None and first.op_type == "Relu":
            name = first.input[0]
            alone = alone and name not in graph.outputs and len(graph.readers[name]) == 1
            first = graph.makers.get(name)
        if first is None or not alone or first.op_type != "Conv":
            continue
        if all(graph.constant(name) for name in first.input[1:] if name):
            pairs.append((first, second))
    return pairs


def _groups(node: onnx.NodeProto) -> int:
    return int(_attribute(node, "group", 1))


def _by_input(weights: NDArray[np.float64], groups: int) -> NDArray[np.float64]:
    """The largest weight that each input channel meets; the weights are `(out, in / groups, ...)`."""
    out, inner = weights.shape[:2]
    return np.asarray(weights.reshape(groups, out // groups, inner, -1).max(axis=(1, 3)).reshape(-1))


def _to_input(s: NDArray[np.float64], shape: Sequence[int], groups: int) -> NDArray[np.float64]:
    """The factor of each input channel, spread over the weights `(out, in / groups, ...)`."""
    out, inner = shape[:2]
    spread = np.repeat(s.reshape(groups, 1, inner), out // groups, axis=1).reshape(out, inner)
    return spread.reshape(out, inner, *[1] * (len(shape) - 2))


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    found: Mapping[str, Any] = {attribute.name: attribute for attribute in node.attribute}
    return int(found[name].i) if name in found else default
