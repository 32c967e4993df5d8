"""The optimizer of a training, and how its learning rates go: warm-up, cosine, plateau, or one's own."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import nn
from torch.optim import lr_scheduler

from torchtrim.errors import EditError, InputError, nearest

OptimizerChoice: TypeAlias = "str | torch.optim.Optimizer | Callable[[list[dict[str, Any]]], torch.optim.Optimizer]"
ScheduleChoice: TypeAlias = "str | Callable[[torch.optim.Optimizer], Any] | lr_scheduler.LRScheduler | None"

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "linear", "constant", "plateau")


def optimizer_of(choice: OptimizerChoice, groups: list[dict[str, Any]], model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer that was asked for.

    Args:
        choice: `"adamw"`, `"sgd"` (Nesterov momentum 0.9), an optimizer, or a function of the groups that makes one.
        groups: Parameter groups, each with its `lr` and `weight_decay`.
        model: The model.

    Raises:
        InputError: There is no such optimizer, what the function gave is none, or it wants to run the model itself.
        EditError: The optimizer that was given holds none of the model's parameters.
    """
    if isinstance(choice, torch.optim.Optimizer):
        held = {id(each) for group in choice.param_groups for each in group["params"]}
        if not any(id(parameter) in held for parameter in model.parameters()):
            raise EditError(
                "the optimizer holds none of the model's parameters",
                path="optimizer",
                hint="make it of this model's parameters, after the last edit",
            )
        return _stepping(choice)
    if isinstance(choice, str):
        if choice == "adamw":
            return torch.optim.AdamW(groups)
        if choice == "sgd":
            return torch.optim.SGD(groups, momentum=0.9, nesterov=True)
        raise InputError("no such optimizer", found=choice, expected=OPTIMIZERS, hint=nearest(choice, OPTIMIZERS))
    made = choice(groups) if callable(choice) else None
    if not isinstance(made, torch.optim.Optimizer):
        raise InputError(
            "not an optimizer",
            path="optimizer",
            found=type(choice if made is None else made).__name__,
            expected=f"{', '.join(OPTIMIZERS)}, a torch optimizer, or a function of parameter groups",
        )
    return _stepping(made)


def _stepping(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise InputError(
            "this optimizer's step takes a closure, that runs the model again and again",
            path="optimizer",
            found=type(optimizer).__name__,
            expected="one whose step() follows a backward",
        )
    return optimizer


@dataclass
class Rates:
    """A schedule of learning rates, told of every step and every epoch.

    Attributes:
        scheduler: torch's scheduler.
        by: Whether it goes on with every `"step"` or with every `"epoch"`.
    """

    scheduler: Any
    by: Literal["step", "epoch"]

    @staticmethod
    def of(
        choice: ScheduleChoice,
        optimizer: torch.optim.Optimizer,
        *,
        epochs: int,
        steps: int | None,
        warmup: float = 0.0,
        by: Literal["step", "epoch"] | None = None,
    ) -> Rates:
        """Make it.

        Args:
            choice: `"cosine"`, `"linear"` (both fall to 0 at the end), `"constant"`, `"plateau"` (a tenth after 2
                epochs that were no better), a scheduler, or a function of the optimizer that makes one.
            optimizer: The optimizer.
            epochs: Epochs in all.
            steps: Steps of the optimizer in an epoch; `None` where that is not known: rates then change by epochs.
            warmup: The rates rise along a line during so many steps, or, below 1, so large a share of all.
            by: When a scheduler of one's own goes on.

        Raises:
            InputError: There is no such schedule, a warm-up where there can be none, or `by` for a schedule by name.
        """
        if isinstance(warmup, bool) or not isinstance(warmup, (int, float)) or not 0 <= warmup < math.inf:
            raise InputError("a warm-up is a number of steps, or a share below 1", path="warmup", found=warmup)
        if by not in (None, "step", "epoch"):
            raise InputError("a scheduler goes on by step or by epoch", path="schedule_by", found=by)
        name = choice if isinstance(choice, str) else "constant" if choice is None else None
        if name is not None and name not in SCHEDULES:
            raise InputError("no such schedule", found=name, expected=SCHEDULES, hint=nearest(name, SCHEDULES))
        if warmup and name in (None, "plateau"):
            raise InputError(
                "this schedule sets the rates by itself, from the start",
                path="warmup",
                found=warmup,
                hint="torch.optim.lr_scheduler.SequentialLR, for both in one",
            )
        if name is None:
            return _given(choice, optimizer, by)
        if by is not None:
            raise InputError("a schedule by name goes on by itself", path="schedule_by", found=by, expected="None")
        if warmup >= 1 and steps is None:
            raise InputError(
                "how many steps an epoch has is not known", path="warmup", found=warmup, hint="a share below 1"
            )
        if name == "plateau":
            return Rates(lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=2), "epoch")
        total = epochs * steps if steps is not None else epochs
        begin = warmup * total if warmup < 1 else warmup
        if begin >= total and begin:
            raise InputError(
                "the warm-up is as long as the training", path="warmup", found=warmup, expected=f"< {total}"
            )
        shape = _shape(name, total, begin)
        return Rates(lr_scheduler.LambdaLR(optimizer, shape), "step" if steps is not None else "epoch")

    def after_step(self) -> None:
        """The optimizer made a step."""
        if self.by == "step":
            self.scheduler.step()

    def after_epoch(self, watched: float) -> None:
        """An epoch ended; `watched` is the loss that is looked at."""
        if self.by == "epoch" and isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(watched)
        elif self.by == "epoch":
            self.scheduler.step()


def _shape(name: str, total: int, begin: float) -> Callable[[int], float]:
    def factor(done: int) -> float:
        if done < begin:
            return (done + 1) / (begin + 1)
        share = min((done - begin) / max(total - begin, 1), 1.0)
        if name == "cosine":
            return 0.5 * (1 + math.cos(math.pi * share))
        return 1 - share if name == "linear" else 1.0

    return factor


def _given(choice: Any, optimizer: torch.optim.Optimizer, by: Literal["step", "epoch"] | None) -> Rates:
    kinds = (lr_scheduler.LRScheduler, lr_scheduler.ReduceLROnPlateau)
    made = choice if isinstance(choice, kinds) else choice(optimizer) if callable(choice) else None
    if not isinstance(made, kinds):
        raise InputError(
            "not a schedule",
            path="schedule",
            found=type(choice if made is None else made).__name__,
            expected=f"{', '.join(SCHEDULES)}, a torch scheduler, or a function of the optimizer",
        )
    if made.optimizer is not optimizer:
        raise InputError("the scheduler is another optimizer's", path="schedule", hint="a function of the optimizer")
    every_step = isinstance(made, (lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR))
    return Rates(made, by or ("step" if every_step else "epoch"))
