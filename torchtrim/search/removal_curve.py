"""What `top_down` gives back: the curve of removals, and the model that was kept."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from torchtrim.bench.figure import figure, written
from torchtrim.bench.table import Table
from torchtrim.errors import InputError


@dataclass(frozen=True)
class Removal:
    """One step of `top_down`.

    Attributes:
        paths: The blocks that went in this step.
        removed: All that are gone after it.
        score: What `evaluate` said then; NaN where it said so.
        before_recovery: What it said before `recover`; None without it.
        drop: By how much the score is below that of the untouched model.
        macs: MACs left, at batch 1.
        params: Parameters left.
        within: Whether the drop is within the tolerance.
        seconds: How long the step took.
        note: What else there is to know: why a removal was refused, what was tried.
    """

    paths: tuple[str, ...]
    removed: tuple[str, ...]
    score: float
    before_recovery: float | None
    drop: float
    macs: int
    params: int
    within: bool
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class TopDown:
    """What `top_down` did.

    Attributes:
        model: The smallest model whose drop is within the tolerance; a copy of the untouched one where none is.
        baseline: The score of the untouched model.
        noise: How far that moved between two calls.
        tolerance: The drop that was allowed.
        order: How blocks were chosen.
        steps: The whole curve.
        macs: MACs of the untouched model.
        params: Its parameters.
        why: Why it stopped.
        seconds: How long it took.
    """

    model: nn.Module = field(repr=False)
    baseline: float
    noise: float
    tolerance: float
    order: str
    steps: tuple[Removal, ...]
    macs: int
    params: int
    why: str
    seconds: float

    @property
    def best(self) -> Removal | None:
        """The step whose model was kept; None where nothing could go."""
        return next((step for step in reversed(self.steps) if step.within), None)

    @property
    def removed(self) -> tuple[str, ...]:
        """The blocks that are gone from the model that was kept."""
        return () if self.best is None else self.best.removed

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, ready for JSON."""
        steps = [{**asdict(step), "paths": list(step.paths), "removed": list(step.removed)} for step in self.steps]
        names = ("baseline", "noise", "tolerance", "order", "macs", "params", "why", "seconds")
        return {name: getattr(self, name) for name in names} | {"steps": steps, "removed": list(self.removed)}

    def table(self) -> Table:
        """The curve as a table."""
        rows = [("untouched", f"{self.baseline:.4f}", "", "", "100%", "100%", "", "")]
        for step in self.steps:
            rows.append(
                (
                    "- " + ", ".join(step.paths),
                    f"{step.score:.4f}",
                    "" if step.before_recovery is None else f"{step.before_recovery:.4f}",
                    f"{step.drop:+.4f}",
                    f"{step.macs / max(self.macs, 1):.1%}",
                    f"{step.params / max(self.params, 1):.1%}",
                    "kept" if step is self.best else "yes" if step.within else "no",
                    step.note,
                )
            )
        columns = ("step", "score", "before recovery", "drop", "MACs", "params", "within", "")
        notes = [f"order {self.order!r}, a drop of {self.tolerance:g} allowed; {self.why}"]
        if self.noise:
            told = f"the score of the untouched model moved by {self.noise:.4g} between two calls"
            notes.append(f"{told}: smaller drops say nothing")
        return Table("top-down removal", columns, tuple(rows), notes)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the score over the MACs left; the file's ending says in which form (`.png`, `.svg`, `.pdf`).

        Raises:
            MissingDependency: matplotlib is not installed.
            InputError: It cannot be written there, or in this form.
        """
        drawn = figure(7, 4)
        axis = drawn.subplots()
        left = [100.0, *(100 * step.macs / max(self.macs, 1) for step in self.steps)]
        axis.plot(left, [self.baseline, *(step.score for step in self.steps)], marker="o", color="#4477aa")
        axis.axhline(self.baseline - self.tolerance, color="#cc6677", linestyle="--", label="the least that is allowed")
        if self.best is not None:
            at = 100 * self.best.macs / max(self.macs, 1)
            axis.plot(
                [at], [self.best.score], marker="o", markersize=12, fillstyle="none", color="#228833", label="kept"
            )
        axis.invert_xaxis()
        axis.set(xlabel="percent of the MACs left", ylabel="score", title="blocks taken off")
        axis.legend(frameon=False)
        return written(drawn, path)


class TopDownStopped(InputError):
    """The `InputError` of an evaluate or recover function that failed on the way; `partial` holds what was reached."""

    partial: TopDown
