"""A converted file, run beside the model it came from before anyone believes it, and timed beside it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from torchtrim.bench.latency import Benchmark, benchmark
from torchtrim.errors import ExportMismatch
from torchtrim.export.bfloat16 import widen_bfloat16
from torchtrim.export.compare import TOLERANCES, Tolerance
from torchtrim.export.convert import Converted
from torchtrim.export.graph import has_dynamic_batch, stamp
from torchtrim.export.kernels import refuse_unsupported
from torchtrim.export.verify import Data, Verification, verify_onnx
from torchtrim.export.workbench import Built, Workbench
from torchtrim.graph.inputs import Inputs


@dataclass(frozen=True)
class Limits:
    """How far a file may be from the model.

    Attributes:
        asked: What the user asked for; None: what suits the scheme.
        max_drop: How much accuracy `mixed` and `auto` may lose.
        labelled: Whether there are classes to tell accuracy by.
    """

    asked: Tolerance | None
    max_drop: float
    labelled: bool

    def of(self, scheme: str, *, chosen: bool) -> Tolerance:
        """The tolerance for a file of a scheme.

        Args:
            scheme: The file's.
            chosen: Whether the file was chosen by its accuracy.
        """
        limits = self.asked or TOLERANCES[scheme]
        if chosen and self.labelled and scheme in ("dynamic", "static", "weight_only", "mixed"):
            return replace(limits, max_drop=self.max_drop)
        return limits


def proven(
    converted: Converted,
    bench: Workbench,
    destination: Path,
    model: nn.Module,
    data: Data,
    limits: Limits,
    provider: str,
    about: dict[str, str],
) -> tuple[Converted, Verification]:
    """Run a converted file beside the model, and keep it only if they agree.

    What `auto` chose was compared with the float file on some rows. Where it fails beside the model, on all of them,
    the next fastest takes its place, and the float file in the end; the selection says so.

    Raises:
        ExportError: The target has no kernel for a node.
        ExportMismatch: The file is past the tolerance.
    """
    left = [*converted.others, Built("float", "float32", bench.plain, 0)]
    while True:
        try:
            return converted, _run(converted, bench, destination, model, data, limits, provider, about)
        except ExportMismatch as error:
            if converted.selection is None or converted.built.scheme == "float32":
                raise
            built = left.pop(0)
            told = f"{converted.built.name} was the fastest, and failed beside the model: {error.message}"
            selection = converted.selection.instead(converted.built.name, built.name, error.message)
            converted = Converted(built, (*converted.notes, told), selection, tuple(left))


def _run(
    converted: Converted,
    bench: Workbench,
    destination: Path,
    model: nn.Module,
    data: Data,
    limits: Limits,
    provider: str,
    about: dict[str, str],
) -> Verification:
    path, scheme = converted.built.path, converted.built.scheme
    notes = {**about, "torchtrim.target": bench.target.name, "torchtrim.quantize": scheme}
    stamped = stamp(path, version=_version(), notes=notes)
    if bench.target.name in ("cuda", "tensorrt"):
        refuse_unsupported(stamped, bench.target.name)
    chosen = converted.selection is not None or scheme == "mixed"
    reference = None if path == bench.plain else bench.plain
    run = path
    if scheme == "bf16" and provider == "CPUExecutionProvider":
        run = bench.place("widened")
        widen_bfloat16(path, run, external_data=bench.external)
        reference = None
    try:
        found = verify_onnx(
            run,
            model,
            data,
            tolerance=limits.of(scheme, chosen=chosen),
            providers=[provider],
            reference=reference,
        )
    except ExportMismatch as error:
        error.path = destination
        raise
    return replace(found, path=destination)


def timed_beside(
    model: nn.Module, inputs: Inputs, files: dict[Path, str], provider: str, threads: int | None
) -> Benchmark:
    """The latency of the model and of each file, at batch 1 where they take it."""
    candidates: dict[str, nn.Module | Path] = {"PyTorch eager": model}
    candidates |= {name: path for path, name in files.items()}
    batch = 1 if inputs.batch > 1 and all(has_dynamic_batch(path) for path in files) else None
    return benchmark(candidates, inputs, batch=batch, threads=threads, seconds=0.3, warmup=2, providers=[provider])


def speed_notes(latency: Benchmark) -> list[str]:
    """How much faster or slower the converted file is than the float one, in words."""
    if len(latency.timings) < 3:
        return []
    plain, final = latency.timings[1], latency.timings[2]
    if final.median_low_ms <= plain.median_high_ms and plain.median_low_ms <= final.median_high_ms:
        return [f"{final.name} and {plain.name}: no difference in latency that this measurement could tell"]
    ratio = plain.median_ms / final.median_ms
    word = "faster" if ratio >= 1 else "slower"
    return [f"{final.name} is {max(ratio, 1 / ratio):.2f} x {word} than {plain.name}"]


def word_of(scheme: str) -> str:
    """A scheme in the words of a table."""
    return {"dynamic": "int8", "static": "static int8", "mixed": "mixed int8", "weight_only": "int8 weights"}.get(
        scheme, scheme
    )


def _version() -> str:
    from torchtrim import __version__

    return __version__
