"""The ranges that a model was trained with, at the tensors of its ONNX file."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from torch import nn

from torchtrim.errors import ExportError, InputError
from torchtrim.export.calibration import Statistics
from torchtrim.export.targets import Target
from torchtrim.train.quantization import QuantizationAware
from torchtrim.train.trained_ranges import TrainedRanges

_LAYERS = ("Conv", "Gemm", "MatMul")
# These give what they take, moved about, and ONNX Runtime quantizes both sides alike: with the range of what they take.
_MOVING = ("Flatten", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True)
class FoundRanges:
    """Trained ranges at the tensors of a file.

    Attributes:
        ranges: The lowest and the highest value by tensor.
        levels: How many steps of a channel's weights make its largest, by the names of the weights that were trained.
        missing: The layers that are not in the file under their names.
    """

    ranges: dict[str, tuple[float, float]]
    levels: dict[str, int]
    missing: tuple[str, ...]

    def over(self, statistics: Statistics) -> Statistics:
        """Calibration for the tensors that were not trained, these ranges for the others."""
        return _Both(statistics.tensors, self.ranges)

    def notes(self) -> list[str]:
        """What there is to know of them."""
        if not self.missing:
            return []
        more = f" and {len(self.missing) - 3} more" if len(self.missing) > 3 else ""
        return [f"trained ranges that the file has no tensor for: {', '.join(self.missing[:3])}{more}"]


@dataclass(frozen=True)
class _Both(Statistics):
    trained: dict[str, tuple[float, float]] = field(default_factory=dict)

    def range(self, tensor: str, method: str = "minmax") -> tuple[float, float]:
        found = self.trained.get(tensor)
        return super().range(tensor, method) if found is None else found


def checked_ranges(
    ranges: QuantizationAware | TrainedRanges,
    model: nn.Module,
    *,
    scheme: str,
    target: Target,
    per_channel: bool,
    reduce_range: bool | None,
) -> TrainedRanges:
    """The ranges, where they are this model's and go with what is asked for.

    Raises:
        InputError: They are another model's, or for another scheme, target or format; or no ranges.
    """
    found = ranges.ranges() if isinstance(ranges, QuantizationAware) else ranges
    if not isinstance(found, TrainedRanges):
        raise InputError(
            "not trained ranges",
            path="ranges",
            found=type(ranges).__name__,
            expected="a QuantizationAware, or what its ranges() gives",
        )
    if scheme != "static":
        raise InputError(
            "trained ranges are for static int8", path="quantize", found=scheme, expected="static", hint="no ranges="
        )
    if not per_channel:
        raise InputError("the weights were trained with a step for each channel", path="per_channel", found=False)
    if found.symmetric != (target.name in ("cuda", "tensorrt")):
        raise InputError(
            "the ranges were trained for another kind of target",
            path="target",
            found=target.name,
            expected="cuda or tensorrt" if found.symmetric else "cpu or openvino",
            hint=f'tt.QuantizationAware(..., target="{target.name}")',
        )
    if reduce_range is not None and reduce_range != found.format.reduce_range:
        raise InputError(
            "the weights were trained with another range",
            path="reduce_range",
            found=reduce_range,
            expected=found.format.reduce_range,
        )
    found.check(model)
    return found


def find_ranges(trained: TrainedRanges, model: nn.Module, prepared: Path) -> FoundRanges:
    """The tensors of a prepared file that trained layers take, and the weights of these layers.

    A layer is told by the name of its weight. The exporter transposes the weight of a linear layer whose input has more
    than two dimensions, and gives it a name of its own: such a layer is told by the weight's values. Where several
    layers have the same values, they come in the order of execution, in the file as in the model.

    Args:
        trained: The ranges.
        model: The model that the file was made of, its weights rounded.
        prepared: The file.

    Raises:
        ExportError: Not one of the layers is in the file.
    """
    graph = onnx.load(prepared).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    modules = dict(model.named_modules())
    paths: dict[bytes, list[str]] = defaultdict(list)  # of layers with the same weight
    key_of: dict[str, bytes] = {}
    for path in trained.activations:
        weight = modules[path].weight
        key_of[path] = _key(weight.detach().cpu().float().numpy())
        paths[key_of[path]].append(path)
    names = {f"{path}.weight" if path else "weight": path for path in trained.activations}
    nodes: dict[bytes, list[onnx.NodeProto]] = defaultdict(list)
    for node in graph.node:
        if node.op_type in _LAYERS and len(node.input) > 1 and node.input[1] in constants:
            named = names.get(node.input[1])
            key = key_of[named] if named is not None else _key(_outputs_first(node, constants[node.input[1]]))
            if key in paths:
                nodes[key].append(node)
    ranges: dict[str, tuple[float, float]] = {}
    levels: dict[str, int] = {}
    for key, found in nodes.items():
        for place, node in enumerate(found):
            several = [paths[key][place]] if len(found) == len(paths[key]) else paths[key]
            for path in several:
                _widen(ranges, node.input[0], trained.activations[path])
                if path in trained.outputs:
                    _widen(ranges, node.output[0], trained.outputs[path])
            levels[node.input[1]] = trained.levels
    missing = tuple(path for path, key in key_of.items() if key not in nodes)
    if not nodes:
        raise ExportError(
            "none of the trained layers are in the file", path=prepared.name, found=missing[:3], hint="no ranges="
        )
    _before_moves(graph, ranges)
    return FoundRanges(ranges, levels, missing)


def overrides(model: onnx.ModelProto, levels: Mapping[str, int], full: int) -> dict[str, list[dict[str, Any]]]:
    """The steps of weights that have fewer levels than their type, as ONNX Runtime's quantizer takes them.

    Args:
        model: A prepared file.
        levels: By the name of the weight.
        full: The levels that ONNX Runtime gives a weight.
    """
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    found: dict[str, list[dict[str, Any]]] = {}
    for node in model.graph.node:
        if node.op_type not in _LAYERS or len(node.input) < 2 or levels.get(node.input[1], full) == full:
            continue
        weight = _outputs_first(node, constants[node.input[1]])
        largest = np.abs(weight).reshape(len(weight), -1).max(1)
        steps = np.where(largest > 0, largest / levels[node.input[1]], 1).astype(np.float32)
        found[node.input[1]] = [
            {"axis": 0 if _is_outputs_first(node) else 1, "scale": step, "zero_point": np.int8(0)} for step in steps
        ]
    return found


def _outputs_first(node: onnx.NodeProto, tensor: onnx.TensorProto) -> NDArray[Any]:
    weight: NDArray[Any] = numpy_helper.to_array(tensor)
    return weight if _is_outputs_first(node) or weight.ndim != 2 else weight.T


def _is_outputs_first(node: onnx.NodeProto) -> bool:
    return node.op_type == "Conv" or any(entry.name == "transB" and entry.i for entry in node.attribute)


def _key(weight: NDArray[Any]) -> bytes:
    return repr(weight.shape).encode() + np.ascontiguousarray(weight, np.float32).tobytes()


def _widen(ranges: dict[str, tuple[float, float]], name: str, found: tuple[float, float]) -> None:
    low, high = ranges.get(name, found)
    ranges[name] = min(low, found[0]), max(high, found[1])


def _before_moves(graph: onnx.GraphProto, ranges: dict[str, tuple[float, float]]) -> None:
    """Give what a MaxPool or a Reshape takes the range of what it gives, where nothing else takes it."""
    readers: dict[str, int] = defaultdict(int)
    for name in _read(graph):
        readers[name] += 1
    for node in reversed(graph.node):
        if node.op_type in _MOVING and node.output[0] in ranges and readers[node.input[0]] == 1:
            ranges.setdefault(node.input[0], ranges[node.output[0]])


def _read(graph: onnx.GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from node.input
    for value in graph.output:
        yield value.name
