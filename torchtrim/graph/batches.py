"""A batch of data as arguments for a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError
from torchtrim.graph.inputs import Inputs


def arguments_of(batch: Any, model: nn.Module, example: Inputs) -> Inputs:
    """The arguments of the forward in a batch of data; labels are left out.

    Args:
        batch: A tensor, an `(inputs, targets)` pair, a tuple of arguments, or a dict.
        model: The model.
        example: Example inputs: how many arguments there are.

    Raises:
        InputError: It is none of these.

    Example:
        >>> import torch
        >>> pair = torch.zeros(4, 3), torch.zeros(4)
        >>> arguments_of(pair, nn.Linear(3, 2), Inputs.of(torch.zeros(1, 3))).describe()
        'float32[4, 3]'
    """
    if isinstance(batch, Mapping):
        parameters = inspect.signature(model.forward).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            known = {name: value for name, value in batch.items() if not example.kwargs or name in example.kwargs}
        else:
            known = {name: value for name, value in batch.items() if name in parameters}
        if not known:
            raise InputError(
                "a batch holds none of the forward's arguments",
                found=list(batch),
                expected=list(example.kwargs or parameters),
            )
        return Inputs.of(known)
    if isinstance(batch, (tuple, list)) and batch:
        first = example.args[0] if example.args else None
        if isinstance(batch[0], (Mapping, tuple, list)) and not isinstance(first, (Mapping, tuple, list)):
            return arguments_of(batch[0], model, example)
        return Inputs.of(tuple(batch[: max(len(example.args), 1)]))
    return Inputs.of(batch)


def answer_to(given: Inputs, model: nn.Module, number: int, *, told: Inputs | None = None) -> Any:
    """What a model says to a batch of data.

    Args:
        given: The arguments.
        model: The model, called as it is.
        number: Which batch it is, for the error.
        told: What the error says that was given, where that is less.

    Raises:
        InputError: The forward refuses it.
    """
    try:
        return given.call(model)
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        alone = "more than 1 value per channel" in str(error)
        raise InputError(
            f"the model does not take the data: {type(error).__name__}: {str(error).rstrip('.')}",
            path=f"data[{number}]",
            found=(told or given).describe(),
            hint="drop_last=True, or another batch size: a norm needs two rows or more" if alone else None,
        ) from error
