"""Modules that are held in eval mode, also through `.train()`: frozen norms, whose running statistics must not move."""

from __future__ import annotations

from functools import partial

from torch import nn


def hold(module: nn.Module) -> None:
    """Take a module to eval mode and keep it there, through copying and pickling too.

    Example:
        >>> norm = nn.BatchNorm1d(3)
        >>> hold(norm)
        >>> norm.train().training, is_held(norm)
        (False, True)
    """
    module.__dict__["train"] = partial(_stay_in_eval, module)
    module.training = False


def is_held(module: nn.Module) -> bool:
    """Whether `hold` holds it."""
    held = module.__dict__.get("train")
    return isinstance(held, partial) and held.func is _stay_in_eval


def let_go(module: nn.Module) -> None:
    """Let a held module follow `.train()` again; its mode stays as it is."""
    del module.__dict__["train"]


def _stay_in_eval(module: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for `train`."""
    module.training = False
    return module
