"""How much of a difference is the model's own: what rounding to float32 does to it, measured in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.export.outputs import named_outputs
from torchtrim.export.stand_in import run_once
from torchtrim.graph.copying import full_copy
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.operators import draws

# Two orders of the same sums are off by different amounts: 2.4 times, of a linear layer with weights that cancel.
SHARE = 4.0
MOST = 0.1  # of the largest value


class InDouble:
    """A copy of a model in double precision, made when it is first run. It takes twice the memory of the model.

    Args:
        model: The model, which is left as it is.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._twin: nn.Module | None = None

    def outputs(self, inputs: Inputs) -> list[NDArray[Any]] | None:
        """The outputs, in the order of `named_outputs`.

        Returns:
            None where they cannot be had: the code asks for one type, the memory is too small, the device has no double
            precision; or where they are others: of random numbers, which double precision draws anew.

        Example:
            >>> (found,) = InDouble(nn.Linear(2, 1)).outputs(Inputs.of(torch.ones(1, 2)))
            >>> found.dtype.name
            'float64'
        """
        watch = _Draws()  # type: ignore[no-untyped-call]
        try:
            if self._twin is None:
                self._twin = full_copy(self._model).double()
            with watch:
                found = named_outputs(run_once(self._twin, inputs.map(_widened)))
            arrays = [_widened(output.detach()).cpu().numpy() for output in found.values()]
        except Exception:  # noqa: BLE001 -- whatever a forward raises that is written for one type of numbers
            return None
        return None if watch.drew else arrays


class _Draws(TorchDispatchMode):
    """Whether random numbers were drawn."""

    drew = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.drew |= draws(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Rounding:
    """The largest absolute errors of an output beside double precision.

    Attributes:
        model: The model's, in float32.
        file: The file's.
        why: Why the file's is more than rounding; None where it is not.
    """

    model: float
    file: float
    why: str | None = None


def rounding_of(
    model: NDArray[Any], file: NDArray[Any], exact: NDArray[Any], relative: float | None
) -> Rounding | None:
    """Whether a file is as near to the exact outputs as the model is.

    It is as near where neither is off by more than a tenth of the largest value, where no row of the file is off by
    more than `relative` of that or four times what the model's own row is off (in its largest error, and in the root of
    its mean square), and where the largest entry of a row is the exact one at least as often as in the model's rows.

    Args:
        model: What the model gives, shape `(rows, ...)` or `()`.
        file: What the file gives; the same shape.
        exact: What the model gives in double precision.
        relative: The error that is allowed in any case, as a share of the largest exact value.

    Returns:
        None where that cannot be told: other shapes, or numbers that are not finite.

    Example:
        >>> exact = np.array([[1.0, 2.0], [3.0, 4.0]])
        >>> rounding_of(exact + [[0.1], [0.0]], exact - [[0.1], [0.0]], exact, 1e-3).why
        >>> rounding_of(exact + [[0.1], [0.0]], exact - [[0.0], [0.1]], exact, 1e-3).why
        'a row of the file is off by more than four times as much as that of the model'
    """
    if not (model.shape == file.shape == exact.shape and exact.size):
        return None
    if not all(np.isfinite(values).all() for values in (model, file, exact)):
        return None
    by_row = [_rows(values) for values in (model, file, exact)]
    own, found = (np.abs(values - by_row[2]) for values in by_row[:2])
    largest = float(np.abs(exact).max())
    return Rounding(float(own.max()), float(found.max()), _too_much(own, found, largest, relative or 0.0, *by_row))


def _too_much(
    own: NDArray[np.float64],
    found: NDArray[np.float64],
    largest: float,
    relative: float,
    model: NDArray[np.float64],
    file: NDArray[np.float64],
    exact: NDArray[np.float64],
) -> str | None:
    if max(own.max(), found.max()) > MOST * largest:
        return "more than a tenth of the largest value is no rounding"
    pairs = ((own.max(1), found.max(1)), tuple(np.sqrt((each**2).mean(1)) for each in (own, found)))
    for ours, theirs in pairs:
        if (theirs > np.maximum(relative * largest, SHARE * ours)).any():
            return "a row of the file is off by more than four times as much as that of the model"
    if exact.shape[1] > 1:
        choice = exact.argmax(1)
        if (file.argmax(1) == choice).sum() < (model.argmax(1) == choice).sum():
            return "the file's largest columns are others"
    return None


def _rows(values: NDArray[Any]) -> NDArray[np.float64]:
    return values.astype(np.float64).reshape(len(values) if values.ndim else 1, -1)


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
