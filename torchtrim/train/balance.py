"""Losses of different sizes brought to the same size, each by a running mean of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

_TINY = 1e-12


class Balance(nn.Module):
    """Divides each term by a running mean of its own size, so that weights are shares whatever the terms measure.

    The mean is exponential, corrected for its start, and moves in train mode with gradients only. It is in buffers, so
    that a resumed training goes on with it. Where `torch.distributed` runs with several processes, sizes are averaged
    over them at each training step: all have to take it.

    Args:
        names: The terms.
        momentum: How much of the mean is kept each step; 0.99 looks back some hundred steps.

    Example:
        >>> balance = Balance(["hard", "soft"])
        >>> factors = balance({"hard": torch.tensor(4.0), "soft": torch.tensor(0.5)})
        >>> float(factors["hard"]), float(factors["soft"])
        (0.25, 2.0)
    """

    means: torch.Tensor
    seen: torch.Tensor

    def __init__(self, names: Sequence[str], momentum: float = 0.99) -> None:
        super().__init__()
        self.names = tuple(names)
        self.momentum = momentum
        self.register_buffer("means", torch.zeros(len(self.names)))
        self.register_buffer("seen", torch.zeros(len(self.names)))

    def forward(self, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What to multiply each term with; terms may be left out."""
        index = [position for position, name in enumerate(self.names) if name in parts]
        names = [self.names[position] for position in index]
        if self.training and torch.is_grad_enabled():
            with torch.no_grad():
                sizes = torch.stack([parts[name].detach().to(self.means.dtype) for name in names])
                self._move(index, _over_processes(sizes.to(self.means.device)))
        # A term that was zero so far has no size to be measured by.
        factors = torch.where(self.means > _TINY, self.seen / self.means.clamp(min=_TINY), 1.0)
        return {self.names[position]: factors[position] for position in index}

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Balance:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.means.dtype in (torch.float16, torch.bfloat16):  # steps of a hundredth would be rounded away
            self.means, self.seen = self.means.float(), self.seen.float()
        return self

    def _move(self, index: list[int], sizes: torch.Tensor) -> None:
        # A loss that is not finite is the trainer's to see; it must not stay in the mean.
        kept = torch.where(torch.isfinite(sizes), self.momentum, 1.0)
        self.means[index] = self.means[index] * kept + torch.nan_to_num(sizes) * (1 - kept)
        self.seen[index] = self.seen[index] * kept + (1 - kept)


def _over_processes(sizes: torch.Tensor) -> torch.Tensor:
    import torch.distributed as distributed

    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.all_reduce(sizes)
        sizes = sizes / distributed.get_world_size()
    return sizes
