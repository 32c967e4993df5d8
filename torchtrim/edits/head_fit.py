"""Whether a head fits a model's features, tried on features of their shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchtrim.errors import HeadError
from torchtrim.graph.copying import has_function_hooks, kept_modes, kept_random_state, structural_copy
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import Inputs


def input_shape(model: nn.Module, path: str, inputs: Inputs) -> tuple[int, ...]:
    """The shape of what a module gets (in train mode, where it is called there only)."""
    found: list[tuple[int, ...]] = []
    user_hooks = has_function_hooks(model) and run_fake(model, inputs).user_hooks
    for training in (False, True):
        twin = structural_copy(model, own_buffers=True, user_hooks=user_hooks)
        twin.get_submodule(path).register_forward_pre_hook(
            lambda _module, args: found.append(tuple(args[0].shape)) if args else None
        )
        run_once(twin, inputs.with_batch(max(inputs.batch, 2)), training)
        if found:
            return found[0]
    raise HeadError("it is never called", path=path)


def run_once(module: nn.Module, inputs: Inputs, training: bool) -> Any:
    """Run a copy on values that do not matter, for the shapes alone, without gradients."""
    module.train(training)
    with kept_random_state(), torch.no_grad():
        return inputs.fresh().call(module)


def outputs_in(output: Any) -> int | None:
    """How many classes a head's output has; `None` where it is not one tensor of them."""
    if not isinstance(output, torch.Tensor) or output.dim() < 2:
        return None
    return int(output.shape[-1] if output.dim() in (2, 3) else output.shape[1])


def try_head(head: nn.Module, shape: tuple[int, ...], path: str) -> Any:
    """Run a head on features of a shape.

    Raises:
        HeadError: It does not take them; both shapes are in the message.
    """
    reference = next(iter(head.parameters()), torch.zeros(()))
    features = torch.zeros((max(shape[0], 2), *shape[1:]), dtype=reference.dtype, device=reference.device)
    with kept_modes(head):
        try:
            return run_once(head, Inputs((features,)), False)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise HeadError(
                f"the head does not take the model's features: {' '.join(str(error).split())}",
                path=path,
                found=f"features of shape (N, {', '.join(map(str, shape[1:]))})",
                expected=_wants(head),
                hint="a head for that width, or num_classes= to have one made",
            ) from error


def _wants(head: nn.Module) -> str:
    for name, module in head.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, torch.Tensor) and weight.dim() >= 2:
            width = int(weight.shape[1]) * int(getattr(module, "groups", 1))
            where = f"{name or 'the head'} is a {type(module).__name__} with weights {tuple(weight.shape)}"
            return f"{width} features: {where}"
    return "other features"
