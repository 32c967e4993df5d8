"""Metrics that compare what goes into each block with what comes out: one forward pass for all blocks, no labels."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from torchtrim.importance.block_metrics import Asked, Found, calm, refuse_infinite
from torchtrim.importance.spans import looked_at


def influence(asked: Asked) -> Found:
    """One minus the cosine of input and output at each place, on average (ShortGPT, Men et al. 2024)."""
    return _averaged(asked, _distance, "1 - cosine of input and output, at each place")


def angular(asked: Asked) -> Found:
    """The angle between input and output at each place, as a share of half a turn, on average (Gromov et al. 2024)."""
    return _averaged(asked, _angle, "angle between input and output / pi, at each place")


def relative_norm(asked: Asked) -> Found:
    """The length of what the block adds, relative to that of its input, at each place, on average."""
    return _averaged(asked, _added, "length of what is added / length of the input, at each place")


def _averaged(asked: Asked, compared: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], unit: str) -> Found:
    totals = [0.0] * len(asked.spans)
    counts = [0] * len(asked.spans)

    def look(number: int, value: torch.Tensor, result: torch.Tensor) -> None:
        span = asked.spans[number]
        refuse_infinite(span, value, result)
        before, after = (_places(each, span.channels) for each in (value, result))
        found = compared(before, after)
        totals[number] += float(found.sum(dtype=torch.float64))
        counts[number] += found.numel()

    twin = asked.twin()
    with calm(), looked_at(twin, asked.spans, look):
        for number, _, given in asked.batches():
            asked.answered(twin, given, number)
    return Found([total / max(count, 1) for total, count in zip(totals, counts, strict=True)], unit)


def _places(values: torch.Tensor, channels: int) -> torch.Tensor:
    """A row for each place of each input: its channels."""
    values = values if values.is_complex() else values.float()
    return values.movedim(channels, -1).flatten(0, -2) if values.dim() > 1 else values.unsqueeze(0)


def _chord(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """How far apart the two are on the unit ball: exact where they are nearly the same, which a cosine is not."""
    lengths = before.norm(dim=-1), after.norm(dim=-1)
    ways = [each / length.clamp_min(1e-30)[:, None] for each, length in zip((before, after), lengths, strict=True)]
    chord = (ways[0] - ways[1]).norm(dim=-1)
    # Nothing has no direction: it is the same as nothing, and at a right angle to all else.
    one_is_nothing = (lengths[0] == 0) != (lengths[1] == 0)
    return torch.where(one_is_nothing, math.sqrt(2.0), chord).clamp_max(2.0)


def _distance(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return _chord(before, after).square() / 2


def _angle(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return 2 * torch.asin(_chord(before, after) / 2) / math.pi


def _added(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    length = before.norm(dim=-1)
    added = (after - before).norm(dim=-1)
    return torch.where(length > 0, added / length.clamp_min(1e-30), (added > 0).to(added.dtype))
