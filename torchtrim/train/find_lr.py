"""`find_lr`: the learning-rate range test."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.bench.figure import figure, written
from torchtrim.bench.table import Table
from torchtrim.errors import InputError, ModelError
from torchtrim.graph.batches import answer_to
from torchtrim.graph.copying import kept_modes, kept_random_state, unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.train.groups import param_groups
from torchtrim.train.loop import seed_all
from torchtrim.train.objective import Batch, Criterion, Objective
from torchtrim.train.rates import OptimizerChoice, optimizer_of
from torchtrim.train.shares import Shares
from torchtrim.train.training_state import copied, named_tensors, put_back

_SMOOTH = 0.9  # how much of the running mean of the losses stays at each step
_DIVERGED = 4.0  # times the smallest loss


@dataclass(frozen=True)
class RateTest:
    """Losses at growing learning rates.

    Attributes:
        lrs: The rates.
        losses: The loss of each step, smoothed.
        suggestion: Where the loss falls fastest, for each tenfold of the rate.
        largest: A tenth of the rate with the smallest loss: what a one-cycle schedule can rise to.
        ended: Why the test ended.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float
    largest: float
    ended: str

    def table(self) -> Table:
        """A dozen of the steps."""
        picked = sorted({round(at * (len(self.lrs) - 1) / 11) for at in range(12)})
        rows = tuple((f"{self.lrs[at]:.2g}", f"{self.losses[at]:.4f}") for at in picked)
        notes = [f"suggestion: {self.suggestion:.2g} (steepest); at most {self.largest:.2g}; {self.ended}"]
        return Table("learning rates", ("lr", "loss"), rows, notes, left=0)

    def plot(self, path: str | Path) -> Path:
        """Draw the losses over the rates; the file's ending says in which form.

        Raises:
            MissingDependency: matplotlib is not installed.
        """
        drawn = figure(5.5, 3.4)
        axis = drawn.subplots()
        axis.plot(self.lrs, self.losses)
        for rate, label in ((self.suggestion, "suggestion"), (self.largest, "at most")):
            axis.axvline(rate, color="0.6", linestyle="--", linewidth=1)
            axis.annotate(
                f"{label} {rate:.2g}", (rate, 0.98), xycoords=("data", "axes fraction"), rotation=90, va="top"
            )
        axis.set(xscale="log", xlabel="learning rate", ylabel="loss")
        return written(drawn, path)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return {**asdict(self), "lrs": list(self.lrs), "losses": list(self.losses)}

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def find_lr(
    model: nn.Module,
    data: Iterable[Any],
    *,
    start: float = 1e-6,
    end: float = 1.0,
    steps: int = 100,
    optimizer: OptimizerChoice = "adamw",
    layer_decay: float = 1.0,
    weight_decay: float = 0.05,
    criterion: Criterion | None = None,
    seed: int = 0,
    example_inputs: ExampleInputs | None = None,
) -> RateTest:
    """Train for some steps at learning rates that grow exponentially, and tell where the loss falls fastest.

    The test of Smith, *Cyclical Learning Rates for Training Neural Networks*, 2017, with the reading of it that fastai
    has: the suggestion is where the smoothed loss has its steepest slope over the logarithm of the rate. Ends where
    the loss is four times the smallest. The model is left as it was, to the bit, and runs where it is. One copy of it
    is held.

    Args:
        model: The model.
        data: `(inputs, targets)` batches as for `finetune`; begun anew when they run out.
        start: The first rate.
        end: The last.
        steps: How many steps there are, 10 or more.
        optimizer: As for `finetune`, but made anew: `"adamw"`, `"sgd"`, or a function of parameter groups.
        layer_decay: As for `param_groups`.
        weight_decay: As for `param_groups`.
        criterion: As for `finetune`.
        seed: Of the order of the data and of dropout.
        example_inputs: What the forward takes, for the order of layers.

    Raises:
        InputError: Rates that do not grow, too few steps, an optimizer that is in use, or data that does not fit.
        ModelError: The loss is not finite from the start.
        SelectionError: Nothing is trainable.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> x = torch.randn(64, 4)
        >>> found = find_lr(net, [(x, (x[:, 0] > 0).long())], optimizer="sgd", end=100.0)
        >>> 1e-2 < found.suggestion < 100
        True
    """
    if not 0 < start < end < math.inf:
        raise InputError("rates that grow", path="start, end", found=(start, end), expected="0 < start < end")
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 10:
        raise InputError("too few steps to see anything", path="steps", found=steps, expected="10 or more")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise InputError(
            "the test would leave its traces in an optimizer that is in use",
            path="optimizer",
            hint="a function of parameter groups: lambda groups: torch.optim.SGD(groups, momentum=0.9)",
        )
    model = unwrap(model)
    before = copied(named_tensors(model))
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    with kept_random_state(), kept_modes(model):
        try:
            groups = param_groups(
                model, start, layer_decay=layer_decay, weight_decay=weight_decay, example_inputs=example_inputs
            )
            rule = optimizer_of(optimizer, groups, model)
            seed_all(seed, 0)
            return _tested(model.train(), Shares(data), rule, Objective(criterion), start, end, steps)
        finally:
            put_back(named_tensors(model), before)
            for parameter, gradient in gradients.items():
                parameter.grad = gradient


def _tested(
    model: nn.Module,
    shares: Shares,
    rule: torch.optim.Optimizer,
    objective: Objective,
    start: float,
    end: float,
    steps: int,
) -> RateTest:
    device = next(model.parameters()).device
    bases = [group["lr"] / start for group in rule.param_groups]
    lrs: list[float] = []
    losses: list[float] = []
    mean, ended = 0.0, f"all {steps} steps done"
    batches = iter(shares)
    for step in range(steps):
        share = next(batches, None)
        if share is None:
            batches = iter(shares)
            share = next(batches, None)
        if share is None:
            again = "an iterator can be gone through once: give a list or a DataLoader" if step else None
            raise InputError(f"the data gave no batch for step {step + 1}", path="data", hint=again)
        rate = start * (end / start) ** (step / (steps - 1))
        for group, base in zip(rule.param_groups, bases, strict=True):
            group["lr"] = rate * base
        batch = Batch.of(share.batch, model).to(device)
        rule.zero_grad()
        loss = objective(answer_to(batch.inputs, model, step), batch)
        value = float(loss.detach())
        if not math.isfinite(value) and step == 0:
            raise ModelError("the loss is not finite from the start", found=value, hint="the data, or the weights")
        mean = _SMOOTH * mean + (1 - _SMOOTH) * value
        smooth = mean / (1 - _SMOOTH ** (step + 1))
        if not math.isfinite(value) or (losses and smooth > _DIVERGED * min(losses)):
            ended = f"ended at {rate:.2g}, where the loss was {value:.3g}"
            break
        lrs.append(rate)
        losses.append(smooth)
        loss.backward()
        rule.step()
    suggestion, largest = _read(lrs, losses)
    return RateTest(tuple(lrs), tuple(losses), suggestion, largest, ended)


def _read(lrs: list[float], losses: list[float]) -> tuple[float, float]:
    """Where the loss falls fastest, and a tenth of where it is smallest; the first steps are still noise."""
    if len(lrs) < 3:
        return lrs[0], lrs[0]
    skip = min(len(lrs) // 10, len(lrs) - 3)
    smallest = min(range(skip, len(lrs)), key=losses.__getitem__)
    slopes = {
        at: (losses[at + 1] - losses[at - 1]) / math.log(lrs[at + 1] / lrs[at - 1])
        for at in range(max(skip, 1), max(smallest, skip + 2))
        if at + 1 < len(lrs)
    }
    return lrs[min(slopes, key=slopes.__getitem__)], lrs[smallest] / 10
