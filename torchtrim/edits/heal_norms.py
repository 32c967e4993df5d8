"""Agreement with the original on data held back, and a short distillation of norm layers towards it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from torchtrim.edits.heal_data import Calibration
from torchtrim.edits.layer_numbers import without_caches
from torchtrim.errors import EditError, InputError
from torchtrim.graph.check import flatten
from torchtrim.graph.inputs import Inputs

STEPS = 96
_ROWS = 16  # of one step
_RATE = 1e-3
_LOOKS = 6  # how often the distillation is judged


def outputs_of(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The tensors of real numbers in what a model returns, by name."""
    found = flatten(without_caches(inputs.call(model)))  # a shorter model keeps fewer keys and values
    return {name: value for name, value in found.items() if isinstance(value, torch.Tensor) and _is_real(value)}


def _is_real(value: torch.Tensor) -> bool:
    return value.is_floating_point() and value.layout is torch.strided and value.numel() > 0


class Judge:
    """How far a model's outputs are from the original's, on data that was held back.

    Args:
        original: The model to agree with, in eval mode.
        calibration: The data.

    Attributes:
        spread: The variance of each output of the original.

    Raises:
        EditError: Nothing in the original's outputs can be compared.
    """

    def __init__(self, original: nn.Module, calibration: Calibration) -> None:
        with torch.no_grad():
            self.held = [(piece, outputs_of(original, piece)) for piece in calibration.held_back()]
        if not self.held or not self.held[0][1]:
            raise EditError("the model returns no tensor of real numbers to agree on", found=type(original).__name__)
        if not all(bool(value.isfinite().all()) for _, outputs in self.held for value in outputs.values()):
            raise InputError("what the model makes of the data is not finite", path="data")
        self.spread = {
            name: max(_variance([outputs[name] for _, outputs in self.held if name in outputs]), 1e-12)
            for name in self.held[0][1]
        }

    def error(self, model: nn.Module) -> float:
        """The root of the mean squared difference, relative to the original's deviation; `inf` where it is no number.

        An output counts as much as another, however large it is.

        Raises:
            EditError: It returns other shapes than the original.
        """
        total: dict[str, float] = {}
        count: dict[str, int] = {}
        with torch.no_grad():
            for piece, outputs in self.held:
                found = outputs_of(model, piece)
                for name, right in outputs.items():
                    difference = (_alike(found.get(name), right, name).double() - right.double()).square().sum()
                    total[name] = total.get(name, 0.0) + float(difference)
                    count[name] = count.get(name, 0) + right.numel()
        mean = sum(total[name] / count[name] / self.spread.get(name, 1.0) for name in total) / len(total)
        return math.sqrt(mean) if math.isfinite(mean) else math.inf

    def loss(self, found: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> torch.Tensor:
        """The same, squared, for one piece of data."""
        parts = [
            (found[name] - value).square().mean() / self.spread[name]
            for name, value in right.items()
            if name in self.spread
        ]
        return torch.stack(parts).mean()


def _alike(found: torch.Tensor | None, right: torch.Tensor, name: str) -> torch.Tensor:
    """An output that can be compared: what was removed last in a model may leave one of another shape."""
    if found is None or found.shape != right.shape:
        raise EditError(
            "the trimmed model returns another shape: there is nothing to heal towards",
            path=name,
            found="nothing" if found is None else list(found.shape),
            expected=list(right.shape),
            hint="heal=None, or a module of yours as the adapter",
        )
    return found


def _variance(values: list[torch.Tensor]) -> float:
    count = sum(value.numel() for value in values)
    mean = sum(float(value.double().sum()) for value in values) / count
    return sum(float((value.double() - mean).square().sum()) for value in values) / count


def norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The scales and biases of normalisation layers, by name: of torch's own, and of classes that are called so.

    Example:
        >>> sorted(norm_parameters(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))))
        ['1.bias', '1.weight']
    """
    known = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    found: dict[str, nn.Parameter] = {}
    for path, module in model.named_modules():
        if not isinstance(module, known) and not ("norm" in type(module).__name__.lower() and _has_vectors(module)):
            continue
        for name, held in module.named_parameters(recurse=False):
            if name in ("weight", "bias") and held.dtype in (torch.float32, torch.float64):
                found[f"{path}.{name}" if path else name] = held
    return found


def _has_vectors(module: nn.Module) -> bool:
    held = list(module.parameters(recurse=False))
    return bool(held) and not list(module.children()) and all(each.dim() <= 1 for each in held)


def distilled(
    student: nn.Module,
    original: nn.Module,
    pieces: Callable[[], Iterator[Inputs]],
    judge: Judge,
    told: Callable[[int], Any],
    *,
    steps: int | None = None,
) -> tuple[dict[str, torch.Tensor], float, int]:
    """Train the scales and biases of a model's norm layers for a few steps towards the original's outputs.

    The squared difference of the outputs, relative to their variance, is made smaller with Adam (Kingma & Ba 2015) in
    96 steps of 16 inputs. Everything else stays, the statistics of batch norms too: the model runs in eval mode.
    Training nothing but these is enough to change what features mean (Frankle et al., Training BatchNorm and Only
    BatchNorm, 2021), and too little to learn a few hundred inputs by heart.

    Args:
        student: The model, whose parameters are written to.
        original: What it is to agree with.
        pieces: The data; called again when it comes to an end.
        judge: Says which of several moments was the best one; the start is one of them.
        told: Called with the number of steps done, for a progress bar.
        steps: Stop after so many of them, unjudged.

    Returns:
        The values at the best moment, by name, the error there, and after how many steps it was; no values where the
        start was the best.
    """
    student.requires_grad_(False)
    learned = norm_parameters(student)
    best: dict[str, torch.Tensor] = {}
    error, moment = math.inf if steps else judge.error(student), 0
    if not learned:
        return best, error, moment
    for held in learned.values():
        held.requires_grad_(True)
    optimizer = torch.optim.Adam(list(learned.values()), lr=_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    with torch.enable_grad():
        for step, group in enumerate(itertools.islice(_grouped(pieces), steps or STEPS), 1):
            optimizer.zero_grad()
            rows = sum(piece.batch for piece in group)
            for piece in group:
                with torch.no_grad():
                    right = outputs_of(original, piece)
                loss = judge.loss(outputs_of(student, piece), right) * (piece.batch / rows)
                loss.backward()
            optimizer.step()
            schedule.step()
            told(step)
            if steps is None and step % (STEPS // _LOOKS) == 0 and (now := judge.error(student)) < error:
                error, moment = now, step
                best = {name: held.detach().clone() for name, held in learned.items()}
    if steps is not None:
        best = {name: held.detach().clone() for name, held in learned.items()}
    return best, error, moment


def _grouped(pieces: Callable[[], Iterator[Inputs]]) -> Iterator[list[Inputs]]:
    """Pieces that make up a step, again and again from the beginning of the data."""
    group: list[Inputs] = []
    while True:
        for piece in pieces():
            group.append(piece)
            if sum(each.batch for each in group) >= _ROWS:
                yield group
                group = []
