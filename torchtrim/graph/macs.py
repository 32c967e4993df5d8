"""Multiply-accumulates of one ATen operator, from the shapes of what goes in and out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry


def macs_of(op: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """MACs of one call of an operator; 0 for one that multiplies no matrices.

    The formulas are those of `torch.utils.flop_counter` halved, and ours for what it leaves out: attention in every
    backend, recurrent layers in one operator, matrix by vector, bilinear and deformable convolution. Masked and
    causal attention counts in full.

    Example:
        >>> a, b = torch.zeros(2, 3), torch.zeros(3, 5)
        >>> macs_of(torch.ops.aten.mm.default, (a, b), {}, a @ b)
        30
    """
    packet = op._overloadpacket
    ours = _FORMULAS.get(str(packet))
    if ours is not None:
        return ours(args, out)
    formula = flop_registry.get(packet)
    return int(formula(*args, **kwargs, out_val=out)) // 2 if formula is not None else 0


@cache
def multiplies(op: torch._ops.OpOverload) -> bool:
    """Whether an operator has a formula: others multiply no matrices."""
    return str(op._overloadpacket) in _FORMULAS or op._overloadpacket in flop_registry


def _attention(args: tuple[Any, ...], out: Any) -> int:
    query, key, value = args[:3]
    return int(query.shape[:-1].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1]))


def _recurrent(args: tuple[Any, ...], out: Any) -> int:
    """`args` is the input, then the weights and biases (single or in a list), then the state; only weights are read."""
    steps = args[0].shape[:-1].numel()
    weights = args[1] if isinstance(args[1], (list, tuple)) else args[1:3]
    return int(steps * sum(weight.numel() for weight in weights if weight.dim() == 2))


def _vector(args: tuple[Any, ...], out: Any) -> int:
    return int(args[0].numel())


def _vector_added(args: tuple[Any, ...], out: Any) -> int:
    return int(args[1].numel())


def _batches_added(args: tuple[Any, ...], out: Any) -> int:
    return int(args[1].numel() * args[2].shape[-1])


def _matrix_added(args: tuple[Any, ...], out: Any) -> int:
    return int(args[1].shape[0] * args[1].shape[1] * args[2].shape[1])


def _grouped(args: tuple[Any, ...], out: Any) -> int:
    """Rows of the first operand in groups, each with a matrix of its own; two matrices are grouped along their sum."""
    one, other = args[:2]
    along = one.dim() == other.dim() == 2
    return int(one.numel() * other.shape[1] if along else out.numel() * one.shape[-1])


def _trilinear(args: tuple[Any, ...], out: Any) -> int:
    # nn.Bilinear calls it with (batch, 1, in1, 1), (1, out, in1, in2), (batch, 1, 1, in2): every weight once a row.
    return int(args[0].shape[0] * args[1].numel())


def _deformable(args: tuple[Any, ...], out: Any) -> int:
    return int(out.numel() * args[1].shape[1:].numel())


_FORMULAS: dict[str, Callable[[tuple[Any, ...], Any], int]] = {
    **{
        f"aten._scaled_dot_product_{backend}": _attention
        for backend in (
            "flash_attention",
            "flash_attention_for_cpu",
            "efficient_attention",
            "cudnn_attention",
            "fused_attention_overrideable",
        )
    },
    "aten.mkldnn_rnn_layer": _recurrent,
    "aten._cudnn_rnn": _recurrent,
    "aten.miopen_rnn": _recurrent,
    "aten.mv": _vector,
    "aten.dot": _vector,
    "aten.addmv": _vector_added,
    "aten.addbmm": _batches_added,
    "aten._addmm_activation": _matrix_added,
    "aten._grouped_mm": _grouped,
    "aten._trilinear": _trilinear,
    "torchvision.deform_conv2d": _deformable,
}
