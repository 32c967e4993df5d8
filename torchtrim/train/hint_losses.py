"""Losses between values inside the student and inside the teacher."""

from __future__ import annotations

import torch
from torch.nn import functional as F

_TINY = 1e-12


def features_loss(student: torch.Tensor, teacher: torch.Tensor, *, normalize: bool = False) -> torch.Tensor:
    """The mean squared difference of two values of the same shape (FitNets: Romero et al. 2015).

    Args:
        student: The student's value, projected to the teacher's width.
        teacher: The teacher's, `(N, ...)`.
        normalize: Shift and scale each sample's values to mean 0 and variance 1 first, on both sides: then only their
            pattern counts, and the loss lies between 0 and 4.

    Example:
        >>> a = torch.randn(2, 8, 4, 4)
        >>> float(features_loss(a, 3 * a + 1, normalize=True)) < 1e-6
        True
    """
    if normalize:
        student, teacher = (F.layer_norm(value, value.shape[1:]) for value in (student, teacher))
    return F.mse_loss(student, teacher)


def attention_loss(student: torch.Tensor, teacher: torch.Tensor, *, axis: int = 1) -> torch.Tensor:
    """How far apart the two look: the squared distance of their attention maps, averaged over the samples.

    A map is the mean of squares over the channels at each place, as a vector of length 1 (Zagoruyko and Komodakis 2017,
    *Paying More Attention to Attention*). Widths may differ. Between 0 and 2. (The authors' code also divides by the
    number of places, and makes up for it with a weight of 1000.)

    Args:
        student: `(N, C, ...)`, or tokens `(N, L, C)` with `axis=-1`.
        teacher: The same, with as many places.
        axis: Which dimension is the channels'.

    Example:
        >>> float(attention_loss(torch.ones(2, 8, 4, 4), torch.ones(2, 16, 4, 4)))
        0.0
    """
    maps = (F.normalize(value.square().mean(axis).flatten(1), dim=1) for value in (student, teacher))
    ours, theirs = maps
    return (ours - theirs).square().sum(1).mean()


def distance_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Relational: the distances between the samples of a batch, each side's in units of their mean.

    RKD-D of Park et al. 2019, *Relational Knowledge Distillation*, with Huber's loss. Only how samples lie to each
    other counts, so neither widths nor sizes have to agree. A batch of one has no relations: its loss is 0. Under DDP
    each process relates the samples of its own batch. Memory: N squared.

    Args:
        student: `(N, ...)`.
        teacher: `(N, ...)`.

    Example:
        >>> a = torch.randn(6, 4)
        >>> float(distance_loss(2 * a, a)) < 1e-10
        True
    """
    ours, theirs = (_distances(value.flatten(1)) for value in (student, teacher))
    return F.smooth_l1_loss(ours, theirs)


def angle_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Relational: the cosines of the angles between any three samples of a batch (RKD-A of Park et al. 2019).

    Args:
        student: `(N, ...)`. Memory: N to the third power numbers (N = 256: 64 MB), and N * N * the width.
        teacher: `(N, ...)`.

    Example:
        >>> a = torch.randn(6, 4)
        >>> float(angle_loss(2 * a, a)) < 1e-10
        True
    """
    ours, theirs = (_angles(value.flatten(1)) for value in (student, teacher))
    return F.smooth_l1_loss(ours, theirs)


def relational_loss(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Distances and angles together, 1 to 2, as Park et al. weigh them.

    Example:
        >>> a = torch.randn(6, 4)
        >>> float(relational_loss(a, a))
        0.0
    """
    return distance_loss(student, teacher) + 2 * angle_loss(student, teacher)


def _distances(rows: torch.Tensor) -> torch.Tensor:
    count = len(rows)
    rows = rows - rows.mean(0)  # distances stay; squares of what all have in common would swamp them
    squares = rows.square().sum(1)
    gram = squares[:, None] + squares[None] - 2 * rows @ rows.T
    own = torch.eye(count, dtype=torch.bool, device=rows.device)
    # The root has no slope at zero, where every sample is from itself (and from its copies).
    apart = gram.masked_fill(own, 0.0).clamp(min=0)
    lengths = torch.where(apart > _TINY, apart.clamp(min=_TINY).sqrt(), 0.0)
    return lengths / (lengths.sum() / max(count * (count - 1), 1)).clamp(min=_TINY)


def _angles(rows: torch.Tensor) -> torch.Tensor:
    between = F.normalize(rows[None] - rows[:, None], dim=2)
    return between @ between.transpose(1, 2)
