"""Which modules are the model's head: found from the outputs, not from a name or a type."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchtrim.graph.reader import Reader, Site, map_sites

# What these return is no tensor that a head could have computed, only a fact about one.
_FACTS = {"size", "dim", "type", "numel", "stride", "item", "shape", "device", "dtype", "ndim"}


def head_sites(reader: Reader) -> list[Site]:
    """The calls of the last layers with weights on the way to each output, those of train mode included.

    On the way back from an output, everything without parameters is passed: pooling, reshapes, activations, dropout,
    the mean of two heads. The first module with a weight matrix (or kernel) is a head; a normalisation ends the way
    without one, as does a block that could not be looked into. Where a head was taken out and an `nn.Identity` left in
    its place (`model.fc = nn.Identity()`), that is the head.
    """
    found: dict[str, Site] = {}
    for mode in ("eval", "train"):
        for output in _sites_in(reader.outputs[mode]):
            for site in _last_layers(output):
                found.setdefault(site.name, site)
    return list(found.values())


def _sites_in(value: Any) -> list[Site]:
    sites: list[Site] = []
    map_sites(value, sites.append)
    return sites


def _last_layers(output: Site) -> list[Site]:
    slot = _empty_slot(output)
    if slot is not None:
        return [slot]
    found: list[Site] = []
    seen: set[Site] = set()
    stack = [output]
    while stack:
        site = stack.pop()
        if site in seen:
            continue
        seen.add(site)
        if site.op == "module" and any(True for _ in site.target.parameters()):
            if is_layer(site.target):
                found.append(site)
        elif not _is_fact(site):
            stack += reversed(site.inputs)
    return found


def _empty_slot(output: Site) -> Site | None:
    """The `nn.Identity` that stands where the head was: the first one behind the last dropout."""
    slot: Site | None = None
    site = output
    while site.op == "module" and len(site.inputs) == 1:
        if isinstance(site.target, nn.Identity):
            slot = site
        elif is_layer(site.target):
            return None  # only identities behind a layer: the layer is the head
        else:
            break
        site = site.inputs[0]
    return slot


def _is_fact(site: Site) -> bool:
    if site.target is getattr:
        return len(site.args) > 1 and site.args[1] in _FACTS
    return site.op == "method" and site.target in _FACTS


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one linear map: it has a `weight` of two dimensions or more, and no children that compute."""
    weight = module._parameters.get("weight", getattr(module, "weight", None))
    return weight is not None and hasattr(weight, "dim") and weight.dim() >= 2
