"""What the demo gives back: the stages a model went through, and what each costs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtrim.bench.machine import Machine
from torchtrim.bench.table import Table
from torchtrim.demo.training import Epoch


@dataclass(frozen=True)
class Stage:
    """The model at one point of its way.

    Attributes:
        name: What was done to it.
        runs_in: `PyTorch` or `ONNX Runtime`.
        size_mb: Megabytes (1e6 bytes) of its weights in PyTorch, or of its file.
        parameters: How many weights it has, where they can be counted.
        latency_ms: Median time of one picture, in milliseconds.
        accuracy: Share of the held-out digits that are right; `None` before it has a head for digits.
    """

    name: str
    runs_in: str
    size_mb: float
    parameters: int | None
    latency_ms: float
    accuracy: float | None


@dataclass(frozen=True)
class DemoResult:
    """The result of `torchtrim demo`.

    Attributes:
        stages: The model, from the original to the smallest file.
        curve: The training, epoch by epoch.
        machine: What the times were taken on.
        threads: How many threads they were taken with.
        seconds: Wall-clock time of the whole.
        files: What was written, by name.
    """

    stages: tuple[Stage, ...]
    curve: tuple[Epoch, ...]
    machine: Machine
    threads: int
    seconds: float
    files: dict[str, Path]

    @property
    def accuracy(self) -> float:
        """Held-out accuracy of the fp32 ONNX file."""
        return next(stage.accuracy or 0.0 for stage in self.stages if stage.name == "fp32 file")

    @property
    def table(self) -> Table:
        """The stages as rows."""
        rows = [
            (
                stage.name,
                stage.runs_in,
                "" if stage.parameters is None else f"{stage.parameters:,}",
                f"{stage.size_mb:.2f}",
                f"{stage.latency_ms:.2f}",
                "" if stage.accuracy is None else f"{stage.accuracy:.2%}",
            )
            for stage in self.stages
        ]
        columns = ("stage", "runs in", "parameters", "MB", "ms", "held-out accuracy")
        notes = [
            f"ms: median of one picture, {self.threads} thread, {self.machine.processor}, {self.machine.cores} cores",
            f"all of it took {self.seconds:.0f} s and left these files:",
        ]
        notes += [f"  {path}" for path in self.files.values()]
        return Table("EfficientNet-Lite0, from ImageNet to digits", columns, tuple(rows), notes)

    def __str__(self) -> str:
        return self.table.text()

    def _repr_html_(self) -> str:
        return self.table.html()

    def to_dict(self) -> dict[str, Any]:
        """Everything in it, ready for JSON."""
        return {
            **asdict(self),
            "machine": self.machine.to_dict(),
            "files": {name: str(path) for name, path in self.files.items()},
        }
