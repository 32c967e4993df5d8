"""From an address to the calls it names: which modules make them, and at which nodes of their forwards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx, nn

from torchtrim.edits.rewire import Room, open_room, run_copy
from torchtrim.edits.work import Work
from torchtrim.errors import EditError, PathError
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.paths import unknown


@dataclass(frozen=True)
class Address:
    """A place in a model, taken apart.

    Attributes:
        text: As it was given.
        path: The module that is called; for a function, the module whose forward calls it.
        function: The name of the function or method.
        number: Which of several calls, in order of execution.

    Example:
        >>> Address.of(nn.Sequential(nn.ReLU()), "0#1")
        Address(text='0#1', path='0', function=None, number=1)
    """

    text: str
    path: str
    function: str | None = None
    number: int | None = None

    @staticmethod
    def of(model: nn.Module, text: str) -> Address:
        """Take an address apart; a module with several names goes by its first.

        Raises:
            PathError: There is no such module, or it is no address.
        """
        match = re.fullmatch(r"([^:#]*)(?::([^:#]+))?(?:#(\d+))?", text) if isinstance(text, str) else None
        if match is None:
            raise PathError(
                "not an address", path=text, expected="'path', 'path:function', with '#k' for one of several"
            )
        path, function, number = match.groups()
        modules = dict(model.named_modules(remove_duplicate=False))
        if path not in modules:
            raise unknown(model, path)
        first = next(name for name, module in model.named_modules() if module is modules[path])
        return Address(text, first, function, None if number is None else int(number))


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


def callers(model: nn.Module, inputs: Inputs, path: str, training: bool) -> list[Caller]:
    """Who calls a module in one mode, in the order of execution.

    Raises:
        EditError: The model does not run on the inputs.
    """
    found: list[Caller] = []
    run_copy(model, inputs.with_batch(max(inputs.batch, 2)), training, lambda twin: _watch(twin, path, found))
    return found


def places(work: Work, address: str, rooms: dict[str, Room] | None = None) -> list[tuple[Room, tuple[fx.Node, ...]]]:
    """Open the modules that make the calls an address names; with each, the call's node in each of its graphs.

    A path names all calls of its module, `path#k` one of them, and `path:function` the only call of that function.

    Args:
        work: The model that is worked on.
        address: The address.
        rooms: The modules that are open already, by path; those opened now are added.

    Raises:
        PathError: No such module or call, or several calls of a function.
        EditError: The module that makes the call cannot be opened, or makes it in each of several runs.
    """
    where = Address.of(work.model, address)
    rooms = {} if rooms is None else rooms

    def opened(path: str) -> Room:
        rooms[path] = rooms.get(path) or open_room(work, path)
        return rooms[path]

    if where.function is not None:
        room = opened(where.path)
        return [(room, _one(where, room))]
    if where.path == "":
        raise PathError(
            "that is the whole model, which nothing in it calls", path="''", hint="the path of a module in it"
        )
    in_eval, in_train = (callers(work.model, work.inputs, where.path, training) for training in (False, True))
    calls = in_eval or in_train
    if not calls:
        raise PathError("it is never called for these inputs", path=address, hint="a path that tt.trace lists")
    child = work.model.get_submodule(where.path)
    if where.number is None or (where.number == 0 and len(calls) == 1):
        owners = dict.fromkeys(call.owner for call in in_eval + in_train)
        return [(opened(owner), nodes) for owner in owners for nodes in opened(owner).modules(child)]
    if where.number >= len(calls):
        raise PathError("no such call", path=address, found=f"{len(calls)} calls", expected=f"#0 to #{len(calls) - 1}")
    call = calls[where.number]
    if any(other.owner == call.owner and other.run != call.run for other in calls):
        raise _several_runs(address, call.owner, where.path)
    room = opened(call.owner)
    return [(room, room.modules(child)[call.position])]


def _one(where: Address, room: Room) -> tuple[fx.Node, ...]:
    calls = room.functions(where.function or "")
    count = len(calls) * room.calls
    name = f"{where.path}:{where.function}"
    if not calls:
        made = dict.fromkeys(room.function_names())
        raise PathError(
            "no such call in this module's forward",
            path=where.text,
            found="it calls modules only" if not made else ", ".join(f"{where.path}:{each}" for each in made),
        )
    if where.number is None and len(calls) > 1:
        raise PathError(
            "it is called several times, and has a value for each",
            path=where.text,
            found=f"{count} calls",
            hint="one of " + ", ".join(f"'{name}#{number}'" for number in range(count)),
        )
    number = where.number or 0
    if number >= count:
        raise PathError("no such call", path=where.text, found=f"{count} calls", expected=f"#0 to #{count - 1}")
    if where.number is not None and room.calls > 1:
        raise _several_runs(where.text, where.path, name)
    return calls[number]


def _several_runs(address: str, owner: str, name: str) -> EditError:
    return EditError(
        f"{owner!r}, whose forward makes this call, runs several times: a change holds for all of its runs",
        path=address,
        hint=f"{name!r}, which changes all of them",
    )


def _watch(twin: nn.Module, path: str, found: list[Caller]) -> None:
    """Note the calls of a module in a model that is about to run."""
    child = twin.get_submodule(path)
    stack: list[tuple[str, int]] = []
    runs: dict[str, int] = {}
    positions: dict[tuple[str, int], int] = {}

    def enter(name: str, module: nn.Module) -> None:
        if module is child and stack:
            position = positions[stack[-1]] = positions.get(stack[-1], -1) + 1
            found.append(Caller(*stack[-1], position))
        runs[name] = runs.get(name, -1) + 1
        stack.append((name, runs[name]))

    def leave(name: str) -> None:
        while stack.pop()[0] != name:
            continue  # left by an exception that a forward caught

    found.clear()
    for name, module in twin.named_modules():
        module.register_forward_pre_hook(lambda module, _args, name=name: enter(name, module))
        module.register_forward_hook(lambda *_, name=name: leave(name))
