"""The numbers that the layers of a stack hold, kept without gaps when some of them go.

A layer of a `transformers` model holds its number as `layer_idx`: the place of its keys and values in a cache, and of
its kind in the configuration's `layer_types`. With gaps a model would still run, but a cache asks its first layer how
long it is, and `num_hidden_layers` would count layers that are gone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

NAME = "layer_idx"
Numbers = dict[str, tuple[int, ...]]  # of each stack, by its path


def layer_numbers(model: nn.Module) -> Numbers:
    """The numbers that the layers of each stack hold, by the path of the stack; nothing where they hold none.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> for number, layer in enumerate(net):
        ...     layer.layer_idx = number
        >>> layer_numbers(net)
        {'': (0, 1)}
    """
    found: dict[str, set[int]] = {}
    for stack, module in _numbered(model):
        found.setdefault(stack, set()).add(getattr(module, NAME))
    return {stack: tuple(sorted(numbers)) for stack, numbers in found.items()}


def renumber_layers(model: nn.Module, before: Mapping[str, tuple[int, ...]]) -> None:
    """Number the layers that are left anew, each stack from its first number on; its configuration follows.

    Args:
        model: The model. A configuration that changes is replaced by a copy: others may hold it, too.
        before: The numbers before some layers went. A stack that had gaps by then keeps its numbers.
    """
    after = layer_numbers(model)
    changed: dict[str, dict[int, int]] = {}
    for stack, numbers in before.items():
        left = after.get(stack, ())
        whole = numbers == tuple(range(numbers[0], numbers[0] + len(numbers)))
        if whole and left and left != numbers and set(left) <= set(numbers):
            changed[stack] = {number: numbers[0] + place for place, number in enumerate(left)}
    for stack, module in _numbered(model):
        if stack in changed:
            setattr(module, NAME, changed[stack][getattr(module, NAME)])
    if len(before) == 1 and changed:  # of two stacks a configuration does not say in one way which it counts
        (numbers,), (anew,) = before.values(), changed.values()
        _tell_configurations(model, len(numbers), [numbers.index(number) for number in anew])


def _numbered(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules that hold a number, each with the path of the stack it is in."""
    found = []
    for path, module in model.named_modules():
        number = module.__dict__.get(NAME)
        if isinstance(number, int) and not isinstance(number, bool):
            parts = path.split(".")
            place = next((place for place, part in enumerate(parts) if part.isdigit()), None)
            if place is not None:
                found.append((".".join(parts[:place]), module))
    return found


def _tell_configurations(model: nn.Module, count: int, kept: list[int]) -> None:
    copies: dict[int, Any] = {}
    for module in model.modules():
        held = module.__dict__.get("config")
        if held is None or getattr(held, "num_hidden_layers", None) != count:
            continue
        if id(held) not in copies:
            copies[id(held)] = anew = copy.copy(held)
            types = getattr(held, "layer_types", None)
            if isinstance(types, list) and len(types) == count:
                anew.layer_types = [types[place] for place in kept]
            anew.num_hidden_layers = len(kept)
        module.config = copies[id(held)]


def without_caches(output: Any) -> Any:
    """What a model returned, without the keys and values that it keeps for its next call.

    Example:
        >>> class DynamicCache:
        ...     pass
        >>> sorted(without_caches({"logits": torch.zeros(1), "past_key_values": DynamicCache()}))
        ['logits']
    """
    if isinstance(output, dict):
        return {name: without_caches(value) for name, value in output.items() if not _is_cache(value)}
    if isinstance(output, (tuple, list)):
        return tuple(without_caches(value) for value in output if not _is_cache(value))
    return output


def _is_cache(value: Any) -> bool:
    return type(value).__name__.endswith("Cache") and not isinstance(value, (torch.Tensor, dict, tuple, list))
