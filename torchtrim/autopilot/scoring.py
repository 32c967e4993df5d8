"""The data of the autopilot: rows to calibrate on and rows to score on, and a score where the user gives none."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.edits.heal_data import HELD_BACK
from torchtrim.errors import InputError
from torchtrim.graph.batches import answer_to, arguments_of
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.answers import answer_in, class_axis, says_classes
from torchtrim.importance.gradients import target_of
from torchtrim.search.evaluation import Evaluate

LEAST = 13  # rows to calibrate on: a fifth of them is held back to judge by


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
    count, wanted = 0, most * (2 if split else 1)
    for batch in data:
        rows = arguments_of(batch, model, example).batch
        if not rows:
            raise InputError("a batch without rows", path=f"data[{len(read)}]")
        read.append(batch if rows <= wanted - count else _taken(batch, list(range(wanted - count)), rows))
        count += min(rows, wanted - count)
        if count >= wanted:
            break
    if count < LEAST:
        found = "no batches" if not read else f"{count} rows"
        raise InputError("too little data", path="data", found=found, expected=f"{LEAST} rows or more")
    if not split:
        return Rows(read, [], count)
    if count < 2 * LEAST:
        return Rows(read, read, count, (f"{count} rows are scored on, and calibrated on too: a rosy score",))
    # At random, for data may go through its classes in turn.
    scored = set(torch.randperm(count, generator=torch.Generator().manual_seed(0))[: count // 2].tolist())
    return Rows(
        _chosen(read, model, example, lambda row: row not in scored),
        _chosen(read, model, example, lambda row: row in scored),
        count,
    )


def without_held_back(data: list[Any], model: nn.Module, example: Inputs) -> list[Any]:
    """The rows that candidates may be fitted to: all but those that `Calibration` holds back for the judge."""
    return _chosen(data, model, example, lambda row: row % HELD_BACK != HELD_BACK - 1)


def _chosen(data: list[Any], model: nn.Module, example: Inputs, wanted: Callable[[int], bool]) -> list[Any]:
    """The rows of batches that are wanted, by their number."""
    chosen: list[Any] = []
    start = 0
    for batch in data:
        size = arguments_of(batch, model, example).batch
        rows = [row for row in range(size) if wanted(start + row)]
        start += size
        if rows:
            chosen.append(_taken(batch, rows, size))
    return chosen


def _taken(batch: Any, rows: list[int], size: int) -> Any:
    def take(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[rows] if tensor.dim() and tensor.shape[0] == size else tensor

    return pytree.tree_map_only(torch.Tensor, take, batch)


def score_on(batches: Iterable[Any], model: nn.Module, example: Inputs) -> tuple[Evaluate, str]:
    """A score for models: accuracy where the batches have labels that fit, else agreement with the model as it is.

    Agreement is the share of answers with the same best class; for outputs that are no classes, one minus the mean
    squared difference relative to the variance of the model's own answers. Memory: without labels, the model's answers
    (of classes, the best ones).

    Args:
        batches: The batches, which can be gone through again and again.
        model: The untouched model. It is run once over the batches where there are no labels.
        example: Example inputs of it.

    Returns:
        The function, and what its score is called.

    Raises:
        InputError: There are no batches.
    """
    device = next((held.device for held in (*model.parameters(), *model.buffers())), torch.device("cpu"))

    def given(batch: Any) -> Inputs:
        return arguments_of(batch, model, example).map(lambda tensor: tensor.to(device))

    def answers(net: nn.Module) -> Iterator[tuple[Any, Any, torch.Tensor]]:
        for number, batch in enumerate(batches):
            output = answer_to(given(batch), net, number)
            yield batch, output, answer_in(output, number)

    with torch.no_grad():
        first = next(answers(model.eval()), None)
    if first is None:
        raise InputError("there is no data to score on", path="val_data", found="no batches")
    batch, output, answer = first
    if _is_labelled(target_of(batch, given(batch)), answer):

        def accuracy(net: nn.Module) -> float:
            right = count = 0
            for number, (batch, _, told) in enumerate(answers(net)):
                target = target_of(batch, given(batch))
                if not _is_labelled(target, told):
                    raise InputError("a batch without labels that fit", path=f"data[{number}]")
                right += int((told.argmax(class_axis(told)) == target.to(told.device)).sum())
                count += target.numel()
            return right / max(count, 1)

        return accuracy, "accuracy"
    classes = says_classes(output, answer)

    def kept(told: torch.Tensor) -> torch.Tensor:
        return told.argmax(class_axis(told)) if classes else told.detach().clone()

    with torch.no_grad():
        whole = [kept(told) for _, _, told in answers(model)]
    spread = 1.0 if classes else float(torch.cat([each.double().flatten() for each in whole]).var().clamp_min(1e-12))

    def agreement(net: nn.Module) -> float:
        total = count = 0.0
        for (_, _, told), right in zip(answers(net), whole, strict=True):
            found = kept(told)
            if found.shape != right.shape:
                raise InputError("another shape than the untouched model's", found=found.shape, expected=right.shape)
            count += right.numel()
            if classes:
                total += float((found == right).sum())
            else:
                total += right.numel() - float((found.double() - right.double()).square().sum()) / spread
        return total / max(count, 1.0)

    return agreement, "agreement with the untouched model"


def _is_labelled(target: Any, answer: torch.Tensor) -> bool:
    """Whether the targets are numbers of classes, one for each answer."""
    axis = class_axis(answer)
    if answer.dim() < 2 or answer.shape[axis] < 2:
        return False
    return (
        isinstance(target, torch.Tensor)
        and not target.is_floating_point()
        and target.dim() > 0
        and target.shape[1:] == answer.argmax(axis).shape[1:]
        and bool(((target >= 0) & (target < answer.shape[axis])).all())
    )
