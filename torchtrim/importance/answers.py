"""How much two answers of a model differ: the tensor that is meant by an output, and measures of it, row by row."""

from __future__ import annotations

from typing import Any

import torch

from torchtrim.errors import InputError, ModelError
from torchtrim.graph.check import flatten


def answer_in(output: Any, number: int) -> torch.Tensor:
    """The logits or values in what a model returned: the entry called `logits` or `out`, or the first real tensor.

    Args:
        output: What it returned.
        number: Which batch it was, for errors.

    Raises:
        InputError: There is no such tensor.
        ModelError: Its values are not finite.

    Example:
        >>> answer_in({"state": torch.zeros(2, 8), "logits": torch.zeros(2, 3)}, 0).shape
        torch.Size([2, 3])
    """
    found = {
        name: leaf
        for name, leaf in flatten(output).items()
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.dim()
    }
    if not found:
        raise InputError("the model returns no tensor of real numbers", found=type(output).__name__)
    named = [leaf for name, leaf in found.items() if name in ("output.logits", "output.out")]
    answer = (named or list(found.values()))[0]
    if not bool(torch.isfinite(answer).all()):
        raise ModelError(
            "what the model answers is not finite", path=f"data[{number}]", hint="data and weights without NaN"
        )
    return answer


def says_classes(output: Any, answer: torch.Tensor) -> bool:
    """Whether an answer is taken for scores of classes: it is called `logits`, or is one row of several an input."""
    entries = flatten(output)
    return entries.get("output.logits") is answer or (answer.dim() == 2 and answer.shape[1] > 1)


def class_axis(answer: torch.Tensor) -> int:
    """Where the classes are: the last place of rows and sequences, the second of maps."""
    return 1 if answer.dim() > 3 else answer.dim() - 1


def divergence(original: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """The Kullback-Leibler divergence, in nats, of each row's classes from the original's.

    Example:
        >>> divergence(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 0.0]]))
        tensor([0.], dtype=torch.float64)
    """
    axis = class_axis(original)
    here, there = (each.double().log_softmax(axis) for each in (original, other))
    return (here.exp() * (here - there)).sum(axis).flatten(1).mean(1) if original.dim() > 2 else _kl(here, there)


def _kl(here: torch.Tensor, there: torch.Tensor) -> torch.Tensor:
    return (here.exp() * (here - there)).sum(1)


def squared(values: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each row."""
    return values.double().square().flatten(1).sum(1) if values.dim() > 1 else values.double().square()
