"""From the milliseconds of single calls to a candidate's figures, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_DRAWS = 1000


@dataclass(frozen=True)
class Timing:
    """How long one candidate takes at one batch size and one number of threads.

    Attributes:
        name: The candidate's name.
        kind: `pytorch`, `compiled`, `onnxruntime`, `openvino` or `callable`.
        provider: ONNX Runtime's execution provider, `OpenVINO`, or PyTorch's device; empty for a callable.
        batch: The batch size.
        threads: Threads it may use.
        median_ms: Median latency of one call, in milliseconds.
        median_low_ms: Lower end of the median's confidence interval.
        median_high_ms: Upper end of it.
        p95_ms: The latency that 95% of the calls stay under.
        p99_ms: The latency that 99% of the calls stay under; with fewer than a hundred calls, nearly the slowest.
        throughput: Rows a second, at the median.
        ratio: Median latency over the first candidate's, at the same batch size and threads: below 1 is faster.
        ratio_low: Lower end of the ratio's confidence interval.
        ratio_high: Upper end of it.
        calls: How many calls were measured.
    """

    name: str
    kind: str
    provider: str
    batch: int
    threads: int
    median_ms: float
    median_low_ms: float
    median_high_ms: float
    p95_ms: float
    p99_ms: float
    throughput: float
    ratio: float
    ratio_low: float
    ratio_high: float
    calls: int

    @property
    def speedup(self) -> float:
        """How many times faster than the first candidate."""
        return 1 / self.ratio

    @property
    def verdict(self) -> str:
        """`faster` or `slower` than the first candidate, or `no difference` where the ratio's interval holds 1."""
        if self.ratio_high < 1:
            return "faster"
        return "slower" if self.ratio_low > 1 else "no difference"

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "speedup": self.speedup, "verdict": self.verdict}


def timings_of(
    samples: Mapping[str, Sequence[Sequence[float]]],
    *,
    batch: int = 1,
    threads: int = 1,
    confidence: float = 0.95,
    kinds: Mapping[str, tuple[str, str]] | None = None,
    openings: Sequence[int] | None = None,
) -> tuple[Timing, ...]:
    """The figures of candidates that took turns.

    The intervals are percentile bootstrap intervals (Efron, 1979) over whole rounds: calls of one round share its
    noise, so single calls are no independent samples. A ratio is drawn from the same rounds of both candidates. Rounds
    of one opening have something in common, too: openings are drawn first, then rounds in each (a bootstrap in two
    stages, Davison and Hinkley, 1997, section 3.8).

    Args:
        samples: Milliseconds of each call, by candidate and round; the same number of rounds for each.
        batch: Rows of one call.
        threads: Threads that the candidates had.
        confidence: The level of the intervals, between 0 and 1.
        kinds: The kind and the provider of each candidate.
        openings: How many rounds there were each time that files were opened; all at once where it is None.

    Example:
        >>> first, second = timings_of({"a": [[2.0, 2.2], [2.1]], "b": [[1.0, 1.1], [1.0]]}, batch=4)
        >>> first.median_ms, second.verdict, second.throughput
        (2.1, 'faster', 4000.0)
    """
    middles = {name: np.array([np.median(turn) for turn in turns]) for name, turns in samples.items()}
    first, calls = next(iter(middles.values())), {name: np.concatenate(turns) for name, turns in samples.items()}
    draws = _drawn_rounds(np.array(openings or [len(first)]))
    base, base_drawn = float(np.median(next(iter(calls.values())))), np.median(first[draws], axis=1)
    timings = []
    for name, every in calls.items():
        median, drawn = float(np.median(every)), np.median(middles[name][draws], axis=1)
        low, high = _interval(drawn, confidence)
        ratio_low, ratio_high = _interval(drawn / base_drawn, confidence)
        kind, provider = (kinds or {}).get(name, ("callable", ""))
        timings.append(
            Timing(
                name=name,
                kind=kind,
                provider=provider,
                batch=batch,
                threads=threads,
                median_ms=median,
                median_low_ms=min(low, median),
                median_high_ms=max(high, median),
                p95_ms=float(np.quantile(every, 0.95)),
                p99_ms=float(np.quantile(every, 0.99)),
                throughput=batch / median * 1e3,
                ratio=median / base,
                ratio_low=min(ratio_low, median / base),
                ratio_high=max(ratio_high, median / base),
                calls=len(every),
            )
        )
    return tuple(timings)


def _drawn_rounds(openings: NDArray[Any]) -> NDArray[Any]:
    """Rounds drawn anew, a row a draw: as many openings as there were, about as many rounds in each."""
    random, starts = np.random.default_rng(0), np.cumsum(openings) - openings
    each = -(-int(openings.sum()) // len(openings))
    chosen = random.integers(0, len(openings), size=(_DRAWS, len(openings), 1))
    within = random.random((_DRAWS, len(openings), each)) * openings[chosen]
    drawn: NDArray[Any] = (starts[chosen] + within.astype(int)).reshape(_DRAWS, -1)
    return drawn


def _interval(drawn: NDArray[Any], confidence: float) -> tuple[float, float]:
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn, [tail, 1 - tail])
    return float(low), float(high)
