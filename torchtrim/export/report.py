"""What an export wrote, how near it is to the model and how fast."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtrim.bench.latency import Benchmark
from torchtrim.bench.machine import Machine
from torchtrim.bench.table import Table
from torchtrim.export.selection import Selection
from torchtrim.export.verify import Verification


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        path: The ONNX file.
        files: All files written: that one, and the weights beside it where they pass 2 GB.
        target: Where it will run.
        quantize: Its scheme: `float32`, `float64`, `fp16`, `bf16`, `dynamic`, `static`, `weight_only`, `mixed`.
        precision: What they were before they were converted: `float32`, `float64` or `fp16`.
        provider: The ONNX Runtime provider it was run on.
        opset: Its ONNX opset.
        input_names: The names of its inputs.
        output_names: The names of its outputs.
        dynamic_batch: Whether it takes any batch size.
        float_mb: What the file would weigh in that precision, in MB (10^6 bytes).
        size_mb: What it weighs, in MB.
        quantized_nodes: How many nodes compute in int8.
        verification: How near it is to the PyTorch model.
        latency: Latency of PyTorch and of each file; None where it was not measured.
        machine: What it was run on.
        seconds: How long the export took.
        notes: What else there is to know.
        selection: What `quantize="auto"` tried; None elsewhere.
    """

    path: Path
    files: tuple[Path, ...]
    target: str
    quantize: str
    precision: str
    provider: str
    opset: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    dynamic_batch: bool
    float_mb: float
    size_mb: float
    quantized_nodes: int
    verification: Verification
    latency: Benchmark | None
    machine: Machine
    seconds: float
    notes: tuple[str, ...]
    selection: Selection | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            **asdict(self),
            "path": str(self.path),
            "files": [str(file) for file in self.files],
            "input_names": list(self.input_names),
            "output_names": list(self.output_names),
            "verification": self.verification.to_dict(),
            "latency": None if self.latency is None else self.latency.to_dict(),
            "machine": self.machine.to_dict(),
            "notes": list(self.notes),
            "selection": None if self.selection is None else self.selection.to_dict(),
        }

    def tables(self) -> tuple[Table, ...]:
        """The report's parts: the file, the errors, the latencies."""
        nodes = (
            f", {self.quantized_nodes} node{'s' * (self.quantized_nodes != 1)} in int8" if self.quantized_nodes else ""
        )
        size = f"{self.size_mb:.2f} MB"
        if self.quantize != self.precision:
            size += f" ({self.float_mb:.2f} MB in {self.precision})"
        facts = (
            ("file", str(self.path)),
            ("size", size),
            ("target", f"{self.target}, run on {self.provider}"),
            ("weights", self.quantize + nodes),
            ("inputs", ", ".join(self.input_names)),
            ("outputs", ", ".join(self.output_names)),
            ("batch", "any" if self.dynamic_batch else "as the example"),
            ("opset", str(self.opset)),
        )
        tables = [Table("export", ("", ""), facts, self.notes, left=2)]
        if self.selection is not None:
            tables.append(self.selection.table())
        tables.append(self.verification.table())
        if self.latency is not None:
            tables.append(self.latency.table())
        return tuple(tables)

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())
