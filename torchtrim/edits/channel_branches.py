"""Take out a branch of which every channel goes: a concatenation keeps its other parts, a sum the other summand."""

from __future__ import annotations

import operator

import torch
from torch import fx, nn

from torchtrim.edits.channel_check import dead_call
from torchtrim.edits.channel_trace import Flow
from torchtrim.edits.rewire import Room, open_room
from torchtrim.edits.work import Work
from torchtrim.errors import EditError
from torchtrim.graph.guards import GUARDS

_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_CATS = (torch.cat, torch.concat, torch.concatenate)


def take_out(work: Work, flow: Flow) -> None:
    """Take the dead branches of `flow` out of `work.model`.

    Raises:
        EditError: A module's forward cannot be opened, or a branch is joined in a way that cannot be taken apart.
    """
    dead = {path for run in flow.runs for path, calls in run.calls.items() if dead_call(calls)}
    for run in flow.runs:
        for path, calls in run.calls.items():
            kinds = {label.dead for call in calls for _, label in call.outputs}
            if len(kinds) > 1:
                raise EditError("it returns both what would go and what stays", path=path, hint="leave a channel")
    modules = {id(module): path for path, module in work.model.named_modules()}
    for path in dict.fromkeys(joint for run in flow.runs for joint in run.joints):
        room = open_room(work, path)
        joined = [_prune(room, graph, dead, modules) for graph in room.graphs]
        if not any(joined):
            raise EditError(
                "the branch is joined in a module that is given it", path=path or "the model", hint="leave a channel"
            )
        room.close(work)


def _prune(room: Room, graph: fx.Graph, dead_paths: set[str], modules: dict[int, str]) -> bool:
    """Take the dead nodes out of one graph; returns whether a joint was changed."""
    dead: dict[fx.Node, None] = {}
    joined = False
    for node in list(graph.nodes):
        if node.op == "call_module":
            child: nn.Module = room.module.get_submodule(str(node.target))
            if modules[id(child)] in dead_paths:
                dead[node] = None
            continue
        lost = [each for each in node.all_input_nodes if each in dead]
        if not lost:
            continue
        if len(lost) == len(node.all_input_nodes) and node.op != "output":
            dead[node] = None
        elif node.op == "call_function" and node.target in _CATS:
            _shorten(node, dead)
            joined = True
        elif node.target in _SUMS and len(node.all_input_nodes) == 2:
            (other,) = (each for each in node.all_input_nodes if each not in dead)
            node.replace_all_uses_with(other)
            dead[node] = None
            joined = True
        else:
            raise EditError(
                f"every channel of a branch would go, and `{node.name}` needs it", path=room.path or "the model"
            )
    _erase(graph, dead)
    return joined


def _shorten(node: fx.Node, dead: dict[fx.Node, None]) -> None:
    """Concatenate what is left."""
    parts = node.args[0] if node.args else node.kwargs["tensors"]
    if not isinstance(parts, (tuple, list)):
        raise EditError("what is concatenated is not a list of values", found=str(parts))
    kept = [part for part in parts if part not in dead]
    if len(kept) == 1:
        node.replace_all_uses_with(kept[0])
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
    name = str(node.target)
    in_place = node.op != "call_module" and (name.endswith("_") or "iadd" in name or node.kwargs.get("inplace"))
    return node.target not in GUARDS and not in_place
