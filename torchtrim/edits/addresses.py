"""From an address to the calls it names: which modules make them, and at which nodes of their forwards."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import fx, nn

from torchtrim.edits.calls import Runs
from torchtrim.edits.rewire import Room, open_room
from torchtrim.edits.work import Work
from torchtrim.errors import EditError, PathError
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


def places(
    work: Work, address: str, rooms: dict[str, Room] | None = None, runs: Runs | None = None
) -> list[tuple[Room, tuple[fx.Node, ...]]]:
    """Open the modules that make the calls an address names; with each, the call's node in each of its graphs.

    A path names all calls of its module, `path#k` one of them, and `path:function` the only call of that function.

    Args:
        work: The model that is worked on.
        address: The address.
        rooms: The modules that are open already, by path; those opened now are added.
        runs: What runs of the model as it is now showed.

    Raises:
        PathError: No such module or call, or several calls of a function.
        EditError: The module that makes the call cannot be opened, or makes it in each of several runs.
    """
    where = Address.of(work.model, address)
    rooms = {} if rooms is None else rooms
    runs = runs or Runs(work.model, work.inputs)

    def opened(path: str) -> Room:
        rooms[path] = rooms.get(path) or open_room(work, path, runs)
        return rooms[path]

    if where.function is not None:
        room = opened(where.path)
        return [(room, _one(where, room))]
    if where.path == "":
        raise PathError(
            "that is the whole model, which nothing in it calls", path="''", hint="the path of a module in it"
        )
    in_eval, in_train = (runs.callers(where.path, training) for training in (False, True))
    calls = in_eval or in_train
    if not calls:
        raise PathError("it is never called for these inputs", path=address, hint="a path that tt.trace lists")
    child = work.model.get_submodule(where.path)
    if where.number is None or (where.number == 0 and len(calls) == 1):
        owners = dict.fromkeys(call.owner for call in in_eval + in_train)
        found = [(owner, opened(owner).modules(child)) for owner in owners]
        for owner in [owner for owner, calls in found if not calls]:
            raise EditError(f"the forward of {owner or 'the model'!r} does not call it by a name", path=address)
        return [(opened(owner), nodes) for owner, calls in found for nodes in calls]
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
