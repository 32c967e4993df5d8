"""What a pruning asks for, as a choice of units: by ratio, by thresholds or within a budget."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtrim.channels.asked import asked_of
from torchtrim.channels.groups import Dependencies
from torchtrim.channels.labels import Mask
from torchtrim.channels.select import FloatArray, select
from torchtrim.edits.prune_budget import Within, cost_of, units_within
from torchtrim.edits.work import Work
from torchtrim.errors import EditError, InputError
from torchtrim.importance.channels import Importance, scores, silent
from torchtrim.importance.thresholds import ratios_below

if TYPE_CHECKING:
    from torchtrim.edits.prune import PruneChannels


_ALL = 1 - 1e-9  # the largest fraction that may go: of each group something stays


@dataclass(eq=False)
class Choice:
    """Which units go, as asked: a function of the groups that are left alone.

    Attributes:
        asked: The edit.
        work: What it works on.
        found: The groups of the model.
        scores: The importance of each unit.
        silent: The groups (by their number) of which the criterion says nothing, and why.
        notes: What the user should know.
        within: What a budget came to.
    """

    asked: PruneChannels
    work: Work
    found: Dependencies
    scores: FloatArray
    silent: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    within: Within | None = None

    @staticmethod
    def of(asked: PruneChannels, work: Work, found: Dependencies) -> Choice:
        """Score the units.

        Raises:
            TorchTrimError: The criterion cannot, as `importance.channels.scores` says.
        """
        importance: Importance = asked.given.get("importance", asked.importance)
        loss, notes = asked.given.get("loss"), []
        try:
            values = scores(work.model, found, importance, data=work.data, loss=loss, inputs=work.inputs)
        except InputError:
            if not work.planning or work.data is not None:
                raise
            values = scores(work.model, found)
            notes.append(f"planned by magnitude, as there is no data: {asked.importance} may choose others")
        nothing = {
            number: silent(importance)
            for number, group in enumerate(found.groups)
            if np.isnan(values[group.units]).any()
        }
        return Choice(asked, work, found, np.nan_to_num(values), nothing, notes)

    def __call__(self, left: Collection[int]) -> Mask:
        """The units that go when some more groups are left alone."""
        allowed, asked = self._allowed(left), self.asked
        if asked.budget is None:
            return self._select(self._ratios() * allowed)
        if asked.budget.latency_ms is not None:
            raise EditError(
                "a latency is measured, not computed",
                path="budget.latency_ms",
                hint="tt.prune_channels, which measures",
            )
        self.within = units_within(
            asked.budget,
            self.work.model,
            self.found,
            self.scores,
            lambda ratio: self._select(ratio * allowed),
            most=1.0,  # `select` holds every group to its largest ratio
        )
        return self.within.units

    def why_not_more(self, left: Collection[int]) -> str:
        """What stands in the way of a smaller model, where a budget is missed.

        Args:
            left: The groups (by their number) that were left alone after all.
        """
        if self.within is None or self.asked.budget is None:
            return ""
        name = self.within.missed[0]
        allowed = self._allowed(left)
        reasons = []
        for setting, free in (("round_to", 1), ("min_channels", 1), ("max_ratio", _ALL)):
            units = self._select(allowed, **{setting: free})
            share = cost_of(self.asked.budget, self.work.model, self.found, units)[name] / self.within.original[name]
            if share < self.within.cost[name] / self.within.original[name]:
                reasons.append(f"{setting}={getattr(self.asked, setting)} (without it {name} {share:.1%})")
        alone = len(self.found.left_alone) + int((allowed == 0).sum())
        if alone:
            reasons.append(f"what is left alone (layers: {alone})")
        if not reasons:
            return "no more channels can go: of each layer something has to stay"
        return f"no more channels can go with {', '.join(reasons)}"

    def _allowed(self, left: Collection[int]) -> FloatArray:
        allowed = np.ones(len(self.found.groups))
        allowed[[*left, *self.silent]] = 0.0
        return allowed

    def _select(self, ratios: FloatArray, **other: Any) -> Mask:
        asked = self.asked
        scope = "uniform" if asked.thresholds is not None else asked.scope
        sizes: dict[str, Any] = {name: getattr(asked, name) for name in ("round_to", "min_channels", "max_ratio")}
        return select(self.found, self.scores, ratios, scope, **sizes | other)

    def _ratios(self) -> FloatArray:
        asked, model = self.asked, self.work.before
        thresholds = asked.given.get("thresholds", asked.thresholds)
        if thresholds is not None:
            return ratios_below(model, self.found, self.scores, thresholds)
        ratio: Any = asked.given.get("ratio", asked.ratio)
        if not isinstance(ratio, Mapping):
            return np.full(len(self.found.groups), float(ratio))
        return np.array([each or 0.0 for each in asked_of(model, self.found, ratio)])
