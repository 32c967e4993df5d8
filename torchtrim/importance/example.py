"""Example inputs where none are given: those that a model's history knows, or the first batch of the data."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError
from torchtrim.graph.batches import arguments_of
from torchtrim.graph.execution import known_inputs
from torchtrim.graph.inputs import ExampleInputs, Inputs


def example_of(
    model: nn.Module, data: Iterable[Any] | None, example_inputs: ExampleInputs | None
) -> tuple[Inputs, Iterable[Any]]:
    """Example inputs, and the data from its first batch on, also where it can be gone through only once.

    Raises:
        InputError: There is nothing to take them from.

    Example:
        >>> inputs, data = example_of(nn.Linear(3, 2), iter([(torch.zeros(4, 3), torch.zeros(4))]), None)
        >>> inputs.describe(), len(list(data))
        ('float32[4, 3]', 1)
    """
    if isinstance(data, (torch.Tensor, Mapping)):
        data = [data]
    if data is not None and not isinstance(data, Iterable):
        raise InputError("data is an iterable of batches", found=type(data).__name__, expected="a list, a DataLoader")
    known = Inputs.of(example_inputs) if example_inputs is not None else known_inputs(model)
    if known is not None or data is None:
        if known is None:
            raise InputError("nothing says which input this model takes", hint="example_inputs=, or data=")
        return known, data or ()
    source = iter(data)
    try:
        first = next(source)
    except StopIteration:
        raise InputError(
            "the data gave no batches", path="data", hint="a list or a DataLoader; an iterator is used up"
        ) from None
    inputs = arguments_of(first, model, Inputs())
    return inputs, itertools.chain([first], source) if source is data else data
