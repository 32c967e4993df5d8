"""`SparsityReport`: how sparse each weight is, what was left out, and how it came to that."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from torchtrim.bench.figure import figure, written
from torchtrim.bench.table import Table
from torchtrim.edits.sparse_record import SparseLayer, reasons, table, totals


@dataclass(frozen=True)
class SparsityReport:
    """How sparse a model is. `print` shows it.

    Attributes:
        layers: For each weight its `path`, `shape`, number of `weights`, `zeros`, `sparsity` and `threshold`.
        left_out: The names of the other parameters, and why.
        step: How many steps were taken.
        target: The sparsity that the schedule leads to.
        course: The steps at which weights were pruned, and the sparsity of all of them since.
        notes: What the user should know.
    """

    layers: tuple[SparseLayer, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    step: int = 0
    target: float = 0.0
    course: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def zeros(self) -> int:
        """How many values of these weights are zero."""
        return totals(self.layers)[0]

    @property
    def weights(self) -> int:
        """How many values these weights have."""
        return totals(self.layers)[1]

    @property
    def sparsity(self) -> float:
        """The fraction of them that is zero."""
        return self.zeros / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "zeros": self.zeros,
            "weights": self.weights,
            "sparsity": self.sparsity,
            "left_out": dict(self.left_out),
            "step": self.step,
            "target": self.target,
            "course": [list(each) for each in self.course],
            "notes": list(self.notes),
        }

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw the sparsity of each weight, and how the whole came to its own, into a picture file.

        Raises:
            MissingDependency: matplotlib is not installed.
            InputError: It cannot be written there, or in this form.
        """
        drawn = figure(8, 2.5 + 0.22 * len(self.layers))
        upper, lower = drawn.subplots(2, 1, height_ratios=[max(0.22 * len(self.layers), 1), 2])
        upper.barh([layer.path for layer in self.layers], [layer.sparsity for layer in self.layers], color="#4477aa")
        upper.invert_yaxis()
        upper.set(xlim=(0, 1), xlabel="sparsity", title=f"{self.zeros:,} of {self.weights:,} are zero")
        steps, reached = [step for step, _ in self.course], [sparsity for _, sparsity in self.course]
        lower.step(steps, reached, where="post", color="#4477aa", marker="o", markersize=3)
        lower.axhline(self.target, color="#888888", linestyle=":", label="target")
        lower.set(ylim=(0, 1), xlabel="step", ylabel="sparsity")
        lower.legend(loc="lower right")
        written(drawn, path)

    def _table(self) -> Table:
        told = [*self.notes, *reasons(self.left_out)]
        return table(f"Sparsity after {self.step:,} steps, of {self.target:.2%} in the end", self.layers, told)

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()
