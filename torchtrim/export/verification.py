"""What came of running a file beside its model, as an object, a table, data and an error."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtrim.bench.table import Table
from torchtrim.errors import ExportMismatch
from torchtrim.export.compare import OutputError, Tolerance

if TYPE_CHECKING:
    from torchtrim.export.layers import LayerComparison


@dataclass(frozen=True)
class Verification:
    """A file that was run beside its model.

    Attributes:
        path: The file.
        provider: The ONNX Runtime provider it ran on.
        batches: The batch sizes it ran at.
        rows: How many rows were compared.
        tolerance: What was asked.
        outputs: The errors, one entry an output.
        scheme: What the file computes in: `float32`, `static`, ...; see `scheme_of`.
        shapes: The shapes of the first input that it ran at.
        notes: What else there is to know: a file that gives other values each time, sizes that were left out.
    """

    path: Path
    provider: str
    batches: tuple[int, ...]
    rows: int
    tolerance: Tolerance
    outputs: tuple[OutputError, ...]
    scheme: str = "float32"
    shapes: tuple[tuple[int, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance."""
        return all(output.passed for output in self.outputs)

    @property
    def max_abs(self) -> float:
        """The largest absolute error of any output."""
        return max(output.max_abs for output in self.outputs)

    @property
    def cosine(self) -> float:
        """The least cosine of any output."""
        return min(output.cosine for output in self.outputs)

    @property
    def top1(self) -> float | None:
        """The least top-1 agreement of the outputs that have one."""
        known = [output.top1 for output in self.outputs if output.top1 is not None]
        return min(known) if known else None

    @property
    def top5(self) -> float | None:
        """The least top-5 agreement of the outputs that have one."""
        known = [output.top5 for output in self.outputs if output.top5 is not None]
        return min(known) if known else None

    @property
    def labelled(self) -> int:
        """How many rows had a label."""
        return max(output.labelled for output in self.outputs)

    @property
    def accuracy(self) -> float | None:
        """The share of the labelled rows that the file gets right; None without labels."""
        return next((output.accuracy for output in self.outputs if output.labelled), None)

    @property
    def reference_accuracy(self) -> float | None:
        """The share of the labelled rows that the model gets right; None without labels."""
        return next((output.reference_accuracy for output in self.outputs if output.labelled), None)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        outputs = [{**asdict(output), "shape": list(output.shape)} for output in self.outputs]
        listed = {"path": str(self.path), "batches": list(self.batches), "outputs": outputs, "passed": self.passed}
        listed |= {"shapes": [list(shape) for shape in self.shapes], "notes": list(self.notes)}
        listed |= {"accuracy": self.accuracy, "reference_accuracy": self.reference_accuracy, "labelled": self.labelled}
        return {**asdict(self), **listed}

    def table(self) -> Table:
        """The errors as a table."""
        columns = (
            "output",
            "shape",
            "max error",
            "99 %",
            "mean error",
            "relative",
            "cosine",
            "top-1",
            "top-5",
            "within tolerance",
        )
        rows = tuple(
            (
                output.name,
                str(list(output.shape)),
                f"{output.max_abs:.2e}",
                f"{output.p99_abs:.2e}",
                f"{output.mean_abs:.2e}",
                f"{output.relative:.2e}",
                f"{output.cosine:.5f}",
                "-" if output.top1 is None else f"{output.top1:.1%}",
                "-" if output.top5 is None else f"{output.top5:.1%}",
                "yes" if output.passed else "NO",
            )
            for output in self.outputs
        )
        notes = [f"{self.provider}; {self.scheme}; {self.rows} rows; batches {', '.join(map(str, self.batches))}"]
        if self.accuracy is not None and self.reference_accuracy is not None:
            notes.append(
                f"accuracy on {self.labelled} labelled rows: {self.accuracy:.2%}, and {self.reference_accuracy:.2%} "
                "from the model"
            )
        return Table(f"{self.path.name} against PyTorch", columns, rows, [*notes, *self.notes])

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


class VerificationFailed(ExportMismatch):
    """The `ExportMismatch` that `verify_onnx` raises.

    Attributes:
        verification: What was measured.
        layers: Where it goes wrong, if a `reference` was given.
    """

    verification: Verification
    layers: LayerComparison | None = None
