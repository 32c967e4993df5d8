"""The ranges of a file's intermediate tensors, gathered in one pass over the data and in bounded memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import gcd
from operator import length_hint
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError, InputError
from torchtrim.export.histogram import Histogram
from torchtrim.export.ranges import METHODS, range_of
from torchtrim.export.saving import save_whole
from torchtrim.export.workshop import room_beside
from torchtrim.graph.progress import progress

MEMORY = 256_000_000  # bytes of intermediate tensors that one run may give back
SAMPLE = 1 << 16  # values of one row of one tensor that go into its histogram


@dataclass
class TensorStatistics:
    """What was seen of one tensor.

    Attributes:
        low: The smallest finite value.
        high: The largest finite value.
        histogram: Of at most `SAMPLE` values of each row, taken at even distances.
        beyond: How many values were NaN or infinite; they count nowhere else.
        rows: How many rows were seen.
        mean: The mean of each channel, where an axis was asked for.
        largest: The largest absolute value of each channel, where an axis was asked for.
    """

    low: float = np.inf
    high: float = -np.inf
    histogram: Histogram = field(default_factory=Histogram)
    beyond: int = 0
    rows: int = 0
    mean: NDArray[np.float64] | None = None
    largest: NDArray[np.float64] | None = None

    def add(self, values: NDArray[Any], axis: int | None = None) -> None:
        """Add what one run gave: rows along the first dimension, the channels along `axis`."""
        if not values.size:
            return
        low, high = float(values.min()), float(values.max())
        if not np.isfinite(low + high):
            finite = np.isfinite(values)
            self.beyond += int(values.size - finite.sum())
            if not finite.any():
                return
            low, high = float(values[finite].min()), float(values[finite].max())
            values = np.where(finite, values, 0)
        self.low, self.high = min(self.low, low), max(self.high, high)
        rows = values.shape[0] if values.ndim > 1 else 1
        self.histogram.add(_sample(values.reshape(rows, -1)), low, high)
        if axis is not None and values.ndim:
            channels = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
            mean = channels.mean(1, dtype=np.float64)
            largest = np.abs(channels).max(1).astype(np.float64)
            share = rows / (self.rows + rows)
            self.mean = mean if self.mean is None else self.mean + (mean - self.mean) * share
            self.largest = largest if self.largest is None else np.maximum(self.largest, largest)
        self.rows += rows


@dataclass(frozen=True)
class Statistics:
    """What calibration knows of a file's tensors.

    Attributes:
        tensors: By name.
    """

    tensors: dict[str, TensorStatistics]

    def range(self, tensor: str, method: str = "minmax") -> tuple[float, float]:
        """The range to quantize a tensor in.

        Args:
            tensor: Its name.
            method: `minmax`, `entropy`, `percentile` or `mse`; all from the same histogram.

        Returns:
            The lowest and the highest value that are kept.

        Raises:
            InputError: Another method, or a tensor that was not calibrated.
        """
        if method not in METHODS:
            raise InputError("there is no such calibration method", found=method, expected=", ".join(METHODS))
        seen = self._of(tensor)
        return range_of(seen.histogram, seen.low, seen.high, method)

    def channel_means(self, tensor: str) -> NDArray[np.float64]:
        """The mean of each channel.

        Raises:
            InputError: The tensor was calibrated without `channels=`.
        """
        return self._channels(tensor, self._of(tensor).mean)

    def channel_largest(self, tensor: str) -> NDArray[np.float64]:
        """The largest absolute value of each channel.

        Raises:
            InputError: The tensor was calibrated without `channels=`.
        """
        return self._channels(tensor, self._of(tensor).largest)

    def _of(self, tensor: str) -> TensorStatistics:
        seen = self.tensors.get(tensor)
        if seen is None or not seen.rows:
            raise InputError("there are no calibration figures for this tensor", path=tensor)
        return seen

    def _channels(self, tensor: str, found: NDArray[np.float64] | None) -> NDArray[np.float64]:
        if found is None:
            raise InputError("there are no figures by channel for this tensor", path=tensor, hint="channels=")
        return found


def calibrate(
    path: Path,
    feeds: Iterable[Mapping[str, NDArray[Any]]],
    tensors: Collection[str],
    *,
    channels: Mapping[str, int] | None = None,
    threads: int | None = None,
    memory: int = MEMORY,
) -> Statistics:
    """Run a float file over feeds, and keep of each tensor its range, a histogram, and figures by channel.

    Every feed is read once, and cut into so few rows that what one run gives back fits into `memory`; where one row
    is more than that, the tensors are fetched in groups. The order and the size of the feeds change nothing but the
    last digits of the means.

    Args:
        path: A float ONNX file.
        feeds: Its inputs.
        tensors: The names of the tensors to watch: of the file's inputs, or of what its nodes give.
        channels: The axis of the channels, of those tensors whose channels are told apart.
        threads: ONNX Runtime's threads.
        memory: Bytes.

    Raises:
        ExportError: A tensor that the file does not have or that is not float, or a file that does not run.
        InputError: No feeds.

    Example:
        >>> import onnx.helper as h, numpy as np, tempfile
        >>> x, y = (h.make_tensor_value_info(name, 1, ["n", 2]) for name in "xy")
        >>> graph = h.make_graph([h.make_node("Relu", ["x"], ["y"], name="relu")], "g", [x], [y])
        >>> path = Path(tempfile.mkdtemp()) / "relu.onnx"
        >>> model = h.make_model(graph, opset_imports=[h.make_opsetid("", 18)], ir_version=9)
        >>> onnx.save(model, path)
        >>> calibrate(path, [{"x": np.array([[-2.0, 3.0]], np.float32)}], ["x", "y"]).range("y")
        (0.0, 3.0)
    """
    watched = list(dict.fromkeys([*tensors, *(channels or {})]))
    axes = dict(channels or {})
    statistics = {name: TensorStatistics() for name in watched}
    runner = Tapped(path, watched, threads=threads, memory=memory)
    total, done = length_hint(feeds), 0
    with runner, progress("calibrating") as tell:
        for feed in feeds:
            for values in runner.run(feed):
                for name, array in values.items():
                    statistics[name].add(array, axes.get(name))
            done += 1
            tell(f"{done} of {total} feeds" if total else f"{done} feeds", min(1.0, done / total) if total else 0.0)
    if not done:
        raise InputError("there is nothing to calibrate on", found="no batches of data")
    return Statistics(statistics)


class Tapped:
    """A file that gives its intermediate tensors too; a context manager, which keeps a copy beside the file meanwhile.

    Args:
        path: The file.
        tensors: Names of its inputs, its outputs, or what lies between.
        threads: ONNX Runtime's threads.
        memory: Bytes that one run may give back.
        outputs: Whether the file's own outputs are given as well.
        optimise: Whether the runtime may fuse nodes, see `OnnxSession`.

    Raises:
        ExportError: A tensor that the file does not have; no room for the copy.
    """

    def __init__(
        self,
        path: Path,
        tensors: Collection[str],
        *,
        threads: int | None = None,
        memory: int = MEMORY,
        outputs: bool = False,
        optimise: bool = True,
    ) -> None:
        self._open, self._optimise = ExitStack(), optimise
        self._path, self._threads, self._memory = path, threads, memory
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        given = {value.name for value in graph.output}
        inputs = {value.name for value in graph.input}
        made = {name for node in graph.node for name in node.output}
        missing = [name for name in tensors if name not in made | inputs]
        if missing:
            raise ExportError("the file has no such tensors", path=path, found=missing[:5])
        self._inputs = [name for name in tensors if name in inputs]
        self._fetched = [name for name in tensors if name not in inputs]
        if outputs:
            self._fetched += [value.name for value in graph.output if value.name not in self._fetched]
        self._own = [value.name for value in graph.output]
        known = {value.name: value for value in graph.value_info}
        self._row_bytes = {name: _row_bytes(known.get(name)) for name in self._fetched}
        for name in self._fetched:
            if name not in given:
                graph.output.append(known.get(name) or onnx.ValueInfoProto(name=name))
        symbolic = [value.type.tensor_type.shape.dim[:1] for value in graph.input]
        self._by_rows = {
            value.name
            for value, first in zip(graph.input, symbolic, strict=True)
            if first and not first[0].HasField("dim_value")
        }
        self._model = model

    def __enter__(self) -> Tapped:
        with ExitStack() as opened:  # which cleans up where something fails in here
            copy = opened.enter_context(room_beside(self._path)) / "tapped.onnx"
            _save_beside(self._model, self._path, copy)
            self._session = OnnxSession(copy, threads=self._threads, optimise=self._optimise)
            self._open = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def run(self, feed: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        """The tensors, for a few rows and a few tensors at a time.

        Raises:
            ExportError: ONNX Runtime could not run it.
        """
        for part in self._parts(feed):
            rows = max((part[name].shape[0] for name in self._by_rows if name in part), default=1)
            yield {name: part[name] for name in self._inputs}
            for group in self._groups(rows):
                yield dict(zip(group, self._session.run(part, group), strict=True))

    def _parts(self, feed: Mapping[str, NDArray[Any]]) -> Iterator[dict[str, NDArray[Any]]]:
        sizes = {feed[name].shape[0] for name in self._by_rows if name in feed}
        if len(sizes) != 1:
            yield dict(feed)
            return
        rows = sizes.pop()
        step = max(1, min(rows, self._memory // max(1, sum(self._row_bytes.values()))))
        for start in range(0, rows, step):
            yield {
                name: array[start : start + step] if name in self._by_rows else array for name, array in feed.items()
            }

    def _groups(self, rows: int) -> Iterator[list[str]]:
        group: list[str] = []
        used = 0
        for name in self._fetched:
            size = self._row_bytes[name] * rows
            if group and used + size > self._memory:
                yield group
                group, used = [], 0
            group.append(name)
            used += size
        if group:
            yield group


def _row_bytes(value: onnx.ValueInfoProto | None) -> int:
    """Bytes of one row: what its sizes say, without those that are open; four megabytes where nothing is known."""
    if value is None or not value.type.tensor_type.HasField("shape"):
        return 4_000_000
    sizes = [dim.dim_value for dim in value.type.tensor_type.shape.dim if dim.dim_value]
    return 4 * int(np.prod(sizes, dtype=np.int64))


def _save_beside(model: onnx.ModelProto, source: Path, copy: Path) -> None:
    """Save a changed copy in another folder; weights that lie beside the source are taken along."""
    if any(tensor.external_data for tensor in model.graph.initializer):
        onnx.load_external_data_for_model(model, str(source.parent))
    save_whole(model, copy)


def _sample(rows: NDArray[Any]) -> NDArray[Any]:
    """At most `SAMPLE` values of each row, at a distance that falls on every place in the innermost dimensions."""
    count = rows.shape[1]
    if count <= SAMPLE:
        return rows.reshape(-1)
    step = -(-count // SAMPLE)
    while gcd(step, count) != 1:
        step += 1
    return np.ascontiguousarray(rows[:, ::step]).reshape(-1)
