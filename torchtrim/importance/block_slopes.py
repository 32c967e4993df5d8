"""Metrics by gradients: of the loss or the answer along what each block adds, and of the loss by its weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError
from torchtrim.importance.answers import answer_in, class_axis, says_classes
from torchtrim.importance.block_metrics import Asked, Found, calm, refuse_infinite
from torchtrim.importance.gradients import losses_of, naming, on_device, refuse_unfit, trainable_twin
from torchtrim.importance.spans import Span, looked_at

_SEED = 0  # of the classes that are drawn from the model's own answers


def taylor(asked: Asked) -> Found:
    """The size of the loss's first-order change where a block is left out: sum of gradient x (output - input)."""

    def scalar(twin: nn.Module, batch: Any, given: Any, number: int) -> Iterator[torch.Tensor]:
        asked.forwards += given.batch
        yield from losses_of(twin, batch, asked.loss, asked.inputs, number, by_sample=False)

    # The loss is a mean: of a single row its gradient is so many times larger.
    totals = _along(asked, scalar, lambda change, rows: float((change * rows).abs().sum()))
    return Found(totals, "size of gradient x what it adds, of each row's loss")


def fisher(asked: Asked) -> Found:
    """How far the model's answer moves where a block is left out, to the second order, from one backward pass.

    Of classes: half of what the Fisher information says of (output - input), which is the divergence of the answer's
    distribution to the second order; a class is drawn from the model's own answer for each row, so no labels are
    needed. Of other values: the squared change of the answer, along a direction drawn at random.
    """
    generator = torch.Generator().manual_seed(_SEED)
    kinds: list[bool] = []

    def scalar(twin: nn.Module, batch: Any, given: Any, number: int) -> Iterator[torch.Tensor]:
        output = asked.answered(twin, given, number)
        answer = answer_in(output, number)
        classes = asked.measure == "kl" or (asked.measure is None and says_classes(output, answer))
        kinds.append(classes)
        if not classes:
            yield (answer * torch.randn(answer.shape, generator=generator).to(answer)).sum()
            return
        logs = answer.float().movedim(class_axis(answer), -1).flatten(0, -2).log_softmax(-1)
        drawn = torch.multinomial(logs.detach().exp().cpu(), 1, generator=generator)
        yield logs.gather(1, drawn.to(logs.device)).sum()

    totals = _along(asked, scalar, lambda change, rows: float(change.square().sum()) / 2)
    unit = "divergence of the classes without it, to the second order" if all(kinds) else "squared change, half"
    return Found(totals, unit)


def _along(
    asked: Asked,
    scalars: Callable[[nn.Module, Any, Any, int], Iterator[torch.Tensor]],
    counted: Callable[[torch.Tensor, int], float],
) -> list[float]:
    """The mean over rows of a function of the gradient times what each block adds, summed up within each row."""
    twin = asked.twin()
    totals = [0.0] * len(asked.spans)
    with calm(slopes=True):
        for number, batch, given in asked.batches("gradients"):
            with _anchored(twin, asked.spans) as anchors:
                (value,) = scalars(twin, on_device(batch, asked.model), given, number)
            refuse_unfit(value, number)
            asked.backwards += given.batch
            with naming(number):
                asked_of = [each for _, _, each in anchors]
                slopes: tuple[torch.Tensor | None, ...] = torch.autograd.grad(value, asked_of, allow_unused=True)
            changes: dict[int, torch.Tensor] = {}
            for (place, added, _), slope in zip(anchors, slopes, strict=True):
                if slope is None:
                    continue
                product = (slope.double() * added.double()).flatten(1) if slope.dim() > 1 else slope * added
                change = product.sum(1) if product.dim() > 1 else product
                changes[place] = changes[place] + change if place in changes else change
            for place, change in changes.items():
                totals[place] += counted(change, given.batch)
    return [total / asked.rows for total in totals]


@contextmanager
def _anchored(twin: nn.Module, spans: list[Span]) -> Iterator[list[tuple[int, torch.Tensor, torch.Tensor]]]:
    """Gives a list that is filled while the copy runs: the span, what it added, and the result to ask gradients of."""
    anchors: list[tuple[int, torch.Tensor, torch.Tensor]] = []

    def look(place: int, value: torch.Tensor, result: torch.Tensor) -> torch.Tensor:
        refuse_infinite(spans[place], value, result)
        anchor = result if result.requires_grad else result.detach().requires_grad_()
        anchors.append((place, anchor.detach() - value, anchor))
        return anchor.clone()  # what follows may write to it

    with looked_at(twin, spans, look):
        yield anchors


def gradient(asked: Asked) -> Found:
    """The mean over batches of the length of the loss's gradient by each block's weights, as in training."""
    twin, _ = trainable_twin(asked.model)
    twin.eval()
    parts = [[p for path in span.paths for p in twin.get_submodule(path).parameters()] for span in asked.spans]
    parameters = list({id(each): each for part in parts for each in part if each.requires_grad}.values())
    if not parameters:
        raise InputError("no block has weights that could have gradients", path="metric", found="gradient")
    totals = [0.0] * len(asked.spans)
    steps = 0
    with calm(slopes=True):
        for number, batch, given in asked.batches("gradients"):
            steps += 1
            asked.forwards += given.batch
            asked.backwards += given.batch
            moved = on_device(batch, asked.model)
            (value,) = losses_of(twin, moved, asked.loss, asked.inputs, number, by_sample=False)
            refuse_unfit(value, number)
            with naming(number):
                found = torch.autograd.grad(value, parameters, allow_unused=True)
            squares = {
                id(held): float(each.detach().double().square().sum())
                for held, each in zip(parameters, found, strict=True)
                if each is not None
            }
            for place, part in enumerate(parts):
                totals[place] += sum(squares.get(id(held), 0.0) for held in part) ** 0.5
    return Found([total / steps for total in totals], "length of the gradient by its weights, mean over batches")
