"""Which weights of a model may be made sparse or shared, and why the others are left as they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from torchtrim.errors import EditError, ModelError, PathError, SelectionError, nearest
from torchtrim.graph.execution import refuse_lazy, run_if_known
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.paths import What, covered, is_glob, matches, several, unknown

_FIRST, _LAST = "the first layer", "the last layer"
_SMALL = "a bias, a norm or a scale: fewer than two dimensions"
_TABLE = "an embedding: its rows are looked up, not multiplied by"
_OTHER = "not a layer's weight"
_WHOLE = "not floating point"
_NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)  # of several dimensions too


@dataclass(frozen=True, eq=False)
class Weight:
    """A weight of a model, once however often it is shared.

    Attributes:
        name: Its full name, the first of several: `layer1.0.conv1.weight`.
        names: All of them.
        parameter: The weight.
        axis: The dimension along which inputs lie.
        inputs: How many inputs each output reads along it.
    """

    name: str
    names: tuple[str, ...]
    parameter: nn.Parameter
    axis: int
    inputs: int


@dataclass(frozen=True)
class Chosen:
    """The weights that a selection comes to.

    Attributes:
        weights: The weights, in the order of the model.
        left_out: The names of the other parameters, and why.
    """

    weights: tuple[Weight, ...]
    left_out: dict[str, str]


def choose(
    model: nn.Module,
    include: What | Iterable[What] | None = None,
    exclude: What | Iterable[What] = (),
    *,
    also: Iterable[str] = (),
    inputs: Inputs | None = None,
) -> Chosen:
    """The weights of a model that may be changed one by one.

    By default the weights of its layers (two dimensions or more), without embeddings, and without the first and the
    last of them: in the order of execution where inputs are given or known, else in that of registration.

    Args:
        model: The model.
        include: Only what lies in these, in place of the default: paths (those of parameters too), globs, types,
            predicates. The first and the last layer are then not left out by themselves.
        exclude: What is left out besides.
        also: Paths and globs that numbers are given for: what a path among them names is not left out by default.
        inputs: For the order of execution.

    Raises:
        PathError: No such path; the nearest are named.
        SelectionError: Nothing fits a selection.
        EditError: Nothing is left.
        ModelError: A weight is lazy, on the meta device, parametrized, or masked by `torch.nn.utils.prune`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
        >>> found = choose(net)
        >>> [weight.name for weight in found.weights], found.left_out["2.weight"]
        (['1.weight'], 'the last layer')
    """
    refuse_lazy(model)
    places: dict[nn.Parameter, list[tuple[str, nn.Module, str]]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for key, held in module._parameters.items():
            if held is not None:
                places.setdefault(held, []).append((f"{path}.{key}" if path else key, module, key))
    left_out = {names[0][0]: reason for held, names in places.items() if (reason := _unfit(held, names)) is not None}
    if include is not None:
        wanted = named(model, include)
        never = {_SMALL, _WHOLE}
        left_out = {name: why for name, why in left_out.items() if why in never}
        left_out = {
            **{names[0][0]: "not included" for held, names in places.items() if held not in wanted},
            **{name: why for name, why in left_out.items() if why in never},
        }
    else:
        order = _ordered(model, [held for held, names in places.items() if names[0][0] not in left_out], places, inputs)
        for held, reason in zip(order[:1] + order[1:][-1:], (_FIRST, _LAST), strict=False):
            left_out[places[held][0][0]] = reason
        for held in named(model, [what for what in also if not is_glob(what)]):
            if left_out.get(places[held][0][0]) in (_FIRST, _LAST, _TABLE):
                del left_out[places[held][0][0]]
    for held in named(model, exclude):
        left_out.setdefault(places[held][0][0], "excluded")
    found = [
        _weight(held, names)
        for held, names in places.items()
        if names[0][0] not in left_out and not _refused(held, names)
    ]
    if not found:
        reasons: dict[str, str] = {}
        for name, why in left_out.items():
            reasons.setdefault(why, name)
        raise EditError(
            "no weights are left to choose from",
            path=type(model).__name__,
            found="; ".join(f"{name}: {why}" for why, name in list(reasons.items())[:5]) or "no parameters",
            hint='include=, which names layers (the first and the last too): include="**"',
        )
    return Chosen(tuple(found), left_out)


def named(model: nn.Module, what: What | Iterable[What]) -> dict[nn.Parameter, None]:
    """The parameters that a selection names, in order: those of modules and all within them, or by their own names.

    Raises:
        PathError: Neither a module nor a parameter of this name; the nearest of both are named.
        SelectionError: Nothing fits.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Parameter, None] = {}
    for item in several(what):
        if isinstance(item, str) and item not in modules:
            if item in parameters:
                found.setdefault(parameters[item])
                continue
            if not is_glob(item):
                raise unknown(model, item, parameters=True)
            if not any(path and matches(path, item) for path in modules):
                fitting = [held for name, held in parameters.items() if matches(name, item)]
                if not fitting:
                    hint = nearest(item.replace("*", "").strip("."), filter(None, (*modules, *parameters)))
                    raise SelectionError(f"nothing in {type(model).__name__} fits {item!r}", hint=hint)
                found |= dict.fromkeys(fitting)
                continue
        for path in covered(model, item):
            own = modules[path]._parameters.values()
            found |= {held: None for held in own if held is not None}
    return found


def by_weight(model: nn.Module, weights: Iterable[Weight], asked: Mapping[str, float]) -> dict[str, float]:
    """Numbers by path or glob as numbers by weight: of several that fit the first counts; others are absent.

    Raises:
        PathError: No such path.
        SelectionError: A key fits none of the weights.
    """
    chosen = {weight.parameter: weight.name for weight in weights}
    found: dict[str, float] = {}
    for what, number in asked.items():
        fitting = [chosen[held] for held in named(model, what) if held in chosen]
        if not fitting:
            raise SelectionError(
                "none of the weights that may be pruned lie there", path=what, hint="include=, which takes them in"
            )
        for name in fitting:
            found.setdefault(name, number)
    return found


def held_at(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """The parameters of these full names.

    Raises:
        PathError: One is not there; the nearest are named.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    missing = [name for name in names if name not in parameters]
    if missing:
        raise PathError(
            "the model has no such parameter",
            path=missing[0],
            found=f"{len(missing)} missing",
            hint=nearest(missing[0], parameters) or "the model that the record was made of",
        )
    return {name: parameters[name] for name in names}


def _unfit(held: nn.Parameter, names: list[tuple[str, nn.Module, str]]) -> str | None:
    """Why a parameter is left out by default; `None` where it is not."""
    if not (held.is_floating_point() or held.is_complex()):
        return _WHOLE
    if held.dim() < 2:
        return _SMALL
    if all(isinstance(module, (nn.Embedding, nn.EmbeddingBag)) for _, module, _ in names):
        return _TABLE
    if any(isinstance(module, _NORMS) for _, module, _ in names):
        return _SMALL
    return None if any(_is_weight(name) for name, _, _ in names) else _OTHER


def _is_weight(name: str) -> bool:
    path, _, key = name.rpartition(".")
    plain = key == "weight" or key.startswith("weight_") or key.endswith("_weight")
    return plain or ".parametrizations." in f".{path}."


def _refused(held: nn.Parameter, names: list[tuple[str, nn.Module, str]]) -> bool:
    """Refuse a weight that is no plain parameter with values.

    Raises:
        ModelError: It is none.
    """
    name, module, key = names[0]
    if held.is_meta:
        raise ModelError("a weight on the meta device has no values", path=name, hint="load its weights first")
    if hasattr(held, "device_mesh"):
        raise ModelError("a sharded weight is not all here", path=name, hint="prune the model, then shard it")
    if ".parametrizations." in f".{name}." or is_parametrized(module, key):
        raise ModelError(
            "a parametrized weight is computed anew in every forward: what is written into it does not last",
            path=name,
            hint="torch.nn.utils.parametrize.remove_parametrizations first, or exclude= it",
        )
    plain = key.removesuffix("_orig").removesuffix("_v").removesuffix("_g")
    if plain != key and plain in module.__dict__:
        masked = f"{plain}_mask" in module._buffers
        norm = "remove_spectral_norm" if f"{plain}_u" in module._buffers else "remove_weight_norm"
        raise ModelError(
            "this weight is masked by torch.nn.utils.prune" if masked else "this weight is computed from others",
            path=name,
            hint=f"torch.nn.utils.{'prune.remove' if masked else norm} first, or exclude= it",
        )
    return False


def _weight(held: nn.Parameter, names: list[tuple[str, nn.Module, str]]) -> Weight:
    module = names[0][1]
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd) or _is_conv1d(module)
    axis = 0 if transposed else 2 if isinstance(module, nn.Bilinear) else 1
    return Weight(names[0][0], tuple(name for name, _, _ in names), held, axis, inputs_of(module, held, axis))


def inputs_of(module: nn.Module, held: torch.Tensor, axis: int) -> int:
    """How many inputs each output of a layer reads along the dimension of its weight in which inputs lie."""
    return held.shape[axis] // (module.groups if isinstance(module, nn.modules.conv._ConvTransposeNd) else 1)


def _is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the linear layer of transformers' GPT-2, whose weight has its inputs first."""
    return any(
        (kind.__module__, kind.__name__) == ("transformers.pytorch_utils", "Conv1D") for kind in type(module).__mro__
    )


def _ordered(
    model: nn.Module,
    fit: list[nn.Parameter],
    places: Mapping[nn.Parameter, list[tuple[str, nn.Module, str]]],
    inputs: Inputs | None,
) -> list[nn.Parameter]:
    """Weights in the order in which they are first read; those that are never read are not among them."""
    if inputs is not None and not inputs.tensors:
        inputs = None
    execution = run_if_known(model, inputs)
    if execution is None:
        return fit
    ticks = {
        held: [execution.first_use[name] for name, _, _ in places[held] if name in execution.first_use] for held in fit
    }
    return sorted((held for held in fit if ticks[held]), key=lambda held: min(ticks[held]))
