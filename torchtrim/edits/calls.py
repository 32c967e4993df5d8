"""Run a copy of a model and watch it: who calls what."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from torchtrim.errors import EditError
from torchtrim.graph.copying import has_function_hooks, kept_random_state, structural_copy
from torchtrim.graph.execution import no_fused_attention
from torchtrim.graph.fakes import Fakes
from torchtrim.graph.inputs import Inputs

_LEAVES = (type(None), bool, int, float, str, bytes, torch.Tensor, type, FunctionType, ModuleType, fx.Graph, fx.Node)


@dataclass(frozen=True)
class Caller:
    """One call of a module in a forward.

    Attributes:
        owner: The path of the module whose forward makes it.
        run: Which run of that forward makes it.
        position: Which of the calls of the module in that run it is.
    """

    owner: str
    run: int
    position: int


class Runs:
    """What runs of a model show: who calls what, and with what. Each run is made once, when it is first asked for.

    The model must stay as it is meanwhile.

    Attributes:
        fake: The mode that the values belong to.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        self.fake = Fakes()
        self._model = model
        self._inputs = inputs
        self._runs: dict[tuple[bool, int], _Run] = {}

    def callers(self, path: str, training: bool) -> list[Caller]:
        """Who calls a module in one mode, in the order of execution.

        Raises:
            EditError: The model does not run on the inputs.
        """
        run = self._run(training, max(self._inputs.batch, 2))
        return [made.caller for made in run.of(self._model, path) if made.caller is not None]

    def given(self, path: str, training: bool, batch: int) -> list[Any]:
        """The `(args, kwargs)` of each call of a module at a batch size, as fake tensors.

        Raises:
            EditError: The model does not run on the inputs.
        """
        return [made.given for made in self._run(training, batch).of(self._model, path)]

    def took_user_hooks(self, training: bool, batch: int) -> bool:
        """Whether the hooks that are plain functions ran too."""
        return self._run(training, batch).user_hooks

    def faked(self, value: Any) -> Any:
        """Arguments with fake tensors for real ones."""
        return pytree.tree_map_only(torch.Tensor, self._fake_tensor, value)

    def _fake_tensor(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if isinstance(tensor, FakeTensor) else self.fake.from_tensor(tensor.detach())

    def _run(self, training: bool, batch: int) -> _Run:
        if (training, batch) not in self._runs:
            run = _Run()
            inputs = self._inputs.with_batch(batch)

            def watch(twin: nn.Module) -> None:
                run.calls.clear()
                _watch(twin, lambda path, caller, given: run.add(path, caller, self.faked(given)))

            run.user_hooks = run_copy(self._model, inputs, training, watch, self.fake)
            self._runs[training, batch] = run
        return self._runs[training, batch]


@dataclass(frozen=True)
class _Call:
    caller: Caller | None
    given: Any


@dataclass
class _Run:
    """The calls of one run, by the first path of what is called."""

    calls: dict[str, list[_Call]] = field(default_factory=dict)
    user_hooks: bool = False

    def add(self, path: str, caller: Caller | None, given: Any) -> None:
        self.calls.setdefault(path, []).append(_Call(caller, given))

    def of(self, model: nn.Module, path: str) -> list[_Call]:
        module = model.get_submodule(path)
        return self.calls.get(next(name for name, each in model.named_modules() if each is module), [])


def callers(model: nn.Module, inputs: Inputs, path: str, training: bool) -> list[Caller]:
    """Who calls a module in one mode, in the order of execution.

    Raises:
        EditError: The model does not run on the inputs.
    """
    found: list[Caller] = []

    def watch(twin: nn.Module) -> None:
        found.clear()
        name = next(name for name, each in twin.named_modules() if each is twin.get_submodule(path))
        _watch(twin, lambda called, caller, _: found.append(caller) if called == name and caller else None)

    run_copy(model, inputs.with_batch(max(inputs.batch, 2)), training, watch)
    return found


def called_past_name(model: nn.Module, inputs: Inputs, path: str) -> bool:
    """Whether something would go on calling a module if another had its names.

    Raises:
        EditError: The model does not run on the inputs.
    """
    trial = structural_copy(model)
    old = trial.get_submodule(path)
    stand_in = structural_copy(old)
    for module in list(trial.modules()):
        for name in [name for name, child in module._modules.items() if child is old]:
            module._modules[name] = stand_in
    return any(
        callers(trial, inputs, path, training) != callers(model, inputs, path, training) for training in (False, True)
    )


def held_plainly(model: nn.Module) -> set[nn.Module]:
    """The modules that some module in a model refers to besides its children: in a list, a dict, a bound method."""
    return {
        each
        for module in model.modules()
        for name, value in module.__dict__.items()
        for each in modules_in(name, value)
    }


def modules_in(name: str, value: Any) -> set[nn.Module]:
    """The modules in an attribute that is not the dict of children."""
    found: set[nn.Module] = set()
    seen: set[int] = set()
    stack = [] if name == "_modules" else [value]
    while stack:
        one = stack.pop()
        if isinstance(one, nn.Module):
            found.add(one)
        elif isinstance(one, _LEAVES) or id(one) in seen:
            continue
        elif isinstance(one, (list, tuple, set, frozenset)):
            stack += one
        elif isinstance(one, dict):
            stack += one.values()
        elif isinstance(one, MethodType):
            stack.append(one.__self__)
        elif isinstance(one, partial):
            stack += [one.func, one.args, one.keywords]
        elif hasattr(one, "__dict__"):
            stack += vars(one).values()
        seen.add(id(one))
    return found


def run_copy(
    model: nn.Module,
    inputs: Inputs,
    training: bool,
    watch: Callable[[nn.Module], AbstractContextManager[Any] | None],
    fake: Fakes | None = None,
) -> bool:
    """Run a copy of a model once, on shapes alone where that is possible; returns whether it took the users' hooks.

    Args:
        model: The model. It is left as it was.
        inputs: What to run it on.
        training: In which mode.
        watch: Called with the copy before it runs, to put hooks on it; again, where another try is needed. It may
            return what to run it under.
        fake: The mode that the shapes belong to.

    Raises:
        EditError: The model does not run.
    """
    fake = fake or Fakes()
    with_hooks = (False, True) if has_function_hooks(model) else (False,)
    # A forward that depends on values has to be run; one of the user's hooks may change a shape.
    ways = [(shapes_only, hooks) for hooks in with_hooks for shapes_only in (True, False)]
    for shapes_only, hooks in ways[:-1]:
        with suppress(Exception):
            _run_once(model, inputs, training, watch, fake if shapes_only else None, hooks)
            return hooks
    try:
        _run_once(model, inputs, training, watch, None, ways[-1][1])
    except Exception as error:
        reason = f"the model does not run on the example inputs: {error}"
        raise EditError(reason, found=inputs.describe()) from error
    return ways[-1][1]


def _run_once(
    model: nn.Module,
    inputs: Inputs,
    training: bool,
    watch: Callable[[nn.Module], AbstractContextManager[Any] | None],
    fake: Fakes | None,
    user_hooks: bool,
) -> None:
    if fake is None:
        twin = structural_copy(model, own_buffers=True, user_hooks=user_hooks)
    else:
        twin = structural_copy(model, user_hooks=user_hooks, stand_ins=_fakes_of(model, fake))
    twin.train(training)
    around = watch(twin) or nullcontext()
    given = inputs.fresh() if fake is None else inputs.map(lambda tensor: fake.from_tensor(tensor.detach()))
    with kept_random_state(), torch.no_grad(), no_fused_attention(), nullcontext() if fake is None else fake, around:
        given.call(twin)


def _fakes_of(model: nn.Module, fake: Fakes) -> dict[int, torch.Tensor]:
    """Fake tensors for the weights: torch remembers what operators make of these, not of real ones."""
    return {
        id(tensor): fake.from_tensor(tensor)
        for tensor in (*model.parameters(), *model.buffers())
        if type(tensor) in (torch.Tensor, nn.Parameter) and not tensor.is_meta
    }


def _watch(twin: nn.Module, note: Callable[[str, Caller | None, Any], Any]) -> None:
    """Note each call in a model that is about to run: the first path of what is called, who calls, and with what."""
    stack: list[tuple[str, int]] = []
    runs: dict[str, int] = {}
    positions: dict[tuple[tuple[str, int], str], int] = {}

    def enter(name: str, given: Any) -> None:
        caller = None
        if stack:
            at = stack[-1], name
            position = positions[at] = positions.get(at, -1) + 1
            caller = Caller(*stack[-1], position)
        note(name, caller, given)
        runs[name] = runs.get(name, -1) + 1
        stack.append((name, runs[name]))

    def leave(name: str) -> None:
        while stack.pop()[0] != name:
            continue  # left by an exception that a forward caught

    for name, module in twin.named_modules():
        module.register_forward_pre_hook(
            lambda _module, args, kwargs, name=name: enter(name, (args, kwargs)), with_kwargs=True
        )
        module.register_forward_hook(lambda *_, name=name: leave(name))
