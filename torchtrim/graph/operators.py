"""What one call of an operator says of itself: its arguments by name, and whether it draws random numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

_REQUIRED = object()


def bound(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name, defaults included.

    Example:
        >>> x = torch.ones(2, 3)
        >>> bound(torch.ops.aten.sum.dim_IntList, (x, [1]), {})["keepdim"]
        False
    """
    found: dict[str, Any] = {}
    for position, (name, default) in enumerate(_parameters(func)):
        if position < len(args):
            found[name] = args[position]
        elif name in kwargs:
            found[name] = kwargs[name]
        elif default is not _REQUIRED:
            found[name] = default
    return found


def draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call draws random numbers: attention draws none without dropout.

    Example:
        >>> x = torch.ones(2, 3)
        >>> draws(torch.ops.aten.randn_like.default, (x,), {}), draws(torch.ops.aten.relu.default, (x,), {})
        (True, False)
    """
    return torch.Tag.nondeterministic_seeded in func.tags and bool(bound(func, args, kwargs).get("dropout_p", 1.0))


@cache
def _parameters(func: Any) -> list[tuple[str, Any]]:
    """The names of an operator's arguments, and what they are where they are not given."""
    arguments = func._schema.arguments
    return [(each.name, each.default_value if each.has_default_value() else _REQUIRED) for each in arguments]
