"""Take calls out of a model: elements out of containers, a module that hands on in its place, or the forward opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from torchtrim.edits.adapter_layers import PassOn
from torchtrim.edits.addresses import Address, places
from torchtrim.edits.calls import Runs, callers, held_plainly
from torchtrim.edits.joint import Form
from torchtrim.edits.kept_nodes import Plan
from torchtrim.edits.layer_numbers import layer_numbers, renumber_layers
from torchtrim.edits.remove_runs import Call, Run, main_node
from torchtrim.edits.rewire import Room, call_by_name
from torchtrim.edits.work import Work
from torchtrim.errors import EditError
from torchtrim.graph.reader import join


@dataclass(frozen=True)
class Taken:
    """How a call was taken out.

    Attributes:
        address: The call; a path means all calls of that module.
        how: `"gone"`: the element of a container is no more. `"passed"`: a module that hands on its input is in its
            place (an `nn.Identity`, or the adapter). `"opened"`: the forward of the module that made the call was
            opened, and does without it.
        copied: Whether what is handed on is a copy, because what follows writes to it.
        form: What is handed on, and in what form.
    """

    address: str = ""
    how: str = "gone"
    copied: bool = False
    form: Form = field(default_factory=Form)


def ways(
    model: nn.Module, runs: Sequence[Run], adapters: Mapping[str, nn.Module], compared: bool
) -> Iterator[tuple[Taken, ...]]:
    """The ways to take runs out, the one that changes least first.

    Args:
        model: The model.
        runs: What is to go.
        adapters: The adapters, by the address of the run.
        compared: Whether the result is compared: else elements of containers stay where other code may count them.
    """
    held = held_plainly(model)
    calls = {call.address: call for run in runs for call in run.calls}
    owners: dict[str, set[str]] = {address: set() for address in calls}
    for call in (call for run in runs for call in run.calls):
        owners[call.address].add(call.owner)
        if call.form != calls[call.address].form:
            raise EditError("it is called in different ways", path=call.address, hint="'path#k', for one of its calls")
    single = [call for call in calls.values() if call.module is None or "#" in call.address]
    opened = {call.owner for call in single if call.module is None or not _is_sequential(model, call.owner)}
    firsts = {run.address for run in runs}
    done: list[tuple[Taken, ...]] = []
    for how, copied in (("gone", False), ("passed", False), ("passed", True), ("opened", False), ("opened", True)):
        taken = []
        for address, call in calls.items():
            copies = copied and address in firsts
            stays = copies or address in adapters or call.module in held
            known = all(_is_sequential(model, owner) for owner in owners[address])
            stays = stays or not (known or compared)
            own = "opened" if owners[address] & opened else _how(model, call, how, stays, known)
            taken.append(Taken(address, own, copies, call.form))
        if tuple(taken) not in done:
            done.append(tuple(taken))
            yield done[-1]


def _how(model: nn.Module, call: Call, how: str, stays: bool, known: bool) -> str:
    """How to take out one call, where `how` is what is tried for those that nothing is known of."""
    if "#" in call.address:
        return "passed" if stays else "gone"
    parents = [parent for parent, _ in _holders(model, call.key[0])]
    if known and all(type(parent).forward is nn.Sequential.forward for parent in parents):
        return "passed" if stays or how != "gone" else "gone"  # only other elements may be called from elsewhere
    if how != "gone":
        return how
    containers = all(isinstance(parent, (nn.Sequential, nn.ModuleList, nn.ModuleDict)) for parent in parents)
    return "gone" if containers and not stays else "passed"


def _is_sequential(model: nn.Module, path: str) -> bool:
    return type(model.get_submodule(path)).forward is nn.Sequential.forward


def _holders(model: nn.Module, path: str) -> list[tuple[nn.Module, str]]:
    """Every module that refers to the one at a path, with the name it has there."""
    child = model.get_submodule(path)
    return [(parent, name) for parent in model.modules() for name, each in parent._modules.items() if each is child]


def take_out(
    work: Work, taken: Sequence[Taken], adapters: Mapping[str, nn.Module], rooms: dict[str, Room] | None = None
) -> None:
    """Take calls out of `work.model`.

    Args:
        work: The model that is worked on.
        taken: The calls, and how.
        adapters: What a value goes through, by the address of the call in whose place it is.
        rooms: Modules that were read already, in this model or a copy of it; those read now are added.

    Raises:
        EditError: A module that has to be opened cannot be.
    """
    numbers = layer_numbers(work.model)
    call_by_name(work, [each.address for each in taken if each.how == "passed" and "#" not in each.address])
    opened = [each for each in taken if each.how == "opened"]
    if opened:
        _take_out_of_forwards(work, opened, adapters, {} if rooms is None else rooms)
    for each in taken:
        if each.how == "opened":
            continue
        address = Address.of(work.model, each.address)
        adapter = adapters.get(each.address)
        training = work.model.get_submodule(address.path).training
        filler = None if each.how == "gone" and adapter is None else _filler(each, adapter, training)
        if address.number is not None:
            parent, name = _element(work, address)
            _set(parent, name, filler)
        elif filler is not None:
            work.put(address.path, filler)
        else:
            for parent, name in _holders(work.model, address.path):
                _set(parent, name, None)
    renumber_layers(work.model, numbers)


def _set(parent: nn.Module, name: str, module: nn.Module | None) -> None:
    if module is None:
        del parent._modules[name]
    else:
        parent._modules[name] = module


def _filler(taken: Taken, adapter: nn.Module | None, training: bool) -> nn.Module:
    form = taken.form
    if form.plain and not taken.copied:
        filler = nn.Identity() if adapter is None else adapter
    else:
        filler = PassOn(form.argument, form.item, form.form, form.outputs, taken.copied, adapter)
    if adapter is None:
        return filler.train(training)
    filler.training = adapter.training if filler is adapter else training
    return filler


def _element(work: Work, address: Address) -> tuple[nn.Module, str]:
    """Which element of a `Sequential` makes one of several calls of a module."""
    calls = callers(work.model, work.inputs, address.path, training=False)
    call = calls[address.number or 0]
    parent, child = work.model.get_submodule(call.owner), work.model.get_submodule(address.path)
    return parent, [name for name, each in parent._modules.items() if each is child][call.position]


def _take_out_of_forwards(
    work: Work, taken: Sequence[Taken], adapters: Mapping[str, nn.Module], known: dict[str, Room]
) -> None:
    open_now = {path: room.on(work) for path, room in known.items()}
    runs = Runs(work.model, work.inputs)
    found = [(each, room, nodes) for each in taken for room, nodes in places(work, each.address, open_now, runs)]
    rooms = {room.path: room for _, room, _ in found}
    known |= rooms
    kept = {graph: needed(graph, room) for room in rooms.values() for graph in room.graphs}
    stays = [(each, room, _bypassed(node, each)) for each, room, nodes in found for node in nodes]
    for room in rooms.values():
        for graph in room.graphs:
            sweep(graph, room, kept[graph])
    new: dict[str, dict[str, nn.Module]] = {path: {} for path in rooms}
    names: dict[tuple[str, str], str] = {}
    for each, room, stay in stays:
        adapter, name = adapters.get(each.address), None
        if adapter is not None:
            name = names.get((room.path, each.address)) or _name(room, each)
            names[room.path, each.address] = name
            new[room.path][name] = adapter
        _settle(stay, each, name)
    for path, room in rooms.items():
        room.close(work, new[path])


def needed(graph: fx.Graph, room: Room) -> set[fx.Node]:
    """The nodes that the module's output, and the values in it that are written to, depend on."""
    return Plan(graph, room.module, [], {}, own=True).kept


def sweep(graph: fx.Graph, room: Room, before: set[fx.Node]) -> None:
    """Take out the nodes that were needed before, and are not any more."""
    now = needed(graph, room)
    for node in reversed(list(graph.nodes)):
        if node in before and node not in now:
            graph.erase_node(node)


def stay(value: Any) -> Any:
    """Stands in a graph for a value that takes the place of another, while that is being changed."""
    return value


def _bypassed(node: fx.Node, taken: Taken) -> fx.Node:
    """Put the main value of a call in place of what it gives; returns the node that stands for it."""
    main = main_node(node, taken.form)
    with node.graph.inserting_before(node):
        if taken.form.item is not None and isinstance(main, fx.Node) and _holds_list(node, taken.form, main):
            main = node.graph.call_function(_item, (main, taken.form.item))
        mark = node.graph.call_function(stay, (main,))

    def other(which: str) -> Any:
        if which in ("value", "none"):
            return mark if which == "value" else None
        name = which.removeprefix("=")
        return node.args[int(name)] if name.isdigit() else node.kwargs[name]

    form = taken.form
    result: Any = mark
    if form.form != "value":
        outputs = [other(which) for which in form.outputs]
        result = outputs if form.form == "list" else tuple(outputs)
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda one: result if one is node else one)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda one: result if one is node else one)
    node.graph.erase_node(node)
    return mark


def _item(values: Any, index: int) -> Any:
    """One of several values."""
    return values[index]


def _holds_list(node: fx.Node, form: Form, main: fx.Node) -> bool:
    holder = node.args[form.argument] if isinstance(form.argument, int) else node.kwargs[form.argument]
    return holder is main


def _settle(mark: fx.Node, taken: Taken, adapter: str | None) -> None:
    """Replace the mark by the value itself, a copy of it, or what an adapter makes of it."""
    (value,) = mark.args
    with mark.graph.inserting_before(mark):
        if taken.copied:
            value = mark.graph.call_function(torch.clone, (value,))
        if adapter is not None:
            value = mark.graph.call_module(adapter, (value,))
    for user in list(mark.users):
        user.args = fx.node.map_arg(user.args, lambda one: value if one is mark else one)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda one: value if one is mark else one)
    mark.graph.erase_node(mark)


def _name(room: Room, taken: Taken) -> str:
    """Where in the opened module an adapter lives: at the path of what went, where all of that did."""
    path, _, function = taken.address.partition("#")[0].partition(":")
    relative = path[len(room.path) + 1 :] if room.path else path
    if not function and "#" not in taken.address and join(room.path, relative) == path and "." not in relative:
        return relative
    return room.free_name(f"{function or relative.replace('.', '_')}_adapter")
