"""Values as plain data that JSON holds without loss: numbers, texts, and tuples, lists and dicts of them."""

from __future__ import annotations

import math
from typing import Any

import torch

from torchtrim.errors import CheckpointError

_SCALARS = (type(None), bool, int, str)


def is_plain(value: Any) -> bool:
    """Whether `to_plain` can write it."""
    if type(value) in (tuple, list, torch.Size):
        return all(map(is_plain, value))
    if type(value) is dict:
        return all(map(is_plain, (*value.keys(), *value.values())))
    return type(value) in (*_SCALARS, float)


def to_plain(value: Any) -> Any:
    """Plain data; a list stands for itself, what JSON has no form for is an object that names its kind.

    Raises:
        CheckpointError: It holds something else than numbers, texts, `None`, tuples, lists and dicts.

    Example:
        >>> to_plain({"betas": (0.9, 0.999)})
        {'dict': [['betas', {'tuple': [0.9, 0.999]}]]}
        >>> from_plain(to_plain({"betas": (0.9, 0.999)}))
        {'betas': (0.9, 0.999)}
    """
    if type(value) in _SCALARS or (type(value) is float and math.isfinite(value)):
        return value
    if type(value) is float:
        return {"float": str(value)}
    if type(value) is list:
        return [to_plain(item) for item in value]
    if type(value) in (tuple, torch.Size):
        return {"tuple" if type(value) is tuple else "size": [to_plain(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[to_plain(key), to_plain(item)] for key, item in value.items()]}
    raise CheckpointError(
        "a value that is not plain data", found=type(value).__name__, expected="numbers, texts, tuples, lists, dicts"
    )


def from_plain(data: Any) -> Any:
    """The value that `to_plain` wrote.

    Raises:
        CheckpointError: It wrote no such thing.
    """
    if type(data) in (*_SCALARS, float):
        return data
    if type(data) is list:
        return [from_plain(item) for item in data]
    if type(data) is dict and len(data) == 1:
        ((kind, held),) = data.items()
        if kind == "float" and held in ("nan", "inf", "-inf"):
            return float(held)
        if kind in ("tuple", "size") and type(held) is list:
            items = tuple(from_plain(item) for item in held)
            if kind == "tuple":
                return items
            if all(type(item) is int for item in items):
                return torch.Size(items)
        if kind == "dict" and type(held) is list and all(type(pair) is list and len(pair) == 2 for pair in held):
            pairs = [(from_plain(key), from_plain(item)) for key, item in held]
            if all(type(key) in (*_SCALARS, float) for key, _ in pairs):
                return dict(pairs)
    raise CheckpointError("not a value that torchtrim wrote", found=str(data)[:60])
