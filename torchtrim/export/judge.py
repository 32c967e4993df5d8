"""How far a candidate file is from the float file, and whether that is too far."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtrim.bench.openvino_session import open_session
from torchtrim.errors import ExportError
from torchtrim.export.calibration_data import CalibrationData, Feed
from torchtrim.export.compare import Tally, Tolerance, output_of_classes

COSINE = 0.99
_BYTES = 256_000_000  # of the float file's outputs, which are kept
_LEAST = 16  # rows
_FEW = 20  # rows that say nothing of an accuracy


@dataclass(frozen=True)
class Agreement:
    """How far a file is from the float file it was made from.

    Attributes:
        rows: How many rows were compared.
        cosine: The least cosine of any output. Rows of classes have their mean taken off before: what is common to all
            classes chooses none.
        top1: Share of rows whose largest column agrees; None where no output is `(batch, columns)`.
        accuracy: Share of rows whose class is right; None without classes.
        reference_accuracy: That of the float file.
        expected_drop: The accuracy that is lost if the float file's own probabilities are right: how much likelier than
            the file's choice its own is, in the mean over the rows; None where no output is `(batch, columns)`.
        wrong: What no limit allows, such as NaN; None where there is nothing of the kind.
    """

    rows: int
    cosine: float
    top1: float | None = None
    accuracy: float | None = None
    reference_accuracy: float | None = None
    expected_drop: float | None = None
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
        max_drop: How much accuracy may be lost: 0.01 for one point. Without classes it is the accuracy that the float
            file's own probabilities let expect.
        cosine: The least cosine of any output.
        provider: What runs the files.
        seconds: About how long one run over the rows may take.
        threads: Threads to run with.
        optimise: Whether the runtime may fuse nodes, see `OnnxSession`.

    Raises:
        ExportError: The float file does not run.
        InputError: A class past the last column of every output.
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
        optimise: bool = True,
    ) -> None:
        self.max_drop, self.cosine, self.provider, self.threads = max_drop, cosine, provider, threads
        self.optimise = optimise
        self.notes: list[str] = []
        self._data = data
        self._expected: list[dict[str, NDArray[Any]]] = []
        self._classes: str | None = None
        session = open_session(plain, providers=[provider], threads=threads)
        self._names = session.output_names
        began, kept, rows = time.perf_counter(), 0, 0
        labels: list[NDArray[Any]] = []
        for feed, targets in self._feeds():
            if rows >= _LEAST and (time.perf_counter() - began > seconds or kept > _BYTES):
                break
            self._expected.append(dict(zip(self._names, session.run(feed), strict=True)))
            labels += [] if targets is None else [targets]
            kept += sum(array.nbytes for array in self._expected[-1].values())
            rows += max((len(array) for array in feed.values() if array.ndim), default=1)
        self.rows = rows
        self._look_at_classes(labels)

    def of(self, path: Path) -> Agreement:
        """How far a file is from the float file."""
        try:
            session = open_session(path, providers=[self.provider], threads=self.threads, optimise=self.optimise)
        except ExportError as error:
            return Agreement(0, 0.0, wrong=str(error))
        tallies = {name: Tally(name) for name in self._names}
        centred = {name: Tally(name) for name in self._names}
        lost = 0.0
        for (feed, targets), expected in zip(self._feeds(), self._expected, strict=False):
            for name, found in zip(self._names, session.run(feed), strict=True):
                own = name == self._classes
                tallies[name].add(expected[name], found, path, targets if own else None)
                if own:
                    centred[name].add(_centred(expected[name]), _centred(found), path)
                    lost += _expected_drop(expected[name], found)
        results = {name: tally.result(Tolerance(relative=None, top1=None)) for name, tally in tallies.items()}
        cosines = [result.cosine for result in results.values()]
        classes = None if self._classes is None else results[self._classes]
        if self._classes is not None:
            cosines.append(centred[self._classes].result(Tolerance(relative=None, top1=None)).cosine)
        return Agreement(
            rows=self.rows,
            cosine=min(cosines),
            top1=None if classes is None else classes.top1,
            accuracy=None if classes is None else classes.accuracy,
            reference_accuracy=None if classes is None else classes.reference_accuracy,
            expected_drop=None if classes is None else lost / self.rows,
            wrong=next((tally.wrong for tally in tallies.values() if tally.wrong), None),
        )

    def against(self, found: Agreement) -> str | None:
        """Why a file is too far from the float file; None where it is not."""
        if found.wrong is not None:
            return found.wrong
        if found.drop is not None and found.drop > self.max_drop + 1e-9:
            return f"{100 * found.drop:.1f} points of accuracy are lost, {100 * self.max_drop:g} are allowed"
        if found.expected_drop is not None and found.expected_drop > self.max_drop + 1e-9:
            lost = f"{100 * found.expected_drop:.1f} points of accuracy would be lost by the float file's probabilities"
            return f"{lost}, {100 * self.max_drop:g} are allowed"
        if found.cosine < self.cosine:
            return f"its cosine to the float file is {found.cosine:.4f}, {self.cosine:g} is asked"
        return None

    def _look_at_classes(self, labels: list[NDArray[Any]]) -> None:
        """Find the output that has the classes, and say so where the model hardly knows any of them."""
        if not self._expected:
            return
        targets = np.concatenate(labels) if labels else None
        columns = [name for name in self._names if _rows(self._expected[0][name])]
        whole = {name: np.concatenate([each[name] for each in self._expected]) for name in columns}
        self._classes = output_of_classes(whole, targets)
        if self._classes is None or targets is None:
            return
        values = whole[self._classes]
        known = targets >= 0
        right = float((values.argmax(1) == targets)[known].mean()) if known.any() else 0.0
        if known.sum() >= _FEW and right < min(0.5, 3 / values.shape[1]):
            asked = "are the labels those of its classes, in its order?"
            self.notes.append(f"the model itself is right on {right:.1%} of the rows: {asked}")

    def _feeds(self) -> Iterator[tuple[Feed, NDArray[Any] | None]]:
        if not isinstance(self._data, CalibrationData):
            return ((feed, None) for feed in self._data)
        if self._data.labelled:
            return self._data.labelled_comparison()
        return ((feed, None) for feed in self._data.comparison())


def _rows(array: NDArray[Any]) -> bool:
    return array.ndim == 2 and array.shape[1] > 1 and np.issubdtype(array.dtype, np.floating)


def _centred(array: NDArray[Any]) -> NDArray[Any]:
    values = array.astype(np.float64)
    with np.errstate(invalid="ignore"):
        centred: NDArray[Any] = values - values.mean(1, keepdims=True)
    return centred


def _expected_drop(reference: NDArray[Any], found: NDArray[Any]) -> float:
    """By how much the reference's choices are likelier than the other's, by its own probabilities: a sum."""
    if reference.shape != found.shape:
        return 0.0  # which the tally refuses
    values = reference.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        likely = bool((values >= 0).all() and np.allclose(values.sum(1), 1, atol=1e-3))
        weights = values if likely else np.exp(values - values.max(1, keepdims=True))
        weights = weights / weights.sum(1, keepdims=True)
    rows = np.arange(len(values))
    lost = weights[rows, values.argmax(1)] - weights[rows, found.astype(np.float64).argmax(1)]
    return float(np.nan_to_num(lost).sum())
