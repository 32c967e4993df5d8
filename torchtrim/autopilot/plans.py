"""A plan of the autopilot, and all plans that there are to choose from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torchtrim.channels.select import Scope

# What channels are ranked by, among which of them, and whether the layers that read them are solved anew on data.
PRUNINGS: dict[str, tuple[str, Scope, bool]] = {
    "magnitude": ("magnitude", "uniform", False),
    "magnitude:global": ("magnitude", "global", False),
    "isomorphic": ("magnitude", "isomorphic", False),
    "magnitude:reconstruct": ("magnitude", "uniform", True),
    "activation": ("activation", "uniform", False),
    "taylor": ("taylor", "global", False),
    "reconstruction": ("reconstruction", "global", True),
}


@dataclass(frozen=True)
class TrimPlan:
    """What is done to a model.

    Attributes:
        remove: How many blocks go, the first of the order of removal.
        pruning: How channels are pruned then, until the budget is met: a name of `PRUNINGS`, or `"none"`.
        share: The share of the MACs that is aimed at, where the budget names no cost; None: what the budget asks for.
        scheme: The scheme of the file.

    Example:
        >>> print(TrimPlan(2, "magnitude", None, "float32"))
        2 blocks out, channels by magnitude
    """

    remove: int
    pruning: str
    share: float | None
    scheme: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        parts = [f"{self.remove} block{'s' * (self.remove != 1)} out"] if self.remove else []
        if self.pruning != "none":
            aim = "" if self.share is None else f" to {self.share:.0%} of the MACs"
            parts.append(f"channels by {self.pruning}{aim}")
        if self.scheme != "float32":
            parts.append(self.scheme)
        return ", ".join(parts) or "untouched"


@dataclass(frozen=True)
class PlanSpace:
    """All plans.

    Attributes:
        removals: How many blocks may go.
        prunings: How channels may be pruned.
        shares: The shares of the MACs to aim at; empty where the budget says it.
        schemes: The schemes of files.
        order: The paths of the blocks, in the order in which they go.
    """

    removals: tuple[int, ...]
    prunings: tuple[str, ...]
    shares: tuple[float, ...]
    schemes: tuple[str, ...]
    order: tuple[str, ...]

    def __iter__(self) -> Iterator[TrimPlan]:
        """Every plan once."""
        shares = self.shares or (None,)
        every = itertools.product(self.removals, self.prunings, shares, self.schemes)
        yield from dict.fromkeys(itertools.starmap(self._plan, every))

    def plain(self) -> list[TrimPlan]:
        """What one would try by hand, before all else: no blocks out, in each scheme."""
        if 0 not in self.removals:
            return []
        share = min(self.shares, key=lambda each: abs(each - 0.75)) if self.shares else None
        return [self._plan(0, self.prunings[0], share, scheme) for scheme in self.schemes]

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def suggested(self, trial: Any) -> TrimPlan:
        """The plan that a study suggests for a trial."""
        numbers = {
            "remove": trial.suggest_int("remove", 0, len(self.removals) - 1),
            "pruning": trial.suggest_categorical("pruning", self.prunings),
            "share": trial.suggest_int("share", 0, len(self.shares) - 1) if self.shares else None,
            "scheme": trial.suggest_categorical("scheme", self.schemes),
        }
        share = None if numbers["share"] is None else self.shares[numbers["share"]]
        return self._plan(self.removals[numbers["remove"]], numbers["pruning"], share, numbers["scheme"])

    def parameters(self, plan: TrimPlan) -> dict[str, Any]:
        """A plan as the study's parameters."""
        found: dict[str, Any] = {
            "remove": self.removals.index(plan.remove),
            "pruning": plan.pruning if plan.pruning in self.prunings else self.prunings[0],
            "scheme": plan.scheme,
        }
        if self.shares:
            found["share"] = self.shares.index(1.0 if plan.share is None else plan.share)
        return found

    def _plan(self, remove: int, pruning: str, share: float | None, scheme: str) -> TrimPlan:
        """Where all MACs may stay, no channels are pruned: that is one plan, however they would be ranked."""
        if share == 1.0:
            pruning, share = "none", None
        return TrimPlan(remove, pruning, share, scheme)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {name: list(value) for name, value in asdict(self).items()}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> PlanSpace:
        """The space that `to_dict` wrote."""
        return PlanSpace(**{name: tuple(value) for name, value in data.items()})
