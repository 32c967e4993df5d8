"""Metrics that take blocks out and see what is lost: each over all of the data, or all in the time of one pass."""

from __future__ import annotations

from typing import Any

import torch

from torchtrim.errors import EditError, InputError
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.answers import answer_in, class_axis, divergence, says_classes, squared
from torchtrim.importance.block_metrics import Asked, Found, calm, refuse_infinite
from torchtrim.importance.gradients import losses_of, on_device, refuse_unfit, target_of
from torchtrim.importance.spans import bypassed, looked_at

MEASURES = ("loss", "accuracy", "kl", "output")
_UNITS = {
    "loss": "rise of the loss without it",
    "accuracy": "share of right answers lost without it",
    "kl": "divergence of the classes without it, nats",
    "output": "change of the output without it, relative",
}


def ablation(asked: Asked) -> Found:
    """What the whole data says without each block: the reference, at a forward pass for each block and one more."""
    twin = asked.twin()
    totals = [0.0] * len(asked.spans)
    base = rows = 0.0
    measure = asked.measure
    with calm():
        for number, batch, given in asked.batches("ablation"):
            if measure is None and (asked.loss is not None or target_of(batch, given) is not None):
                measure = "loss"
            original = None if measure == "loss" else asked.answered(twin, given, number)
            if measure is None:
                measure = "kl" if says_classes(original, answer_in(original, number)) else "output"
            weight, whole = _judged(asked, twin, batch, given, number, measure, original, None)
            base += whole
            rows += weight
            for place, span in enumerate(asked.spans):
                with bypassed(twin, span):
                    totals[place] += _judged(asked, twin, batch, given, number, measure, original, original)[1]
    return Found(_lost(totals, base, rows, measure or "output"), _UNITS[measure or "output"])


def _lost(totals: list[float], base: float, rows: float, measure: str) -> list[float]:
    if measure == "loss":
        return [(total - base) / rows for total in totals]
    if measure == "accuracy":
        return [(base - total) / max(rows, 1) for total in totals]
    if measure == "kl":
        return [total / rows for total in totals]
    return [(total / base) ** 0.5 if base else 0.0 for total in totals]


def _judged(
    asked: Asked, twin: Any, batch: Any, given: Inputs, number: int, measure: str, original: Any, against: Any
) -> tuple[float, float]:
    """How many answers there are in a batch, and the sum of what is measured of them.

    Args:
        asked: What is asked.
        twin: The model, with a block bypassed or without.
        batch: The batch.
        given: What of it is for the forward.
        number: Which it is.
        measure: What is measured.
        original: What the whole model said to it.
        against: The same where a block is bypassed now; `None` where none is.
    """
    if measure == "loss":
        asked.forwards += given.batch
        moved = on_device(batch, asked.model)
        (value,) = losses_of(twin, moved, asked.loss, asked.inputs, number, by_sample=False)
        refuse_unfit(value, number, slopes=False)
        return given.batch, float(value) * given.batch
    output = original if against is None else asked.answered(twin, given, number)
    answer = answer_in(output, number)
    if measure == "accuracy":
        return _right(answer, target_of(batch, given), number)
    if against is None:
        return given.batch, float(squared(answer).sum()) if measure == "output" else 0.0
    first = answer_in(original, number)
    found = divergence(first, answer) if measure == "kl" else squared(answer - first)
    return given.batch, float(found.sum())


def _right(answer: torch.Tensor, target: Any, number: int) -> tuple[float, float]:
    axis = class_axis(answer)
    if not isinstance(target, torch.Tensor) or target.is_floating_point() or target.numel() * answer.shape[axis] == 0:
        raise InputError(
            "accuracy needs labels: the number of a class for each answer",
            path=f"data[{number}]",
            found="no labels" if target is None else type(target).__name__,
            hint='(inputs, targets) batches, or measure="output"',
        )
    told = answer.argmax(axis)
    if told.shape != target.shape:
        raise InputError(
            "the labels do not fit the answers",
            path=f"data[{number}]",
            found=list(target.shape),
            expected=list(told.shape),
        )
    return target.numel(), float((told == target.to(told.device)).sum())


def sampled(asked: Asked) -> Found:
    """Ablation on a part of the rows, at the cost of one forward pass.

    Of every batch some rows are taken, evenly spread, and repeated until the batch is as large as it was: in the first
    of these copies nothing is left out, in each other one a single block, all in one call of the model. Each block is
    so judged against the whole model on the same rows.
    """
    twin = asked.twin()
    count = len(asked.spans)
    totals = [0.0] * count
    base = rows = 0.0
    measure = asked.measure
    size = 0

    def look(place: int, value: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        refuse_infinite(asked.spans[place], value, result)
        if result.shape[0] != size * (count + 1):
            raise EditError(
                "its values do not have the rows of the data along their first dimension",
                path=asked.spans[place].name,
                found=list(result.shape),
                expected=f"{size * (count + 1)} rows",
                hint='metric="ablation"',
            )
        mine = slice((place + 1) * size, (place + 2) * size)
        result = result.clone()
        result[mine] = value[mine]
        return result

    with calm(), looked_at(twin, asked.spans, look):
        for number, _, given in asked.batches("sampled ablation"):
            size = max(given.batch // (count + 1), 1)
            output = asked.answered(twin, _repeated(given, size, count + 1), number)
            answer = answer_in(output, number)
            measure = measure or ("kl" if says_classes(output, answer) else "output")
            parts = answer.split(size)
            if len(parts) != count + 1:
                raise InputError("the answer has not a row for each input", found=list(answer.shape))
            base += float(squared(parts[0]).sum())
            rows += size
            for place, part in enumerate(parts[1:]):
                found = divergence(parts[0], part) if measure == "kl" else squared(part - parts[0])
                totals[place] += float(found.sum())
    scores = _lost(totals, base, rows, measure or "output")
    return Found(scores, _UNITS[measure or "output"], (f"on {rows:.0f} of the {asked.rows} rows",))


def _repeated(given: Inputs, size: int, times: int) -> Inputs:
    """Some rows, evenly spread, so many times over."""
    whole = given.batch
    chosen = torch.arange(size) * whole // size

    def take(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.dim() or tensor.shape[0] != whole:
            return tensor
        return tensor[chosen.repeat(times).to(tensor.device)]

    return given.map(take)
