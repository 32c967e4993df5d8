"""How long one forward takes, of several candidates in alternating rounds."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import nn

from torchtrim.bench.machine import Machine, machine
from torchtrim.bench.session import OnnxSession
from torchtrim.bench.table import Table
from torchtrim.errors import InputError, ModelError, TorchTrimError
from torchtrim.graph.copying import is_meta, kept_modes, kept_random_state, structural_copy, unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import ExampleInputs, Inputs

Candidate: TypeAlias = "nn.Module | str | os.PathLike[str] | Callable[..., Any]"


@dataclass(frozen=True)
class Timing:
    """How long one candidate takes.

    Attributes:
        name: The candidate's name.
        kind: `pytorch`, `compiled`, `onnxruntime` or `callable`.
        median_ms: Median latency of one call, in milliseconds.
        p95_ms: The latency that 95% of the calls stay under.
        throughput: Rows a second, at the median.
        ratio: Median latency over the first candidate's: below 1 is faster.
        ratio_low: Lower end of the ratio's confidence interval.
        ratio_high: Upper end of it.
        calls: How many calls were measured.
    """

    name: str
    kind: str
    median_ms: float
    p95_ms: float
    throughput: float
    ratio: float
    ratio_low: float
    ratio_high: float
    calls: int

    @property
    def speedup(self) -> float:
        """How many times faster than the first candidate."""
        return 1 / self.ratio


@dataclass(frozen=True)
class Benchmark:
    """Latencies of candidates that were measured in one run.

    Attributes:
        timings: One for each candidate, in the order given.
        inputs: Shapes and types of the inputs.
        batch: The batch size.
        threads: Threads used by PyTorch and by ONNX Runtime.
        rounds: How many times it went round the candidates.
        confidence: The level of the ratios' intervals.
        machine: What it was measured on.
    """

    timings: tuple[Timing, ...]
    inputs: str
    batch: int
    threads: int
    rounds: int
    confidence: float
    machine: Machine

    def __getitem__(self, name: str) -> Timing:
        for timing in self.timings:
            if timing.name == name:
                return timing
        raise KeyError(name)

    @property
    def median_ms(self) -> float:
        """The first candidate's median latency in milliseconds."""
        return self.timings[0].median_ms

    @property
    def noisy(self) -> bool:
        """Whether a 95th percentile is over one and a half times its median: other work was running, measure again."""
        return any(timing.p95_ms > 1.5 * timing.median_ms for timing in self.timings)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            **asdict(self),
            "noisy": self.noisy,
            "timings": [asdict(t) for t in self.timings],
            "machine": self.machine.to_dict(),
        }

    def table(self) -> Table:
        """The latencies as a table."""
        several = len(self.timings) > 1
        columns: tuple[str, ...] = ("candidate", "median ms", "p95 ms", "rows/s")
        if several:
            columns += ("ratio", f"{self.confidence:.0%} interval")
        rows = []
        for t in self.timings:
            row = (t.name, f"{t.median_ms:.2f}", f"{t.p95_ms:.2f}", f"{t.throughput:.1f}")
            rows.append((*row, f"{t.ratio:.2f}", f"{t.ratio_low:.2f} - {t.ratio_high:.2f}") if several else row)
        notes = [
            f"inputs {self.inputs}; {self.threads} thread{'s' * (self.threads != 1)}; {self.rounds} alternating rounds",
            *str(self.machine).splitlines(),
        ]
        if self.noisy:
            notes.insert(
                0, "noisy: a 95th percentile is far above its median, so other work was running; measure again"
            )
        if several:
            notes.insert(0, f"ratio: latency over that of {self.timings[0].name!r}; below 1 is faster")
        return Table("latency", columns, tuple(rows), notes)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def benchmark(
    model_or_path: Candidate | Mapping[str, Candidate],
    example_inputs: ExampleInputs | None = None,
    *,
    batch: int | None = None,
    threads: int | None = None,
    seconds: float = 1.0,
    rounds: int | None = None,
    warmup: int = 3,
    compile: bool = False,
    providers: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> Benchmark:
    """Measure the latency of a model, an ONNX file or a callable, or of several side by side.

    Several candidates take turns: in every round each is called, in an order that changes, so that a noisy
    machine is noisy for all. The first call after each turn is left out (its caches belong to the one before).
    Models run in eval mode under `torch.inference_mode`, without forward hooks that are plain functions (what these
    write to is the user's), and are left as they were.

    Args:
        model_or_path: An `nn.Module`, the path of an ONNX file, a callable, or a dict `{name: one of these}`; ratios
            are to the dict's first.
        example_inputs: A tensor, or a tuple or dict of them. An ONNX file alone needs none.
        batch: Measure at this batch size (that of the example by default).
        threads: Threads for PyTorch and for ONNX Runtime; PyTorch's present number by default, and restored after.
        seconds: How long to measure each candidate, about.
        rounds: How many rounds instead (each calls every candidate at least once).
        warmup: Calls of each candidate before measuring.
        compile: Measure `torch.compile` of every model too.
        providers: ONNX Runtime's execution providers for the files.
        confidence: Level of the ratio's bootstrap interval, between 0 and 1.

    Raises:
        InputError: No inputs where some are needed, inputs that a candidate does not take (the module that refuses is
            named), or a number that makes no sense.
        ModelError: A model on the meta device, or one that `torch.compile` cannot compile.
        ExportError: An ONNX file that does not exist or does not run.

    Example:
        >>> result = benchmark(nn.Linear(64, 8), torch.zeros(1, 64), rounds=3)
        >>> result.timings[0].calls >= 3
        True
    """
    named = dict(model_or_path) if isinstance(model_or_path, Mapping) else {_name_of(model_or_path): model_or_path}
    _check_candidates(named)
    _check_numbers(batch=batch, threads=threads, rounds=rounds, warmup=warmup)
    _check_shares(seconds=(seconds, math.inf), confidence=(confidence, 1.0))
    with ExitStack() as stack:
        stack.enter_context(kept_random_state())
        used = stack.enter_context(_threads(threads))
        inputs = _inputs_for(named, example_inputs, providers, used)
        inputs = inputs.with_batch(batch) if batch is not None else inputs
        runners: dict[str, _Runner] = {}
        for name, candidate in named.items():
            runners[name] = _open(name, candidate, inputs, used, providers, stack)
            if compile and isinstance(candidate, nn.Module) and not _is_compiled(candidate):
                compiled = torch.compile(_working_copy(name, candidate, inputs))
                runners[f"{name} (torch.compile)"] = _open(name, compiled, inputs, used, providers, stack)
        samples = _measure(runners, seconds=seconds, rounds=rounds, warmup=warmup)
    return Benchmark(
        timings=_summarise(samples, runners, inputs.batch, confidence),
        inputs=inputs.describe(),
        batch=inputs.batch,
        threads=used,
        rounds=len(next(iter(samples.values()))),
        confidence=confidence,
        machine=machine(),
    )


@dataclass(frozen=True)
class _Runner:
    """A candidate that is ready: calling `run` is one forward, finished when it returns."""

    kind: str
    run: Callable[[], object]


def _name_of(candidate: Candidate) -> str:
    if isinstance(candidate, nn.Module):
        return type(unwrap(candidate)).__name__
    if isinstance(candidate, (str, os.PathLike)):
        return Path(candidate).name
    return str(getattr(candidate, "__name__", type(candidate).__name__))


def _check_candidates(named: Mapping[str, Candidate]) -> None:
    if not named:
        raise InputError("there is nothing to measure", found="no candidates")
    for name, candidate in named.items():
        if not (isinstance(candidate, (nn.Module, str, os.PathLike)) or callable(candidate)):
            raise InputError(
                "a candidate is a model, the path of an ONNX file or a callable",
                path=name,
                found=type(candidate).__name__,
            )


def _check_numbers(**numbers: object) -> None:
    for name, number in numbers.items():
        least = 0 if name == "warmup" else 1
        if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < least):
            raise InputError(f"{name} must be positive and a whole number", found=number)


def _check_shares(**numbers: tuple[object, float]) -> None:
    for name, (number, limit) in numbers.items():
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < limit:
            raise InputError(f"{name} is a number between 0 and {limit:g}", found=number)


@contextmanager
def _threads(threads: int | None) -> Iterator[int]:
    """Give PyTorch that many threads for a while."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield before
        return
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _inputs_for(
    named: Mapping[str, Candidate], example_inputs: ExampleInputs | None, providers: Sequence[str] | None, threads: int
) -> Inputs:
    if example_inputs is not None:
        return Inputs.of(example_inputs)
    for candidate in named.values():
        if isinstance(candidate, (str, os.PathLike)):
            made = OnnxSession(candidate, providers=providers, threads=threads).random_inputs()
            return made if len(named) == 1 else Inputs(tuple(made.tensors))
    raise InputError("a model needs example inputs to be measured", hint="pass example_inputs as the second argument")


def _open(
    name: str,
    candidate: Candidate,
    inputs: Inputs,
    threads: int,
    providers: Sequence[str] | None,
    stack: ExitStack,
) -> _Runner:
    if isinstance(candidate, (str, os.PathLike)):
        session = OnnxSession(candidate, providers=providers, threads=threads)
        feed = session.feed(inputs, cast=True)
        return _Runner("onnxruntime", lambda: session.run(feed))
    if not isinstance(candidate, nn.Module):
        function = candidate
        return _Runner("callable", lambda: inputs.call(function))
    kind = "compiled" if _is_compiled(candidate) else "pytorch"
    if kind == "pytorch" and not isinstance(candidate, torch.jit.ScriptModule):
        candidate = _working_copy(name, candidate, inputs)
    stack.enter_context(kept_modes(candidate))
    candidate.eval()
    device = next((tensor.device for tensor in candidate.parameters()), torch.device("cpu"))
    moved = inputs.map(lambda tensor: tensor.to(device))

    def run() -> object:
        with torch.inference_mode():
            output = moved.call(candidate)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return output

    try:
        run()
    except (TorchTrimError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's forward, and the compiler, raise what they like
        if kind == "compiled":
            raise ModelError(f"torch.compile failed: {error}", path=name, hint="leave compile out") from error
        raise InputError(f"the model does not take these inputs: {error}", path=name, found=moved.describe()) from error
    return _Runner(kind, run)


def _working_copy(name: str, model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy that is called as often as it takes, without the user's own hooks unless the model needs them to run."""
    inner = unwrap(model)
    if is_meta(inner):
        raise ModelError(
            "the model has no weights to run with", path=name, found="the meta device", hint="load weights"
        )
    return structural_copy(inner, own_buffers=True, user_hooks=run_fake(inner, inputs).user_hooks)


def _is_compiled(model: nn.Module) -> bool:
    return type(model).__name__ == "OptimizedModule"


_TURN = 0.02  # seconds a candidate keeps its turn: long enough to measure fast ones several times


def _measure(
    runners: Mapping[str, _Runner], *, seconds: float, rounds: int | None, warmup: int
) -> dict[str, list[list[float]]]:
    """Milliseconds of each call, by candidate and round."""
    cost: dict[str, float] = {}
    for name, runner in runners.items():
        cost[name] = min(_time(runner) for _ in range(max(1, warmup)))
    turns = {name: max(1, min(50, int(_TURN / max(cost[name], 1e-6)))) for name in runners}
    if rounds is None:
        slowest = max((turns[name] + 1) * cost[name] for name in runners)
        rounds = max(5, min(500, int(seconds / max(slowest, 1e-6))))
    samples: dict[str, list[list[float]]] = {name: [] for name in runners}
    names = list(runners)
    for number in _with_progress(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            if len(names) > 1:
                runners[name].run()
            samples[name].append([_time(runners[name]) * 1e3 for _ in range(turns[name])])
    return samples


def _time(runner: _Runner) -> float:
    start = time.perf_counter()
    runner.run()
    return time.perf_counter() - start


def _with_progress(rounds: int) -> Iterator[int]:
    """Count the rounds; with a bar where a person is watching."""
    if not sys.stderr.isatty():
        yield from range(rounds)
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(range(rounds), description="timing", console=Console(stderr=True), transient=True)


def _summarise(
    samples: Mapping[str, list[list[float]]], runners: Mapping[str, _Runner], batch: int, confidence: float
) -> tuple[Timing, ...]:
    """Medians, and ratios whose intervals come from drawing whole rounds anew (rounds share their noise)."""
    first = np.array([np.median(turn) for turn in next(iter(samples.values()))])
    draws = np.random.default_rng(0).integers(0, len(first), size=(1000, len(first)))
    tail = (1 - confidence) / 2
    base = float(np.median(np.concatenate(next(iter(samples.values())))))
    timings = []
    for name, turns in samples.items():
        every = np.concatenate(turns)
        median = float(np.median(every))
        own = np.array([np.median(turn) for turn in turns])
        ratios = np.median(own[draws], axis=1) / np.median(first[draws], axis=1)
        low, high = np.quantile(ratios, [tail, 1 - tail])
        timings.append(
            Timing(
                name=name,
                kind=runners[name].kind,
                median_ms=median,
                p95_ms=float(np.quantile(every, 0.95)),
                throughput=batch / median * 1e3,
                ratio=median / base,
                ratio_low=float(low),
                ratio_high=float(high),
                calls=len(every),
            )
        )
    return tuple(timings)
