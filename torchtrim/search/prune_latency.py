"""Pruning to a latency: candidates are exported, and their files are measured beside the original's."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeAlias

import torch
from torch import nn

from torchtrim.bench.latency import Timing, benchmark
from torchtrim.edits.budget import Budget
from torchtrim.edits.prune import PruneChannels
from torchtrim.errors import EditError, TorchTrimWarning
from torchtrim.export.onnx import export_onnx
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.summary import summary
from torchtrim.search.share import Try, largest_share

Prune: TypeAlias = "Callable[[Budget], tuple[nn.Module, PruneChannels]]"

_SECONDS = 1.0  # how long a candidate and the original beside it are measured, each
_UNCLEAR = 0.06  # a ratio whose interval is wider than this share of it


def pruned_to_latency(model: nn.Module, inputs: Inputs, budget: Budget, prune: Prune) -> PruneChannels:
    """Find the channels that have to go for a model's ONNX file to stay within a latency, on this machine.

    Each candidate is pruned to a share of the MACs, exported, and measured in ONNX Runtime in alternating rounds with
    the original's file: the ratio of the two is what counts, so that a machine that is slow for a while misleads
    nobody. Both run at the batch size of the example inputs, with PyTorch's present number of threads.

    Args:
        model: The model. It is left as it was.
        inputs: Example inputs.
        budget: What is asked, with a latency.
        prune: Prunes the model to a budget without one; gives what comes out, and the record with what was decided.

    Returns:
        The record for the budget that was asked, with what was measured in its notes. Where no candidate is fast
        enough, the fastest, with a warning.

    Raises:
        EditError: No latency is asked for.
        ExportError: The model cannot be exported.
    """
    limit = budget.latency_ms
    if limit is None:
        raise EditError("no latency is asked for", path="budget.latency_ms")
    macs = max(summary(model, inputs).macs, 1)
    with TemporaryDirectory(prefix="torchtrim.") as folder:
        _say("exporting and timing the original")
        bench = _Bench.of(model, inputs, Path(folder))

        first = min(1.0, budget.limits({"macs": macs, "params": 1.0}).get("macs", macs) / macs)

        def measure(share: float) -> Try[_Candidate]:
            _say(f"pruning to {share:.0%} of the MACs")
            with warnings.catch_warnings():
                if share < first:  # a share that nobody asked for: that it is missed is for the notes alone
                    warnings.filterwarnings("ignore", "asked for macs=", TorchTrimWarning)
                net, record = prune(replace(budget, macs=share, latency_ms=None))
            reached = summary(net, inputs).macs / macs
            if not _takes_out(record):
                return Try(reached, bench.timing.median_ms, _Candidate(record, bench.timing))
            timing = bench.beside_original(net)
            ms = timing.ratio * bench.timing.median_ms
            return Try(reached, ms, _Candidate(record, timing), smaller=reached <= share)

        best = whole = measure(first)  # what the other limits ask for
        tried = [whole]
        if whole.ms > limit and whole.smaller:
            best, tried = largest_share(limit, whole, measure)
        told = _told(best, limit, bench, len(tried))
    if best.ms > limit:
        warnings.warn("; ".join(told), TorchTrimWarning, stacklevel=2)
    record = best.model.record
    if record.pruned is None:
        raise EditError("nothing was decided", path=str(record))
    return replace(record, budget=budget, pruned=replace(record.pruned, notes=(*told, *record.pruned.notes)))


@dataclass(frozen=True)
class _Candidate:
    record: PruneChannels
    timing: Timing


def _takes_out(record: PruneChannels) -> bool:
    return record.pruned is not None and bool(record.pruned.lost)


@dataclass(frozen=True)
class _Bench:
    """Files in a folder, each measured beside the original's."""

    folder: Path
    inputs: Inputs
    timing: Timing  # of the original

    @staticmethod
    def of(model: nn.Module, inputs: Inputs, folder: Path) -> _Bench:
        path = export_onnx(model, inputs, folder / "original.onnx", benchmark=False).path
        return _Bench(folder, inputs, _measured({"original": path}, inputs, "original"))

    def beside_original(self, net: nn.Module) -> Timing:
        path = export_onnx(net, self.inputs, self.folder / "pruned.onnx", benchmark=False, overwrite=True).path
        files = {"original": self.folder / "original.onnx", "pruned": path}
        return _measured(files, self.inputs, "pruned")


def _measured(files: dict[str, Path], inputs: Inputs, name: str) -> Timing:
    """The timing of a file; where other work disturbed it so that the ratio is unclear, it is measured longer."""
    found = benchmark(files, inputs, seconds=_SECONDS)[name]
    if found.ratio_high - found.ratio_low <= _UNCLEAR * found.ratio:
        return found
    again = benchmark(files, inputs, seconds=4 * _SECONDS)[name]
    return min(found, again, key=lambda timing: timing.ratio_high - timing.ratio_low)


def _told(best: Try[_Candidate], limit: float, bench: _Bench, count: int) -> list[str]:
    timing, threads = best.model.timing, torch.get_num_threads()
    told = (
        f"latency {best.ms:.2f} ms of {bench.timing.median_ms:.2f} ms where {limit:.2f} ms were asked for (ratio "
        f"{timing.ratio:.3f}, {timing.ratio_low:.3f} to {timing.ratio_high:.3f}): the ONNX file in ONNX Runtime with "
        f"{threads} thread{'s' * (threads != 1)} on this machine; {count} measured"
    )
    if best.ms <= limit:
        return [told]
    why = "the fastest of those tried" if best.smaller else "the smallest that there is"
    return [f"latency_ms={limit:g} is not reached by {why}", told]


def _say(text: str) -> None:
    if sys.stderr.isatty():
        print(f"torchtrim: {text}", file=sys.stderr, flush=True)
