"""What a training did: a row for each epoch, and why it ended."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torchtrim.bench.figure import figure, written
from torchtrim.bench.table import Table


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data.

    Attributes:
        loss: Mean loss of the rows, while they were learnt.
        metric: Mean of the metric over them then; `None` where there is none.
        val_loss: Mean loss on the validation data afterwards, in eval mode; `None` without such data.
        val_metric: The metric on it.
        lr: The largest learning rate of its first step.
        trained: How many parameters learnt.
        seconds: How long it took, the measuring included.
        parts: The mean of each term of a distillation, before it was weighted.
        sparsity: The share of the weights in the pruner's layers that is zero; `None` without a pruner.
    """

    loss: float
    metric: float | None
    val_loss: float | None
    val_metric: float | None
    lr: float
    trained: int
    seconds: float
    parts: dict[str, float] = field(default_factory=dict)
    sparsity: float | None = None

    @property
    def watched(self) -> tuple[float, bool]:
        """What epochs are compared by, and whether more is better."""
        if self.val_metric is not None:
            return self.val_metric, True
        return (self.loss if self.val_loss is None else self.val_loss), False

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return asdict(self)


@dataclass(frozen=True)
class FineTuning:
    """What `finetune` did.

    Attributes:
        epochs: One entry for each pass, those of an earlier, interrupted run included.
        best: The number of the best epoch, counted from 1.
        kept: The number of the epoch whose weights the model has; `None` where pruning went on after the last.
        ended: Why it ended.
        metric: The name of the metric; `None` without one.
        trained: How many parameters learnt in the last epoch.
        frozen: How many did not.
        rows: Rows in an epoch.
        processes: How many processes took part.
        device: Where it ran.
        precision: `float32`, or the type of the mixed precision.
        seconds: How long it took, without earlier runs.
        folder: Where its checkpoints are; `None` where none were asked for.
        notes: What else the user should know.
    """

    epochs: tuple[Epoch, ...]
    best: int
    kept: int | None
    ended: str
    metric: str | None
    trained: int
    frozen: int
    rows: int
    processes: int
    device: str
    precision: str
    seconds: float
    folder: Path | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        found = asdict(self)
        return (
            found
            | {"folder": None if self.folder is None else str(self.folder), "notes": list(self.notes)}
            | {"epochs": [epoch.to_dict() for epoch in self.epochs]}
        )

    def table(self) -> Table:
        """A row for each epoch."""
        names = list(dict.fromkeys(name for epoch in self.epochs for name in epoch.parts))
        sparse = any(epoch.sparsity is not None for epoch in self.epochs)
        metric = self.metric or "metric"
        columns = ["epoch", "trains", "loss", *names, metric, "val loss", f"val {metric}"]
        columns += [*(["sparsity"] if sparse else []), "lr", "s"]
        rows = []
        for number, epoch in enumerate(self.epochs, start=1):
            row = [f"{number}{'*' if number == self.best else ''}", f"{epoch.trained:,}", f"{epoch.loss:.4f}"]
            row += [f"{epoch.parts[name]:.4f}" if name in epoch.parts else "" for name in names]
            row += [self._metric(epoch.metric), "" if epoch.val_loss is None else f"{epoch.val_loss:.4f}"]
            row += [self._metric(epoch.val_metric), *([_percent(epoch.sparsity)] if sparse else [])]
            rows.append((*row, f"{epoch.lr:.2g}", f"{epoch.seconds:.1f}"))
        kept = "as they are after the pruner's last step" if self.kept is None else f"those of epoch {self.kept}"
        many = f", {self.processes} processes" if self.processes > 1 else ""
        notes = [
            f"* the best; the weights are {kept}; {self.ended}",
            f"{self.trained:,} parameters trained, {self.frozen:,} frozen; {self.rows:,} rows an epoch",
            f"{self.seconds:.1f} s on {self.device}, {self.precision}{many}",
            *self.notes,
        ]
        return Table("training", tuple(columns), tuple(rows), notes)

    def plot(self, path: str | Path) -> Path:
        """Draw the losses and the metric by epoch; the file's ending says in which form (`.png`, `.svg`, `.pdf`).

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        drawn = figure(8, 3.2)
        numbers = range(1, len(self.epochs) + 1)
        losses, metrics = drawn.subplots(1, 2)
        for axis, title, names in (
            (losses, "loss", {"training": "loss", "validation": "val_loss"}),
            (metrics, self.metric or "no metric", {"training": "metric", "validation": "val_metric"}),
        ):
            axis.set(title=title, xlabel="epoch")
            for label, name in names.items():
                values = [getattr(epoch, name) for epoch in self.epochs]
                if any(value is not None for value in values):
                    axis.plot(numbers, values, marker="o", markersize=3, label=label)
            axis.axvline(self.best, color="0.7", linewidth=1, zorder=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
            if axis.lines[:-1]:
                axis.legend(frameon=False)
        return written(drawn, path)

    def _metric(self, value: float | None) -> str:
        if value is None:
            return ""
        return f"{value:.1%}" if self.metric == "accuracy" else f"{value:.4f}"

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
