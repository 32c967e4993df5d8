"""What feeds what between some modules of a model, seen by running it: any model, whatever its forward looks like."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.edits.calls import run_copy
from torchtrim.graph.inputs import Inputs


@dataclass
class Neighbours:
    """What the tracked modules were given and what used their outputs, over all calls, in both modes.

    Attributes:
        sources: For each path that was called, the paths of the tracked modules whose output it was given; `None` among
            them for anything else.
        users: For each, what used its output: paths of tracked modules, `"output"` for the model's, names of operators.
        shapes: The shape of the first tensor that each was given, and of what it returned.
    """

    sources: dict[str, set[str | None]] = field(default_factory=dict)
    users: dict[str, set[str]] = field(default_factory=dict)
    shapes: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=dict)


def neighbours(model: nn.Module, inputs: Inputs, tracked: Callable[[nn.Module], bool]) -> Neighbours:
    """Run a copy of the model in both modes and see which tracked modules follow on one another.

    Args:
        model: The model. It is left as it was.
        inputs: Example inputs.
        tracked: Which modules; those that take one tensor and return one.

    Raises:
        EditError: The model does not run on the inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> found = neighbours(net, Inputs.of(torch.zeros(1, 2)), lambda module: isinstance(module, nn.Linear))
        >>> sorted(found.users["0"]), found.users["2"]
        (['relu.default'], {'output'})
    """
    found = Neighbours()
    for training in (False, True):
        runs: list[_Follow] = []

        def watch(twin: nn.Module, runs: list[_Follow] = runs) -> None:
            runs.append(_Follow(twin, tracked))

        run_copy(model, inputs.with_batch(max(inputs.batch, 2)), training, watch)
        last = runs[-1].found
        for path in last.sources:
            found.sources.setdefault(path, set()).update(last.sources[path])
            found.users.setdefault(path, set()).update(last.users[path])
            found.shapes.setdefault(path, last.shapes[path])
    return found


class _Follow(TorchDispatchMode):
    """Hooks on tracked modules, and every operator that is given one of their outputs outside of them."""

    def __init__(self, twin: nn.Module, tracked: Callable[[nn.Module], bool]) -> None:
        TorchDispatchMode.__init__(self)
        self.found = Neighbours()
        self.made: dict[int, tuple[torch.Tensor, str]] = {}  # the tensors are held, so that no other gets their id
        self.inside: list[set[int]] = []
        twin.register_forward_pre_hook(self._start, prepend=True)
        twin.register_forward_hook(lambda _module, _args, output: self._end(output), always_call=True)
        for path, module in twin.named_modules():
            if tracked(module):
                module.register_forward_pre_hook(self._begin(path))
                module.register_forward_hook(self._leave(path))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        asks_only = str(func).startswith("prim.")  # for its device, not for its values
        for tensor in () if asks_only else pytree.tree_leaves((args, kwargs or {})):
            if id(tensor) in self.made and not any(id(tensor) in given for given in self.inside):
                self._use(tensor, str(func).removeprefix("aten."))
        return func(*args, **(kwargs or {}))

    def _start(self, _module: nn.Module, _args: Any) -> None:
        TorchDispatchMode.__enter__(self)

    def _begin(self, path: str) -> Any:
        def begin(_module: nn.Module, args: Any) -> None:
            given = args[0] if args and isinstance(args[0], torch.Tensor) else None
            source = self.made.get(id(given))
            self.found.sources.setdefault(path, set()).add(None if source is None else source[1])
            self.found.users.setdefault(path, set())
            self.found.shapes[path] = (() if given is None else tuple(given.shape), ())
            if source is not None:
                self._use(given, path)
            self.inside.append({id(given)})

        return begin

    def _leave(self, path: str) -> Any:
        def leave(_module: nn.Module, _args: Any, output: Any) -> None:
            self.inside.pop()
            if isinstance(output, torch.Tensor):
                self.made[id(output)] = (output, path)
                self.found.shapes[path] = (self.found.shapes[path][0], tuple(output.shape))

        return leave

    def _use(self, tensor: Any, user: str) -> None:
        self.found.users[self.made[id(tensor)][1]].add(user)

    def _end(self, output: Any) -> None:
        TorchDispatchMode.__exit__(self, None, None, None)
        for tensor in pytree.tree_leaves(output):
            if id(tensor) in self.made:
                self._use(tensor, "output")
