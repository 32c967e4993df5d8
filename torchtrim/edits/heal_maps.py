"""Maps that stand for what was removed: fitted in closed form, from sums that do not grow with the data."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

_CONV: dict[int, type[nn.Conv1d | nn.Conv2d | nn.Conv3d]] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_LARGEST_GAIN = 4.0  # of moment matching: a channel that hardly varied says nothing of its scale
SHRINKAGE = (10.0, 1.0, 0.1, 0.01)  # from the most cautious map on


class ScaleChannels(nn.Module):
    """Each channel times a number, plus another.

    Args:
        channels: How many channels.
        dim: The dimension that they are in.

    Example:
        >>> layer = ScaleChannels(3)
        >>> bool((layer(torch.ones(2, 3, 4)) == 1).all())
        True
    """

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.dim = dim
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The scaled value, of the same shape."""
        shape = [1] * x.dim()
        shape[self.dim] = self.channels
        return x * self.weight.view(shape) + self.bias.view(shape)

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"{self.channels}, dim={self.dim}"


@dataclass(frozen=True)
class Map:
    """An affine map of the channels: `x @ weight + bias`; `weight` is a vector where each channel is by itself.

    Attributes:
        weight: `(channels, channels)`, in by out, or `(channels,)`.
        bias: `(channels,)`.
        strength: How strongly it was drawn to the identity; `None` for moment matching.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float | None = None

    def __str__(self) -> str:
        return "moments matched" if self.strength is None else f"linear map, shrunk by {self.strength:g}"

    def module(self, rank: int, dim: int, like: torch.Tensor) -> nn.Module:
        """A layer that does it, for values of so many dimensions with the channels in `dim`."""
        channels = len(self.bias)
        layer: ScaleChannels | nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
        if self.weight.dim() == 1:
            layer, weight = ScaleChannels(channels, dim), self.weight
        elif dim == rank - 1:
            layer, weight = nn.Linear(channels, channels), self.weight.T
        else:
            layer = _CONV[rank](channels, channels, 1)
            weight = self.weight.T.reshape(channels, channels, *[1] * (rank - 2))
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias = nn.Parameter(self.bias.to(layer.weight.dtype))
        return layer.to(like.device, like.dtype).eval()


@dataclass
class Sums:
    """What is needed of pairs `x`, `y` for every map between them: sums in float64, as large as channels x channels.

    The sums are of `x` and `y - x`, shifted by the first values' mean, so that large offsets cost no precision.

    Example:
        >>> x = torch.randn(500, 3, generator=torch.Generator().manual_seed(0))
        >>> sums = Sums(dim=1)
        >>> for part in x.split(100): sums.add(part, part @ torch.diag(torch.tensor([1.0, 2.0, 3.0])) + 1)
        >>> found = sums.linear(0.0)
        >>> [round(v, 4) for v in found.weight.diagonal().tolist()], [round(v, 4) for v in found.bias.tolist()]
        ([1.0, 2.0, 3.0], [1.0, 1.0, 1.0])
    """

    dim: int
    count: int = 0
    shift: torch.Tensor | None = None
    first: list[torch.Tensor] = field(default_factory=list)  # of x, of d = y - x
    second: list[torch.Tensor] = field(default_factory=list)  # of x'x, of x'd, of d * d

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add values with the channels in `dim`, both of one shape."""
        flat_x = x.detach().movedim(self.dim, -1).flatten(0, -2).double()
        difference = y.detach().movedim(self.dim, -1).flatten(0, -2).double() - flat_x
        if self.shift is None:
            self.shift = flat_x.mean(0)
        flat_x = flat_x - self.shift
        first = [flat_x.sum(0), difference.sum(0)]
        second = [flat_x.T @ flat_x, flat_x.T @ difference, (difference * difference).sum(0)]
        self.first = [a + b for a, b in zip(self.first, first, strict=True)] if self.count else first
        self.second = [a + b for a, b in zip(self.second, second, strict=True)] if self.count else second
        self.count += len(flat_x)

    def _central(self) -> tuple[torch.Tensor, ...]:
        (mean_x, mean_d), (xx, xd, dd) = ([each / self.count for each in sums] for sums in (self.first, self.second))
        shift = torch.zeros_like(mean_x) if self.shift is None else self.shift
        cov_x, cov_xd = xx - torch.outer(mean_x, mean_x), xd - torch.outer(mean_x, mean_d)
        return mean_x + shift, mean_d, cov_x, cov_xd, (dd - mean_d * mean_d).clamp_min(0)

    def matched(self) -> Map:
        """Moment matching: the mean and the deviation of each channel of `x` become those of `y`."""
        mean_x, mean_d, cov_x, cov_xd, var_d = self._central()
        var_x = cov_x.diagonal().clamp_min(0)
        var_y = (var_x + 2 * cov_xd.diagonal() + var_d).clamp_min(0)
        scale = (var_y / var_x).sqrt().nan_to_num(1.0, 1.0, 1.0).clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN)
        return Map(scale, mean_x + mean_d - mean_x * scale)

    def linear(self, strength: float) -> Map:
        """Least squares of `y` on `x`, drawn to the identity by a ridge of `strength` times the mean variance of `x`.

        What the removed part adds to its input is regressed, and the ridge holds its mean back as well: in networks of
        convolutions a map whose mean is right, and little else, is worse than none.
        """
        mean_x, mean_d, cov_x, cov_xd, _ = self._central()
        eye = torch.eye(len(mean_x), dtype=cov_x.dtype, device=cov_x.device)
        ridge = max(strength, 1e-9) * cov_x.diagonal().mean().clamp_min(1e-30)
        change = torch.linalg.solve(cov_x + ridge * eye, cov_xd)
        return Map(eye + change, mean_d / (1 + strength) - mean_x @ change, strength)

    @property
    def channels(self) -> int:
        """How many channels there are."""
        return 0 if self.shift is None else len(self.shift)

    @property
    def usable(self) -> bool:
        """Whether anything was added, and all of it was finite."""
        return self.count > 0 and all(bool(total.isfinite().all()) for total in (*self.first, *self.second))
