"""The inputs of a file: their names, their order, and what of a batch of data goes into them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.export.outputs import free_name
from torchtrim.graph.inputs import Inputs


def input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """A name for each tensor in the arguments: its parameter, then the keys or places that lead to it.

    Raises:
        InputError: The arguments do not fit the forward.

    Example:
        >>> input_names(nn.Linear(2, 2), Inputs.of(torch.zeros(1, 2)))
        ['input']
    """
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    args, kwargs = pytree.tree_unflatten(list(range(len(leaves))), spec)
    named: dict[int, str] = {}
    taken: set[str] = set()

    def walk(value: Any, name: str) -> None:
        if isinstance(value, int):
            named[value] = free_name(name, taken)
            taken.add(named[value])
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, f"{name}_{key}" if name else str(key))
        elif isinstance(value, (tuple, list)):
            for position, item in enumerate(value):
                walk(item, f"{name}_{position}" if position else name)

    variadic = {name for name, parameter in _parameters(model).items() if parameter.kind is parameter.VAR_KEYWORD}
    for parameter, value in Inputs(tuple(args), dict(kwargs)).bind(model).items():
        walk(value, "" if parameter in variadic else parameter)
    return [named.get(i, f"input_{i}") for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]


def in_order(inputs: Inputs, model: nn.Module) -> Inputs:
    """The same arguments, the named ones in the order of the forward's parameters."""
    order = {name: position for position, name in enumerate(_parameters(model))}
    return Inputs(inputs.args, dict(sorted(inputs.kwargs.items(), key=lambda pair: order.get(pair[0], len(order)))))


def arguments_of(batch: Any, model: nn.Module, names: Sequence[str]) -> Inputs:
    """The forward's arguments in a batch of data; labels, which the file has no input for, are left out.

    Args:
        batch: A tensor, an `(inputs, targets)` pair, or a dict.
        model: The model.
        names: The names of the file's inputs.

    Raises:
        InputError: Neither of these, or nothing in it is a tensor.
    """
    if isinstance(batch, Mapping):
        parameters = _parameters(model)
        anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
        known = {key: value for key, value in batch.items() if anything or key in parameters}
        if len(_tensors(known)) != len(names):
            known = {key: value for key, value in known.items() if not _tensors(value) or _is_named(key, names)}
        return Inputs.of(known if len(_tensors(known)) == len(names) else batch)
    if isinstance(batch, tuple) and batch and isinstance(batch[0], Inputs):
        return batch[0]
    inputs = Inputs.of(batch)
    if isinstance(batch, (tuple, list)) and (len(inputs.tensors) > len(names) or not _fits(inputs, model)):
        return Inputs.of(batch[0])
    return inputs


def _fits(inputs: Inputs, model: nn.Module) -> bool:
    try:
        inspect.signature(model.forward).bind(*inputs.args, **inputs.kwargs)
    except TypeError:
        return False
    return True


def _is_named(key: str, names: Sequence[str]) -> bool:
    return any(name == key or name.startswith(f"{key}_") for name in names)


def _tensors(value: object) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def _parameters(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(model.forward).parameters
