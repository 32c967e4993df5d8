"""Least squares for one layer: what it reads as rows of numbers, sums over the data, and the weights that fit best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError

_STRENGTHS = (math.inf, 10.0, 1.0, 1e-1, 1e-2, 1e-3)  # of the ridge, in units of the mean variance of what is read
_WORTH = 0.999  # the error on data held back has to fall to this share
_WORK = 1e9  # multiplications that an input row may cost; of a convolution that costs more, fewer places are taken
_FEWEST = 64  # places of one input


@dataclass(frozen=True)
class Patches:
    """How a layer's inputs become rows of numbers, each for one place of the output.

    Attributes:
        groups: In how many groups the channels are read.
        width: How many numbers one output reads.
        layer: The layer.
    """

    groups: int
    width: int
    layer: Any

    @staticmethod
    def of(layer: nn.Module) -> Patches:
        """Those of a linear layer or a convolution."""
        held: Any = layer
        return Patches(int(getattr(layer, "groups", 1)), held.weight[0].numel(), layer)

    def rows(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is read and what comes out, `(groups, rows, numbers)` each; of many places some are taken."""
        if isinstance(self.layer, nn.Linear):
            given, wanted = x.flatten(0, -2), y.flatten(0, -2)
            return given.unsqueeze(0), wanted.unsqueeze(0)
        given = self._unfolded(x)
        wanted = y.flatten(2).movedim(1, 2)
        places = given.shape[1]
        most = max(_FEWEST, int(_WORK // self.width**2))
        if places > most:
            chosen = torch.randperm(places, generator=torch.Generator().manual_seed(places))[:most].to(x.device)
            given, wanted = given[:, chosen], wanted[:, chosen]
        given = given.flatten(0, 1).unflatten(1, (self.groups, -1)).movedim(1, 0)
        wanted = wanted.flatten(0, 1).unflatten(1, (self.groups, -1)).movedim(1, 0)
        return given, wanted

    def _unfolded(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, places, channels * kernel)`."""
        layer = self.layer
        if any(layer._reversed_padding_repeated_twice):
            mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
            x = nn.functional.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        for axis, (size, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), 2
        ):
            x = x.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
        spatial = len(layer.kernel_size)
        # (batch, channels, *places, *kernel) -> (batch, *places, channels, *kernel)
        return x.movedim(1, spatial + 1).flatten(spatial + 1).flatten(1, spatial)

    def gives(self, x: torch.Tensor, y: torch.Tensor) -> bool:
        """Whether the layer computes what these rows and its weight give: a class of another package may differ."""
        if not isinstance(self.layer, nn.Linear) and x.dim() != 2 + len(self.layer.kernel_size):
            return False
        try:
            given, wanted = self.rows(x, y)
        except (RuntimeError, IndexError):
            return False  # it pads by itself: there are fewer rows than places
        weight = self.layer.weight.flatten(1).unflatten(0, (self.groups, -1))
        if given.shape[1] != wanted.shape[1]:
            return False
        found = given @ weight.mT
        if self.layer.bias is not None:
            found = found + self.layer.bias.unflatten(0, (self.groups, 1, -1))
        return bool(torch.allclose(found, wanted, rtol=1e-2, atol=1e-3 * max(float(wanted.abs().max()), 1e-6)))


@dataclass(frozen=True)
class Solved:
    """New values for a layer.

    Attributes:
        weight: `(out, numbers read by one output)`.
        bias: `(out,)`: all of the bias; zero where the fit has none.
    """

    weight: torch.Tensor
    bias: torch.Tensor


class _Sums:
    """Mean products of rows of `x` and `y`; in double precision."""

    def __init__(self) -> None:
        self.count = 0
        self.totals: list[torch.Tensor] = []

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        x, y = x.float(), y.float()
        new = [x.sum(1), y.sum(1), x.mT @ x, x.mT @ y, y.square().sum(1)]
        if not self.count:
            self.totals = [each.double() for each in new]
        else:
            for total, each in zip(self.totals, new, strict=True):
                total += each
        self.count += x.shape[1]

    def means(self) -> list[torch.Tensor]:
        if not all(bool(each.isfinite().all()) for each in self.totals):
            raise InputError("what the model makes of the data is not finite", path="data", hint="data without NaN")
        return [each / self.count for each in self.totals]


class Fit:
    """Sums over the data for one layer: those it is fitted on, and those it is judged by.

    Args:
        centred: Whether there is a bias to be fitted too.
    """

    def __init__(self, *, centred: bool) -> None:
        self.centred = centred
        self.sums = {False: _Sums(), True: _Sums()}

    def add(self, x: torch.Tensor, y: torch.Tensor, *, held: bool) -> None:
        """Add rows of what is read, and of what should come out."""
        self.sums[held].add(x, y)

    def solve(self, weight: torch.Tensor, bias: torch.Tensor | None) -> Solved | None:
        """The weights that fit best, drawn to those there are; `None` where none is better on the data held back.

        Args:
            weight: The layer's weight.
            bias: Its bias.
        """
        if not self.sums[False].count or not self.sums[True].count:
            return None
        mean_x, mean_y, xx, xy, _ = self.sums[False].means()
        if not all(bool(each.isfinite().all()) for each in (xx, xy)):
            return None
        groups = xx.shape[0]
        old = weight.double().flatten(1).unflatten(0, (groups, -1)).mT  # (groups, read, out)
        old_bias = torch.zeros_like(mean_y) if bias is None else bias.double().unflatten(0, (groups, -1))
        best, chosen = _WORTH * self._error(old, old_bias), None
        if self.centred:
            xx, xy = xx - _outer(mean_x, mean_x), xy - _outer(mean_x, mean_y)
        missing = xy - xx @ old
        eye = torch.eye(xx.shape[-1], dtype=xx.dtype, device=xx.device)
        scale = xx.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(1e-30)[:, None, None]
        last = math.inf
        for strength in _STRENGTHS:  # the infinite one changes the bias alone
            new = old if strength == math.inf else old + _solved(xx + strength * scale * eye, missing)
            new_bias = mean_y - (mean_x.unsqueeze(1) @ new).squeeze(1) if self.centred else old_bias
            error = self._error(new, new_bias)
            if error < best:
                best, chosen = error, Solved(new.mT.flatten(0, 1), new_bias.flatten())
            if not error < last:
                break  # a ridge that is weaker still would only be worse
            last = error
        return chosen

    def _error(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """The mean squared error on the data held back, summed over the outputs."""
        mean_x, mean_y, xx, xy, yy = self.sums[True].means()
        product = (weight * (xx @ weight)).sum(1) - 2 * (weight * xy).sum(1) + yy
        shift = (mean_x.unsqueeze(1) @ weight).squeeze(1) - mean_y
        return float((product + 2 * bias * shift + bias.square()).sum())


def _solved(matrix: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """The solution for a positive definite matrix."""
    return torch.cholesky_solve(right, torch.linalg.cholesky(matrix))


def _outer(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return one.unsqueeze(2) @ other.unsqueeze(1)
