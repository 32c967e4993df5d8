"""What a benchmark found: latencies side by side, over batch sizes and threads, with memory and load times."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtrim.bench.figure import figure, written
from torchtrim.bench.machine import Machine
from torchtrim.bench.resources import Resources
from torchtrim.bench.table import Table
from torchtrim.bench.timing import Timing


@dataclass(frozen=True)
class Benchmark:
    """Latencies of candidates that were measured in one run.

    `result["name"]` is a candidate at the first batch size and number of threads, `result.at("name", batch=8)` at
    another.

    Attributes:
        timings: One for each number of threads, batch size and candidate, each in the order given.
        inputs: Shapes and types of the inputs, at the first batch size.
        batches: The batch sizes.
        thread_counts: Numbers of threads used by PyTorch and by the files' runtimes.
        rounds: How many times it went round the candidates, at the first batch size.
        confidence: The level of the intervals.
        machine: What it was measured on.
        resources: Memory and load time of each candidate, where they were asked for.
    """

    timings: tuple[Timing, ...]
    inputs: str
    batches: tuple[int, ...]
    thread_counts: tuple[int, ...]
    rounds: int
    confidence: float
    machine: Machine
    resources: tuple[Resources, ...] = ()

    def __getitem__(self, name: str) -> Timing:
        return self.at(name)

    def at(self, name: str, *, batch: int | None = None, threads: int | None = None) -> Timing:
        """A candidate at a batch size and a number of threads; the first ones by default.

        Raises:
            KeyError: It was not measured.
        """
        wanted = (name, self.batch if batch is None else batch, self.threads if threads is None else threads)
        for timing in self.timings:
            if (timing.name, timing.batch, timing.threads) == wanted:
                return timing
        raise KeyError(name if batch is None and threads is None else wanted)

    @property
    def batch(self) -> int:
        """The first batch size."""
        return self.batches[0]

    @property
    def threads(self) -> int:
        """The first number of threads."""
        return self.thread_counts[0]

    @property
    def median_ms(self) -> float:
        """The first candidate's median latency in milliseconds."""
        return self.timings[0].median_ms

    @property
    def noisy(self) -> bool:
        """Whether a 95th percentile is over one and a half times its median: other work was running, measure again."""
        return any(timing.p95_ms > 1.5 * timing.median_ms for timing in self.timings)

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates' names."""
        return tuple(dict.fromkeys(timing.name for timing in self.timings))

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            **asdict(self),
            "batch": self.batch,
            "threads": self.threads,
            "batches": list(self.batches),
            "thread_counts": list(self.thread_counts),
            "noisy": self.noisy,
            "timings": [timing.to_dict() for timing in self.timings],
            "machine": self.machine.to_dict(),
            "resources": [each.to_dict() for each in self.resources],
        }

    def table(self) -> Table:
        """The latencies as a table."""
        names = self.names
        several, grid = len(names) > 1, len(self.timings) > len(names)
        columns: tuple[str, ...] = ("candidate", "median ms", "p95 ms", "p99 ms", "rows/s")
        columns = ("threads", "batch", *columns) if grid else columns
        if several:
            columns += ("ratio", f"{self.confidence:.0%} interval", "verdict")
        rows = []
        for t in self.timings:
            times = (f"{ms:.2f}" for ms in (t.median_ms, t.p95_ms, t.p99_ms))
            row: tuple[str, ...] = (t.name, *times, f"{t.throughput:.1f}")
            row = (str(t.threads), str(t.batch), *row) if grid else row
            if several:
                verdict = "" if t.name == names[0] else t.verdict
                row += (f"{t.ratio:.2f}", f"{t.ratio_low:.2f} - {t.ratio_high:.2f}", verdict)
            rows.append(row)
        threads = " and ".join(map(str, self.thread_counts))
        notes = [
            f"inputs {self.inputs}; {threads} thread{'s' * (threads != '1')}; {self.rounds} alternating rounds",
            *str(self.machine).splitlines(),
        ]
        if self.noisy:
            notes.insert(
                0, "noisy: a 95th percentile is far above its median, so other work was running; measure again"
            )
        if several:
            notes.insert(0, "no difference: the interval holds 1")
            notes.insert(0, f"ratio: latency over that of {names[0]!r}; below 1 is faster")
        return Table("latency", columns, tuple(rows), notes, left=3 if grid else 1)

    def resource_table(self) -> Table:
        """Memory and load times as a table; without rows where they were not asked for."""
        rows = [
            (each.name, *(_or_blank(value) for value in (each.resident_mb, each.peak_mb, each.load_ms)))
            for each in self.resources
        ]
        notes = [
            "memory: growth of a process that only loads and runs it, without the libraries it imports",
            *(f"{each.name}: not measured: {each.problem}" for each in self.resources if each.problem),
        ]
        return Table("memory and load time", ("candidate", "resident MB", "peak MB", "load ms"), tuple(rows), notes)

    def tables(self) -> tuple[Table, ...]:
        """All that was found."""
        return (self.table(), self.resource_table()) if self.resources else (self.table(),)

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the latencies with their intervals, or, over several batch sizes, the throughput by batch.

        The file's ending says in which form (`.png`, `.svg`, `.pdf`).

        Raises:
            MissingDependency: matplotlib is not installed.
            InputError: It cannot be written there, or in this form.
        """
        by_batch = len(self.batches) > 1
        counts = self.thread_counts
        drawn = figure(4.5 * len(counts) + 1, 3.4 if by_batch else 1.2 + 0.4 * len(self.names))
        axes = drawn.subplots(1, len(counts), squeeze=False, sharey=True)[0]
        for axis, threads in zip(axes, counts, strict=True):
            axis.set_title(f"{threads} thread{'s' * (threads != 1)}")
            (self._throughput if by_batch else self._latency)(axis, threads)
        if by_batch:
            axes[0].set_ylim(bottom=0)
        return written(drawn, path)

    def _latency(self, axis: Any, threads: int) -> None:
        found = [self.at(name, threads=threads) for name in self.names]
        below = [t.median_ms - t.median_low_ms for t in found]
        above = [t.median_high_ms - t.median_ms for t in found]
        places = range(len(found))
        axis.barh(places, [t.median_ms for t in found], xerr=[below, above], height=0.6, color="0.75", capsize=3)
        axis.set_yticks(places, [t.name for t in found])
        if not axis.yaxis_inverted():
            axis.invert_yaxis()
        axis.set_xlabel(f"median ms, batch {self.batch}, {self.confidence:.0%} interval")

    def _throughput(self, axis: Any, threads: int) -> None:
        for name in self.names:
            found = [self.at(name, batch=batch, threads=threads) for batch in self.batches]
            rates = [t.throughput for t in found]
            below = [t.throughput - t.batch / t.median_high_ms * 1e3 for t in found]
            above = [t.batch / t.median_low_ms * 1e3 - t.throughput for t in found]
            axis.errorbar(self.batches, rates, yerr=[below, above], marker="o", markersize=3, capsize=3, label=name)
        axis.set_xscale("log", base=2)
        axis.set_xticks(self.batches, [str(batch) for batch in self.batches])
        axis.set(xlabel="batch", ylabel="rows a second")
        axis.legend(frameon=False)

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


def _or_blank(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
