"""The largest share of a model's cost whose latency is within a limit, in few tries: each of them is a measurement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

Model = TypeVar("Model")

_NEAR = 0.04  # a latency that is under the limit by less than this share of it is near enough
_APART = 0.01  # shares that lie nearer to each other are not told apart
_AIM = 0.985  # where between two known latencies to aim: measurements have some noise


@dataclass(frozen=True)
class Try(Generic[Model]):
    """A model that was made and measured.

    Attributes:
        share: Its share of the original's cost.
        ms: Its latency, in milliseconds.
        model: The model.
        smaller: Whether a smaller share would give a smaller model.
    """

    share: float
    ms: float
    model: Model
    smaller: bool = True


def largest_share(
    limit_ms: float,
    whole: Try[Model],
    measure: Callable[[float], Try[Model]],
    *,
    tries: int = 6,
) -> tuple[Try[Model], list[Try[Model]]]:
    """Find the largest share whose latency is within the limit, by secants.

    Latency falls with the cost, more or less: what is measured is the truth, and lines between the measured points say
    where to look next.

    Args:
        limit_ms: The limit.
        whole: The original: share 1, and too slow.
        measure: Makes a model of a share at most, as near to it as its steps are, and measures it.
        tries: How many to make at most.

    Returns:
        The slowest that is within the limit; where none is, the fastest. And all that were tried.

    Example:
        >>> def measure(share):
        ...     return Try(share, 2 + 8 * share, None)
        >>> best, tried = largest_share(6.0, measure(1.0), measure)
        >>> round(best.ms, 2), len(tried)
        (5.91, 2)
    """
    slow, fast = whole, None
    tried: list[Try[Model]] = []
    while len(tried) < tries:
        share = _next(limit_ms * _AIM, slow, fast, whole)
        found = measure(share)
        known = any(each.share == found.share for each in tried)
        tried.append(found)
        if found.ms > limit_ms:
            slow = found
            if not found.smaller:
                break
        elif fast is None or found.share > fast.share:
            fast = found
        if known or (fast is not None and (fast.ms >= limit_ms * (1 - _NEAR) or slow.share - fast.share <= _APART)):
            break
    kept = [each for each in tried if each.ms <= limit_ms]
    best = max(kept, key=lambda each: each.share) if kept else min(tried, key=lambda each: each.ms)
    return best, tried


def _next(aim: float, slow: Try[Model], fast: Try[Model] | None, whole: Try[Model]) -> float:
    if fast is None:
        # Along the line from the original through the last one (through nothing, at first), but not too far at once.
        slope = (whole.ms - slow.ms) / (whole.share - slow.share) if slow is not whole else whole.ms / whole.share
        share = slow.share - (slow.ms - aim) / slope if slope > 0 else 0.0
        return max(share, slow.share * 0.3)
    share = fast.share + (slow.share - fast.share) * (aim - fast.ms) / (slow.ms - fast.ms)
    edge = (slow.share - fast.share) * 0.1
    return min(max(share, fast.share + edge), slow.share - edge)
