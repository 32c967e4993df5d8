"""What a model returns, as named tensors: the one order the file, the check and the report agree on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch


def named_outputs(output: object) -> dict[str, torch.Tensor]:
    """Every tensor in a model's output, by name.

    A dict's keys and a dataclass's or named tuple's fields are the names; elsewhere they are `output`, `output_1`, ...
    What is no tensor (None, a number) is left out.

    Example:
        >>> list(named_outputs({"logits": torch.zeros(1), "aux": None}))
        ['logits']
        >>> list(named_outputs((torch.zeros(1), [torch.zeros(1)])))
        ['output', 'output_1']
    """
    named: dict[str, torch.Tensor] = {}
    unnamed = 0
    for name, tensor in _walk(output, ""):
        if not name:
            name = f"output_{unnamed}" if unnamed else "output"
            unnamed += 1
        named[free_name(name, named)] = tensor
    return named


def free_name(name: str, taken: Mapping[str, object] | set[str]) -> str:
    """`name`, or `name_1`, `name_2`, ... where it is taken.

    Example:
        >>> free_name("x", {"x"})
        'x_1'
    """
    number, free = 0, name
    while free in taken:
        number += 1
        free = f"{name}_{number}"
    return free


def _walk(value: object, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield prefix, value
        return
    fields: Mapping[str, object] | None = None
    if isinstance(value, Mapping):
        fields = {str(key): item for key, item in value.items()}
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {entry.name: getattr(value, entry.name) for entry in dataclasses.fields(value)}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        fields = dict(zip(value._fields, value, strict=True))
    if fields is not None:
        for key, item in fields.items():
            yield from _walk(item, f"{prefix}_{key}" if prefix else key)
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _walk(item, prefix)
