"""Models without weights: shapes and types that take no memory, so that a model is rebuilt before its weights are read.

A hollow parameter is a single zero, expanded to its shape. Unlike one on the meta device it can be read and computed
with, next to buffers that are real, which constructors and edits do.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from torchtrim.errors import CheckpointError, TorchTrimError
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.structure import leaves, map_leaves


def hollow(make: Callable[[], nn.Module], limit: int | None = None) -> nn.Module:
    """The model that `make` makes, hollow. Its parameters are turned to the meta device as they are registered.

    Where the constructor does not get on with that (it reads a parameter's values), it is made in the ordinary way, and
    its weights dropped afterwards. The random state stays as it was.

    Args:
        make: Makes the model.
        limit: Bytes that a buffer, or a parameter made in the ordinary way, may take.

    Raises:
        TorchTrimError: `make` does, in the ordinary way too.
        CheckpointError: A tensor is too large.
    """

    def ordinary() -> nn.Module:
        with bounded(limit):
            return make()

    with kept_random_state():
        try:
            # What is on the meta device may be of any size: embeddings that were cut away since, for one.
            with bounded(limit, parameters=False), _parameters_on_meta(), _NoInitialisation():
                model = make()
        except Exception as error:
            if isinstance(error, TorchTrimError) and not isinstance(error.__cause__, Exception):
                raise  # a name or an argument is wrong: the constructor was never called
            model = ordinary()
        else:
            if _computed_from_parameters(model):
                model = ordinary()
    emptied(model)
    return model


def emptied(model: nn.Module, *, buffers: bool = False) -> None:
    """Make a model's parameters hollow, in place, and its buffers where these are not needed; tied ones stay tied."""
    new: dict[torch.Tensor, torch.Tensor] = {
        parameter: _hollow(parameter) for parameter in model.parameters() if not is_lazy(parameter)
    }
    if buffers:
        new |= {buffer: _zero(buffer) for buffer in model.buffers() if not is_lazy(buffer)}
    swap(model, new)


def held_tensors(model: nn.Module) -> list[torch.Tensor]:
    """Every tensor that the modules of a model hold: parameters, buffers, and those in plain attributes."""
    return [
        tensor
        for module in model.modules()
        for name, value in module.__dict__.items()
        if name != "_modules"
        for tensor in _tensors(value)
    ]


def swap(model: nn.Module, new: Mapping[torch.Tensor, torch.Tensor]) -> None:
    """Put other tensors in the place of some, wherever a model's modules refer to them: in lists and dicts too."""

    def other(tensor: torch.Tensor) -> torch.Tensor:
        return new.get(tensor, tensor)

    for module in model.modules():
        for name, value in module.__dict__.items():
            if name == "_modules" or not any(tensor in new for tensor in _tensors(value)):
                continue
            if name in ("_parameters", "_buffers"):
                for key, held in value.items():
                    value[key] = None if held is None else other(held)
            else:
                module.__dict__[name] = map_leaves(value, torch.Tensor, other)


@contextmanager
def bounded(limit: int | None, *, parameters: bool = True) -> Iterator[None]:
    """Refuse parameters and buffers that are registered with more than `limit` bytes, before anything is written there.

    Args:
        limit: Bytes; `None` for no limit.
        parameters: Look at parameters too, not at buffers alone.

    Raises:
        CheckpointError: One is that large.
    """
    thread = threading.get_ident()

    def refuse(module: nn.Module, name: str, tensor: Any) -> None:
        if limit is None or threading.get_ident() != thread or not isinstance(tensor, torch.Tensor) or is_lazy(tensor):
            return
        size = tensor.numel() * tensor.dtype.itemsize
        if size > limit:
            raise CheckpointError(
                "the file asks for a tensor out of all proportion to its size",
                path=f"{type(module).__name__}.{name}",
                found=f"{size:,} bytes",
                expected=f"{limit:,} or less",
            )

    with ExitStack() as stack:
        stack.callback(register_module_buffer_registration_hook(refuse).remove)
        if parameters:
            stack.callback(register_module_parameter_registration_hook(refuse).remove)
        yield


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Turn the parameters that this thread registers to the meta device. Buffers are left: constructors read them."""
    thread = threading.get_ident()
    made: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a parameter that is registered twice stays one

    def turn(module: nn.Module, name: str, parameter: Any) -> nn.Parameter | None:
        if threading.get_ident() != thread or type(parameter) is not nn.Parameter or parameter.is_meta:
            return None
        if parameter not in made:
            empty = torch.empty_like(parameter, device="meta", requires_grad=False)
            made[parameter] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        found: nn.Parameter = made[parameter]
        return found

    handle = register_module_parameter_registration_hook(turn)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


# What `torch.nn.init`, and constructors by themselves, fill weights with. None of these changes a shape.
_FILLS = {
    "add_", "clamp_", "constant_", "copy_", "div_", "erfinv_", "exponential_", "fill_", "kaiming_normal_",
    "kaiming_uniform_", "mul_", "normal_", "ones_", "sub_", "trunc_normal_", "uniform_", "xavier_normal_",
    "xavier_uniform_", "zero_", "zeros_",
}  # fmt: skip


class _NoInitialisation(TorchFunctionMode):
    """Fill nothing that has no values: on the meta device each such call takes torch longer than on real numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) in _FILLS:
            tensor = args[0] if args else kwargs.get("tensor")
            if isinstance(tensor, torch.Tensor) and tensor.is_meta:
                return tensor
        return func(*args, **kwargs)


def _computed_from_parameters(model: nn.Module) -> bool:
    """Whether a tensor besides the parameters has lost its values: the constructor computed it from them."""
    parameters = set(model.parameters())
    return any(
        tensor.is_meta and tensor not in parameters
        for module in model.modules()
        for name, value in module.__dict__.items()
        if name not in ("_modules", "_parameters")
        for tensor in _tensors(value)
    )


def _hollow(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(_zero(parameter), requires_grad=parameter.requires_grad)


def _zero(tensor: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return leaves(value, torch.Tensor) if isinstance(value, (dict, list, tuple)) and value else []
