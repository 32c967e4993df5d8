"""The edit behind `tt.prune_channels`: the least important channels go, and everything downstream follows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, get_args

import numpy as np
from torch import nn

from torchtrim.channels import cost
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import Dependencies, dependencies
from torchtrim.channels.select import Scope
from torchtrim.edits.attention import unwiden, widen
from torchtrim.edits.budget import Budget, plain_number
from torchtrim.edits.channel_check import check_values
from torchtrim.edits.edit import Edit
from torchtrim.edits.prune_choice import Choice
from torchtrim.edits.prune_decide import Decision, decide
from torchtrim.edits.prune_record import Pruned, PrunedGroup, lost_by, narrow_again, shapes_of
from torchtrim.edits.reconstruct import reconstruct, set_tensors
from torchtrim.edits.truth import set_attributes
from torchtrim.edits.work import Work
from torchtrim.errors import CheckFailed, EditError, GuardError, InputError, TorchTrimWarning
from torchtrim.graph import check as checks
from torchtrim.graph.check import Side, variants
from torchtrim.graph.copying import is_meta, paused_collection
from torchtrim.graph.paths import What, check_selection, describe, several, spelled
from torchtrim.graph.stale import forget_computed
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
        protect: Paths or globs of modules that keep their width, with all in them.
        reconstruct: Whether the layers that read pruned channels are solved for anew on data.
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
    reconstruct: bool = False
    pruned: Pruned | None = field(default=None, metadata={"decided": True})

    def __post_init__(self) -> None:
        targets = [each for each in ("ratio", "budget", "thresholds") if getattr(self, each) is not None]
        if len(targets) != 1:
            raise EditError("how many channels?", found=targets, expected="a ratio, a budget or thresholds")
        if not isinstance(self.importance, str):
            raise EditError(
                "a record holds the name of a criterion",
                path="importance",
                found=_name(self.importance),
                hint="tt.prune_channels, which takes functions too",
            )
        plain: dict[str, Any] = {"max_ratio": _fraction(self.max_ratio, "max_ratio")}
        if isinstance(self.ratio, Mapping):
            plain["ratio"] = {_key(each, "ratio"): _fraction(number, each) for each, number in self.ratio.items()}
        elif self.ratio is not None:
            plain["ratio"] = _fraction(self.ratio, "ratio")
        if self.thresholds is not None:
            if not isinstance(self.thresholds, Mapping):
                raise EditError(
                    "scores by layer", path="thresholds", found=repr(self.thresholds), hint='thresholds={"**": 0.5}'
                )
            plain["thresholds"] = {
                _key(each, "thresholds"): _threshold(number, each) for each, number in self.thresholds.items()
            }
        if self.budget is not None:
            plain["budget"] = budget = Budget.of(self.budget)
            if budget.max_drop is not None:
                raise EditError(
                    "a drop of the score is not measured here",
                    path="budget.max_drop",
                    found=budget.max_drop,
                    hint="tt.trim(model, data, budget=...), which measures it",
                )
        plain["protect"] = tuple(_key(each, "protect") for each in several(self.protect))
        for name in ("round_to", "min_channels"):
            plain[name] = _count(getattr(self, name), name)
        if self.scope not in get_args(Scope):
            raise EditError("no such scope", path="scope", found=self.scope, expected=", ".join(get_args(Scope)))
        if not isinstance(self.reconstruct, bool):
            raise EditError("yes or no", path="reconstruct", found=repr(self.reconstruct), expected="True or False")
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def narrowed(self) -> dict[str, dict[str, tuple[int, ...]]]:
        """For each parameter and buffer the indices that went along each of its dimensions."""
        return {} if self.pruned is None else self.pruned.narrowed

    @property
    def given(self) -> dict[str, Any]:
        """The criterion, the loss and what was selected by types as they were given, which a record does not hold."""
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
        if not work.inputs.batch:
            raise InputError("the example inputs hold no sample", found=work.inputs.describe())
        widen(work)
        flow = follow(work.model, work.inputs)
        protect = spelled(work.before, self.given.get("protect", self.protect))
        found = dependencies(work.model, flow, protect=protect)
        choice = Choice.of(self, work, found)
        with paused_collection():
            decision = decide(work, found, choice)
            decision.commit(work)
        changes, attributes = decision.changes, decision.attributes
        unwiden(work)
        groups = tuple(PrunedGroup.of(group, decision.units) for group in found.groups)
        left_alone = found.left_alone | {
            found.groups[number].name: why for number, why in (choice.silent | decision.left_alone).items()
        }
        notes = (*choice.notes, *_budget(choice, decision), *_told(work, found, decision, groups, left_alone))
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
        by_layer: dict[str, Any] = {
            name: _by_paths(work.before, self.given[name])
            for name in ("ratio", "thresholds")
            if isinstance(self.given.get(name), Mapping)
        }
        return replace(self, protect=protect, pruned=pruned, **by_layer)

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
        changed = narrow_again(work, pruned)
        set_attributes(work.model, pruned.attributes)
        forget_computed(work.model, changed)
        unwiden(work)
        if pruned.weights is not None:
            set_tensors(work, pruned.weights)
        work.joints += [group.joint() for group in pruned.groups if group.after < group.before]
        work.notes += pruned.notes
        if work.check:
            work.checked += _runs(work)
        return self


def request(
    ratio: float | Mapping[Any, float] | None = None,
    *,
    importance: Importance = "magnitude",
    scope: Scope = "uniform",
    budget: Budget | Mapping[str, float] | None = None,
    thresholds: Mapping[Any, float] | None = None,
    loss: Loss | None = None,
    round_to: int = 8,
    min_channels: int = 1,
    max_ratio: float = 0.9,
    protect: What | Iterable[What] = (),
    reconstruct: bool = False,
) -> PruneChannels:
    """The record of what `prune_channels` is asked for.

    Raises:
        EditError: It does not say how many channels are to go, or a value is none.
        SelectionError: What is to be protected is no selection.
    """
    protected = several(protect)
    edit = PruneChannels(
        ratio=_by_name(ratio),
        importance=importance if isinstance(importance, str) else _name(importance),
        scope=scope,
        budget=None if budget is None else Budget.of(budget),
        thresholds=_by_name(thresholds),
        round_to=round_to,
        min_channels=min_channels,
        max_ratio=max_ratio,
        protect=tuple(_in_words(each) for each in protected),
        reconstruct=reconstruct,
    )
    given: dict[str, Any] = {"importance": importance, "loss": loss, "protect": protected}
    if isinstance(ratio, Mapping):
        given["ratio"] = {each: _fraction(number, _in_words(each)) for each, number in ratio.items()}
    if thresholds is not None:
        given["thresholds"] = {each: _threshold(number, _in_words(each)) for each, number in thresholds.items()}
    edit.__dict__["_given"] = given
    return edit


def _name(importance: Any) -> str:
    return str(getattr(importance, "__name__", type(importance).__name__))


def _by_name(given: Any) -> Any:
    return {_in_words(each): number for each, number in given.items()} if isinstance(given, Mapping) else given


def _in_words(selection: Any) -> str:
    check_selection(selection)
    return selection if isinstance(selection, str) else describe(selection)


def _by_paths(model: nn.Module, asked: Mapping[Any, float]) -> dict[str, float]:
    """What is asked by selection, by path and glob; what comes first counts."""
    found: dict[str, float] = {}
    for selection, number in asked.items():
        for path in spelled(model, selection):
            found.setdefault(path, number)
    return found


def _key(given: object, name: str) -> str:
    if not isinstance(given, str):
        raise EditError("a record names layers by paths and globs", path=name, found=repr(given))
    return given


def _fraction(given: object, path: str) -> float:
    number = plain_number(given)
    if number is None or not 0 <= number < 1:
        raise EditError("the fraction of channels that go", path=path, found=repr(given), expected="0 to 1, without 1")
    return number


def _threshold(given: object, path: str) -> float:
    number = plain_number(given)
    if number is None or not math.isfinite(number):
        raise EditError("a threshold is a number", path=path, found=repr(given))
    return number


def _count(given: object, path: str) -> int:
    number = plain_number(given)
    if not isinstance(number, int) or number < 1:
        raise EditError("a number of channels", path=path, found=repr(given), expected="a whole number, 1 or more")
    return number


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


def _budget(choice: Choice, decision: Decision) -> list[str]:
    """What a budget came to; a limit that is missed is warned of."""
    asked, within = choice.asked.budget, choice.within
    if asked is None or within is None:
        return []
    told = f"asked for {asked}: {within.told()}"
    if within.missed:
        told += f"; {', '.join(within.missed)} missed: {choice.why_not_more(decision.left_alone)}"
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
