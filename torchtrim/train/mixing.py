"""Mixup, by timm or torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError, MissingDependency
from torchtrim.graph.copying import structural_copy
from torchtrim.graph.inputs import Inputs
from torchtrim.train.objective import main_output


def mixing(mixup: Any, model: nn.Module, inputs: Inputs, device: torch.device) -> Any:
    """What mixes the rows of a batch and their targets: `mixup(inputs, targets)` gives both.

    Args:
        mixup: A function of both, such as timm's `Mixup`; or an alpha, for torchvision's `MixUp` with as many classes
            as the model has. `None`: nothing is mixed.
        model: The model.
        inputs: Example inputs.
        device: Where the model is.

    Raises:
        InputError: Neither a function nor an alpha above 0.
        MissingDependency: An alpha, and torchvision is not installed.
    """
    if mixup is None or callable(mixup):
        return mixup
    if isinstance(mixup, bool) or not isinstance(mixup, (int, float)) or not mixup > 0:
        raise InputError(
            "what mixes inputs and targets",
            path="mixup",
            found=repr(mixup),
            expected="an alpha above 0, or a function such as timm.data.Mixup",
        )
    try:
        from torchvision.transforms.v2 import MixUp
    except ImportError as error:
        raise MissingDependency("torchvision is not installed", hint='pip install "torchtrim[zoo]"') from error
    twin = structural_copy(model, own_buffers=True, user_hooks=False).eval()
    with torch.no_grad():
        logits = main_output(inputs.fresh().map(lambda each: each.to(device)).call(twin))
    return MixUp(alpha=float(mixup), num_classes=int(logits.shape[1]))
