"""How far a candidate file is from the float file, and whether that is too far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from torchtrim.bench.openvino_session import open_session
from torchtrim.errors import ExportError
from torchtrim.export.calibration_data import CalibrationData, Feed
from torchtrim.export.compare import Tally, Tolerance

COSINE = 0.99
_BYTES = 256_000_000  # of the float file's outputs, which are kept
_LEAST = 16  # rows


@dataclass(frozen=True)
class Agreement:
    """How far a file is from the float file it was made from.

    Attributes:
        rows: How many rows were compared.
        cosine: The least cosine of any output.
        top1: Share of rows whose largest column agrees; None where no output is `(batch, columns)`.
        accuracy: Share of rows whose class is right; None without classes.
        reference_accuracy: That of the float file.
        wrong: What no limit allows, such as NaN; None where there is nothing of the kind.
    """

    rows: int
    cosine: float
    top1: float | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    wrong: str | None = None

    @property
    def drop(self) -> float | None:
        """The accuracy lost; None without classes."""
        if self.accuracy is None or self.reference_accuracy is None:
            return None
        return self.reference_accuracy - self.accuracy

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "drop": self.drop}

    def __str__(self) -> str:
        parts = [f"cosine {self.cosine:.4f}"]
        if self.accuracy is not None:
            parts.append(f"accuracy {self.accuracy:.1%}")
        elif self.top1 is not None:
            parts.append(f"top-1 agreement {self.top1:.1%}")
        return ", ".join(parts)


class Judge:
    """Compares files with the float file on the same rows.

    The float file runs once; its outputs are kept, up to 256 MB of them. Rows are taken as they come, as many as the
    float file runs in the time given, and at least 16.

    Args:
        plain: The float file.
        data: The data, of which the half to compare on is used.
        max_drop: How much accuracy may be lost, where there are classes: 0.01 for one point.
        cosine: The least cosine of any output.
        provider: What runs the files.
        seconds: About how long one run over the rows may take.
        threads: Threads to run with.

    Raises:
        ExportError: The float file does not run.
    """

    def __init__(
        self,
        plain: Path,
        data: CalibrationData | Sequence[Feed],
        *,
        max_drop: float = 0.01,
        cosine: float = COSINE,
        provider: str = "CPUExecutionProvider",
        seconds: float = 5.0,
        threads: int | None = None,
    ) -> None:
        self.max_drop, self.cosine, self.provider, self.threads = max_drop, cosine, provider, threads
        self._data = data
        self._expected: list[list[NDArray[Any]]] = []
        session = open_session(plain, providers=[provider], threads=threads)
        self._names = session.output_names
        began, kept, rows = time.perf_counter(), 0, 0
        for feed, _ in self._feeds():
            if rows >= _LEAST and (time.perf_counter() - began > seconds or kept > _BYTES):
                break
            self._expected.append(session.run(feed))
            kept += sum(array.nbytes for array in self._expected[-1])
            rows += max((len(array) for array in feed.values() if array.ndim), default=1)
        self.rows = rows

    def of(self, path: Path) -> Agreement:
        """How far a file is from the float file."""
        try:
            session = open_session(path, providers=[self.provider], threads=self.threads)
        except ExportError as error:
            return Agreement(0, 0.0, wrong=str(error))
        tallies = [Tally(name) for name in self._names]
        for (feed, targets), expected in zip(self._feeds(), self._expected, strict=False):
            for tally, reference, found in zip(tallies, expected, session.run(feed), strict=True):
                classes = reference.ndim == 2 and reference.shape[1] > 1 and targets is not None
                fits = classes and targets is not None and targets.max(initial=-1) < reference.shape[1]
                tally.add(reference, found, path, targets if fits else None)
        results = [tally.result(Tolerance(relative=None, top1=None)) for tally in tallies]
        first = next((result for result in results if result.top1 is not None), None)
        return Agreement(
            rows=self.rows,
            cosine=min(result.cosine for result in results),
            top1=None if first is None else first.top1,
            accuracy=None if first is None else first.accuracy,
            reference_accuracy=None if first is None else first.reference_accuracy,
            wrong=next((tally.wrong for tally in tallies if tally.wrong), None),
        )

    def against(self, found: Agreement) -> str | None:
        """Why a file is too far from the float file; None where it is not."""
        if found.wrong is not None:
            return found.wrong
        if found.drop is not None and found.drop > self.max_drop + 1e-9:
            return f"{100 * found.drop:.1f} points of accuracy are lost, {100 * self.max_drop:g} are allowed"
        if found.cosine < self.cosine:
            return f"its cosine to the float file is {found.cosine:.4f}, {self.cosine:g} is asked"
        return None

    def _feeds(self) -> Iterator[tuple[Feed, NDArray[Any] | None]]:
        if not isinstance(self._data, CalibrationData):
            return ((feed, None) for feed in self._data)
        if self._data.labelled:
            return self._data.labelled_comparison()
        return ((feed, None) for feed in self._data.comparison())
