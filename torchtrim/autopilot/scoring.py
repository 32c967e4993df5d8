"""The data of the autopilot: rows to calibrate on and rows to score on, and a score where the user gives none."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.errors import InputError
from torchtrim.graph.batches import answer_to, arguments_of
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.answers import answer_in, class_axis, says_classes
from torchtrim.importance.gradients import target_of
from torchtrim.search.evaluation import Evaluate

_LEAST = 10  # rows to calibrate on


@dataclass(frozen=True)
class Rows:
    """The rows of the data that are looked at.

    Attributes:
        calibration: Batches to calibrate and to fit on.
        scored: Batches to score on; empty where the user has a function or other data for that.
        count: How many rows were read.
        notes: What is to be told.
    """

    calibration: list[Any]
    scored: list[Any]
    count: int
    notes: tuple[str, ...] = ()


def read_rows(data: Iterable[Any], model: nn.Module, example: Inputs, most: int, *, split: bool) -> Rows:
    """Read batches until there are rows enough.

    Args:
        data: Batches.
        model: Whose arguments they are.
        example: Example inputs of it.
        most: Rows to calibrate on, at most; of as many to score on where they are split.
        split: Score on every second row; of all rows, where there are too few for that.

    Raises:
        InputError: There are no batches, or too few rows.
    """
    read: list[Any] = []
    count = 0
    for batch in data:
        rows = arguments_of(batch, model, example).batch
        if not rows:
            raise InputError("a batch without rows", path=f"data[{len(read)}]")
        read.append(batch)
        count += rows
        if count >= most * (2 if split else 1):
            break
    if count < _LEAST:
        found = "no batches" if not read else f"{count} rows"
        raise InputError("too little data", path="data", found=found, expected=f"{_LEAST} rows or more")
    if not split:
        return Rows(read, [], count)
    if count < 2 * _LEAST:
        return Rows(read, read, count, (f"{count} rows are scored on, and calibrated on too: a rosy score",))
    sizes = [arguments_of(batch, model, example).batch for batch in read]
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    parts: tuple[list[Any], list[Any]] = ([], [])
    for batch, size, start in zip(read, sizes, starts, strict=True):
        for half in (0, 1):  # the first row is scored on, the next one calibrated on, and so on through all batches
            taken = [row for row in range(size) if (start + row) % 2 == half]
            if taken:
                parts[half].append(_taken(batch, taken, size))
    return Rows(parts[1], parts[0], count)


def _taken(batch: Any, rows: list[int], size: int) -> Any:
    def take(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows] if tensor.dim() and tensor.shape[0] == size else tensor

    return pytree.tree_map_only(torch.Tensor, take, batch)


def score_on(batches: Sequence[Any], model: nn.Module, example: Inputs) -> tuple[Evaluate, str]:
    """A score for models: accuracy where the batches have labels that fit, else agreement with the model as it is.

    Agreement is the share of answers with the same best class; for outputs that are no classes, one minus the mean
    squared difference relative to the variance of the model's own answers.

    Args:
        batches: The batches; at least one.
        model: The untouched model. It is run once over the batches where there are no labels.
        example: Example inputs of it.

    Returns:
        The function, and what its score is called.
    """
    device = next((held.device for held in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def given(number: int) -> Inputs:
        return arguments_of(batches[number], model, example).map(lambda tensor: tensor.to(device))

    def answer(net: nn.Module, number: int) -> tuple[Any, torch.Tensor]:
        output = answer_to(given(number), net, number)
        return output, answer_in(output, number)

    with torch.no_grad():
        output, first = answer(model.eval(), 0)
    if _labelled(batches, given, first):

        def accuracy(net: nn.Module) -> float:
            right = count = 0
            for number, batch in enumerate(batches):
                told = answer(net, number)[1]
                target = target_of(batch, given(number)).to(told.device)
                right += int((told.argmax(class_axis(told)) == target).sum())
                count += target.numel()
            return right / max(count, 1)

        return accuracy, "accuracy"
    classes = says_classes(output, first)
    with torch.no_grad():
        whole = [answer(model, number)[1].detach().clone() for number in range(len(batches))]
    spread = torch.cat([each.double().flatten() for each in whole]).var().clamp_min(1e-12)

    def agreement(net: nn.Module) -> float:
        total = count = 0.0
        for number, right in enumerate(whole):
            told = answer(net, number)[1]
            if told.shape != right.shape:
                raise InputError("another shape than the untouched model's", found=told.shape, expected=right.shape)
            if classes:
                axis = class_axis(right)
                same = told.argmax(axis) == right.argmax(axis)
                total, count = total + float(same.sum()), count + same.numel()
            else:
                total += right.numel() - float((told.double() - right.double()).square().sum() / spread)
                count += right.numel()
        return total / max(count, 1.0)

    return agreement, "agreement with the untouched model"


def _labelled(batches: Sequence[Any], given: Any, answer: torch.Tensor) -> bool:
    """Whether the batches hold numbers of classes, one for each answer."""
    axis = class_axis(answer)
    if answer.dim() < 2 or answer.shape[axis] < 2:
        return False
    shape = answer.argmax(axis).shape[1:]
    targets = [target_of(batch, given(number)) for number, batch in enumerate(batches)]
    return all(
        isinstance(target, torch.Tensor)
        and not target.is_floating_point()
        and target.dim() > 0
        and target.shape[1:] == shape
        and bool(((target >= 0) & (target < answer.shape[axis])).all())
        for target in targets
    )
