"""`SparsityPenalty`: training that makes whole channels small, so that less is lost when they are pruned."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
from torch import nn

from torchtrim.channels.follow import follow
from torchtrim.channels.groups import dependencies
from torchtrim.edits.budget import plain_number
from torchtrim.errors import EditError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import What, spelled
from torchtrim.graph.reader import inputs_for

Kind = Literal["group_lasso", "bn_scale"]
_KINDS = ("group_lasso", "bn_scale")
_TINY = 1e-12  # under the root, which has no slope at zero


class SparsityPenalty:
    """A penalty on channels, by what goes together when they are pruned: one line in a training loop.

    `loss = criterion(net(x), y) + penalty()` counts it with the loss; or, after `loss.backward()`,
    `penalty.add_gradients()` adds its gradients to those there are, for mixed precision and accumulated gradients.

    A unit is the smallest set of channels that can only go together. `"group_lasso"` sums up, for every unit, the
    length of the vector of all weights, scales and biases that make, hold and read it, times the root of how many they
    are (group lasso, Yuan and Lin 2006; for channels, Wen et al. 2016; for what goes together, DepGraph, Fang et al.
    2023). `"bn_scale"` sums up the absolute scales of the batch norms that units go through (network slimming, Liu et
    al. 2017); rank by `importance="bn_scale"` afterwards.

    The model may be pruned in place in the meantime: the units are worked out anew then.

    Args:
        model: The model that is trained.
        example_inputs: As for `cut`.
        kind: `"group_lasso"` or `"bn_scale"`.
        strength: What the sum is multiplied by. It grows with the model; 1e-5 to 1e-3 are usual for `"bn_scale"`, and
            a hundredth to a tenth of that for `"group_lasso"`. Five epochs of ResNet-56 on CIFAR-10 took 1e-4 without
            harm and were ruined by 5e-4 (`benchmarks/prune_cifar.py`).
        protect: Modules whose channels are left out, with all in them: paths, globs, types, predicates.

    Raises:
        EditError: No such kind, or nothing in the model that it applies to.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.randn(8, 4)
        >>> penalty = SparsityPenalty(net, x, strength=0.1)
        >>> loss = net(x).square().mean() + penalty()
        >>> loss.backward()
        >>> [name for name, each in penalty.lengths().items() if (each > 0).all()]
        ['0']
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: ExampleInputs | None = None,
        kind: Kind = "group_lasso",
        *,
        strength: float = 1e-5,
        protect: What | Iterable[What] = (),
    ) -> None:
        if kind not in _KINDS:
            raise EditError("no such kind of penalty", path="kind", found=kind, expected=" or ".join(_KINDS))
        number = plain_number(strength)
        if number is None or not 0 <= number < math.inf:
            raise EditError("a strength is a number from 0 up", path="strength", found=repr(strength))
        self.model = unwrap(model)
        self.kind = kind
        self.strength = number
        self._inputs = inputs_for(self.model, example_inputs)
        self._protect = spelled(self.model, protect)
        self._read()

    def __call__(self) -> torch.Tensor:
        """The penalty, a number that gradients flow from."""
        self._refresh()
        if self.kind == "bn_scale":
            return self.strength * torch.stack([part.sum() for part in self._scales()]).sum()
        lengths = self._lengths()
        return self.strength * (lengths * self._roots).sum()

    def add_gradients(self) -> float:
        """Add the gradients of the penalty to those of the parameters; returns the penalty."""
        with torch.enable_grad():
            penalty = self()
        held = list(dict.fromkeys(parameter for parameter, *_ in self._parts if parameter.requires_grad))
        gradients = (
            torch.autograd.grad(penalty, held, allow_unused=True) if penalty.requires_grad else [None] * len(held)
        )
        for parameter, gradient in zip(held, gradients, strict=True):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad + gradient
        return float(penalty.detach())

    @torch.no_grad()
    def lengths(self) -> dict[str, torch.Tensor]:
        """How large each unit is now, by the path of the layer that makes it: what pruning would rank."""
        self._refresh()
        found = self._lengths()
        return {name: found[units.to(found.device)] for name, units in self._units.items()}

    def _read(self) -> None:
        """Work out the units, and where in each parameter they are."""
        found = dependencies(self.model, follow(self.model, self._inputs), protect=self._protect)
        self._count = found.count
        self._units = {group.name: torch.as_tensor(group.units) for group in found.groups}
        parameters = dict(self.model.named_parameters())
        self._parts: list[tuple[nn.Parameter, tuple[int, ...], torch.Tensor]] = []
        entries = np.zeros(self._count)
        done: set[tuple[str, bytes]] = set()
        for member in (each for group in found.groups for each in group.members):
            parameter = parameters.get(member.path)
            key = member.path, member.units.tobytes()
            if parameter is None or not parameter.is_floating_point() or key in done or not self._counts(member.path):
                continue
            done.add(key)
            summed = tuple(axis for axis, size in enumerate(member.units.shape) if size == 1 < parameter.shape[axis])
            index = torch.as_tensor(np.where(member.units < 0, self._count, member.units).reshape(-1))
            self._parts.append((parameter, summed, index))
            each = parameter.numel() // max(index.numel(), 1)
            np.add.at(entries, index[index < self._count].numpy(), each)
        if not self._parts:
            raise EditError(
                "there is nothing in the model for this penalty",
                path=self.kind,
                found=type(self.model).__name__,
                expected="batch norms with scales" if self.kind == "bn_scale" else "channels that can go",
            )
        self._roots = torch.as_tensor(np.sqrt(entries), dtype=torch.float32)
        self._shapes = [tuple(parameter.shape) for parameter, *_ in self._parts]

    def _counts(self, path: str) -> bool:
        """Whether a parameter plays a part."""
        if self.kind == "group_lasso":
            return True
        owner, _, name = path.rpartition(".")
        return name == "weight" and isinstance(self.model.get_submodule(owner), nn.modules.batchnorm._BatchNorm)

    @torch.inference_mode(False)  # what is kept here goes into later backward passes
    @torch.no_grad()
    def _refresh(self) -> None:
        if [tuple(parameter.shape) for parameter, *_ in self._parts] != self._shapes:
            self._read()
        # Once, and not in every step: copies to a GPU wait for it, and cannot be captured in a CUDA graph.
        home = self._parts[0][0].device
        if self._roots.device != home:
            self._roots = self._roots.to(home)
            self._parts = [(parameter, summed, index.to(home)) for parameter, summed, index in self._parts]

    def _scales(self) -> list[torch.Tensor]:
        return [
            parameter.flatten().abs().where((index < self._count).to(parameter.device), 0.0).to(self._roots.device)
            for parameter, _, index in self._parts
        ]

    def _lengths(self) -> torch.Tensor:
        """The length of each unit's vector, `(units,)`."""
        total = torch.zeros(self._count + 1, device=self._roots.device)
        for parameter, summed, index in self._parts:
            squares = parameter.float().square()
            squares = squares.sum(summed) if summed else squares
            total = total.index_add(0, index, squares.flatten().to(total.device))
        return (total[:-1] + _TINY).sqrt()
