"""How long one forward takes, of several candidates in alternating rounds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from torchtrim.bench.candidates import (
    Candidate,
    OnnxFile,
    Runner,
    checked_candidates,
    compiled_copy,
    inputs_for,
    is_compiled,
    opened,
)
from torchtrim.bench.comparison import Benchmark
from torchtrim.bench.machine import machine
from torchtrim.bench.resources import measured_resources
from torchtrim.bench.rounds import alternating_rounds
from torchtrim.bench.timing import Timing, timings_of
from torchtrim.errors import InputError
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.inputs import ExampleInputs, Inputs

__all__ = ["Benchmark", "Candidate", "OnnxFile", "Timing", "benchmark"]


def benchmark(
    model_or_path: Candidate | Mapping[str, Candidate],
    example_inputs: ExampleInputs | None = None,
    *,
    batch: int | None = None,
    threads: int | None = None,
    batches: Sequence[int] | None = None,
    thread_counts: Sequence[int] | None = None,
    seconds: float = 1.0,
    rounds: int | None = None,
    openings: int = 3,
    warmup: int = 3,
    compile: bool = False,
    providers: Sequence[str] | None = None,
    memory: bool = False,
    confidence: float = 0.95,
) -> Benchmark:
    """Measure the latency of a model, an ONNX file or a callable, or of several side by side.

    Several candidates take turns: in every round each is called, in an order that changes, so that a noisy
    machine is noisy for all. The first call after each turn is left out (its caches belong to the one before). Files
    are opened several times: as long as it is open, one file can be a fifth slower than the very same one beside it.
    Models run in eval mode under `torch.inference_mode`, without forward hooks that are plain functions (what these
    write to is the user's), and are left as they were. On a GPU the inputs lie there already.

    Args:
        model_or_path: An `nn.Module` (also one that `torch.compile` gave), the path of an ONNX file, an
            `OnnxFile(path, provider)`, a callable, or a dict `{name: one of these}`; ratios are to the dict's first.
        example_inputs: A tensor, or a tuple or dict of them. An ONNX file alone needs none.
        batch: Measure at this batch size (that of the example by default).
        threads: Threads for PyTorch and for ONNX Runtime; PyTorch's present number by default, and restored after.
        batches: Measure at each of these batch sizes instead.
        thread_counts: Measure with each of these numbers of threads instead.
        seconds: How long to measure each candidate, about, at each batch size and number of threads.
        rounds: How many rounds instead (each calls every candidate at least once).
        openings: How many times files are opened, each for a share of the time. The intervals count the differences
            between them.
        warmup: Calls of each candidate before measuring.
        compile: Measure `torch.compile` of every model too.
        providers: What runs the files that are given by their path: ONNX Runtime's execution providers, or `OpenVINO`;
            the first counts.
        memory: Measure memory and load time too, each candidate in a process of its own (seconds each), at the first
            batch size and number of threads: `result.resources`.
        confidence: Level of the bootstrap intervals, between 0 and 1.

    Raises:
        InputError: No inputs where some are needed, inputs that a candidate does not take (the module that refuses is
            named), or a number that makes no sense.
        ModelError: A model on the meta device, or one that `torch.compile` cannot compile.
        ExportError: An ONNX file that does not exist or does not run, or a provider that is not here.

    Example:
        >>> result = benchmark(nn.Linear(64, 8), torch.zeros(1, 64), batches=(1, 4), rounds=3)
        >>> [timing.batch for timing in result.timings], result.at("Linear", batch=4).calls >= 3
        ([1, 4], True)
    """
    named = checked_candidates(model_or_path, providers)
    sizes = _checked_list("batch", batch, "batches", batches)
    counts = _checked_list("threads", threads, "thread_counts", thread_counts)
    _check_numbers(rounds=rounds, openings=openings, warmup=warmup)
    files = {name: candidate for name, candidate in named.items() if isinstance(candidate, OnnxFile)}
    parts = min(openings, rounds or openings) if files else 1
    _check_shares(seconds=(seconds, math.inf), confidence=(confidence, 1.0))
    before = torch.get_num_threads()
    first: Inputs | None = None
    timings: list[Timing] = []
    took: list[int] = []
    with kept_random_state():
        given = inputs_for(named, example_inputs)
        sizes = sizes or (given.batch,)
        counts = counts or (before,)
        for used in counts:
            for size in sizes:
                inputs = given.with_batch(size)
                first = first or inputs
                with ExitStack() as stack:
                    stack.enter_context(_threads(used))
                    runners: dict[str, Runner] = {}
                    for name, candidate in named.items():
                        runners[name] = opened(name, candidate, inputs, used, stack)
                        if compile and isinstance(candidate, nn.Module) and not is_compiled(candidate):
                            compiled = compiled_copy(name, candidate, inputs)
                            runners[_compiled(name)] = opened(name, compiled, inputs, used, stack)
                    kinds = {name: (runner.kind, runner.provider) for name, runner in runners.items()}
                    samples: dict[str, list[list[float]]] = {name: [] for name in runners}
                    opened_for: list[int] = []
                    for part in range(parts):
                        for name in files if part else ():
                            runners.pop(name)  # closed, before it is opened again
                            runners[name] = opened(name, files[name], inputs, used, stack)
                        calls = {name: runners[name].run for name in samples}
                        share = None if rounds is None else (rounds + parts - 1 - part) // parts
                        turns = alternating_rounds(
                            calls, seconds=seconds / parts, rounds=share, least=-(-5 // parts), warmup=warmup
                        )
                        calls.clear()
                        opened_for.append(len(next(iter(turns.values()))))
                        for name, each in turns.items():
                            samples[name] += each
                timings += timings_of(
                    samples, batch=size, threads=used, confidence=confidence, kinds=kinds, openings=opened_for
                )
                took.append(sum(opened_for))
        shown = first or given
        asked = {}
        for name, candidate in named.items() if memory else ():
            asked[name] = candidate
            if compile and isinstance(candidate, nn.Module) and not is_compiled(candidate):
                asked[_compiled(name)] = torch.compile(candidate)
        resources = measured_resources(asked, shown, counts[0])
    return Benchmark(
        timings=tuple(timings),
        inputs=shown.describe(),
        batches=sizes,
        thread_counts=counts,
        rounds=took[0],
        confidence=confidence,
        machine=machine(),
        resources=resources,
    )


def _compiled(name: str) -> str:
    return f"{name} (torch.compile)"


def _checked_list(one: str, number: object, many: str, numbers: object) -> tuple[int, ...] | None:
    """The one number, or the several; None where neither is given."""
    if numbers is None:
        _check_numbers(**{one: number})
        return (number,) if isinstance(number, int) else None
    if number is not None:
        raise InputError(f"{one} or {many}, not both", found=(number, numbers))
    if isinstance(numbers, (str, bytes)) or not isinstance(numbers, Sequence) or not numbers:
        raise InputError(f"{many} is a list of whole numbers", found=numbers, expected="(1, 8, 32)")
    for each in numbers:
        if each is None:
            raise InputError(f"{many} is a list of whole numbers", found=numbers)
        _check_numbers(**{many: each})
    if len(set(numbers)) < len(numbers):
        raise InputError(f"{many} has a number twice", found=tuple(numbers))
    return tuple(numbers)


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
def _threads(threads: int) -> Iterator[None]:
    """Give PyTorch that many threads for a while."""
    before = torch.get_num_threads()
    if threads == before:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
