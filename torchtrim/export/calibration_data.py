"""A user's data, spooled to disk once: half of it to calibrate on, half to compare on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import InputError, TorchTrimError
from torchtrim.export.inputs import arguments_of, in_order, input_names
from torchtrim.export.likeness import Spread, unlike
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.progress import progress

ROWS = 512
FEED = 32  # rows of one feed
_FEW = 4  # feeds that are split by rows, so that both halves are of a size
KINDS = ("calibration", "comparison")
_WHOLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
_USUAL = 100  # rows to calibrate on, below which it is said
_POINT = 0.01
_WILD = 1e4  # of the largest absolute value: pictures and embeddings are far below

Feed = dict[str, NDArray[Any]]


@dataclass
class CalibrationData:
    """Batches of a user's data as feeds of an ONNX file, on disk.

    Rows are put into feeds of at most 32 (of as many as the file takes, where it takes one batch size only). Every
    second feed is to calibrate on, the others are to compare on; where there are no more than 4, every second row. One
    row serves for both, and `notes` says so.

    Attributes:
        folder: Where the feeds are.
        feeds: How many there are of each kind: for calibration, for comparison.
        rows: How many rows there are of each kind.
        labelled: Whether every row has an integer class.
        notes: What a person should know of the data.
    """

    folder: Path
    feeds: tuple[int, int] = (0, 0)
    rows: tuple[int, int] = (0, 0)
    labelled: bool = False
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def spool(
        data: Any,
        model: nn.Module,
        path: Path | OnnxSession,
        folder: Path,
        *,
        limit: int = ROWS,
        told: Callable[[str, float], Any] | None = None,
        example: Inputs | None = None,
    ) -> CalibrationData:
        """Read a user's data once, batch by batch, and keep it on disk as feeds of a file.

        No more is in memory than a batch and a feed. Reading stops at the limit.

        Args:
            data: Any iterable of batches (tensors, `(inputs, targets)` pairs, dicts), also one that can be read once
                only; or one batch: a tensor, a dict or a tuple.
            model: The model that the file came from: it tells inputs from targets.
            path: The float file.
            folder: An empty folder; the caller removes it.
            limit: At most this many rows.
            told: Called with what is done and the share of it, instead of a progress bar.
            example: The inputs that the file was made with. Data that is ten times larger or smaller is noted.

        Raises:
            InputError: No data; not batches; a shape or a type that the file does not take; NaN or infinite values.
        """
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise InputError("the limit of rows is positive and a whole number", found=limit)
        session = path if isinstance(path, OnnxSession) else OnnxSession(path, threads=1)
        folder.mkdir(parents=True, exist_ok=True)
        spool = _Spool(folder, session.fixed_batch or FEED, fixed=session.fixed_batch is not None)
        reader = _Reader(model, session)
        with nullcontext(told) if told is not None else progress("reading the data") as tell:
            for number, batch in enumerate(_batches(data)):
                feed, targets = reader.read(number, batch)
                spool.add(feed, targets, limit)
                tell(f"{spool.rows} rows", min(1.0, spool.rows / limit))
                if spool.rows >= limit:
                    break
        if not spool.rows:
            raise InputError(
                "there is no data to calibrate on", found="no batches" if not reader.count else "batches without rows"
            )
        feeds, rows = spool.close()
        notes = [*reader.told_of(example), *spool.notes, *_told_of_few(rows, spool.labelled)]
        return CalibrationData(folder, feeds, rows, spool.labelled, notes)

    def calibration(self) -> Iterator[Feed]:
        """The feeds to calibrate on."""
        return _Feeds((feed for feed, _ in self._read(0)), self.feeds[0])

    def comparison(self) -> Iterator[Feed]:
        """The feeds to compare on."""
        return _Feeds((feed for feed, _ in self._read(1)), self.feeds[1])

    def labelled_comparison(self) -> Iterator[tuple[Feed, NDArray[np.int64]]]:
        """The feeds to compare on, each with the class of every row.

        Raises:
            InputError: The data came without classes.
        """
        for feed, targets in self._read(1):
            if targets is None:
                raise InputError("the data has no integer classes to compare with", hint="(inputs, targets) batches")
            yield feed, targets

    def _read(self, kind: int) -> Iterator[tuple[Feed, NDArray[np.int64] | None]]:
        for number in range(self.feeds[kind]):
            with np.load(self.folder / f"{KINDS[kind]}-{number}.npz") as stored:
                feed = {key.removeprefix("input."): stored[key] for key in stored.files if key != "targets"}
                yield feed, stored["targets"] if self.labelled else None


class _Feeds(Iterator[Feed]):
    """Feeds whose number is known beforehand: whoever goes through them can say how far it is."""

    def __init__(self, feeds: Iterator[Feed], count: int) -> None:
        self._feeds, self._left = feeds, count

    def __next__(self) -> Feed:
        feed = next(self._feeds)
        self._left -= 1
        return feed

    def __length_hint__(self) -> int:
        return self._left


class _Reader:
    """Batches to feeds and targets, each checked."""

    def __init__(self, model: nn.Module, session: OnnxSession) -> None:
        self._model, self._session = model, session
        self.count = 0
        self._seen: dict[str, Spread] = {}
        self._wild: dict[str, str] = {}

    def told_of(self, example: Inputs | None) -> list[str]:
        """What a person should know of the values."""
        feed = {} if example is None else self._session.feed(example, cast=True)
        return list({**self._wild, **unlike(self._seen, feed)}.values())

    def read(self, number: int, batch: Any) -> tuple[Feed, NDArray[np.int64] | None]:
        self.count += 1
        place = f"batch {number + 1} of the data"
        if not isinstance(batch, (torch.Tensor, Mapping, tuple, list, Inputs)):
            raise InputError(
                "not a batch",
                path=place,
                found=type(batch).__name__,
                expected="a tensor, an (inputs, targets) pair or a dict",
            )
        try:
            inputs = arguments_of(batch, self._model, self._session.input_names)
            if len(inputs.tensors) == len(self._session.input_names):
                inputs = in_order(inputs, self._model)
                names = input_names(self._model, inputs)
                inputs = Inputs((), dict(zip(names, inputs.tensors, strict=True)))
            rows = inputs.batch
            feed = self._feed(inputs, rows)
        except TorchTrimError as error:
            where = place if error.path is None else f"{place}, {error.path}"
            raise InputError(error.message, path=where, found=error.found, expected=error.expected) from error
        self._check_values(feed, place)
        return feed, _targets(batch, inputs, rows)

    def _feed(self, inputs: Inputs, rows: int) -> Feed:
        """The file's inputs; of a file that takes one batch size, as many rows as there are."""
        size = self._session.fixed_batch
        if size is None or rows in (0, size):
            return self._session.feed(inputs, cast=True)
        parts = []
        for start in range(0, rows, size):
            parts.append(self._session.feed(_rows_from(inputs, start, size), cast=True))
        return {
            name: np.concatenate([part[name] for part in parts])[:rows] if first.ndim and len(first) == size else first
            for name, first in parts[0].items()
        }

    def _check_values(self, feed: Feed, place: str) -> None:
        for name, array in feed.items():
            if not np.issubdtype(array.dtype, np.floating) or not array.size:
                continue
            if not np.isfinite(array).all():
                found = "NaN" if np.isnan(array).any() else "infinite values"
                raise InputError(
                    "the data holds values that are not numbers",
                    path=f"{place}, {name}",
                    found=found,
                    expected="finite numbers",
                )
            seen = self._seen.setdefault(name, Spread())
            seen.add(array)
            if seen.largest > _WILD and name not in self._wild:
                self._wild[name] = (
                    f"{name} reaches {seen.largest:.3g} in {place}: is it normalised as the model expects?"
                )


class _Spool:
    """Rows in, files of a given number of rows out; every second one is for the comparison."""

    def __init__(self, folder: Path, size: int, *, fixed: bool) -> None:
        self._folder, self._size, self._fixed = folder, size, fixed
        self._held: list[tuple[Feed, NDArray[np.int64] | None]] = []
        self._written: list[int] = []
        self.rows = 0
        self.labelled = True
        self.notes: list[str] = []

    def add(self, feed: Feed, targets: NDArray[np.int64] | None, limit: int) -> None:
        count = min(_rows(feed), limit - self.rows)
        if not count:
            return
        self.labelled = self.labelled and targets is not None
        whole = _rows(feed)
        shapes = {name: array.shape[1:] for name, array in feed.items()}
        if self._held and shapes != {name: array.shape[1:] for name, array in self._held[0][0].items()}:
            self._write(self._held_rows())  # another picture size, or longer texts: a feed of their own
        start = 0
        while start < count:
            take = min(count - start, self._size - self._held_rows())
            rows = slice(start, start + take)
            part = {
                name: array[rows] if array.ndim and array.shape[0] == whole else array for name, array in feed.items()
            }
            self._held.append((part, None if targets is None else targets[rows]))
            start += take
            if self._held_rows() == self._size:
                self._write(self._size)
        self.rows += count

    def close(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Write what is left, and share the files out."""
        if self._held:
            self._write(self._held_rows())
        counts, rows = [0, 0], [0, 0]
        few = len(self._written) <= _FEW and not self._fixed
        for number, size in enumerate(self._written):
            path = self._folder / f"feed-{number}.npz"
            if len(self._written) == 1 and (size == 1 or self._fixed):
                several = f"one batch of {size} rows" if size > 1 else "one row"
                self.notes.append(f"there is {several} of data: it was both calibrated and compared on")
                parts = [slice(None), slice(None)]
            elif few:
                parts = [slice(0, None, 2), slice(1, None, 2)]
            else:
                kind = number % 2
                path.rename(self._place(kind, counts[kind]))
                counts[kind] += 1
                rows[kind] += size
                continue
            for kind, part in enumerate(parts):
                took = len(range(*part.indices(size)))
                if took:
                    self._cut(path, self._place(kind, counts[kind]), part, size)
                    counts[kind] += 1
                    rows[kind] += took
            path.unlink()
        return (counts[0], counts[1]), (rows[0], rows[1])

    def _place(self, kind: int, number: int) -> Path:
        return self._folder / f"{KINDS[kind]}-{number}.npz"

    @staticmethod
    def _cut(source: Path, destination: Path, part: slice, rows: int) -> None:
        with np.load(source) as stored:
            arrays = {
                key: stored[key][part] if stored[key].ndim and stored[key].shape[0] == rows else stored[key]
                for key in stored.files
            }
        np.savez(destination, **arrays)

    def _held_rows(self) -> int:
        return sum(_rows(feed) for feed, _ in self._held)

    def _write(self, rows: int) -> None:
        arrays: dict[str, NDArray[Any]] = {}
        for name in self._held[0][0]:
            parts = [feed[name] for feed, _ in self._held]
            sizes = [_rows(feed) for feed, _ in self._held]
            shared = any(not part.ndim or part.shape[0] != size for part, size in zip(parts, sizes, strict=True))
            arrays[f"input.{name}"] = parts[0] if shared else np.concatenate(parts)
        targets = [part for _, part in self._held]
        if all(part is not None for part in targets):
            arrays["targets"] = np.concatenate([part for part in targets if part is not None])
        if self._fixed and rows < self._size:
            places = np.arange(self._size) % rows
            arrays = {
                key: array[places] if array.ndim and array.shape[0] == rows else array for key, array in arrays.items()
            }
            self.notes.append(f"the last {rows} rows were repeated to fill the file's batch of {self._size}")
            rows = self._size
        np.savez(self._folder / f"feed-{len(self._written)}.npz", **arrays)  # type: ignore[arg-type]
        self._written.append(rows)
        self._held = []


def _told_of_few(rows: tuple[int, int], labelled: bool) -> list[str]:
    """What few rows cannot tell."""
    notes = []
    if rows[0] < _USUAL:
        notes.append(f"only {rows[0]} row{'s' if rows[0] > 1 else ''} to calibrate on; some hundred are usual")
    if labelled and rows[1] * _POINT < 1:
        notes.append(f"accuracy goes in steps of {100 / rows[1]:.1f} points: it is told on {rows[1]} rows only")
    return notes


def _rows_from(inputs: Inputs, start: int, count: int) -> Inputs:
    """Some rows from there on, and the first ones again where they end."""
    rows = inputs.batch

    def take(tensor: torch.Tensor) -> torch.Tensor:
        places = torch.arange(start, start + count, device=tensor.device) % rows
        return tensor[places] if tensor.dim() and tensor.shape[0] == rows else tensor

    return inputs.map(take)


def _rows(feed: Feed) -> int:
    return next((int(array.shape[0]) for array in feed.values() if array.ndim), 1)


def _batches(data: Any) -> Iterable[Any]:
    if data is None:
        raise InputError("there is no data to calibrate on", found="None", hint="data=, an iterable of batches")
    if isinstance(data, (torch.Tensor, Mapping, Inputs)) or (
        isinstance(data, tuple) and any(isinstance(part, torch.Tensor) for part in data)
    ):
        return [data]
    if isinstance(data, (str, bytes)) or not isinstance(data, Iterable):
        raise InputError("data is an iterable of batches, or one batch", found=type(data).__name__)
    return data


def _targets(batch: Any, inputs: Inputs, rows: int) -> NDArray[np.int64] | None:
    """The integer class of each row, where a batch holds it beside its inputs."""
    candidates: list[Any] = []
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        candidates = [batch[-1]]
    elif isinstance(batch, Mapping):
        candidates = [batch[key] for key in ("labels", "label", "targets", "target", "y") if key in batch]
    used = {id(tensor) for tensor in inputs.tensors}
    for found in candidates:
        whole = isinstance(found, torch.Tensor) and found.dtype in _WHOLE
        if whole and id(found) not in used and tuple(found.shape) == (rows,):
            return np.asarray(found.detach().cpu().numpy(), np.int64)
    return None
