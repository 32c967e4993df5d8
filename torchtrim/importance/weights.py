"""Which weights go: how much each matters, in which units they go together, and the least important of them."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from torchtrim.errors import EditError, ModelError

Pool = Literal["avg", "max"]
_GONE = -1.0  # below every score: what went once goes first


def weight_scores(name: str, weight: torch.Tensor, importance: str, gone: torch.Tensor | None = None) -> torch.Tensor:
    """How much each weight matters, from 0 up, in the weight's shape; -1 for those that are gone already.

    Args:
        name: The weight's full name, which random scores depend on.
        weight: The weight.
        importance: `"magnitude"` (the absolute value; Han et al., *Learning both weights and connections*, 2015), or
            `"random"` and `"random:SEED"` (the same numbers on every machine; weights that are zero score 0).
        gone: True where a weight has been pruned.

    Raises:
        ModelError: The weight holds NaN or infinity.

    Example:
        >>> weight_scores("fc.weight", torch.tensor([-2.0, 1.0]), "magnitude", torch.tensor([False, True]))
        tensor([ 2., -1.])
    """
    weight = weight.detach()
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        raise ModelError(
            "weights that are not finite cannot be ranked",
            path=name,
            found=f"{int((~finite).sum()):,} of {weight.numel():,} are NaN or infinite",
            hint="the last state of the model that was good",
        )
    if importance == "magnitude":
        scores = weight.abs()
        scores = scores if scores.dtype == torch.float64 else scores.float()
    else:
        seed = int(importance.partition(":")[2] or 0)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))  # it takes 32 bits, no more
        scores = torch.rand(weight.shape, generator=generator).to(weight.device) * (weight != 0)
    return scores if gone is None else scores.masked_fill(gone, _GONE)


def check_importance(importance: object) -> str:
    """The importance that was given.

    Raises:
        EditError: It is none for weights.

    Example:
        >>> check_importance("random:7")
        'random:7'
    """
    name, _, seed = importance.partition(":") if isinstance(importance, str) else ("", "", "")
    right = importance == "magnitude" or (name == "random" and (importance == name or seed.isdecimal()))
    if not right or not isinstance(importance, str):
        raise EditError(
            "no such importance of weights", path="importance", found=repr(importance), expected="magnitude or random:7"
        )
    return importance


@dataclass(frozen=True, eq=False)
class Units:
    """What goes together in one tensor: single weights, blocks, or the losers of N:M groups.

    Attributes:
        scores: One for each unit, flat.
        sizes: How many weights each takes with it: one number where all take as many.
        done: Which units are gone already, flat.
        spread: Makes of a flat truth value for each unit one for each weight: those that go.
    """

    scores: torch.Tensor
    sizes: int | torch.Tensor
    done: torch.Tensor
    spread: Callable[[torch.Tensor], torch.Tensor]

    @property
    def count(self) -> int:
        """How many units there are."""
        return self.scores.numel()

    @property
    def capacity(self) -> int:
        """How many weights go where all units do."""
        return self.count * self.sizes if isinstance(self.sizes, int) else int(self.sizes.sum())


def single(scores: torch.Tensor) -> Units:
    """Every weight by itself."""
    flat = scores.flatten()
    return Units(flat, 1, flat == _GONE, lambda chosen: chosen.reshape(scores.shape))


def pattern_groups(scores: torch.Tensor, kept: int, of: int, axis: int) -> Units:
    """Groups of `of` neighbours along an axis, of which `kept` stay: N:M sparsity.

    A group's score is the sum of those of its losers, so that groups which lose least are the first to go over to the
    pattern (Mishra et al., *Accelerating sparse deep neural networks*, 2021, for 2:4).

    Example:
        >>> groups = pattern_groups(torch.tensor([[3.0, 1.0, 2.0, 4.0]]), 2, 4, axis=1)
        >>> groups.scores, groups.spread(torch.tensor([True]))
        (tensor([3.]), tensor([[False,  True,  True, False]]))
    """
    last = scores.movedim(axis, -1)
    groups = last.reshape(-1, of)
    losers = groups.argsort(dim=1, stable=True)[:, : of - kept]
    lost = groups.gather(1, losers)

    def spread(chosen: torch.Tensor) -> torch.Tensor:
        gone = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, losers, chosen[:, None].expand(losers.shape))
        return gone.reshape(last.shape).movedim(-1, axis).contiguous()

    return Units(lost.sum(1), of - kept, (lost == _GONE).all(1), spread)


def blocks(scores: torch.Tensor, shape: Sequence[int], pool: Pool) -> Units:
    """Blocks of a weight's first dimensions, with the whole of those that are not named: of two sizes the second
    is the input, and a kernel goes as a whole. At the edges blocks are smaller where the sizes do not divide.

    Args:
        scores: In the weight's shape.
        shape: The size of a block along each of the first dimensions.
        pool: Whether a block's score is the mean of its weights' or their largest (Gray et al., *GPU kernels for
            block-sparse weights*, 2017, for blocks).

    Example:
        >>> found = blocks(torch.tensor([[1.0, 3.0, 9.0]]), (1, 2), "avg")
        >>> found.scores, found.sizes
        (tensor([2., 9.]), tensor([2, 1]))
    """
    sides = [*shape[: scores.dim()], *scores.shape[len(shape) :]]
    sides = [min(side, size) for side, size in zip(sides, scores.shape, strict=True)]
    grid = [-(-size // side) for side, size in zip(sides, scores.shape, strict=True)]
    whole = [count * side for count, side in zip(grid, sides, strict=True)]
    padding = [
        pair for size, full in reversed(list(zip(scores.shape, whole, strict=True))) for pair in (0, full - size)
    ]
    tiled = [number for pair in zip(grid, sides, strict=True) for number in pair]
    within = tuple(range(1, len(tiled), 2))

    def pooled(values: torch.Tensor, largest: bool, blank: float) -> torch.Tensor:
        values = torch.nn.functional.pad(values, padding, value=blank).reshape(tiled)
        return (values.amax(within) if largest else values.sum(within)).flatten()

    sizes = pooled(torch.ones_like(scores, dtype=torch.int32), False, 0).long()
    found = pooled(scores, True, -math.inf) if pool == "max" else pooled(scores, False, 0.0) / sizes
    done = pooled((scores == _GONE).to(torch.int32), False, 0) == sizes

    def spread(chosen: torch.Tensor) -> torch.Tensor:
        gone = chosen.reshape(grid)
        for axis, side in enumerate(sides):
            gone = gone.repeat_interleave(side, axis)
        return gone[tuple(slice(size) for size in scores.shape)].contiguous()

    uniform = bool((sizes == sizes[0]).all()) if sizes.numel() else True
    one_size = int(sizes[0]) if uniform and sizes.numel() else 1
    return Units(found.masked_fill(done, _GONE), one_size if uniform else sizes, done, spread)


def lowest(scores: torch.Tensor, count: int) -> tuple[torch.Tensor, float | None]:
    """Which `count` of some scores are the lowest, to the exact number: of equal ones the first.

    Returns:
        A truth value for each, and the largest score that is among them (`None` where none is).

    Example:
        >>> lowest(torch.tensor([2.0, 1.0, 2.0, 3.0]), 2)
        (tensor([ True,  True, False, False]), 2.0)
    """
    if count <= 0:
        return torch.zeros_like(scores, dtype=torch.bool), None
    if count >= scores.numel():
        return torch.ones_like(scores, dtype=torch.bool), float(scores.max()) if scores.numel() else None
    if scores.device.type == "cpu":  # numpy's partition is several times faster than `kthvalue` there
        edge = torch.as_tensor(np.partition(scores.numpy(), count - 1)[count - 1])
    else:
        edge = scores.kthvalue(count).values
    chosen = scores < edge
    ties = (scores == edge).nonzero().flatten()
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen, float(edge)


def lowest_share(units: Units, share: float) -> tuple[torch.Tensor, float | None]:
    """The units of one tensor that go where a share of them does: the nearest whole number, those gone before first."""
    return lowest(units.scores, max(_nearest(share * units.count), int(units.done.sum())))


def lowest_together(units: Sequence[Units], share: float, cap: float) -> tuple[list[torch.Tensor], float | None]:
    """The units that go where tensors are ranked together, a share of all weights in them.

    Args:
        units: Those of each tensor.
        share: How much of all weights that could go does.
        cap: The largest share of one tensor's that may.

    Raises:
        EditError: The cap leaves too few.
    """
    pooled = []
    for each in units:
        scores = each.scores
        may = max(math.floor(cap * each.count + 1e-9), int(each.done.sum()))
        if may < each.count:
            scores = scores.masked_fill(~lowest(scores, may)[0], math.inf)
        pooled.append(scores)
    scores = torch.cat(pooled)
    wanted = _nearest(share * sum(each.capacity for each in units))
    sizes = {each.sizes if isinstance(each.sizes, int) else -1 for each in units}
    if len(sizes) == 1 and -1 not in sizes:
        count = _nearest(wanted / sizes.pop())
    else:
        order = scores.argsort(stable=True)
        every = torch.cat(
            [
                torch.full_like(each.scores, each.sizes, dtype=torch.int64)
                if isinstance(each.sizes, int)
                else each.sizes
                for each in units
            ]
        )
        summed = every[order].cumsum(0)
        count = int((summed <= wanted).sum())
        if count < len(summed) and wanted - (int(summed[count - 1]) if count else 0) > int(summed[count]) - wanted:
            count += 1
    free = int(torch.isfinite(scores).sum())
    if count > free:
        raise EditError(
            "more is asked for than may go of one layer",
            path="max_sparsity",
            found=f"{cap:g}, which lets {free:,} of {scores.numel():,} go",
            expected=f"{count:,}",
            hint="a larger max_sparsity",
        )
    chosen, edge = lowest(scores, max(count, sum(int(each.done.sum()) for each in units)))
    return list(chosen.split([each.count for each in units])), edge


def _nearest(number: float) -> int:
    return math.floor(number + 0.5 + 1e-9)
