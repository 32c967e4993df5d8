"""How much of a difference is the model's own: what rounding to float32 does to it, measured in double precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torchtrim.errors import InputError, ModelError
from torchtrim.export.outputs import named_outputs
from torchtrim.export.stand_in import run_once
from torchtrim.graph.copying import structural_copy
from torchtrim.graph.inputs import Inputs

# Two orders of the same sums are off by different amounts: 2.4 times, of a linear layer with weights that cancel.
SHARE = 4.0
MOST = 0.1  # of the largest value


def in_double(model: nn.Module, inputs: Inputs) -> list[NDArray[Any]] | None:
    """The outputs of a model in double precision, in the order of `named_outputs`.

    The weights are copied for it: twice the memory of float32 ones, for the length of the run.

    Returns:
        None where the model cannot be run so: its code asks for one type, the memory is too small, or the device has
        no double precision.

    Example:
        >>> [output.dtype.name for output in in_double(nn.Linear(2, 1), Inputs.of(torch.ones(1, 2)))]
        ['float64']
    """
    wide: dict[int, torch.Tensor] = {}
    try:
        wide |= {id(each): nn.Parameter(_widened(each.detach()), False) for each in model.parameters() if _narrow(each)}
        wide |= {id(each): _widened(each.detach()) for each in model.buffers() if _narrow(each)}
        twin = structural_copy(model, own_buffers=True, stand_ins=wide)
        outputs = named_outputs(run_once(twin, inputs.map(_widened)))
    except (InputError, ModelError, MemoryError, RuntimeError, TypeError):  # of torch: too large, or a device without
        return None
    return [np.asarray(_comparable(output.detach().cpu()).numpy()) for output in outputs.values()]


@dataclass(frozen=True)
class Rounding:
    """The largest absolute errors of an output beside double precision.

    Attributes:
        model: The model's, in float32.
        file: The file's.
        alike: Whether no row of the file is off by more than rounding.
    """

    model: float
    file: float
    alike: bool


def rounding_of(
    model: NDArray[Any], file: NDArray[Any], exact: NDArray[Any], relative: float | None
) -> Rounding | None:
    """Whether a file is as near to the exact outputs as the model is, in each row.

    Args:
        model: What the model gives, shape `(rows, ...)` or `()`.
        file: What the file gives; the same shape.
        exact: What the model gives in double precision.
        relative: The error that is allowed in any case, as a share of the largest exact value.

    Returns:
        None where that cannot be told: other shapes, or numbers that are not finite. `alike`: each row of the file is
        off by no more than that share, or than four times what the model's own row is off; and the model by a tenth of
        the largest value at most. More is no rounding: in double precision the model chose another way.

    Example:
        >>> exact = np.array([[1.0, 2.0], [3.0, 4.0]])
        >>> rounding_of(exact + [[0.1], [0.0]], exact - [[0.1], [0.0]], exact, 1e-3).alike
        True
        >>> rounding_of(exact + [[0.1], [0.0]], exact - [[0.0], [0.1]], exact, 1e-3).alike
        False
    """
    if not (model.shape == file.shape == exact.shape and exact.size):
        return None
    if not all(np.isfinite(values).all() for values in (model, file, exact)):
        return None
    reference = exact.astype(np.float64)
    own, found = _by_row(model, reference), _by_row(file, reference)
    largest = float(np.abs(reference).max())
    allowed = np.maximum((relative or 0.0) * largest, SHARE * own)
    alike = bool((found <= allowed).all() and own.max() <= MOST * largest)
    return Rounding(float(own.max()), float(found.max()), alike)


def _by_row(values: NDArray[Any], exact: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest error of each row."""
    error = np.abs(values.astype(np.float64) - exact)
    rows = len(error) if error.ndim else 1
    return np.asarray(error.reshape(rows, -1).max(1))


def _narrow(tensor: torch.Tensor) -> bool:
    return tensor.dtype == torch.float32


def _comparable(tensor: torch.Tensor) -> torch.Tensor:
    """NumPy has no bfloat16."""
    return tensor.double() if tensor.is_floating_point() else tensor


def _widened(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.double() if _narrow(tensor) else tensor
