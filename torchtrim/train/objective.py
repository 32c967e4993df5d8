"""What is learnt from a batch: its inputs and targets, the loss, and how many answers are right."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.errors import InputError, ModelError
from torchtrim.graph.inputs import Inputs
from torchtrim.train.distil_batch import class_axis_of, wide
from torchtrim.train.distiller import Distiller
from torchtrim.train.model_output import output_of
from torchtrim.train.soft_targets import fitted_targets, hard_loss

Criterion: TypeAlias = Callable[[Any, Any], torch.Tensor]
Metric: TypeAlias = Callable[[Any, Any], "torch.Tensor | float"]

_TARGETS = ("labels", "label", "targets", "target")
_IGNORED = -100  # the class that cross_entropy leaves out


@dataclass(frozen=True)
class Batch:
    """A batch, taken apart.

    Attributes:
        inputs: The arguments of the forward.
        targets: What it should say; `None` where there are none.
        own_loss: Whether the labels are among the inputs too, so that the output holds the loss.
        classes: The least and the largest class among the targets, where they are classes and lie in main memory.
    """

    inputs: Inputs
    targets: Any
    own_loss: bool = False
    classes: tuple[int, int] | None = None

    @staticmethod
    def of(batch: Any, model: nn.Module, *, labelled: bool = True, apart: bool = False) -> Batch:
        """Take a batch apart.

        Args:
            batch: `(inputs, targets)`, `(input, ..., targets)`, or a dict with `labels` among the model's arguments.
            model: The model, for the names of its arguments.
            labelled: Whether there have to be targets.
            apart: Whether labels are kept from a model that takes them, since its loss is worked out elsewhere.

        Raises:
            InputError: It is nothing of the kind, or has no targets.

        Example:
            >>> batch = Batch.of((torch.zeros(4, 3), torch.zeros(4).long()), nn.Linear(3, 2))
            >>> batch.inputs.describe(), batch.targets.shape
            ('float32[4, 3]', torch.Size([4]))
        """
        if hasattr(batch, "items"):
            return _of_names(dict(batch.items()), model, labelled, apart)
        if isinstance(batch, torch.Tensor) and not labelled:
            return Batch(Inputs.of(batch), None)
        if not isinstance(batch, (tuple, list)) or (len(batch) < 2 and labelled):
            raise InputError(
                "training needs labels: batches are (inputs, targets)",
                path="data",
                found=type(batch).__name__,
                hint="teacher=, which teaches without labels"
                if isinstance(batch, (torch.Tensor, tuple, list))
                else None,
            )
        if len(batch) == 1:
            return Batch(Inputs.of(batch[0]), None)
        inputs, targets = (batch[0], batch[1]) if len(batch) == 2 else (tuple(batch[:-1]), batch[-1])
        if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(targets)):
            raise InputError(
                "the targets of a batch are no tensors", path="data", found=type(targets).__name__, expected="a tensor"
            )
        return Batch(Inputs.of(inputs), targets, classes=_span(targets))

    def to(self, device: torch.device) -> Batch:
        """The same on a device."""
        move = pytree.tree_map_only(torch.Tensor, lambda each: each.to(device, non_blocking=True), self.targets)
        inputs = self.inputs.map(lambda each: each.to(device, non_blocking=True))
        return replace(self, inputs=inputs, targets=move)


def _of_names(batch: Mapping[str, Any], model: nn.Module, labelled: bool, apart: bool) -> Batch:
    parameters = inspect.signature(model.forward).parameters
    name = next((each for each in _TARGETS if each in batch), None)
    if name is None and labelled:
        raise InputError(
            "training needs labels, and a batch has none by a usual name",
            path="data",
            found=list(batch),
            expected=f"one of {', '.join(_TARGETS)} among them",
        )
    targets = batch.get(name) if name is not None else None
    if name in parameters and not apart:
        return Batch(Inputs.of(batch), targets, own_loss=True)
    if name in parameters and isinstance(targets, torch.Tensor) and targets.dim() > 1:
        # What the model does with them (a language model shifts them) is not known here.
        raise InputError(
            "with a teacher the labels are not the model's, and have to be lined up with its outputs",
            path=f"data: {name}",
            found=list(targets.shape),
            hint="batches of (inputs, targets), the inputs a dict; or none of these labels",
        )
    open_ended = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    rest = {key: value for key, value in batch.items() if key != name and (open_ended or key in parameters)}
    if not rest:
        raise InputError(
            "a batch holds none of the forward's arguments", path="data", found=list(batch), expected=list(parameters)
        )
    return Batch(Inputs.of(rest), targets, classes=_span(targets))


def _span(targets: Any) -> tuple[int, int] | None:
    """Read here, where it holds nothing up: on a GPU a class too many ends the process."""
    if not has_classes(targets) or targets.is_cuda:
        return None
    known = targets[targets.long() != _IGNORED]  # which no short type holds
    return (int(known.min()), int(known.max())) if known.numel() else None


def main_output(output: Any) -> torch.Tensor:
    """The tensor that says what the model says: its logits, or the first of several (auxiliary heads come later).

    Raises:
        ModelError: There is no tensor in it.
    """
    if isinstance(output, Mapping):
        output = {key: value for key, value in output.items() if key != "loss"}
        output = output.get("logits", list(output.values()))
    found = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
    if found is None:
        raise ModelError("the model returns no tensor to train", found=type(output).__name__)
    return found


class Objective:
    """The loss of an output.

    Args:
        criterion: `criterion(output, targets)`, the mean over the rows. Left out: cross-entropy for whole-number
            targets and for class probabilities (`soft`), the mean squared error for other numbers.
        label_smoothing: Of the cross-entropy.
        student: A `Distiller`, where one trains the model: it says which output is meant, and what it is.
    """

    def __init__(
        self, criterion: Criterion | None = None, label_smoothing: float = 0.0, student: Distiller | None = None
    ) -> None:
        if criterion is not None and not callable(criterion):
            raise InputError(
                "not a loss", path="criterion", found=criterion, expected="a function of output and targets"
            )
        if not 0 <= label_smoothing < 1:
            raise InputError("label_smoothing is at least 0 and below 1", found=label_smoothing)
        if criterion is not None and label_smoothing:
            raise InputError("a loss of one's own smooths its labels itself", path="label_smoothing")
        self._criterion, self._smoothing, self._student = criterion, label_smoothing, student

    def __call__(self, output: Any, batch: Batch, *, soft: bool = False, smooth: bool = True) -> torch.Tensor:
        """The loss; in eval mode (`smooth=False`) of the labels as they are.

        Raises:
            InputError: The targets do not fit the output.
            ModelError: The output has no loss, and the labels went into the model; or the loss is no number.
        """
        if batch.own_loss and self._criterion is None:
            if self._smoothing:
                raise InputError(
                    "the model works out its loss by itself", path="label_smoothing", hint="criterion=, with smoothing"
                )
            loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
            if not isinstance(loss, torch.Tensor):
                raise ModelError("the model takes labels, and returns no loss", found=type(output).__name__)
            return loss.mean()
        if self._criterion is not None:
            loss = self._criterion(self.answer(output), batch.targets)
            if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
                found = list(loss.shape) if isinstance(loss, torch.Tensor) else type(loss).__name__
                raise ModelError("the loss is not a single number", path="criterion", found=found, hint="its mean")
            return loss.reshape(())
        if self._student is not None:
            return self._of_student(self._student, output, batch.targets)
        return self._usual(main_output(output), batch, soft, smooth)

    def answer(self, output: Any) -> Any:
        """What a loss or a metric of the user's is given: all that the model returns, or what a student learns."""
        return output if self._student is None else output_of(output, self._student.output, "student")

    @torch.no_grad()
    def accuracy(self, output: Any, batch: Batch) -> torch.Tensor | None:
        """The accuracy, where the targets are classes and the output has scores for them; else `None`."""
        if not has_classes(batch.targets) or (self._student is not None and self._student.task != "classes"):
            return None
        scores = main_output(self.answer(output))
        if self._student is not None:
            scores = scores.movedim(class_axis_of(scores, "classes", self._student.class_axis), 1)
        several = scores.dim() > 1 and scores.shape[1] > 1
        fits = several and tuple(batch.targets.shape) == (scores.shape[0], *scores.shape[2:])
        return accuracy(scores, batch.targets) if fits else None

    def _of_student(self, student: Distiller, output: Any, targets: Any) -> torch.Tensor:
        answer = wide(self.answer(output))
        axis = class_axis_of(answer, student.task, student.class_axis)
        targets = fitted_targets(student.task, answer, targets, axis, look=not answer.is_cuda)
        return hard_loss(student.task, answer, targets, class_axis=axis)

    def _usual(self, logits: torch.Tensor, batch: Batch, soft: bool, smooth: bool) -> torch.Tensor:
        """The loss where none was given."""
        targets = batch.targets
        if not isinstance(targets, torch.Tensor):
            raise InputError(
                "targets of several tensors need a loss", path="data", found=type(targets).__name__, hint="criterion="
            )
        smoothing = self._smoothing if smooth else 0.0
        if targets.is_floating_point():
            _check_shape(logits, targets, tuple(logits.shape))
            if soft:
                return nn.functional.cross_entropy(logits, targets.to(logits.dtype), label_smoothing=smoothing)
            if self._smoothing:
                raise InputError("only labels that are classes can be smoothed", path="label_smoothing")
            return nn.functional.mse_loss(logits, targets.to(logits.dtype))
        _check_classes(logits, targets, batch.classes)
        return nn.functional.cross_entropy(logits, targets.long(), label_smoothing=smoothing)


def accuracy(output: Any, targets: Any) -> torch.Tensor:
    """The share of the targets whose class has the largest score, a number from 0 to 1; those of -100 do not count.

    Example:
        >>> float(accuracy(torch.eye(4), torch.tensor([0, 1, 2, 0])))
        0.75
    """
    right: torch.Tensor = main_output(output).argmax(1) == targets
    share: torch.Tensor = right.sum() / (targets.long() != _IGNORED).sum().clamp(min=1)
    return share


def has_classes(targets: Any) -> bool:
    """Whether targets are numbers of classes, so that accuracy means something."""
    return isinstance(targets, torch.Tensor) and not targets.is_floating_point()


def _check_classes(output: torch.Tensor, targets: torch.Tensor, span: tuple[int, int] | None) -> None:
    if output.dim() < 2:
        raise InputError("whole-number targets are classes, and the model gives no scores for any", found=output.shape)
    _check_shape(output, targets, (output.shape[0], *output.shape[2:]))
    if span is not None and not 0 <= span[0] <= span[1] < output.shape[1]:
        raise InputError(
            "targets that are not among the classes",
            path="data",
            found=f"{span[0]} to {span[1]}",
            expected=f"0 to {output.shape[1] - 1}",
            hint="attach_head with another num_classes",
        )


def _check_shape(output: torch.Tensor, targets: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(targets.shape) != expected:
        raise InputError(
            f"the targets do not fit an output of shape {list(output.shape)}",
            path="data",
            found=list(targets.shape),
            expected=list(expected),
        )
