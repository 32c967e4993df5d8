"""The tensors of a model by name: what a file keeps of them, and how they are put into a model that was rebuilt."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from torchtrim.checkpoint.container import storable
from torchtrim.checkpoint.hollow import swap
from torchtrim.errors import CheckpointError, CheckpointMismatch, TorchTrimWarning, nearest


@dataclass(frozen=True)
class State:
    """Every parameter and buffer of a model.

    Attributes:
        tensors: Each tensor once, by its first name.
        parameters: Which of these are parameters.
        tied: Further names of the same object, with its first name.
        shared: Other parameters (or buffers) in the same memory, with the first one's name.
        strides: Of those that do not lie row by row, such as `channels_last`.
        flags: `requires_grad` of those where it is not what it is by default: parameters without, buffers with.
    """

    tensors: dict[str, torch.Tensor]
    parameters: set[str]
    tied: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    strides: dict[str, list[int]] = field(default_factory=dict)
    flags: list[str] = field(default_factory=list)


def state_of(model: nn.Module) -> State:
    """Collect the tensors of a model, and how they hang together.

    Raises:
        CheckpointError: One cannot be written: on the meta device, sparse, of a class of its own; names it.
    """
    state = State({}, set())
    first: dict[int, str] = {}
    memory: dict[tuple[Any, ...], str] = {}
    for name, tensor, is_parameter in named_tensors(model):
        if id(tensor) in first:
            state.tied[name] = first[id(tensor)]
            continue
        first[id(tensor)] = name
        _refuse(name, tensor)
        if is_parameter:
            state.parameters.add(name)
        if tensor.requires_grad is not is_parameter:
            state.flags.append(name)
        place = _place(tensor)
        if tensor.numel() and place in memory:
            state.shared[name] = memory[place]
            continue
        memory[place] = name
        state.tensors[name] = tensor
        if _is_permuted(tensor):
            state.strides[name] = list(tensor.stride())
    _warn_of_overlaps(state.tensors)
    return state


def named_tensors(model: nn.Module) -> list[tuple[str, torch.Tensor, bool]]:
    """Name, tensor, and whether it is a parameter: under all of their names, parameters first."""
    parameters = [(name, held, True) for name, held in model.named_parameters(remove_duplicate=False)]
    return parameters + [(name, held, False) for name, held in model.named_buffers(remove_duplicate=False)]


def put(model: nn.Module, state: State) -> None:
    """Put a file's tensors into a rebuilt model, which must have places of the same names and shapes.

    Raises:
        CheckpointMismatch: It has not; names the first difference.
    """
    names = {**{name: name for name in state.tensors}, **state.tied, **state.shared}
    places = {name: (tensor, is_parameter) for name, tensor, is_parameter in named_tensors(model)}
    compare_names(set(places), set(names))
    _compare_ties(places, state)
    objects: dict[str, torch.Tensor] = {}
    new: dict[torch.Tensor, torch.Tensor] = {}
    for name, (old, is_parameter) in places.items():
        own = state.tied.get(name, name)  # the name of the object, whose memory may be another's
        held = state.tensors[state.shared.get(own, own)]
        if old.shape != held.shape or is_parameter is not (own in state.parameters):
            raise CheckpointMismatch(
                "the model that was rebuilt has another tensor here than the file",
                path=name,
                found=_described(old, is_parameter),
                expected=_described(held, own in state.parameters),
            )
        if own not in objects:
            objects[own] = _object(own, held, state)
        new[old] = objects[own]
    swap(model, new)
    modules = dict(model.named_modules(remove_duplicate=False))
    for name in places:
        owner, _, key = name.rpartition(".")
        module = modules[owner]
        kept = module._parameters if key in module._parameters else module._buffers
        kept[key] = objects[state.tied.get(name, name)]


def check_shapes(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise where the model has a tensor of another shape than the file; what it lacks or has more is told by `put`.

    Raises:
        CheckpointMismatch: One has another shape; names it.
    """
    for name, tensor, is_parameter in named_tensors(model):
        if name in shapes and tuple(tensor.shape) != tuple(shapes[name]):
            raise CheckpointMismatch(
                "the model that was rebuilt has another tensor here than the file",
                path=name,
                found=_described(tensor, is_parameter),
                expected=f"one of shape {list(shapes[name])}",
            )


def compare_names(found: set[str], expected: set[str]) -> None:
    """Raise for the first name that one of the two has alone.

    Raises:
        CheckpointMismatch: There is one.
    """
    if found == expected:
        return
    missing, added = sorted(expected - found), sorted(found - expected)
    name = (missing or added)[0]
    raise CheckpointMismatch(
        "is in the file, and not in the model that was rebuilt" if missing else "is not in the file",
        path=name,
        found=f"{len(missing)} missing, {len(added)} too many",
        hint=nearest(name, added if missing else expected),
    )


def _compare_ties(places: Mapping[str, tuple[torch.Tensor, bool]], state: State) -> None:
    first: dict[torch.Tensor, str] = {}
    for name, (tensor, _) in places.items():
        other = first.setdefault(tensor, name)
        if state.tied.get(name, name) != state.tied.get(other, other):
            raise CheckpointMismatch(
                "is one with another in the model that was rebuilt, and apart in the file", path=name, found=other
            )


def _object(name: str, tensor: torch.Tensor, state: State) -> torch.Tensor:
    is_parameter, flagged = name in state.parameters, name in state.flags
    requires_grad = is_parameter is not flagged
    if requires_grad and not (tensor.is_floating_point() or tensor.is_complex()):
        raise CheckpointMismatch("a tensor of this type takes no gradient", path=name, found=tensor.dtype)
    if is_parameter:
        return nn.Parameter(tensor, requires_grad=requires_grad)
    return tensor.detach().requires_grad_(requires_grad)


def _described(tensor: torch.Tensor, is_parameter: bool) -> str:
    return f"a {'parameter' if is_parameter else 'buffer'} of shape {list(tensor.shape)}"


def _refuse(name: str, tensor: torch.Tensor) -> None:
    reason = None
    if is_lazy(tensor):
        reason = "a lazy parameter has no shape yet"
    elif tensor.is_meta:
        reason = "a tensor on the meta device has no values"
    elif type(tensor) not in (torch.Tensor, nn.Parameter):
        reason = "a tensor of a class of its own cannot be written"
    elif tensor.layout is not torch.strided or not storable(tensor.dtype):
        reason = "a tensor of this layout or type cannot be written"
    if reason is not None:
        found = f"{type(tensor).__name__}, {tensor.dtype}, {tensor.layout}"
        raise CheckpointError(reason, path=name, found=found, hint="bring it to a plain tensor first")


def _place(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _is_permuted(tensor: torch.Tensor) -> bool:
    """Whether it fills its memory without holes, in another order than row by row."""
    return not tensor.is_contiguous() and is_dense(tuple(tensor.shape), tensor.stride())


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether these strides give every element a place of its own, and leave none between.

    Example:
        >>> is_dense((2, 3), (1, 2)), is_dense((2, 3), (4, 1)), is_dense((2, 3), (0, 1))
        (True, False, False)
    """
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(strides, shape, strict=True) if size != 1):
        if stride != expected:
            return False
        expected *= size
    return True


def _warn_of_overlaps(tensors: Mapping[str, torch.Tensor]) -> None:
    """Views of parts of one memory are written apart: say so, where they overlap."""
    by_memory: dict[tuple[Any, int], list[tuple[int, int, str]]] = {}
    for name, tensor in tensors.items():
        if tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            begin, item = tensor.data_ptr(), tensor.dtype.itemsize
            key = (tensor.device, tensor.untyped_storage().data_ptr())
            by_memory.setdefault(key, []).append((begin, begin + (last + 1) * item, name))
    for spans in by_memory.values():
        furthest, name = 0, ""
        for begin, end, other in sorted(spans):
            if begin < furthest:
                warnings.warn(
                    TorchTrimWarning(f"{name!r} and {other!r} overlap in memory; the file holds them apart"),
                    stacklevel=4,
                )
            furthest, name = max((furthest, name), (end, other))
