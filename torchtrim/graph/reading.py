"""What reading one module gives: its graph, and fake values of its nodes for those who ask."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from torchtrim.graph.copying import structural_copy
from torchtrim.graph.fakes import Fakes
from torchtrim.graph.guards import GUARDS
from torchtrim.graph.structure import map_leaves

# Names that a GraphModule keeps for itself: a module with such a child or weight cannot be opened.
RESERVED = (set(dir(fx.GraphModule)) - set(dir(nn.Module))) | {"graph", "code", "meta", "train_graph", "_graph"}


# What a forward raises on shapes without data, where it needs the data: its output, and all that follows, is unknown.
UNKNOWABLE = (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError)

# iadd beside add, iand beside and_: not invert, index and the like
IN_PLACE_OPERATORS = {
    name
    for name in dir(operator)
    if name.startswith("i") and any(hasattr(operator, plain) for plain in (name[1:], f"{name[1:]}_"))
}


def function_name(target: Any) -> str:
    """The name of a function or method, for addresses; `add` for `+=` too.

    Example:
        >>> function_name(torch.flatten), function_name(operator.iadd), function_name("view")
        ('flatten', 'add', 'view')
    """
    name = target if isinstance(target, str) else getattr(target, "__name__", type(target).__name__)
    return name[1:] if name in IN_PLACE_OPERATORS and getattr(operator, name) is target else name


@dataclass
class Evaluation:
    """One fake run, shared by all the modules of a reading: values at two batch sizes, worked out when asked for.

    It runs on a copy of its own, made when first needed: what a forward keeps of a fake run must not be met again.
    """

    model: nn.Module
    training: bool
    fake: Fakes
    user_hooks: bool = False
    running: bool = False

    @cached_property
    def twin(self) -> nn.Module:
        """The copy that is run."""
        return structural_copy(self.model, own_buffers=True, user_hooks=self.user_hooks).train(self.training)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Run real Python (not tracing) on fake tensors."""
        before, self.running = self.running, True
        try:
            with self.fake, torch.no_grad():
                yield
        finally:
            self.running = before


class Value:
    """A value that flows into a module while it is read; its fake values are worked out only when asked for."""

    def __init__(self, evaluate: Callable[[], tuple[Any, Any]]) -> None:
        self.evaluate = evaluate


@dataclass(eq=False)
class Reading:
    """One call of one module in one mode: the graph of its own forward, and the readings of the children it calls.

    Attributes:
        path: The module's path; `""` is the model itself.
        module: The module.
        graph: Its forward; a child's call is one `call_module` node.
        children: The readings of the children that were opened, by their node in `graph`.
        broken: Why the graph ends before the forward does; `None` for a whole one.
    """

    path: str
    module: nn.Module
    graph: fx.Graph
    evaluation: Evaluation
    children: dict[fx.Node, Reading] = field(default_factory=dict)
    given: dict[fx.Node, Any] = field(default_factory=dict)
    known: dict[fx.Node, tuple[Any, Any]] = field(default_factory=dict)
    guarded: set[tuple[fx.Node, str]] = field(default_factory=set)
    proxies: dict[str, Any] = field(default_factory=dict)
    broken: str | None = None

    def value_of(self, node: fx.Node) -> Value:
        """The value that a node stands for, to hand to the module that it feeds."""
        return Value(lambda: self.evaluate(node))

    def evaluate(self, node: fx.Node) -> tuple[Any, Any]:
        """The fake values of a node at the two batch sizes."""
        if node not in self.known:
            with self.evaluation.active():
                for earlier in self.graph.nodes:
                    if earlier not in self.known:
                        self.known[earlier] = (self._run(earlier, 0), self._run(earlier, 1))
                    if earlier is node:
                        break
        return self.known[node]

    @property
    def _twin(self) -> nn.Module:
        return self.evaluation.twin.get_submodule(self.path)

    def _run(self, node: fx.Node, which: int) -> Any:
        if node.op == "placeholder":
            return map_leaves(self.given[node], Value, lambda value: value.evaluate()[which])
        args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, lambda other: self.known[other][which])
        if node.op == "get_attr":
            return functools.reduce(getattr, str(node.target).split("."), self._twin)
        if node.op == "call_module":
            return self._twin.get_submodule(str(node.target))(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if node.op == "output" or node.target in GUARDS:
            return None
        return node.target(*args, **kwargs) if callable(node.target) else None


def same_graph(left: fx.Graph, right: fx.Graph) -> bool:
    """Whether two graphs make the same calls with the same arguments."""
    if len(left.nodes) != len(right.nodes):
        return False
    pair: dict[fx.Node, fx.Node] = {}
    for one, other in zip(left.nodes, right.nodes, strict=True):
        pair[one] = other
        if one.op != other.op or (one.target is not other.target and one.target != other.target):
            return False
        if not _same((one.args, one.kwargs), (other.args, other.kwargs), pair):
            return False
    return True


def _same(one: Any, other: Any, pair: dict[fx.Node, fx.Node]) -> bool:
    if isinstance(one, fx.Node):
        return pair.get(one) is other
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_same(a, b, pair) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same(value, other[key], pair) for key, value in one.items())
    if isinstance(one, slice):
        return _same((one.start, one.stop, one.step), (other.start, other.stop, other.step), pair)
    return one is other or bool(one == other) or (one != one and other != other)
