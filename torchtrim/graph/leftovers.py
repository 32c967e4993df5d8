"""What a traced forward leaves behind: proxies in attributes, state, draws from Python's random numbers."""

from __future__ import annotations

import random
from collections import OrderedDict
from typing import Any

import numpy as np
from torch import fx, nn


def forget_proxies(module: nn.Module) -> bool:
    """Take out what a traced forward left in a module's attributes; returns whether there was anything."""
    held = [name for name, value in module.__dict__.items() if _holds_proxy(value)]
    for name in held:
        value = module.__dict__[name]
        if isinstance(value, dict):
            for key in [key for key, item in value.items() if isinstance(item, fx.Proxy)]:
                del value[key]
        elif isinstance(value, list):
            value[:] = [item for item in value if not isinstance(item, fx.Proxy)]
        else:
            del module.__dict__[name]
    return bool(held)


def kept_state(module: nn.Module, before: dict[str, Any], members: dict[str, dict[str, Any]]) -> str | None:
    """The attribute in which a forward kept something, if it did."""
    for kind, held in members.items():
        for name, value in module.__dict__[kind].items():
            if held.get(name, module) is not value:
                return str(name)
    for name, value in module.__dict__.items():
        if before.get(name, module) is not value or _holds_proxy(value):
            return name
    return None


def _holds_proxy(value: Any) -> bool:
    kind = type(value)
    if kind is dict or kind is OrderedDict or kind is list:
        return bool(value) and any(isinstance(item, fx.Proxy) for item in (value if kind is list else value.values()))
    return isinstance(value, fx.Proxy)


def python_random() -> tuple[Any, ...]:
    """The states of Python's and NumPy's generators."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return (random.getstate(), name, np.asarray(keys).tobytes(), *rest)
