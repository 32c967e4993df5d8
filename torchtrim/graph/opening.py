"""Open one module: read its own forward as a graph, its children closed, once in eval and once in train mode.

`torch.fx` does the reading. What it cannot follow by itself is followed with fake tensors (shapes without data), and
only where Python asks: a branch on a shape, a loop over a list. Each such answer becomes a guard in the graph.
"""

from __future__ import annotations

import functools
import inspect
import math
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.node import base_types

from torchtrim.errors import TraceError
from torchtrim.graph.guards import concrete, expect, expect_argument, expect_given, expect_structure, structure
from torchtrim.graph.interception import intercepted, isinstance_of_proxies
from torchtrim.graph.leftovers import forget_proxies, kept_state, python_random
from torchtrim.graph.proxies import ReadingProxy, expression
from torchtrim.graph.reading import RESERVED, UNKNOWABLE, Evaluation, Reading, Value
from torchtrim.graph.structure import leaves, map_leaves
from torchtrim.graph.writable import unwritable


def read_forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    wanted: Callable[[str, nn.Module], bool],
    closed: dict[str, str],
    evaluation: Evaluation,
    enough: Callable[[fx.Graph], bool] | None = None,
    lenient: list[str] | None = None,
) -> Reading:
    """Read a model's forward, called with `args` and `kwargs` (in which a `Value` stands for each tensor).

    The model must be one that may be changed: a copy, never the user's.

    Args:
        wanted: Which children to open, by path and module.
        closed: Children that stay closed, with the reason; those that turn out to be unreadable are added.
        evaluation: The fake run to ask; its mode is the one that is read.
        enough: Whether the graph of the model's own forward will do as far as it could be followed.
        lenient: What the graph of the model's own forward cannot hold goes here, instead of being refused: for those
            who only look at it.

    Raises:
        TraceError: With the reason that the model's own forward cannot be read.
    """
    modules = dict(model.named_modules())
    modes = [module.training for module in modules.values()]
    for module in modules.values():
        module.__dict__["training"] = evaluation.training
    drawn = python_random()
    try:
        reading = _Tracer((args, kwargs), wanted, closed, evaluation, lenient).read(model, enough)
        if python_random() != drawn:  # some forward drew: read again, and look at each
            tracer = _Tracer((args, kwargs), wanted, closed, evaluation, lenient, watch_random=True)
            reading = tracer.read(model, enough)
    finally:
        written = [path for path, module in modules.items() if forget_proxies(module)]
        for module, mode in zip(modules.values(), modes, strict=True):
            module.__dict__["training"] = mode
    for path in written:
        # A forward kept state in a module other than its own: the one around it must be the one that did.
        parent = path.rpartition(".")[0]
        if not parent:
            raise TraceError(f"its forward keeps state in {path!r}", path="the model")
        closed.setdefault(parent, f"its forward keeps state in {path!r}")
    return reading


@contextmanager
def _readable(path: str | None = None) -> Iterator[None]:
    """Whatever the user's forward raises while it is traced says that it cannot be read."""
    try:
        yield
    except TraceError as error:
        if path is None or error.path is not None:
            raise
        raise TraceError(error.message, path=path, hint=_ELSEWHERE) from error
    except Exception as error:
        hint = None if path is None else _ELSEWHERE
        raise TraceError(f"its forward cannot be followed: {_one_line(error)}", path=path, hint=hint) from error


_ELSEWHERE = "work on a module inside it, such as tt.cut(model.encoder, ...), or cut before that place"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


class _Tracer(fx.Tracer):
    """Reads the forward of a model and, inside it, those of the children that are wanted: one graph each."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        wanted: Callable[[str, nn.Module], bool],
        closed: dict[str, str],
        evaluation: Evaluation,
        lenient: list[str] | None = None,
        watch_random: bool = False,
    ) -> None:
        super().__init__(autowrap_modules=(math,))
        self.lenient = lenient
        self.watch_random = watch_random
        self.call = call
        self.wanted = wanted
        self.closed = closed
        self.evaluation = evaluation
        self.reading: Reading
        self.unfaithful: str | None = "it was not read"

    def read(self, model: nn.Module, enough: Callable[[fx.Graph], bool] | None) -> Reading:
        """Read the model."""
        if "forward" in model.__dict__:
            raise TraceError("its forward is set on the instance", path="the model")
        with intercepted(self), _readable("the model"):
            try:
                self.trace(model)
            except Exception as error:
                # As far as it got the graph is right, unless something was seen that makes all of it wrong.
                if enough is None or self.unfaithful is not None or not enough(self.reading.graph):
                    raise
                self.reading.broken = _one_line(error)
                self.reading.graph.output(None)
        return self.reading

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        def run() -> Any:
            self.reading = Reading("", self.root, self.graph, self.evaluation)
            return self._run_forward(*self.call)

        return run, []

    def _run_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the current module's forward on placeholders of its graph."""
        module = self.reading.module
        taken = RESERVED.intersection((*module._modules, *module._parameters, *module._buffers))
        if taken:
            raise TraceError(f"it has a member named {min(taken)!r}, a name that torch.fx keeps for itself")
        forward = type(module).forward
        positional, named = self._placeholders(_signature(forward), args, kwargs)
        if forward is nn.Sequential.forward:  # half of all modules: what it does is known
            (value,) = (*positional, *named.values())
            for child in cast(nn.Sequential, module):
                value = self.call_module(child, forward, (value,), {})
            return value
        before = dict(module.__dict__)
        members = {name: dict(before[name]) for name in ("_parameters", "_buffers", "_modules")}
        drawn = python_random() if self.watch_random else None
        unfaithful: str | None = None
        try:
            with isinstance_of_proxies(forward, self):
                result = forward(module, *positional, **named)
        finally:
            if self.watch_random and python_random() != drawn:
                unfaithful = "its forward draws random numbers from Python or NumPy"
            kept = kept_state(module, before, members)
            if kept is not None:
                unfaithful = f"its forward keeps state in the attribute {kept!r}"
            self.unfaithful = unfaithful
            module.__dict__.clear()
            module.__dict__.update(before)
            for name, held in members.items():
                before[name].clear()
                before[name].update(held)
            forget_proxies(module)
        if unfaithful is not None:
            raise TraceError(unfaithful)
        return result

    def _read_child(self, path: str, module: nn.Module, node: fx.Node) -> None:
        """Read a child as it is called at `node`; where that fails it is noted as closed."""
        outer = self.reading
        states = (random.getstate(), np.random.get_state()) if self.watch_random else None
        args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, outer.value_of)
        self.graph, self.root = fx.Graph(tracer_cls=type(self)), module
        self.reading = Reading(path, module, self.graph, self.evaluation)
        try:
            with _readable():
                if "forward" in module.__dict__:
                    raise TraceError("its forward is set on the instance")
                self.create_node("output", "output", (self.create_arg(self._run_forward(args, kwargs)),), {})
            outer.children[node] = self.reading
        except TraceError as error:
            self.closed[path] = error.message
            if states is not None:  # what this one drew is not to be laid at its parent's door
                random.setstate(states[0])
                np.random.set_state(states[1])
        finally:
            self.reading, self.graph, self.root = outer, outer.graph, outer.module

    def _placeholders(
        self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        _, *parameters = signature.parameters.values()
        bound = signature.bind(None, *args, **kwargs).arguments
        spread = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        several = spread
        positional: list[Any] = []
        named: dict[str, Any] = {}
        optional = False
        for parameter in parameters:
            given = parameter.name in bound
            value = bound.get(parameter.name, parameter.default)
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += self._spread(f"*{parameter.name}", value if given else ())
            elif parameter.kind is parameter.VAR_KEYWORD:
                named |= self._spread(f"**{parameter.name}", value if given else {})
            else:
                if parameter.kind is parameter.KEYWORD_ONLY and not spread:
                    self._spread("*_", ())  # fx knows no bare `*`: what comes after this can be given by name only
                    spread = True
                optional = optional or parameter.default is not parameter.empty
                argument = self._placeholder(parameter, value, given, optional)
                if parameter.kind is parameter.POSITIONAL_ONLY or (
                    several and parameter.kind is not parameter.KEYWORD_ONLY
                ):
                    positional.append(argument)
                else:
                    named[parameter.name] = argument
        return positional, named

    def _spread(self, target: str, value: Any) -> Any:
        proxy = self.create_proxy("placeholder", target, (), {})
        self.reading.given[proxy.node] = value
        if not self.reading.path or not value:
            self.record(expect_structure, (proxy, structure(value), target.strip("*")), {})
        return _unpacked(value, proxy)

    def _placeholder(self, parameter: inspect.Parameter, value: Any, given: bool, optional: bool) -> Any:
        default: tuple[Any, ...] = ()
        if optional:
            simple = parameter.default is None or isinstance(parameter.default, base_types)
            if not simple and not given:
                return value  # left out of the signature: whoever passes it gets Python's own TypeError
            default = (parameter.default if simple else None,)
        proxy = self.create_proxy("placeholder", parameter.name, default, {})
        self.reading.given[proxy.node] = value
        if leaves(value, Value):
            if parameter.default is None:
                self.create_proxy("call_function", expect_given, (proxy, self.reading.path, parameter.name), {})
            if not self.reading.path and not isinstance(value, Value):
                self.record(expect_structure, (proxy, structure(value), parameter.name), {})
            return _unpacked(value, proxy)
        if value is None or isinstance(value, base_types):
            where = self.reading.path
            self.create_proxy("call_function", expect_argument, (proxy, value, where, parameter.name), {})
        return value

    # What is recorded

    def create_node(self, kind: str, target: Any, args: Any, kwargs: Any, *more: Any, **named: Any) -> fx.Node:
        reason = unwritable(kind, target, kwargs)
        if reason is not None:
            raise TraceError(reason)
        return super().create_node(kind, target, args, kwargs, *more, **named)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.evaluation.running:
            return forward(*args, **kwargs)
        relative = self._path_in_frame(m)
        proxy = self.create_proxy("call_module", relative, args, kwargs)
        path = (self.submodule_paths or {})[m]
        if path not in self.closed and self.wanted(path, m):
            self._read_child(path, m, proxy.node)
        return proxy

    # What is intercepted

    def idle(self) -> bool:
        return self.evaluation.running

    def record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.create_proxy("call_function", function, args, kwargs)

    def refuse(self, reason: str) -> None:
        if self.lenient is None or self.reading.path:
            raise TraceError(reason)
        self.lenient.append(reason)

    def members(self, module: nn.Module, named: Iterator[tuple[str, Any]]) -> Iterator[Any]:
        prefix = "" if module is self.reading.module else f"{self._path_in_frame(module)}."
        for name, _ in named:
            yield self.create_proxy("get_attr", f"{prefix}{name}", (), {})

    def is_instance(self, value: Any, kinds: Any) -> bool:
        return isinstance(self.reading.evaluate(value.node)[0], kinds)

    def _path_in_frame(self, module: nn.Module) -> str:
        path: str | None = (self.submodule_paths or {}).get(module)
        prefix = f"{self.reading.path}." if self.reading.path else ""
        if path is not None and path.startswith(prefix):
            return path[len(prefix) :]
        for name, child in self.reading.module.named_modules():
            if child is module:
                return str(name)
        raise TraceError(f"its forward calls a {type(module).__name__} that is none of its submodules")

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if self.evaluation.running:
            return attr_val
        return super().getattr(attr, attr_val, self.reading.proxies)

    def proxy(self, node: fx.Node) -> ReadingProxy:
        return ReadingProxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if a is None or type(a) in (int, str, float, bool):
            return a
        if is_dataclass(a) and not isinstance(a, type):
            # Before fx sees a dict in it: the outputs of transformers are both, and must keep their class.
            values = {each.name: self.create_arg(getattr(a, each.name)) for each in fields(a)}
            return self.create_node("call_function", type(a), (), values)
        if isinstance(a, torch.Tensor) and not isinstance(a, nn.Parameter):
            for name, buffer in self.reading.module.named_buffers():
                if a is buffer:
                    return self.create_node("get_attr", name, (), {})
            for name, module in self.reading.module.named_modules():
                for attribute, value in module.__dict__.items():
                    if a is value:
                        return self.create_node("get_attr", f"{name}.{attribute}".lstrip("."), (), {})
            raise TraceError("its forward uses a tensor that is no attribute of the model")
        return super().create_arg(a)

    # What Python asks while tracing

    def to_bool(self, obj: Any) -> bool:
        return bool(self.concretise(obj, "bool"))

    def iter(self, obj: Any) -> Iterator[Any]:
        try:
            return iter([self.unless_none(obj.node, index, item) for index, item in enumerate(super().iter(obj))])
        except fx.proxy.TraceError:
            first, _ = self.reading.evaluate(obj.node)
        if isinstance(first, Mapping):
            return iter(self.keys(obj))
        return iter([obj[index] for index in range(len(obj))])

    def unless_none(self, node: fx.Node, key: Any, item: Any) -> Any:
        """An item of what a child returned: `None` where it is, for code that asks `if mask is not None`."""
        if node.op == "call_module" and isinstance(key, int):
            with suppress(*UNKNOWABLE):
                if self.reading.evaluate(node)[0][key] is None:
                    return None
        return item

    def keys(self, obj: Any) -> Any:
        first, second = self.reading.evaluate(obj.node)
        if not isinstance(first, Mapping) or list(first) != list(second):
            raise TraceError("its forward asks for the keys of something that is no dict")
        return list(first)

    def concretise(self, proxy: fx.Proxy, kind: str) -> Any:
        """What Python gets for a proxy's truth, number or length; a guard in the graph holds later inputs to it."""
        node = proxy.node
        first, second = self.reading.evaluate(node)
        try:
            with self.evaluation.active():
                answers = concrete(first, kind), concrete(second, kind)
        except DataDependentOutputException as error:
            raise TraceError(f"its forward branches on the values of its data: on `{expression(node)}`") from error
        if answers[0] != answers[1]:
            raise TraceError(f"its forward branches on the batch size: on `{expression(node)}`")
        if _can_change(node) and (node, kind) not in self.reading.guarded:
            self.reading.guarded.add((node, kind))
            where = (self.reading.path, expression(node))
            self.create_proxy("call_function", expect, (proxy, kind, answers[0], *where), {})
        return answers[0]


@functools.lru_cache(maxsize=4096)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _can_change(node: fx.Node) -> bool:
    """Whether a node depends on an input, or on a weight, which may get another type or size."""
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op in ("placeholder", "get_attr"):
            return True
        if current not in seen:
            seen.add(current)
            stack += current.all_input_nodes
    return False


def _unpacked(value: Any, proxy: Any) -> Any:
    """The structure with each `Value` in it replaced by the item of `proxy` that holds it."""
    if isinstance(value, Value):
        return proxy
    if not leaves(value, Value):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_unpacked(item, proxy[index]) for index, item in enumerate(value)))
    if isinstance(value, (tuple, list)):
        return type(value)(_unpacked(item, proxy[index]) for index, item in enumerate(value))
    return {key: _unpacked(item, proxy[key]) for key, item in value.items()}
