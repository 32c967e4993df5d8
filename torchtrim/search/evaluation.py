"""A user's evaluate function, called with care: its noise is measured, its errors say where they happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import nn

from torchtrim.errors import InputError
from torchtrim.graph.copying import kept_modes

Evaluate: TypeAlias = Callable[[nn.Module], float]


def evaluated(evaluate: Evaluate, model: nn.Module, what: str) -> float:
    """What the function says of a model: a number, higher is better.

    The model is in eval mode and gradients are off; its modes are put back.

    Args:
        evaluate: The user's function.
        model: The model.
        what: What the model is, for errors.

    Raises:
        InputError: The function raises, or gives no number.
    """
    with torch.no_grad(), kept_modes(model):
        model.eval()
        try:
            found = evaluate(model)
        except Exception as error:  # the user's function raises what it likes
            raise InputError(
                f"evaluate failed on {what}: {type(error).__name__}: {error}",
                path="evaluate",
                found=type(error).__name__,
            ) from error
    try:
        score = float(found)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"evaluate gives no number for {what}", path="evaluate", found=type(found).__name__, expected="a float"
        ) from error
    if math.isinf(score):
        raise InputError(f"evaluate gives an infinity for {what}", path="evaluate", found=score)
    return score


def baseline_of(evaluate: Evaluate, model: nn.Module, *, times: int = 2) -> tuple[float, float]:
    """The score of the untouched model and how far it moves by itself: mean and range over a few calls.

    Raises:
        InputError: The function raises, or gives no number.
    """
    scores = [evaluated(evaluate, model, "the untouched model") for _ in range(times)]
    if any(math.isnan(score) for score in scores):
        raise InputError(
            "evaluate gives NaN for the untouched model",
            path="evaluate",
            found="nan",
            expected="a number, higher is better",
            hint="a function that works on the model as it is",
        )
    return sum(scores) / len(scores), max(scores) - min(scores)
