"""Masks that keep weights at zero while a model is trained: applied in place, and narrowed with the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchtrim.edits.bits import pack, unpack
from torchtrim.edits.history import history
from torchtrim.edits.sparse_weights import Weight
from torchtrim.errors import EditError, nearest
from torchtrim.train.lost import losses, shapes_before, taken


class WeightMasks:
    """Which values of which weights are held at zero.

    A mask is a tensor of ones and zeros in the weight's own type (as much memory as the weight takes), for those
    weights alone that have lost something: so one fused multiplication for all of them does the work of a step.

    Attributes:
        model: The model.
        weights: The weights, in order.
        notes: What became of weights that an edit changed.
    """

    def __init__(self, model: nn.Module, weights: Iterable[Weight], optimizer: torch.optim.Optimizer | None) -> None:
        self.model = model
        self.weights = list(weights)
        self.notes: list[str] = []
        self._optimizer = optimizer
        self._kept: dict[nn.Parameter, torch.Tensor] = {}
        self._shapes = {weight.parameter: weight.parameter.shape for weight in self.weights}
        self._edits = len(history(model).entries)

    @property
    def gone(self) -> dict[str, torch.Tensor]:
        """The masks by name, true where a weight is held at zero; those that lost nothing are left out."""
        return {
            weight.name: self._kept[weight.parameter] == 0 for weight in self.weights if weight.parameter in self._kept
        }

    def whole(self) -> dict[str, torch.Tensor]:
        """The masks of all weights by name, true where one is held at zero."""
        return {
            weight.name: self._kept[weight.parameter] == 0
            if weight.parameter in self._kept
            else torch.zeros_like(weight.parameter, dtype=torch.bool)
            for weight in self.weights
        }

    def put(self, gone: Mapping[str, torch.Tensor]) -> None:
        """Take these masks from now on, true where a weight is held at zero."""
        self._kept = {
            weight.parameter: (~gone[weight.name]).to(weight.parameter.device, weight.parameter.dtype)
            for weight in self.weights
            if weight.name in gone and bool(gone[weight.name].any())
        }

    @torch.no_grad()
    def apply(self) -> None:
        """Set what has gone to zero, and what an optimizer keeps of it: momentum, the moments of Adam."""
        tensors: list[torch.Tensor] = []
        masks: list[torch.Tensor] = []
        for weight, mask in self._kept.items():
            if mask.dtype != weight.dtype or mask.device != weight.device:
                mask = self._kept[weight] = mask.to(weight.device, weight.dtype)
            tensors.append(weight)
            masks.append(mask)
            state = self._optimizer.state.get(weight) if self._optimizer is not None else None
            for value in (state or {}).values():
                if isinstance(value, torch.Tensor) and value.shape == weight.shape and value.is_floating_point():
                    same = value.dtype == mask.dtype and value.device == mask.device
                    tensors.append(value)
                    masks.append(mask if same else mask.to(value.device, value.dtype))
        if tensors:
            torch._foreach_mul_(tensors, masks)

    @torch.no_grad()
    def settle(self) -> None:
        """Set what has gone to zero once more, to one that has no sign."""
        for weight, mask in self._kept.items():
            weight.masked_fill_(mask.to(weight.device) == 0, 0)

    def refresh(self) -> dict[str, str]:
        """See whether the model is still the one that the masks are of, and bring them up to date with its edits.

        Returns:
            New names of weights, by the old ones.

        Raises:
            EditError: A weight was replaced or reshaped, and the model's history does not say how.
        """
        if not all(_is_in_place(self.model, weight, self._shapes[weight.parameter]) for weight in self.weights):
            return self.follow(self.model)
        return {}

    def follow(self, model: nn.Module) -> dict[str, str]:
        """Go on with what edits made of the model: the same parameters, or those of the same names in a copy.

        Returns:
            New names of weights, by the old ones.

        Raises:
            EditError: What became of a weight is not in the model's history.
        """
        names: dict[nn.Parameter, list[str]] = {}
        for name, held in model.named_parameters(remove_duplicate=False):
            names.setdefault(held, []).append(name)
        by_name = {name: held for held, several in names.items() for name in several}
        edits = history(model).entries[self._edits :]
        lost = losses(model, since=self._edits)
        kept: dict[nn.Parameter, torch.Tensor] = {}
        followed: list[Weight] = []
        weights: list[Weight] = []
        notes: list[str] = []
        for weight in self.weights:
            now = weight.parameter if weight.parameter in names else None
            if now is None and (edits or model is not self.model):
                now = by_name.get(weight.name) if model is not self.model else None
                if now is None:
                    notes.append(f"{weight.name} went with an edit")
                    continue
            if now is None:
                raise EditError(
                    "this weight was replaced by one that the pruner does not know",
                    path=weight.name,
                    found="another parameter" if weight.name in by_name else "none of this name",
                    hint="change the model with torchtrim's edits (copy=False), or make a new pruner for it",
                )
            steps = [next((step[name] for name in names[now] if name in step), None) for step in lost]
            mask = self._kept.get(weight.parameter)
            before = self._shapes[weight.parameter]
            chain = _chain(now.shape, tuple(before), [removed for removed in steps if removed])
            if chain is None:
                raise EditError(
                    "this weight has another shape, and the model's history does not say how it came by it",
                    path=weight.name,
                    found=list(now.shape),
                    expected=list(before),
                    hint="change the model with torchtrim's edits, or make a new pruner for it",
                )
            if mask is not None:
                for removed in chain:
                    mask = taken(mask, removed)
                kept[now] = mask
            if chain:
                notes.append(f"{weight.name} was narrowed from {list(before)} to {list(now.shape)}")
            rows = now.shape[weight.axis] * weight.inputs // max(before[weight.axis], 1)
            followed.append(weight)
            weights.append(replace(weight, name=names[now][0], names=tuple(names[now]), parameter=now, inputs=rows))
        if not weights:
            raise EditError("none of the weights are in the model any more", path=type(model).__name__)
        renamed = {old.name: new.name for old, new in zip(followed, weights, strict=True) if old.name != new.name}
        # Nothing below can fail.
        self.model, self.weights, self._kept = model, weights, kept
        self.notes += notes
        self._shapes = {weight.parameter: weight.parameter.shape for weight in weights}
        self._edits = len(history(model).entries)
        return renamed

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


def _chain(now: Sequence[int], before: tuple[int, ...], lost: list[Any]) -> list[Any] | None:
    """What a tensor lost since it had another shape, oldest first; `None` where that does not explain it."""
    for back, shape in enumerate(shapes_before(now, lost)):
        if shape == before:
            return lost[len(lost) - back :]
    return None


def _is_in_place(model: nn.Module, weight: Weight, shape: torch.Size) -> bool:
    held: Any = model
    *path, key = weight.name.split(".")
    for part in path:
        held = held._modules.get(part)
        if held is None:
            return False
    return held._parameters.get(key) is weight.parameter and weight.parameter.shape == shape
