"""What modules have computed from their weights and kept, which is wrong once the weights are others."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchtrim.graph.copying import kept_modes
from torchtrim.graph.structure import leaves

_HELD = ("_parameters", "_buffers", "_modules")


def forget_computed(model: nn.Module) -> None:
    """Let modules drop tensors that they keep in plain attributes, such as LeViT's table of attention biases.

    Modules that keep what they computed drop it where the mode changes, since training changes their weights. Those
    that hold a tensor so and have a `train` of their own go to the other mode and back; every mode is as before then.

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
        >>> forget_computed(model)
        >>> model.kept, model.training
        ({}, False)
    """
    with kept_modes(model):
        for module in model.modules():
            if type(module).train is not nn.Module.train and _keeps_a_tensor(module):
                mode = module.training
                module.train(not mode)
                module.train(mode)


def _keeps_a_tensor(module: nn.Module) -> bool:
    values: list[Any] = [value for name, value in module.__dict__.items() if name not in _HELD]
    return bool(leaves(values, torch.Tensor))
