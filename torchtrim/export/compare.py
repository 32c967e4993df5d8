"""How far one output is from its reference, and how far it may be."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtrim.errors import ExportMismatch, InputError


@dataclass(frozen=True)
class Tolerance:
    """How far a file may be from the model.

    Attributes:
        relative: Largest absolute error, as a share of the reference's largest absolute value; None: not asked.
        cosine: Least cosine between output and reference; None: not asked.
        agreement: Least share of equal elements where an output holds integers or truth values.
    """

    relative: float | None = 1e-3
    cosine: float | None = None
    agreement: float = 0.95

    def __post_init__(self) -> None:
        for name, limit in (("relative", self.relative), ("cosine", self.cosine), ("agreement", self.agreement)):
            if limit is not None and math.isnan(limit):
                raise InputError(f"the tolerance's {name} is not a number", found=limit)

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


TOLERANCES = {
    "float32": Tolerance(relative=1e-3),
    "float64": Tolerance(relative=1e-3),
    "fp16": Tolerance(relative=2e-2),
    "dynamic": Tolerance(relative=None, cosine=0.98),
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
    floating: bool = True
    wrong: str | None = None

    def add(self, reference: NDArray[Any], found: NDArray[Any], path: Path) -> None:
        """Add one run's output to the tally.

        Raises:
            ExportMismatch: The two have different shapes.
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
        a, b = reference.astype(np.float64), found.astype(np.float64)
        self.wrong = self.wrong or _beyond_comparison(a, b)
        if not a.size:
            return
        with np.errstate(invalid="ignore", over="ignore"):
            difference = np.where(a == b, 0.0, np.abs(a - b))  # equal infinities are no error
            self.max_abs = max(self.max_abs, float(difference.max()))
            finite = np.isfinite(a) & np.isfinite(b)
            self.largest = max(self.largest, float(np.abs(a[finite]).max(initial=0.0)))
            self.total_abs += float(difference.sum())
        self.elements += a.size
        self.equal += int((a == b).sum())
        self.dot += float((a[finite] * b[finite]).sum())
        self.squares[0] += float((a[finite] ** 2).sum())
        self.squares[1] += float((b[finite] ** 2).sum())
        if a.ndim == 2 and a.shape[1] > 1 and self.floating:
            self.top1[0] += int((a.argmax(1) == b.argmax(1)).sum())
            self.top1[1] += len(a)

    def result(self, limits: Tolerance) -> OutputError:
        """The errors so far, held against what is allowed."""
        norm = math.sqrt(self.squares[0]) * math.sqrt(self.squares[1])
        cosine = self.dot / norm if norm else float(self.squares[0] == self.squares[1])
        relative = self.max_abs / self.largest if self.largest else self.max_abs
        agreement = None if self.floating else self.equal / max(1, self.elements)
        if self.wrong is not None:
            passed = False
        elif agreement is not None:
            passed = agreement >= limits.agreement
        else:
            passed = (limits.relative is None or relative <= limits.relative) and (
                limits.cosine is None or cosine >= limits.cosine
            )
        return OutputError(
            name=self.name,
            shape=tuple(self.shape),
            max_abs=self.max_abs,
            mean_abs=self.total_abs / max(1, self.elements),
            relative=relative,
            cosine=cosine,
            top1=self.top1[0] / self.top1[1] if self.top1[1] else None,
            agreement=agreement,
            passed=passed,
        )


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
