"""Masks that keep weights at zero while a model is trained, applied in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from torchtrim.edits.bits import pack, unpack
from torchtrim.errors import EditError, nearest
from torchtrim.train.followed import Followed


class WeightMasks(Followed):
    """Which values of which weights are held at zero.

    A mask is a tensor of ones and zeros in the weight's own type (as much memory as the weight takes), for those
    weights alone that have lost something: so one fused multiplication for all of them does the work of a step.

    Attributes:
        optimizer: The optimizer whose state is masked too.
    """

    optimizer: torch.optim.Optimizer | None = None

    @property
    def gone(self) -> dict[str, torch.Tensor]:
        """The masks by name, true where a weight is held at zero; those that lost nothing are left out."""
        return {
            weight.name: self.held[weight.parameter] == 0 for weight in self.weights if weight.parameter in self.held
        }

    def whole(self) -> dict[str, torch.Tensor]:
        """The masks of all weights by name, true where one is held at zero."""
        return {
            weight.name: self.held[weight.parameter] == 0
            if weight.parameter in self.held
            else torch.zeros_like(weight.parameter, dtype=torch.bool)
            for weight in self.weights
        }

    def put(self, gone: Mapping[str, torch.Tensor]) -> None:
        """Take these masks from now on, true where a weight is held at zero."""
        self.held = {
            weight.parameter: (~gone[weight.name]).to(weight.parameter.device, weight.parameter.dtype)
            for weight in self.weights
            if weight.name in gone and bool(gone[weight.name].any())
        }

    @torch.no_grad()
    def apply(self) -> None:
        """Set what has gone to zero, and what an optimizer keeps of it: momentum, the moments of Adam."""
        tensors: list[torch.Tensor] = []
        masks: list[torch.Tensor] = []
        for weight, mask in self.held.items():
            if mask.dtype != weight.dtype or mask.device != weight.device:
                mask = self.held[weight] = mask.to(weight.device, weight.dtype)
            tensors.append(weight)
            masks.append(mask)
            state = self.optimizer.state.get(weight) if self.optimizer is not None else None
            for value in (state or {}).values():
                if not isinstance(value, torch.Tensor) or value.shape != weight.shape:
                    continue
                if value.is_floating_point() or value.is_complex():
                    same = value.dtype == mask.dtype and value.device == mask.device
                    tensors.append(value)
                    masks.append(mask if same else mask.to(value.device, value.dtype))
        if tensors:
            torch._foreach_mul_(tensors, masks)

    @torch.no_grad()
    def settle(self) -> None:
        """Set what has gone to zero once more, to one that has no sign."""
        for weight, mask in self.held.items():
            weight.masked_fill_(mask.to(weight.device) == 0, 0)

    def state(self) -> dict[str, Any]:
        """The masks as bits by name, with their shapes."""
        gone = self.gone
        return {
            "masks": {name: pack(~mask) for name, mask in gone.items()},
            "shapes": {weight.name: list(weight.parameter.shape) for weight in self.weights},
        }

    def read(self, state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The masks in what `state` gave, true where a weight is held at zero; nothing is changed.

        Raises:
            EditError: It is not such data, or of another model.
        """
        masks, shapes = state.get("masks"), state.get("shapes")
        if not isinstance(masks, Mapping) or not isinstance(shapes, Mapping):
            raise EditError("not the state of masks", found=sorted(map(str, state)), expected="masks and shapes")
        own = {weight.name: list(weight.parameter.shape) for weight in self.weights}
        for name in [*shapes, *masks]:
            if name not in own:
                raise EditError("the state is of a weight that is not pruned here", path=name, hint=nearest(name, own))
        for name, shape in own.items():
            if name not in shapes or list(shapes[name]) != shape:
                raise EditError(
                    "the state is of a model of another shape",
                    path=name,
                    found=shapes.get(name, "none"),
                    expected=shape,
                )
        return {name: unpack(packed, own[name], name=name) == 0 for name, packed in masks.items()}
