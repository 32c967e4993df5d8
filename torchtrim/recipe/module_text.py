"""Modules as text: `nn.Dropout(0.2)`, read without running code."""

from __future__ import annotations

import ast
import importlib
from typing import Any

from torch import nn

from torchtrim.edits.module_types import class_of, is_open_class
from torchtrim.errors import EditError, MissingDependency, TorchTrimError

_PACKAGES = ("timm.layers", "torchvision.ops")


def read_module(text: str) -> nn.Module:
    """The module that a text says, as one would write it in Python.

    Classes are those of `torch.nn` (`nn.ReLU`, `torch.nn.ReLU`, `ReLU`), `timm.layers` and `torchvision.ops`; arguments
    are numbers, texts, lists, other modules and classes. A class alone is called without arguments. Nothing else is
    understood, and no code is run.

    Raises:
        EditError: It is not such a text, there is no such class, or it does not take these arguments.
        MissingDependency: timm or torchvision is needed and not installed.

    Example:
        >>> read_module("nn.Sequential(nn.Linear(4, 2), nn.ReLU(inplace=True))")
        Sequential(
          (0): Linear(in_features=4, out_features=2, bias=True)
          (1): ReLU(inplace=True)
        )
    """
    value = _value(_parsed(text), text)
    if isinstance(value, type):
        value = _made(value, (), {}, text)
    if not isinstance(value, nn.Module):
        raise EditError("not a module", path=text, expected='like "nn.Dropout(0.2)"')
    return value


def read_type(text: str) -> type[nn.Module]:
    """The class that a text names.

    Raises:
        EditError: There is no such class.

    Example:
        >>> read_type("nn.ReLU").__name__
        'ReLU'
    """
    value = _value(_parsed(text), text)
    if not isinstance(value, type):
        raise EditError("not a class of modules", path=text, expected='like "nn.ReLU"')
    return value


def names_a_type(text: str) -> bool:
    """Whether a text means a class rather than a path: `nn.ReLU`, `timm.layers.DropPath`.

    Example:
        >>> names_a_type("nn.ReLU"), names_a_type("layer1.0.relu")
        (True, False)
    """
    return text.startswith(("nn.", "torch.nn.", *(f"{package}." for package in _PACKAGES))) and "*" not in text


def _parsed(text: str) -> ast.expr:
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise EditError("a module is written as in Python", path=text, expected='like "nn.Dropout(0.2)"') from error


def _value(node: ast.expr, text: str) -> Any:
    if isinstance(node, (ast.Name, ast.Attribute)):
        return _class(_dotted(node, text), text)
    if isinstance(node, ast.Call):
        kind = _value(node.func, text)
        if not isinstance(kind, type):
            raise EditError("only classes of modules can be called", path=text)
        if any(keyword.arg is None for keyword in node.keywords):
            raise EditError("** is not understood in the text of a module", path=text)
        given = [_value(arg, text) for arg in node.args]
        named = {str(keyword.arg): _value(keyword.value, text) for keyword in node.keywords}
        return _made(kind, given, named, text)
    if isinstance(node, (ast.List, ast.Tuple)):
        items = [_value(item, text) for item in node.elts]
        return items if isinstance(node, ast.List) else tuple(items)
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError, MemoryError) as error:
        raise EditError(
            "not understood in the text of a module", path=text, found=ast.unparse(node), expected="plain values"
        ) from error


def _dotted(node: ast.expr, text: str) -> str:
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, text)}.{node.attr}"
    raise EditError("not the name of a class", path=text, found=ast.unparse(node))


def _class(name: str, text: str) -> type[nn.Module]:
    package, _, short = name.rpartition(".")
    if package not in _PACKAGES:
        found: Any = class_of(name)
        return found  # type: ignore[no-any-return]
    try:
        found = getattr(importlib.import_module(package), short, None)
    except ModuleNotFoundError as error:
        raise MissingDependency(
            f"{package} is not installed", path=text, hint='pip install "torchtrim[zoo]"'
        ) from error
    if not isinstance(found, type) or not issubclass(found, nn.Module) or not is_open_class(found):
        raise EditError(f"{package} has no such class of modules", path=name)
    return found


def _made(kind: type[nn.Module], given: Any, named: dict[str, Any], text: str) -> nn.Module:
    try:
        return kind(*given, **named)
    except TorchTrimError:
        raise
    except Exception as error:  # whatever its own constructor refuses its arguments with
        raise EditError(f"{kind.__name__} does not take these arguments: {error}", path=text) from error
