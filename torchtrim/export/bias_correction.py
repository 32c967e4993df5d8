"""The shift that rounding gives each channel's mean, put right in the biases of an int8 file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import InputError
from torchtrim.export.calibration import Tapped
from torchtrim.export.calibration_data import CalibrationData, Feed
from torchtrim.export.graph import save_whole
from torchtrim.export.workshop import room_beside

GROUPS = 8
ROWS = 64
_INT32 = 2**31 - 1


@dataclass(frozen=True)
class BiasCorrection:
    """What correcting the biases did to a file's outputs, on data that was not used for it.

    Attributes:
        before: The error of the outputs relative to the float file's, before: the norm of the difference over the norm.
        after: The same, after.
        corrected: How many biases were changed.
        skipped: How many int8 layers have no bias to change.
    """

    before: float
    after: float
    corrected: int
    skipped: int

    @property
    def helped(self) -> bool:
        """Whether the error fell."""
        return self.after < self.before

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "helped": self.helped}

    def __str__(self) -> str:
        return f"{self.corrected} biases corrected: the outputs' error went from {self.before:.4f} to {self.after:.4f}"


def correct_biases(
    prepared: Path,
    quantized: Path,
    destination: Path,
    data: CalibrationData,
    *,
    groups: int = GROUPS,
    rows: int = ROWS,
) -> BiasCorrection:
    """Write a copy of an int8 file whose layers give each channel the mean that it has in the float file.

    To the bias of every quantized Conv, Gemm, and MatMul with an Add after it, what its mean by channel lacks is added
    (empirical bias correction: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    2019, appendix D). The layers are taken in `groups` in the order they run: all of a group at once, and those after
    it on what the corrected ones give. One run over the data a group is enough; one a layer would be too slow.

    The copy is written whether it helped or not: the caller looks at `helped`.

    Args:
        prepared: The float file.
        quantized: What `quantize_static` made of it.
        destination: Where the corrected copy goes.
        data: Its calibration half tells the means, its other half the error.
        groups: How many groups of layers.
        rows: At most so many rows of calibration data (up to the end of the feed).

    Raises:
        InputError: `groups` or `rows` is not positive.
        ExportError: One of the files does not run.
    """
    for name, number in (("groups", groups), ("rows", rows)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{name} is positive and a whole number", found=number)
    model = onnx.load(quantized)
    layers, skipped = _layers(onnx.load(prepared).graph, model.graph)
    biases = _Biases(model.graph)
    goal = _means(prepared, _up_to(data.calibration(), rows), {layer.float_output: layer.axis for layer in layers})
    with room_beside(destination) as folder:
        current = folder / "current.onnx"
        for start in range(0, len(layers), max(1, -(-len(layers) // groups))):
            group = layers[start : start + max(1, -(-len(layers) // groups))]
            save_whole(model, current, again=True)
            found = _means(
                current, _up_to(data.calibration(), rows), {layer.int8_output: layer.axis for layer in group}
            )
            for layer in group:
                biases.add(layer.bias, goal[layer.float_output] - found[layer.int8_output])
    save_whole(model, destination)
    return BiasCorrection(
        before=output_error(prepared, quantized, data.comparison()),
        after=output_error(prepared, destination, data.comparison()),
        corrected=len(layers),
        skipped=skipped,
    )


def output_error(reference: Path, changed: Path, feeds: Iterable[Feed]) -> float:
    """How far the float outputs of one file are from those of another: the norm of the difference over the norm.

    Raises:
        ExportError: A file that does not run.
    """
    one, other = OnnxSession(reference), OnnxSession(changed)
    wrong = whole = 0.0
    for feed in feeds:
        for a, b in zip(one.run(feed), other.run(feed), strict=True):
            if np.issubdtype(a.dtype, np.floating):
                wrong += float(((a.astype(np.float64) - b) ** 2).sum())
                whole += float((a.astype(np.float64) ** 2).sum())
    return float(np.sqrt(wrong / whole)) if whole else 0.0


@dataclass(frozen=True)
class _Layer:
    """A layer in both files: the tensors to compare before any activation, the axis of its channels, its bias."""

    float_output: str
    int8_output: str
    axis: int
    bias: str


def _layers(before: onnx.GraphProto, after: onnx.GraphProto) -> tuple[list[_Layer], int]:
    """The int8 layers with a bias in the order they run, and how many have none."""
    named = {node.name: node for node in before.node}
    dequantized = {name for node in after.node if node.op_type == "DequantizeLinear" for name in node.output}
    constants = {tensor.name: tensor for tensor in after.initializer}
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in after.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    found: list[_Layer] = []
    skipped = 0
    for node in after.node:
        original = named.get(node.name)
        if node.op_type not in ("Conv", "Gemm", "MatMul") or original is None or node.input[1] not in dequantized:
            continue
        bias = node.input[2] if node.op_type != "MatMul" and len(node.input) > 2 else ""
        if node.op_type == "MatMul":
            bias = _added(readers.get(node.output[0], []), node.output[0], constants)
        if not bias:
            skipped += 1
            continue
        axis = 1 if node.op_type == "Conv" else -1
        found.append(_Layer(original.output[0], node.output[0], axis, bias))
    return found, skipped


def _added(readers: Sequence[onnx.NodeProto], given: str, constants: Mapping[str, onnx.TensorProto]) -> str:
    """The constant that the only reader adds to each channel, or nothing."""
    if len(readers) != 1 or readers[0].op_type != "Add":
        return ""
    other = next((name for name in readers[0].input if name != given), "")
    return other if other in constants and len(constants[other].dims) == 1 and constants[other].dims[0] > 1 else ""


class _Biases:
    """The biases of a graph: float constants, or int32 ones with a scale. A constant is changed for one layer only."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._graph = graph
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, int] = {}
        for node in graph.node:
            for name in node.input:
                self._readers[name] = self._readers.get(name, 0) + 1

    def add(self, bias: str, shift: NDArray[np.float64]) -> None:
        maker = self._makers.get(bias)
        name = bias if maker is None else maker.input[0]
        if self._readers.get(bias, 0) > 1 or name not in self._tensors:
            return  # one bias of several layers: what one lacks is wrong for the others
        tensor = self._tensors[name]
        held = numpy_helper.to_array(tensor)
        if maker is None:
            changed = (held.astype(np.float64) + shift.reshape(held.shape)).astype(held.dtype)
        else:
            scale = numpy_helper.to_array(self._tensors[maker.input[1]]).astype(np.float64)
            steps = held.astype(np.float64) + np.round(shift / np.maximum(scale, np.finfo(np.float32).tiny))
            changed = np.clip(steps, -_INT32, _INT32).astype(held.dtype)
        tensor.CopyFrom(numpy_helper.from_array(changed, name))


def _means(path: Path, feeds: Iterable[Feed], axes: Mapping[str, int]) -> dict[str, NDArray[np.float64]]:
    """The mean of each channel of some tensors."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = dict.fromkeys(axes, 0)
    with Tapped(path, list(axes)) as tapped:
        for feed in feeds:
            for values in tapped.run(feed):
                for name, array in values.items():
                    channels = np.moveaxis(array, axes[name], 0).reshape(array.shape[axes[name]], -1)
                    sums[name] = sums.get(name, np.zeros(len(channels))) + channels.sum(1, dtype=np.float64)
                    counts[name] += channels.shape[1]
    return {name: total / max(1, counts[name]) for name, total in sums.items()}


def _up_to(feeds: Iterator[Feed], rows: int) -> Iterator[Feed]:
    """The first feeds, until there are enough rows."""
    seen = 0
    for feed in islice(feeds, rows):
        yield feed
        seen += next((len(array) for array in feed.values() if array.ndim), 1)
        if seen >= rows:
            return
