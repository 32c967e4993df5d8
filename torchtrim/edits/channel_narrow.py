"""Take channels out of parameters and buffers, and bring every attribute that counts them up to date."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from torchtrim.channels.follow import Flow, ModuleCall, shape_after
from torchtrim.channels.labels import Label, Layer, Mask, kept_indices, varying
from torchtrim.edits.adapter_layers import FitChannels
from torchtrim.edits.work import Work
from torchtrim.errors import EditError


@dataclass(frozen=True)
class Narrowing:
    """What a parameter or buffer loses.

    Attributes:
        owner: The first module that holds it.
        name: Its name there.
        path: Its full name.
        taken: The function that takes out of a tensor of its shape what stays.
        removed: For each dimension (as text) the indices that go.
    """

    owner: nn.Module
    name: str
    path: str
    taken: Callable[[torch.Tensor], torch.Tensor]
    removed: dict[str, tuple[int, ...]]


def narrowings(model: nn.Module, flow: Flow, gone: Mask) -> list[Narrowing]:
    """What each parameter and buffer of a model would lose. Nothing is changed.

    Raises:
        EditError: Nothing would be left of one, or what is left has gaps.
    """
    found: list[Narrowing] = []
    seen: set[int] = set()
    for path, owner in model.named_modules():
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items()):
            label = None if tensor is None else flow.tensors.get(id(tensor))
            if tensor is None or label is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            if any(bool(gone[layer].any()) for layer in label.layers):
                full = f"{path}.{name}" if path else name
                taken, removed = _taken(full, label, gone)
                found.append(Narrowing(owner, name, full, taken, removed))
    return found


def narrow(work: Work, changes: list[Narrowing]) -> None:
    """Put narrower tensors in place of those that lose something, wherever they are referred to."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in work.model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            places.setdefault(id(tensor), []).append((module, name))
    for change in changes:
        old = getattr(change.owner, change.name)
        new = change.taken(old.detach())
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            work.came_from[new] = work.came_from.pop(old, old)
            if old.grad is not None:
                new.grad = change.taken(old.grad.detach())
        for module, name in places[id(old)]:
            held: dict[str, Any] = module.__dict__["_parameters" if isinstance(old, nn.Parameter) else "_buffers"]
            held[name] = new
    for module in work.model.modules():
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


def _taken(
    path: str, label: Label, gone: Mask
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, tuple[int, ...]]]:
    kept: dict[int, Mask] = {}
    ragged: list[Layer] = []
    for layer in label.layers:
        indices = kept_indices(layer, gone)
        if indices is None:
            ragged.append(layer)
            continue
        for axis, mask in indices.items():
            kept[axis] = kept.get(axis, mask) & mask
    table = _rows(path, ragged[0], gone, kept) if ragged else None
    if len(ragged) > 1 or any(not mask.any() for mask in kept.values()):
        raise EditError("nothing would be left of it", path=path, hint="leave a channel")
    removed = {str(axis): _gone(mask) for axis, mask in kept.items() if not mask.all()}
    if table is not None:
        removed["0,1"] = _gone(~gone[ragged[0]].reshape(ragged[0].shape[:2]))

    def take(tensor: torch.Tensor) -> torch.Tensor:
        for axis, mask in kept.items():
            if not mask.all():
                tensor = tensor.index_select(axis, _index(np.flatnonzero(mask), tensor))
        if table is not None:
            index = _index(table, tensor).reshape(*table.shape, *(1,) * (tensor.dim() - 2))
            tensor = tensor.gather(1, index.expand(*table.shape, *tensor.shape[2:]))
        return tensor.clone()

    return take, removed


def _rows(path: str, layer: Layer, gone: Mask, kept: dict[int, Mask]) -> Layer:
    """For each row (output channel) that stays, the columns that stay: each group reads others of its own."""
    stays = ~gone[layer.reshape(layer.shape[:2])]
    rows = kept.get(0, np.ones(layer.shape[0], dtype=bool)) & stays.any(axis=1)
    counts = set(stays[rows].sum(axis=1).tolist())
    if not varying(layer) <= {0, 1} or len(counts) != 1:
        raise EditError(
            "its groups would keep different numbers of channels",
            path=path,
            found=sorted(counts),
            expected="as many in each",
            hint="as many channels of every group, or whole groups",
        )
    kept[0] = rows
    return np.stack([np.flatnonzero(row) for row in stays[rows]]).astype(np.int64)


def _index(indices: Any, tensor: torch.Tensor) -> torch.Tensor:
    return torch.as_tensor(np.ascontiguousarray(indices), device=tensor.device)


def _gone(mask: Mask) -> tuple[int, ...]:
    return tuple(int(index) for index in np.flatnonzero(~mask.ravel()))


def tell_the_truth(model: nn.Module, flow: Flow, gone: Mask, changed: set[nn.Module]) -> None:
    """Bring the attributes that count channels up to date: of the layers that lost some, and of modules around them.

    Args:
        model: The narrowed model.
        flow: Its channels, from before.
        gone: The channels that went.
        changed: The modules whose tensors lost something.
    """
    calls = {path: call for run in reversed(flow.runs) for path, found in run.calls.items() for call in found[:1]}
    for path, module in model.named_modules():
        call = calls.get(path)
        if module in changed:
            _from_weights(module)
        if call is not None:
            _from_call(module, call, gone)
    order = [path for path, found in flow.runs[0].calls.items() if found]
    _features(model, order, calls, gone)


def _from_weights(module: nn.Module) -> None:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.RNNBase):
        read, kept = (module._parameters[f"weight_{each}_l0"] for each in ("ih", "hh"))
        if read is not None and kept is not None:
            module.input_size, module.hidden_size = read.shape[1], kept.shape[0] // _gates(module)
            module.proj_size = kept.shape[1] if module.proj_size else 0
            module.proj_size = kept.shape[1] if module.proj_size else 0
    elif isinstance(module, nn.RNNCellBase):
        module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
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
    axes = [] if after is None else [axis for axis, size in enumerate(shape) if size != after[axis]]
    if after is None or len(axes) != 1:
        return None
    return shape[axes[0]], after[axes[0]]


def _parts_left(shape: tuple[int, ...], label: Label, parts: int, gone: Mask) -> int:
    stays = np.ones(shape[1], dtype=bool)
    for layer in label.layers:
        if varying(layer) == {1}:
            stays &= ~gone[layer.reshape(-1)]
    return int(stays.reshape(parts, -1).any(axis=1).sum())


def _features(model: nn.Module, order: list[str], calls: dict[str, ModuleCall], gone: Mask) -> None:
    """The model's own count of the features that its last layer takes."""
    modules = dict(model.named_modules())
    leaves = [path for path in order if path in modules and not modules[path]._modules and modules[path]._parameters]
    last = leaves[-1] if leaves else None
    if last is None or not calls[last].given:
        return
    width = _width(*calls[last].given[0], gone)
    for name in ("num_features", "head_hidden_size", "embed_dim"):
        if width is not None and model.__dict__.get(name) == width[0]:
            model.__dict__[name] = width[1]
    classes = _width(*calls[last].outputs[0], gone) if calls[last].outputs else None
    if classes is not None and model.__dict__.get("num_classes") == classes[0]:
        model.__dict__["num_classes"] = classes[1]
