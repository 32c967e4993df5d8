"""Attention on the meta device as the CPU does it: in one operator where that has one."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes


class FusedAttention(TorchFunctionMode):
    """Asks torch what it would take on the CPU; on the meta device it always takes many small operators."""

    def __init__(self) -> None:
        super().__init__()
        self._fused: dict[Any, bool] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is functional.multi_head_attention_forward and not kwargs.get("need_weights", True):
            raise RuntimeError("attention inside of it is not seen here")  # fake tensors tell it
        return func(*args, **kwargs)

    def _attend(
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
        given = [each for each in (query, key, value, attn_mask) if each is not None]
        layouts = [(each.shape, each.stride(), each.dtype) for each in given]
        case = (*layouts, dropout_p, is_causal, scale, enable_gqa)
        if case not in self._fused:
            with _disable_current_modes(), torch.no_grad():
                real = [torch.empty_strided(shape, stride, dtype=dtype) for shape, stride, dtype in layouts]
                mask = real[3] if len(real) > 3 else None
                choose: Any = torch._fused_sdp_choice
                choice = choose(*real[:3], mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
            self._fused[case] = choice == _FLASH
        if not self._fused[case]:
            return functional.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, -torch.inf)
        fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
        out: torch.Tensor = fused(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]
        return out


_FLASH = 1
