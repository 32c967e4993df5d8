"""Bring every attribute that counts channels up to date, in a model that lost some."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from torchtrim.channels.cost import Sizes
from torchtrim.channels.follow import Flow, ModuleCall, shape_after
from torchtrim.channels.labels import Label, Mask, kept_indices, varying
from torchtrim.channels.rules import Shape
from torchtrim.channels.settle import settle
from torchtrim.channels.widths import Attribute, attributes_of
from torchtrim.edits.adapter_layers import FitChannels
from torchtrim.errors import EditError

Numbers = dict[str, dict[str, Any]]


def tell_the_truth(model: nn.Module, flow: Flow, gone: Mask, changed: set[nn.Module]) -> Numbers:
    """Bring the attributes that count channels up to date: of the layers that lost some, and of modules around them.

    What a forward reads is worked out from where it is given as a size (`settle`); of the rest, layers of torch tell
    by their weights, and others by an attribute's name and a width that they take, give or hold.

    Args:
        model: The narrowed model.
        flow: Its channels, from before.
        gone: The channels that went.
        changed: The modules whose tensors lost something.

    Returns:
        What was changed, as plain data for `set_attributes`: `{module path: {attribute: value}}`.
    """
    before = _numbers(model)
    calls = {path: call for run in reversed(flow.runs) for path, found in run.calls.items() for call in found[:1]}
    modules = dict(model.named_modules())
    for attribute, value in settle(flow, gone).attributes.items():
        if attribute.path in modules:
            _put(modules[attribute.path], attribute, value)
    for path, module in modules.items():
        call = calls.get(path)
        if module in changed:
            _from_weights(module)
        if call is not None:
            _from_call(module, call, gone)
    _from_names(model, flow, gone, calls, before)
    _heads(model, flow, gone, calls, before)
    _features(model, [path for path, found in flow.runs[0].calls.items() if found], calls, gone)
    _stages(model, calls, gone)
    return {
        path: changes
        for path, now in _numbers(model).items()
        if (changes := {name: value for name, value in now.items() if before[path].get(name) != value})
    }


def set_attributes(model: nn.Module, data: Mapping[str, Mapping[str, Any]]) -> None:
    """Set attributes of modules as `tell_the_truth` found them.

    Raises:
        EditError: The model has no such module or attribute. Nothing is changed.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found = []
    for path, values in data.items():
        for name, value in values.items():
            *outer, last = name.split(".")
            owner: Any = modules.get(path)
            for each in outer:
                owner = getattr(owner, each, None)
            if last not in getattr(owner, "__dict__", ()):
                raise EditError("the record names an attribute that the model does not have", path=path, found=name)
            found.append((owner.__dict__, last, _like(value, owner.__dict__[last])))
    for held, last, value in found:
        held[last] = value


def _like(value: Any, old: Any) -> Any:
    """A value from plain data in the form of the one it replaces."""
    if isinstance(old, (tuple, list)) and isinstance(value, (tuple, list)) and len(old) == len(value):
        return type(old)(_like(each, other) for each, other in zip(value, old, strict=True))
    if isinstance(old, dict) and isinstance(value, Mapping):
        return {key: _like(value.get(str(key), value.get(key)), each) for key, each in old.items()}
    return value


def _numbers(model: nn.Module) -> Numbers:
    """Every whole number that a module holds, by itself or in lists and dicts, as plain data."""
    found: Numbers = {}
    for path, module in model.named_modules():
        held = {name: _plain(value) for name, value in module.__dict__.items() if _counts(value)}
        stages = getattr(module.__dict__.get("feature_info"), "info", None)
        if _counts(stages):
            held["feature_info.info"] = _plain(stages)
        found[path] = held
    return found


def _counts(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (tuple, list, dict)) and depth < _DEEPEST:
        return any(_counts(each, depth + 1) for each in (value.values() if isinstance(value, dict) else value))
    return type(value) is int


_DEEPEST = 3


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    return [_plain(each) for each in value] if isinstance(value, (tuple, list)) else value


def _put(module: nn.Module, attribute: Attribute, value: int) -> None:
    """Set an attribute, or a part of one; what it lies in is made anew, for others may hold the old one."""

    def within(old: Any, keys: tuple[Any, ...]) -> Any:
        if not keys:
            return value
        if isinstance(old, dict):
            return {key: within(each, keys[1:]) if key == keys[0] else each for key, each in old.items()}
        return type(old)(within(each, keys[1:]) if key == keys[0] else each for key, each in enumerate(old))

    module.__dict__[attribute.name] = within(module.__dict__[attribute.name], attribute.keys)


_WIDTHS = re.compile(
    r"(^|_)(kdim|vdim|chs|channels|features|planes|dim|dims|width|filters|hidden_size|head_size|inner_size|embed_size|intermediate_size|model|ff)(_|$)"
)


_TAKEN, _GIVEN = re.compile("in_|input_"), re.compile("out_|output_")


def _from_names(model: nn.Module, flow: Flow, gone: Mask, calls: Mapping[str, ModuleCall], before: Numbers) -> None:
    """Numbers that no forward reads, by their name: they follow a width of the same size.

    First one that the module takes or gives (what is called `in_` one that it takes), then one that a module in it
    does. Where several widths of that size came out differently, the number stays.
    """
    seen = {attribute for demand in flow.demands for attribute in attributes_of(demand.source)}
    for path, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            continue  # its weights tell
        named = [
            attribute
            for name, value in before[path].items()
            if _WIDTHS.search(name) and name in module.__dict__
            for attribute, size in _each(Attribute(path, name), value)
            if size > 1 and attribute not in seen and _held(module, attribute) == size
        ]
        if not named or not (own := calls.get(path)):
            continue
        inner = list(_inside(calls, path, module))
        for attribute in named:
            name, size = attribute.name, _held(module, attribute)
            sides = own.given if _TAKEN.match(name) else own.outputs if _GIVEN.match(name) else None
            known = sides is not None and any(size in shape for shape, _ in sides)
            for values in ([*own.given, *own.outputs] if sides is None else sides, () if known else inner):
                after = _became(values, gone).get(size, set())
                if len(after) == 1:
                    _put(module, attribute, next(iter(after)))
                    break


def _each(attribute: Attribute, value: Any) -> Iterator[tuple[Attribute, int]]:
    """A number that a module holds, or each of those in a list."""
    if type(value) is int:
        yield attribute, value
    elif isinstance(value, list):
        yield from ((replace(attribute, keys=(key,)), item) for key, item in enumerate(value) if type(item) is int)


def _held(module: nn.Module, attribute: Attribute) -> Any:
    """What a number is now; `None` where there is none any more."""
    value = module.__dict__[attribute.name]
    for key in attribute.keys:
        value = value[key] if isinstance(value, (tuple, list)) and key < len(value) else None
    return value if type(value) is int else None


def _inside(calls: Mapping[str, ModuleCall], path: str, module: nn.Module) -> Iterator[tuple[Shape, Label]]:
    """What the modules in a module are given and give; lists of modules, which are not called, stand for theirs."""
    for name, child in module.named_children():
        inner = f"{path}.{name}".lstrip(".")
        if inner in calls:
            yield from _values(calls, inner, child)
        else:
            yield from _inside(calls, inner, child)


_HEADS = re.compile(r"(^|_|n)heads?$")


def _heads(model: nn.Module, flow: Flow, gone: Mask, calls: Mapping[str, ModuleCall], before: Numbers) -> None:
    """Numbers of heads that no forward reads: they follow the heads that the layers inside make."""
    seen = {attribute for demand in flow.demands for attribute in attributes_of(demand.source)}
    tables = {layer.tobytes(): layer for layer, _ in flow.channels.heads}.values()
    for path, module in model.named_modules():
        names = [name for name, value in before[path].items() if type(value) is int and _HEADS.search(name)]
        names = [name for name in names if Attribute(path, name) not in seen and name in module.__dict__]
        if not names:
            continue
        made = np.zeros(gone.size, dtype=bool)
        for name, child in module.named_children():
            for _, label in _values(calls, f"{path}.{name}", child):
                for layer in label.layers:
                    made[layer] = True
        for name in names:
            after = {
                int((~gone[each]).any(axis=1).sum())
                for each in tables
                if len(each) == before[path][name] and made[each].all()
            }
            if len(after) == 1:
                module.__dict__[name] = after.pop()


def _values(calls: Mapping[str, ModuleCall], path: str, module: nn.Module) -> Iterable[tuple[Shape, Label]]:
    call = calls.get(path.lstrip("."))
    return () if call is None else (*call.given, *call.outputs)


def _became(values: Iterable[tuple[Shape, Label]], gone: Mask) -> dict[int, set[int]]:
    """What each width of some values is afterwards."""
    told = [(shape, label) for shape, label in values if label.layers]
    found: dict[int, set[int]] = {}
    for (shape, label), after in zip(told, Sizes.of([tuple(told)]).after(gone)[0], strict=True):
        for axis in frozenset().union(*map(varying, label.layers)) - _batch(shape):
            found.setdefault(shape[axis], set()).add(after[axis])
    return found


def _features(model: nn.Module, order: list[str], calls: Mapping[str, ModuleCall], gone: Mask) -> None:
    """The count of the features that the last layer takes, in the model and in what the layer lies in."""
    modules = dict(model.named_modules())
    leaves = [path for path in order if path in modules and not modules[path]._modules and modules[path]._parameters]
    last = leaves[-1] if leaves else None
    if last is None or not calls[last].given:
        return
    width = _width(*calls[last].given[0], gone)
    classes = _width(*calls[last].outputs[0], gone) if calls[last].outputs else None
    around = [path for path in modules if path == "" or last.startswith(f"{path}.")]
    around = [path for path in around if not isinstance(modules[path], nn.MultiheadAttention)]  # its weights tell
    for change, names in ((width, ("num_features", "head_hidden_size", "embed_dim")), (classes, ("num_classes",))):
        for path, name in ((path, name) for path in around for name in names):
            if change is not None and modules[path].__dict__.get(name) == change[0]:
                modules[path].__dict__[name] = change[1]


def _stages(model: nn.Module, calls: Mapping[str, ModuleCall], gone: Mask) -> None:
    """A list of stages, each with the path of a module and how many channels it gives."""
    names = {id(module): path for path, module in reversed(list(model.named_modules(remove_duplicate=False)))}
    modules = dict(model.named_modules(remove_duplicate=False))
    for module in model.modules():
        held: Any = module.__dict__.get("feature_info")
        holder, name = (
            (module.__dict__, "feature_info")
            if isinstance(held, list)
            else (vars(held), "info")
            if (hasattr(held, "info"))
            else ({}, "")
        )
        if not isinstance(holder.get(name), list):
            continue
        stages = []
        for stage in holder[name]:
            told = isinstance(stage, dict) and stage.get("module") in modules and "num_chs" in stage
            call = calls.get(names[id(modules[stage["module"]])]) if told else None
            after = _became(call.outputs, gone).get(stage["num_chs"], set()) if call is not None else set()
            stages.append({**stage, "num_chs": next(iter(after))} if len(after) == 1 else stage)
        holder[name] = stages


def _from_weights(module: nn.Module) -> None:
    if is_parametrized(module, "weight"):
        return  # to read it is to compute it: some change their buffers then
    weight = _weight(module)
    if isinstance(module, nn.RNNBase):
        read, kept = (module._parameters[f"weight_{each}_l0"] for each in ("ih", "hh"))
        if read is not None and kept is not None:
            module.input_size, module.hidden_size = read.shape[1], kept.shape[0] // _gates(module)
            module.proj_size = kept.shape[1] if module.proj_size else 0
            module.proj_size = kept.shape[1] if module.proj_size else 0
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
    elif isinstance(module, nn.MultiheadAttention):
        packed = module._parameters["in_proj_weight"]
        apart = [module._parameters[f"{each}_proj_weight"] for each in "qkv"] if packed is None else [packed] * 3
        module.embed_dim, module.kdim, module.vdim = (each.shape[1] for each in apart if each is not None)
    elif not isinstance(weight, torch.Tensor):
        return
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        if module.groups == 1:
            wide, deep = (1, 0) if module.transposed else (0, 1)
            module.out_channels, module.in_channels = weight.shape[wide], weight.shape[deep]
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        module.num_features = weight.shape[0]
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.PReLU):
        module.num_parameters = weight.shape[0]


def _weight(module: nn.Module) -> Any:
    """What is trained: `spectral_norm` and `weight_norm` of `nn.utils` leave the last run's in `weight`."""
    held = (module._parameters.get(name) for name in ("weight", "weight_orig", "weight_v"))
    return next((each for each in held if each is not None), getattr(module, "weight", None))


def _gates(module: nn.RNNBase) -> int:
    return {"LSTM": 4, "GRU": 3}.get(module.mode, 1)


# What modules of many libraries call the width of what they take and of what they give.
_TAKES = ("in_channels", "in_features", "in_chs", "in_planes", "input_dim")
_GIVES = ("out_channels", "out_features", "out_chs", "out_planes", "output_dim", "num_features", "num_channels")


def _from_call(module: nn.Module, call: ModuleCall, gone: Mask) -> None:
    for side, names in ((call.given, _TAKES), (call.outputs, _GIVES)):
        if not side:
            continue
        width = _width(*side[0], gone)
        if width is None:
            continue
        for name in names:
            if type(module.__dict__.get(name)) is int and module.__dict__[name] == width[0]:
                module.__dict__[name] = width[1]
    if not call.outputs:
        return
    shape, label = call.outputs[0]
    after = shape_after(shape, label, gone)
    if after is None or after == shape:
        return
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        weight = module.weight
        shape_now = after[len(after) - len(module.normalized_shape) :] if weight is None else tuple(weight.shape)
        module.normalized_shape = shape_now
    elif isinstance(module, nn.Unflatten) and isinstance(module.dim, int):
        axis = module.dim % (len(shape) - len(tuple(module.unflattened_size)) + 1)
        module.unflattened_size = tuple(after[axis : axis + len(tuple(module.unflattened_size))])
    elif isinstance(module, nn.modules.conv._ConvNd):
        module.groups = _parts_left(shape, label, module.groups, gone)
    elif isinstance(module, FitChannels):
        module.channels = after[module.dim]
    elif isinstance(module, nn.GroupNorm):
        module.num_groups = _parts_left(shape, label, module.num_groups, gone)


def _width(shape: tuple[int, ...], label: Label, gone: Mask) -> tuple[int, int] | None:
    """How many channels a value has, and how many stay; `None` where it loses none."""
    after = shape_after(shape, label, gone)
    axes = [axis for axis, size in enumerate(shape) if after and size != after[axis] and axis not in _batch(shape)]
    if after is None or len(axes) != 1:
        return None
    return shape[axes[0]], after[axes[0]]


def _batch(shape: Shape) -> frozenset[int]:
    """The dimension that counts samples, and may count heads with them: no width."""
    return frozenset((0,) if len(shape) > 1 else ())


def _parts_left(shape: tuple[int, ...], label: Label, parts: int, gone: Mask) -> int:
    stays = np.ones(shape[1], dtype=bool)
    for layer in label.layers:
        stays &= (kept_indices(layer, gone) or {}).get(1, True)
    return int(stays.reshape(parts, -1).any(axis=1).sum())
