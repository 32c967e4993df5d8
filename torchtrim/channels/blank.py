"""Shapes alone: what operators give for tensors without values.

torch's fake tensors know the device that they stand for; each operator on them costs about as much as on a small real
tensor. Here all tensors lie on the meta device, and what an operator gives for the same shapes is remembered: that is
an order of magnitude faster. Where it is not enough (a forward that asks for values, or for a device of its own) torch
refuses, and fake tensors can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchtrim.channels.rules import tensors_in

META = torch.device("meta")


class Blanks:
    """Runs operators on tensors without values; real ones, constants of a forward, are taken for their shapes."""

    def __init__(self) -> None:
        self._blank: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator gives.

        Raises:
            RuntimeError: It cannot be told without values; or it does not take these shapes.
        """
        kind = _kind(op)
        if kind.placed:
            kwargs = {**kwargs, "device": META, "pin_memory": False} if kind.pinned else {**kwargs, "device": META}
        if any(tensor.device != META for tensor in tensors_in((args, kwargs))):
            if kind.values:
                return op(*args, **kwargs)
            if kind.writes:
                raise RuntimeError(f"{op} writes to a real tensor")
            args, kwargs = pytree.tree_map_only(torch.Tensor, self._blanked, (args, kwargs))
        if not (kind.plain or kind.in_place):
            return op(*args, **kwargs)
        key = (op, torch.get_default_dtype(), _key(args), _key(kwargs))
        known = _KNOWN.get(key)
        if known is _UNCHANGED:
            return args[0]
        if known is None and kind.in_place:
            layout = _key(args[0])
            out = op(*args, **kwargs)
            if out is args[0] and _key(out) == layout:
                _KNOWN[key] = _UNCHANGED
            return out
        if known is None:
            out = grouped_product(*args, **kwargs) if is_grouped(op, args) else op(*args, **kwargs)
            if len(_KNOWN) >= _MOST:
                _KNOWN.clear()
            _KNOWN[key] = _layout(out)
            return out
        return _made(known)

    def _blanked(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.device == META:
            return tensor
        if id(tensor) not in self._blank:
            self._blank[id(tensor)] = tensor, torch.empty_like(tensor, device=META, requires_grad=False)
        return self._blank[id(tensor)][1]


def is_grouped(op: Any, args: Sequence[Any]) -> bool:
    """Whether an operator multiplies rows in groups, each group by a matrix of its own: experts."""
    return bool(op._schema.name == "aten::_grouped_mm") and [each.dim() for each in args[:2]] == [2, 3]


def grouped_product(
    rows: torch.Tensor,
    matrices: torch.Tensor,
    offs: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """What such a product gives. Without values, torch multiplies bfloat16 alone.

    Raises:
        RuntimeError: The two do not fit together, or lie in memory as no kernel takes them.
    """
    if rows.shape[1] != matrices.shape[1]:
        raise RuntimeError(f"rows of {rows.shape[1]} and matrices of {matrices.shape[1]} cannot be multiplied")
    groups = 0 if offs is None else len(offs)
    if groups != len(matrices):
        raise RuntimeError(f"there are {groups} groups, and {len(matrices)} matrices")
    steps = [step * each.element_size() for each in (rows, matrices) for step in each.stride() if step != 1]
    if any(step % _ALIGNED for step in steps):
        raise RuntimeError(f"products of groups need widths of {_ALIGNED} bytes (a larger round_to gives such)")
    return rows.new_empty((rows.shape[0], matrices.shape[2]), dtype=out_dtype)


_ALIGNED = 16


class _Kind:
    """What is to be known of an operator.

    Attributes:
        placed: Whether it is told the device of its result.
        pinned: Whether it is told to pin the memory of it.
        values: Whether it reads or makes values: a constant's number, `torch.tensor(2)`.
        writes: Whether it changes an argument.
        plain: Whether all it gives is new.
        in_place: Whether it changes its first argument, no other, and gives just that.
    """

    def __init__(self, op: Any) -> None:
        schema = op._schema
        names = {argument.name for argument in schema.arguments}
        self.placed = "device" in names
        self.pinned = "pin_memory" in names
        self.values = schema.name in ("aten::lift_fresh", "aten::_local_scalar_dense")
        self.writes = schema.is_mutable
        aliased = any(each.alias_info is not None for each in (*schema.arguments, *schema.returns))
        written = [argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments]
        single = len(schema.returns) == 1 and schema.returns[0].alias_info is not None
        self.in_place = written[:1] == [True] and sum(written) == 1 and single and not schema.name.startswith(_HANDED)
        self.plain = not (aliased or self.values or schema.name in ("aten::_reshape_alias", "aten::_unsafe_view"))


_HANDED = ("aten::set_", "aten::_resize", "aten::resize_", "aten::as_strided_")  # what lies below changes hands
_UNCHANGED = object()  # what is given for an operator after which its first argument looks as before
_kind = cache(_Kind)
_KNOWN: dict[Any, Any] = {}
_MOST = 20_000


def _key(value: Any) -> Any:
    """Arguments as something to look up by: tensors by their layout, numbers with their type."""
    if isinstance(value, torch.Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (tuple, list)):
        return tuple([_key(item) for item in value])
    if isinstance(value, dict):
        return tuple([(name, _key(item)) for name, item in value.items()])
    return type(value), value


def _layout(value: Any) -> Any:
    """Results as their layouts."""
    return pytree.tree_map_only(torch.Tensor, lambda each: _Layout(each), value)


class _Layout:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.shape, self.stride, self.dtype = tensor.shape, tensor.stride(), tensor.dtype

    def tensor(self) -> torch.Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=META)


def _made(known: Any) -> Any:
    if isinstance(known, _Layout):
        return known.tensor()
    return pytree.tree_map_only(_Layout, lambda each: each.tensor(), known)
