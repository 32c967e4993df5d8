"""A module of the user's, given back as it was where what is done with it fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_MEMBERS = ("_parameters", "_buffers", "_modules")


@contextmanager
def kept_if_it_fails(module: nn.Module) -> Iterator[None]:
    """Give a module its children, parameters, values, mode and attributes back where something raises.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> try:
        ...     with kept_if_it_fails(layer):
        ...         layer.half().eval().out_features = 7
        ...         raise ValueError
        ... except ValueError:
        ...     layer.weight.dtype, layer.training, layer.out_features
        (torch.float32, True, 2)
    """
    values = [(held, held.data) for held in module.parameters()]
    states = [
        (each, dict(each.__dict__), {name: dict(each.__dict__[name]) for name in _MEMBERS}) for each in module.modules()
    ]
    try:
        yield
    except BaseException:
        for held, value in values:
            held.data = value
        for each, attributes, members in states:
            each.__dict__.clear()
            each.__dict__.update(attributes)
            for name, kept in members.items():
                each.__dict__[name].clear()
                each.__dict__[name].update(kept)
        raise
