"""Nested arguments: tuples, lists, dicts and slices with something in them to be replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def map_leaves(value: Any, kind: type[T], function: Callable[[T], Any]) -> Any:
    """The structure with every instance of `kind` in it passed through `function`.

    Example:
        >>> map_leaves({"a": (1, "x"), "b": [2]}, int, lambda n: n + 1)
        {'a': (2, 'x'), 'b': [3]}
    """
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_leaves(item, kind, function) for item in value))
    if isinstance(value, tuple):
        # A torch.Size, and fx's immutable kinds, become plain ones: what is in them need not be a number any more.
        return tuple(map_leaves(item, kind, function) for item in value)
    if isinstance(value, list):
        return [map_leaves(item, kind, function) for item in value]
    if isinstance(value, dict):
        return {key: map_leaves(item, kind, function) for key, item in value.items()}
    if isinstance(value, slice):
        return slice(*(map_leaves(item, kind, function) for item in (value.start, value.stop, value.step)))
    return value


def leaves(value: Any, kind: type[T]) -> list[T]:
    """Every instance of `kind` in a structure, in order.

    Example:
        >>> leaves({"a": (1, "x"), "b": [2]}, int)
        [1, 2]
    """
    found: list[T] = []
    map_leaves(value, kind, found.append)
    return found
