"""Watch one forward of a model: hooks see the module calls, a dispatch mode the operators within them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.errors import InputError
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.macs import macs_of


@dataclass(frozen=True)
class Value:
    """The shape and type of one tensor.

    Example:
        >>> str(Value((1, 3), "float32"))
        'float32[1, 3]'
    """

    shape: tuple[int, ...]
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclass(frozen=True)
class Call:
    """One call of a module.

    Attributes:
        path: The module (`""` is the model itself); a shared module goes by its first name.
        index: 0 for its first call in this forward, 1 for the next.
        start: When it began, on a clock that ticks at every call and operator.
        end: When it returned.
        outputs: The tensors it returned, in order.
    """

    path: str
    index: int
    start: int
    end: int
    outputs: tuple[Value, ...]


@dataclass
class _Frame:
    path: str
    module: nn.Module
    start: int
    given: tuple[Any, ...]


class Watch(TorchDispatchMode):
    """Follows the forward of `model`, a copy made for it, without the user's hooks: hooks of our own are put on it.

    Attributes:
        calls: Every module call that returned, by end.
        first_use: When each parameter was first read, by its first name.
        macs: MACs spent within the calls of each path.
        own_macs: MACs spent by the path itself, outside the modules it calls.
    """

    def __init__(self, model: nn.Module, *, real: bool) -> None:
        TorchDispatchMode.__init__(self)
        self.real = real
        self.clock = 0
        self.frames: list[_Frame] = []
        self.calls: list[Call] = []
        self.count: Counter[str] = Counter()
        self.macs: Counter[str] = Counter()
        self.own_macs: Counter[str] = Counter()
        self.first_use: dict[str, int] = {}
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        for path, module in model.named_modules():
            module.register_forward_pre_hook(self._enter(path), with_kwargs=True, prepend=True)
            module.register_forward_hook(self._leave(path))

    def _enter(self, path: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.clock += 1
            self.frames.append(_Frame(path, module, self.clock, (args, kwargs)))

        return enter

    def _leave(self, path: str) -> Any:
        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self.clock += 1
            # Frames above it were left by an exception that the forward caught.
            while (frame := self.frames.pop()).module is not module:
                continue
            self.calls.append(Call(path, self.count[path], frame.start, self.clock, values_of(output)))
            self.count[path] += 1

        return leave

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return func(*args, **kwargs)
        if torch.is_inference_mode_enabled():
            # Inference mode hands over whole operators; take them apart as every other mode does.
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self.clock += 1
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        for tensor in tensors:
            if (name := self.names.get(id(tensor))) is not None:
                self.first_use.setdefault(name, self.clock)
        if not self.real and func._overloadpacket in _ONE_TYPE and len({tensor.dtype for tensor in tensors}) > 1:
            # Fake tensors let this pass; no kernel does.
            raise RuntimeError(f"{func} needs one type, got {', '.join(sorted(dtype_name(t.dtype) for t in tensors))}")
        out = func(*args, **kwargs)
        if macs := macs_of(func, args, kwargs, out):
            for path in {frame.path for frame in self.frames}:
                self.macs[path] += macs
            self.own_macs[self.frames[-1].path if self.frames else ""] += macs
        return out

    def refusal(self, error: Exception, inputs: Inputs) -> InputError:
        """The error that says which module refused what."""
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        if not self.frames:
            return InputError(f"the model refuses the example inputs: {reason}", found=inputs.describe())
        frame = self.frames[-1]
        given = values_of(frame.given)
        return InputError(
            f"{type(frame.module).__name__} refuses what it is given: {reason}",
            path=frame.path or None,
            found=", ".join(map(str, given)) or "no tensor",
            expected=_expectation(frame.module),
            hint=f"other example inputs; the model was given {inputs.describe()}",
        )


_ONE_TYPE = {
    torch.ops.aten.convolution,
    torch.ops.aten.mm,
    torch.ops.aten.addmm,
    torch.ops.aten.bmm,
    torch.ops.aten.baddbmm,
    torch.ops.aten.mv,
    torch.ops.aten.addmv,
    torch.ops.aten.dot,
}

_WANTS = {
    "in_channels": "{} channels",
    "in_features": "{} in the last dimension",
    "num_features": "{} channels",
    "num_channels": "{} channels",
    "normalized_shape": "{} as the last dimensions",
    "num_embeddings": "whole numbers (int64 or int32) below {}",
    "input_size": "{} in the last dimension",
    "embed_dim": "{} in the last dimension",
}


def _expectation(module: nn.Module) -> str | None:
    """What a layer's own description and weights say of its input; `None` for a module that is no layer."""
    wants = [
        text.format(getattr(module, name))
        for name, text in _WANTS.items()
        if isinstance(module.__dict__.get(name), (int, tuple))
    ]
    weight = next(iter(module.parameters(recurse=False)), None)
    if weight is not None and not hasattr(module, "num_embeddings"):
        wants.append(dtype_name(weight.dtype))
    if isinstance(weights := getattr(module, "weight", None), torch.Tensor):
        wants.append(f"weight {list(weights.shape)}")
    return ", ".join(wants) or None


def values_of(output: Any) -> tuple[Value, ...]:
    """Shape and type of every tensor in what a forward returned: tuples, dicts, dataclasses, nested as they are.

    Example:
        >>> [str(value) for value in values_of({"a": torch.zeros(2), "b": [torch.ones(1, 3)]})]
        ['float32[2]', 'float32[1, 3]']
    """
    found: list[Value] = []
    for leaf in pytree.tree_leaves(output):
        if isinstance(leaf, torch.Tensor):
            found.append(Value(tuple(int(size) for size in leaf.shape), dtype_name(leaf.dtype)))
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            for field in fields(leaf):
                found.extend(values_of(getattr(leaf, field.name)))
    return tuple(found)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
