"""Functions that PyTorch's ONNX exporter takes apart badly, or not at all, in words that it has: `SpelledOut`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class SpelledOut(TorchFunctionMode):
    """While it is active, two functions of PyTorch are written in smaller ones, which compute the same.

    `scaled_dot_product_attention` becomes two products and a softmax. The exporter takes it with four axes alone, and
    transposes the keys by a dozen nodes that compute their shape anew for every batch; a provider for GPUs leaves those
    to the processor. A plain transpose melts into the product. What is causal, grouped or masked by booleans stays
    PyTorch's, brought to four axes: attention in windows (hiera, nest) has an axis more, a single head one less.

    `adaptive_avg_pool2d` to one pixel becomes a mean. Of channels that lie last, the exporter makes a mean, and a
    gather by numbers that it computes from the batch size.

    Example:
        >>> q = torch.randn(2, 3, 4, 5, 8)
        >>> with SpelledOut():
        ...     found = F.scaled_dot_product_attention(q, q, q)
        >>> torch.allclose(found, F.scaled_dot_product_attention(q, q, q), atol=1e-6)
        True
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        if func is F.adaptive_avg_pool2d:
            return _average(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if not (dropout_p or is_causal or enable_gqa or (attn_mask is not None and attn_mask.dtype == torch.bool)):
        factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = torch.matmul(query * factor, key.transpose(-2, -1))
        if attn_mask is not None:
            scores = scores + attn_mask
        return torch.matmul(scores.softmax(-1), value)
    lead = query.shape[:-2]
    if attn_mask is not None and attn_mask.dim() > 2:
        attn_mask = _four(attn_mask.expand(*lead, *attn_mask.shape[-2:]))
    found = F.scaled_dot_product_attention(
        _four(query), _four(key), _four(value), attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return found.reshape(*lead, *found.shape[-2:])


def _average(input: torch.Tensor, output_size: Any) -> torch.Tensor:
    if output_size in (1, (1, 1), [1, 1]):
        return input.mean((-2, -1), keepdim=True)
    return F.adaptive_avg_pool2d(input, output_size)


def _four(tensor: torch.Tensor) -> torch.Tensor:
    """All axes before the last three as one; the third from the end stays, by which grouped heads are told."""
    while tensor.dim() < 4:
        tensor = tensor.unsqueeze(0)
    return tensor if tensor.dim() == 4 else tensor.flatten(0, -4)
