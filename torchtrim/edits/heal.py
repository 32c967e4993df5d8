"""Heal the joints that a removal leaves: in closed form, or by a short distillation, judged on data held back.

What is removed is replaced by the best that is found of a few things, each of which the model can do without:

- nothing;
- moment matching: each channel's mean and deviation become what they were;
- a linear map of the channels, fitted by least squares to what the removed part made of its input and drawn to the
  identity (the idea of LLM-Streamline, Chen et al. 2024, and of ReplaceMe, Shopkhoev et al. 2025, who put such a map in
  place of layers of language models); it is folded into a neighbour where that is exact;
- a distillation of the norm layers' scales and biases towards the original's outputs, without labels.

A map fitted without restraint is worse than none on real networks (it repairs what is seen at the joint, and not what
the layers behind it need), which is why there is a judge: agreement with the original's outputs on other data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrim.edits.adapter import layout_of
from torchtrim.edits.heal_data import Calibration
from torchtrim.edits.heal_fold import folded
from torchtrim.edits.heal_maps import SHRINKAGE, Map, Sums
from torchtrim.edits.heal_norms import STEPS, Judge, distilled
from torchtrim.edits.remove_runs import Run
from torchtrim.edits.weights import Weights
from torchtrim.errors import EditError
from torchtrim.graph.copying import full_copy, kept_random_state, structural_copy
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.progress import progress

METHODS = ("auto", "linear", "scale", "norm")
_WORTH = 0.98  # a change has to make the error this much smaller: less may be chance
_WORTH_ALL = 0.94  # for `auto` to change every norm layer, which costs more than it gains where little was lost
_LARGEST = 4096  # channels; the sums for a linear map grow with their square

Build = Callable[[Mapping[str, nn.Module]], nn.Module]


@dataclass(frozen=True)
class Seam:
    """A joint: where something was removed, and whose output is missed there.

    Attributes:
        address: Where an adapter lives.
        ends: The modules whose output went on from there in the original: each a path and which of its calls.
        dim: The dimension that the channels are in.
    """

    address: str
    ends: tuple[tuple[str, int], ...] = ()
    dim: int = 1


@dataclass(frozen=True)
class Choice:
    """What was done at a joint (or, with the address `""`, to the norm layers), and what it brought.

    Attributes:
        address: The joint.
        what: What was chosen, in words.
        before: The error on data held back before it: the difference of the model's outputs from the original's,
            relative to the deviation of these.
        after: The error with it.
        tried: The error of everything that was tried.
    """

    address: str
    what: str
    before: float
    after: float
    tried: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        where = f"{self.address}: " if self.address else ""
        return f"healing: {where}{self.what} (error on data held back {self.before:.4f} -> {self.after:.4f})"


@dataclass(frozen=True)
class Healing:
    """What healing came to.

    Attributes:
        adapters: Modules to put at joints, by address.
        weights: New values of parameters of the trimmed model, by name.
        choices: What was chosen, and why.
    """

    adapters: dict[str, nn.Module] = field(default_factory=dict)
    weights: Weights = field(default_factory=Weights)
    choices: tuple[Choice, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """The choices in words."""
        return tuple(map(str, self.choices))


def fit(
    original: nn.Module,
    build: Build,
    seams: Sequence[Seam],
    *,
    data: Iterable[Any] | None,
    inputs: Inputs,
    method: str = "auto",
) -> Healing:
    """Find what makes a trimmed model agree with the original.

    Both models run in eval mode, on copies. Memory: both models, one piece of 16 inputs, the inputs held back (at most
    512) with what the original makes of them, and for each joint sums of channels x channels; none of it grows with the
    data. Time: for each joint two passes over the data and the judging of up to five maps, on one input in five; for
    the distillation some 1,500 inputs forward and backward, twice where it helps (the second time on all the data).
    Values are the same again for the same data on the same machine.

    Args:
        original: The model before the removal.
        build: Gives the trimmed model, with modules put at joints by address.
        seams: The joints, in the order of execution.
        data: Calibration batches: tensors, `(inputs, targets)` pairs or dicts; gone through several times. Padding
            counts like any other token.
        inputs: Example inputs.
        method: `"linear"`: at each joint the linear map, as strongly drawn to the identity as suits best. `"scale"`:
            moment matching at each. `"norm"`: the distillation. `"auto"`: at each joint the best of the maps and
            nothing, then the distillation, each only where it helps.

    Raises:
        EditError: No such method, or nothing that the model returns can be compared.
        InputError: No data, too little, or such as can be gone through only once.
    """
    if method not in METHODS:
        raise EditError("no such way of healing", path="heal", found=method, expected=", ".join(map(repr, METHODS)))
    calibration = Calibration.of(data, original, inputs)
    with kept_random_state(), torch.no_grad(), progress("healing") as told:
        return _Fit(original, build, seams, calibration, method, told).healing()


def seams_of(runs: Sequence[Run]) -> list[Seam]:
    """The joints of runs of removed calls; the calls of a module that goes as a whole have one adapter."""
    found: dict[str, list[Run]] = {}
    for run in runs:
        found.setdefault(run.address, []).append(run)
    return [_seam(address, same) for address, same in found.items()]


def _seam(address: str, runs: Sequence[Run]) -> Seam:
    last = runs[0].last
    dim = _channel_dim(layout_of(last.after, last.after, runs[0].modules))
    ends = () if any(run.last.module is None for run in runs) else tuple(run.last.key for run in runs)
    return Seam(address, ends, dim)


def _channel_dim(layout: str) -> int:
    return 1 if layout in ("flat", "NCL", "NCHW", "NCDHW") else len(layout) - 1


def composed(adapters: Mapping[str, nn.Module], healed: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Adapters that repair shapes, with those that heal behind them."""
    behind = {
        address: nn.Sequential(adapters[address], module) if address in adapters else module
        for address, module in healed.items()
    }
    return {**adapters, **behind}


class _Fit:
    def __init__(
        self,
        original: nn.Module,
        build: Build,
        seams: Sequence[Seam],
        calibration: Calibration,
        method: str,
        told: Callable[[str, float], Any],
    ) -> None:
        self.original = structural_copy(original, own_buffers=True, user_hooks=False).eval()
        self.build = build
        self.seams = seams
        self.calibration = calibration
        self.method = method
        self.told = told
        self.adapters: dict[str, nn.Module] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.choices: list[Choice] = []

    def healing(self) -> Healing:
        self.told("the original on data held back", 0.0)
        self.judge = Judge(self.original, self.calibration)
        self.error = self.judge.error(self.student())
        with_maps = self.seams if self.method != "norm" else ()
        for number, seam in enumerate(with_maps):
            self.told(f"joint {seam.address}", 0.5 * number / len(with_maps))
            self._join(seam)
        if self.method in ("auto", "norm"):
            self._distil()
        return Healing(self.adapters, Weights(self.weights), tuple(self.choices))

    def student(self, more: Mapping[str, nn.Module] | None = None) -> nn.Module:
        """The trimmed model as it is healed so far, in eval mode, sharing nothing."""
        model = full_copy(self.build({**self.adapters, **(more or {})})).eval()
        named = dict(model.named_parameters())
        for name, value in self.weights.items():
            named[name].data = value.to(named[name].device).clone()
        return structural_copy(model, user_hooks=False)

    def _join(self, seam: Seam) -> None:
        """Choose a map for one joint, or nothing."""
        sums, like = self._sums(seam)
        before = self.error
        if sums is None or like is None or not sums.usable:
            self.choices.append(Choice(seam.address, "no map fits there", before, before))
            return
        tried = {"nothing": before}
        best: tuple[float, Map, nn.Module] | None = None
        last = math.inf
        for mapping in self._maps(sums):
            module = mapping.module(like.dim(), seam.dim, like)
            tried[str(mapping)] = error = self.judge.error(self.student({seam.address: module}))
            if mapping.strength is not None and error > last:
                break  # a map that is bolder still would only be worse
            last = math.inf if mapping.strength is None else error
            if best is None or error < best[0]:
                best = error, mapping, module
        if best is None or (self.method == "auto" and not best[0] < _WORTH * before):
            self.choices.append(Choice(seam.address, "nothing", before, before, tried))
            return
        self.error, mapping, module = best
        where = self._placed(seam, mapping, module)
        self.choices.append(Choice(seam.address, f"{mapping}, {where}", before, self.error, tried))

    def _maps(self, sums: Sums) -> Iterator[Map]:
        if self.method in ("auto", "scale"):
            yield sums.matched()
        if self.method in ("auto", "linear") and sums.channels <= _LARGEST:
            yield from (sums.linear(strength) for strength in SHRINKAGE)

    def _sums(self, seam: Seam) -> tuple[Sums | None, torch.Tensor | None]:
        """Run both models over the data to be fitted on, and sum up what is at the joint and what should be there."""
        if not seam.ends:
            return None, None
        probe = Probe()
        student = self.student({seam.address: probe})
        probe = next(module for module in student.modules() if isinstance(module, Probe))
        sums = Sums(seam.dim)
        with _watched(self.original, seam.ends) as ends:
            for piece in self.calibration.to_fit():
                ends.clear()
                probe.seen.clear()
                piece.call(self.original)
                piece.call(student)
                rights = [ends[end] for end in seam.ends if end in ends]
                if len(rights) != len(probe.seen):
                    return None, None
                for value, right in zip(probe.seen, rights, strict=True):
                    if value.shape != right.shape or value.dim() <= seam.dim:
                        return None, None
                    sums.add(value, right)
        return sums, (probe.seen[0] if probe.seen else None)

    def _placed(self, seam: Seam, mapping: Map, module: nn.Module) -> str:
        """Fold the map into a neighbour where the outputs stay the same by that; else keep the module."""
        probed = self.student({seam.address: Probe()})
        place = next(path for path, inner in probed.named_modules() if isinstance(inner, Probe))
        values = folded(probed, place, mapping, self.calibration.example)
        names = dict(self.student().named_parameters())
        if values is not None and set(values) <= set(names):
            weights = self.weights
            self.weights = {**weights, **values}
            if abs(self.judge.error(self.student()) - self.error) <= 1e-3 * self.error:
                return f"folded into {next(iter(values)).rpartition('.')[0]}"
            self.weights = weights
        self.adapters[seam.address] = module
        return "as an adapter"

    def _distil(self) -> None:
        """Train the norm layers' scales and biases, where it helps."""
        before, data = self.error, self.calibration
        values, after, steps = distilled(
            self.student(), self.original, data.to_fit, self.judge, lambda step: self._told_step(step, 0.0)
        )
        worth = _WORTH_ALL if self.method == "auto" else _WORTH
        if not values or not after < worth * before:
            tried = {"norm layers distilled": after}
            self.choices.append(Choice("", "norm layers as they were", before, before, tried))
            return
        # It helps on data that it did not see: now for as long, on all the data there is.
        values, _, _ = distilled(
            self.student(),
            self.original,
            data.all,
            self.judge,
            lambda step: self._told_step(step, 0.5),
            steps=steps,
        )
        own = dict(self.build(self.adapters).named_parameters())
        self.weights |= {name: value for name, value in values.items() if name in own}
        self.error = after
        what = f"scales and biases of norm layers distilled: {len(values)} tensors"
        self.choices.append(Choice("", what, before, after, {"nothing": before}))

    def _told_step(self, step: int, done: float) -> None:
        self.told("norm layers", 0.5 + 0.5 * (done + 0.5 * step / STEPS))


class Probe(nn.Module):
    """Stands at a joint, hands on a copy of what comes, and remembers it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The value, copied."""
        self.seen.append(x.detach().clone())
        return x.clone()


@contextmanager
def _watched(model: nn.Module, ends: Sequence[tuple[str, int]]) -> Iterator[dict[tuple[str, int], torch.Tensor]]:
    """The outputs of some calls of modules, by path and number, of the run made last; `clear()` before each run."""
    found: dict[tuple[str, int], torch.Tensor] = {}

    def hook(path: str) -> Callable[..., None]:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            number = sum(key[0] == path for key in found)
            values = (
                [output] if isinstance(output, torch.Tensor) else output if isinstance(output, (tuple, list)) else []
            )
            tensors = [each for each in values if isinstance(each, torch.Tensor) and each.is_floating_point()]
            if tensors:
                found[path, number] = tensors[0].detach().clone()

        return keep

    handles = [model.get_submodule(path).register_forward_hook(hook(path)) for path in {path for path, _ in ends}]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
