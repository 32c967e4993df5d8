"""A new head in place of the model's own: its last layers replaced where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchtrim.edits.head_fit import input_shape, outputs_in, run_once, try_head
from torchtrim.edits.head_layers import stack
from torchtrim.edits.head_request import HeadRequest
from torchtrim.errors import EditError, HeadError
from torchtrim.graph.check import flatten
from torchtrim.graph.copying import is_meta, structural_copy
from torchtrim.graph.head import head_sites
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.reader import Reader, Site, ancestors, has_rooms


def own_heads(model: nn.Module, inputs: Inputs) -> list[Site]:
    """The calls of the layers to replace; none where the model has no head that is a layer."""
    reader = Reader(model, inputs, wanted=has_rooms, lenient=[]).read()
    sites = head_sites(reader)
    function = next((site for site in sites if site.op == "attribute"), None)
    if function is not None:
        raise HeadError(
            "the model's last weights are used by a function, so there is no layer to replace",
            path=function.name,
            hint="cut the model before that function, or replace=False",
        )
    # An identity that passes feature maps on is no place for a linear layer.
    empty = [site for site in sites if isinstance(site.target, nn.Identity)]
    return [] if any(len(input_shape(model, site.name, inputs)) != 2 for site in empty) else sites


def make(
    model: nn.Module, own: list[Site], inputs: Inputs, wanted: HeadRequest
) -> tuple[int | None, int, dict[str, nn.Module]]:
    """How many outputs the new head has, the width of its features, and the new layers by path."""
    paths = tuple(site.name for site in own)
    given = _given(wanted.head, paths)
    num_classes = wanted.num_classes
    new: dict[str, nn.Module] = {}
    for path in paths:
        if given is not None:
            new[path] = given[path]
            output = try_head(given[path], input_shape(model, path, inputs), path)
            num_classes = outputs_in(output)
        else:
            new[path] = _made(model, path, _width_in(model, path, inputs), wanted)
    return num_classes, _width_in(model, paths[0], inputs), new


def layers_at(model: nn.Module, paths: tuple[str, ...], width: int, wanted: HeadRequest) -> dict[str, nn.Module]:
    """The new layers, where it is known which they replace and how wide the features are."""
    given = _given(wanted.head, paths)
    if given is not None:
        return given
    # Heads beside each other may be of different widths: the old layer knows.
    return {path: _made(model, path, _width_of(model.get_submodule(path)) or width, wanted) for path in paths}


def _made(model: nn.Module, path: str, width: int, wanted: HeadRequest) -> nn.Module:
    old = model.get_submodule(path)
    new = _like(old, width, wanted)
    reference = next(iter(old.parameters()), next(iter(model.parameters()), None))
    return new if reference is None else new.to(device=reference.device, dtype=reference.dtype)


def put(net: nn.Module, num_classes: int | None, new: dict[str, nn.Module]) -> nn.Module:
    """The model, changed: its heads replaced wherever they are referred to, and the attributes that count them."""
    for path, layer in new.items():
        old = net.get_submodule(path)
        layer.train(old.training)
        _tell_the_truth(net, path, _count_of(old), num_classes)
        for parent in list(net.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = layer
    return net


def check_outputs(
    model: nn.Module,
    net: nn.Module,
    inputs: Inputs,
    paths: tuple[str, ...],
    num_classes: int | None,
    user_hooks: bool,
) -> tuple[str, ...]:
    """The model runs in both modes, and its outputs are those of before but for the new width."""
    if is_meta(net):
        return ("not run: the model is on the meta device",)
    widths = {_count_of(model.get_submodule(path)) or _width_in(model, path, inputs) for path in paths}
    done, changed = [], False
    for training in (False, True):
        given = inputs.with_batch(max(inputs.batch, 2)) if training else inputs
        try:
            before = _shapes(model, given, training, user_hooks)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            done.append(f"{'train' if training else 'eval'}: not checked, the original refuses it: {error}")
            continue
        try:
            after = _shapes(net, given, training, user_hooks)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise HeadError(f"the model does not run with the new head: {error}", path=paths[0]) from error
        for name, shape in after.items():
            old = before.get(name, ())
            differ = [(was, now) for was, now in zip(old, shape, strict=False) if was != now]
            changed = changed or bool(differ)
            right = all(was in widths and now == num_classes for was, now in differ)
            if num_classes is not None and (len(old) != len(shape) or not right):
                raise EditError("an output has not the new width", path=name, found=shape, expected=num_classes)
        done.append(f"{'train' if training else 'eval'}: runs, {', '.join(map(str, after.values()))}")
    if num_classes is not None and not changed and widths != {num_classes}:
        raise EditError("no output has the new width", path=paths[0], expected=num_classes)
    return tuple(done)


def _shapes(model: nn.Module, inputs: Inputs, training: bool, user_hooks: bool) -> dict[str, tuple[int, ...]]:
    twin = structural_copy(model, own_buffers=True, user_hooks=user_hooks)
    outputs = flatten(run_once(twin, inputs, training))
    return {name: tuple(value.shape) for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def _given(head: nn.Module | Mapping[str, nn.Module] | None, paths: tuple[str, ...]) -> dict[str, nn.Module] | None:
    if head is None:
        return None
    if isinstance(head, Mapping):
        if set(head) != set(paths):
            raise HeadError(
                "one head for each of the model's own is needed", found=sorted(head), expected=sorted(paths)
            )
        return {path: head[path] for path in paths}
    if len(paths) > 1:
        raise HeadError(
            "the model has several heads, and one was given",
            found=list(paths),
            hint="head={" + ", ".join(f"{path!r}: ..." for path in paths) + "}",
        )
    return {paths[0]: head}


def _like(old: nn.Module, width: int, wanted: HeadRequest) -> nn.Module:
    """A new layer in place of an old one: a convolution for a convolution, of the same kernel; else linear layers."""
    num_classes, hidden, dropout = wanted.num_classes or 0, wanted.hidden, wanted.dropout
    weight = getattr(old, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() == 2:
        layers = stack(width, num_classes, layout="flat", hidden=hidden, dropout=dropout)
        return nn.Sequential(layers) if len(layers) > 1 else layers["fc"]
    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    layout = {3: "NCL", 4: "NCHW", 5: "NCDHW"}.get(weight.dim(), "")
    if layout == "" or getattr(old, "transposed", False):
        raise HeadError(
            "its own head is a layer that torchtrim cannot make anew", found=type(old).__name__, hint="head="
        )
    layers = stack(width, num_classes, layout=layout, hidden=hidden, dropout=dropout)
    first = next(name for name, layer in layers.items() if isinstance(layer, tuple(kinds.values())))
    outputs = hidden[0] if hidden else num_classes
    same = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation") if hasattr(old, name)}
    layers[first] = kinds[weight.dim()](width, outputs, **same)
    return nn.Sequential(layers) if len(layers) > 1 else layers["fc"]


def _width_in(model: nn.Module, path: str, inputs: Inputs) -> int:
    return _width_of(model.get_submodule(path)) or int(input_shape(model, path, inputs)[-1])


def _width_of(old: nn.Module) -> int | None:
    weight = getattr(old, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() >= 2:
        return int(weight.shape[1]) * int(getattr(old, "groups", 1))
    return None


def _count_of(module: nn.Module) -> int:
    """How many outputs an old head had; 0 for the identity that stands for none."""
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else 0


def _tell_the_truth(net: nn.Module, path: str, before: int, after: int | None) -> None:
    """Bring every `num_classes` (and transformers' `num_labels`) around a head up to date."""
    if after is None:
        return
    for outer in ancestors(path):
        module = net.get_submodule(outer)
        for holder in (module, module.__dict__.get("config")):
            for name in ("num_classes", "num_labels"):
                if holder is not None and _plain_number(holder, name) == before:
                    setattr(holder, name, after)


def _plain_number(holder: Any, name: str) -> Any:
    value = getattr(holder, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
