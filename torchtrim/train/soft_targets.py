"""What a student learns from a teacher's outputs, and from labels: one pair of losses for each kind of output."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from torchtrim.errors import InputError

Task = Literal["classes", "labels", "values"]
TASKS = ("classes", "labels", "values")
Criterion = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
_IGNORED = -100  # the target that torch's cross-entropy leaves out


def soft_classes(
    student: torch.Tensor,
    teacher: torch.Tensor,
    temperature: float,
    *,
    class_axis: int = 1,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Soft targets: the divergence of the student's class probabilities from the teacher's, at a temperature.

    KL(softmax(teacher / T) || softmax(student / T)) times T squared, which keeps its gradients as large as those of
    hard labels whatever the temperature (Hinton, Vinyals and Dean 2015, *Distilling the Knowledge in a Neural
    Network*). Summed over classes, averaged over all else.

    Args:
        student: Logits.
        teacher: Logits of the same shape.
        temperature: T, above 0.
        class_axis: Which dimension is the classes'.
        mask: Which positions count: truth values, in the shape of the logits without the classes.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> float(soft_classes(logits, logits, 4.0)), round(float(soft_classes(-logits, logits, 1.0)), 4)
        (0.0, 0.9927)
    """
    log_s = F.log_softmax(student / temperature, class_axis)
    log_t = F.log_softmax(teacher / temperature, class_axis)
    if mask is None:
        whole = F.kl_div(log_s, log_t, reduction="sum", log_target=True)
        return whole * (temperature**2 * student.shape[class_axis] / student.numel())
    each = F.kl_div(log_s, log_t, reduction="none", log_target=True).sum(class_axis)
    return averaged(each, mask) * temperature**2


def soft_labels(
    student: torch.Tensor, teacher: torch.Tensor, temperature: float, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """The same for outputs that are yes or no each (binary, multi-label): divergence of the sigmoids, times T squared.

    Args:
        student: Logits, of any shape.
        teacher: Logits of the same shape.
        temperature: T, above 0.
        mask: Which entries count.

    Example:
        >>> logits = torch.tensor([[2.0, -1.0]])
        >>> float(soft_labels(logits, logits, 2.0)), round(float(soft_labels(-logits, logits, 1.0)), 4)
        (0.0, 0.9927)
    """
    s, t = student / temperature, teacher / temperature
    yes = torch.sigmoid(t)
    # From the logarithms themselves: those of rounded probabilities would be infinite.
    each = yes * (F.logsigmoid(t) - F.logsigmoid(s)) + (1 - yes) * (F.logsigmoid(-t) - F.logsigmoid(-s))
    return averaged(each, mask) * temperature**2


def soft_values(student: torch.Tensor, teacher: torch.Tensor, *, mask: torch.Tensor | None = None) -> torch.Tensor:
    """For regression: the mean squared difference. Values have no temperature.

    Example:
        >>> float(soft_values(torch.tensor([[1.0]]), torch.tensor([[3.0]])))
        4.0
    """
    return averaged((student - teacher).square(), mask)


def hard_loss(
    task: Task,
    output: torch.Tensor,
    targets: torch.Tensor,
    *,
    class_axis: int = 1,
    label_smoothing: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """The loss against labels: cross-entropy, binary cross-entropy, or the mean squared error; 0 without any label.

    Args:
        task: The kind of output.
        output: Logits, or values.
        targets: As `fitted_targets` gives them.
        class_axis: Which dimension is the classes'.
        label_smoothing: As for `nn.CrossEntropyLoss`; for yes-or-no outputs, targets are drawn to a half by it.
        mask: Which positions count.

    Example:
        >>> round(float(hard_loss("classes", torch.zeros(1, 4), torch.tensor([2]))), 4)
        1.3863
    """
    reduction = "mean" if mask is None else "none"
    if task == "classes":
        output = output.movedim(class_axis, 1)
        if targets.is_floating_point():
            targets = targets.movedim(class_axis, 1)
        elif mask is not None:
            mask = _spread(mask, targets) & (targets != _IGNORED)
        else:  # torch's own mean is NaN where no sample has a label
            whole = F.cross_entropy(output, targets, reduction="sum", label_smoothing=label_smoothing)
            return whole / (targets != _IGNORED).sum().clamp(min=1)
        loss = F.cross_entropy(output, targets, reduction=reduction, label_smoothing=label_smoothing)
    elif task == "labels":
        targets = targets * (1 - label_smoothing) + label_smoothing / 2
        loss = F.binary_cross_entropy_with_logits(output, targets, reduction=reduction)
    else:
        loss = F.mse_loss(output, targets, reduction=reduction)
    return loss if mask is None else averaged(loss, mask)


def fitted_targets(
    task: Task, output: torch.Tensor, targets: torch.Tensor, class_axis: int, *, look: bool
) -> torch.Tensor:
    """Targets in the form that a loss takes, for outputs of their shape.

    Args:
        task: The kind of output.
        output: The student's output.
        targets: Class numbers, class probabilities (mixup), yes or no, or values.
        class_axis: Which dimension is the classes'.
        look: Whether to look at the values: class numbers in range, probabilities that sum to 1. On a GPU that waits
            for it.

    Raises:
        InputError: They do not fit.
    """
    if not isinstance(targets, torch.Tensor):
        raise InputError("targets are a tensor", path="targets", found=type(targets).__name__, hint="targets=None")
    if targets.device != output.device:
        raise InputError("on another device", path="targets", found=targets.device, expected=output.device)
    if task != "classes":
        if targets.shape != output.shape and targets.numel() == output.numel() and output.shape[-1] == 1:
            targets = targets.reshape(output.shape)
        _same_shape(targets, tuple(output.shape), task)
        if look and task == "labels" and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise InputError(
                "yes or no is 1 or 0, or a probability between",
                path="targets",
                found=f"{float(targets.min()):g} to {float(targets.max()):g}",
                expected="0 to 1",
                hint="task='values' for numbers; mask=, for those that are not known",
            )
        return targets.to(output.dtype)
    if targets.is_floating_point():
        _same_shape(targets, tuple(output.shape), "class probabilities")
        if look and not _probabilities(targets, class_axis):
            raise InputError(
                "not the probabilities of classes: they are below 0 or do not sum to 1",
                path="targets",
                found=f"sums from {float(targets.sum(class_axis).min()):.3g} to "
                f"{float(targets.sum(class_axis).max()):.3g}",
                hint="task='labels' for outputs that are yes or no each, task='values' for regression",
            )
        return targets.to(output.dtype)
    places = tuple(size for axis, size in enumerate(output.shape) if axis != class_axis % output.dim())
    _same_shape(targets, places, "class numbers")
    targets = targets.long()
    if look and targets.numel():
        counted = targets[targets != _IGNORED]
        if counted.numel() and (int(counted.min()) < 0 or int(counted.max()) >= output.shape[class_axis]):
            raise InputError(
                "a label that the head has no class for",
                path="targets",
                found=f"{int(counted.min())} to {int(counted.max())}",
                expected=f"0 to {output.shape[class_axis] - 1}",
                hint="tt.attach_head(..., num_classes=...)",
            )
    return targets


def averaged(values: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """The mean of what a mask lets through; 0 where that is nothing.

    Raises:
        InputError: A mask of another shape.

    Example:
        >>> float(averaged(torch.tensor([[1.0, 3.0], [5.0, 7.0]]), torch.tensor([True, False])))
        2.0
    """
    if mask is None:
        return values.mean()
    weights = _spread(mask, values).to(values.dtype)
    return torch.where(weights > 0, values, 0.0).sum() / weights.sum().clamp(min=1)


def _spread(mask: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """A mask with a truth value for each of some values, whose first dimensions it has."""
    if mask.dtype != torch.bool or tuple(mask.shape) != tuple(values.shape[: mask.dim()]):
        raise InputError(
            "a mask has a truth value for each position",
            path="mask",
            found=f"{mask.dtype}{list(mask.shape)}",
            expected=f"torch.bool{list(values.shape)}",
        )
    return mask.reshape(*mask.shape, *(1,) * (values.dim() - mask.dim())).expand_as(values)


def _same_shape(targets: torch.Tensor, expected: tuple[int, ...], what: str) -> None:
    if tuple(targets.shape) != expected:
        raise InputError(
            f"targets do not fit the outputs ({what})",
            path="targets",
            found=f"{str(targets.dtype).removeprefix('torch.')}{list(targets.shape)}",
            expected=list(expected),
            hint="task=, or class_axis=, if these are not the classes" if targets.dim() != len(expected) else None,
        )


def _probabilities(targets: torch.Tensor, class_axis: int) -> bool:
    sums = targets.sum(class_axis, dtype=torch.float32)
    return bool((targets >= 0).all() and ((sums - 1).abs() < 1e-2).all())


def check_criterion(criterion: object) -> None:
    """Refuse what is no loss function.

    Raises:
        InputError: It is not callable, or a class of losses instead of a loss.
    """
    if isinstance(criterion, type) and issubclass(criterion, nn.Module):
        raise InputError("a class, not a loss", path="criterion", found=criterion.__name__, hint="an instance of it")
    if not callable(criterion):
        raise InputError("not a loss function", path="criterion", found=repr(criterion)[:60], expected="a callable")
