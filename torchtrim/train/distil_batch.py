"""A batch for two models: what each takes of it, and whether their outputs fit together."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError, ModelError
from torchtrim.graph.inputs import Inputs


class Signatures:
    """Which named arguments each of two models takes: of a dict, one gets those that only the other does not take.

    Args:
        student: The student.
        teacher: The teacher.

    Example:
        >>> signatures = Signatures(nn.Linear(2, 2), nn.Bilinear(2, 2, 2))
        >>> batch = Inputs.of({"input": torch.zeros(1, 2), "input1": torch.zeros(1, 2)})
        >>> list(signatures.for_student(batch).kwargs)
        ['input']
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        self._student, self._teacher = _taken(student), _taken(teacher)

    def for_student(self, inputs: Inputs) -> Inputs:
        """What the student takes."""
        return _given(inputs, self._student, self._teacher)

    def for_teacher(self, inputs: Inputs) -> Inputs:
        """What the teacher takes."""
        return _given(inputs, self._teacher, self._student)


def _given(inputs: Inputs, own: frozenset[str] | None, other: frozenset[str] | None) -> Inputs:
    if not inputs.kwargs or own is None:
        return inputs
    # A name that neither takes is an error that the model itself explains best.
    kept = {n: value for n, value in inputs.kwargs.items() if n in own or (other is not None and n not in other)}
    return Inputs(inputs.args, kept)


def _taken(model: nn.Module) -> frozenset[str] | None:
    """The names of a forward's arguments; `None` where it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def batch_of(inputs: Any) -> Inputs:
    """A batch as arguments.

    Raises:
        InputError: It holds no tensors, or no samples.

    Example:
        >>> batch_of(torch.zeros(4, 3)).batch
        4
    """
    if not isinstance(inputs, (torch.Tensor, tuple, list, dict, Inputs)) and not hasattr(inputs, "keys"):
        raise InputError(
            "not a batch",
            path="inputs",
            found=type(inputs).__name__,
            expected="a tensor, or a tuple or dict of the forward's arguments",
        )
    given = Inputs.of(inputs)
    if not any(tensor.dim() for tensor in given.tensors) or given.batch == 0:
        raise InputError(
            "a batch without samples", path="inputs", found=given.describe(), expected="a first dimension of 1 or more"
        )
    return given


def class_axis_of(answer: torch.Tensor, task: str, asked: int | None) -> int:
    """Which dimension of the outputs is the classes', counted from the front.

    Raises:
        InputError: It cannot be told, or there is only one class.

    Example:
        >>> class_axis_of(torch.zeros(2, 21, 8, 8), "classes", None), class_axis_of(torch.zeros(2, 7, 9), "classes", -1)
        (1, 2)
    """
    if task != "classes":
        return 0
    dims = answer.dim()
    if asked is None and dims == 3:
        raise InputError(
            "it cannot be told which dimension of the outputs is the classes'",
            path="student",
            found=list(answer.shape),
            hint="class_axis=-1 for sequences (N, L, C), class_axis=1 for (N, C, L)",
        )
    axis = 1 if asked is None else asked
    if not -dims <= axis < dims or axis % max(dims, 1) == 0:
        raise InputError(
            "the outputs have no such dimension for classes",
            path="student",
            found=list(answer.shape),
            expected=f"dimension {axis}",
            hint="task='labels' or task='values' for outputs that are not classes" if dims < 2 else "class_axis=",
        )
    if answer.shape[axis] == 1:
        raise InputError(
            "one output is no choice between classes",
            path="student",
            found=list(answer.shape),
            hint="task='labels' for yes or no (a logit), task='values' for regression",
        )
    return axis % dims


def checked_logits(answer: torch.Tensor, theirs: torch.Tensor, task: str) -> None:
    """Refuse a teacher whose outputs are not of the student's shape.

    Raises:
        ModelError: They are not.
    """
    if answer.shape != theirs.shape:
        raise ModelError(
            "its outputs do not fit the student's",
            path="teacher",
            found=list(theirs.shape),
            expected=list(answer.shape),
            hint="a teacher of the same classes, or alpha=0 with hints: then its outputs are not asked for"
            if task == "classes"
            else "alpha=0 with hints: then its outputs are not asked for",
        )


def wide(value: torch.Tensor) -> torch.Tensor:
    """A tensor in at least 32 bits: exponentials and squares of smaller types overflow.

    Example:
        >>> wide(torch.zeros(1, dtype=torch.bfloat16)).dtype
        torch.float32
    """
    return value if value.dtype in (torch.float32, torch.float64) else value.float()
