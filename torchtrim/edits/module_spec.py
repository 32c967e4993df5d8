"""A module as data: its class, its constructor's arguments, its children and its weights. Never code."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from torchtrim.edits.module_arguments import NotPlainError, constructor_arguments, decoded
from torchtrim.edits.module_state import difference, from_state, holds_plain_tensors, own_difference, own_state
from torchtrim.edits.module_types import Trusted, class_of, is_open_class, name_of
from torchtrim.edits.weights import Weights
from torchtrim.errors import EditError, EditUntrusted, TorchTrimError
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.writable import is_writable

__all__ = ["ModuleSpec", "Trusted"]


@dataclass(frozen=True)
class ModuleSpec:
    """A module, described so that a record can hold it and build it again.

    By hand, for a recipe, a type and its arguments are enough: `{"type": "ReLU6"}`.

    Attributes:
        type: The class, as `"module:name"`; the name alone for one of `torch.nn`.
        arguments: What the constructor is called with, as plain JSON data, a list for a tuple. `None`: not known.
        state: What the module holds besides, for one whose arguments are not known: it is made without its constructor.
        children: Modules put in after the constructor ran, by name: the elements of a `Sequential`, what was replaced.
        weights: Parameters and buffers by their dotted names; `None` leaves them as the constructor makes them.
        tied: Other names of these, each with the name under which it is in `weights`.
        frozen: The parameters that take no gradient.
        training: The training flag.
        switched: Modules inside whose training flag is the other one.
        reason: Why a record cannot build it, where it cannot.
    """

    type: str = "Identity"
    arguments: dict[str, Any] | None = field(default_factory=dict)
    state: dict[str, Any] | None = None
    children: dict[str, ModuleSpec] = field(default_factory=dict)
    weights: Weights | None = None
    tied: dict[str, str] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    training: bool = True
    switched: tuple[str, ...] = ()
    reason: str | None = None

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid", "arbitrary_types_allowed": True}

    @staticmethod
    def of(module: nn.Module) -> ModuleSpec:
        """Describe a module. What it describes was built once and compared; where that failed, `reason` says why.

        Args:
            module: Any module. It is left as it was; the spec knows it as `live` until the edit is recorded.

        Raises:
            EditError: Not a module, or one whose parameters have no shape or no values yet.

        Example:
            >>> spec = ModuleSpec.of(nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
            >>> print(spec)
            Sequential(Linear(in_features=2, out_features=3), ReLU())
            >>> spec.build()[0].weight.shape
            torch.Size([3, 2])
        """
        _refuse_unready(module)
        spec = _described(module)
        tensors, tied = _tensors(module)
        frozen = tuple(name for name, held in module.named_parameters() if not held.requires_grad)
        spec = replace(spec, weights=Weights(tensors) if tensors else None, tied=tied, frozen=frozen)
        if spec._whole():
            spec = replace(spec, reason=_unfaithful(spec, module))
        spec.__dict__["_live"] = module
        return spec

    @property
    def live(self) -> nn.Module | None:
        """The user's own module, where the spec was just made from one."""
        return self.__dict__.get("_live")

    def build(
        self, *, trusted: Trusted = (), device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> nn.Module:
        """The module.

        Only classes of `torch.nn`, torchtrim, timm and torchvision are made; others must be in `trusted`.

        Args:
            trusted: Names of further classes that may be imported; or a dict that gives, by such a name, the class, a
                function that makes the module from the same arguments, or a module to copy.
            device: Where to put it; the CPU by default.
            dtype: The type of its floating-point values; by default as recorded.

        Raises:
            EditError: It cannot be built: the class is not allowed, its arguments are not known or do not fit, or the
                weights are not those of such a module.

        Example:
            >>> ModuleSpec("Conv2d", {"in_channels": 3, "out_channels": 8, "kernel_size": [3, 3]}).build()
            Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
        """
        try:
            return self._assembled(trusted).to(device=device, dtype=dtype)
        except TorchTrimError:
            raise
        except Exception as error:  # a constructor may raise anything, and what it is given may come from a file
            raise EditError(
                f"it cannot be made: {type(error).__name__}: {error}", path=self.type, found=self.arguments
            ) from error

    def recorded(self) -> ModuleSpec:
        """The same without the live module."""
        return replace(self)

    def __str__(self) -> str:
        name = self.type.rpartition(":")[2].rpartition(".")[2]
        if self.children:
            return f"{name}({', '.join(str(child) for child in self.children.values())})"
        given = (self.arguments or {}).items()
        return f"{name}({', '.join(f'{key}={_told(value)}' for key, value in given)})"

    def _whole(self) -> bool:
        """Whether nothing in it is missing."""
        return self.reason is None and all(child._whole() for child in self.children.values())

    def _assembled(self, trusted: Trusted) -> nn.Module:
        if self.weights is None:
            module = self._made(trusted, meta=False)
        else:
            with kept_random_state():
                # Without values first: the shapes are compared with those of the weights before memory is taken.
                module = self._made(trusted, meta=True)
                if any(tensor.is_meta for tensor in _tensors(module)[0].values()) or holds_plain_tensors(module):
                    module = self._made(trusted, meta=False)
        left = [name for name, tensor in _tensors(module)[0].items() if tensor.is_meta]
        if left:
            raise EditError("its weights are not in the record", path=self.type, expected=left)
        for name in (*dict(module.named_modules()), *_tensors(module)[0]):
            if not all(map(is_writable, filter(None, name.split(".")))):
                raise EditError("a name in it that Python source cannot hold", path=self.type, found=name[:60])
        return module

    def _made(self, trusted: Trusted, meta: bool) -> nn.Module:
        with torch.device("meta") if meta else nullcontext():
            module = self._constructed(trusted)
        for name, child in self.children.items():
            module.add_module(name, child._made(trusted, meta))
        if self.weights is not None:
            _assign(module, self.type, self.weights, self.tied)
        for name, held in module.named_parameters():
            if name in self.frozen:
                held.requires_grad_(False)
        module.train(self.training)
        for name, child in self.children.items():
            child._set_modes(module.get_submodule(name))
        self._switch(module)
        return module

    def _constructed(self, trusted: Trusted) -> nn.Module:
        given = isinstance(trusted, Mapping) and self.type in trusted
        unknown = self.arguments is None and self.state is None
        if unknown and not given:
            raise EditUntrusted(
                f"a record cannot build it: {self.reason or 'the arguments are not known'}",
                path=self.type,
                hint=f"trusted={{{self.type!r}: a module or a function that makes it}}",
            )
        kind = class_of(self.type, trusted)
        if isinstance(kind, nn.Module):
            return copy.deepcopy(kind)
        if unknown and isinstance(kind, type):
            raise EditError(
                f"the class alone does not make it: {self.reason or 'the arguments are not known'}",
                path=self.type,
                hint=f"trusted={{{self.type!r}: a module, or a function that makes it}}",
            )
        if self.arguments is None and self.state is not None and isinstance(kind, type):
            return from_state(kind, self.state, trusted)
        module = kind(**{name: decoded(value, trusted) for name, value in (self.arguments or {}).items()})
        if not isinstance(module, nn.Module):
            raise EditError(
                "what was given for this class makes no module", path=self.type, found=type(module).__name__
            )
        return module

    def _set_modes(self, module: nn.Module) -> None:
        module.train(self.training)
        for name, child in self.children.items():
            child._set_modes(module.get_submodule(name))
        self._switch(module)

    def _switch(self, module: nn.Module) -> None:
        modules = dict(module.named_modules(remove_duplicate=False))
        for path in self.switched:
            if path not in modules:
                raise EditError("there is no such module in it", path=self.type, found=path)
            modules[path].training = not self.training


def _described(module: nn.Module) -> ModuleSpec:
    """The spec without weights; with a reason where a record cannot build the module."""
    kind = type(module)
    empty = ModuleSpec(name_of(kind), None, training=module.training)
    reason = _refusal(module)
    if reason is not None:
        return replace(empty, reason=reason)
    try:
        spec = replace(empty, arguments=constructor_arguments(module))
        built = _trial(spec, module)
        found = own_difference(module, built)
        order = [*built._modules, *(name for name in module._modules if name not in built._modules)]
        if found is None and order == list(module._modules):
            return _with_children(spec, module, built)
        failed = f"built with {spec.arguments}, it has {found or 'other children'}"
    except (NotPlainError, TorchTrimError) as error:
        failed = str(error)
    if not is_open_class(kind):
        return replace(empty, reason=failed)  # only its own constructor may know what such a class needs
    try:
        spec = replace(empty, state=own_state(module))
        return _with_children(spec, module, None)
    except NotPlainError as error:
        return replace(empty, reason=f"{failed}; and {error}")


def _trial(spec: ModuleSpec, module: nn.Module) -> nn.Module:
    """What the constructor makes, without values where that is enough to compare."""
    live = {name_of(type(each)): type(each) for each in module.modules()}
    try:
        with kept_random_state():
            built = spec._made(live, meta=True)
            return spec._made(live, meta=False) if holds_plain_tensors(built) else built
    except Exception as error:  # whatever the constructor raises, it is not to be called like this
        raise NotPlainError(f"built with {spec.arguments}, it raises {type(error).__name__}: {error}") from error


def _with_children(spec: ModuleSpec, module: nn.Module, built: nn.Module | None) -> ModuleSpec:
    """With those children that the constructor does not make as they are."""
    children = {}
    for name, child in module._modules.items():
        twin = None if built is None else built._modules.get(name)
        if child is not None and (twin is None or difference(child, twin) is not None):
            children[name] = _described(child)
    inside = {
        path: each
        for path, each in module.named_modules(remove_duplicate=False)
        if path and path.partition(".")[0] not in children
    }
    switched = tuple(path for path, each in inside.items() if each.training != module.training)
    return replace(spec, children=children, switched=switched)


def _refusal(module: nn.Module) -> str | None:
    if is_parametrized(module):
        return "it is parametrized; torch.nn.utils.parametrize.remove_parametrizations makes it plain"
    if isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)):
        return f"a {type(module).__name__} holds code"
    found = own_difference(module, module)  # itself is another only in what cannot be recorded at all
    return None if found is None else f"it has {found}"


def _unfaithful(spec: ModuleSpec, module: nn.Module) -> str | None:
    """Why what the spec builds is not the module; `None` where it is."""
    live = {name_of(type(each)): type(each) for each in module.modules()}
    try:
        built = spec.build(trusted=live)
    except EditError as error:
        return str(error)
    names = [list(each.state_dict()) for each in (module, built)]
    if names[0] != names[1]:
        return "its state_dict has other keys when it is built again"
    if repr(module) != repr(built):
        return "it reads otherwise when it is built again"
    return difference(module, built)


def _refuse_unready(module: object) -> None:
    if not isinstance(module, nn.Module):
        hint = f"{module.__name__}()" if isinstance(module, type) else None
        raise EditError("not a module", found=repr(module), expected="an nn.Module", hint=hint)
    for name, held in _every_tensor(module):
        if is_lazy(held):
            raise EditError("a lazy parameter has no shape yet", path=name, hint="run the module once")
        if held.is_meta:
            raise EditError("it is on the meta device and has no values", path=name, hint="module.to_empty(...)")


def _every_tensor(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _tensors(module: nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Every parameter and buffer by the first of its names, and the first name by each further one."""
    first: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    tied: dict[str, str] = {}
    for name, held in _every_tensor(module):
        if id(held) in first:
            tied[name] = first[id(held)]
        else:
            first[id(held)] = name
            tensors[name] = held
    return tensors, tied


def _assign(module: nn.Module, kind: str, weights: Weights, tied: dict[str, str]) -> None:
    """Put recorded values in place of all parameters and buffers."""
    places = {name: held.shape for name, held in _every_tensor(module)}
    if places.keys() != weights.keys() | tied.keys() or not weights.keys() >= set(tied.values()):
        raise EditError(
            "the recorded weights are not those of such a module",
            path=kind,
            found=sorted(weights.keys() | tied.keys()),
            expected=sorted(places),
        )
    made: dict[str, torch.Tensor] = {}
    for name, shape in places.items():
        source = tied.get(name, name)
        if weights[source].shape != shape:
            raise EditError(
                "a recorded weight has another shape",
                path=f"{kind}.{name}",
                found=list(weights[source].shape),
                expected=list(shape),
            )
        owner, _, key = name.rpartition(".")
        members = module.get_submodule(owner)
        is_parameter = members._parameters.get(key) is not None
        if source not in made:
            value = weights[source].clone()
            floating = value.is_floating_point() or value.is_complex()
            made[source] = nn.Parameter(value, requires_grad=floating) if is_parameter else value
        setattr(members, key, made[source])  # not past `__setattr__`: recurrent layers keep a list of theirs


def _told(value: Any) -> str:
    if isinstance(value, list):
        return f"({', '.join(_told(item) for item in value)})"
    if isinstance(value, dict) and len(value) == 1:
        return str(next(iter(value.values()))).rpartition(":")[2]
    return repr(value)
