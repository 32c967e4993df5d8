"""What is asked of a new head, and the record of one that was attached."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from torchtrim.edits.head_layers import LAYOUTS, POOLS
from torchtrim.edits.history import Edit
from torchtrim.errors import HeadError


@dataclass(frozen=True)
class AttachHead(Edit):
    """A new head.

    Attributes:
        num_classes: How many outputs it has; `None` where the head was given and has no single width.
        pool: How features are pooled; `None` for a head that replaced the model's own, or works at every place.
        hidden: Widths of the layers before the last.
        dropout: Dropout probability before the last layer.
        layout: Where the channels of the features are; `None` for a head that replaced the model's own.
        in_features: The width of the features.
        paths: Where the new head, or heads, are.
        replaced: The classes of the layers that were there before; empty after a cut.
        given: The classes of the modules the user gave, as `module:name`; empty where they were made here.
    """

    kind: ClassVar[str] = "attach_head"
    num_classes: int | None = None
    pool: str | None = None
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    layout: str | None = None
    in_features: int | None = None
    paths: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    given: tuple[str, ...] = ()


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


def type_name(module: nn.Module) -> str:
    """The class of a module, as `module:name`."""
    return f"{type(module).__module__}:{type(module).__qualname__}"
