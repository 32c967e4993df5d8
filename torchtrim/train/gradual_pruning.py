"""`GradualPruning`: prune a model in many small steps from inside a training loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, Literal

import torch
from torch import nn

from torchtrim.channels import cost
from torchtrim.channels.asked import asked_of
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import dependencies
from torchtrim.edits.apply import run
from torchtrim.edits.budget import Budget
from torchtrim.edits.history import history
from torchtrim.edits.prune import request
from torchtrim.errors import EditError, InputError, nearest
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.reader import inputs_for
from torchtrim.importance.channels import NEED_DATA
from torchtrim.train.optimizer import sync_optimizer

Schedule = Literal["cubic", "linear"]


_SETTINGS = tuple(name for name in signature(request).parameters if name not in ("ratio", "budget", "thresholds"))


class GradualPruning:
    """Pruning in place, a little more with every `step()`, until a ratio or a budget is reached.

    What goes until step `t` of `n` is the final ratio times `1 - (1 - t/n)^3` (`"cubic"`: much at first, while there is
    time to make up for it; Zhu and Gupta, *To prune, or not to prune*, 2017), or times `t/n` (`"linear"`). Parameters
    stay the same objects, and the optimizer is brought up to date after every step.

    Args:
        model: The model; it is changed in place.
        example_inputs: As for `cut`.
        ratio: As for `prune_channels`: the final one, of the widths that the model has now.
        steps: In how many steps.
        budget: A budget in place of a ratio: of MACs or parameters.
        optimizer: The optimizer that trains it.
        schedule: `"cubic"` or `"linear"`.
        check: Run and compare the model after every step.
        data: For an importance that looks at data, and for reconstruction: gone through at every step.
        **settings: What else `prune_channels` takes: `importance`, `scope`, `round_to`, `protect`, ...

    Attributes:
        model: The model.
        taken: How many steps were taken.

    Raises:
        EditError: Neither a ratio nor a budget, a schedule or number of steps that is none.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 2)), torch.randn(8, 4)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> pruning = GradualPruning(net, x, ratio=0.5, steps=2, optimizer=optimizer)
        >>> while not pruning.done:
        ...     optimizer.zero_grad(); net(x).square().mean().backward(); optimizer.step()
        ...     _ = pruning.step()
        ...     print(net[0].out_features)
        40
        32
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        ratio: float | Mapping[Any, float] | None = None,
        steps: int = 10,
        *,
        budget: Budget | Mapping[str, float] | None = None,
        optimizer: torch.optim.Optimizer | None = None,
        schedule: Schedule = "cubic",
        check: bool = True,
        data: Iterable[Any] | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise EditError("a number of steps", path="steps", found=steps, expected="1 or more")
        if schedule not in ("cubic", "linear"):
            raise EditError("no such schedule", path="schedule", found=schedule, expected="cubic or linear")
        if "thresholds" in settings:
            raise EditError("steps lead to a ratio or a budget", path="thresholds", hint="tt.prune_channels")
        unknown = [name for name in settings if name not in _SETTINGS]
        if unknown:
            raise EditError(
                "no such setting",
                path=unknown[0],
                expected=", ".join(_SETTINGS),
                hint=nearest(unknown[0], _SETTINGS),
            )
        budget = request(ratio, budget=budget, **settings).budget  # whether it can be asked for
        if budget is not None and (budget.macs is None) == (budget.params is None):
            raise EditError("a budget of MACs or of parameters, one of them", path="budget", found=str(budget))
        self.model = model
        self.taken = 0
        self._inputs = inputs_for(model, example_inputs)
        self._budget, self._steps = budget, steps
        self._optimizer, self._schedule, self._check, self._data = optimizer, schedule, check, data
        self._settings = settings
        self._refuse_unfit()
        flow = follow(model, self._inputs)
        found = dependencies(model, flow, protect=settings.get("protect", ()))
        self._widths = {group.name: group.width for group in found.groups}
        shares = asked_of(model, found, ratio) if isinstance(ratio, Mapping) else [ratio] * len(found.groups)
        self._final = {group.name: float(share or 0) for group, share in zip(found.groups, shares, strict=True)}
        none = found.gone(torch.zeros(found.count, dtype=torch.bool).numpy())
        self._whole = cost.macs(flow, none) if budget is None or budget.macs else cost.params(model, flow, none)

    @property
    def done(self) -> bool:
        """Whether all steps were taken."""
        return self.taken >= self._steps

    def share(self, step: int) -> float:
        """How much of the final ratio goes until a step, counted from 1."""
        left = 1 - min(step / self._steps, 1.0)
        return 1 - (left**3 if self._schedule == "cubic" else left)

    def step(self) -> bool:
        """Prune a little more, and bring the optimizer up to date; returns whether there was anything left to do.

        Raises:
            TorchTrimError: What `prune_channels` or `sync_optimizer` raise. The model has not changed then, unless it
                is the latter that does.
        """
        if self.done:
            return False
        self._refuse_unfit()
        share = self.share(self.taken + 1)
        if self._budget is not None:
            edit = request(budget=self._budget_at(share), **self._settings)
        else:
            edit = request(self._ratio_at(share), **self._settings)
        self.model = run(self.model, self._inputs, [edit], copy=False, check=self._check, data=self._data)
        self.taken += 1
        if self._optimizer is not None:
            sync_optimizer(self._optimizer, self.model)
        return True

    def _refuse_unfit(self) -> None:
        """Before anything is changed: what would stop a step half way."""
        if self._optimizer is not None:
            inner = getattr(self._optimizer, "optimizer", self._optimizer)  # of accelerate's wrapper
            if not isinstance(inner, torch.optim.Optimizer):
                raise EditError("not an optimizer", path="optimizer", found=type(self._optimizer).__name__)
            held = {id(each) for group in inner.param_groups for each in group["params"]}
            if not any(id(each) in held for each in self.model.parameters()):
                raise EditError("the optimizer holds none of the model's parameters", path="optimizer")
        importance = self._settings.get("importance", "magnitude")
        if self._data is None and (self._settings.get("reconstruct") or importance in NEED_DATA):
            raise InputError("this looks at data, and there is none", path="data", found=str(importance))

    def _budget_at(self, share: float) -> Budget:
        name = "macs" if self._budget is not None and self._budget.macs is not None else "params"
        limit = getattr(self._budget, name)
        final = limit if limit > 1 else limit * self._whole
        at_least = 2.0  # up to 1 a budget is a share, and one of the model as it is now
        return Budget(**{name: max(self._whole - share * (self._whole - final), at_least)})

    def _ratio_at(self, share: float) -> dict[str, float]:
        """The fractions of the present widths that bring each layer to where it has to be; one where all are ranked."""
        now = {name: width for name, width in self._present().items() if self._final.get(name)}
        wanted = {name: self._widths[name] * (1 - share * self._final[name]) for name in now}
        if self._settings.get("scope", "uniform") != "uniform":
            left = sum(wanted.values()) / max(sum(now.values()), 1)
            wanted = {name: left * width for name, width in now.items()}
        return {name: min(1 - wanted[name] / width, 0.999) for name, width in now.items() if wanted[name] < width}

    def _present(self) -> dict[str, int]:
        """The widths of the groups as they are now."""
        edits = history(self.model).edits
        last = getattr(edits[-1], "pruned", None) if self.taken and edits else None
        if last is None:
            return dict(self._widths)
        return {group.name: group.after for group in last.groups}
