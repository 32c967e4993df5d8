"""Attention of torch's own kind, whose width inside is its own: it can hold fewer heads."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from torchtrim.edits.work import Work
from torchtrim.errors import ModelError


class NarrowAttention(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with heads of any number and width: all heads together need not be `embed_dim` wide.

    It has the parameters of the attention it stands for, under the same names, and takes and returns the same.

    Args:
        embed_dim: The width of what it takes and gives.
        num_heads: How many heads.
        head_dim: The width of the queries and keys of a head.
        value_dim: The width of the values of a head; `head_dim` by default.
        dropout: Of the attention weights, in train mode.
        bias: Whether the projections have one.
        add_bias_kv: Whether a learned key and value are added.
        add_zero_attn: Whether a key and a value of zeros are.
        kdim: The width of the keys it is given; `embed_dim` by default.
        vdim: The same of the values.
        batch_first: Whether the batch is the first dimension.

    Example:
        >>> attention = NarrowAttention(12, num_heads=2, head_dim=4, batch_first=True)
        >>> x = torch.zeros(1, 5, 12)
        >>> attention(x, x, x)[0].shape, attention.out_proj.in_features
        (torch.Size([1, 5, 12]), 8)
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        head_dim: int | None = None,
        value_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            num_heads, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device, dtype
        )
        head = embed_dim // num_heads if head_dim is None else head_dim
        value = head if value_dim is None else value_dim
        self.kdim, self.vdim = kdim or embed_dim, vdim or embed_dim
        self.embed_dim, self.num_heads, self.head_dim, self.value_dim = embed_dim, num_heads, head, value
        self._qkv_same_embed_dim = self.kdim == self.vdim == embed_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, outer = head * num_heads, value * num_heads
        if self._qkv_same_embed_dim:
            self.in_proj_weight = nn.Parameter(torch.empty(2 * inner + outer, embed_dim, **made))
            for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
                self.register_parameter(name, None)
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(inner, embed_dim, **made))
            self.k_proj_weight = nn.Parameter(torch.empty(inner, self.kdim, **made))
            self.v_proj_weight = nn.Parameter(torch.empty(outer, self.vdim, **made))
            self.register_parameter("in_proj_weight", None)
        if bias:
            self.in_proj_bias = nn.Parameter(torch.empty(2 * inner + outer, **made))
        if add_bias_kv:
            self.bias_k = nn.Parameter(torch.empty(1, 1, inner, **made))
            self.bias_v = nn.Parameter(torch.empty(1, 1, outer, **made))
        self.out_proj = nn.modules.linear.NonDynamicallyQuantizableLinear(outer, embed_dim, bias=bias, **made)
        self._reset_parameters()
        self._qkv_same_embed_dim = False  # else layers of torch would run it in one operator of their own

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `nn.MultiheadAttention`: the result, and the attention weights where they are asked for."""
        single = query.dim() == 2
        if single:
            query, key, value = (each.unsqueeze(0) for each in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (each.transpose(0, 1) for each in (query, key, value))
        q, k, v = self._projected(query, key, value)
        extra = k.shape[2] - key.shape[1]
        mask = _mask(q, attn_mask, key_padding_mask, self.num_heads, extra, is_causal)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / math.sqrt(self.head_dim)
            weights = (scores if mask is None else scores + mask).softmax(-1)
            weights = functional.dropout(weights, dropout)
            result = weights @ v
        else:
            result = functional.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.head_dim**-0.5)
        result = self.out_proj(result.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        if single:
            return result.squeeze(0), None if weights is None else weights.squeeze(0)
        return result if self.batch_first else result.transpose(0, 1), weights

    def _projected(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values `(batch, heads, length, width)`, with those that are added to every sequence."""
        inner, outer = self.num_heads * self.head_dim, self.num_heads * self.value_dim
        sizes = [inner, inner, outer]
        packed, bias = self._parameters["in_proj_weight"], self._parameters["in_proj_bias"]
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if packed is None else packed.split(sizes)
        biases = [None] * 3 if bias is None else bias.split(sizes)
        q, k, v = (
            functional.linear(each, weight, shift)
            for each, weight, shift in zip((query, key, value), weights, biases, strict=True)
        )
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.shape[0], 1, -1)], 1)
        q, k = (each.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for each in (q, k))
        v = v.unflatten(-1, (self.num_heads, self.value_dim)).transpose(1, 2)
        if self.add_zero_attn:
            k, v = (functional.pad(each, (0, 0, 0, 1)) for each in (k, v))
        return q, k, v


def _mask(
    query: torch.Tensor,
    mask: torch.Tensor | None,
    padding: torch.Tensor | None,
    heads: int,
    extra: int,
    is_causal: bool,
) -> torch.Tensor | None:
    """One mask to be added to the scores `(batch, heads, queries, keys)`; the keys that were added are seen by all."""
    if is_causal and mask is None:
        raise ModelError("is_causal is a hint on a mask that is given too", expected="attn_mask")
    found: torch.Tensor | None = None
    if mask is not None:
        found = _additive(mask, query)
        if found.dim() == 3:
            found = found.reshape(-1, heads, *found.shape[1:])
    if padding is not None:
        hidden = _additive(padding, query)[:, None, None, :]
        found = hidden if found is None else found + hidden
    return found if found is None or not extra else functional.pad(found, (0, extra))


def _additive(mask: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A mask as numbers to add: a true one hides."""
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def widen(work: Work) -> list[str]:
    """Put a `NarrowAttention` in place of each `nn.MultiheadAttention`, with its parameters.

    Subclasses with a forward of their own are left alone.

    Returns:
        The paths.
    """
    paths = [path for path, each in work.model.named_modules() if type(each) is nn.MultiheadAttention]
    for path in paths:
        work.put(path, _with_class(work.model.get_submodule(path), NarrowAttention))
    return paths


def unwiden(work: Work) -> list[str]:
    """Put `nn.MultiheadAttention` back where nothing inside became narrower.

    Returns:
        The paths of those that stay.
    """
    stay = []
    for path, each in list(work.model.named_modules()):
        if type(each) is NarrowAttention:
            whole = each.num_heads * each.head_dim == each.embed_dim and each.value_dim == each.head_dim
            if whole:
                work.put(path, _with_class(each, nn.MultiheadAttention))
            else:
                stay.append(path)
    return stay


def _with_class(module: nn.Module, kind: type[nn.MultiheadAttention]) -> nn.Module:
    """The same module, parameters and all, of another class."""
    new = kind.__new__(kind)
    new.__dict__.update(module.__dict__)
    for name in ("_parameters", "_buffers", "_modules"):
        new.__dict__[name] = dict(module.__dict__[name])
    new._qkv_same_embed_dim = kind is nn.MultiheadAttention and new._parameters["in_proj_weight"] is not None
    if isinstance(new, NarrowAttention):
        new.value_dim = new.head_dim
    else:
        new.__dict__.pop("value_dim", None)
    return new
