"""Open one module: read its own forward as a graph, its children closed, once in eval and once in train mode.

`torch.fx` does the reading. What it cannot follow by itself is followed with fake tensors (shapes without data), and
only where Python asks: a branch on a shape, a loop over a list. Each such answer becomes a guard in the graph.
"""

from __future__ import annotations

import functools
import inspect
import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.fx.node import base_types
from torch.fx.proxy import Attribute

from torchtrim.errors import TraceError
from torchtrim.graph.guards import concrete, expect, expect_argument
from torchtrim.graph.reading import Evaluation, Reading, Value
from torchtrim.graph.structure import leaves, map_leaves

# Called during a forward these make a tensor from nothing. They are recorded as calls: a random tensor must be drawn at
# each forward, and a constant must follow the model to its device without becoming a new state_dict key.
# fmt: off
_FACTORIES = [
    "arange", "as_tensor", "bernoulli", "empty", "empty_like", "eye", "from_numpy", "full", "full_like",
    "hann_window", "linspace", "logspace", "meshgrid", "multinomial", "normal", "ones", "ones_like", "rand",
    "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm", "tensor", "tril_indices",
    "triu_indices", "zeros", "zeros_like",
]
# fmt: on


def read_forward(
    model: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    wanted: Callable[[str, nn.Module], bool],
    closed: dict[str, str],
    evaluation: Evaluation,
    training: bool,
) -> Reading:
    """Read a model's forward, called with `args` and `kwargs` (in which a `Value` stands for each tensor).

    The model must be one that may be changed: a copy, never the user's.

    Args:
        wanted: Which children to open, by path and module.
        closed: Children that stay closed, with the reason; those that turn out to be unreadable are added.
        evaluation: The fake run to ask.
        training: The mode to read in.

    Raises:
        TraceError: With the reason that the model's own forward cannot be read.
    """
    modules = dict(model.named_modules())
    modes = [module.training for module in modules.values()]
    for module in modules.values():
        module.__dict__["training"] = training
    try:
        reading = _Tracer((args, kwargs), wanted, closed, evaluation).read(model)
    finally:
        written = [path for path, module in modules.items() if _forget_proxies(module)]
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
    except TraceError:
        raise
    except Exception as error:
        raise TraceError(f"its forward cannot be followed: {_one_line(error)}", path=path) from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."


def _forget_proxies(module: nn.Module) -> bool:
    """Take out what a traced forward left in a module's attributes; returns whether there was anything."""
    held = [name for name, value in module.__dict__.items() if _holds_proxy(value)]
    for name in held:
        value = module.__dict__[name]
        if isinstance(value, dict):
            for key in [key for key, item in value.items() if isinstance(item, fx.Proxy)]:
                del value[key]
        elif isinstance(value, list):
            value[:] = [item for item in value if not isinstance(item, fx.Proxy)]
        else:
            del module.__dict__[name]
    return bool(held)


def _kept_state(module: nn.Module, before: dict[str, Any]) -> str | None:
    """The attribute in which a forward kept something, if it did."""
    for name, value in module.__dict__.items():
        if before.get(name, module) is not value or _holds_proxy(value):
            return name
    return None


def _holds_proxy(value: Any) -> bool:
    kind = type(value)
    if kind is dict or kind is OrderedDict or kind is list:
        return bool(value) and any(isinstance(item, fx.Proxy) for item in (value if kind is list else value.values()))
    return isinstance(value, fx.Proxy)


class _Proxy(fx.Proxy):
    """A proxy that can say what Python must know: its truth, its number, its length."""

    tracer: _Tracer

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)

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


class _Attribute(Attribute, _Proxy):
    pass


class _Tracer(fx.Tracer):
    """Reads the forward of a model and, inside it, those of the children that are wanted: one graph each."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        call: tuple[tuple[Any, ...], dict[str, Any]],
        wanted: Callable[[str, nn.Module], bool],
        closed: dict[str, str],
        evaluation: Evaluation,
    ) -> None:
        super().__init__(autowrap_modules=(math,))
        self.call = call
        self.wanted = wanted
        self.closed = closed
        self.evaluation = evaluation
        self.reading: Reading

    def read(self, model: nn.Module) -> Reading:
        """Read the model."""
        if "forward" in model.__dict__:
            raise TraceError("its forward is set on the instance", path="the model")
        with self._recorded_factories(), _readable("the model"):
            self.trace(model)
        return self.reading

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> Any:
        def run() -> Any:
            self.reading = Reading("", self.root, self.graph, self.evaluation)
            return self._run_forward(*self.call)

        return run, []

    def _run_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the current module's forward on placeholders of its graph."""
        module, path = self.reading.module, self.reading.path
        before = dict(module.__dict__)
        forward = type(module).forward
        positional, named = self._placeholders(_signature(forward), args, kwargs)
        try:
            result = forward(module, *positional, **named)
            kept = _kept_state(module, before)
        finally:
            _forget_proxies(module)
            module.__dict__.clear()
            module.__dict__.update(before)
        if kept is not None:
            raise TraceError(f"its forward keeps state in the attribute {kept!r}", path=path or "the model")
        return result

    def _read_child(self, path: str, module: nn.Module, node: fx.Node) -> None:
        """Read a child as it is called at `node`; where that fails it is noted as closed."""
        outer = self.reading
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
        finally:
            self.reading, self.graph, self.root = outer, outer.graph, outer.module

    def _placeholders(
        self, signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[Any], dict[str, Any]]:
        _, *parameters = signature.parameters.values()
        bound = signature.bind(None, *args, **kwargs).arguments
        spread = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        positional: list[Any] = []
        named: dict[str, Any] = {}
        optional = False
        for parameter in parameters:
            given = parameter.name in bound
            value = bound.get(parameter.name, parameter.default)
            if parameter.kind is parameter.VAR_POSITIONAL:
                positional += self._spread(f"*{parameter.name}", value) if given else []
            elif parameter.kind is parameter.VAR_KEYWORD:
                named |= self._spread(f"**{parameter.name}", value) if given else {}
            else:
                optional = optional or parameter.default is not parameter.empty
                argument = self._placeholder(parameter, value, given, optional)
                if parameter.kind is parameter.POSITIONAL_ONLY or (
                    spread and parameter.kind is not parameter.KEYWORD_ONLY
                ):
                    positional.append(argument)
                else:
                    named[parameter.name] = argument
        return positional, named

    def _spread(self, target: str, value: Any) -> Any:
        proxy = self.create_proxy("placeholder", target, (), {})
        self.reading.given[proxy.node] = value
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
            return _unpacked(value, proxy)
        if value is None or isinstance(value, base_types):
            where = self.reading.path
            self.create_proxy("call_function", expect_argument, (proxy, value, where, parameter.name), {})
        return value

    # What is recorded

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if self.evaluation.running:
            return forward(*args, **kwargs)
        relative = self._path_in_frame(m)
        proxy = self.create_proxy("call_module", relative, args, kwargs)
        path = f"{self.reading.path}.{relative}".lstrip(".")
        if path not in self.closed and self.wanted(path, m):
            self._read_child(path, m, proxy.node)
        return proxy

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

    def proxy(self, node: fx.Node) -> _Proxy:
        return _Proxy(node, self)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, fx.Proxy):
            return a.node
        if a is None or type(a) in (int, str, float, bool):
            return a
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

    @contextmanager
    def _recorded_factories(self) -> Iterator[None]:
        originals = {name: getattr(torch, name) for name in _FACTORIES}
        try:
            for name, factory in originals.items():
                setattr(torch, name, self._recorded(factory))
            yield
        finally:
            for name, factory in originals.items():
                setattr(torch, name, factory)

    def _recorded(self, factory: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any, **kwargs: Any) -> Any:
            if self.evaluation.running:
                return factory(*args, **kwargs)
            return self.create_proxy("call_function", factory, args, kwargs)

        return record

    # What Python asks while tracing

    def to_bool(self, obj: Any) -> bool:
        return bool(self.concretise(obj, "bool"))

    def iter(self, obj: Any) -> Iterator[Any]:
        try:
            return super().iter(obj)
        except fx.proxy.TraceError:
            first, _ = self.reading.evaluate(obj.node)
        if isinstance(first, Mapping):
            return iter(self.keys(obj))
        return iter([obj[index] for index in range(len(obj))])

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
            raise TraceError("its forward branches on the values of its data") from error
        if answers[0] != answers[1]:
            raise TraceError("its forward branches on the batch size")
        if _depends_on_input(node) and (node, kind) not in self.reading.guarded:
            self.reading.guarded.add((node, kind))
            where = (self.reading.path, _expression(node))
            self.create_proxy("call_function", expect, (proxy, kind, answers[0], *where), {})
        return answers[0]


@functools.lru_cache(maxsize=4096)
def _signature(forward: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(forward)


def _depends_on_input(node: fx.Node) -> bool:
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op == "placeholder":
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


def _expression(node: fx.Node, depth: int = 4) -> str:
    """A short Python expression for what a node computes, for messages."""
    if node.op in ("placeholder", "get_attr"):
        return str(node.target).strip("*")
    if depth == 0:
        return "..."
    parts = [
        _expression(a, depth - 1) if isinstance(a, fx.Node) else repr(a) for a in (*node.args, *node.kwargs.values())
    ]
    if node.target is getattr:
        return f"{parts[0]}.{node.args[1]}"
    if node.target is operator.getitem:
        return f"{parts[0]}[{parts[1]}]"
    if node.op == "call_method":
        return f"{parts[0]}.{node.target}({', '.join(parts[1:])})"
    name = getattr(node.target, "__name__", str(node.target))
    return f"{name}({', '.join(parts)})"
