"""Whether the same inputs give the same outputs again; and if not, which module begins it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.export.stand_in import run_once
from torchtrim.graph.inputs import Inputs

# Sums in another order differ by a few units in the last place. More than that is no rounding.
_UNITS = 64


def differing(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> list[str]:
    """The names of the outputs that are not the same in both, up to float noise.

    Example:
        >>> a = np.ones((2, 3), dtype=np.float32)
        >>> differing({"x": a, "y": a}, {"x": a + 1e-7, "y": a + 1e-3})
        ['y']
    """
    return [name for name in one if not _same(one[name], other[name])]


def _same(one: NDArray[Any], other: NDArray[Any]) -> bool:
    if one.shape != other.shape:
        return False
    if not np.issubdtype(one.dtype, np.floating):
        return bool((one == other).all())
    a, b = one.astype(np.float64), other.astype(np.float64)
    if not ((np.isnan(a) == np.isnan(b)).all() and (np.isinf(a) == np.isinf(b)).all()):
        return False
    finite = np.isfinite(a)
    largest = float(np.abs(a[finite]).max(initial=0.0))
    return float(np.abs(a - b, where=finite, out=np.zeros_like(a)).max(initial=0.0)) <= _noise(one) * largest


def _noise(array: NDArray[Any]) -> float:
    return _UNITS * float(np.finfo(array.dtype).eps)


def module_that_differs(model: nn.Module, inputs: Inputs) -> str | None:
    """The path of the first module whose output changes from one run to the next; None where only the whole does."""
    one, other = _sums(model, inputs), _sums(model, inputs)
    for (path, value), (_, again) in zip(one, other, strict=False):
        # The innermost modules end first, so the first that differs is the one that begins it.
        if not np.allclose(value, again, rtol=1e-5, atol=0, equal_nan=True):
            return path or None
    return None


def _sums(model: nn.Module, inputs: Inputs) -> list[tuple[str, tuple[float, float]]]:
    """For each call of a module, in the order in which they end, two sums over what it gives."""
    calls: list[tuple[str, tuple[float, float]]] = []
    handles = []

    def listen(path: str) -> Any:
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensors = [leaf.detach() for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            reals = [tensor.double() for tensor in tensors if not tensor.is_complex()]
            calls.append((path, (sum(float(t.sum()) for t in reals), sum(float(t.square().sum()) for t in reals))))

        return hook

    try:
        for path, module in model.named_modules():
            if not isinstance(module, torch.jit.ScriptModule):
                handles.append(module.register_forward_hook(listen(path)))
        run_once(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls
