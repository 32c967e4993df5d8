"""Tensors that belong to weights, entry by entry, and are narrowed with them when the model is edited."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchtrim.edits.history import Applied, history
from torchtrim.edits.sparse_weights import Weight, inputs_of
from torchtrim.errors import EditError
from torchtrim.train.lost import losses, shapes_before, taken


class Followed:
    """A tensor for each of some weights, of the weight's shape.

    Attributes:
        model: The model.
        weights: The weights, in order.
        held: The tensors; a weight may be without.
        notes: What became of weights that an edit changed.
    """

    def __init__(self, model: nn.Module, weights: Iterable[Weight]) -> None:
        self.model = model
        self.weights = list(weights)
        self.held: dict[nn.Parameter, torch.Tensor] = {}
        self.notes: list[str] = []
        self._shapes = {weight.parameter: weight.parameter.shape for weight in self.weights}
        self._edits = len(history(model).entries)

    def refresh(self) -> dict[str, str]:
        """See whether the model is still the one that these are of, and bring them up to date with its edits.

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
            if now is None:
                now = by_name.get(weight.name) if model is not self.model else None
                if now is None and _may_take(edits, weight.name):
                    notes.append(f"{weight.name} went with an edit")
                    continue
            if now is None:
                raise EditError(
                    "this weight was replaced by another, which nothing is known of",
                    path=weight.name,
                    found="another parameter" if weight.name in by_name else "none of this name",
                    hint="change the model with torchtrim's edits (copy=False), or begin anew with it",
                )
            steps = [next((step[name] for name in names[now] if name in step), None) for step in lost]
            mask = self.held.get(weight.parameter)
            before = self._shapes[weight.parameter]
            chain = _chain(now.shape, tuple(before), [removed for removed in steps if removed])
            if chain is None:
                raise EditError(
                    "this weight has another shape, and the model's history does not say how it came by it",
                    path=weight.name,
                    found=list(now.shape),
                    expected=list(before),
                    hint="change the model with torchtrim's edits, or begin anew with it",
                )
            if mask is not None:
                for removed in chain:
                    mask = taken(mask, removed)
                kept[now] = mask
            if chain:
                notes.append(f"{weight.name} was narrowed from {list(before)} to {list(now.shape)}")
            several = tuple(names[now])
            owner = model.get_submodule(several[0].rpartition(".")[0])
            inputs = inputs_of(owner, now, weight.axis)  # groups may have gone, or inputs of each
            followed.append(weight)
            weights.append(replace(weight, name=several[0], names=several, parameter=now, inputs=inputs))
        if not weights:
            raise EditError("none of the weights are in the model any more", path=type(model).__name__)
        renamed = {old.name: new.name for old, new in zip(followed, weights, strict=True) if old.name != new.name}
        # Nothing below can fail.
        self.model, self.weights, self.held = model, weights, kept
        self.notes += notes
        self._shapes = {weight.parameter: weight.parameter.shape for weight in weights}
        self._edits = len(history(model).entries)
        return renamed


def _may_take(edits: Sequence[Applied], name: str) -> bool:
    """Whether an edit can have taken a weight out of the model: those that only narrow or set values do not."""
    return any(
        any(name.startswith(f"{gone}.") for gone in each.removed)
        or (each.edit.needs_inputs and not hasattr(each.edit, "narrowed"))
        for each in edits
    )


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
