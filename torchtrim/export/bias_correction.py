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
from torchtrim.export.saving import save_whole
from torchtrim.export.workshop import room_beside

ROWS = 32
_INT32 = 2**31 - 1
_BESIDE = "torchtrim/int8/"  # before the names of what is put beside the float layers


@dataclass(frozen=True)
class BiasCorrection:
    """What correcting the biases did to a file's outputs, on rows that it was not measured on where there are others.

    Attributes:
        before: The error of the outputs relative to the float file's, before: the norm of the difference over the norm.
        after: The same, after.
        corrected: How many biases were changed.
        skipped: How many int8 layers have no bias of their own to change.
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
        return (
            f"{counted(self.corrected)} corrected: the outputs' error went from {self.before:.4f} to {self.after:.4f}"
        )


def counted(biases: int) -> str:
    """A number of biases, in words."""
    return f"{biases} bias{'es' * (biases != 1)}"


def correct_biases(
    prepared: Path,
    quantized: Path,
    destination: Path,
    data: CalibrationData,
    *,
    rows: int = ROWS,
    threads: int | None = None,
    optimise: bool = True,
) -> BiasCorrection | None:
    """Write a copy of an int8 file whose layers give each channel the mean that the float file's layer gives.

    What the mean of a channel lacks is added to the bias of every quantized Conv, Gemm, and MatMul with an Add after it
    (empirical bias correction: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction",
    2019, appendix D). Each layer is measured on the float file's own inputs, quantized, so one run over the rows tells
    all of them, and no layer makes up for what those before it will have put right themselves (as in the fast bias
    correction of NNCF). EfficientNet-Lite0 with 7-bit weights: the outputs' error fell from 0.166 to 0.098; layer by
    layer in order, on what the corrected ones give, to 0.122 in eight times as long.

    Args:
        prepared: The float file.
        quantized: What `quantize_static` made of it.
        destination: Where the corrected copy goes.
        data: Its calibration half tells the means, its other half the error.
        rows: At most so many rows of each half (up to the end of the feed).
        threads: ONNX Runtime's threads.
        optimise: Whether the runtime may fuse nodes, see `OnnxSession`: not where sums would saturate here that do not
            where the file will run.

    Returns:
        What it did: the copy is written whether it helped or not. None where no layer has a bias of its own, and no
        copy is written.

    Raises:
        InputError: `rows` is not positive.
        ExportError: One of the files does not run.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise InputError("rows is positive and a whole number", found=rows)
    model, plain = onnx.load(quantized), onnx.load(prepared)
    biases = _Biases(model.graph)
    layers, skipped = _layers(plain.graph, model.graph, biases)
    if not layers:
        return None
    errors = _put_beside(plain, model, layers)
    with room_beside(destination) as folder:
        both = folder / "both.onnx"
        save_whole(plain, both)
        axes = {error: layer.axis for error, layer in zip(errors, layers, strict=True)}
        lacking = _means(both, _up_to(data.calibration(), rows), axes, threads, optimise)
    pairs = zip(layers, errors, strict=True)
    corrected = sum(biases.add(layer.bias, lacking[error]) for layer, error in pairs)
    save_whole(model, destination)
    feeds = _up_to(data.comparison(), rows)
    before, after = output_errors(prepared, (quantized, destination), feeds, threads, optimise=optimise)
    return BiasCorrection(before, after, corrected, skipped + len(layers) - corrected)


def output_errors(
    reference: Path,
    changed: Sequence[Path],
    feeds: Iterable[Feed],
    threads: int | None = None,
    *,
    optimise: bool = True,
) -> list[float]:
    """How far the float outputs of files are from those of another: the norm of the difference over the norm.

    What is infinite in both does not count; outputs of other shapes, or infinite in one, are infinitely far.

    Raises:
        ExportError: A file that does not run.
    """
    first, *others = (OnnxSession(path, threads=threads, optimise=optimise) for path in (reference, *changed))
    wrong, whole = np.zeros(len(others)), 0.0
    for feed in feeds:
        expected = [array for array in first.run(feed) if np.issubdtype(array.dtype, np.floating)]
        whole += sum(float((_finite(array) ** 2).sum()) for array in expected)
        for i, other in enumerate(others):
            found = [array for array in other.run(feed) if np.issubdtype(array.dtype, np.floating)]
            wrong[i] += sum(_distance(a, b) for a, b in zip(expected, found, strict=True))
    return [float(np.sqrt(each / whole)) if whole else 0.0 for each in wrong]


def _finite(array: NDArray[Any]) -> NDArray[np.float64]:
    return np.where(np.isfinite(array), array, 0).astype(np.float64)


def _distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    """The square of the norm of the difference."""
    if a.shape != b.shape or (np.isfinite(a) != np.isfinite(b)).any():
        return np.inf
    return float(((_finite(a) - _finite(b)) ** 2).sum())


@dataclass(frozen=True)
class _Layer:
    """A layer in both files, the axis of its channels, and its bias in the int8 file."""

    plain: onnx.NodeProto
    int8: onnx.NodeProto
    axis: int
    bias: str


def _layers(before: onnx.GraphProto, after: onnx.GraphProto, biases: _Biases) -> tuple[list[_Layer], int]:
    """The int8 layers with a bias of their own, and how many have none."""
    named = {node.name: node for node in before.node}
    dequantized = {name for node in after.node if node.op_type == "DequantizeLinear" for name in node.output}
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
            bias = _added(readers.get(node.output[0], []), node.output[0])
        scaled = any(each.name == "beta" and each.f != 1 for each in node.attribute)  # of a Gemm: its bias's factor
        if scaled or not biases.can_change(bias):
            skipped += 1
            continue
        found.append(_Layer(original, node, 1 if node.op_type == "Conv" else -1, bias))
    return found, skipped


def _added(readers: Sequence[onnx.NodeProto], given: str) -> str:
    """What the only reader adds, or nothing."""
    if len(readers) != 1 or readers[0].op_type != "Add":
        return ""
    return next((name for name in readers[0].input if name != given), "")


def _put_beside(plain: onnx.ModelProto, model: onnx.ModelProto, layers: Sequence[_Layer]) -> list[str]:
    """Put each int8 layer beside the float one, on the same input; the tensors that hold what it lacks."""
    makers = {name: node for node in model.graph.node for name in node.output}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    shapes = {value.name: value for value in (*plain.graph.value_info, *plain.graph.output)}
    taken: set[str] = set()

    def constant(name: str) -> str:
        if name and name not in taken:
            taken.add(name)
            copy = plain.graph.initializer.add()
            copy.CopyFrom(constants[name])
            copy.name = _BESIDE + name
        return name and _BESIDE + name

    def copied(node: onnx.NodeProto, name: str, first: str) -> onnx.NodeProto:
        """A Quantize- or DequantizeLinear of something else."""
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        copy.name = copy.output[0] = name
        copy.input[:] = [first, *map(constant, node.input[1:])]
        return copy

    def branch(layer: _Layer) -> Iterator[onnx.NodeProto]:
        twin = onnx.NodeProto()
        twin.CopyFrom(layer.int8)
        for place, name in enumerate(layer.int8.input):
            given = f"{_BESIDE}{layer.plain.name}/{place}"
            last = makers.get(name)
            if last is None or last.op_type != "DequantizeLinear":
                twin.input[place] = constant(name) if name in constants or not name else layer.plain.input[place]
                continue
            if last.input[0] in constants:
                first = constant(last.input[0])
            else:  # an activation: here that of the float file, quantized as there
                first = f"{given}/quantized"
                yield copied(makers[last.input[0]], first, layer.plain.input[place])
            yield copied(last, given, first)
            twin.input[place] = given
        twin.name = twin.output[0] = f"{_BESIDE}{layer.plain.name}"
        yield twin
        yield onnx.helper.make_node("Sub", [layer.plain.output[0], twin.output[0]], [f"{twin.name}/error"])

    errors = {f"{_BESIDE}{layer.plain.name}/error": layer.plain.output[0] for layer in layers}
    beside = {layer.plain.name: list(branch(layer)) for layer in layers}
    nodes = [each for node in plain.graph.node for each in (node, *beside.get(node.name, ()))]
    whole = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]  # those of the list go with it
    del plain.graph.node[:]
    plain.graph.node.extend(whole)
    for error, output in errors.items():
        if output in shapes:
            value = plain.graph.value_info.add()
            value.CopyFrom(shapes[output])
            value.name = error
    known = {each.domain for each in plain.opset_import}
    plain.opset_import.extend(each for each in model.opset_import if each.domain not in known)
    return list(errors)


class _Biases:
    """The biases of a graph: float constants, or int32 ones with a scale. A constant is changed for one layer only."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self._tensors = {tensor.name: tensor for tensor in graph.initializer}
        self._makers = {name: node for node in graph.node for name in node.output}
        self._readers: dict[str, int] = {}
        for node in graph.node:
            for name in node.input:
                self._readers[name] = self._readers.get(name, 0) + 1

    def can_change(self, bias: str) -> bool:
        """Whether it is a constant in one dimension that nothing else reads."""
        held = self._held(bias)
        known = all(name in self._tensors for name in held)
        once = all(self._readers.get(name) == 1 for name in (bias, held[0]))
        return known and once and len(self._tensors[held[0]].dims) == 1

    def add(self, bias: str, shift: NDArray[np.float64]) -> bool:
        """Add to a bias; False where its values are not those of the channels."""
        name, *scales = self._held(bias)
        tensor = self._tensors[name]
        held = numpy_helper.to_array(tensor)
        if held.shape != shift.shape:
            return False
        changed = held.astype(np.float64)
        if scales:
            scale = np.broadcast_to(numpy_helper.to_array(self._tensors[scales[0]]), held.shape).astype(np.float64)
            changed += np.round(np.divide(shift, scale, out=np.zeros(held.shape), where=scale != 0))
            changed = np.clip(changed, -_INT32, _INT32)
        else:
            changed += shift
        tensor.CopyFrom(numpy_helper.from_array(changed.astype(held.dtype), name))
        return True

    def _held(self, bias: str) -> list[str]:
        """The constant that holds a bias, and that of its scale where it has one."""
        maker = self._makers.get(bias)
        if maker is None:
            return [bias]
        return list(maker.input[:2]) if maker.op_type == "DequantizeLinear" else [""]


def _means(
    path: Path, feeds: Iterable[Feed], axes: Mapping[str, int], threads: int | None, optimise: bool
) -> dict[str, NDArray[np.float64]]:
    """The mean of each channel of some tensors."""
    sums: dict[str, NDArray[np.float64]] = {}
    counts: dict[str, int] = dict.fromkeys(axes, 0)
    with Tapped(path, list(axes), threads=threads, optimise=optimise) as tapped:
        for feed in feeds:
            for values in tapped.run(feed):
                for name, whole in values.items():
                    array = np.where(np.isfinite(whole), whole, 0)
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
