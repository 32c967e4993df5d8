"""Which calls are to go, and the runs they form: consecutive ones have a single joint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from torchtrim.edits.adapter import Shape
from torchtrim.edits.addresses import Address, places
from torchtrim.edits.joint import Form, Key, Seen, observe
from torchtrim.edits.rewire import Room
from torchtrim.edits.work import Work
from torchtrim.errors import EditError, PathError
from torchtrim.graph.guards import GUARDS
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.paths import select
from torchtrim.graph.structure import leaves


@dataclass(eq=False)
class Call:
    """One call that is to go.

    Attributes:
        key: The module's path (`"path:function"`), and which of its calls.
        address: As the record names it: the path alone where all its calls go.
        owner: The module whose forward makes it.
        module: The module that is called; `None` for a function.
        before: The shape of the main value that goes in.
        after: The shape of the one that comes out.
        types: Their types.
        needed: Whether something depends on what comes out.
        form: How they go in and out.
    """

    key: Key
    address: str
    owner: str
    module: nn.Module | None
    before: Shape
    after: Shape
    types: tuple[torch.dtype, torch.dtype]
    needed: bool
    form: Form


@dataclass(eq=False)
class Run:
    """Calls of which each feeds only the next: what goes into the first is put in place of what the last gave.

    Attributes:
        calls: They, in order.
    """

    calls: list[Call]

    @property
    def first(self) -> Call:
        """The first: an adapter lives in its place."""
        return self.calls[0]

    @property
    def last(self) -> Call:
        """The last."""
        return self.calls[-1]

    @property
    def address(self) -> str:
        """Where an adapter lives."""
        return self.first.address

    @property
    def functional(self) -> bool:
        """Whether a function is among them."""
        return any(call.module is None for call in self.calls)

    @property
    def modules(self) -> list[nn.Module]:
        """The modules among them."""
        return [call.module for call in self.calls if call.module is not None]

    @property
    def fits(self) -> bool:
        """Whether no adapter is needed."""
        same = self.first.before == self.last.after and self.first.types[0] == self.last.types[1]
        return same or not self.last.needed

    def __str__(self) -> str:
        return self.first.address if len(self.calls) == 1 else f"{self.first.address} .. {self.last.address}"


@dataclass(eq=False)
class Wanted:
    """What is to go, taken apart: whole modules by their first path, single calls, functions."""

    modules: list[Address] = field(default_factory=list)
    functions: list[Address] = field(default_factory=list)

    @property
    def addresses(self) -> list[str]:
        """All of it, as the record names it."""
        return [_spelled(each) for each in (*self.modules, *self.functions)]


def wanted_from(model: nn.Module, paths: Sequence[str]) -> Wanted:
    """Read paths, globs and addresses; what lies in something else that goes is left out.

    Raises:
        PathError: One does not exist, or is the whole model.
        SelectionError: A glob fits nothing.
    """
    found: dict[str, Address] = {}
    modules = dict(model.named_modules(remove_duplicate=False))
    for text in paths:
        if text not in modules and (":" in text or "#" in text):
            each = Address.of(model, text)
            found[_spelled(each)] = each
            continue
        for path in select(model, text):
            for name in _called(model, path):
                each = Address.of(model, name)
                found[each.path] = each
    whole = {each.path for each in found.values() if each.function is None and each.number is None}
    if "" in whole:
        raise PathError("that is the whole model: nothing would be left", path="''", hint="the path of a module in it")
    kept = [each for each in found.values() if not _covered(model, each, whole)]
    return Wanted([each for each in kept if each.function is None], [each for each in kept if each.function])


def runs_of(work: Work, wanted: Wanted, rooms: dict[str, Room]) -> list[Run]:
    """The runs, in the order of execution.

    Args:
        work: The model that is worked on.
        wanted: What is to go.
        rooms: The modules that are open already, by path; those opened now are added.

    Raises:
        PathError: Something is never called.
        EditError: There is nothing to put in its place.
    """
    calls: dict[Key, Call] = {}
    after: dict[Key, Key | None] = {}
    by_path: dict[str, list[Address]] = {}
    paths = {each.path for each in wanted.modules}
    observed = [observe(work.model, work.inputs, mode, paths) for mode in (False, True)] if paths else []
    made = {one.key for seen in observed for one in seen}
    wanted.modules = [_only_call(each, made) for each in wanted.modules]
    for each in wanted.modules:
        by_path.setdefault(each.path, []).append(each)
    for seen in observed:
        addresses = {one.key: _address_of(one.key, by_path[one.key[0]]) for one in seen}
        seen = [one for one in seen if addresses[one.key] is not None]
        for index, one in enumerate(seen):
            follower = next((other.key for other in seen[index + 1 :] if one.feeds_only(other)), None)
            if one.key in calls and after[one.key] != follower:
                follower = None  # one mode alone has them one behind the other
            after[one.key] = follower
            call = calls.setdefault(one.key, _module_call(one, addresses[one.key] or "", work.model))
            call.needed = call.needed or one.needed
    _all_called(wanted, calls)
    if wanted.functions:
        _add_functions(work, wanted, calls, after, rooms)
    followers = {key for key in after.values() if key is not None}
    runs = []
    for key in calls:
        if key not in followers:
            chain = [calls[key]]
            while (following := after.get(chain[-1].key)) is not None:
                chain.append(calls[following])
            runs.append(Run(chain))
    return runs


def _only_call(address: Address, made: set[Key]) -> Address:
    """The first call of a module that is called once is all of it."""
    once = [key for key in made if key[0] == address.path] == [(address.path, 0)]
    return replace(address, number=None) if once and address.number == 0 else address


def _module_call(seen: Seen, address: str, model: nn.Module) -> Call:
    types = seen.value.dtype, seen.result.dtype
    shapes = tuple(seen.value.shape), tuple(seen.result.shape)
    return Call(seen.key, address, seen.owner, model.get_submodule(seen.key[0]), *shapes, types, seen.needed, seen.form)


def _all_called(wanted: Wanted, calls: dict[Key, Call]) -> None:
    for each in wanted.modules:
        if each.number is not None and (each.path, each.number) not in calls:
            raise PathError("no such call for these inputs", path=each.text, hint="a call that tt.trace lists")
        if not any(call.key[0] == each.path for call in calls.values()):
            raise PathError(
                "it is never called for these inputs, so there is nothing to join",
                path=each.text,
                hint="a path that tt.trace lists",
            )


def _add_functions(
    work: Work, wanted: Wanted, calls: dict[Key, Call], after: dict[Key, Key | None], rooms: dict[str, Room]
) -> None:
    """Add the calls of functions, and what they follow or are followed by in the same forward."""
    nodes_of: dict[Key, tuple[fx.Node, ...]] = {}
    for each in wanted.functions:
        ((room, nodes),) = places(work, each.text, rooms)
        key = (f"{each.path}:{each.function}", each.number or 0)
        nodes_of[key] = nodes
        calls[key] = _function_call(key, each, room, nodes[0])
        after[key] = None
    for key, call in list(calls.items()):
        if call.module is not None and call.owner in rooms and rooms[call.owner].calls == 1:
            same = rooms[call.owner].modules(call.module)
            if key[1] < len(same):
                nodes_of[key] = same[key[1]]
    for key, nodes in nodes_of.items():
        for other, others in nodes_of.items():
            both = calls[key].module is not None and calls[other].module is not None
            if not both and other != key and _feeds_only(nodes, others, calls[other].form):
                after[key] = other


def _feeds_only(nodes: tuple[fx.Node, ...], others: tuple[fx.Node, ...], form: Form) -> bool:
    if len(nodes) != len(others):
        return False
    return all(
        main_node(other, form) is node and {user for user in node.users if user.target not in GUARDS} == {other}
        for node, other in zip(nodes, others, strict=True)
    )


def _function_call(key: Key, address: Address, room: Room, node: fx.Node) -> Call:
    argument = next((each for each in _arguments(node) if _is_value(room.value(each[1])[0])), None)
    result = room.value(node)[0]
    if argument is None or not _is_value(result):
        raise EditError(
            "it takes no value that can stand for what it gives",
            path=address.text,
            found=f"a {type(result).__name__} from {[type(room.value(n)[0]).__name__ for _, n, _ in _arguments(node)]}",
            expected="a tensor of real numbers from another",
        )
    name, source, item = argument
    value = room.value(source)[0]
    if item is not None and not isinstance(value, torch.Tensor):
        value = value[item]
    needed = room.path != "" or any(user.op != "output" for user in node.users)
    form = Form(name, item)
    types = value.dtype, result.dtype
    return Call(key, _spelled(address), room.path, None, tuple(value.shape), tuple(result.shape), types, needed, form)


def _arguments(node: fx.Node) -> list[tuple[int | str, fx.Node, int | None]]:
    """The nodes among the arguments of a call, with their places; those in a list too."""
    found: list[tuple[int | str, fx.Node, int | None]] = []
    named: list[tuple[int | str, Any]] = [*enumerate(node.args), *node.kwargs.items()]
    for name, argument in named:
        if isinstance(argument, fx.Node):
            found.append((name, argument, None))
        elif isinstance(argument, (list, tuple)):
            found += [(name, item, index) for index, item in enumerate(argument) if isinstance(item, fx.Node)]
    return found


def at_batch(shape: Shape, inputs: Inputs, batch: int | None = None) -> Shape:
    """A shape as it was seen (the batch is 2 at least), for another batch: by default that of the example inputs."""
    seen, wanted = max(inputs.batch, 2), batch or inputs.batch
    return (shape[0] * wanted // seen, *shape[1:]) if shape and shape[0] % seen == 0 else shape


def main_node(node: fx.Node, form: Form) -> Any:
    """The main value of a call, as its node's arguments hold it.

    Raises:
        EditError: It is no node.
    """
    holder: Any = node.args[form.argument] if isinstance(form.argument, int) else node.kwargs[form.argument]
    if form.item is not None and isinstance(holder, (list, tuple)):
        holder = holder[form.item]
    if not leaves(holder, fx.Node):
        raise EditError("its main value is a constant", path=str(node.target), found=holder)
    return holder


def _is_value(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())


def _spelled(address: Address) -> str:
    function = "" if address.function is None else f":{address.function}"
    return f"{address.path}{function}" + ("" if address.number is None else f"#{address.number}")


def _address_of(key: Key, asked: list[Address]) -> str | None:
    """The address that names a call; `None` for one that stays."""
    if any(each.number is None for each in asked):
        return key[0]
    return f"{key[0]}#{key[1]}" if any(each.number == key[1] for each in asked) else None


def _called(model: nn.Module, path: str) -> list[str]:
    """The path; of a list of modules, which is never called itself, those of its elements."""
    module = model.get_submodule(path)
    if type(module).forward is not nn.Module.forward:
        return [path]
    return [inner for name in module._modules for inner in _called(model, f"{path}.{name}" if path else name)]


def _covered(model: nn.Module, address: Address, whole: set[str]) -> bool:
    """Whether it lies in a module that goes as a whole, by whichever of its names."""
    if address.number is not None and address.function is None and address.path in whole:
        return True
    target = model.get_submodule(address.path)
    names = [name for name, module in model.named_modules(remove_duplicate=False) if module is target]
    inside = [any(name.startswith(f"{path}.") for path in whole) for name in names]
    return all(inside) or (address.function is not None and address.path in whole)
