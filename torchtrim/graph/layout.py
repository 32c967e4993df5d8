"""Where the channels of a model's features are: NCHW, NHWC (swin), tokens (ViT) or flat."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchtrim.errors import HeadError
from torchtrim.graph.reader import Reader, Site

_BY_DIMS = {4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC"), 3: ("NCL", "NLC")}


def feature_layout(reader: Reader, output: Site, shape: tuple[int, ...]) -> str:
    """The layout of features that a model returns.

    Found from the nearest layers with weights on the way back: the dimension that has their width is the channels'.
    Where both could be, a convolution or batch norm says first, a linear layer or layer norm last; where neither is,
    the dimensions that shrank like the input's height and width are the places, and the other is the channels.

    Raises:
        HeadError: It cannot be told.
    """
    if len(shape) == 2:
        return "flat"
    sequence_first = any(getattr(module, "batch_first", True) is False for module in reader.root.modules())
    if len(shape) == 3 and sequence_first and reader.inputs.tensors[0].shape[:2] == shape[:2]:
        raise HeadError(
            "it cannot be told which dimension of the features is the batch: a layer in the model takes it second",
            found=tuple(shape),
            hint="layout='LNC' or layout='NLC'",
        )
    if len(shape) not in _BY_DIMS:
        raise HeadError("features of this shape have no known layout", found=shape, expected="2 to 5 dimensions")
    first, last = _BY_DIMS[len(shape)]
    for width, channels_first in _nearest_widths(output):
        here = (shape[1] == width, shape[-1] == width)
        if here == (True, True):
            return first if channels_first else last
        if any(here):
            return first if here[0] else last
    if len(shape) == 3:
        return last
    pictures = [tensor.shape for tensor in reader.inputs.tensors if tensor.dim() == len(shape)]
    if pictures:
        fits = [_shrunk(pictures[0][2:], places) for places in (shape[2:], shape[1:-1])]
        if fits[0] != fits[1]:
            return first if fits[0] else last
    raise HeadError(
        "it cannot be told which dimension of the features is the channels",
        found=tuple(shape),
        hint=f"layout={first!r} or layout={last!r}",
    )


def _shrunk(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether every side was divided by the same number, give or take rounding."""
    ratio = before[-1] / after[-1]
    return all(abs(a - b / ratio) <= 1 for a, b in zip(after, before, strict=True))


def _nearest_widths(output: Site) -> list[tuple[int, bool]]:
    """The output widths of the layers that the features come from, nearest first, and whether channels come first."""
    found: list[tuple[int, bool]] = []
    seen: set[Site] = set()
    queue = [output]
    while queue and len(found) < 8:
        site = queue.pop(0)
        if site in seen:
            continue
        seen.add(site)
        width = width_of(site.target) if site.op == "module" else None
        if width is not None:
            found.append(width)
        if width is None or _keeps_layout(site.target):
            queue += site.inputs
    return found


def width_of(module: Any) -> tuple[int, bool] | None:
    """The output width of a layer with weights, and whether it writes channels first; `None` for other modules.

    Example:
        >>> width_of(nn.Conv2d(3, 8, 1)), width_of(nn.Linear(3, 4)), width_of(nn.LayerNorm(5)), width_of(nn.ReLU())
        ((8, True), (4, False), (5, False), None)
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() == 0:
        return None
    transposed = getattr(module, "transposed", False) is True
    width = int(weight.shape[1 if transposed else 0]) * (int(getattr(module, "groups", 1)) if transposed else 1)
    if weight.dim() == 1:
        return width, hasattr(module, "running_mean") or hasattr(module, "num_groups")
    return width, weight.dim() > 2


def _keeps_layout(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, nn.Parameter) and weight.dim() == 1
