"""The pruner that a trainer is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import nn

from torchtrim.errors import InputError
from torchtrim.train.gradual_pruning import GradualPruning
from torchtrim.train.magnitude_pruner import MagnitudePruner
from torchtrim.train.sparsity_schedule import SparsitySchedule

PrunerChoice: TypeAlias = (
    "MagnitudePruner | SparsitySchedule | Callable[[nn.Module, torch.optim.Optimizer], MagnitudePruner] | None"
)


def pruner_of(
    choice: PrunerChoice, model: nn.Module, optimizer: torch.optim.Optimizer | None, *others: torch.optim.Optimizer
) -> MagnitudePruner | None:
    """A pruner as it is, one that follows a schedule, or what a function of the model and the optimizer makes.

    A pruner with an optimizer that is none of the training's gets the first of these: what another keeps is not used.

    Args:
        choice: What was asked for.
        model: The model that is trained.
        optimizer: The optimizer that trains it.
        others: More optimizers of the same training.

    Raises:
        InputError: It is none of these, or another model's.
    """
    if choice is None:
        return None
    if isinstance(choice, GradualPruning):
        raise InputError(
            "channels go between two trainings, not within one",
            path="pruner",
            found="GradualPruning",
            hint="finetune, tt.prune_channels(..., copy=False), finetune; or a loop of your own",
        )
    made: Any = choice
    if isinstance(choice, SparsitySchedule):
        made = MagnitudePruner(model, choice, optimizer=optimizer)
    elif not isinstance(choice, MagnitudePruner) and callable(choice):
        made = choice(model, optimizer)  # type: ignore[arg-type]
    if not isinstance(made, MagnitudePruner):
        raise InputError(
            "not a pruner of weights",
            path="pruner",
            found=type(made).__name__,
            expected="a MagnitudePruner, a schedule such as tt.PolynomialDecay, or a function that makes a pruner",
        )
    if made.model is not model:
        raise InputError("the pruner is another model's", path="pruner", found=type(made.model).__name__)
    plain = [getattr(each, "optimizer", each) for each in (optimizer, *others)]
    if optimizer is not None and not any(made.optimizer is each for each in plain):
        made.optimizer = optimizer  # what it keeps of pruned weights goes to zero with them
    return made
