"""What flows through calls of modules: the values before and behind each, and whether others need them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.edits.calls import run_copy
from torchtrim.errors import EditError
from torchtrim.graph.check import flatten
from torchtrim.graph.handing_on import Form, described
from torchtrim.graph.inputs import Inputs

__all__ = ["Form", "Key", "Seen", "observe"]

Key = tuple[str, int]  # a module's first path, and which of its calls


@dataclass(eq=False)
class Seen:
    """One call of a module that was watched.

    Attributes:
        key: The module's path, and which of its calls it is.
        owner: The path of the module that calls it.
        run: Which run of that module's forward.
        value: The main value that goes in: the first tensor of real numbers.
        result: The main value that comes out.
        form: How they go in and out.
        uses: Within which calls the result is worked on, each from the outermost inwards; of one tensor all, also
            those before this call, where the call hands on what it got.
        since: How many of them were before this call returned.
        returned: Whether it is part of the model's output.
    """

    key: Key
    owner: str
    run: int
    value: torch.Tensor
    result: torch.Tensor
    form: Form
    uses: list[tuple[Key, ...]] = field(default_factory=list)
    since: int = 0
    returned: bool = False

    @property
    def needed(self) -> bool:
        """Whether something depends on the shape of the result."""
        return len(self.uses) > self.since

    def feeds_only(self, other: Seen) -> bool:
        """Whether the other call takes the result as its main value, and nothing else looks at it."""
        if other.value is not self.result or other is self:
            return False
        passed_through = other.result is self.result
        return passed_through or (not self.returned and all(other.key in stack for stack in self.uses[self.since :]))


def observe(model: nn.Module, inputs: Inputs, training: bool, paths: set[str]) -> list[Seen]:
    """Run a copy of a model in one mode and note every call of the modules at `paths` (first names), in order.

    Raises:
        EditError: The model does not run, or one of the modules has no value to hand on.
    """
    batch = max(inputs.batch, 2)
    watch: _Watch | None = None

    def start(twin: nn.Module) -> AbstractContextManager[Any]:
        nonlocal watch
        watch = _Watch(twin, paths)
        return watch

    run_copy(model, inputs.with_batch(batch), training, start)
    if watch is None:
        return []
    if watch.refused is not None:
        raise watch.refused
    return watch.seen


class _Watch(TorchDispatchMode):
    def __init__(self, twin: nn.Module, paths: set[str]) -> None:
        TorchDispatchMode.__init__(self)
        self.seen: list[Seen] = []
        self.refused: EditError | None = None
        self.paths = paths
        self.stack: list[Key] = []
        self.given: list[tuple[Any, Any]] = []
        self.count: dict[str, int] = {}
        self.uses: dict[int, list[tuple[Key, ...]]] = {}
        for path, module in twin.named_modules():
            module.register_forward_pre_hook(self._enter(path), with_kwargs=True)
            module.register_forward_hook(self._leave(path))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        asks_only = str(func).startswith("prim.")  # for a device, not for the values
        for leaf in () if asks_only else pytree.tree_leaves((args, kwargs)):
            if id(leaf) in self.uses:
                self.uses[id(leaf)].append(tuple(self.stack))
        return func(*args, **(kwargs or {}))

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.count[path] = self.count.get(path, -1) + 1
            self.stack.append((path, self.count[path]))
            self.given.append((args, kwargs))

        return enter

    def _leave(self, path: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            while True:
                key, given = self.stack.pop(), self.given.pop()
                if key[0] == path:
                    break  # those above were left by an exception that a forward caught
            if path in self.paths:
                owner, run = self.stack[-1] if self.stack else ("", 0)
                self._note(key, owner, run, given, output)
            if path == "":
                returned = {id(value) for value in flatten(output).values()}
                for seen in self.seen:
                    seen.returned = id(seen.result) in returned

        return leave

    def _note(self, key: Key, owner: str, run: int, given: tuple[Any, Any], output: Any) -> None:
        try:
            value, result, form = described(key[0], *given, output)
        except EditError as error:
            self.refused = self.refused or error
            return
        uses = self.uses.setdefault(id(result), [])
        self.seen.append(Seen(key, owner, run, value, result, form, uses, len(uses)))
