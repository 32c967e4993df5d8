"""Which modules are the model's head: found from the outputs, not from a name or a type."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from torchtrim.graph.reader import Reader, Site
from torchtrim.graph.reading import function_name
from torchtrim.graph.structure import leaves

# What these return is no tensor that a head could have computed, only a fact about one.
_FACTS = {"size", "dim", "type", "numel", "stride", "item", "shape", "device", "dtype", "ndim"}


def head_sites(reader: Reader) -> list[Site]:
    """The calls of the last layers with weights on the way to each output, those of train mode included.

    On the way back from an output, everything without parameters is passed: pooling, reshapes, activations, dropout,
    the mean of two heads. The first module with a weight matrix (or kernel) is a head; a normalisation ends the way
    without one, as does a block that could not be looked into. A function that takes a weight matrix ends it too: then
    the site of that parameter is returned. Where a head was taken out and an `nn.Identity` left in
    its place (`model.fc = nn.Identity()`), that is the head.
    """
    found: dict[str, Site] = {}
    for mode in ("eval", "train"):
        for output in leaves(reader.outputs[mode], Site):
            for site in _last_layers(output):
                found.setdefault(site.name, site)
    return list(found.values())


def _last_layers(output: Site) -> list[Site]:
    found: dict[Site, None] = {}
    seen: set[tuple[Site, Site | None]] = set()
    stack: list[tuple[Site, _Slot]] = [(output, _Slot())]
    while stack:
        site, slot = stack.pop()
        if (site, slot.site) in seen:
            continue
        seen.add((site, slot.site))
        if site.op == "module" and any(True for _ in site.target.parameters()):
            # Nothing but identities between a layer and the output: the layer is the head, and no hidden one.
            head = site if is_layer(site.target) and not (slot.site and slot.left) else slot.site
            if head is not None:
                found.setdefault(head)
        elif site.op == "input" and slot.site is not None:
            found.setdefault(slot.site)
        elif function_name(site.target) != "embedding" and any(_is_weights(source) for source in site.inputs):
            found.setdefault(slot.site or next(source for source in site.inputs if _is_weights(source)))
        elif not _is_fact(site):
            stack += [(source, slot.before(site)) for source in reversed(site.inputs)]
    return list(found)


@dataclass(frozen=True)
class _Slot:
    """The `nn.Identity` where a head was, on one way back from an output: the first one behind the last dropout.

    Attributes:
        site: The identity, once one was met.
        closed: A dropout lies behind it, so no earlier identity is meant.
        left: Something that computes lies behind it.
    """

    site: Site | None = None
    closed: bool = False
    left: bool = False

    def before(self, site: Site) -> _Slot:
        """What is known once `site` has been passed."""
        if isinstance(site.target, nn.Identity):
            return self if self.closed or self.left else replace(self, site=site)
        if isinstance(site.target, nn.Dropout):
            return replace(self, closed=True)
        return replace(self, left=True) if self.site is not None else self


def _is_fact(site: Site) -> bool:
    if site.target is getattr:
        return len(site.args) > 1 and site.args[1] in _FACTS
    return site.op == "method" and site.target in _FACTS


def _is_weights(site: Site) -> bool:
    """Whether a site is a parameter that a function could multiply by, as in `F.linear(x, self.embedding.weight)`."""
    return site.op == "attribute" and isinstance(site.target, nn.Parameter) and site.target.dim() >= 2


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one linear map: it has a `weight` of two dimensions or more, and no children that compute."""
    weight = module._parameters.get("weight", getattr(module, "weight", None))
    return weight is not None and hasattr(weight, "dim") and weight.dim() >= 2
