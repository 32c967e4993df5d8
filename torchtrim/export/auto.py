"""`quantize="auto"`: what makes sense for model and target is tried and measured; the fastest that is right stays."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx

from torchtrim.bench.int8_format import exact_formats
from torchtrim.bench.latency import benchmark
from torchtrim.bench.openvino_session import open_session
from torchtrim.bench.timing import Timing
from torchtrim.errors import ExportError, InputError
from torchtrim.export.calibration_data import Feed
from torchtrim.export.graph import size_mb
from torchtrim.export.judge import Agreement, Judge
from torchtrim.export.kernels import refuse_unsupported
from torchtrim.export.mixed import inputs_of, mix
from torchtrim.export.selection import Selection, Tried
from torchtrim.export.workbench import Built, Workbench

_CLEARLY = 1.02  # a candidate whose whole interval is above this has lost before it is compared
_LONGER = (2, 6, 18)  # times the seconds of the first look, while it is not clear which is faster
_LOOKS_FASTER = 0.95
_HOPELESS = 0.9  # of the cosine: no other choice of ranges mends this


@dataclass
class _Candidate:
    """One candidate while it is judged."""

    name: str
    scheme: str
    built: Built | None = None
    timing: Timing | None = None
    agreement: Agreement | None = None
    seconds: float = 0.0
    why: str = ""
    notes: list[str] = field(default_factory=list)
    lost: bool = True  # until it is found near enough, and faster

    @property
    def ratio(self) -> float:
        return self.timing.ratio if self.timing is not None else 1.0

    def tried(self) -> Tried:
        timing = self.timing
        return Tried(
            name=self.name,
            scheme=self.scheme,
            size_mb=None if self.built is None else size_mb(self.built.path),
            ratio=None if timing is None else timing.ratio,
            ratio_low=None if timing is None else timing.ratio_low,
            ratio_high=None if timing is None else timing.ratio_high,
            agreement=self.agreement,
            seconds=self.seconds,
            why=self.why,
        )


@dataclass(frozen=True)
class Chosen:
    """What `choose` keeps.

    Attributes:
        built: The file.
        selection: The whole list.
        others: The other files that are near enough and faster than the float file, the fastest first.
    """

    built: Built
    selection: Selection
    others: tuple[Built, ...]


def choose(
    bench: Workbench,
    judge: Judge,
    feed: Feed,
    *,
    provider: str,
    timed: bool = True,
    threads: int | None = None,
    seconds: float = 0.4,
    say: Callable[[str], object] = lambda step: None,
) -> Chosen:
    """Make the candidates, measure them side by side, and keep the fastest that is near enough to the float file.

    Each is timed in alternating rounds with the float file, and lost where it is slower. Those left are compared, the
    fastest first, static files with their biases corrected. A static file that is too far gets other ranges, other
    8-bit types or equalised weights. The float file stays where nothing is faster beyond the noise.

    Args:
        bench: The float file, and what is made from it.
        judge: Says how far a file is from it.
        feed: One row to time on.
        provider: What to time on.
        timed: Whether it can be timed here; else what is known to suit the target is kept, and nothing is measured.
        threads: Threads to time with.
        seconds: How long to time each file, about.
        say: Called with what is being done.

    Returns:
        The file kept, the whole list, and what to fall back on.
    """
    began = time.perf_counter()
    plain = _Candidate("float", "float32", Built("float", "float32", bench.plain, 0), agreement=judge.of(bench.plain))
    candidates = [plain]
    notes: list[str] = []
    for name, scheme, make in _makers(bench, judge, feed, threads, notes):
        say(f"trying {name}")
        candidate = _Candidate(name, scheme)
        start = time.perf_counter()
        try:
            candidate.built = make()
            _try(candidate.built, bench, feed, provider, threads)
        except (ExportError, InputError) as error:
            candidate.why = f"cannot be {'made' if candidate.built is None else 'run'}: {error.message}"
            candidate.built = None
        else:
            if candidate.built.nodes == 0 and scheme not in ("fp16", "bf16"):
                candidate.built, candidate.why = None, "has nothing to quantize"
        candidate.seconds = time.perf_counter() - start
        candidates.append(candidate)
    made = [candidate for candidate in candidates if candidate.built is not None]
    say("timing")
    if timed:
        _time(made, feed, provider, threads, seconds)
    for candidate in sorted(made[1:], key=lambda one: one.ratio):
        start = time.perf_counter()
        if candidate.timing is not None and candidate.timing.ratio_low > _CLEARLY:
            candidate.why = "slower than float"
            continue
        say(f"comparing {candidate.name}")
        _judge(candidate, bench, judge)
        candidate.seconds += time.perf_counter() - start
    kept = _keep(plain, [one for one in made[1:] if not one.why], feed, provider, timed, threads, seconds)
    if kept.built is None:
        raise ExportError("no candidate is left", path=bench.plain.name)
    selection = Selection(
        tried=tuple(candidate.tried() for candidate in candidates),
        rows=judge.rows,
        max_drop=judge.max_drop,
        seconds=time.perf_counter() - began,
        notes=(*notes, *judge.notes, *kept.notes),
    )
    faster = [one for one in made[1:] if one is not kept and not one.lost and one.built is not None]
    others = tuple(one.built for one in sorted(faster, key=lambda one: one.ratio) if one.built is not None)
    return Chosen(kept.built, selection, others if timed else ())


def _try(built: Built, bench: Workbench, feed: Feed, provider: str, threads: int | None) -> None:
    """Run a candidate once, so that one that does not run is out before it is timed.

    Raises:
        ExportError: It does not run, or the target has no kernel for one of its nodes.
    """
    if bench.target.name in ("cuda", "tensorrt"):
        refuse_unsupported(onnx.load(built.path, load_external_data=False), bench.target.name)
    if built.scheme != "bf16" or provider != "CPUExecutionProvider":
        open_session(built.path, providers=[provider], threads=threads).run(dict(feed))


_Maker = tuple[str, str, Callable[[], Built]]


def _makers(bench: Workbench, judge: Judge, feed: Feed, threads: int | None, notes: list[str]) -> Iterator[_Maker]:
    """What makes sense for a target, with what makes it."""
    target = bench.target
    if "fp16" in target.schemes:
        yield "fp16", "fp16", bench.half
    if "dynamic" in target.schemes:
        yield "dynamic", "dynamic", bench.dynamic
    if bench.data is not None:
        yield "static", "static", bench.static
    else:
        notes.append("without data nothing can be calibrated, so static and mixed int8 were not tried")
    if "mixed" in target.schemes and bench.data is not None:

        def mixed() -> Built:
            mixture = mix(bench, judge, feed, threads=threads)
            notes.extend(mixture.notes)
            return mixture.built

        yield "mixed", "mixed", mixed
    if "weight_only" in target.schemes:
        yield "weight_only", "weight_only", bench.weight_only


def _time(made: list[_Candidate], feed: Feed, provider: str, threads: int | None, seconds: float) -> None:
    files: dict[str, Path] = {one.name: one.built.path for one in made if one.built is not None}
    found = benchmark(files, inputs_of(feed), threads=threads, seconds=seconds, providers=[provider])
    for candidate in made:
        candidate.timing = found[candidate.name]


def _judge(candidate: _Candidate, bench: Workbench, judge: Judge) -> None:
    """Compare a candidate, and mend it where that can be done."""
    if candidate.built is None:
        return
    if candidate.scheme == "static":
        candidate.built = bench.corrected(candidate.built)
        candidate.notes = list(candidate.built.notes)
    candidate.agreement = judge.of(candidate.built.path)
    reason = judge.against(candidate.agreement)
    if reason is not None and candidate.scheme == "static" and candidate.agreement.cosine >= _HOPELESS:
        failed: list[str] = []
        for how, built in _mended(bench, failed):
            found = judge.of(built.path)
            right = judge.against(found) is None
            if right or (found.wrong is None and found.cosine > candidate.agreement.cosine):
                candidate.built, candidate.agreement = built, found
                candidate.notes = [f"static: {how}", *built.notes]
            if right:
                reason = None
                break
        candidate.notes += failed
    if reason is not None:
        candidate.why = reason


def _mended(bench: Workbench, notes: list[str]) -> Iterator[tuple[str, Built]]:
    """Static files that may be nearer: other ranges, other 8-bit types, equal ranges in channels."""
    for method in ("percentile", "mse", "entropy"):
        if method != bench.options.method:
            yield f"ranges by {method}", bench.corrected(bench.static(method=method, name=f"static, {method}"))
    for what, int8 in exact_formats(bench.int8):
        yield what, bench.corrected(bench.static(int8=int8, name=f"static, {what}"))
    for what, change in (("layer norms smoothed", bench.smoothed), ("convolutions equalised", bench.equalised)):
        try:
            path, count = change()
            if count:
                calibrated = bench.calibrated(path)
                made = bench.static(prepared=path, statistics=calibrated, name=f"static, {what}")
                yield what, bench.corrected(made, path)
        except (ExportError, InputError) as error:
            notes.append(f"static: {what}: {error.message}")


def _keep(
    plain: _Candidate,
    left: list[_Candidate],
    feed: Feed,
    provider: str,
    timed: bool,
    threads: int | None,
    seconds: float,
) -> _Candidate:
    """The fastest of those that are near enough; each other one is told why it lost."""
    if not timed:
        kept = left[0] if left else plain
        for other in (plain, *left):
            other.why = "kept; not timed" if other is kept else f"{kept.name} suits the target; not timed"
        return kept
    for longer in _LONGER if left else ():
        _time([plain, *left], feed, provider, threads, longer * seconds)
        if not any(_unclear(one) for one in left):
            break
    return settle(plain, left)


def _unclear(one: _Candidate) -> bool:
    """Whether a candidate looks faster, and might not be: other work on the machine makes intervals wide."""
    return one.timing is not None and one.timing.ratio < _LOOKS_FASTER and one.timing.ratio_high >= 1


def settle(plain: _Candidate, left: list[_Candidate]) -> _Candidate:
    """The fastest of those timed, or the float file where none is faster beyond the noise; each is told why."""
    for one in left:
        one.lost = one.timing is None or one.timing.ratio_high >= 1
    best = min(left, key=lambda one: one.ratio, default=None)
    kept = min((one for one in left if not one.lost), key=lambda one: one.ratio, default=plain)
    for other in (plain, *left):
        if other is kept:
            other.why = "kept"
        elif other is plain:
            other.why = f"{kept.name} is faster"
        elif other is best:
            other.why = "no faster than float beyond the noise"
        else:
            other.why = f"slower than {kept.name}" if other.ratio > kept.ratio else "no faster than float"
    return kept
