"""`sync_optimizer`: an optimizer goes on with a model that was edited in the middle of training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchtrim.edits.history import history
from torchtrim.errors import EditError
from torchtrim.graph.copying import unwrap
from torchtrim.train.lost import Removed, losses, shapes_before, taken


@dataclass(frozen=True)
class Synced:
    """What became of an optimizer.

    Attributes:
        sliced: The names of the parameters whose state lost channels.
        dropped: How many parameters left the optimizer, with their state.
        added: For each parameter that is new in it the number of its group, by name.
    """

    sliced: tuple[str, ...] = ()
    dropped: int = 0
    added: dict[str, int] | None = None

    def __str__(self) -> str:
        added = "".join(f"; {name} added to group {group}" for name, group in (self.added or {}).items())
        return f"optimizer: state of {len(self.sliced)} parameters narrowed; {self.dropped} dropped{added}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"sliced": list(self.sliced), "dropped": self.dropped, "added": dict(self.added or {})}


def sync_optimizer(
    optimizer: torch.optim.Optimizer,
    net: nn.Module,
    *,
    before: nn.Module | None = None,
    others: nn.Module | Iterable[nn.Parameter] = (),
) -> Synced:
    """Bring an optimizer up to date with a model that lost channels or layers, however often since the last time.

    What the optimizer keeps of a parameter (momentum, the moments of Adam, the rows and columns of Adafactor) loses the
    entries that the parameter lost; everything else of it stays, the number of steps too. Parameters that left the
    model are dropped with their state. Trainable ones that are new in it join the group of their nearest neighbour in
    the model that is in a group, and has as many dimensions as they where there is one: biases and norms stay without
    weight decay. Groups keep their settings and their number, so that schedulers go on. In a model that only lost
    channels no parameter is new: what the optimizer does not hold was left out of it, or is another one's.

    Args:
        optimizer: Any optimizer whose state is numbers and tensors by parameter.
        net: The model that training goes on with.
        before: The model that the optimizer was made for, where `net` is a copy (`copy=True`): parameters are then
            known by their names. Without it they are those of `net` (`copy=False`), and all others of the optimizer
            are taken for such as left the model.
        others: What the optimizer trains besides the model: a module, or parameters. They stay as they are.

    Returns:
        What was done.

    Raises:
        EditError: The optimizer holds nothing of the model, or keeps something of a parameter whose shape the model's
            history does not explain. The optimizer has not changed.

    Example:
        >>> import torchtrim as tt
        >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> net(x).sum().backward(); optimizer.step()
        >>> net = tt.delete_channels(net, x, "0", [1], copy=False)
        >>> print(sync_optimizer(optimizer, net))
        optimizer: state of 3 parameters narrowed; 0 dropped
        >>> optimizer.state[net[0].weight]["momentum_buffer"].shape
        torch.Size([2, 4])
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # of accelerate's wrapper
    if not isinstance(inner, torch.optim.Optimizer):
        raise EditError("not an optimizer", path="optimizer", found=type(optimizer).__name__)
    net, before = unwrap(net), None if before is None else unwrap(before)
    aside = set(others.parameters() if isinstance(others, nn.Module) else others)
    for each in aside:
        if not isinstance(each, nn.Parameter):
            raise EditError("not a parameter", path="others", found=repr(each), expected="a module, or parameters")
    plan = _Plan.of(inner, net, before, aside)
    states = {new: plan.state(inner.state[old], new) for old, new in plan.goes_on.items() if inner.state.get(old)}
    # Nothing below can fail.
    for old in plan.goes_on.keys() | plan.dropped:
        inner.state.pop(old, None)
    for new, state in states.items():
        inner.state[new] = state
    for number, group in enumerate(inner.param_groups):
        _rewrite(group, plan, [(plan.names[new][0], new) for new, joined in plan.added.items() if joined == number])
    sliced = tuple(plan.names[new][0] for new in states if new in plan.narrower)
    return Synced(sliced, len(plan.dropped), {plan.names[new][0]: group for new, group in plan.added.items()})


@dataclass(eq=False)
class _Plan:
    """What goes where.

    Attributes:
        names: All names of each parameter of the model.
        goes_on: For each parameter of the optimizer that is still trained, the one it is now.
        dropped: Those of the optimizer that are not.
        added: For each new parameter the number of its group.
        history: What each tensor lost, oldest first.
        narrower: The parameters of which some state was narrowed.
    """

    names: dict[nn.Parameter, list[str]]
    goes_on: dict[nn.Parameter, nn.Parameter]
    dropped: set[nn.Parameter]
    added: dict[nn.Parameter, int]
    history: list[Any]
    narrower: set[nn.Parameter]

    @staticmethod
    def of(
        optimizer: torch.optim.Optimizer, net: nn.Module, before: nn.Module | None, aside: set[nn.Parameter]
    ) -> _Plan:
        names: dict[nn.Parameter, list[str]] = {}
        for name, parameter in net.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        plan = _Plan(
            names, {}, set(), {}, losses(net, len(history(before).entries) if before is not None else 0), set()
        )
        if before is None:
            now = {parameter: parameter for parameter in names}
        else:
            by_name = {name: parameter for parameter, several in names.items() for name in several}
            now = {old: by_name[name] for name, old in before.named_parameters() if name in by_name}
            now = {old: new for old, new in now.items() if plan.chain(new, tuple(old.shape)) is not None}
        plan.goes_on = {old: now[old] for old in held if old in now} | {old: old for old in held if old in aside}
        plan.dropped = {old for old in held if old not in plan.goes_on}
        if not plan.goes_on.keys() - aside:
            raise EditError(
                "the optimizer holds none of the model's parameters",
                found=f"{len(held)} parameters of another model",
                hint="before=, the model that the optimizer was made for, where the edited one is a copy",
            )
        if before is not None:
            plan._add(optimizer, set(now.values()))
        elif not all(hasattr(edit, "narrowed") for edit in history(net).edits):
            plan._add(optimizer, set(plan.goes_on.values()))
        return plan

    def _add(self, optimizer: torch.optim.Optimizer, known: set[nn.Parameter]) -> None:
        """Find groups for the parameters that are new in the model."""
        group_of = {
            self.goes_on[old]: number
            for number, group in enumerate(optimizer.param_groups)
            for old in group["params"]
            if old in self.goes_on
        }
        order = list(self.names)
        for place, parameter in enumerate(order):
            if parameter in known or parameter in group_of or not parameter.requires_grad:
                continue
            others = [(abs(at - place), at, each) for at, each in enumerate(order) if each in group_of]
            alike = [other for other in others if (other[2].dim() > 1) == (parameter.dim() > 1)]
            self.added[parameter] = group_of[min(alike or others)[2]]

    def lost(self, parameter: nn.Parameter) -> list[Removed]:
        """What a parameter lost each time, oldest first."""
        several = self.names.get(parameter, [])
        found = (next((step[name] for name in several if name in step), None) for step in self.history)
        return [removed for removed in found if removed]

    def chain(self, parameter: nn.Parameter, shape: tuple[int, ...]) -> list[Removed] | None:
        """What something of such a shape has to lose to fit a parameter; `None` where the history does not say."""
        lost = self.lost(parameter)
        for back, before in enumerate(shapes_before(parameter.shape, lost)):
            if len(shape) == len(before) and all(size in (1, full) for size, full in zip(shape, before, strict=True)):
                return lost[len(lost) - back :]
        return None

    def state(self, state: dict[str, Any], parameter: nn.Parameter) -> dict[str, Any]:
        """What an optimizer keeps of a parameter, narrowed.

        Raises:
            EditError: It cannot be told how.
        """
        found: dict[str, Any] = {}
        for key, value in state.items():
            if isinstance(value, (list, tuple, dict)) and value:
                raise self._unknown(parameter, key, f"a {type(value).__name__}")
            if not isinstance(value, torch.Tensor) or (value.numel() == 1 and value.dim() != parameter.dim()):
                found[key] = value
                continue
            steps = self.chain(parameter, tuple(value.shape))
            if steps is None:
                raise self._unknown(parameter, key, list(value.shape))
            for removed in steps:
                value = taken(value, removed)
                self.narrower.add(parameter)
            found[key] = value if value.numel() == 1 else value.to(parameter.device)
        return found

    def _unknown(self, parameter: nn.Parameter, key: str, found: object) -> EditError:
        return EditError(
            f"the optimizer keeps {key!r} of it, and the model's history does not say what becomes of that",
            path=self.names.get(parameter, ["a parameter"])[0],
            found=found,
            expected=" or ".join(str(list(shape)) for shape in shapes_before(parameter.shape, self.lost(parameter))),
            hint="a fresh optimizer for the edited model",
        )


def _rewrite(group: dict[str, Any], plan: _Plan, joining: list[tuple[str, nn.Parameter]]) -> None:
    """Change the parameters of a group, and their names where it has those."""
    stays = [old in plan.goes_on for old in group["params"]]
    if "param_names" in group:
        kept = [name for name, stay in zip(group["param_names"], stays, strict=True) if stay]
        group["param_names"] = kept + [name for name, _ in joining]
    params = [plan.goes_on[old] for old, stay in zip(group["params"], stays, strict=True) if stay]
    group["params"] = params + [new for _, new in joining]
