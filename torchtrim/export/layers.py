"""A float ONNX file beside its converted sibling, tensor by tensor: where does it go wrong?"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from torchtrim.bench.session import OnnxSession
from torchtrim.bench.table import Table
from torchtrim.errors import ExportError, InputError
from torchtrim.export.saving import save_model
from torchtrim.export.scheme import scheme_of
from torchtrim.export.valid import check_file
from torchtrim.export.workshop import room_beside
from torchtrim.graph.inputs import ExampleInputs, Inputs

Feed: TypeAlias = "Mapping[str, NDArray[Any]] | ExampleInputs"

# The relative error (of the whole tensor) from which a node counts as wrong. An error of e leaves a cosine of about
# 1 - e * e / 2, so that of int8 goes with the cosine of 0.98 that its outputs are held to.
THRESHOLDS = {"float32": 1e-3, "float64": 1e-3, "fp16": 2e-2, "bf16": 1e-1}
_INT8 = 0.2
_TENSORS, _BYTES = 24, 64_000_000  # of one group, whose tensors are held at the same time
_WEIGHTS, _LEAST = "weights.data", 65_536  # bytes; sizes that ONNX Runtime reads early are smaller
_SHOWN = 12
# What ONNX Runtime's quantizers add to the name of a tensor that comes back as floats.
_FLOAT_AGAIN = re.compile(r"_(DequantizeLinear_Output|DequantizeLinear|dequantized)(_\d+|/duplicated.*)?$")


@dataclass(frozen=True)
class TensorError:
    """How far one tensor is from the same tensor of the float file.

    Attributes:
        tensor: Its name in the converted file.
        reference: Its name in the float file.
        node: The node that computes it; the operator and the output where the node has no name.
        op: That node's operator.
        error: The length of the difference over the length of the reference.
        cosine: Cosine between the two.
        sqnr_db: Signal to quantization noise, `-20 log10(error)`, in decibels; infinite where they are equal.
        jump: By how much the error is larger than the largest one among what the node reads.
    """

    tensor: str
    reference: str
    node: str
    op: str
    error: float
    cosine: float
    sqnr_db: float
    jump: float


@dataclass(frozen=True)
class LayerComparison:
    """Two files, tensor by tensor.

    Attributes:
        reference_path: The float file.
        path: The converted file.
        threshold: The relative error from which a tensor counts as wrong.
        tensors: Every tensor that both have, in the order in which the converted file computes them.
        unmatched: How many tensors of floats in the float file have no sibling: what a conversion fused away.
    """

    reference_path: Path
    path: Path
    threshold: float
    tensors: tuple[TensorError, ...]
    unmatched: int

    @property
    def first(self) -> TensorError | None:
        """The first tensor that is over the threshold, if any."""
        return next((tensor for tensor in self.tensors if tensor.error > self.threshold), None)

    @property
    def worst(self) -> TensorError | None:
        """The tensor where the error grows most, if it grows anywhere."""
        found = max(self.tensors, key=lambda tensor: tensor.jump, default=None)
        return found if found is not None and found.jump > 0 else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        first, worst = self.first, self.worst

        def plain(tensor: TensorError) -> dict[str, Any]:
            return {name: _finite(value) for name, value in asdict(tensor).items()}

        return {
            "reference_path": str(self.reference_path),
            "path": str(self.path),
            "threshold": self.threshold,
            "first": None if first is None else plain(first),
            "worst": None if worst is None else plain(worst),
            "tensors": [plain(tensor) for tensor in self.tensors],
            "unmatched": self.unmatched,
        }

    def table(self, most: int = _SHOWN) -> Table:
        """The tensors at which the error grows most, in the order in which they are computed."""
        largest = sorted(self.tensors, key=lambda tensor: -tensor.jump)[:most]
        shown = [tensor for tensor in self.tensors if tensor in largest or tensor is self.first]
        rows = tuple(
            (
                tensor.node,
                tensor.op,
                tensor.reference,
                f"{tensor.error:.2e}",
                f"{tensor.jump:+.1e}",
                f"{tensor.cosine:.5f}",
                f"{tensor.sqnr_db:.1f}",
                "OVER" if tensor.error > self.threshold else "",
            )
            for tensor in shown
        )
        notes = [
            f"{len(self.tensors)} tensors compared, {self.unmatched} have no sibling; threshold {self.threshold:g}"
        ]
        if self.first is not None:
            notes.append(f"first over the threshold: {self.first.node} ({self.first.op})")
        if self.worst is not None:
            notes.append(f"largest jump: {self.worst.node} ({self.worst.op})")
        columns = ("node", "operator", "tensor", "error", "jump", "cosine", "SQNR dB", "")
        return Table(f"{self.path.name} against {self.reference_path.name}", columns, rows, notes, left=3)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def compare_layers(
    reference_path: str | os.PathLike[str],
    path: str | os.PathLike[str],
    inputs: Feed,
    *,
    threshold: float | None = None,
    providers: Sequence[str] | None = None,
) -> LayerComparison:
    """Run a float ONNX file and its converted sibling on the same inputs, and compare every tensor that both have.

    Tensors are matched by name: quantizers keep the names of the tensors, or add to them in ways that are known. Where
    the converted file quantizes a tensor, both what is computed and what is read back are compared, so that a clipped
    range is told from a bad weight; not so where the quantization stands for a ReLU as well. The tensors are given out
    in groups, so memory stays bounded; a tensor that is given out is not fused with its neighbours, so what only a
    fused kernel does wrong shows at the outputs alone.

    Args:
        reference_path: The float file.
        path: The converted file.
        inputs: A tensor, a tuple or dict of them, or arrays by the names of the files' inputs.
        threshold: The relative error from which a tensor counts as wrong. By default 1e-3 for float32 and float64, 2e-2
            for fp16, 1e-1 for bf16 and 0.2 (14 dB) for int8.
        providers: ONNX Runtime's execution providers; the CPU's by default.

    Raises:
        ExportError: A file that is not there, broken, or cannot run; two that have no tensor in common; no room for a
            copy of each beside it.
        InputError: Inputs that a file does not take; a threshold that is no positive number.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchtrim.export.onnx import export_onnx
        >>> net, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(4, 8)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plain = export_onnx(net, x, f"{folder}/plain.onnx", benchmark=False).path
        ...     half = export_onnx(net, x, f"{folder}/half.onnx", target="cuda", benchmark=False).path
        ...     found = compare_layers(plain, half, x)
        >>> found.first is None, found.tensors[-1].reference
        (True, 'output')
    """
    if threshold is not None and not (0 < threshold < math.inf):
        raise InputError("the threshold is a positive number", found=threshold)
    files = [Path(reference_path), Path(path)]
    for file in files:
        if not file.is_file():
            raise ExportError("there is no such ONNX file", path=file)
        check_file(file, rules=False)
    limit = threshold if threshold is not None else THRESHOLDS.get(scheme_of(path), _INT8)
    given = _given(inputs)
    errors: dict[str, tuple[float, float]] = {}
    with _opened(files[0]) as ours, _opened(files[1]) as theirs:
        pairs = _pairs(ours.graph, theirs.graph)
        if not pairs:
            raise ExportError(
                "the two files have no tensor in common", path=path, expected=f"a conversion of {reference_path}"
            )
        for group in _groups(pairs, ours.graph, given.batch):
            expected = ours.outputs([pair[1] for pair in group], given, providers)
            found = theirs.outputs([pair[0] for pair in group], given, providers)
            for tensor, reference in group:
                measured = _measure(expected[reference], found[tensor])
                if measured is not None:
                    errors[tensor] = measured
    compared = tuple(_in_order(theirs.graph, dict(pairs), errors))
    matched = {entry.reference for entry in compared}
    left = [name for name in _computed(ours.graph) if name not in matched]
    return LayerComparison(files[0], files[1], limit, compared, len(left))


def _given(inputs: Feed) -> Inputs:
    if isinstance(inputs, Mapping) and all(isinstance(value, np.ndarray) for value in inputs.values()):
        return Inputs((), {name: torch.from_numpy(np.array(value)) for name, value in inputs.items()})
    return Inputs.of(inputs)


def _computed(graph: onnx.GraphProto) -> list[str]:
    return [name for node in graph.node for name in node.output if name]


def _pairs(ours: onnx.GraphProto, theirs: onnx.GraphProto) -> list[tuple[str, str]]:
    """The tensors that both compute, as (converted file's name, float file's name), in the converted file's order."""
    constants = {tensor.name for tensor in theirs.initializer}
    makers = {name: node for node in ours.node for name in node.output}
    held = set(makers) | {value.name for value in ours.input}
    pairs = []
    for node in theirs.node:
        if constants.issuperset(filter(None, node.input)):
            constants.update(node.output)  # weights, unpacked
            continue
        for name in filter(None, node.output):
            plain = _FLOAT_AGAIN.sub("", name)
            match = name if name in held else plain if plain in held else None
            if match is not None and not (match == name and _is_cut_off_later(makers.get(name), node)):
                pairs.append((name, match))
    return pairs


def _is_cut_off_later(ours: onnx.NodeProto | None, theirs: onnx.NodeProto) -> bool:
    """Whether a node took the name of an activation that the quantization after it does by its range."""
    return ours is not None and ours.op_type in {"Relu", "Clip"} and theirs.op_type != ours.op_type


def _groups(pairs: Sequence[tuple[str, str]], graph: onnx.GraphProto, batch: int) -> Iterator[list[tuple[str, str]]]:
    """Tensors that are given out together: not too many, and not too large where their shapes are written down."""
    sizes = {value.name: _bytes(value, batch) for value in (*graph.value_info, *graph.output, *graph.input)}
    group: list[tuple[str, str]] = []
    held = 0
    for pair in pairs:
        size = sizes.get(pair[1], _BYTES // _TENSORS)
        if group and (len(group) == _TENSORS or held + size > _BYTES):
            yield group
            group, held = [], 0
        group.append(pair)
        held += size
    if group:
        yield group


def _bytes(value: onnx.ValueInfoProto, batch: int) -> int:
    return 4 * math.prod(dim.dim_value or max(1, batch) for dim in value.type.tensor_type.shape.dim)


@contextmanager
def _opened(file: Path) -> Iterator[_Copy]:
    """A copy whose large weights are written once, beside it: each group of tensors needs the rest written anew."""
    with room_beside(file) as folder:
        model = onnx.load(file)
        save_model(model, folder / file.name, external_data=True, location=_WEIGHTS, least=_LEAST)
        yield _Copy(file, folder / file.name, model)


@dataclass
class _Copy:
    """A file's copy.

    Attributes:
        file: The file.
        place: The copy.
        model: What is written for each group: all but the large weights.
    """

    file: Path
    place: Path
    model: onnx.ModelProto

    @property
    def graph(self) -> onnx.GraphProto:
        return self.model.graph

    def outputs(self, names: Sequence[str], inputs: Inputs, providers: Sequence[str] | None) -> dict[str, NDArray[Any]]:
        """These tensors, on these inputs."""
        asked = list(dict.fromkeys(names))
        opened = {value.name for value in self.graph.input}
        given = [value.name for value in self.graph.output]
        # ONNX Runtime finds out the types by itself.
        self.graph.output.extend(onnx.ValueInfoProto(name=name) for name in asked if name not in {*given, *opened})
        self.place.write_bytes(self.model.SerializeToString())
        del self.graph.output[len(given) :]
        try:
            session = OnnxSession(self.place, providers=providers)
            feed = session.feed(inputs, cast=True)
            values = dict(zip(session.output_names, session.run(feed), strict=True))
        except ExportError as error:
            error.path = self.file
            raise
        return {name: values[name] if name in values else feed[name] for name in asked}


def _measure(expected: NDArray[Any], found: NDArray[Any]) -> tuple[float, float] | None:
    """The relative error and the cosine; None of tensors that are no floats or have another shape."""
    if expected.shape != found.shape or not expected.size:
        return None
    if not (np.issubdtype(expected.dtype, np.floating) and np.issubdtype(found.dtype, np.floating)):
        return None
    a, b = expected.astype(np.float64).ravel(), found.astype(np.float64).ravel()
    # Masks hold the same infinities on both sides; what is NaN or infinite on one side only is no number at all.
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    broken = ~(np.isfinite(a) & np.isfinite(b))
    if (broken & ~same).any():
        return math.inf, 0.0
    a, b = np.where(broken, 0.0, a), np.where(broken, 0.0, b)
    length, other, apart = (float(np.linalg.norm(each)) for each in (a, b, a - b))
    if not apart:
        return 0.0, 1.0
    cosine = float(a @ b) / (length * other) if length and other else 0.0
    return apart / length if length else math.inf, cosine


def _in_order(
    graph: onnx.GraphProto, pairs: Mapping[str, str], errors: Mapping[str, tuple[float, float]]
) -> Iterator[TensorError]:
    """The errors in the order of the nodes, each with what it adds to those that its node reads."""
    carried: dict[str, float] = {}
    makers = {name: node for node in graph.node for name in node.output}
    for node in graph.node:
        incoming = max((carried.get(name, 0.0) for name in node.input), default=0.0)
        for name in filter(None, node.output):
            measured = errors.get(name)
            carried[name] = incoming if measured is None else measured[0]
            if measured is None:
                continue
            error, cosine = measured
            sqnr = math.inf if not error else -math.inf if math.isinf(error) else -20 * math.log10(error)
            # What was no number before does not get worse.
            jump = 0.0 if math.isinf(incoming) else error - incoming
            # Where only what is read back can be compared, the node that computes it is the one to look at.
            told = makers.get(pairs[name], node) if pairs[name] not in errors else node
            yield TensorError(name, pairs[name], _named(told), told.op_type, error, cosine, sqnr, jump)


def _named(node: onnx.NodeProto) -> str:
    return str(node.name) or f"{node.op_type} -> {node.output[0]}"


def _finite(value: Any) -> Any:
    """JSON has no infinities."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
