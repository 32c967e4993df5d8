"""What is asked of a new head, checked."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchtrim.edits.head_layers import LAYOUTS, POOLS
from torchtrim.errors import HeadError


@dataclass(frozen=True)
class HeadRequest:
    """The arguments of `attach_head` that say what the head is, checked."""

    num_classes: int | None
    head: nn.Module | Mapping[str, nn.Module] | None
    pool: str | None
    hidden: tuple[int, ...]
    dropout: float
    layout: str | None

    @staticmethod
    def of(num_classes: Any, head: Any, pool: Any, hidden: Any, dropout: Any, layout: Any) -> HeadRequest:
        """Check the arguments.

        Raises:
            HeadError: One of them is not what it should be.
        """
        if (num_classes is None) == (head is None):
            raise HeadError("a new head needs its number of outputs, or is given", expected="num_classes= or head=")
        if head is not None and not isinstance(head, (nn.Module, Mapping)):
            raise HeadError("a head is a module, or a dict of them by path", found=type(head).__name__)
        if pool is not None and pool not in POOLS:
            raise HeadError("no such pooling", found=pool, expected=f"one of {', '.join(POOLS)}, or None")
        if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
            raise HeadError("dropout is a probability", found=dropout, expected="0 <= dropout < 1")
        if layout is not None and layout not in LAYOUTS:
            raise HeadError("no such layout", found=layout, expected=f"one of {', '.join(LAYOUTS)}")
        widths = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
        return HeadRequest(
            None if num_classes is None else _count(num_classes, "num_classes"),
            head,
            pool,
            tuple(_count(width, "a width in hidden") for width in widths),
            float(dropout),
            layout,
        )


def _count(value: Any, name: str) -> int:
    try:
        number = operator.index(value)
    except TypeError:
        number = 0
    if number < 1 or isinstance(value, bool):
        raise HeadError(f"{name} is a whole number above 0", found=value)
    return number
