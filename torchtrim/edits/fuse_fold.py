"""One batch norm and the layer that takes it over: whether it can be, and the arithmetic."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from torchtrim.edits.neighbours import Neighbours
from torchtrim.edits.norms import affine, behind, noise, tried
from torchtrim.edits.work import Work
from torchtrim.graph.check import differs
from torchtrim.graph.copying import structural_copy

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Fold:
    """A batch norm, and the layer that takes it over.

    Attributes:
        norm: The path of the norm.
        layer: The path of the layer.
        behind: Whether the norm is behind the layer (and not before it).
        rest: What stays in the norm's place.
    """

    norm: str
    layer: str
    behind: bool
    rest: nn.Module

    def do(self, work: Work) -> None:
        """Fold it in the model."""
        layer, norm = (work.model.get_submodule(path) for path in (self.layer, self.norm))
        weight, bias = _folded(layer, norm, self.behind)
        kept = work.reshape(layer, "weight", weight)
        if layer._parameters["bias"] is None:
            layer._parameters["bias"] = nn.Parameter(bias, requires_grad=kept.requires_grad)
        else:
            work.reshape(layer, "bias", bias)
        work.put(self.norm, self.rest.train(norm.training))


def fold_of(model: nn.Module, path: str, around: Neighbours, taken: Set[str]) -> Fold | str:
    """How to fold a norm; where it cannot be, the reason.

    Args:
        model: The model.
        path: The path of the norm.
        around: What feeds what.
        taken: The layers that already take over a norm before them.
    """
    norm = model.get_submodule(path)
    if path not in around.sources:
        return "it is never called for these inputs"
    if _has_hooks(norm):
        return "it has hooks"
    sources = around.sources[path]
    source = next(iter(sources)) if len(sources) == 1 else None
    reason = _refusal_behind(model, path, source, around)
    if reason is None and source is not None:
        rest = behind(norm, around.shapes[path][0])
        if rest is None:
            return f"{type(norm).__name__} does more than multiply and add in eval mode"
        fold = Fold(path, source, True, rest)
        return fold if _holds(model, fold, around) else f"{source!r} computes its weight in a way of its own"
    users = around.users[path]
    user = next(iter(users)) if len(users) == 1 else None
    if user is None or _refusal_before(model, path, user, around, taken) is not None:
        return reason or "nothing next to it takes it over"
    rest = behind(norm, around.shapes[path][0])
    if not isinstance(rest, nn.Identity):
        return reason or "nothing next to it takes it over"
    fold = Fold(path, user, False, rest)
    return fold if _holds(model, fold, around) else f"{user!r} computes its weight in a way of its own"


def _refusal_behind(model: nn.Module, path: str, source: str | None, around: Neighbours) -> str | None:
    """Why the layer before a norm cannot take it over."""
    if source is None:
        return "what it is given does not come from one layer alone"
    layer = model.get_submodule(source)
    users = around.users[source]
    if users != {path}:
        others = ", ".join(sorted(users - {path}))
        return f"the output of {source!r} is used by {others} too"
    if isinstance(layer, nn.Linear) and len(around.shapes[source][1]) != 2:
        return f"its channels are not those of {source!r}, whose output has {len(around.shapes[source][1])} dimensions"
    return _refusal(model, source)


def _refusal_before(model: nn.Module, path: str, user: str, around: Neighbours, taken: Set[str]) -> str | None:
    """Why the layer behind a norm cannot take it over."""
    if around.sources.get(user) != {path}:
        return f"{user!r} is given other values too"
    layer = model.get_submodule(user)
    if user in taken:
        return f"{user!r} takes over another"
    if isinstance(layer, _TRANSPOSED) or not isinstance(layer, (*_CONVOLUTIONS, nn.Linear)):
        return f"{user!r} is no convolution or linear layer"
    if isinstance(layer, nn.Linear) and len(around.shapes[user][0]) != 2:
        return f"its channels are not those of {user!r}"
    if not isinstance(layer, nn.Linear) and layer.padding != "valid" and any(layer.padding):
        return f"{user!r} pads what the norm returns"
    return _refusal(model, user)


def _refusal(model: nn.Module, path: str) -> str | None:
    layer = model.get_submodule(path)
    if not isinstance(layer, (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear)):
        return f"{path!r} is no convolution or linear layer"
    if is_parametrized(layer) or "weight" not in layer._parameters:
        return f"the weight of {path!r} is computed from others"
    if _has_hooks(layer):
        return f"{path!r} has hooks"
    own = [held for held in layer._parameters.values() if held is not None]
    for module in model.modules():
        if module is not layer and any(held is each for held in module._parameters.values() for each in own):
            return f"{path!r} shares its weights"
    return None


def _has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks)


def _folded(layer: nn.Module, norm: nn.Module, behind: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's weight and bias, the norm included."""
    held: Any = layer
    scale, shift = affine(norm)
    weight = held.weight.detach().double()
    groups = 1 if isinstance(layer, nn.Linear) else held.groups
    ones = (1,) * (weight.dim() - 2)
    if behind:
        bias = shift if held.bias is None else held.bias.detach().double() * scale + shift
        if isinstance(layer, _TRANSPOSED):  # (in, out / groups, ...), the groups one after the other
            parts = weight.reshape(groups, -1, *weight.shape[1:]) * scale.reshape(groups, 1, -1, *ones)
            weight = parts.reshape(weight.shape)
        else:
            weight = weight * scale.reshape(-1, 1, *ones)
    else:  # (out, in / groups, ...): every group of outputs sees its own group of inputs
        parts = weight.reshape(groups, -1, *weight.shape[1:])
        added = (parts * shift.reshape(groups, 1, -1, *ones)).flatten(2).sum(2).flatten()
        bias = added if held.bias is None else held.bias.detach().double() + added
        weight = (parts * scale.reshape(groups, 1, -1, *ones)).reshape(weight.shape)
    return weight.to(held.weight.dtype), bias.to(held.weight.dtype)


def _holds(model: nn.Module, fold: Fold, around: Neighbours) -> bool:
    """Whether a layer of some other class, with the folded weights, does what the two did."""
    layer, norm = (model.get_submodule(path) for path in (fold.layer, fold.norm))
    if type(layer) in (*_CONVOLUTIONS, *_TRANSPOSED, nn.Linear):
        return True
    if next(layer.parameters()).is_meta:
        return False
    twin = structural_copy(layer)
    weight, bias = _folded(layer, norm, fold.behind)
    twin._parameters.update(weight=nn.Parameter(weight), bias=nn.Parameter(bias))
    first, second = (layer, norm) if fold.behind else (norm, layer)
    given = noise(around.shapes[fold.layer if fold.behind else fold.norm][0], layer)
    expected = tried(second, tried(first, given))
    found = tried(fold.rest, tried(twin, given))
    return differs(expected, found) is None
