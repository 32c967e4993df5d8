"""Which nodes of a graph must stay, so that some values in it can be computed."""

from __future__ import annotations

import inspect
import operator
from typing import Any

from torch import fx, nn

from torchtrim.errors import EditError
from torchtrim.graph.guards import GUARDS, expect_argument, expect_given, expect_structure
from torchtrim.graph.reader import Frame, Site, pair_nodes
from torchtrim.graph.reading import IN_PLACE_OPERATORS
from torchtrim.graph.structure import leaves


def plans_of(frame: Frame, steps: list[tuple[Site, ...]], own: bool) -> list[Plan]:
    """What to keep of a frame's graph, or of both its graphs where they differ.

    Args:
        frame: The frame.
        steps: The calls that lead to each value, from this frame inwards.
        own: Whether the module's own output is to be computed too.
    """
    inner: dict[fx.Node, list[tuple[Site, ...]]] = {}
    for step in dict.fromkeys(steps):
        if len(step) > 1:
            inner.setdefault(step[0].node, []).append(step)
    direct = [step[0].node for step in steps if len(step) == 1]
    plans = [Plan(frame.eval.graph, frame.module, direct, inner, own)]
    if frame.differs:
        pairs = pair_nodes(frame)
        missing = next((step for step in steps if step[0].node not in pairs), None)
        if missing is not None:
            raise EditError("a value to cut after is not computed in train mode", path=missing[-1].name)
        there = {pairs[node]: value for node, value in inner.items()}
        plans.append(Plan(frame.train.graph, frame.module, [pairs[node] for node in direct], there, own, pairs))
    return plans


def shortens(frame: Frame, steps: list[tuple[Site, ...]], own: bool) -> bool:
    """Whether a module is an `nn.Sequential` that need not be opened, only made shorter: all up to the value stays."""
    return len(set(steps)) == 1 and not own and type(frame.module).forward is nn.Sequential.forward


class Plan:
    """Which nodes of one graph are kept.

    Attributes:
        kept: All that stay.
        values: Those whose own value is used (a child that is only passed through on the way inwards is not).
        shapes: For each child that values lie in, what is taken from it at each of its calls.
        own_of: Whether such a child returns its own output too.
    """

    def __init__(
        self,
        graph: fx.Graph,
        module: nn.Module,
        direct: list[fx.Node],
        inner: dict[fx.Node, list[tuple[Site, ...]]],
        own: bool,
        counterparts: dict[fx.Node, fx.Node] | None = None,
    ) -> None:
        self._pruned: dict[fx.Node, tuple[tuple[Any, ...], dict[str, Any]]] = {}
        self.shapes: dict[str, list[set[str]]] = {}
        self.own_of: dict[str, bool] = {}
        self.counterparts = counterparts
        self.graph = graph
        self.module = module
        self.direct = direct
        self.inner = inner
        order = {node: index for index, node in enumerate(graph.nodes)}
        (output,) = [node for node in graph.nodes if node.op == "output"]
        roots = [*direct, *inner, *([output] if own else [])]
        last = max(order[node] for node in roots)
        self.kept: set[fx.Node] = set(inner)
        self.values: set[fx.Node] = set()
        for node in direct:
            self._need(node)
        if own:
            for source in output.all_input_nodes:
                self._need(source)
        for node in sorted(inner, key=order.__getitem__, reverse=True):
            if node not in self.values:
                self._pruned[node] = _without_unused(node, inner[node])
                for source in leaves(self._pruned[node], fx.Node):
                    self._need(source)
        for node in graph.nodes:
            if node.op == "placeholder":
                self.kept.add(node)
        self._keep_effects(order, last)

    def arguments(self, node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a kept node, with `None` for what a shortened child has no use for any more."""
        if node in self._pruned and node not in self.values:
            return self._pruned[node]
        return node.args, node.kwargs

    def used_inputs(self) -> dict[str, set[Any] | None]:
        """The arguments that kept nodes use: the items of each, or `None` for all of it."""
        found: dict[str, set[Any] | None] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                parts: set[Any] | None = set()
                for user in node.users:
                    if user not in self.kept or user.target in (expect_argument, expect_structure, expect_given):
                        continue
                    if node not in leaves(self.arguments(user), fx.Node):
                        continue
                    plain = user.target is operator.getitem and isinstance(user.args[1], (int, str))
                    parts = _ALL if parts is _ALL or not plain else parts | {user.args[1]}
                found[str(node.target).strip("*")] = parts
        return found

    def here(self, node: fx.Node) -> fx.Node:
        """The node of this graph for one of the eval graph."""
        return node if self.counterparts is None else self.counterparts[node]

    def _need(self, node: fx.Node) -> None:
        stack = [node]
        while stack:
            current = stack.pop()
            if current in self.values:
                continue
            self.values.add(current)
            self.kept.add(current)
            stack += current.all_input_nodes

    def _keep_effects(self, order: dict[fx.Node, int], last: int) -> None:
        """Keep what has an effect on kept values: in-place operations, guards and assertions."""
        changed = True
        while changed:
            changed = False
            for node in self.graph.nodes:
                if node in self.kept or order[node] > last:
                    continue
                sources = _may_alias(node, self.module)
                if node.target in (expect_argument, expect_structure):
                    effect = True
                elif node.target in GUARDS or getattr(node.target, "__name__", "") == "_assert":
                    # a check of values that are all there anyway; not a reason to compute more
                    effect = all(each in self.values for each in sources if each.op in ("call_module", "placeholder"))
                elif _writes(node, self.module):
                    effect = any(each in self.values or each.op in ("placeholder", "get_attr") for each in sources)
                else:
                    effect = False
                if effect:
                    changed = True
                    self.kept.add(node)
                    for source in node.all_input_nodes:
                        self._need(source)


_ALL = None  # every part of an argument is used


def _without_unused(node: fx.Node, steps: list[tuple[Site, ...]]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a child's call, with `None` for those, or those items, that its shortened graph does not use."""
    frame = steps[0][0].inside
    inner = [step[1:] for step in steps]
    if frame is None or shortens(frame, inner, own=False):
        return node.args, node.kwargs
    used: dict[str, set[Any] | None] = {}
    for plan in plans_of(frame, inner, own=False):
        for name, parts in plan.used_inputs().items():
            before = used.get(name, set())
            used[name] = _ALL if parts is _ALL or before is _ALL else before | parts
    bound = inspect.signature(type(frame.module).forward).bind(None, *node.args, **node.kwargs)
    for name, value in list(bound.arguments.items())[1:]:
        bound.arguments[name] = _only(value, used.get(name, _ALL))
    return bound.args[1:], bound.kwargs


def _only(value: Any, parts: set[Any] | None) -> Any:
    if parts is _ALL or not leaves(value, fx.Node):
        return value
    if isinstance(value, (tuple, list)) and not hasattr(value, "_fields"):
        return type(value)([item if index in parts else None for index, item in enumerate(value)])
    if isinstance(value, dict):
        return {key: item if key in parts else None for key, item in value.items()}
    return value if parts else None


def _may_alias(node: fx.Node, module: nn.Module) -> set[fx.Node]:
    """The values that a node's inputs may be, or be views of.

    A layer without weights (`Identity`, `Flatten`, an in-place ReLU) may hand on what it gets.
    """
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            hands_on = current.op in ("call_function", "call_method")
            if current.op == "call_module":
                hands_on = next(module.get_submodule(str(current.target)).parameters(), None) is None
            if hands_on:
                stack += current.all_input_nodes
    return found


def _writes(node: fx.Node, module: nn.Module) -> bool:
    """Whether a call writes to one of its arguments."""
    if node.op == "call_module":
        return getattr(module.get_submodule(str(node.target)), "inplace", False) is True
    if node.op == "call_method":
        return str(node.target).endswith("_") and not str(node.target).endswith("__")
    if node.op != "call_function":
        return False
    if node.kwargs.get("inplace") is True or node.kwargs.get("out") is not None:
        return True
    name = getattr(node.target, "__name__", "")
    if node.target is operator.setitem or (name.endswith("_") and not name.startswith("_")):
        return True
    if name in IN_PLACE_OPERATORS and getattr(operator, name) is node.target:
        return True
    return any(argument is True for argument in node.args) and _inplace_argument(node)


def _inplace_argument(node: fx.Node) -> bool:
    if not callable(node.target):
        return False
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except (TypeError, ValueError):
        return False  # a builtin without a signature takes no `inplace`
    return bound.arguments.get("inplace") is True
