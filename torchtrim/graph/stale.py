"""What modules have computed from their weights and kept, which is wrong once the weights are others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torchtrim.errors import EditError
from torchtrim.graph.copying import has_own_train, kept_modes
from torchtrim.graph.structure import leaves

_HELD = ("_parameters", "_buffers", "_modules")


def forget_computed(model: nn.Module, changed: Iterable[torch.Tensor]) -> None:
    """Let modules drop tensors that they keep in plain attributes, such as LeViT's table of attention biases.

    Modules that keep what they computed drop it where the mode changes, since training changes their weights. Those
    that hold a tensor so and have a `train` of their own go to the other mode and back; every mode is as before then.

    Args:
        model: The model.
        changed: Parameters and buffers that replaced others. Modules that hold none of them are left as they are.

    Raises:
        EditError: A module's `train` fails.

    Example:
        >>> class Scaled(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.weight, self.kept = nn.Parameter(torch.ones(2)), {}
        ...     def train(self, mode=True):
        ...         self.kept = {} if mode else self.kept
        ...         return super().train(mode)
        ...     def forward(self, x):
        ...         return x * (self.weight if self.training else self.kept.setdefault("twice", 2 * self.weight) / 2)
        >>> model = Scaled().eval()
        >>> y = model(torch.ones(2))
        >>> forget_computed(model, [model.weight])
        >>> model.kept, model.training
        ({}, False)
    """
    others = set(map(id, changed))
    for path, module in model.named_modules():
        holds = any(id(held) in others for held in (*module._parameters.values(), *module._buffers.values()))
        if holds and has_own_train(module) and _keeps_a_tensor(module):
            with kept_modes(module):
                mode = module.training
                try:
                    module.train(not mode)
                    module.train(mode)
                except Exception as error:  # whatever a user's `train` raises
                    raise EditError(f"its train() fails with other weights: {error}", path=path) from error


def _keeps_a_tensor(module: nn.Module) -> bool:
    values: list[Any] = [value for name, value in module.__dict__.items() if name not in _HELD]
    return bool(leaves(values, torch.Tensor))
