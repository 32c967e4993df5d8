"""The layers that a new head is made of: pooling for any layout of features, then linear layers."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import nn

POOLS = ("avg", "max", "token", "attention")
LAYOUTS = ("flat", "NLC", "LNC", "NCL", "NCHW", "NHWC", "NCDHW", "NDHWC")


class Pool(nn.Module):
    """Features of any layout to one vector a sample: shape (N, C).

    Args:
        kind: `"avg"` or `"max"` over all places, or `"token"`: the first token (the class token of a ViT).
        layout: Where the channels are: one of `LAYOUTS`.

    Example:
        >>> Pool("avg", "NHWC")(torch.ones(2, 7, 7, 5)).shape
        torch.Size([2, 5])
    """

    def __init__(self, kind: str, layout: str) -> None:
        super().__init__()
        self.kind = kind
        self.layout = layout

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool features of shape (N, ...) to (N, C)."""
        tokens = _tokens(x, self.layout)
        if self.kind == "token":
            return tokens[:, 0]
        return tokens.amax(1) if self.kind == "max" else tokens.mean(1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.kind!r}, {self.layout!r}"


class AttentionPool(nn.Module):
    """A weighted mean over all places; a learned query gives the weights. Shape (N, ...) to (N, C).

    Source: attention pooling without gate, Ilse et al., "Attention-based Deep Multiple Instance Learning", 2018, in its
    dot-product form.

    Example:
        >>> AttentionPool(5, "NLC")(torch.ones(2, 9, 5)).shape
        torch.Size([2, 5])
    """

    def __init__(self, width: int, layout: str) -> None:
        super().__init__()
        self.layout = layout
        self.query = nn.Parameter(torch.zeros(width))  # starts as the plain mean

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Pool features of shape (N, ...) to (N, C)."""
        tokens = _tokens(x, self.layout)
        weights = (tokens @ self.query / math.sqrt(tokens.shape[-1])).softmax(1)
        return (weights.unsqueeze(1) @ tokens).squeeze(1)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"{self.query.numel()}, {self.layout!r}"


def _tokens(x: torch.Tensor, layout: str) -> torch.Tensor:
    """Features as (N, places, C)."""
    if layout == "LNC":
        return x.transpose(0, 1)
    if layout.endswith("C"):
        return x.flatten(1, -2)
    return x.flatten(2).transpose(1, 2)


def channel_dim(layout: str) -> int:
    """Where the channels are.

    Example:
        >>> channel_dim("NCHW"), channel_dim("NHWC")
        (1, -1)
    """
    return -1 if layout.endswith("C") or layout == "flat" else 1


def stack(
    width: int, num_classes: int, *, layout: str, hidden: Sequence[int], dropout: float
) -> OrderedDict[str, nn.Module]:
    """The linear layers of a head: `hidden1`, `relu1`, ..., `dropout`, `fc`."""
    kinds = {"NCL": nn.Conv1d, "NCHW": nn.Conv2d, "NCDHW": nn.Conv3d}

    def linear(inputs: int, outputs: int) -> nn.Module:
        return kinds[layout](inputs, outputs, kernel_size=1) if layout in kinds else nn.Linear(inputs, outputs)

    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for number, size in enumerate(hidden, 1):
        layers[f"hidden{number}"] = linear(width, size)
        layers[f"relu{number}"] = nn.ReLU()
        width = size
    if dropout:
        layers["dropout"] = nn.Dropout(dropout)
    layers["fc"] = linear(width, num_classes)
    return layers
