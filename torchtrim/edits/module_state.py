"""What a module holds of its own, as plain data: for modules whose constructor's arguments cannot be told from them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from torchtrim.edits.module_arguments import NotPlainError, decoded, encoded
from torchtrim.edits.module_types import Trusted
from torchtrim.errors import EditError
from torchtrim.graph.structure import leaves

_BASE = {*nn.Module().__dict__, "_compiled_call_impl"}  # what every module has
_HOOKS = tuple(name for name in _BASE if name.endswith("_hooks"))


def own_state(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module, and the shapes of its own parameters and buffers; children not included.

    Raises:
        NotPlainError: It holds something that plain data cannot.

    Example:
        >>> own_state(nn.Linear(2, 3, bias=False))["parameters"]
        {'weight': [3, 2], 'bias': None}
    """
    attributes = {}
    for name, value in vars(module).items():
        if name not in _BASE:
            try:
                attributes[name] = encoded(value)
            except NotPlainError as error:
                raise NotPlainError(f"its attribute {name!r} is {error}") from error
    return {
        "attributes": attributes,
        "parameters": {name: _shape(held) for name, held in module._parameters.items()},
        "buffers": {name: _shape(held) for name, held in module._buffers.items()},
        "passing": sorted(module._non_persistent_buffers_set),
        "empty": [name for name, child in module._modules.items() if child is None],
    }


def from_state(kind: Callable[..., nn.Module], state: Mapping[str, Any], trusted: Trusted = ()) -> nn.Module:
    """A module of a class, made without its constructor; its parameters and buffers are on the meta device.

    Raises:
        EditError: Not what `own_state` wrote.
    """
    if not isinstance(kind, type) or set(state) != {"attributes", "parameters", "buffers", "passing", "empty"}:
        raise EditError("the state of a module is not complete", found=sorted(state))
    module: nn.Module = object.__new__(kind)
    nn.Module.__init__(module)
    for name, value in state["attributes"].items():
        if name in _BASE or name.startswith("__") or callable(getattr(kind, name, None)):
            raise EditError("a record cannot set this attribute", path=name)
        module.__dict__[str(name)] = decoded(value, trusted)
    for name, shape in state["parameters"].items():
        module.register_parameter(name, None if shape is None else nn.Parameter(torch.empty(shape, device="meta")))
    for name, shape in state["buffers"].items():
        placeholder = None if shape is None else torch.empty(shape, device="meta")
        module.register_buffer(name, placeholder, persistent=name not in state["passing"])
    for name in state["empty"]:
        module.register_module(name, None)
    return module


def difference(one: nn.Module, other: nn.Module) -> str | None:
    """In words, what differs between two modules besides the values of weights; `None` where nothing does."""
    found = own_difference(one, other)
    if found is not None:
        return found
    if list(one._modules) != list(other._modules):
        return f"children {list(other._modules)} instead of {list(one._modules)}"
    for name, child in one._modules.items():
        twin = other._modules[name]
        if child is not None and twin is not None and (found := difference(child, twin)) is not None:
            return f"{name}: {found}"
    return None


def own_difference(one: nn.Module, other: nn.Module) -> str | None:
    """The same, without looking into the children."""
    if type(one) is not type(other):
        return f"a {type(other).__name__} instead of a {type(one).__name__}"
    if any(vars(one).get(name) or vars(other).get(name) for name in _HOOKS):
        return "hooks, which a record cannot hold"
    left, right = ({key: value for key, value in vars(each).items() if key not in _BASE} for each in (one, other))
    for name in left.keys() | right.keys():
        if name not in left or name not in right or not _same(left[name], right[name]):
            return f"the attribute {name!r}"
    for members in ("_parameters", "_buffers"):
        shapes = [{key: _shape(held) for key, held in getattr(each, members).items()} for each in (one, other)]
        if list(shapes[0].items()) != list(shapes[1].items()):
            return f"{members.strip('_')} {shapes[1]} instead of {shapes[0]}"
    if one._non_persistent_buffers_set != other._non_persistent_buffers_set:
        return "which buffers are saved"
    absent = [{name for name, child in each._modules.items() if child is None} for each in (one, other)]
    return None if absent[0] == absent[1] else "which children are None"


def holds_plain_tensors(module: nn.Module) -> bool:
    """Whether any attribute holds a tensor that is no parameter: its values come from the constructor."""
    return any(
        not isinstance(tensor, nn.Parameter)
        for each in module.modules()
        for name, value in vars(each).items()
        if name not in _BASE
        for tensor in leaves(value, torch.Tensor)
    )


def _shape(held: torch.Tensor | None) -> list[int] | None:
    return None if held is None else list(held.shape)


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, nn.Parameter):
        return bool(one.shape == other.shape)  # a list of the module's own weights, as recurrent layers keep
    if isinstance(one, weakref.ReferenceType):
        return True
    if isinstance(one, torch.Tensor):
        return one.is_meta == other.is_meta and one.shape == other.shape and (one.is_meta or torch.equal(one, other))
    if isinstance(one, partial):
        return _same((one.func, one.args, one.keywords), (other.func, other.args, other.keywords))
    return bool(one == other) or (one != one and other != other)
