"""Copies of a model, the model inside a wrapper, and leaving a model as it was."""

from __future__ import annotations

import copy
import gc
import random
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from types import FunctionType
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from torchtrim.errors import ModelError
from torchtrim.graph.structure import leaves


def unwrap(model: nn.Module) -> nn.Module:
    """The user's model inside `torch.compile`, `DataParallel` or `DistributedDataParallel`.

    Raises:
        ModelError: Not an `nn.Module`, a scripted model, or a sharded one (FSDP), whose weights are not all here.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> unwrap(nn.DataParallel(net)) is net
        True
    """
    if not isinstance(model, nn.Module):
        raise ModelError("not a PyTorch model", found=type(model).__name__, expected="an nn.Module")
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            "a TorchScript model has no Python forward to read",
            found=type(model).__name__,
            hint="the nn.Module it was scripted from",
        )
    if type(model).__name__ in {"FullyShardedDataParallel", "FSDPModule"}:
        raise ModelError(
            "a sharded model does not hold all of its weights here",
            found=type(model).__name__,
            hint="edit the model first, then shard it",
        )
    inner = model._modules.get("_orig_mod")
    if inner is not None and type(model).__name__ == "OptimizedModule":
        return unwrap(inner)
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return unwrap(model.module)
    return model


def structural_copy(
    model: nn.Module,
    *,
    own_buffers: bool = False,
    user_hooks: bool = True,
    stand_ins: Mapping[int, torch.Tensor] | None = None,
) -> nn.Module:
    """A copy of the modules that shares the parameters (and, unless `own_buffers`, the buffers): cheap at any size.

    Tracing and checking run on such a copy, because a forward may keep state in Python attributes.

    Args:
        model: The model.
        own_buffers: Copy what a run may write to: the buffers, and those parameters that are not in one of torch's own
            layers (a class token, a scale), or in one that has a `train` of its own, which an in-place operation may
            reach. `source_of` knows their origin.
        user_hooks: Keep forward hooks that are plain functions. A copy that is run does without: what they write to is
            the user's. Hooks with state of their own (weight norm) are copied with it.
        stand_ins: By the identity of parameters and buffers, what the copy is to hold in their place.

    Raises:
        ModelError: The model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = parameter
    for parameter in _within_reach(model) if own_buffers else ():
        memo[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
        memo[id(parameter)].__dict__[_SOURCE] = source_of(parameter)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().clone() if own_buffers else buffer
    memo |= stand_ins or {}
    try:
        twin: nn.Module = _copy_module(model, memo)
    except (TypeError, RuntimeError, copy.Error) as error:
        raise _uncopyable(model, error) from error
    for module in () if user_hooks else twin.modules():
        for hooks in _hooks(module):
            for key in [key for key, hook in hooks.items() if isinstance(hook, FunctionType)]:
                del hooks[key]
    return twin


_SOURCE = "_torchtrim_source"
_CONTAINERS = (nn.Module, nn.Sequential, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


def source_of(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter that one in a structural copy stands for: itself, or the one it was copied from."""
    found: nn.Parameter = parameter.__dict__.get(_SOURCE, parameter)
    return found


def _within_reach(model: nn.Module) -> list[nn.Parameter]:
    """Parameters that a forward may hand to an operation by themselves, or a `train` may change."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        kind = type(module)
        layer = any(base.__module__.startswith("torch.nn.") and base not in _CONTAINERS for base in kind.__mro__)
        layer &= not has_own_train(module)  # which may write to them, as those do that merge low-rank weights
        plain = (held for held in module._parameters.values() if type(held) is nn.Parameter and not held.is_meta)
        found |= {} if layer else {id(held): held for held in plain}
    return list(found.values())


def has_own_train(module: nn.Module) -> bool:
    """Whether a module does more than torch's do where its mode changes."""
    return not getattr(type(module).train, "__module__", "").startswith("torch.")


def has_function_hooks(model: nn.Module) -> bool:
    """Whether there are hooks that are plain functions, which copies made to be run go without."""
    return any(
        isinstance(hook, FunctionType)
        for module in model.modules()
        for hooks in _hooks(module)
        for hook in hooks.values()
    )


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)


_PLAIN = {type(None), bool, int, float, complex, str, bytes, torch.Size, torch.dtype, torch.device, type, FunctionType}


def _copy_module(module: nn.Module, memo: dict[int, Any], whole: bool = False) -> Any:
    """`copy.deepcopy` for modules, ten times faster: what cannot change is not copied.

    Args:
        module: The module.
        memo: By the identity of what is held in it (of every parameter and buffer, at least) the copy of that.
        whole: Nothing may be shared, graphs neither; modules that say how they are copied are copied so.
    """
    if id(module) in memo:
        return memo[id(module)]
    kind: Any = type(module)
    if (
        isinstance(module, torch.jit.ScriptModule)
        or (hasattr(kind, "__deepcopy__") and (whole or not isinstance(module, fx.GraphModule)))
        or (whole and _says_how(kind))
    ):
        return copy.deepcopy(module, memo)
    twin = object.__new__(kind)
    memo[id(module)] = twin
    attributes = twin.__dict__
    for name, value in module.__dict__.items():
        if name == "_compiled_call_impl":
            continue  # of `module.compile()`: a copy runs as it was written
        if type(value) in _PLAIN or (type(value) is tuple and all(type(item) in _PLAIN for item in value)):
            attributes[name] = value
        elif type(value) is set and not value:
            attributes[name] = set()
        elif name == "_modules":
            attributes[name] = {
                key: None if child is None else _copy_module(child, memo, whole) for key, child in value.items()
            }
        elif name in ("_parameters", "_buffers"):
            attributes[name] = {key: None if held is None else memo[id(held)] for key, held in value.items()}
        elif isinstance(value, dict) and not value:
            attributes[name] = value.__class__() if type(value) in (dict, OrderedDict) else copy.copy(value)
        elif isinstance(value, torch.Tensor) and id(value) not in memo:
            attributes[name] = memo[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        elif isinstance(value, fx.Graph):
            attributes[name] = value
        else:
            memo |= _computed(value)
            attributes[name] = copy.deepcopy(value, memo)
    return twin


@cache
def _says_how(kind: type[nn.Module]) -> bool:
    """Whether modules of a class say what of them is copied, or make something anew in a copy."""
    own = [base for base in kind.__mro__ if base not in (nn.Module, object)]
    # Torch's own only add what modules lack that were pickled long ago; but recurrent ones hold weak references.
    own = [base for base in own if not base.__module__.startswith("torch.nn.modules.") or base is nn.RNNBase]
    return any(name in vars(base) for base in own for name in _COPYING)


_COPYING = ("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__copy__", "__getnewargs__")


def full_copy(model: nn.Module, *, but: Iterable[nn.Module] = ()) -> nn.Module:
    """A copy that shares nothing with the original.

    Args:
        model: The model.
        but: Modules in it that are not copied: the copy holds the very same.

    Raises:
        ModelError: The model holds something that cannot be copied.
    """
    memo: dict[int, Any] = {id(module): module for module in but}
    for module in model.modules():
        for name, value in module.__dict__.items():
            if name != "_modules" and isinstance(value, (torch.Tensor, dict, list)):
                memo |= _computed(value)
    try:
        for held in (*model.parameters(), *model.buffers()):
            copy.deepcopy(held, memo)
        twin: nn.Module = _copy_module(model, memo, whole=True)
    except (TypeError, RuntimeError, copy.Error) as error:
        raise _uncopyable(model, error) from error
    return twin


def _uncopyable(model: nn.Module, error: Exception) -> ModelError:
    return ModelError(
        f"the model cannot be copied: {error}", found=type(model).__name__, hint="take out what cannot be copied"
    )


def _computed(value: Any) -> dict[int, Any]:
    """Copies of the tensors in an attribute that were computed from parameters: such tensors refuse deepcopy.

    Caches hold them, and old-style `weight_norm` does.
    """
    return {id(tensor): tensor.detach().clone() for tensor in leaves(value, torch.Tensor) if not tensor.is_leaf}


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's random states as they were."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def paused_collection() -> Iterator[None]:
    """Without Python's cycle collector: it would walk through all the graphs again and again while they are made."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def kept_modes(model: nn.Module) -> Iterator[None]:
    """Leave every module's `training` flag as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def is_meta(model: nn.Module) -> bool:
    """Whether any weight lies on the meta device (has a shape and no values)."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
