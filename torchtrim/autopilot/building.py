"""From a plan to a model: blocks out, channels out, statistics of norms moved; each step by the edits of torchtrim."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrim.autopilot.plans import PRUNINGS, TrimPlan
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import dependencies
from torchtrim.edits.budget import Budget
from torchtrim.edits.norms import is_norm
from torchtrim.edits.remove import remove
from torchtrim.errors import TorchTrimWarning
from torchtrim.graph.copying import full_copy, kept_random_state
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.summary import Summary, summary
from torchtrim.importance.channels import scores
from torchtrim.importance.matrices import ChannelGroup
from torchtrim.search.prune import prune_channels
from torchtrim.train.recalibrate import recalibrate_batchnorm


@dataclass(frozen=True)
class Step:
    """One step on the way from the original to a candidate.

    Attributes:
        name: What was done.
        model: The model after it.
        seconds: How long it took.
        note: What is to be told.
    """

    name: str
    model: nn.Module = field(repr=False)
    seconds: float
    note: str = ""


class Builder:
    """Makes candidates from plans. The same plan gives the same model again.

    Memory: the original, the model with the blocks of the last plan out, the channels' scores of that, and what is
    being made.

    Args:
        model: The original, in eval mode. It is left as it was.
        inputs: Example inputs.
        order: The blocks, in the order in which they go.
        budget: What is asked.
        data: Batches to calibrate on.
        repair: Whether statistics of batch norms are moved.
    """

    def __init__(
        self, model: nn.Module, inputs: Inputs, order: tuple[str, ...], budget: Budget, data: list[Any], *, repair: bool
    ) -> None:
        self.model, self.inputs, self.order, self.data = model, inputs, order, data
        self.whole = summary(model, inputs)
        computed = budget.limits({"macs": self.whole.macs, "params": self.whole.params})
        self.limits = {name: limit for name, limit in computed.items() if name in budget.computed}
        self._repair = repair and any(is_norm(module) for module in model.modules())
        self._shorter: tuple[int, nn.Module] = (0, model)
        self._scored: tuple[tuple[int, str], Any] | None = None

    def steps(
        self,
        plan: TrimPlan,
        share: float | None = None,
        *,
        size: float | None = None,
        heal: str | None = None,
        check: bool = False,
        shapes_only: bool = False,
    ) -> list[Step]:
        """The steps of a plan, the last one's model being the candidate.

        Args:
            plan: The plan.
            share: Prune to this share of the original's MACs at most, whatever the plan says.
            size: Parameters and buffers of so many MB at most, where the limit is that of a file.
            heal: How the joints of removed blocks are healed.
            check: Compare each edit with what it should compute (see `remove` and `prune_channels`).
            shapes_only: The shapes alone have to be right: no weights are solved anew, no statistics moved.

        Raises:
            TorchTrimError: It cannot be done.
        """
        with torch.no_grad(), kept_random_state():
            aim = self._target(plan.share if share is None else share, size)
            return list(self._steps(plan, aim, heal, check, shapes_only))

    def _steps(
        self, plan: TrimPlan, target: dict[str, float], heal: str | None, check: bool, shapes_only: bool
    ) -> Iterator[Step]:
        started = time.perf_counter()
        net = self._without(plan.remove, check, heal)
        if plan.remove:
            gone = ", ".join(self.order[: plan.remove])
            yield Step("blocks removed", net, time.perf_counter() - started, gone)
        started = time.perf_counter()
        changed = False
        if plan.pruning != "none" and not self.keeps(summary(net, self.inputs), target):
            net, note = self._pruned(net, plan, target, check, shapes_only)
            changed = True
            yield Step("channels pruned", net, time.perf_counter() - started, note)
        if self._repair and (plan.remove or changed) and not shapes_only:
            started = time.perf_counter()
            net = full_copy(net)
            found = recalibrate_batchnorm(net, self.data, self.inputs, original=self.model)
            yield Step("batch norms recalibrated", net, time.perf_counter() - started, found.what)
        if not plan.remove and not changed:
            yield Step("untouched", full_copy(net), 0.0)

    def keeps(self, left: Summary, limits: dict[str, float]) -> bool:
        """Whether a model is within limits of `macs`, `params` and `size_mb`."""
        return all(cost_of(left)[name] <= limit for name, limit in limits.items())

    def _target(self, share: float | None, size: float | None) -> dict[str, float]:
        target = dict(self.limits)
        if size is not None:
            target["size_mb"] = size
        if share is not None:
            # A share that was reached is reached again, whatever the last bit of the product is.
            target["macs"] = min(share * self.whole.macs + 0.5, target.get("macs", float("inf")))
        return target

    def _without(self, count: int, check: bool, heal: str | None) -> nn.Module:
        if (check or heal) and count:
            data = self.data if heal else None
            return remove(self.model, self.inputs, list(self.order[:count]), heal=heal, data=data, check=check).eval()
        if self._shorter[0] != count:
            net = remove(self.model, self.inputs, list(self.order[:count]), check=False) if count else self.model
            self._shorter = (count, net.eval())
        return self._shorter[1]

    def _pruned(
        self, net: nn.Module, plan: TrimPlan, target: dict[str, float], check: bool, shapes_only: bool
    ) -> tuple[nn.Module, str]:
        importance, scope, reconstruct = PRUNINGS[plan.pruning]
        # Limits are absolute: a MACs limit up to 1 would be a share of what is left after the removal.
        budget = Budget(
            **{name: max(limit, 1.000001) if name != "size_mb" else limit for name, limit in target.items()}
        )
        with told_warnings() as told:
            pruned = prune_channels(
                net,
                self.inputs,
                budget=budget,
                importance=self._criterion(net, plan.remove, importance),
                scope=scope,
                reconstruct=reconstruct and not shapes_only,
                data=self.data,
                check=check,
            )
        return pruned.eval(), "; ".join(told)

    def _criterion(self, net: nn.Module, removed: int, importance: str) -> Callable[[ChannelGroup], Any]:
        """The scores of a criterion, worked out once for all budgets."""
        if self._scored is None or self._scored[0] != (removed, importance):  # a healed joint hardly changes them
            groups = dependencies(net, follow(net, self.inputs))
            values = scores(net, groups, importance, data=self.data, inputs=self.inputs)
            self._scored = ((removed, importance), {group.name: values[group.units] for group in groups.groups})
        by_name = self._scored[1]

        def known(group: ChannelGroup) -> Any:
            return by_name[group.name]

        known.__name__ = importance  # what the record says that channels were ranked by
        return known


def cost_of(left: Summary) -> dict[str, float]:
    """What the shapes of a model tell of its cost, by the names of a budget's limits."""
    return {"macs": left.macs, "params": left.params, "size_mb": left.size_mb}


@contextmanager
def told_warnings() -> Iterator[list[str]]:
    """Take torchtrim's own warnings as notes: the result says what is missed; others go on as they would."""
    told: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield told
    for warning in caught:
        if issubclass(warning.category, TorchTrimWarning):
            told.append(str(warning.message))
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
