"""Functions that PyTorch's ONNX exporter takes apart badly, or not at all, in words that it has: `SpelledOut`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PYTORCH = F.scaled_dot_product_attention


class SpelledOut(TorchFunctionMode):
    """While it is active, two functions of PyTorch are written in smaller ones, which compute the same.

    `scaled_dot_product_attention` becomes two products and a softmax, also inside `nn.MultiheadAttention`. The exporter
    takes it with four axes alone, and transposes the keys by a dozen nodes that compute their shape anew for every
    batch; a provider for GPUs leaves those to the processor. A plain transpose melts into the product. What is causal,
    grouped or masked by booleans stays PyTorch's, brought to four axes: attention in windows (hiera, nest) has an axis
    more, a single head one less. Where a mask of numbers leaves a row nothing to look at (`-inf` throughout), PyTorch
    answers with zeros, and a file with NaN, as the exporter's own do.

    `adaptive_avg_pool2d` to one pixel becomes a mean. Of channels that lie last, the exporter makes a mean, and a
    gather by numbers that it computes from the batch size.

    Args:
        keep_attention: Leave attention with four axes as it is: from opset 23 on ONNX has an operator for it.

    Example:
        >>> q = torch.randn(2, 3, 4, 5, 8)
        >>> with SpelledOut():
        ...     found = F.scaled_dot_product_attention(q, q, q)
        >>> torch.allclose(found, F.scaled_dot_product_attention(q, q, q), atol=1e-6)
        True
    """

    def __init__(self, *, keep_attention: bool = False) -> None:
        super().__init__()
        self._keep = keep_attention

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        options = kwargs or {}
        if func is _PYTORCH:
            return self._attention(*args, **options)
        if func is F.adaptive_avg_pool2d:
            return _average(*args, **options)
        if func is F.multi_head_attention_forward:  # inside a function the mode is off
            with self._put_in_place():
                return func(*args, **options)
        return func(*args, **options)

    @contextmanager
    def _put_in_place(self) -> Iterator[None]:
        before = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = self._attention
        try:
            yield
        finally:
            F.scaled_dot_product_attention = before

    def _attention(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        four = query.dim() == key.dim() == value.dim() == 4
        plain = not (dropout_p or is_causal or enable_gqa) and (attn_mask is None or attn_mask.is_floating_point())
        if plain and not (four and self._keep):
            factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
            scores = torch.matmul(query * factor, key.transpose(-2, -1))
            if attn_mask is not None:
                scores = scores + attn_mask.to(scores.dtype)
            return torch.matmul(scores.softmax(-1), value)
        theirs = partial(_PYTORCH, dropout_p=dropout_p, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa)
        if four:
            return theirs(query, key, value, attn_mask)
        # All axes before the heads as one. Grouped heads are fewer in keys and values; others are broadcast, too.
        every, kept = (query, key, value), 3 if enable_gqa else 2
        lead = torch.broadcast_shapes(*(each.shape[:-kept] for each in every))
        query, key, value = (_four(each.expand(*lead, *each.shape[-kept:])) for each in every)
        if attn_mask is not None and attn_mask.dim() > 2:
            heads = query.shape[1:2] if enable_gqa else ()
            attn_mask = _four(attn_mask.expand(*lead, *heads, *attn_mask.shape[-2:]))
        found = theirs(query, key, value, attn_mask)
        return found.reshape(*lead, *found.shape[-kept:])


def _average(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    if output_size in (1, (1, 1), [1, 1]):
        return input.mean((-2, -1), keepdim=True)
    return F.adaptive_avg_pool2d(input, output_size)


def _four(tensor: torch.Tensor) -> torch.Tensor:
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor if tensor.dim() == 4 else tensor.flatten(0, -4)
