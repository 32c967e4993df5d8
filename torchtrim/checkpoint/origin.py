"""Where a model comes from: the function that makes it as it was before the first edit, and how that is called."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from torchtrim.checkpoint.plain import is_plain
from torchtrim.checkpoint.zoo import WEIGHT_ARGUMENTS, ZOOS, from_zoo
from torchtrim.edits.history import History
from torchtrim.edits.module_spec import Trusted
from torchtrim.errors import CheckpointError, CheckpointUntrusted

# Attributes of the model that hold these; edits carry them on.
_FACTORY = "_torchtrim_factory"
_HISTORY, _INPUTS = "_torchtrim_history", "_torchtrim_inputs"


@dataclass(frozen=True)
class Factory:
    """What makes a model, by name.

    Attributes:
        name: `timm:NAME`, `torchvision:NAME`, or `package.module:function` (which may be a class).
        arguments: Keyword arguments, plain data.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(given: Any) -> Factory:
        """What a user gives: a name, a name with arguments, or the function or class itself.

        Raises:
            CheckpointError: It is none of these, or cannot be found again by its name.

        Example:
            >>> Factory.of(("timm:resnet18", {"num_classes": 10, "pretrained": True}))
            Factory(name='timm:resnet18', arguments={'num_classes': 10})
        """
        arguments: Any = {}
        if isinstance(given, Factory):
            return given
        if isinstance(given, tuple) and len(given) == 2:
            given, arguments = given
        name = given if isinstance(given, str) else _name_of(given)
        if not re.fullmatch(r"[\w.]+:[\w.\-]+", name):
            raise CheckpointError(
                "not the name of a factory", path=name, expected="timm:NAME, torchvision:NAME, package.module:function"
            )
        if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
            raise CheckpointError("a factory's arguments are a dict by name", path=name, found=arguments)
        drop = WEIGHT_ARGUMENTS.get(name.partition(":")[0], set())
        kept = {key: value for key, value in arguments.items() if key not in drop}
        for key, value in kept.items():
            if not is_plain(value):
                raise CheckpointError(
                    "a factory's argument is not plain data",
                    path=f"{name}, {key}",
                    found=type(value).__name__,
                    hint="a function of your own that makes the model without it",
                )
        return Factory(name, kept)

    @property
    def of_a_zoo(self) -> bool:
        """Whether it is a model of timm or torchvision, which need not be trusted."""
        return self.name.partition(":")[0] in ZOOS

    def make(self, trusted: Trusted) -> nn.Module:
        """Call it.

        Raises:
            CheckpointUntrusted: It is not of a known zoo and not named in `trusted`, or would read weights.
            CheckpointError: It gives no model.
            ModelError: A zoo has no such model, or does not take the arguments.
        """
        source, _, attribute = self.name.partition(":")
        if self.of_a_zoo:
            refused = sorted(WEIGHT_ARGUMENTS[source] & set(self.arguments))
            if refused or not re.fullmatch(r"[\w.\-]+", attribute):
                raise CheckpointUntrusted("would read weights from elsewhere", path=self.name, found=refused or None)
            return from_zoo(self.name, self.arguments)
        make = self._trusted(trusted)
        try:
            model = make(**self.arguments)
        except Exception as error:  # the user's own code
            raise CheckpointError(f"could not be called: {type(error).__name__}: {error}", path=self.name) from error
        if not isinstance(model, nn.Module):
            raise CheckpointError("did not give a PyTorch model", path=self.name, found=type(model).__name__)
        return model

    def _trusted(self, trusted: Trusted) -> Callable[..., Any]:
        if isinstance(trusted, Mapping) and self.name in trusted:
            return trusted[self.name]
        if self.name not in ({trusted} if isinstance(trusted, str) else set(trusted)):
            raise CheckpointUntrusted(
                "the file asks for a function that was not named as trusted",
                path=self.name,
                hint=f"if you know it: load(..., trusted=[{self.name!r}]), or model= with a model you made",
            )
        return self.imported()

    def imported(self) -> Callable[..., Any]:
        """The function or class, where it is not of a zoo.

        Raises:
            CheckpointError: It cannot be imported.
        """
        module, _, attribute = self.name.partition(":")
        try:
            found: Any = importlib.import_module(module)
            for part in attribute.split("."):
                found = getattr(found, part)
        except (ImportError, AttributeError) as error:
            raise CheckpointError(f"cannot be imported: {error}", path=self.name) from error
        if not callable(found):
            raise CheckpointError("is not a function or a class", path=self.name, found=type(found).__name__)
        return found  # type: ignore[no-any-return]


def remember(model: nn.Module, factory: Factory) -> None:
    """Write on a model what made it; `save` looks there, and edits carry it on."""
    model.__dict__[_FACTORY] = factory


def remembered(model: nn.Module) -> Factory | None:
    """What made a model, where that was written on it."""
    found = model.__dict__.get(_FACTORY)
    return found if isinstance(found, Factory) else None


def write_history(model: nn.Module, past: History) -> None:
    """Write on a model what was done to it."""
    if past.inputs is not None or past.entries:
        model.__dict__[_HISTORY], model.__dict__[_INPUTS] = past, past.inputs


def _name_of(given: Any) -> str:
    module, name = getattr(given, "__module__", None), getattr(given, "__qualname__", None)
    if not callable(given) or not module or not name or "<" in name:
        raise CheckpointError(
            "a factory is found again by its name",
            found=given,
            expected="timm:NAME, torchvision:NAME, package.module:function, or a function or class of a module",
        )
    return f"{module}:{name}"
