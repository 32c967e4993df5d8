"""What a model is besides its tensors: the classes of its modules, their forwards, and their plain attributes."""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import fx, nn

from torchtrim.checkpoint.plain import is_plain
from torchtrim.checkpoint.tensors import compare_names, named_tensors
from torchtrim.errors import CheckpointMismatch
from torchtrim.graph.held import hold, is_held, let_go
from torchtrim.graph.reading import same_graph
from torchtrim.graph.structure import leaves

_OWN = {*vars(nn.Module()), "_torchtrim_history", "_torchtrim_inputs", "_torchtrim_factory", "train_graph", "_name"}
_OPENED = {*vars(fx.GraphModule(nn.Module(), fx.Graph())), "shape_env"}


def compare(net: nn.Module, rebuilt: nn.Module) -> None:
    """Raise where a rebuilt model is not the one that is to be saved, its values and plain attributes aside.

    Raises:
        CheckpointMismatch: Names the first module, tensor or attribute that differs.
    """
    ours, theirs = (dict(model.named_modules(remove_duplicate=False)) for model in (net, rebuilt))
    for name, module in ours.items():
        other = theirs.get(name)
        if other is None:
            raise CheckpointMismatch("is not there when the model is rebuilt", path=name, found=_class_of(module))
        if _class_of(module) != _class_of(other):
            raise CheckpointMismatch(
                "has another class when the model is rebuilt",
                path=name,
                found=_class_of(module),
                expected=_class_of(other),
            )
        if isinstance(module, fx.GraphModule) and not _same_graphs(module, other):
            raise CheckpointMismatch(
                "has another forward when the model is rebuilt", path=name, found=_class_of(module)
            )
        for key, value in vars(module).items():
            if key == "forward" and key not in vars(other):
                raise CheckpointMismatch("is set on the instance, which is code", path=_joined(name, key))
            if key in vars(other) and _code(value) != _code(vars(other)[key]):
                found, expected = value, vars(other)[key]
                raise CheckpointMismatch(
                    "is another when the model is rebuilt", path=_joined(name, key), found=found, expected=expected
                )
    extra = sorted(set(theirs) - set(ours))
    if extra:
        found = _class_of(theirs[extra[0]])
        raise CheckpointMismatch("is there when the model is rebuilt, and not in it", path=extra[0], found=found)
    places = [{name: tensor for name, tensor, _ in named_tensors(model)} for model in (net, rebuilt)]
    compare_names(set(places[1]), set(places[0]))
    for name, tensor in places[0].items():
        if tensor.shape != places[1][name].shape:
            found, expected = list(tensor.shape), list(places[1][name].shape)
            raise CheckpointMismatch(
                "has another shape when the model is rebuilt", path=name, found=found, expected=expected
            )


def differences(net: nn.Module, rebuilt: nn.Module) -> dict[str, dict[str, Any]]:
    """The plain attributes (numbers, texts, tuples of them) that `rebuilt` has not so: by module, by name."""
    others = dict(rebuilt.named_modules())
    found: dict[str, dict[str, Any]] = {}
    for name, held in plain_attributes(net).items():
        theirs = vars(others[name])
        other = {key: value for key, value in held.items() if key not in theirs or not _equal(value, theirs[key])}
        if other:
            found[name] = other
    return found


def plain_attributes(net: nn.Module) -> dict[str, dict[str, Any]]:
    """All plain attributes, by module, by name."""
    found: dict[str, dict[str, Any]] = {}
    for name, module in net.named_modules():
        held = {key: value for key, value in vars(module).items() if is_plain(value) and _is_settable(module, key)}
        if held:
            found[name] = held
    return found


def set_plain(model: nn.Module, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Set plain attributes that `differences` or `plain_attributes` found.

    Raises:
        CheckpointMismatch: There is no such module, or what has this name there is no plain attribute.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, values in settings.items():
        for key, value in values.items():
            if name not in modules or not _is_settable(modules[name], key):
                raise CheckpointMismatch("no such attribute to set", path=_joined(name, key))
            attributes = modules[name].__dict__
            if not _equal(value, attributes.get(key, _equal)):
                attributes[key] = value


def loose_tensors(net: nn.Module, rebuilt: nn.Module | None) -> dict[str, torch.Tensor]:
    """Tensors that are plain attributes, which no `state_dict` knows, by dotted name: those that are others in `net`.

    What is computed from parameters at each forward is left out.
    """
    found: dict[str, torch.Tensor] = {}
    others = dict(rebuilt.named_modules()) if rebuilt is not None else {}
    for name, module in net.named_modules():
        for key, value in vars(module).items():
            if type(value) is not torch.Tensor or not value.is_leaf or value.is_meta or not _is_settable(module, key):
                continue
            if rebuilt is None or _is_other(value, vars(others[name]).get(key)):
                found[_joined(name, key)] = value
    return found


def set_loose(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Set tensors that `loose_tensors` found; where that name is another thing's in a model, it is left."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, tensor in tensors.items():
        owner, _, key = name.rpartition(".")
        if owner in modules and _is_settable(modules[owner], key):
            modules[owner].__dict__[key] = tensor


def unwritten(net: nn.Module, rebuilt: nn.Module) -> list[str]:
    """Attributes that are others in `net`, and no plain data: a file cannot hold them.

    Tensors in lists and dicts, and objects where `rebuilt` has none, are taken for caches, which a model fills again.
    """
    others = dict(rebuilt.named_modules())
    return [
        _joined(name, key)
        for name, module in net.named_modules()
        for key, value in vars(module).items()
        if key not in _own(module) and not is_plain(value) and not isinstance(value, (nn.Module, torch.Tensor))
        if not leaves(value, torch.Tensor) and not (key == "train" and is_held(module))
        if vars(others[name]).get(key) is not None and _described(value) != _described(vars(others[name])[key])
    ]


def _own(module: nn.Module) -> set[str]:
    return _OWN | _OPENED if isinstance(module, fx.GraphModule) else _OWN


def _is_settable(module: nn.Module, key: str) -> bool:
    """Whether a name is, or could be, that of an attribute that holds data: no method, no member, none of torch's."""
    members = (module._parameters, module._buffers, module._modules)
    if key in _own(module) or any(key in held for held in members):
        return False
    if key in vars(module):
        return is_plain(vars(module)[key]) or isinstance(vars(module)[key], torch.Tensor)
    of_class = getattr(type(module), key, None)
    return not callable(of_class) and not hasattr(of_class, "__set__")


def _described(value: Any, depth: int = 4) -> Any:
    """A value in terms that can be compared: objects by their class and attributes, functions by their names."""
    if is_plain(value) or depth == 0:
        return repr(value) if is_plain(value) else type(value)
    if isinstance(value, (set, frozenset)):
        return sorted(str(_described(item, depth - 1)) for item in value)
    if isinstance(value, (list, tuple)):
        return [_described(item, depth - 1) for item in value]
    if isinstance(value, Mapping):
        return [(str(key), _described(item, depth - 1)) for key, item in value.items()]
    code = _code(value)
    return code if code is not None else (type(value), _described(getattr(value, "__dict__", None), depth - 1))


def modes_of(model: nn.Module) -> dict[str, bool]:
    """The training flags: a path's holds for all below it that says nothing else.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.ReLU())
        >>> _ = net[1].eval()
        >>> modes_of(net)
        {'': True, '1': False}
    """
    flags: dict[str, bool] = {}
    for name, module in model.named_modules():
        if not name or flags[_above(name, flags)] is not module.training:
            flags[name] = module.training
    return flags


def set_modes(model: nn.Module, flags: Mapping[str, bool], held: Collection[str]) -> None:
    """Set the training flags that `modes_of` found; the modules at the paths `held` stay in eval mode, the others not.

    Raises:
        CheckpointMismatch: One is of a module that is not there, or the model's own is missing.
    """
    modules = dict(model.named_modules())
    unknown = sorted({*flags, *held} - set(modules))
    if unknown or "" not in flags:
        raise CheckpointMismatch("no such module to set a training flag of", path=(unknown or ["''"])[0])
    for name, module in modules.items():
        if is_held(module):
            let_go(module)
        module.training = flags[name if name in flags else _above(name, flags)]
        if name in held:
            hold(module)


def _above(name: str, flags: Mapping[str, bool]) -> str:
    while name:
        name = name.rpartition(".")[0]
        if name in flags:
            break
    return name


def _class_of(module: nn.Module) -> str:
    if isinstance(module, fx.GraphModule):
        return "an opened module"
    return f"{type(module).__module__}:{type(module).__qualname__}"


def _same_graphs(one: fx.GraphModule, other: Any) -> bool:
    ours, theirs = (getattr(module, "train_graph", None) for module in (one, other))
    if ours is None or theirs is None:
        return ours is theirs and same_graph(one.graph, other.graph)
    return same_graph(one.graph, other.graph) and same_graph(ours, theirs)


def _code(value: Any) -> str | None:
    """The name of a function or a class that is kept as an attribute; `None` for anything else."""
    if isinstance(value, functools.partial):
        return f"{_code(value.func)}{value.args}{value.keywords}" if is_plain(list(value.args)) else None
    if isinstance(value, (FunctionType, BuiltinFunctionType, type)):
        return f"{value.__module__}:{value.__qualname__}"
    return None


def _equal(one: Any, other: Any) -> bool:
    return type(one) is type(other) and (one == other or repr(one) == repr(other))


def _is_other(ours: torch.Tensor, theirs: Any) -> bool:
    if not isinstance(theirs, torch.Tensor):
        return True
    return ours.dtype != theirs.dtype or ours.shape != theirs.shape or not torch.equal(ours.cpu(), theirs.cpu())


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
