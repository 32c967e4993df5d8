"""Make a model again, without its weights: from what made it first, and its edits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from torchtrim.checkpoint.container import storable
from torchtrim.checkpoint.hollow import bounded, emptied, hollow
from torchtrim.checkpoint.origin import Factory
from torchtrim.edits.apply import run
from torchtrim.edits.history import History, history
from torchtrim.edits.module_spec import Trusted
from torchtrim.edits.module_types import is_open_class
from torchtrim.errors import CheckpointError, CheckpointMismatch, CheckpointUntrusted, EditUntrusted, TorchTrimError
from torchtrim.graph.copying import kept_random_state, paused_collection, structural_copy
from torchtrim.graph.execution import inputs_from_spec
from torchtrim.graph.inputs import Inputs

_ELEMENTS = 2**28  # of all recorded inputs: 1 GB, sixteen hundred pictures


def rebuilt(start: Factory | nn.Module, past: History, *, trusted: Trusted, limit: int | None) -> nn.Module:
    """The model that the edits of `past` make of `start`, with hollow parameters (see `hollow`).

    Args:
        start: What makes the model; or the model, which is left as it was. One that has the first of these edits
            already gets the others.
        past: The edits.
        trusted: Factories and classes that may be called though they are not of a known package.
        limit: Bytes that a single tensor may take, where the file says how large it is; `None` for no limit.

    Raises:
        CheckpointUntrusted: The factory, or the class of a module that an edit put in, is not allowed.
        CheckpointMismatch: It makes a model on which the edits cannot be done.
        CheckpointError: It cannot be made.
    """
    try:
        with kept_random_state(), paused_collection():
            if isinstance(start, Factory):
                model = hollow(lambda: start.make(trusted), limit if start.of_a_zoo else None)
            else:
                model = structural_copy(start)
                emptied(model)
            with bounded(limit):
                return _edited(model, past, trusted)
    except CheckpointError:
        raise
    except EditUntrusted as error:
        raise CheckpointUntrusted(
            error.message, path=error.path, found=error.found, expected=error.expected, hint=error.hint
        ) from error
    except TorchTrimError as error:
        made = start.name if isinstance(start, Factory) else type(start).__name__
        where = f"{error.path}: " if error.path is not None else ""
        raise CheckpointMismatch(
            f"the model cannot be made again from {made}: {where}{error.message}",
            found=error.found,
            expected=error.expected,
            hint=error.hint,
        ) from error
    except Exception as error:  # of a constructor that was given nonsense: any there is
        made = start.name if isinstance(start, Factory) else type(start).__name__
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}"
        raise CheckpointMismatch(f"the model cannot be made again from {made}: {reason}") from error


def _edited(model: nn.Module, past: History, trusted: Trusted) -> nn.Module:
    done = len(history(model).edits)
    if history(model).edits != past.edits[:done]:
        raise CheckpointMismatch(
            "the given model has other edits than the file",
            found=[str(edit) for edit in history(model).edits],
            expected=[str(edit) for edit in past.edits],
            hint="a model as it was before the edits",
        )
    if done == len(past.edits):
        return model
    return run(model, _inputs(past.inputs), past.edits[done:], copy=False, check=False, trusted=_classes(trusted))


def _inputs(spec: dict[str, Any] | None) -> Inputs | None:
    if spec is None:
        return None
    if _elements(spec) > _ELEMENTS:
        raise CheckpointMismatch("the recorded example inputs are too large", found=f"{_elements(spec):,} values")
    return inputs_from_spec(spec)


def _elements(spec: Any) -> int:
    """How many values the inputs in plain data would have."""
    if isinstance(spec, dict):
        shape = spec.get("shape")
        if set(spec) == {"shape", "dtype"} and isinstance(shape, list):
            dtype = getattr(torch, str(spec["dtype"]), None)
            if not isinstance(dtype, torch.dtype) or not storable(dtype):
                raise CheckpointMismatch(
                    "the recorded example inputs are of no such type", found=str(spec["dtype"])[:60]
                )
            if not all(type(size) is int and size >= 0 for size in shape):
                raise CheckpointMismatch("the recorded example inputs have no such shape", found=str(shape)[:60])
            return math.prod(shape)
        return sum(map(_elements, spec.values()))
    return sum(map(_elements, spec)) if isinstance(spec, list) else 0


def _classes(trusted: Trusted) -> Trusted:
    """As edits take it; a class of the user's may be called without the arguments that a record does not know.

    What it makes so is brought to what was saved: its tensors and its plain attributes are in the file.
    """
    if isinstance(trusted, Mapping):
        return {name: partial(make) if _is_own(make) else make for name, make in trusted.items()}
    return [trusted] if isinstance(trusted, str) else trusted


def _is_own(make: Any) -> bool:
    return isinstance(make, type) and not is_open_class(make)


def placed(tensor: torch.Tensor, strides: list[int] | None, device: torch.device) -> torch.Tensor:
    """A tensor that was read, in the order in memory that it had, on a device."""
    if strides is not None:
        tensor = torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype).copy_(tensor)
    return tensor.to(device)
