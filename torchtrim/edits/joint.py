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
from torchtrim.graph.inputs import Inputs

Key = tuple[str, int]  # a module's first path, and which of its calls


@dataclass(frozen=True)
class Form:
    """How a module takes its main value, and in what form it gives one back: the arguments of a `PassOn`.

    Attributes:
        argument: The argument that is, or holds, the main value: a position or a name.
        item: Its place in that argument, where that is a list.
        form: `"value"`, `"tuple"` or `"list"`.
        outputs: What such a tuple holds: `"value"`, `"none"`, or another argument (`"=1"`, `"=mask"`).
        alone: Whether the value is the only argument, so that an `nn.Identity` will do.
    """

    argument: int | str = 0
    item: int | None = None
    form: str = "value"
    outputs: tuple[str, ...] = ()
    alone: bool = True

    @property
    def plain(self) -> bool:
        """Whether an `nn.Identity` does it."""
        return self.alone and self.argument == 0 and self.item is None and self.form == "value"


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
            value, result, form = _described(key[0], *given, output)
        except EditError as error:
            self.refused = self.refused or error
            return
        uses = self.uses.setdefault(id(result), [])
        self.seen.append(Seen(key, owner, run, value, result, form, uses, len(uses)))


def _described(path: str, args: Any, kwargs: Any, output: Any) -> tuple[torch.Tensor, torch.Tensor, Form]:
    """The main values of a call, and its form."""
    named: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    candidates: list[tuple[int | str, int | None, torch.Tensor]] = []
    for name, argument in named:
        if _is_value(argument):
            candidates.append((name, None, argument))
        elif isinstance(argument, (list, tuple)):
            candidates += [(name, index, item) for index, item in enumerate(argument) if _is_value(item)]
    if not candidates:
        shapes = [
            f"{str(leaf.dtype)[6:]}{list(leaf.shape)}" for leaf in flatten((args, kwargs)).values() if _is_tensor(leaf)
        ]
        raise EditError(
            "nothing that goes in can stand for what comes out",
            path=path,
            found=", ".join(shapes) or "no tensor",
            expected="a tensor of real numbers",
            hint="tt.replace, with a module that makes the value",
        )
    argument, item, value = candidates[0]
    alone = len(named) == 1
    if _is_value(output):
        return value, output, Form(argument, item, alone=alone)
    kind = type(output).__name__
    results = [one for one in output if _is_value(one)] if type(output) in (tuple, list) else []
    if not results:
        raise EditError(
            "what it returns cannot be put together from what it is given",
            path=path,
            found=kind,
            expected="a tensor, or a tuple or list of tensors",
            hint="remove modules inside it",
        )
    outputs = tuple(
        "value" if one is results[0] else _stand_in(path, index, one, named) for index, one in enumerate(output)
    )
    return value, results[0], Form(argument, item, kind, outputs, alone)


def _stand_in(path: str, index: int, output: Any, named: list[tuple[int | str, Any]]) -> str:
    """Which argument can stand for a further output."""
    if output is None:
        return "none"
    alike = [name for name, argument in named if argument is output]
    alike += [name for name, argument in named if name == index and _alike(argument, output)]
    if not alike:
        found = f"{type(output).__name__}{list(output.shape)}" if _is_tensor(output) else repr(output)
        raise EditError(
            f"nothing that goes in can stand for its output number {index}",
            path=path,
            found=found,
            hint="remove modules inside it, or tt.replace it",
        )
    return f"={alike[0]}"


def _alike(one: Any, other: Any) -> bool:
    if _is_tensor(one) and _is_tensor(other):
        return bool(one.shape == other.shape and one.dtype == other.dtype)
    return type(one) is type(other) and isinstance(one, (int, float, str, bool)) and one == other


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_value(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
