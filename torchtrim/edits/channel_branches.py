"""Take out a branch of which every channel goes: a concatenation keeps its other parts, a sum the other summand."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from torchtrim.channels.follow import Flow, Run
from torchtrim.edits.channel_check import dead_calls
from torchtrim.edits.rewire import Room, open_room
from torchtrim.edits.work import Work
from torchtrim.errors import EditError
from torchtrim.graph.guards import GUARDS

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_WRITERS = ("iadd", "isub", "imul", "itruediv", "setitem")
_CATS = (torch.cat, torch.concat, torch.concatenate)


def take_out(work: Work, flow: Flow) -> None:
    """Take the dead branches of `flow` out of `work.model`.

    Raises:
        EditError: A module's forward cannot be opened, or a branch is joined in a way that cannot be taken apart.
    """
    for run in flow.runs:
        for path, calls in run.calls.items():
            if any(len({label.dead for _, label in call.outputs}) > 1 for call in calls):
                raise EditError("it returns both what would go and what stays", path=path, hint="leave a channel")
    modules = {id(module): path for path, module in work.model.named_modules()}
    for path in dict.fromkeys(joint for run in flow.runs for joint in run.joints):
        room = open_room(work, path)
        joined = [
            _prune(room, graph, _dead_calls(room, graph, run, modules))
            for graph, run in zip(room.graphs, flow.runs, strict=False)
        ]
        if not any(joined):
            raise EditError(
                "the branch is joined in a module that is given it", path=path or "the model", hint="leave a channel"
            )
        room.close(work)


def _dead_calls(room: Room, graph: fx.Graph, run: Run, modules: dict[int, str]) -> dict[fx.Node, None]:
    """The calls of modules whose values go."""
    nodes: dict[str, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            child: nn.Module = room.module.get_submodule(str(node.target))
            nodes.setdefault(modules[id(child)], []).append(node)
    dead: dict[fx.Node, None] = {}
    for path, found in nodes.items():
        flags = dead_calls(run, path)
        if len(set(flags)) > 1 and len(flags) != len(found):
            raise EditError(
                "some of its calls would go and some stay, and which is which cannot be told",
                path=path,
                hint="leave a channel",
            )
        if len(flags) != len(found):
            flags = flags[:1] * len(found)
        dead |= dict.fromkeys(node for node, flag in zip(found, flags, strict=False) if flag)
    return dead


def _prune(room: Room, graph: fx.Graph, dead: dict[fx.Node, None]) -> bool:
    """Take the dead nodes out of one graph; returns whether a joint was changed."""
    joined = False
    for node in list(graph.nodes):
        if node.op == "call_module":
            continue
        lost = [each for each in node.all_input_nodes if each in dead]
        if not lost:
            continue
        if len(lost) == len(node.all_input_nodes) and node.op != "output":
            dead[node] = None
        elif node.op == "call_function" and node.target in _CATS:
            _shorten(room, node, dead)
            joined = True
        elif node.target in _SUMS and len(node.all_input_nodes) == 2:
            (other,) = (each for each in node.all_input_nodes if each not in dead)
            _stand_in(room, node, other)
            dead[node] = None
            joined = True
        else:
            raise EditError(
                f"every channel of a branch would go, and `{node.name}` needs it", path=room.path or "the model"
            )
    _erase(graph, dead)
    return joined


def _stand_in(room: Room, node: fx.Node, value: fx.Node) -> None:
    """Put a value in place of a node's; a copy of it where it may be written to, which the node's own could be."""
    if any(_may_write(room, user) for user in node.users):
        with node.graph.inserting_before(node):
            value = node.graph.call_method("clone", (value,))
    node.replace_all_uses_with(value)


def _may_write(room: Room, node: fx.Node) -> bool:
    if node.op != "call_module":
        return _is_in_place(node)
    module = room.module.get_submodule(str(node.target))
    own = not type(module).__module__.startswith("torch.nn.") or isinstance(module, nn.Sequential)
    return own or bool(getattr(module, "inplace", False))


def _shorten(room: Room, node: fx.Node, dead: dict[fx.Node, None]) -> None:
    """Concatenate what is left."""
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    if not isinstance(parts, (tuple, list)):
        raise EditError("what is concatenated is not a list of values", found=str(parts))
    kept = [part for part in parts if part not in dead]
    if len(kept) == 1:
        _stand_in(room, node, kept[0])
        dead[node] = None
    elif node.args:
        node.update_arg(0, kept)
    else:
        node.update_kwarg("tensors", kept)


def _erase(graph: fx.Graph, dead: dict[fx.Node, None]) -> None:
    """Erase dead nodes, and what was computed for them alone."""
    sources = set(dead)
    stack = list(dead)
    while stack:
        for each in stack.pop().all_input_nodes:
            if each not in sources:
                sources.add(each)
                stack.append(each)
    for node in reversed(list(graph.nodes)):
        if node in dead or (node in sources and node.op not in ("placeholder", "output") and _is_pure(node)):
            if not node.users:
                graph.erase_node(node)
            elif node in dead:
                raise EditError(f"`{node.name}` of a branch that would go is needed elsewhere")


def _is_pure(node: fx.Node) -> bool:
    """Whether nothing but its value would be missed."""
    return node.target not in GUARDS and not _is_in_place(node)


def _is_in_place(node: fx.Node) -> bool:
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.endswith("_") or name in _WRITERS or bool(node.kwargs.get("inplace"))
