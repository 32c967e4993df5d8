"""Is the model right without what was taken out? Compared with the original, in which hooks stand in for it.

The hooks know nothing of how the calls were taken out: they let the whole original run and, where a run of removed
calls ends, put what went into its first call in place of what the last gave.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.edits.calls import run_copy
from torchtrim.edits.joint import Key
from torchtrim.edits.layer_numbers import layer_numbers, without_caches
from torchtrim.edits.remove_place import Taken, take_out
from torchtrim.edits.remove_runs import Run
from torchtrim.edits.rewire import Room
from torchtrim.edits.work import Work
from torchtrim.errors import CheckFailed, EditError
from torchtrim.graph.check import Mismatch, Side, compare
from torchtrim.graph.copying import structural_copy
from torchtrim.graph.handing_on import in_form, main_value
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.reader import join
from torchtrim.graph.watch import Value, values_of


class Reference:
    """The original with hooks in place of what goes.

    Args:
        before: The model before the edit. It is left as it was.
        inputs: The example inputs.
        runs: What goes.
        adapters: What values go through, by the address of a run.
        weights: Parameters with other values, by name.
        rooms: Modules that were read already.
    """

    def __init__(
        self,
        before: nn.Module,
        inputs: Inputs,
        runs: Sequence[Run],
        adapters: Mapping[str, nn.Module],
        weights: Mapping[str, nn.Parameter],
        rooms: dict[str, Room],
    ) -> None:
        self.before = before
        self.rooms = rooms
        self.inputs = inputs
        self.functional = [run for run in runs if run.functional]
        self.runs = [run for run in runs if not run.functional]
        self.paths = sorted({call.key[0] for run in runs for call in run.calls if call.module is not None})
        work = Work(structural_copy(before), inputs)
        if self.functional:
            taken = [Taken(call.address, "opened", True, call.form) for run in self.functional for call in run.calls]
            take_out(work, taken, adapters, rooms)
        self.model = work.model
        assign(self.model, weights)
        self.adapters: dict[str, str] = {}
        there = {path for path, _ in self.model.named_modules(remove_duplicate=False)}
        for run in self.runs:
            if run.first.key[0] not in there:
                raise EditError(
                    "nothing needs it any more once the others are taken out",
                    path=run.address,
                    hint="leave it out: it goes with them",
                )
            if run.address in adapters and run.address not in self.adapters:
                host = _host(self.model, run.first.key[0])
                name = self.adapters[run.address] = join(host, f"adapter_of_the_check_{len(self.adapters)}")
                self.model.get_submodule(host).add_module(name.rpartition(".")[2], adapters[run.address])

    def same_way(self, net: nn.Module, taken: Sequence[Taken]) -> None:
        """Run both on shapes, in both modes: the same modules are called in the same order, with the same results.

        Raises:
            EditError: They are not, or the model does not run.
        """
        for training in (False, True):
            expected = self._trail(self.model, training, self._hooked)
            found = self._trail(net, training, lambda twin: _calm(twin, taken))
            if found[1] != expected[1]:
                raise EditError(
                    "the model returns something else",
                    found=", ".join(map(str, found[1])),
                    expected=", ".join(map(str, expected[1])),
                )
            if found[0] != expected[0]:
                one, other = next(
                    pair
                    for pair in zip([*found[0], "nothing"], [*expected[0], "nothing"], strict=False)
                    if pair[0] != pair[1]
                )
                raise EditError("the forward takes another way", found=f"it calls {one}", expected=f"{other}")

    def compared(self, net: nn.Module, taken: Sequence[Taken]) -> tuple[str, ...]:
        """Compare the values; returns what was checked.

        Raises:
            Mismatch: They differ.
        """

        removed = {call.key for run in self.runs for call in run.calls}
        again = removed if any("#" in each.address for each in taken) else None

        fewer = layer_numbers(self.model) != layer_numbers(net)  # then a cache has fewer layers, too

        def answer(output: Any) -> Any:
            return without_caches(output) if fewer else output

        def reference(module: nn.Module, inputs: Inputs) -> Any:
            with self._hooked(module), _numbered_anew(module, again, there=True):
                return answer(inputs.call(module))

        def candidate(module: nn.Module, inputs: Inputs) -> Any:
            with _calm(module, taken), _numbered_anew(module, again, there=False):
                return answer(inputs.call(module))

        return compare(Side(self.model, reference), Side(net, candidate), self.inputs)

    def opened_alike(self) -> None:
        """The modules whose functions go compute the same when they are opened and nothing else is done.

        Raises:
            CheckFailed: They do not.
        """
        owners = dict.fromkeys(call.owner for run in self.functional for call in run.calls if call.module is None)
        if not owners:
            return
        work = Work(structural_copy(self.before), self.inputs)
        for room in [self.rooms[owner].on(work) for owner in owners]:
            room.close(work)
        try:
            compare(Side(self.before), Side(work.model), self.inputs)
        except Mismatch as error:
            where = ", ".join(owner or "the model" for owner in owners)
            raise CheckFailed(f"it cannot be opened: {error.message}", path=where) from error

    def _trail(
        self, model: nn.Module, training: bool, around: Callable[[nn.Module], Any]
    ) -> tuple[list[str], tuple[Value, ...]]:
        """Which modules are called, leaving out those that go; and what the model returns."""
        calls: list[str] = []
        outputs: list[tuple[Value, ...]] = [()]
        known = dict(self.before.named_modules(remove_duplicate=False))
        first = {module: name for name, module in reversed(list(known.items()))}
        gone = {name for path in self.paths for name in known if known[name] is known[path]}

        def watch(twin: nn.Module) -> Any:
            calls.clear()
            for name, module in twin.named_modules():
                inside = any(name == path or name.startswith(f"{path}.") for path in gone)
                if name in known and not inside and name:
                    module.register_forward_pre_hook(lambda _module, _args, name=first[known[name]]: calls.append(name))
            twin.register_forward_hook(lambda _module, _args, output: outputs.append(values_of(output)))
            return around(twin)

        run_copy(model, self.inputs.with_batch(max(self.inputs.batch, 2)), training, watch)
        return calls, outputs[-1]

    @contextmanager
    def _hooked(self, module: nn.Module) -> Iterator[None]:
        """Put the hooks on a copy of the reference."""
        state = _Stand(self, module)
        handles = [
            handle
            for path in dict.fromkeys(call.key[0] for run in self.runs for call in run.calls)
            for handle in (
                module.get_submodule(path).register_forward_pre_hook(state.enter(path), with_kwargs=True, prepend=True),
                module.get_submodule(path).register_forward_hook(state.leave(path), with_kwargs=True),
            )
        ]
        for name in self.adapters.values():
            module.get_submodule(name).eval()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _host(model: nn.Module, path: str) -> str:
    """A module inside one that goes whose forward does not run through its children: it may hold one more."""
    for name, module in model.get_submodule(path).named_modules(prefix=path):
        if not module._modules and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
            return str(name)
    return ""


@contextmanager
def _numbered_anew(module: nn.Module, removed: set[Key] | None, there: bool) -> Iterator[None]:
    """Random numbers that depend on the path of a module and on how many of its calls went before that stay.

    `compare` counts all calls, and one that is not made on one side would shift the others.

    Args:
        module: What is about to run.
        removed: The calls that go; `None`: nothing need be done.
        there: Whether these are still made.
    """
    made: dict[str, int] = {}
    stays: dict[str, int] = {}
    inside: list[bool] = []

    def enter(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _args: Any) -> None:
            number = made[path] = made.get(path, -1) + 1
            inside.append(there and (path, number) in (removed or ()))
            if not any(inside):
                stays[path] = stays.get(path, 0) + 1
                torch.manual_seed(zlib.crc32(f"{path} {stays[path]}".encode()))

        return hook

    def leave(*_: Any) -> None:
        inside.pop()

    handles = []
    for path, each in module.named_modules() if removed is not None else ():
        handles.append(each.register_forward_pre_hook(enter(path)))
        handles.append(each.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def assign(model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
    """Put parameters in place of those of the same names, wherever these are referred to; others are left out."""
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, parameter in weights.items():
        old = held.get(name)
        for module in model.modules() if old is not None else ():
            for key in [key for key, each in module._parameters.items() if each is old]:
                module._parameters[key] = parameter


class _Stand:
    """What the hooks know during one forward."""

    def __init__(self, reference: Reference, module: nn.Module) -> None:
        self.firsts: dict[Key, Run] = {run.first.key: run for run in reference.runs}
        self.lasts: dict[Key, Run] = {run.last.key: run for run in reference.runs}
        self.adapters = {address: module.get_submodule(name) for address, name in reference.adapters.items()}
        self.removed = {call.key for run in reference.runs for call in run.calls}
        self.count: dict[str, int] = {}
        self.values: dict[Key, torch.Tensor] = {}
        self.random: list[Any] = []

    def enter(self, path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> Any:
            key = (path, self.count.get(path, 0))
            if key not in self.removed:
                return None
            self.random.append(_random_state())
            run = self.firsts.get(key)
            if run is not None:
                self.values[key] = main_value(run.first.form, args, kwargs).clone()
            # The removed module runs on copies: it may write to what it gets.
            return pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))

        return hook

    def leave(self, path: str) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            key = (path, self.count.get(path, 0))
            self.count[path] = key[1] + 1
            if key not in self.removed:
                return None
            run = self.lasts.get(key)
            result = None
            if run is not None:
                value = self.values.pop(run.first.key)
                adapter = self.adapters.get(run.address)
                result = in_form(run.last.form, value if adapter is None else adapter(value), args, kwargs)
            _set_random_state(self.random.pop())
            return result

        return hook


@contextmanager
def _calm(module: nn.Module, taken: Sequence[Taken]) -> Iterator[None]:
    """Modules that stand where others were draw no random numbers, and leave the generators as they were."""
    names = set(dict(module.named_modules(remove_duplicate=False)))
    states: list[Any] = []
    handles = []
    # Of a module of which one call went, the others are still made; an address of a function is no path.
    for path in names & {each.address for each in taken}:
        filler = module.get_submodule(path)
        filler.eval()
        handles.append(filler.register_forward_pre_hook(lambda *_: states.append(_random_state()), prepend=True))
        handles.append(filler.register_forward_hook(lambda *_: _set_random_state(states.pop())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _random_state() -> tuple[torch.Tensor, list[torch.Tensor]]:
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), devices


def _set_random_state(state: tuple[torch.Tensor, list[torch.Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
