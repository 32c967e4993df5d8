"""What is intercepted while a forward is traced: some calls are recorded, and what a graph cannot hold is refused."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import fx, nn
from torch.autograd.graph import saved_tensors_hooks

from torchtrim.graph.structure import leaves

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

# A graph is a list of calls: what holds for a stretch of a forward (no gradients, a precision, recomputation) would be
# lost in it without a word, as would a backward of one's own.
_CONTEXTS: list[tuple[Any, str, str]] = [
    (torch.no_grad, "__enter__", "torch.no_grad"),
    (torch.enable_grad, "__enter__", "torch.enable_grad"),
    (torch.inference_mode, "__enter__", "torch.inference_mode"),
    (torch.set_grad_enabled, "__init__", "torch.set_grad_enabled"),
    (torch.autocast, "__enter__", "torch.autocast"),
    (saved_tensors_hooks, "__enter__", "torch.utils.checkpoint"),
]


class Interceptor(Protocol):
    """Who decides what becomes of an intercepted call."""

    def idle(self) -> bool:
        """Whether nothing is to be intercepted now: real Python runs, for shapes."""

    def record(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call as a node."""

    def refuse(self, reason: str) -> None:
        """Called where a forward does what a graph cannot hold."""

    def members(self, module: nn.Module, named: Iterator[tuple[str, Any]]) -> Iterator[Any]:
        """The parameters or buffers that a forward asks a module for, as nodes."""

    def is_instance(self, value: Any, kinds: Any) -> bool:
        """`isinstance`, where a proxy is of the class that its value has."""


@contextmanager
def intercepted(tracer: Interceptor) -> Iterator[None]:
    """Intercept what the forwards call that are traced by this thread; other threads notice nothing."""
    thread = threading.get_ident()
    patched: list[tuple[Any, str, Any]] = []

    def here() -> bool:
        return threading.get_ident() == thread and not tracer.idle()

    def patch(owner: Any, name: str, replacement: Any) -> None:
        patched.append((owner, name, owner.__dict__[name]))
        setattr(owner, name, replacement)

    try:
        for name in _FACTORIES:
            patch(torch, name, _recorded(getattr(torch, name), tracer, here))
        for owner, name, shown in _CONTEXTS:
            reason = f"a part of its forward runs under {shown}, which a graph cannot hold"
            patch(owner, name, _refused(owner.__dict__[name], reason, tracer, here))
        patch(torch, "manual_seed", _refused(torch.manual_seed, "its forward calls torch.manual_seed", tracer, here))
        patch(torch, "is_tensor", _asked(torch.is_tensor, tracer, here))
        patch(torch.autograd.Function, "apply", classmethod(_own_backward(tracer, here)))
        for name, named in (("parameters", nn.Module.named_parameters), ("buffers", nn.Module.named_buffers)):
            patch(nn.Module, name, _listed(getattr(nn.Module, name), named, tracer, here))
        yield
    finally:
        for owner, name, original in patched:
            setattr(owner, name, original)


@contextmanager
def isinstance_of_proxies(forward: Callable[..., Any], tracer: Interceptor) -> Iterator[None]:
    """Let `isinstance`, in the file that a forward is written in, see through proxies."""
    scope: dict[str, Any] = getattr(inspect.unwrap(forward), "__globals__", {})
    if "isinstance" in scope:
        yield
        return

    def check(value: Any, kinds: Any) -> bool:
        return tracer.is_instance(value, kinds) if isinstance(value, fx.Proxy) else isinstance(value, kinds)

    scope["isinstance"] = check
    try:
        yield
    finally:
        del scope["isinstance"]


_Here = Callable[[], bool]


def _recorded(factory: Callable[..., Any], tracer: Interceptor, here: _Here) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        return tracer.record(factory, args, kwargs) if here() else factory(*args, **kwargs)

    return call


def _refused(original: Callable[..., Any], reason: str, tracer: Interceptor, here: _Here) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if here():
            tracer.refuse(reason)
        return original(*args, **kwargs)

    return call


def _asked(original: Callable[..., Any], tracer: Interceptor, here: _Here) -> Callable[..., Any]:
    def call(value: Any) -> Any:
        return tracer.is_instance(value, torch.Tensor) if here() and isinstance(value, fx.Proxy) else original(value)

    return call


def _own_backward(tracer: Interceptor, here: _Here) -> Callable[..., Any]:
    original = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if here() and leaves((args, kwargs), fx.Proxy):
            tracer.refuse(f"its forward calls {cls.__name__}, an autograd function with a backward of its own")
        return original.__get__(None, cls)(*args, **kwargs)

    return apply


def _listed(original: Callable[..., Any], named: Any, tracer: Interceptor, here: _Here) -> Callable[..., Any]:
    def call(self: nn.Module, recurse: bool = True) -> Iterator[Any]:
        # `next(self.parameters()).dtype` must follow the model: a constant would hold it to what it is now.
        return tracer.members(self, named(self, recurse=recurse)) if here() else original(self, recurse)

    return call
