"""The edit behind `tt.prune_channels`: the least important channels go, and everything downstream follows."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

import numpy as np

from torchtrim.channels import cost
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import Dependencies, dependencies
from torchtrim.channels.select import Scope
from torchtrim.edits.attention import unwiden, widen
from torchtrim.edits.budget import Budget
from torchtrim.edits.channel_check import check_values
from torchtrim.edits.edit import Edit
from torchtrim.edits.prune_choice import Choice
from torchtrim.edits.prune_decide import Decision, decide, take_out
from torchtrim.edits.prune_record import Pruned, PrunedGroup, lost_by, narrow_again, shapes_of
from torchtrim.edits.reconstruct import reconstruct, set_tensors
from torchtrim.edits.truth import set_attributes
from torchtrim.edits.work import Work
from torchtrim.errors import CheckFailed, EditError, GuardError, TorchTrimWarning
from torchtrim.graph import check as checks
from torchtrim.graph.check import Side, variants
from torchtrim.graph.copying import is_meta
from torchtrim.importance.channels import Importance
from torchtrim.importance.gradients import Loss


@dataclass(frozen=True)
class PruneChannels(Edit):
    """Take the least important channels out.

    Attributes:
        ratio: The fraction of the channels that go; or by path or glob of a layer, the first that fits.
        importance: What they are ranked by: a name, or that of the type of what was given.
        scope: Among which channels they are ranked: `"uniform"`, `"global"` or `"isomorphic"`.
        budget: Limits that the model has to stay within, in place of a ratio.
        thresholds: By path or glob of a layer the score below which its channels go, in place of a ratio.
        round_to: What widths are rounded to.
        min_channels: How many channels of a layer stay at least.
        max_ratio: The largest fraction of a layer that may go.
        protect: Paths or globs of layers whose output keeps its width.
        reconstruct: Whether the layers that read pruned channels are solved for anew on data; or how.
        pruned: What was decided, in the record of a pruning that was done.
    """

    kind: ClassVar[str] = "prune_channels"
    ratio: float | dict[str, float] | None = None
    importance: str = "magnitude"
    scope: Scope = "uniform"
    budget: Budget | None = None
    thresholds: dict[str, float] | None = None
    round_to: int = 8
    min_channels: int = 1
    max_ratio: float = 0.9
    protect: tuple[str, ...] = ()
    reconstruct: bool | str = False
    pruned: Pruned | None = field(default=None, metadata={"decided": True})

    def __post_init__(self) -> None:
        targets = [each for each in ("ratio", "budget", "thresholds") if getattr(self, each) is not None]
        if len(targets) != 1:
            raise EditError("how many channels?", found=targets, expected="a ratio, a budget or thresholds")
        ratios = list(self.ratio.values()) if isinstance(self.ratio, dict) else [self.ratio]
        for ratio in (*ratios, self.max_ratio):
            if ratio is not None and (isinstance(ratio, bool) or not 0 <= ratio < 1):
                raise EditError("the fraction of channels that go", found=ratio, expected="0 to 1, without 1")
        if self.scope not in get_args(Scope):
            raise EditError("no such scope", path="scope", found=self.scope, expected=", ".join(get_args(Scope)))
        for name in ("round_to", "min_channels"):
            if getattr(self, name) < 1:
                raise EditError("a number of channels", path=name, found=getattr(self, name), expected="1 or more")

    @property
    def narrowed(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """For each parameter and buffer the indices that went along each of its dimensions."""
        return {} if self.pruned is None else self.pruned.narrowed

    @property
    def given(self) -> dict[str, Any]:
        """The criterion and the loss as they were given, which a record does not hold."""
        found: dict[str, Any] = self.__dict__.get("_given", {})
        return found

    def within(self, budget: Budget) -> PruneChannels:
        """The same within another budget."""
        other = replace(self, budget=budget)
        other.__dict__["_given"] = self.given
        return other

    def perform(self, work: Work) -> Edit:
        """Prune `work.model`; returns the record with what was decided."""
        if self.pruned is not None:
            return self._again(work, self.pruned)
        widen(work)
        flow = follow(work.model, work.inputs)
        found = dependencies(work.model, flow, protect=self.protect)
        choice = Choice.of(self, work, found)
        decision = decide(work, found, choice)
        changes, attributes = take_out(work, flow, decision.gone)
        unwiden(work)
        groups = tuple(PrunedGroup.of(group, decision.units) for group in found.groups)
        left_alone = found.left_alone | {
            found.groups[number].name: why for number, why in (choice.silent | decision.left_alone).items()
        }
        notes = (*choice.notes, *_budget(choice), *_told(work, found, decision, groups, left_alone))
        pruned = Pruned(
            groups,
            lost_by(changes),
            shapes_of(work.model, [change.path for change in changes]),
            attributes,
            left_alone,
            notes,
        )
        work.joints += [group.joint() for group in groups if group.after < group.before]
        work.notes += notes
        if work.check:
            work.checked += check_values(work, flow, decision.gone)
        if self.reconstruct and not work.planning:
            pruned = self._reconstructed(work, pruned)
        return replace(self, pruned=pruned)

    def _reconstructed(self, work: Work, pruned: Pruned) -> Pruned:
        """Solve the layers that read pruned channels anew."""
        if work.data is None:
            raise EditError("reconstruction needs data", path="reconstruct", hint="data=, a few batches")
        solved = reconstruct(work.before, work.model, pruned.narrowed, inputs=work.inputs, data=work.data)
        set_tensors(work, solved.weights)
        work.notes += solved.notes
        return replace(pruned, weights=solved.weights, notes=(*pruned.notes, *solved.notes))

    def _again(self, work: Work, pruned: Pruned) -> Edit:
        """Do what the record says."""
        widen(work)
        narrow_again(work, pruned)
        set_attributes(work.model, pruned.attributes)
        unwiden(work)
        if pruned.weights is not None:
            set_tensors(work, pruned.weights)
        work.joints += [group.joint() for group in pruned.groups if group.after < group.before]
        work.notes += pruned.notes
        if work.check:
            work.checked += _runs(work)
        return self


def request(
    ratio: float | Mapping[str, float] | None = None,
    *,
    importance: Importance = "magnitude",
    scope: Scope = "uniform",
    budget: Budget | None = None,
    thresholds: Mapping[str, float] | None = None,
    loss: Loss | None = None,
    round_to: int = 8,
    min_channels: int = 1,
    max_ratio: float = 0.9,
    protect: str | Collection[str] = (),
    reconstruct: bool | str = False,
) -> PruneChannels:
    """The record of what `prune_channels` is asked for.

    Raises:
        EditError: It does not say how many channels are to go, or a value is none.
    """
    edit = PruneChannels(
        ratio=dict(ratio) if isinstance(ratio, Mapping) else ratio,
        importance=importance if isinstance(importance, str) else _name(importance),
        scope=scope,
        budget=budget,
        thresholds=None if thresholds is None else dict(thresholds),
        round_to=round_to,
        min_channels=min_channels,
        max_ratio=max_ratio,
        protect=(protect,) if isinstance(protect, str) else tuple(protect),
        reconstruct=reconstruct,
    )
    edit.__dict__["_given"] = {"importance": importance, "loss": loss}
    return edit


def _name(importance: Any) -> str:
    return str(getattr(importance, "__name__", type(importance).__name__))


def _told(
    work: Work, found: Dependencies, decision: Decision, groups: Iterable[PrunedGroup], left_alone: Mapping[str, str]
) -> list[str]:
    flow, none = found.flow, np.zeros_like(decision.gone)
    counts = [sum(widths) for widths in zip(*((group.before, group.after) for group in groups), strict=True)] or [0, 0]
    macs = [cost.macs(flow, gone) for gone in (none, decision.gone)]
    params = [cost.params(work.before, flow, gone) for gone in (none, decision.gone)]
    told = [
        f"channels {counts[0]:,} -> {counts[1]:,}, parameters {params[0]:,} -> {params[1]:,} "
        f"({params[1] / max(params[0], 1):.1%}), MACs {macs[0]:,} -> {macs[1]:,} ({macs[1] / max(macs[0], 1):.1%})"
    ]
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_alone.items():
        by_reason.setdefault(reason, []).append(path)
    told += [f"left alone: {_some(paths)}: {reason}" for reason, paths in by_reason.items()]
    if any(bool(decision.gone[layer].any()) for layer in flow.channels.mixed):
        told.append("a norm or sum over the pruned channels computes something else without them")
    return told


def _budget(choice: Choice) -> list[str]:
    """What a budget came to; a limit that is missed is warned of."""
    asked, within = choice.asked.budget, choice.within
    if asked is None or within is None:
        return []
    told = f"asked for {asked}: {within.told()}"
    if within.missed:
        told += f"; {', '.join(within.missed)} missed: at max_ratio={choice.asked.max_ratio} no more channels can go"
        warnings.warn(told, TorchTrimWarning, stacklevel=2)
    return [told]


def _some(paths: list[str], limit: int = 6) -> str:
    return ", ".join(paths[:limit]) + (f" and {len(paths) - limit} more" if len(paths) > limit else "")


def _runs(work: Work) -> list[str]:
    """Run a model that was narrowed by its record."""
    if is_meta(work.model):
        return ["not run: the model is on the meta device"]
    told = []
    for variant in variants(work.inputs):
        try:
            checks.run(Side(work.before), variant, gradients=False)
        except Exception as error:  # noqa: BLE001 -- whatever the user's model raises: it does not take these inputs
            told.append(f"{variant.name}: not checked, the original refuses it ({type(error).__name__})")
            continue
        try:
            checks.run(Side(work.model), variant, gradients=False)
        except GuardError:
            told.append(f"{variant.name}: refused, the graph holds for the example's size")
        except Exception as error:
            raise CheckFailed(f"it does not run in {variant.name}: {type(error).__name__}: {error}") from error
        else:
            told.append(f"{variant.name}: runs")
    return told
