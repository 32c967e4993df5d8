"""`feature_maps`: what comes out of some layers for a picture, as pictures."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from torchtrim.bench.figure import figure, written
from torchtrim.errors import InputError, ModelError, PathError
from torchtrim.graph.batches import answer_to
from torchtrim.graph.copying import is_meta, unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import What, select
from torchtrim.importance.activation_stats import channel_axis_of
from torchtrim.importance.block_metrics import calm
from torchtrim.importance.gradients import on_device, runnable_copy


def feature_maps(
    model: nn.Module,
    x: ExampleInputs,
    paths: What,
    path: str | os.PathLike[str] | None = None,
    *,
    channels: int = 12,
    row: int = 0,
    writer: Any = None,
    step: int = 0,
) -> dict[str, torch.Tensor]:
    """Draw what comes out of some layers: a line of small pictures for each, one a channel.

    Maps are drawn as they are. Of tokens, those that make a square are laid out as one (class tokens before them are
    left out); others are drawn as a strip, as are plain rows. Each channel has its own range from dark to light. The
    model runs once in eval mode, as a copy, and is left as it was.

    Args:
        model: Any `nn.Module`.
        x: What its forward takes.
        paths: The layers: paths, globs, types, predicates, or a list of these.
        path: The picture file; its ending says in which form (`.png`, `.svg`, `.pdf`).
        channels: How many channels of each to draw, evenly spread.
        row: Which row of the batch.
        writer: A `SummaryWriter` of TensorBoard: each layer becomes an image `feature maps/PATH`.
        step: The step it is written under.

    Returns:
        By path the maps that were drawn, `(channels, height, width)`.

    Raises:
        PathError: A path does not exist, or nothing that can be drawn comes out of it.
        InputError: The model refuses the input, it has no such row, or the picture cannot be written.
        MissingDependency: matplotlib is not installed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        >>> {path: maps.shape for path, maps in feature_maps(net, torch.zeros(1, 3, 8, 8), ["0", "1"]).items()}
        {'0': torch.Size([4, 6, 6]), '1': torch.Size([4, 6, 6])}
    """
    model = unwrap(model)
    if is_meta(model):
        raise ModelError("the model is on the meta device: there are no values to draw")
    if channels < 1:
        raise InputError("at least one channel is drawn", path="channels", found=channels, expected="1 or more")
    given = Inputs.of(x)
    if not -given.batch <= row < given.batch:
        raise InputError("the batch has no such row", path="row", found=row, expected=f"below {given.batch}")
    wanted = select(model, paths)
    maps = _maps(model, given, wanted, row, channels)
    for each in wanted:
        if each not in maps:
            raise PathError("nothing that can be drawn comes out of it", path=each, hint="a path that tt.summary lists")
    if writer is not None:
        for name, found in maps.items():
            writer.add_image(f"feature maps/{name}", _grid(found), step)
    if path is not None:
        _draw(maps, path)
    return maps


def _maps(model: nn.Module, given: Inputs, wanted: list[str], row: int, channels: int) -> dict[str, torch.Tensor]:
    twin = runnable_copy(model).eval()
    found: dict[str, torch.Tensor] = {}
    along = [-1]
    names: dict[nn.Module, list[str]] = {}
    for path in wanted:
        names.setdefault(twin.get_submodule(path), []).append(path)

    def note(axis: int) -> Any:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            along[0] = axis

        return hook

    def keep(module: nn.Module, _args: Any, output: Any) -> None:
        items = output if isinstance(output, (tuple, list)) else [output]
        items = list(output.values()) if isinstance(output, Mapping) else items
        value = next((each for each in items if isinstance(each, torch.Tensor) and each.is_floating_point()), None)
        if value is not None and 2 <= value.dim() <= 4:
            for path in names[module]:
                found.setdefault(path, _laid_out(value[row].detach().float().cpu(), along[0], channels))

    for module in twin.modules():
        axis = channel_axis_of(module)
        if axis is not None:
            module.register_forward_hook(note(axis))
        if module in names:
            module.register_forward_hook(keep)
    with calm():
        answer_to(given.map(lambda tensor: on_device(tensor, model)).fresh(), twin, 0)
    return {path: found[path] for path in wanted if path in found}


def _laid_out(value: torch.Tensor, axis: int, channels: int) -> torch.Tensor:
    """One row as maps: `(channels, height, width)`."""
    if value.dim() == 3:
        maps = value if axis == 1 else value.permute(2, 0, 1)
    elif value.dim() == 2:
        lines = value if axis == 1 else value.T
        side = math.isqrt(lines.shape[1])
        extra = lines.shape[1] - side * side
        square = side > 1 and extra <= 8  # class, distillation and register tokens come first
        maps = lines[:, extra:].reshape(-1, side, side) if square else lines[:, None, :]
    else:
        maps = value[None, None, :]
    chosen = torch.linspace(0, len(maps) - 1, min(channels, len(maps))).round().long()
    return maps[chosen]


def _scaled(maps: torch.Tensor) -> torch.Tensor:
    """Each map from 0 to 1; zero where it is the same everywhere, or not finite."""
    flat = maps.nan_to_num().flatten(1)
    low, high = flat.min(1).values[:, None, None], flat.max(1).values[:, None, None]
    return (maps.nan_to_num() - low) / (high - low).clamp_min(1e-12)


def _grid(maps: torch.Tensor) -> torch.Tensor:
    """All maps beside one another, `(1, height, width)`, for TensorBoard."""
    tiles = [nn.functional.pad(each, (0, 1), value=1.0) for each in _scaled(maps)]
    return torch.cat(tiles, 1)[None]


def _draw(maps: Mapping[str, torch.Tensor], path: str | os.PathLike[str]) -> Path:
    columns = max(len(each) for each in maps.values())
    drawn = figure(1.0 + 0.9 * columns, 0.4 + 1.1 * len(maps))
    axes = np.atleast_2d(drawn.subplots(len(maps), columns, squeeze=False))
    for line, (name, found) in zip(axes, maps.items(), strict=True):
        for place, axis in enumerate(line):
            axis.set_axis_off()
            if place < len(found):
                aspect = "auto" if 1 in found.shape[1:] else "equal"  # a strip is as high as the others
                axis.imshow(_scaled(found)[place].numpy(), cmap="viridis", vmin=0, vmax=1, aspect=aspect)
        line[0].set_title(f"{name}  {list(found.shape[1:])}", loc="left", fontsize=8)
    return written(drawn, path)
