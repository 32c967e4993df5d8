"""What `trim` gives back: the best model, which limits it meets, and everything that was tried."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from torchtrim.autopilot.plans import TrimPlan
from torchtrim.bench.table import Table
from torchtrim.graph.summary import short

if TYPE_CHECKING:
    from torchtrim.export.report import ExportReport
    from torchtrim.report.trim_report import TrimReport
    from torchtrim.train.outcome import FineTuning


NEAR = 1e-9  # what floating-point numbers differ by is no excess


@dataclass(frozen=True)
class Candidate:
    """A plan that was tried.

    Attributes:
        number: Its number in the study.
        plan: The plan.
        proxy: How far its outputs are from the original's on rows held back, relative to their deviation; None where it
            could not be made.
        score: Its score; None where its proxy was not good enough to be measured.
        share: The share of the MACs that it was pruned to, where a latency decided that.
        size: The MB of parameters and buffers that it was pruned to, where a limit of its file's size decided that.
        macs: MACs left, at batch 1.
        params: Parameters left.
        size_mb: What it weighs, in MB: the file, where files are made, else parameters and buffers.
        latency_ms: What its file takes, in milliseconds; None where no latency was asked for.
        excess: By how much it is over each limit that it misses, as a share of it; for `max_drop` in the score's unit.
        why: Why it could not be made, or what is to be told.
    """

    number: int
    plan: TrimPlan
    proxy: float | None
    score: float | None
    share: float | None
    size: float | None
    macs: int
    params: int
    size_mb: float
    latency_ms: float | None
    excess: dict[str, float]
    why: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**self.__dict__, "plan": self.plan.to_dict(), "excess": dict(self.excess)}


@dataclass(frozen=True)
class TrimResult:
    """What `trim` found.

    Attributes:
        model: The best model: it meets the limits with the least loss; where none does, it misses them by least.
        plan: The plan it came from.
        score: Its score, at the end; where its file computes in other numbers than the model, that of the file.
        baseline: The score of the untouched model.
        noise: How far that moved between two calls.
        score_name: What the score is.
        met: The limits that are met, with what was found: `{"macs": (limit, found)}`, in absolute numbers.
        missed: The limits that are missed, likewise.
        pareto: The candidates that were measured and that no other beats in both score and cost, the smallest first.
        candidates: Everything that was tried.
        cost: What the front is over: `latency_ms`, `macs`, `params` or `size_mb`.
        training: The training; None where there was none.
        export: The file of the model; None where none was made.
        path: The checkpoint in the folder; None without a folder.
        report: The report: `result.report.write(folder)`.
        seconds: How long it took.
        notes: What else is to be told.
    """

    model: nn.Module = field(repr=False)
    plan: TrimPlan
    score: float
    baseline: float
    noise: float
    score_name: str
    met: dict[str, tuple[float, float]]
    missed: dict[str, tuple[float, float]]
    pareto: tuple[Candidate, ...]
    candidates: tuple[Candidate, ...]
    cost: str
    training: FineTuning | None
    export: ExportReport | None
    path: Path | None
    report: TrimReport = field(repr=False)
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def drop(self) -> float:
        """By how much the score is below the untouched model's."""
        return self.baseline - self.score

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and the report, ready for JSON."""
        names = ("score", "baseline", "noise", "score_name", "cost", "seconds")
        limits = {
            name: {limit: {"limit": pair[0], "found": pair[1]} for limit, pair in getattr(self, name).items()}
            for name in ("met", "missed")
        }
        return {
            **{name: getattr(self, name) for name in names},
            **limits,
            "plan": self.plan.to_dict(),
            "drop": self.drop,
            "pareto": [each.number for each in self.pareto],
            "candidates": [each.to_dict() for each in self.candidates],
            "training": None if self.training is None else self.training.to_dict(),
            "export": None if self.export is None else self.export.to_dict(),
            "path": None if self.path is None else str(self.path),
            "notes": list(self.notes),
        }

    def tables(self) -> tuple[Table, ...]:
        """The limits, and the candidates that were measured."""
        limits = [
            (name, _number(name, limit), _number(name, found), word, _beyond(name, limit, found))
            for pairs, word in ((self.met, "met"), (self.missed, "MISSED"))
            for name, (limit, found) in pairs.items()
        ]
        moved = f", which moves by {self.noise:.2g} by itself" if self.noise else ""
        told = f"{self.score_name} {self.score:.4f}, {self.baseline:.4f} untouched{moved}"
        notes = [told, f"plan: {self.plan}", f"{len(self.candidates)} plans tried in {self.seconds:.0f} s", *self.notes]
        first = Table("trim", ("limit", "at most", "found", "", ""), tuple(limits), notes)
        front = {each.number for each in self.pareto}
        rows = []
        for each in sorted(self.candidates, key=lambda one: (one.score is None, -(one.score or 0.0))):
            rows.append(
                (
                    str(each.plan),
                    "-" if each.proxy is None else f"{each.proxy:.3f}",
                    "-" if each.score is None else f"{each.score:.4f}",
                    short(each.macs),
                    short(each.params),
                    f"{each.size_mb:.2f}",
                    "-" if each.latency_ms is None else f"{each.latency_ms:.2f}",
                    "chosen" if each.plan == self.plan else "front" if each.number in front else each.why,
                )
            )
        columns = ("plan", "error", self.score_name, "MACs", "params", "MB", "ms", "")
        return first, Table("plans", columns, tuple(rows), ["error: of the outputs on rows held back, before all else"])

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


def front_of(candidates: list[Candidate], cost: str) -> tuple[Candidate, ...]:
    """The measured candidates that no other beats in both score and cost, the smallest first."""
    measured = [each for each in candidates if each.score is not None and getattr(each, cost) is not None]
    front: list[Candidate] = []
    for each in sorted(measured, key=lambda one: (getattr(one, cost), -(one.score or 0.0))):
        if not front or (each.score or 0.0) > (front[-1].score or 0.0):
            front.append(each)
    return tuple(front)


def _number(name: str, value: float) -> str:
    return short(round(value)) if name in ("macs", "params") else f"{value:.4g}"


def _beyond(name: str, limit: float, found: float) -> str:
    if found <= limit:
        return ""
    return f"by {found - limit:.4g}" if name == "max_drop" else f"by {found / limit - 1:.1%}"
