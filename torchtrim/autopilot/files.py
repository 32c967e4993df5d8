"""The files of the autopilot: candidates exported, and timed in alternating rounds beside the original's file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchtrim.bench.latency import benchmark
from torchtrim.bench.timing import Timing
from torchtrim.export.compare import Tolerance
from torchtrim.export.file_model import FileModel
from torchtrim.export.onnx import export_onnx
from torchtrim.export.report import ExportReport
from torchtrim.graph.inputs import Inputs

_SECONDS = 1.0  # how long a candidate and the original beside it are timed, each
_LOOKS = 6  # at the original's latency
_LONGER = 4.0  # times as long, where the ratio is unclear
_UNCLEAR = 0.06  # a ratio whose interval is wider than this share of it
_WORTH = 0.97  # a file that is not faster than that is no choice of its own
_NEAR = 0.9  # the cosine of a file with the original that a score is worth the while of
_LOSS = 0.1  # and the accuracy that it may lose by itself
_NEEDS_DATA = ("static", "mixed", "auto")


@dataclass(frozen=True)
class FileOf:
    """A candidate's file.

    Attributes:
        report: What the export wrote.
        ms: Its latency in milliseconds, None where it was not timed: the ratio to the original's file in the same
            rounds, times what that took at first, so that a machine that is slow for a while misleads nobody.
        timing: The timing.
    """

    report: ExportReport
    ms: float | None
    timing: Timing | None


class Files:
    """Exports models into a folder, and times them.

    Args:
        folder: Where the files are; made where it is missing.
        original: The original model.
        inputs: Example inputs, at the batch size that is timed.
        data: Batches to calibrate on.
        target: As for `export_onnx`.
        max_drop: As for `export_onnx`.
        threads: Threads to time with; PyTorch's present number by default.
    """

    def __init__(
        self,
        folder: Path,
        original: nn.Module,
        inputs: Inputs,
        data: list[Any],
        *,
        target: str,
        max_drop: float,
        threads: int | None = None,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._folder, self._original, self._inputs, self._data = folder, original, inputs, data
        self._target, self._max_drop, self._threads = target, max_drop, threads
        self.original = self.write(original, "float32", folder / "original.onnx", overwrite=True)
        # A target that cannot run here is timed where it can: on the CPU.
        self._providers = [self.original.provider]
        self.base_ms: float | None = None  # what the original's file takes, where latencies are measured
        self._weights: dict[str, float] = {}

    def timed_original(self) -> float:
        """The latency of the original's file, in milliseconds.

        What disturbs a measurement makes it longer: the least of several medians is the nearest to the truth.
        """
        files = {"original": self.original.path}
        return min(float(self._benchmark(files, _SECONDS / 2)["original"].median_ms) for _ in range(_LOOKS))

    def weight(self, scheme: str) -> float:
        """What the original's file weighs in a scheme, in MB."""
        if scheme not in self._weights:
            written = self.write(self._original, scheme, self._folder / "weighed.onnx", overwrite=True)
            self._weights[scheme] = written.size_mb
        return self._weights[scheme]

    def schemes(self) -> list[str]:
        """The schemes worth trying: float, and those whose file is faster on the original and not far from it.

        `quantize="auto"` makes and times them. How much accuracy one may cost is not asked here, since each candidate's
        file is scored: EfficientNet-Lite0's static one, too far for `auto` by its cosine, loses next to nothing.
        """
        report = self.write(self._original, "auto", self._folder / "auto.onnx", overwrite=True, loose=True)
        found = ["float32"]
        tried = [] if report.selection is None else report.selection.tried
        for each in sorted(tried, key=lambda one: one.ratio or 1.0):
            near = each.agreement is not None and each.agreement.cosine >= _NEAR
            if near and each.ratio is not None and each.ratio < _WORTH and each.scheme not in found:
                found.append(each.scheme)
        return found[:3]

    def write(
        self, net: nn.Module, scheme: str, path: Path, *, overwrite: bool = False, loose: bool = False
    ) -> ExportReport:
        """Export a model in a scheme; by loose limits where that is scored later.

        Raises:
            ExportError: It cannot be exported so.
            ExportMismatch: The file does not compute what the model does.
        """
        return export_onnx(
            net,
            self._inputs,
            path,
            target=self._target,
            quantize=scheme,
            data=self._data if scheme in _NEEDS_DATA else None,
            max_drop=max(_LOSS, self._max_drop) if loose else self._max_drop,
            benchmark=False,
            threads=self._threads,
            overwrite=overwrite,
            tolerance=Tolerance(cosine=_NEAR) if loose else None,
        )

    def of(self, net: nn.Module, scheme: str, path: Path, *, timed: bool) -> FileOf:
        """A candidate's file, timed beside the original's where that is asked.

        Raises:
            ExportError: It cannot be exported so.
            ExportMismatch: The file does not compute what the model does.
        """
        report = self.write(net, scheme, path, overwrite=True, loose=scheme == "static")
        if not timed or self.base_ms is None:
            return FileOf(report, None, None)
        files = {"original": self.original.path, "candidate": report.path}
        timing = self._timed(files)["candidate"]
        return FileOf(report, timing.ratio * self.base_ms, timing)

    def as_model(self, file: FileOf) -> FileModel:
        """A file that can be evaluated like a model."""
        provider = file.report.provider
        providers = [provider] if provider.endswith("ExecutionProvider") else None
        return FileModel(file.report.path, self._original, self._inputs, providers=providers, threads=self._threads)

    def _timed(self, files: dict[str, Path]) -> Any:
        found = self._benchmark(files, _SECONDS)
        last = found[list(files)[-1]]
        if last.ratio_high - last.ratio_low <= _UNCLEAR * last.ratio:
            return found
        again = self._benchmark(files, _LONGER * _SECONDS)
        other = again[list(files)[-1]]
        return again if other.ratio_high - other.ratio_low < last.ratio_high - last.ratio_low else found

    def _benchmark(self, files: dict[str, Path], seconds: float) -> Any:
        return benchmark(files, self._inputs, seconds=seconds, threads=self._threads, providers=self._providers)
