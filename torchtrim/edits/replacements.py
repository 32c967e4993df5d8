"""Functions for `replace` that make a new module of the old one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from torch import nn

from torchtrim.edits.norms import behind
from torchtrim.errors import EditError


def group_norm(num_groups: int = 32) -> Callable[[nn.Module], nn.Module | None]:
    """For `replace`: group norm in place of batch norm, with the scales and shifts that it learned.

    Group norm (Wu and He, 2018) does the same in train and eval mode and at any batch size, so it suits fine-tuning on
    few pictures at a time; the model has to be trained on after it. Modules that are no batch norms are left alone. For
    one that does more than normalise (an activation behind it) the rest is kept behind the group norm.

    Args:
        num_groups: The number of groups; where it does not divide the number of channels, the largest number that
            divides both.

    Raises:
        EditError: Not a positive number; on use, a batch norm whose class does something else besides.

    Example:
        >>> import torch
        >>> from torchtrim.edits.replace import replace
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        >>> replace(net, torch.zeros(2, 3, 4, 4), nn.BatchNorm2d, group_norm(4))[1].num_groups
        4
    """
    if type(num_groups) is not int or num_groups < 1:
        raise EditError("not a number of groups", path="num_groups", found=num_groups, expected="1 or more")

    def change(old: nn.Module) -> nn.Module | None:
        if not isinstance(old, nn.modules.batchnorm._BatchNorm):
            return None
        held: Any = old
        groups = math.gcd(num_groups, held.num_features)
        affine = held.weight is not None
        norm = nn.GroupNorm(groups, held.num_features, eps=held.eps, affine=affine)
        if affine:
            norm.weight = nn.Parameter(held.weight.detach().clone(), requires_grad=held.weight.requires_grad)
            if held.bias is not None:
                norm.bias = nn.Parameter(held.bias.detach().clone(), requires_grad=held.bias.requires_grad)
        across = {nn.BatchNorm1d: 0, nn.BatchNorm3d: 3}
        dimensions = next((count for kind, count in across.items() if isinstance(old, kind)), 2)
        rest = behind(old, (1, held.num_features, *(4,) * dimensions))
        if rest is None:
            raise EditError(
                "its class does more than normalise, and not only behind that",
                found=type(old).__name__,
                hint="a function of your own that makes the new module",
            )
        return norm if isinstance(rest, nn.Identity) else nn.Sequential(norm, rest)

    return change
