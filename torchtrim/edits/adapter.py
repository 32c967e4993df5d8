"""Which adapter repairs a shape: the smallest module that makes what comes into what is needed.

A value's layout is a word: "NCHW", "NHWC", "NCL", "NLC", "NCDHW", "NDHWC" or "flat", N being the batch.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torchtrim.edits.adapter_layers import ChannelsLast, FitChannels, MeanOver, TokenGrid, ToTokens
from torchtrim.errors import EditError

Shape = tuple[int, ...]
KINDS = ("auto", "pool", "slice", "project")
_LAYOUTS = {2: ("flat", "flat"), 3: ("NCL", "NLC"), 4: ("NCHW", "NHWC"), 5: ("NCDHW", "NDHWC")}
_AVG: dict[int, Any] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_ADAPTIVE: dict[int, Any] = {1: nn.AdaptiveAvgPool1d, 2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}
_PICK: dict[int, Any] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_ZEROS: dict[int, Any] = {1: nn.ZeroPad1d, 2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
_CONV: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BORDER = 6  # what convolutions without padding may take off a side


def adapter_for(before: Shape, after: Shape, *, layout: str, kind: str = "auto") -> nn.Module:
    """The adapter from one shape to another.

    The places (height and width, or tokens) come first, then the channels. Places that become fewer by a whole ratio
    are averaged, a border is cut off or put on as zeros, places that become more are repeated. What `kind` says:

    - `"auto"`: channels that become more get zeros behind them, which loses nothing and takes no weights (He et al.
      2015, shortcut A); channels that become fewer go through a 1x1 convolution (or linear layer) that begins as the
      choice of the first ones, so that training or healing may find a better one.
    - `"pool"`: without weights: as `"auto"`, but of channels that become fewer the first are kept.
    - `"slice"`: without weights, and without averaging: of the places every second (third, ...) is kept.
    - `"project"`: a 1x1 convolution or linear layer for the channels in any case, beginning as the identity (or the
      part of it that fits); it takes the stride on itself.

    Args:
        before: The shape that comes, batch first.
        after: The shape that is needed.
        layout: Where the channels are; of a shape of another rank, they are in the place usual for it.
        kind: Which sort.

    Raises:
        EditError: None is known for these shapes.

    Example:
        >>> adapter_for((1, 64, 56, 56), (1, 128, 28, 28), layout="NCHW")
        Sequential(
          (pool): AvgPool2d(kernel_size=(2, 2), stride=(2, 2), padding=0)
          (channels): FitChannels(128, dim=1)
        )
        >>> adapter_for((1, 64), (1, 32), layout="flat", kind="pool")
        FitChannels(32, dim=1)
    """
    if before[:1] != after[:1] or min(len(before), len(after)) < 2 or max(len(before), len(after)) > 5:
        raise _unknown(before, after)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if len(before) == len(after):
        stride = _places(layers, before, after, layout, kind)
        _channels(layers, before, after, layout, kind, stride)
    elif len(after) == 2:
        _flattened(layers, before, after, layout, kind)
    elif (len(before), len(after), layout) == (4, 3, "NCHW"):
        side = math.isqrt(after[1])
        if side * side != after[1] or before[2] != before[3]:
            raise _unknown(before, after)
        _places(layers, before, (*before[:2], side, side), layout, "pool" if kind == "project" else kind)
        layers["tokens"] = ToTokens()
        _channels(layers, (after[0], after[1], before[1]), after, "NLC", kind, None)
    else:
        raise _unknown(before, after)
    return next(iter(layers.values())) if len(layers) == 1 else nn.Sequential(layers)


def layout_of(before: Shape, after: Shape, modules: Iterable[nn.Module]) -> str:
    """Where the channels are in a value that comes out of some modules.

    The last of the layers with weights in them says it; without such, the dimensions that change by one ratio are the
    places; else the usual layout of pictures, or of tokens, is taken.

    Example:
        >>> layout_of((1, 56, 56, 96), (1, 28, 28, 192), [nn.LayerNorm(192)])
        'NHWC'
    """
    rank = len(before) if len(before) > len(after) else len(after)
    first, last = _LAYOUTS.get(rank, ("flat", "flat"))
    shape = after if len(after) == rank else before
    inner = [layer for module in modules for layer in module.modules()]
    for layer in reversed(inner):
        weight = getattr(layer, "weight", None)
        if not isinstance(weight, torch.Tensor):
            continue
        in_front = weight.dim() > 2 or (weight.dim() == 1 and hasattr(layer, "affine"))
        widths = {int(size) for size in weight.shape[:2]}
        if shape[1] in widths and (in_front or shape[-1] not in widths):
            return first
        if shape[-1] in widths:
            return last
    if rank == 3:
        return first if before[-1] != after[-1] and before[1] == after[1] else last
    if len(before) == len(after) > 3 and before[1:] != after[1:]:
        fits = [_one_ratio(before[part], after[part]) for part in (slice(2, None), slice(1, -1))]
        if fits[0] != fits[1]:
            return first if fits[0] else last
    return first


def _one_ratio(before: Shape, after: Shape) -> bool:
    ratio = before[0] / after[0]
    return all(abs(a - b / ratio) <= 1 for a, b in zip(after, before, strict=True))


def _unknown(before: Shape, after: Shape) -> EditError:
    return EditError(
        "no adapter is known between these shapes",
        found=tuple(before),
        expected=tuple(after),
        hint="adapter=, a module of your own from the one to the other",
    )


def _channel_dim(layout: str) -> int:
    return 1 if layout in ("flat", "NCL", "NCHW", "NCDHW") else len(layout) - 1


def _place_dims(shape: Shape, layout: str) -> list[int]:
    channel = _channel_dim(layout)
    return [dim for dim in range(1, len(shape)) if dim != channel]


def _places(
    layers: OrderedDict[str, nn.Module], before: Shape, after: Shape, layout: str, kind: str
) -> tuple[int, ...] | None:
    """Add what brings the places to their number; a stride that a projection takes on itself is returned instead."""
    dims = _place_dims(before, layout)
    old, new = tuple(before[dim] for dim in dims), tuple(after[dim] for dim in dims)
    if old == new:
        return None
    prefix = _prefix(old[0], new[0]) if layout == "NLC" else None
    if prefix is not None:
        old, new = ((math.isqrt(old[0] - prefix),) * 2, (math.isqrt(new[0] - prefix),) * 2)
    in_front = _channel_dim(layout) == 1
    name, layer, stride = _resized(old, new, kind)
    if kind == "project" and in_front and stride is not None:
        return stride
    if prefix is not None:
        layer = TokenGrid(layer, prefix)
    layers[name] = layer if in_front or prefix is not None else ChannelsLast(layer)
    return None


def _prefix(old: int, new: int) -> int | None:
    """How many tokens stand before a square grid, in both; `None` where they are no square grids."""
    for prefix in (0, 1, 2):
        sides = math.isqrt(max(old - prefix, 0)), math.isqrt(max(new - prefix, 0))
        if (sides[0] ** 2, sides[1] ** 2) == (old - prefix, new - prefix) and min(sides) > 0:
            return prefix
    return None


def _resized(old: Shape, new: Shape, kind: str) -> tuple[str, nn.Module, tuple[int, ...] | None]:
    """A layer for channels in front, and its name; with the stride, where a plain stride does it."""
    rank = len(old)
    pairs = list(zip(old, new, strict=True))
    if all(abs(a - b) <= min(_BORDER, max(a, b) // 4) for a, b in pairs):
        sides = [side for b, a in reversed(pairs) for side in ((a - b) // 2, a - b - (a - b) // 2)]
        return "border", _ZEROS[rank](tuple(sides)), None
    if all(a >= b for b, a in pairs):
        if all(a % b == 0 for b, a in pairs):
            return "repeat", nn.Upsample(scale_factor=tuple(float(a // b) for b, a in pairs)), None
        return "repeat", nn.Upsample(size=tuple(new)), None
    if all(a <= b for b, a in pairs) and (any(a > 1 for a in new) or max(old) == 2):
        stride = tuple(max(1, math.floor(b / a)) if a > 1 else b for b, a in pairs)
        above = tuple(math.ceil(b / a) for b, a in pairs)
        for steps in dict.fromkeys((stride, above)):
            if all(math.ceil(b / step) == a for (b, a), step in zip(pairs, steps, strict=True)):
                if kind in ("slice", "project"):
                    return "every", _PICK[rank](1, stride=steps), steps
                # At an odd size too it gives what a padded convolution of that stride does.
                return "pool", _AVG[rank](steps, stride=steps, ceil_mode=True, count_include_pad=False), steps
            if all(b // step == a for (b, a), step in zip(pairs, steps, strict=True)):
                return "pool", _AVG[rank](steps, stride=steps), None
    return "pool", _ADAPTIVE[rank](new if rank > 1 else new[0]), None


def _channels(
    layers: OrderedDict[str, nn.Module],
    before: Shape,
    after: Shape,
    layout: str,
    kind: str,
    stride: tuple[int, ...] | None,
) -> None:
    dim = _channel_dim(layout)
    old, new = before[dim], after[dim]
    if old == new and stride is None and (kind != "project" or layers):
        return
    if kind == "project" or (kind == "auto" and new < old):
        layers["project"] = _projection(old, new, len(before) - 2 if dim == 1 else 0, stride)
    else:
        layers["channels"] = FitChannels(new, dim)


def _projection(old: int, new: int, rank: int, stride: tuple[int, ...] | None) -> nn.Module:
    """A 1x1 convolution (a linear layer, where the channels are last) that begins as the identity."""
    layer = _CONV[rank](old, new, 1, stride=stride or 1, bias=False) if rank else nn.Linear(old, new, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(new, old).reshape(layer.weight.shape))
    return layer


def _flattened(layers: OrderedDict[str, nn.Module], before: Shape, after: Shape, layout: str, kind: str) -> None:
    if math.prod(before[1:]) == after[1]:
        layers["flatten"] = nn.Flatten()
        return
    if layout == "NLC":
        layers["pool"] = MeanOver(1)
    else:
        pool = _ADAPTIVE[len(before) - 2](1)
        layers["pool"] = pool if _channel_dim(layout) == 1 else ChannelsLast(pool)
        layers["flatten"] = nn.Flatten()
    _channels(layers, (before[0], before[_channel_dim(layout)]), after, "flat", kind, None)
