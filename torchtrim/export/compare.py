"""How far one output is from its reference, and how far it may be."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtrim.errors import ExportMismatch, InputError
from torchtrim.export.rounding import Rounding

DENORMAL = 1e-30  # below it a number counts as zero: some processors flush it, and it is no share of anything
FEW_ROWS = 50  # below so many rows a share of rows that agree says little: one row is 2 % and more
_BINS_PER_DECADE = 100  # of the histogram behind the 99th percentile: exact to 2.4 %


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from the model.

    Attributes:
        relative: Largest absolute error, as a share of the reference's largest absolute value; None: not asked.
        cosine: Least cosine between output and reference; None: not asked.
        agreement: Least share of equal elements where an output holds integers or truth values.
        top1: Least share of rows whose largest column agrees, asked of 50 rows and more; None: not asked.
        max_drop: Largest loss of accuracy where there are labels, of top-1 agreement elsewhere, at any number of rows,
            in place of `top1`; None: not asked.
        rounding: Whether `relative` may be passed where the model's own rounding is as large, beside its outputs in
            double precision: see `rounding_of` for how much is allowed.
    """

    relative: float | None = None
    cosine: float | None = None
    agreement: float = 0.95
    top1: float | None = None
    max_drop: float | None = None
    rounding: bool = False

    def __post_init__(self) -> None:
        for name in ("relative", "cosine", "agreement", "top1", "max_drop"):
            limit = getattr(self, name)
            if limit is not None and math.isnan(limit):
                raise InputError(f"the tolerance's {name} is not a number", found=limit)
        if self.max_drop is not None and not 0 <= self.max_drop <= 1:
            raise InputError("max_drop is a share of the rows", found=self.max_drop, expected="0 to 1: 0.01 is a point")

    @staticmethod
    def of(tolerance: float | Tolerance) -> Tolerance:
        """Read what a user gives: a number is the largest relative error.

        Raises:
            InputError: Not a positive, finite number.

        Example:
            >>> Tolerance.of(0.01).relative
            0.01
        """
        if isinstance(tolerance, Tolerance):
            return tolerance
        if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
            raise InputError("a tolerance is a number or a Tolerance", found=tolerance)
        if not 0 < tolerance < math.inf:
            raise InputError("the tolerance must be positive and finite", found=tolerance)
        return Tolerance(relative=float(tolerance))


# Int8 is held to directions and choices, since a largest error says little of rounded weights. The limits lie between
# what was measured on files that keep the accuracy of their model and on those that do not, on an AVX2 processor
# (ResNet-20 on 1,000 CIFAR-10 pictures, EfficientNet-Lite0 on 200 ImageNet pictures; cosine, top-1 agreement):
#   float32  1e-6 relative      fp16  6e-4 and 6e-3 relative
#   dynamic, products           0.9999, 99.9 % and 1.0000, 100 %
#   static, 7-bit weights       0.9990, 98.8 % and 0.979, 97.5 %: the accuracy is that of the model
#   static, 8-bit weights       0.9884, 96.0 % and 0.916, 88.7 %: sums that saturate cost 0.8 and 5 points
#   static, one scale a weight  0.9988, 98.9 % and 0.557, 54.4 %: costs 0.2 and 35 points
#   4-bit weights, blocks of 32 0.996 (two random linear layers)
_STATIC = Tolerance(relative=None, cosine=0.95, top1=0.9)
_DYNAMIC = Tolerance(relative=None, cosine=0.98, top1=0.95)
TOLERANCES = {
    "float32": Tolerance(relative=1e-3, rounding=True),
    "float64": Tolerance(relative=1e-3),
    "fp16": Tolerance(relative=2e-2),
    "bf16": Tolerance(relative=1e-1),  # 8 times as coarse as fp16
    "dynamic": _DYNAMIC,
    "static": _STATIC,
    "weight_only": Tolerance(relative=None, cosine=0.98, top1=0.9),  # 4 bits are coarse; activations are floats
    "mixed": _STATIC,
    "auto": _STATIC,
}


@dataclass(frozen=True)
class OutputError:
    """How far one output is from the reference.

    Attributes:
        name: The output's name in the file.
        shape: Its shape in the last run.
        max_abs: Largest absolute error.
        mean_abs: Mean absolute error.
        relative: `max_abs` over the largest absolute value of the reference.
        cosine: Cosine between the two, over all rows.
        top1: Share of rows whose largest column agrees; None unless the output is `(batch, columns > 1)`.
        agreement: Share of equal elements of an integer or boolean output; None for floats.
        passed: Whether it is within the tolerance.
        p99_abs: 99 of 100 elements have an absolute error up to this; rounded up, by 2.4 % at most.
        top5: Share of rows whose largest column is among the file's five largest; None unless there are more than five.
        labelled: How many rows had a label.
        reference_accuracy: Share of these that the model gets right; None without labels.
        accuracy: Share of these that the file gets right; None without labels.
        missed: What was found, and what is allowed instead, of all that is not within the tolerance.
        model_rounding: The largest error of the model itself beside double precision, as a share of the largest
            absolute value, in the run with the largest error; None where no error called for measuring it.
        file_rounding: That of the file.
    """

    name: str
    shape: tuple[int, ...]
    max_abs: float
    mean_abs: float
    relative: float
    cosine: float
    top1: float | None
    agreement: float | None
    passed: bool
    p99_abs: float = 0.0
    top5: float | None = None
    labelled: int = 0
    reference_accuracy: float | None = None
    accuracy: float | None = None
    missed: tuple[tuple[str, str], ...] = ()
    model_rounding: float | None = None
    file_rounding: float | None = None


@dataclass
class Tally:
    """The errors of one output, added up over the batches."""

    name: str
    shape: tuple[int, ...] = ()
    max_abs: float = 0.0
    total_abs: float = 0.0
    largest: float = 0.0
    elements: int = 0
    equal: int = 0
    dot: float = 0.0
    squares: list[float] = field(default_factory=lambda: [0.0, 0.0])
    top1: list[int] = field(default_factory=lambda: [0, 0])
    top5: list[int] = field(default_factory=lambda: [0, 0])
    right: list[int] = field(default_factory=lambda: [0, 0, 0])
    floating: bool = True
    wrong: str | None = None
    sizes: dict[int, int] = field(default_factory=dict)
    explained: Rounding | None = None  # of the run with the largest error that is the model's rounding
    blamed: Rounding | None = None  # of the run with the largest one that is not
    unexplained: float = 0.0

    def add(
        self,
        reference: NDArray[Any],
        found: NDArray[Any],
        path: Path,
        targets: NDArray[np.int64] | None = None,
        rounding: Rounding | None = None,
    ) -> None:
        """Add one run's output to the tally.

        Args:
            reference: What the model gave.
            found: What the file gave.
            path: The file, for the error.
            targets: The right column of each row; negative where it is not known. Only for `(batch, columns)`.
            rounding: How far both are from double precision, where that was measured.

        Raises:
            ExportMismatch: The two have different shapes.
            InputError: A target past the last column.
        """
        if reference.shape != found.shape:
            raise ExportMismatch(
                f"the output {self.name!r} has another shape than the model's",
                path=path,
                found=list(found.shape),
                expected=list(reference.shape),
            )
        self.shape = found.shape
        self.floating = bool(np.issubdtype(reference.dtype, np.floating))
        a, b = _plain(reference), _plain(found)
        self.wrong = self.wrong or _beyond_comparison(a, b)
        if not a.size:
            return
        with np.errstate(invalid="ignore", over="ignore"):
            difference = _difference(a, b)
            self._count_rounding(float(difference.max()), rounding)
            self.max_abs = max(self.max_abs, float(difference.max()))
            finite = np.isfinite(a) & np.isfinite(b)
            self.largest = max(self.largest, float(np.abs(a[finite]).max(initial=0.0)))
            self.total_abs += float(difference.sum())
            self._count_sizes(difference)
        self.elements += a.size
        self.equal += int((a == b).sum())
        self.dot += float((a[finite] * b[finite]).sum())
        self.squares[0] += float((a[finite] ** 2).sum())
        self.squares[1] += float((b[finite] ** 2).sum())
        if a.ndim == 2 and a.shape[1] > 1 and self.floating:
            self._count_choices(a, b, targets)

    def _count_rounding(self, largest: float, rounding: Rounding | None) -> None:
        if rounding is not None and rounding.why is None:
            self.explained = rounding if largest > self.max_abs or self.explained is None else self.explained
        elif largest > self.unexplained:
            self.unexplained, self.blamed = largest, rounding

    def _count_sizes(self, difference: NDArray[np.float64]) -> None:
        known = difference[np.isfinite(difference) & (difference > 0)]
        bins, counts = np.unique(np.ceil(np.log10(known) * _BINS_PER_DECADE).astype(int), return_counts=True)
        for place, count in zip(bins.tolist(), counts.tolist(), strict=True):
            self.sizes[place] = self.sizes.get(place, 0) + count

    def _count_choices(self, a: NDArray[np.float64], b: NDArray[np.float64], targets: NDArray[np.int64] | None) -> None:
        ours, theirs = a.argmax(1), b.argmax(1)
        self.top1[0] += int((ours == theirs).sum())
        self.top1[1] += len(a)
        if a.shape[1] > 5:
            five = np.argpartition(-b, 5, axis=1)[:, :5]
            self.top5[0] += int((five == ours[:, None]).any(1).sum())
            self.top5[1] += len(a)
        if targets is None:
            return
        if targets.max(initial=-1) >= a.shape[1]:
            raise InputError(
                "a label past the last class of the output",
                path=self.name,
                found=int(targets.max()),
                expected=f"0 to {a.shape[1] - 1}",
                hint="the labels that the model was trained with",
            )
        known = targets >= 0
        self.right[0] += int((ours == targets)[known].sum())
        self.right[1] += int((theirs == targets)[known].sum())
        self.right[2] += int(known.sum())

    def _percentile(self, share: float) -> float:
        """What that share of the absolute errors does not pass."""
        wanted = math.ceil(share * self.elements)
        reached = self.elements - sum(self.sizes.values())  # the zeros
        edge = 0.0
        for place in sorted(self.sizes):
            if reached >= wanted:
                break
            reached += self.sizes[place]
            edge = min(10.0 ** (place / _BINS_PER_DECADE), self.max_abs)
        return edge

    def _share(self, error: float) -> float:
        """An absolute error as a share of the largest value."""
        return error / self.largest if self.largest else error

    def past(self, reference: NDArray[Any], found: NDArray[Any], relative: float | None) -> bool:
        """Whether a run is off by more than `relative`, measured by the largest value so far, as none was before."""
        if self.blamed is not None or relative is None or reference.shape != found.shape or not reference.size:
            return False
        a, b = _plain(reference), _plain(found)
        if not np.issubdtype(reference.dtype, np.floating) or _beyond_comparison(a, b) is not None:
            return False
        largest = max(self.largest, float(np.abs(a[np.isfinite(a)]).max(initial=0.0)))
        return float(_difference(a, b).max()) > relative * (largest or 1.0)

    def result(self, limits: Tolerance) -> OutputError:
        """The errors so far, held against what is allowed."""
        norm = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        cosine = self.dot / norm if norm else float(self.squares[0] == self.squares[1])
        relative = self._share(self.max_abs)
        agreement = None if self.floating else self.equal / max(1, self.elements)
        ours, theirs, labelled = self.right
        found = OutputError(
            name=self.name,
            shape=tuple(self.shape),
            max_abs=self.max_abs,
            mean_abs=self.total_abs / max(1, self.elements),
            relative=relative,
            cosine=cosine,
            top1=self.top1[0] / self.top1[1] if self.top1[1] else None,
            agreement=agreement,
            passed=True,
            p99_abs=self._percentile(0.99),
            top5=self.top5[0] / self.top5[1] if self.top5[1] else None,
            labelled=labelled,
            reference_accuracy=ours / labelled if labelled else None,
            accuracy=theirs / labelled if labelled else None,
        )
        past = self._share(self.unexplained) if limits.rounding else relative
        counts = self.blamed if limits.relative is not None and past > limits.relative else self.explained
        if counts is not None:
            model, file = self._share(counts.model), self._share(counts.file)
            found = replace(found, model_rounding=model, file_rounding=file)
        missed = tuple(_missed(found, self.wrong, self.top1[1], limits, past, counts))
        return replace(found, passed=not missed, missed=missed)


def _missed(
    found: OutputError, wrong: str | None, rows: int, limits: Tolerance, past: float, blamed: Rounding | None
) -> Iterator[tuple[str, str]]:
    """What was asked and is not so: what was found, and what is allowed. `past` is the error that nothing explains."""
    if wrong is not None:
        yield wrong, "finite numbers, or the same infinities"
        return
    if found.agreement is not None:
        if found.agreement < limits.agreement:
            yield f"{found.agreement:.1%} equal", f"at least {limits.agreement:.1%}"
        return
    if limits.relative is not None and past > limits.relative:
        beside = "" if blamed is None else _beside_double(found, blamed)
        yield f"relative error {past:.2e}{beside}", f"at most {limits.relative:.0e}"
    if limits.cosine is not None and found.cosine < limits.cosine:
        yield f"cosine {found.cosine:.4f}", f"at least {limits.cosine}"
    if limits.max_drop is not None:
        yield from _dropped(found, limits.max_drop)
    # Where labels tell the accuracy, the agreement still tells whether they are labels of these rows.
    asked = limits.max_drop is None or found.accuracy is not None
    if asked and limits.top1 is not None and found.top1 is not None and rows >= FEW_ROWS and found.top1 < limits.top1:
        yield f"top-1 agreement {found.top1:.1%}", f"at least {limits.top1:.1%}"


def _beside_double(found: OutputError, blamed: Rounding) -> str:
    sizes = f"{found.file_rounding:.2e}, and {found.model_rounding:.2e} of the model"
    return f"; beside double precision {sizes}: {blamed.why}"


def _dropped(found: OutputError, most: float) -> Iterator[tuple[str, str]]:
    slack = 1e-9  # 0.9 - 0.89 is a little more than 0.01
    if found.accuracy is not None and found.reference_accuracy is not None:
        if found.reference_accuracy - found.accuracy > most + slack:
            yield (
                f"accuracy {found.accuracy:.2%}, and {found.reference_accuracy:.2%} from the model",
                f"a drop of at most {most:.2%}",
            )
    elif found.top1 is not None and 1 - found.top1 > most + slack:
        yield f"top-1 agreement {found.top1:.2%}", f"at least {1 - most:.2%}"


def _plain(array: NDArray[Any]) -> NDArray[np.float64]:
    """In double precision, with what is next to nothing as zero."""
    values = array.astype(np.float64)
    return np.where(np.abs(values) < DENORMAL, 0.0, values)


def _difference(reference: NDArray[np.float64], found: NDArray[np.float64]) -> NDArray[np.float64]:
    """The absolute errors. Equal infinities are none."""
    with np.errstate(invalid="ignore", over="ignore"):
        return np.where(reference == found, 0.0, np.abs(reference - found))


def _beyond_comparison(reference: NDArray[np.float64], found: NDArray[np.float64]) -> str | None:
    """What no tolerance allows: NaN on either side, or an infinity on one side only."""
    for side, array in (("the PyTorch model", reference), ("the file", found)):
        if np.isnan(array).any():
            return f"NaN from {side}"
    if (np.isinf(found) & (found != reference)).any():
        return "an infinity from the file where the PyTorch model gives another value"
    if (np.isinf(reference) & (found != reference)).any():
        return "an infinity from the PyTorch model where the file gives another value"
    return None


def output_of_classes(outputs: Mapping[str, NDArray[Any]], targets: NDArray[np.int64] | None) -> str | None:
    """The output that labels belong to: of those with a column for each class, the one that is right most often.

    Args:
        outputs: What the model gave, by name.
        targets: The class of each row; negative where it is not known. None: there are none.

    Returns:
        Its name; the first with columns where there are no labels, or some past every last column; None where no output
        has columns.

    Example:
        >>> features, logits = np.ones((2, 8)), np.array([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> output_of_classes({"features": features, "logits": logits}, np.array([1, 2]))
        'logits'
    """
    columns = {name: value for name, value in outputs.items() if value.ndim == 2 and value.shape[1] > 1}
    if targets is None or not columns:
        return next(iter(columns), None)
    known = targets >= 0
    fitting = {name: value for name, value in columns.items() if targets.max(initial=-1) < value.shape[1]}
    right = {name: int((value.argmax(1) == targets)[known].sum()) for name, value in fitting.items()}
    return max(right, key=lambda name: right[name]) if right else next(iter(columns))
