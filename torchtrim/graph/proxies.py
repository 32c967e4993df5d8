"""The proxies that flow through a forward while it is read: they answer what Python must know, and record writes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx
from torch.fx.proxy import Attribute

from torchtrim.graph.reading import IN_PLACE_OPERATORS


class ReadingProxy(fx.Proxy):
    """A proxy that can say what Python must know: its truth, its number, its length."""

    tracer: Any

    def __getattr__(self, name: str) -> ReadingAttribute:
        return ReadingAttribute(self, name)

    def __getitem__(self, key: Any) -> Any:
        item = self.tracer.create_proxy("call_function", operator.getitem, (self, key), {})
        return self.tracer.unless_none(self.node, key, item)

    def __setitem__(self, key: Any, value: Any) -> None:
        self.tracer.create_proxy("call_function", operator.setitem, (self, key, value), {})

    def __len__(self) -> int:
        return int(self.tracer.concretise(self, "len"))

    def __index__(self) -> int:
        return int(self.tracer.concretise(self, "int"))

    def __int__(self) -> int:
        return int(self.tracer.concretise(self, "int"))

    def __float__(self) -> float:
        return float(self.tracer.concretise(self, "float"))

    def items(self) -> Any:
        """Pairs of a dict's keys and proxies of its values."""
        return [(key, operator.getitem(self, key)) for key in self.keys()]

    def values(self) -> Any:
        """Proxies of a dict's values."""
        return [operator.getitem(self, key) for key in self.keys()]


def _in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    def write(self: ReadingProxy, other: Any) -> Any:
        return self.tracer.record(function, (self, other), {})

    return write


# `y += 1` writes to y, and so to everything that shares its memory; fx would make it `y = y + 1`.
for _name in IN_PLACE_OPERATORS:
    setattr(ReadingProxy, f"__{_name}__", _in_place(getattr(operator, _name)))


class ReadingAttribute(Attribute, ReadingProxy):
    """An attribute of a proxy's value, such as its shape."""


def expression(node: fx.Node, depth: int = 4) -> str:
    """A short Python expression for what a node computes, for messages."""
    if node.op in ("placeholder", "get_attr"):
        return str(node.target).strip("*")
    if depth == 0:
        return "..."
    parts = [
        expression(a, depth - 1) if isinstance(a, fx.Node) else repr(a) for a in (*node.args, *node.kwargs.values())
    ]
    if node.target is getattr:
        return f"{parts[0]}.{node.args[1]}"
    if node.target is operator.getitem:
        return f"{parts[0]}[{parts[1]}]"
    if node.op == "call_method":
        return f"{parts[0]}.{node.target}({', '.join(parts[1:])})"
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name}({', '.join(parts)})"
