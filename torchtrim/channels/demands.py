"""Which numbers a forward gives where sizes are meant: every function that takes a size, watched."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import mul
from typing import Any, Protocol

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from torchtrim.channels.labels import EqualParts, Label, varying
from torchtrim.channels.widths import Demands, Width, along_axis, narrowed_to, sizes_of, source_of


class Following(Protocol):
    """What knows the labels."""

    known: dict[int, tuple[torch.Tensor, Label]]
    repeating: int  # how many calls that are under way repeat values a given number of times

    def label(self, tensor: torch.Tensor) -> Label:
        """The label of a tensor."""

    def where(self, name: str) -> str:
        """A call that is made now, in words."""


class Watching(TorchFunctionMode):
    """Hands out sizes that know what they are, and notes the numbers that are given where sizes are meant."""

    def __init__(self, following: Following, demands: Demands) -> None:
        super().__init__()
        self.following = following
        self.demands = demands

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _REPEATS:
            return self._repeated(func, args, kwargs)
        out = func(*args, **kwargs)
        if func in _SIZES:
            return self._sized(args[0], out, *args[1:], **kwargs)
        if func in _COUNTS:
            tensor = args[0] if args else kwargs["input"]
            return reduce(mul, self._sized(tensor, tuple(tensor.shape)), 1)
        note = _NOTES.get(func)
        if note is not None and (args or kwargs):
            note(self, out, args, kwargs, getattr(func, "__name__", "a call"))
        return out

    def _repeated(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.following.repeating += 1
        try:
            return func(*args, **kwargs)
        finally:
            self.following.repeating -= 1

    def _sized(self, tensor: torch.Tensor, out: Any, dim: int | None = None) -> Any:
        known = self.following.known.get(id(tensor))
        if known is None:
            return out
        moving = frozenset().union(*map(varying, known[1].layers))
        if not moving:
            return out
        if isinstance(out, tuple):
            sizes = [
                Width(size, along_axis(tensor, known[1], axis)) if axis in moving else size
                for axis, size in enumerate(out)
            ]
            return torch.Size(sizes)
        axis = 0 if dim is None else dim % tensor.dim()
        return Width(out, along_axis(tensor, known[1], axis)) if axis in moving else out

    def want(self, given: Any, tensor: torch.Tensor, axis: int, name: str) -> None:
        """Note a number that is given for the size of a tensor along a dimension."""
        if type(given) is Width or type(given) is int:
            size = along_axis(tensor, self.following.label(tensor), axis)
            self.demands.want(given, size, self.following.where(name))

    def part(self, bound: Any, tensor: torch.Tensor, axis: int, name: str) -> None:
        """Note a number that says where a part of a tensor begins or ends."""
        whole = along_axis(tensor, self.following.label(tensor), axis)
        count = whole.shape[whole.axis]
        if type(bound) not in (int, Width) or not -count < bound < count or not bound or not whole.layers:
            return
        size = narrowed_to(whole, 0, int(bound)) if bound > 0 else narrowed_to(whole, count + int(bound), count)
        self.demands.want(bound if bound > 0 else -bound, size, self.following.where(name))
        if sizes_of(source_of(bound)) and count % abs(bound) == 0:
            self.equal(tensor, axis, count // abs(int(bound)), name)

    def equal(self, tensor: torch.Tensor, axis: int, parts: int, name: str) -> None:
        """Note that a tensor is taken apart in parts of the same size."""
        size = along_axis(tensor, self.following.label(tensor), axis)
        if parts < 2 or size.shape[size.axis] % parts:
            return
        for layer in size.layers:
            if varying(layer) == {size.axis}:
                table = layer.reshape(parts, -1)
                self.demands.equal_parts.append(EqualParts(table, False, self.following.where(name)))


def _flat(values: Sequence[Any]) -> Sequence[Any]:
    """Sizes that are given one by one, or in a list."""
    return values[0] if len(values) == 1 and isinstance(values[0], (tuple, list)) else values


def _shaped(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """`x.view(2, -1, 4)`, `torch.reshape(x, (2, 4))`."""
    sizes = _flat(args[1:]) if len(args) > 1 else next(iter(kwargs.values()), ())
    _made(watch, out, (sizes,), {}, name)


def _made(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """`torch.zeros(2, 4)`, `torch.zeros((2, 4))`."""
    sizes = _flat(args) if args else kwargs.get("size", ())
    if not isinstance(sizes, (tuple, list)) or not isinstance(out, torch.Tensor):
        return
    for axis, size in enumerate(sizes[: out.dim()]):
        watch.want(size, out, axis, name)


def _filled(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """`torch.full((2, 4), 0.0)`."""
    _made(watch, out, args[:1], kwargs, name)


def _expanded(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    """`x.expand(2, 4)`, `x.repeat(2, 4)`: the sizes of those dimensions that are repeated."""
    sizes = _flat(args[1:]) if len(args) > 1 else next(iter(kwargs.values()), ())
    if len(sizes) == out.dim():
        for axis, size in enumerate(sizes):
            watch.want(size, out, axis, name)


def _unflattened(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    dim = args[1] if len(args) > 1 else kwargs["dim"]
    sizes = args[2] if len(args) > 2 else kwargs["sizes"]
    if isinstance(dim, int):
        for number, size in enumerate(sizes):
            watch.want(size, out, dim % args[0].dim() + number, name)


def _split(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    source, sizes = args[0], args[1] if len(args) > 1 else next(iter(kwargs.values()))
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if not isinstance(sizes, (tuple, list)):
        sizes = [sizes] * len(out)
        if len({int(part.shape[dim]) for part in out}) == 1:
            watch.equal(source, dim, len(out), name)
    for size, part in zip(sizes, out, strict=False):
        watch.want(size, part, dim, name)


def _chunked(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if len({int(part.shape[dim]) for part in out}) == 1:
        watch.equal(args[0], dim, len(out), name)


def _indexed(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    source, index = args[0], args[1] if isinstance(args[1], tuple) else (args[1],)
    if any(isinstance(each, (torch.Tensor, list)) for each in index):
        return
    taken = sum(each is not None and each is not Ellipsis for each in index)
    axis = 0
    for each in index:
        if each is Ellipsis:
            axis += source.dim() - taken
        elif each is not None:
            if isinstance(each, slice) and each.step in (None, 1):
                for bound in (each.start, each.stop):
                    watch.part(bound, source, axis, "slice")
            axis += 1


def _narrow(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    given: list[Any] = [*args[1:], *(kwargs[each] for each in ("dim", "start", "length") if each in kwargs)]
    dim, start, length = given
    watch.part(start, args[0], dim, name)
    watch.want(length, out, dim, name)


def _normed(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    sizes = args[1] if len(args) > 1 else kwargs["normalized_shape"]
    for number, size in enumerate(sizes):
        watch.want(size, args[0], args[0].dim() - len(sizes) + number, name)


def _counted(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    if len(args) == 1:
        watch.want(args[0], out, 0, name)


def _hot(watch: Watching, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any], name: str) -> None:
    watch.want(args[1] if len(args) > 1 else kwargs.get("num_classes"), out, -1, name)


_T = torch.Tensor
_SIZES = {_T.shape.__get__, _T.size, _T.__len__}  # type: ignore[attr-defined]
_COUNTS = {_T.numel, _T.nelement, torch.numel}
_REPEATS = {_T.repeat_interleave, torch.repeat_interleave}
_Note = Callable[[Watching, Any, tuple[Any, ...], dict[str, Any], str], None]
_NOTES: dict[Any, _Note] = {
    **dict.fromkeys((_T.view, _T.reshape, torch.reshape), _shaped),
    **dict.fromkeys((_T.new_zeros, _T.new_ones, _T.new_empty), _shaped),
    **dict.fromkeys((torch.zeros, torch.ones, torch.empty, torch.rand, torch.randn), _made),
    torch.full: _filled,
    **dict.fromkeys((_T.expand, _T.repeat, torch.broadcast_to, _T.broadcast_to, _T.new_full), _expanded),
    **dict.fromkeys((_T.unflatten, torch.unflatten), _unflattened),
    **dict.fromkeys((_T.split, torch.split, _T.split_with_sizes, torch.split_with_sizes), _split),
    **dict.fromkeys((_T.chunk, torch.chunk, _T.tensor_split, torch.tensor_split), _chunked),
    _T.__getitem__: _indexed,
    **dict.fromkeys((_T.narrow, torch.narrow), _narrow),
    **dict.fromkeys((functional.layer_norm, torch.layer_norm, functional.rms_norm, torch.rms_norm), _normed),
    torch.arange: _counted,
    functional.one_hot: _hot,
}
