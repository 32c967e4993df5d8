"""What a user asks of the autopilot, checked before anything is done."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchtrim.autopilot.plans import PRUNINGS
from torchtrim.autopilot.scoring import LEAST
from torchtrim.edits.budget import Budget
from torchtrim.errors import InputError, nearest
from torchtrim.export.targets import resolve
from torchtrim.importance.rank_blocks import METRICS
from torchtrim.importance.ranking import Ranking
from torchtrim.search.evaluation import Evaluate
from torchtrim.search.sensitivity import Sensitivity
from torchtrim.train.finetune import finetune

SCHEMES = ("float32", "dynamic", "static", "mixed", "weight_only", "fp16", "bf16")
ORDERS = ("ranked", "search")


@dataclass(frozen=True)
class Asked:
    """The options of `trim`, as it describes them."""

    budget: Budget
    evaluate: Evaluate | None
    target: str
    schemes: tuple[str, ...]
    removal: bool
    pruning: tuple[str, ...]
    heal: bool
    order: str | None
    metric: str
    ranking: Ranking | None
    train_data: Iterable[Any] | None
    val_data: Iterable[Any] | None
    training: Mapping[str, Any] | None
    recover: Callable[[nn.Module], Any] | None
    trials: int
    seconds: float | None
    rows: int
    folder: Path | None
    storage: str | os.PathLike[str] | None
    study: str
    sensitivity: Sensitivity | None
    threads: int | None
    seed: int

    def command(self) -> str:
        """The call that does the same again, with the options that can be written down."""
        told = [f"budget=tt.Budget({self.budget})", f"target={self.target!r}"]
        told += [f"quantize={list(self.schemes)!r}"] if self.schemes else []
        told += [f"pruning={list(self.pruning)!r}", f"removal={self.removal}", f"heal={self.heal}"]
        told += [f"order={self.order!r}"] if self.order else []
        told += [f"metric={self.metric!r}", f"trials={self.trials}", f"rows={self.rows}", f"seed={self.seed}"]
        told += [
            f"{name}=..."
            for name in ("evaluate", "val_data", "train_data", "recover")
            if getattr(self, name) is not None
        ]
        told += [f"training={dict(self.training)!r}"] if self.training else []
        told += [f"threads={self.threads}"] if self.threads else []
        return f"tt.trim(model, data, {', '.join(told)})"

    @property
    def makes_files(self) -> bool:
        """Whether candidates become ONNX files."""
        return self.budget.latency_ms is not None or bool(self.schemes)

    def check(self) -> None:
        """Refuse what makes no sense.

        Raises:
            InputError: It does not.
        """
        resolve(self.target, None)
        if self.rows < LEAST:
            raise InputError("too few rows to calibrate on", path="rows", found=self.rows, expected=f"{LEAST} or more")
        self._check_training()
        if self.metric not in METRICS:
            raise InputError(
                "an unknown metric",
                path="metric",
                found=self.metric,
                expected=", ".join(METRICS),
                hint=nearest(str(self.metric), list(METRICS)),
            )
        if self.ranking is not None and not isinstance(self.ranking, Ranking):
            raise InputError(
                "not a ranking", path="ranking", found=type(self.ranking).__name__, hint="tt.rank_blocks(model, data)"
            )
        for name, number in (("trials", self.trials), ("rows", self.rows), ("threads", self.threads)):
            if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
                raise InputError(f"{name} is a positive whole number", path=name, found=number)
        if self.seconds is not None and not (isinstance(self.seconds, (int, float)) and self.seconds > 0):
            raise InputError("seconds is a time above zero", path="seconds", found=self.seconds)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise InputError("seed is a whole number, 0 or more", path="seed", found=self.seed)
        if not isinstance(self.study, str) or not self.study:
            raise InputError("the study needs a name", path="study", found=self.study)
        if self.order is not None and self.order not in ORDERS:
            raise InputError(
                "an unknown order",
                path="order",
                found=self.order,
                expected=", ".join(ORDERS),
                hint=nearest(str(self.order), ORDERS),
            )
        if not self.removal and not self.pruning and not self.schemes:
            raise InputError(
                "nothing may be done",
                found="removal=False, pruning=[], quantize=None",
                hint="allow one of them",
            )
        if self.evaluate is not None and not callable(self.evaluate):
            raise InputError(
                "evaluate is a function of a model", path="evaluate", found=type(self.evaluate).__name__,
                hint="lambda net: accuracy(net, loader)",
            )  # fmt: skip

    def _check_training(self) -> None:
        if self.train_data is not None and self.recover is not None:
            raise InputError("train_data or recover, not both", path="recover")
        if self.recover is not None and not callable(self.recover):
            raise InputError("recover is a function of a model", path="recover", found=type(self.recover).__name__)
        if self.training is None:
            return
        if self.train_data is None:
            raise InputError(
                "there is nothing to train on", path="training", found=dict(self.training), hint="train_data="
            )
        known = [
            name for name in inspect.signature(finetune).parameters if name not in ("model", "train_data", "val_data")
        ]
        for name in self.training:
            if name not in known:
                raise InputError(
                    "an option that tt.finetune does not take",
                    path=f"training[{name!r}]",
                    found=self.training[name],
                    expected=", ".join(known),
                    hint=nearest(str(name), known),
                )


def schemes_of(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """The schemes to choose from: `("auto",)`, some, or none.

    Raises:
        InputError: An unknown one.
    """
    found = () if given is None else (given,) if isinstance(given, str) else tuple(given)
    known = ("auto", *SCHEMES)
    for each in found:
        if each not in known or (each == "auto" and len(found) > 1):
            raise InputError(
                "an unknown scheme",
                path="quantize",
                found=each,
                expected=f"auto, or some of {', '.join(SCHEMES)}",
                hint=nearest(str(each), known),
            )
    return found


def prunings_of(given: Sequence[str] | None) -> tuple[str, ...]:
    """The ways to prune channels to choose from.

    Raises:
        InputError: An unknown one.
    """
    if given is None:
        return ("magnitude", "reconstruction")
    found = (given,) if isinstance(given, str) else tuple(given)
    for each in found:
        if each not in PRUNINGS:
            raise InputError(
                "an unknown way to prune channels",
                path="pruning",
                found=each,
                expected=", ".join(PRUNINGS),
                hint=nearest(str(each), list(PRUNINGS)),
            )
    return found
