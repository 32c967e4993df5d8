"""Calls in alternating rounds, so that a noisy machine is noisy for every candidate."""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping

_TURN = 0.02  # seconds a candidate keeps its turn: long enough to measure fast ones several times


def alternating_rounds(
    runs: Mapping[str, Callable[[], object]],
    *,
    seconds: float = 1.0,
    rounds: int | None = None,
    least: int = 5,
    warmup: int = 3,
) -> dict[str, list[list[float]]]:
    """Call candidates in turns, each round in a random order or the last one backwards.

    The first call after each turn is left out: its caches belong to the candidate before. That one may leave threads
    that still spin, too; in a random order each candidate comes after each other one.

    Args:
        runs: What to call, by name; a call is finished when it returns.
        seconds: How long to measure each candidate, about.
        rounds: How many rounds instead.
        least: The fewest rounds, however long they take.
        warmup: Calls of each candidate before measuring.

    Returns:
        Milliseconds of each call, by candidate and round.

    Example:
        >>> samples = alternating_rounds({"a": list, "b": dict}, rounds=2)
        >>> [len(turns) for turns in samples.values()]
        [2, 2]
    """
    cost = {name: min(_seconds(run) for _ in range(max(1, warmup))) for name, run in runs.items()}
    turns = {name: max(1, min(50, int(_TURN / max(cost[name], 1e-6)))) for name in runs}
    if rounds is None:
        slowest = max((turns[name] + 1) * cost[name] for name in runs)
        rounds = max(least, min(500, int(seconds / max(slowest, 1e-6))))
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}
    names, order = list(runs), random.Random(0)  # not the user's random state
    for number in _with_progress(rounds):
        if number % 2:
            names.reverse()  # so that nobody comes first by luck where there are few rounds
        else:
            order.shuffle(names)
        for name in names:
            if len(names) > 1:
                runs[name]()
            samples[name].append([_seconds(runs[name]) * 1e3 for _ in range(turns[name])])
    return samples


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _with_progress(rounds: int) -> Iterator[int]:
    """Count the rounds; with a bar where a person is watching."""
    if not sys.stderr.isatty():
        yield from range(rounds)
        return
    from rich.console import Console
    from rich.progress import track

    yield from track(range(rounds), description="timing", console=Console(stderr=True), transient=True)
