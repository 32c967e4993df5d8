"""The tensor that is meant by a model's output, whatever it comes in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from torchtrim.errors import InputError, nearest

Pick = str | int | Callable[[Any], torch.Tensor] | None
_USUAL = ("logits", "out")  # of transformers, and of torchvision's segmentation


def output_of(value: Any, pick: Pick, whose: str) -> torch.Tensor:
    """The logits, or values, in what a model returned.

    A tensor is it. Of a dict, a named tuple or an object of transformers it is the entry named `pick`, or else
    `"logits"`, `"out"`, or the only tensor there is; of a tuple the entry with that number, or the only one.

    Args:
        value: What the model returned.
        pick: A name, a number, or a function of what was returned.
        whose: Whose output it is, for errors.

    Raises:
        InputError: It cannot be told which is meant, or there is no such entry.

    Example:
        >>> output_of({"logits": torch.zeros(2, 3), "state": torch.zeros(2, 8)}, None, "student").shape
        torch.Size([2, 3])
        >>> output_of((torch.zeros(2, 3), torch.zeros(2, 5)), 1, "student").shape
        torch.Size([2, 5])
    """
    if isinstance(value, torch.Tensor):
        return value
    if callable(pick):
        found = pick(value)
    elif isinstance(pick, int) and isinstance(value, (tuple, list)) and -len(value) <= pick < len(value):
        found = value[pick]
    else:
        found = _named(value, pick, whose)
    if not isinstance(found, torch.Tensor):
        raise InputError(f"what output={pick!r} gives is not a tensor", path=whose, found=type(found).__name__)
    return found


def _named(value: Any, pick: object, whose: str) -> Any:
    entries = _entries(value)
    if pick is not None:
        if pick in entries:
            return entries[pick]
        raise InputError(
            "the output has no such entry",
            path=whose,
            found=repr(pick),
            expected=", ".join(map(repr, entries)) or "no names",
            hint=nearest(str(pick), map(str, entries)),
        )
    for name in _USUAL:
        if isinstance(entries.get(name), torch.Tensor):
            return entries[name]
    tensors = [each for each in entries.values() if isinstance(each, torch.Tensor)]
    if len(tensors) == 1:
        return tensors[0]
    names = ", ".join(f"output={name!r}" for name, each in entries.items() if isinstance(each, torch.Tensor))
    raise InputError(
        "it cannot be told which of its outputs is meant",
        path=whose,
        found=f"{type(value).__name__} with {len(tensors)} tensors",
        hint=names or "output=, a function that gives the tensor in what the model returns",
    )


def _entries(value: Any) -> dict[Any, Any]:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return dict(zip(value._fields, value, strict=True))
    return dict(enumerate(value)) if isinstance(value, (tuple, list)) else {}
