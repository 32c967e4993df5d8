"""Parameter groups for an optimizer: layer decay, learning rates by part, no weight decay where it harms."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from torch import nn

from torchtrim.errors import SelectionError, nearest
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import module_ticks, run_if_known
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.train.parts import part_of


def param_groups(
    model: nn.Module,
    lr: float = 1e-3,
    *,
    layer_decay: float = 1.0,
    weight_decay: float = 0.05,
    lrs: Mapping[str, float] | None = None,
    no_decay: str | Iterable[str] = (),
    example_inputs: ExampleInputs | None = None,
) -> list[dict[str, Any]]:
    """Groups for any torch optimizer, with every trainable parameter in exactly one of them.

    With `layer_decay` below 1 the last layer learns at `lr` and each earlier one at `layer_decay` times the next (the
    scheme of BEiT, Bao et al. 2021). Layers are those of `model.group_matcher` where the model has that method (timm's
    do, and the scales equal those of timm's `param_groups_layer_decay`). Elsewhere they are the model's children
    that hold parameters, with `nn.Sequential` and `nn.ModuleList` taken apart into their elements, in the order of
    execution where `example_inputs` are given or known and of registration otherwise; a child that is never called
    learns at `lr`.

    Weight decay is 0 for biases, the weights of norms, everything with one dimension or none, what
    `model.no_weight_decay()` names where there is such a method, and what `no_decay` names.

    Args:
        model: The model; only parameters with `requires_grad` are taken.
        lr: The learning rate of the last layer.
        layer_decay: The factor from each layer to the one before it, above 0 and at most 1.
        weight_decay: Weight decay of the other parameters.
        lrs: Learning rates by path or glob, for all that lies below; layer decay does not touch these. A path may be
            that of a parameter (`pos_embed`), and so may a glob that fits no module.
        no_decay: A glob over parameter names (`*` matches dots too), or several, that get no weight decay.
        example_inputs: What the forward takes, for the order of layers.

    Returns:
        Dicts with `params`, `lr`, `weight_decay`, `name`, and `lr_scale` (the group's rate over `lr`; take it out
        where a scheduler, as timm's do, multiplies by it once more). The first layers come first.

    Raises:
        SelectionError: Nothing is trainable, two keys of `lrs` give one parameter different rates, a key of it or a
            glob of `no_decay` fits nothing, or a number is none or out of range.
        PathError: A path in `lrs` does not exist.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> for group in param_groups(net, lr=0.1, layer_decay=0.5):
        ...     print(group["name"], group["lr"], group["weight_decay"], len(group["params"]))
        layer 1 of 2 0.05 0.05 1
        layer 1 of 2, no weight decay 0.05 0.0 1
        layer 2 of 2 0.1 0.05 1
        layer 2 of 2, no weight decay 0.1 0.0 1
    """
    model = unwrap(model)
    _check_number("lr", lr, lambda value: value > 0, "a number above 0")
    _check_number("layer_decay", layer_decay, lambda value: 0 < value <= 1, "a number above 0 and at most 1")
    _check_number("weight_decay", weight_decay, lambda value: value >= 0, "a number from 0 up")
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not trainable:
        raise SelectionError(
            "no parameter of the model is trainable", found=type(model).__name__, hint="torchtrim.unfreeze(model, ...)"
        )
    given = _given_rates(model, lrs or {})
    layers = {} if layer_decay == 1 else depths(model, example_inputs)
    last = max(layers.values(), default=0)
    exempt = _without_decay(model, no_decay)

    groups: dict[str, dict[str, Any]] = {}
    depth: dict[str, int] = {}
    for name, parameter in trainable.items():
        layer = layers.get(name, last)
        label = f"layer {layer + 1} of {last + 1}" if layers else "all layers"
        rate = lr * layer_decay ** (last - layer)
        if name in given:
            label, rate = given[name]
        title = f"{label}, no weight decay" if name in exempt else label
        group = groups.setdefault(
            title,
            {
                "params": [],
                "lr": rate,
                "weight_decay": 0.0 if name in exempt else weight_decay,
                "name": title,
                "lr_scale": rate / lr if name in given else layer_decay ** (last - layer),
            },
        )
        group["params"].append(parameter)
        depth[title] = min(layer, depth.get(title, layer))
    return [groups[title] for title in sorted(groups, key=lambda title: (depth[title], title))]


def _check_number(name: str, value: object, fits: Callable[[Any], bool], expected: str) -> None:
    if not isinstance(value, Real):
        raise SelectionError("not a number", path=name, found=repr(value), expected=expected)
    if not (math.isfinite(value) and fits(value)):
        raise SelectionError("out of range", path=name, found=value, expected=expected)


def _given_rates(model: nn.Module, lrs: Mapping[str, float]) -> dict[str, tuple[str, float]]:
    """For each parameter that `lrs` covers: the key and its rate."""
    if not isinstance(lrs, Mapping) or not all(isinstance(key, str) for key in lrs):
        raise SelectionError("not rates by path", path="lrs", found=repr(lrs), expected="like {'head': 0.001}")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    given: dict[str, tuple[str, float]] = {}
    for key, rate in lrs.items():
        _check_number(f"lrs[{key!r}]", rate, lambda value: value >= 0, "a number from 0 up")
        for parameter in part_of(model, key).parameters:
            name = names[id(parameter)]
            other, before = given.setdefault(name, (key, rate))
            if before != rate:
                raise SelectionError(
                    "two learning rates are given for this parameter",
                    path=name,
                    found=f"{other!r}: {before} and {key!r}: {rate}",
                    hint="keys of lrs that do not overlap",
                )
    return given


def _without_decay(model: nn.Module, no_decay: str | Iterable[str]) -> set[str]:
    """Names of the parameters that weight decay leaves alone."""
    own = getattr(model, "no_weight_decay", None)
    # What a model names itself may be absent: timm's do so for every variant at once.
    named = _named(model, own() if callable(own) else ())
    for glob in [no_decay] if isinstance(no_decay, str) else no_decay:
        fitting = _named(model, [glob])
        if not fitting:
            names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
            below = any(name.startswith(f"{glob}.") for name in names)
            raise SelectionError(
                f"no parameter of {type(model).__name__} has a name that fits",
                path=f"no_decay={glob!r}",
                hint=f"{glob}.*" if below else nearest(str(glob).strip("*."), names),
            )
        named |= fitting
    exempt = set()
    for name, parameter in model.named_parameters():
        norm = isinstance(model.get_submodule(name.rpartition(".")[0]), _NORMS)
        bias = name.rpartition(".")[2] == "bias"
        if parameter.dim() <= 1 or norm or bias or parameter in named:
            exempt.add(name)
    return exempt


def _named(model: nn.Module, globs: Iterable[str]) -> set[nn.Parameter]:
    """The parameters with a name, a shared one's other names included, that fits one of these."""
    globs = [str(glob) for glob in globs]
    everything = model.named_parameters(remove_duplicate=False)
    return {parameter for name, parameter in everything if any(fnmatchcase(name, glob) for glob in globs)}


_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def depths(model: nn.Module, example_inputs: ExampleInputs | None) -> dict[str, int]:
    """The number of the layer of each parameter, from 0 for the first."""
    matcher = getattr(model, "group_matcher", None)
    if callable(matcher):
        return _matched_layers([name for name, _ in model.named_parameters()], matcher(coarse=False))
    return _depth_layers(model, example_inputs)


_Place = tuple[float, ...]
_JOINS_PREVIOUS = 99999.0


def _matched_layers(names: list[str], matcher: Mapping[str, Any] | Callable[[str], Any]) -> dict[str, int]:
    """Layers from a group matcher, as timm documents it.

    It is a function from a name to a place, or a dict of regular expressions: the place of a name is then the
    number of the expression that matches it, followed by the numbers it captures (and a suffix, where one is given).
    What matches nothing is last. Layers are numbered in the order of places; a place that ends in 99999 joins the
    layer before it.
    """
    if callable(matcher):
        places = {name: _as_place(matcher(name)) for name in names}
    else:
        rules: list[tuple[re.Pattern[str], int, _Place]] = []
        for number, rule in enumerate(matcher.values()):
            if rule is None:
                continue
            for expression, suffix in [(rule, None)] if isinstance(rule, str) else rule:
                rules.append((re.compile(expression), number, _as_place(suffix) if suffix is not None else ()))
        places = {name: _place(name, rules) for name in names}
    layer_of: dict[_Place, int] = {}
    layer = -1
    for place in sorted(set(places.values())):
        if layer < 0 or place[-1] != _JOINS_PREVIOUS:
            layer += 1
        layer_of[place] = layer
    return {name: layer_of[place] for name, place in places.items()}


def _place(name: str, rules: list[tuple[re.Pattern[str], int, _Place]]) -> _Place:
    for expression, number, suffix in rules:
        if found := expression.match(name):
            return (float(number), *(float(text) for text in found.groups() if text is not None), *suffix)
    return (float("inf"),)


def _as_place(value: Any) -> _Place:
    return tuple(float(part) for part in value) if isinstance(value, Iterable) else (float(value),)


def _depth_layers(model: nn.Module, example_inputs: ExampleInputs | None) -> dict[str, int]:
    units = _units(model)
    execution = run_if_known(model, example_inputs)
    ticks = module_ticks(model, execution) if execution is not None else {}
    reads = execution.first_use if execution is not None else {}
    never = max(ticks.values(), default=0) + 1
    if execution is not None:
        units.sort(key=lambda unit: ticks.get(unit, never))
    called = [unit for unit in units if unit in ticks] if execution is not None else units
    number = {unit: min(index, max(len(called) - 1, 0)) for index, unit in enumerate(units)}

    layers: dict[str, int] = {}
    for name, _ in model.named_parameters():
        unit = next((unit for unit in units if name.startswith(f"{unit}.")), None)
        if unit is not None:
            layers[name] = number[unit]
        else:
            # The model's own parameter goes with the layer that began last before it was read.
            before = [number[unit] for unit in called if ticks.get(unit, never) < reads.get(name, 0)]
            layers[name] = max(before, default=0)
    return layers


def _units(model: nn.Module) -> list[str]:
    """Paths of the layers: children with parameters, plain containers taken apart, a lone wrapper looked into."""

    def expand(module: nn.Module, path: str) -> list[str]:
        units: list[str] = []
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            if next(child.parameters(), None) is None:
                continue
            units.extend(expand(child, below) if type(child) in _CONTAINERS else [below])
        return units

    units = expand(model, "")
    while len(units) == 1 and (inner := expand(model.get_submodule(units[0]), units[0])):
        units = inner
    return units


_CONTAINERS = {nn.Sequential, nn.ModuleList, nn.ModuleDict}
