"""A map folded into the layer before or behind it, so that it costs nothing when the model runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchtrim.edits.heal_maps import Map
from torchtrim.edits.joint import Seen, observe
from torchtrim.graph.inputs import Inputs

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def folded(model: nn.Module, place: str, mapping: Map, inputs: Inputs) -> dict[str, torch.Tensor] | None:
    """New values of a neighbour's parameters that do what a map at `place` would do; `None` where no neighbour can.

    The layer before can take it where nothing else looks at its output: a linear layer or convolution with a bias, or
    a norm layer's scales and biases where each channel is mapped by itself. The layer behind can, where it is the only
    one that looks at the value: a linear layer, or a convolution, without padding where the map has a bias.

    Args:
        model: The model, with a module at `place` that hands on a copy of its input.
        place: The path of that module.
        mapping: The map.
        inputs: Example inputs.
    """
    able = {path for path, module in model.named_modules() if isinstance(module, (nn.Linear, *_NORMS, *_CONVS))}
    calls = observe(model, inputs, False, able | {place})
    own = [seen for seen in calls if seen.key[0] == place]
    if len(own) != 1:
        return None
    (here,) = own
    for seen in calls:
        if seen is here or not _is_private(model, calls, seen):
            continue
        layer = model.get_submodule(seen.key[0])
        if seen.result is here.value and all(here.key in stack for stack in seen.uses) and not seen.returned:
            values = _before(layer, mapping)
        elif seen.value is here.result and not here.returned and all(seen.key in stack for stack in here.uses):
            values = _behind(layer, mapping)
        else:
            continue
        if values is not None:
            return {f"{seen.key[0]}.{name}": value for name, value in values.items()}
    return None


def _is_private(model: nn.Module, calls: list[Seen], seen: Seen) -> bool:
    """Whether a layer is called once, and its parameters are nobody else's."""
    if sum(other.key[0] == seen.key[0] for other in calls) != 1:
        return False
    layer = model.get_submodule(seen.key[0])
    held = [id(each) for module in model.modules() for each in module._parameters.values() if each is not None]
    return all(held.count(id(each)) == 1 for each in layer.parameters())


def _before(layer: nn.Module, mapping: Map) -> dict[str, torch.Tensor] | None:
    weight, bias = _vectors(layer)
    if weight is None or bias is None or bias.shape != mapping.bias.shape:
        return None
    diagonal = mapping.weight.dim() == 1
    if isinstance(layer, _NORMS) and diagonal and weight.shape == bias.shape:
        return _like(layer, weight * mapping.weight, bias * mapping.weight + mapping.bias)
    if isinstance(layer, (nn.Linear, *_CONVS)) and (diagonal or getattr(layer, "groups", 1) == 1):
        full = torch.diag(mapping.weight) if diagonal else mapping.weight
        return _like(layer, torch.einsum("i...,io->o...", weight, full), bias @ full + mapping.bias)
    return None


def _behind(layer: nn.Module, mapping: Map) -> dict[str, torch.Tensor] | None:
    weight, bias = _vectors(layer)
    plain = isinstance(layer, nn.Linear) or (isinstance(layer, _CONVS) and layer.groups == 1 and _unpadded(layer))
    if weight is None or bias is None or not plain or weight.shape[1:2] != mapping.bias.shape:
        return None
    full = torch.diag(mapping.weight) if mapping.weight.dim() == 1 else mapping.weight
    through = torch.einsum("oi...,i->o", weight.flatten(2).sum(2) if weight.dim() > 2 else weight, mapping.bias)
    return _like(layer, torch.einsum("oj...,ij->oi...", weight, full), bias + through)


def _unpadded(layer: Any) -> bool:
    return bool(layer.padding == "valid" or (not isinstance(layer.padding, str) and not any(layer.padding)))


def _vectors(layer: nn.Module) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    weight, bias = layer._parameters.get("weight"), layer._parameters.get("bias")
    return (None if weight is None else weight.detach().double()), (None if bias is None else bias.detach().double())


def _like(layer: nn.Module, weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    kept: Any = layer
    return {"weight": weight.to(kept.weight.dtype), "bias": bias.to(kept.bias.dtype)}
