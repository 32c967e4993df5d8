"""Take out the branch that a call lies in: all that feeds only the place where it is merged into another value."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from torchtrim.edits.adapter import layout_of
from torchtrim.edits.addresses import Address, places
from torchtrim.edits.calls import callers
from torchtrim.edits.channels import DeleteChannels
from torchtrim.edits.joint import observe
from torchtrim.edits.remove_place import Taken, needed, sweep
from torchtrim.edits.remove_runs import at_batch
from torchtrim.edits.rewire import Room, open_room
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import CheckFailed, EditError, PathError
from torchtrim.graph.check import Side, compare
from torchtrim.graph.copying import structural_copy
from torchtrim.graph.guards import GUARDS
from torchtrim.graph.reading import function_name

_CATS = (torch.cat, torch.concat, torch.concatenate)
_NEUTRAL: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "add": torch.zeros_like,
    "add_": torch.zeros_like,
    "sub": torch.zeros_like,
    "sub_": torch.zeros_like,
    "mul": torch.ones_like,
    "mul_": torch.ones_like,
}


@dataclass(eq=False)
class Merge:
    """Where a branch ends.

    Attributes:
        room: The module whose forward merges it.
        name: The function that does.
        positions: Which of the owner's calls of that function, and which of its two operands the branch gives; one
            pair for each graph.
        shape: The shape of the value.
    """

    room: Room
    name: str
    positions: list[tuple[int, int]]
    shape: tuple[int, ...]


def take_branches_out(work: Work, paths: Sequence[str], done: Sequence[Taken]) -> tuple[Taken, ...]:
    """Take out the branches that some calls lie in, one after the other; returns how.

    Raises:
        PathError: No such call.
        EditError: It lies in no branch, or one that cannot be left out.
        CheckFailed: The result does not compute what it should.
    """
    copied = {each.address: each.copied for each in done}
    return tuple(_take_out(work, address, copied.get(address)) for address in paths)


def _take_out(work: Work, address: str, copied: bool | None) -> Taken:
    merge = _merge_of(work, address)
    if merge is None:
        shape = _delete_all_channels(work, address)
        copied = False
    else:
        shape = merge.shape
        copied = _left_out(work, merge, address, [False, True] if copied is None else [copied])
    single = at_batch(shape, work.inputs, batch=1)
    work.joints.append(Joint(address, single, single, "its branch is left out"))
    return Taken(address, "branch", copied)


def _left_out(work: Work, merge: Merge, address: str, choices: list[bool]) -> bool:
    """Leave the branch out of its merge; returns whether what stays had to be copied."""
    reference: nn.Module | None = None
    if work.check:
        reference = structural_copy(work.model)
        trial = Work(reference, work.inputs)
        _change(trial, merge, _neutralise)
        reference = trial.model
        opened = Work(structural_copy(work.model), work.inputs)
        merge.room.on(opened).close(opened)
        compare(Side(work.model), Side(opened.model), work.inputs)
    for copied in choices:
        trial = Work(structural_copy(work.model), work.inputs)
        _change(trial, merge, _skip_and_copy if copied else _skip)
        if reference is not None:
            try:
                work.checked = list(compare(Side(reference), Side(trial.model), work.inputs))
            except CheckFailed:
                if copied is choices[-1]:
                    raise
                continue
        _change(work, merge, _skip_and_copy if copied else _skip)
        return copied
    raise EditError("its branch cannot be left out", path=address)


def _merge_of(work: Work, address: str) -> Merge | None:
    """Where the branch of a call is merged, from its own module outwards; `None` for a concatenation."""
    rooms: dict[str, Room] = {}
    found = places(work, address, rooms)
    if len(found) > 1:
        raise EditError("it is called several times, in as many branches", path=address, hint=f"'{address}#0'")
    ((room, nodes),) = found
    while True:
        if len(nodes) < len(room.graphs):
            raise EditError("one mode alone has this branch", path=address)
        merges = [_merge(graph, node) for graph, node in zip(room.graphs, nodes, strict=True)]
        if all(each is not None for each in merges):
            break
        if room.path == "":
            raise EditError("it lies in no branch: nothing goes round it", path=address, hint="branch=False")
        calls = callers(work.model, work.inputs, room.path, training=False)
        if len(calls) != 1:
            raise EditError(f"it lies in {room.path!r}, which is called several times", path=address)
        child = work.model.get_submodule(room.path)
        room = rooms[calls[0].owner] = rooms.get(calls[0].owner) or open_room(work, calls[0].owner)
        nodes = room.modules(child)[calls[0].position]
    if any(each is not None and each.target in _CATS for each in merges):
        return None
    positions, name = [], ""
    for graph, node, merge in zip(room.graphs, nodes, merges, strict=True):
        if merge is None:
            continue
        name = function_name(merge.target)
        branch = 0 if merge.args[0] in _reached(node) else 1
        if branch == 0 and name in ("sub", "sub_"):
            raise EditError("something is subtracted from its branch, which has nothing to stand for it", path=address)
        if room.value(merge)[0].shape != room.value(_operand(merge, 1 - branch))[0].shape:
            raise EditError(
                "what the branch is merged with has another shape than the result",
                path=address,
                found=list(room.value(_operand(merge, 1 - branch))[0].shape),
                expected=list(room.value(merge)[0].shape),
            )
        positions.append((_same_calls(graph, name).index(merge), branch))
    shape = tuple(room.value(next(each for each in merges if each is not None))[0].shape)
    return Merge(room, name, positions, shape)


def _merge(graph: fx.Graph, node: fx.Node) -> fx.Node | None:
    """The first call after a node that all its ways go through and that another value comes to as well.

    One that does not depend on the inputs (the scale of a layer) is no other value.
    """
    reached = _reached(node)
    nodes: list[fx.Node] = list(graph.nodes)
    varying = {each for one in nodes if one.op == "placeholder" for each in _reached(one)}
    for each in nodes:
        if each not in reached or each is node or each.target in GUARDS or each.op == "output":
            continue
        if nodes[-1] in _reached(node, without=each):
            continue
        inside = [operand for operand in each.all_input_nodes if operand in reached]
        outside = [operand for operand in each.all_input_nodes if operand in varying - reached]
        two = function_name(each.target) in _NEUTRAL and len(each.args) == 2 and len(inside) == 1
        if outside and (two or each.target in _CATS):
            return each
    return None


def _reached(node: fx.Node, without: fx.Node | None = None) -> set[fx.Node]:
    """A node, and all that depends on it."""
    found = {node}
    stack = [node]
    while stack:
        for user in stack.pop().users:
            if user not in found and user is not without and user.target not in GUARDS:
                found.add(user)
                stack.append(user)
    return found


def _operand(merge: fx.Node, position: int) -> fx.Node:
    operand = merge.args[position]
    if not isinstance(operand, fx.Node):
        raise EditError("its branch is merged with a constant", path=merge.name, found=operand)
    return operand


def _same_calls(graph: fx.Graph, name: str) -> list[fx.Node]:
    calls = [each for each in graph.nodes if each.op in ("call_function", "call_method")]
    return [each for each in calls if each.target not in GUARDS and function_name(each.target) == name]


def _change(work: Work, merge: Merge, change: Callable[[fx.Node, int], None]) -> None:
    """Open the module that merges, change the merge in each of its graphs, and leave out what is not needed then."""
    room = merge.room.on(work)
    for graph, (number, branch) in zip(room.graphs, merge.positions, strict=True):
        before = needed(graph, room)
        change(_same_calls(graph, merge.name)[number], branch)
        sweep(graph, room, before)
    room.close(work)


def _skip(merge: fx.Node, branch: int) -> None:
    merge.replace_all_uses_with(_operand(merge, 1 - branch))
    merge.graph.erase_node(merge)


def _skip_and_copy(merge: fx.Node, branch: int) -> None:
    with merge.graph.inserting_before(merge):
        value = merge.graph.call_function(torch.clone, (_operand(merge, 1 - branch),))
    merge.replace_all_uses_with(value)
    merge.graph.erase_node(merge)


def _neutralise(merge: fx.Node, branch: int) -> None:
    """For the check: the branch is computed, and what changes nothing is merged in its place."""
    name = function_name(merge.target)
    plain: Any = operator.mul if name in ("mul", "mul_") else operator.add
    with merge.graph.inserting_before(merge):
        neutral = merge.graph.call_function(_NEUTRAL[name], (_operand(merge, branch),))
        value = merge.graph.call_function(plain, (_operand(merge, 1 - branch), neutral))
    merge.replace_all_uses_with(value)
    merge.graph.erase_node(merge)


def _delete_all_channels(work: Work, address: str) -> tuple[int, ...]:
    """Out of a concatenation a branch goes with all its channels, and what reads them gets narrower."""
    where = Address.of(work.model, address)
    if where.function is not None or where.number is not None:
        raise EditError("its branch ends in a concatenation", path=address, hint="the path of a layer in that branch")
    seen = next(iter(observe(work.model, work.inputs, False, {where.path})), None)
    if seen is None:
        raise PathError("it is never called for these inputs", path=address)
    shape = tuple(seen.result.shape)
    layout = layout_of(tuple(seen.value.shape), shape, [work.model.get_submodule(where.path)])
    width = shape[1] if layout in ("flat", "NCL", "NCHW", "NCDHW") else shape[-1]
    joints = list(work.joints)
    DeleteChannels({where.path: tuple(range(width))}).perform(work)
    work.joints[:] = joints
    return shape
