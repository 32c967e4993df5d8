"""Classes of modules by name, as records hold them: those of known packages, and those the user trusts. No others."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Collection, Mapping
from enum import Enum
from typing import Any, TypeAlias

import torch
from torch import fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from torchtrim.errors import EditError, EditUntrusted, MissingDependency, nearest

Trusted: TypeAlias = "Collection[str] | Mapping[str, Callable[..., nn.Module] | nn.Module]"

# What a record may name without being asked: layers, and the models they come from. Not the other parts of these
# packages, some of which read files when they are made.
_PACKAGES = ("torch.nn.modules", "torchtrim", "timm.layers", "timm.models", "torchvision.ops", "torchvision.models")
_NAME = re.compile(r"(?!_)[A-Za-z_]\w*(\.(?!__)\w+)*:[A-Za-z_]\w*")


def name_of(kind: type) -> str:
    """The name of a class in records, as `module:name`.

    Example:
        >>> name_of(nn.ReLU)
        'torch.nn.modules.activation:ReLU'
    """
    return f"{kind.__module__}:{kind.__qualname__}"


def class_of(name: str, trusted: Trusted = ()) -> Callable[..., nn.Module] | nn.Module:
    """The class of a name; or what the caller gives for it.

    Only subclasses of `nn.Module` that `torch.nn`, torchtrim, timm or torchvision define are found, and only these
    packages are imported. Every other class must be named in `trusted`. A name without a colon is one of `torch.nn`.

    Args:
        name: As `name_of` gives it; or `"ReLU"`, `"torch.nn.ReLU"`.
        trusted: Names that may be imported too; or a dict that gives the class, a function that makes the module of
            the same arguments, or a module to copy, for each name.

    Raises:
        EditError: There is no such class, or it is not allowed.
        MissingDependency: timm or torchvision is not installed.

    Example:
        >>> class_of("ReLU6").__name__
        'ReLU6'
    """
    if isinstance(trusted, Mapping) and name in trusted:
        return trusted[name]
    if ":" not in name:
        return _of_torch(name)
    module, _, attribute = name.partition(":")
    named = not isinstance(trusted, (str, Mapping)) and name in trusted
    if not named and (not _NAME.fullmatch(name) or not _within(module, _PACKAGES)):
        raise EditUntrusted(
            "a class that a record may not name",
            path=name,
            expected="a layer of torch.nn, torchtrim, timm or torchvision",
            hint=f"trusted={{{name!r}: TheClass}}, if you know where the record comes from",
        )
    found = vars(_imported(module)).get(attribute)
    if not isinstance(found, type) or not issubclass(found, nn.Module) or name_of(found) != name:
        raise EditError("there is no such class of modules", path=name, found=None if found is None else repr(found))
    if not named and issubclass(found, (fx.GraphModule, torch.jit.ScriptModule, LazyModuleMixin)):
        raise EditError("modules of this class cannot be made from a record", path=name)
    return found


def choice_of(name: str, value: object) -> Enum:
    """A member of an enumeration that one of the known packages defines.

    Raises:
        EditError: There is none.
    """
    module, _, attribute = name.partition(":")
    allowed = _NAME.fullmatch(name) and _within(module, _PACKAGES)
    found = vars(_imported(module)).get(attribute) if allowed else None
    if not isinstance(found, type) or not issubclass(found, Enum) or name_of(found) != name:
        raise EditError("a choice that a record may not name", path=name)
    try:
        return found(value)
    except ValueError as error:
        raise EditError("there is no such choice", path=name, found=value) from error


def is_open_class(kind: type) -> bool:
    """Whether records may name a class without the caller's trust.

    Example:
        >>> is_open_class(nn.ReLU), is_open_class(dict)
        (True, False)
    """
    try:
        return class_of(name_of(kind)) is kind
    except EditError:
        return False


def _of_torch(name: str) -> type[nn.Module]:
    short = name.removeprefix("torch.").removeprefix("nn.")
    found = vars(nn).get(short)
    if isinstance(found, type) and issubclass(found, nn.Module) and is_open_class(found):
        return found
    layers = [key for key, value in vars(nn).items() if isinstance(value, type) and issubclass(value, nn.Module)]
    raise EditError(
        "torch.nn has no such class of modules",
        path=name,
        expected="a class of torch.nn, or 'module:name'",
        hint=next((repr(key) for key in layers if key.lower() == short.lower()), None) or nearest(short, layers),
    )


def _within(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def _imported(module: str) -> Any:
    package = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == package and package in ("timm", "torchvision"):
            raise MissingDependency(
                f"the record holds a layer of {package}, which is not installed",
                path=module,
                hint=f"pip install {package}",
            ) from error
        raise EditError(f"no such module: {error}", path=module) from error
