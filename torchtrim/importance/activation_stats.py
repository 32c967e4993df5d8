"""`activation_stats`: what comes out of each layer, channel by channel: its mean and spread, and how much is zero."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from torchtrim.bench.table import Table
from torchtrim.errors import ModelError, PathError, nearest
from torchtrim.graph.batches import answer_to
from torchtrim.graph.copying import is_meta, unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import What, select
from torchtrim.importance.block_metrics import calm
from torchtrim.importance.example import example_of
from torchtrim.importance.gradients import arguments_in, runnable_copy, watched


@dataclass(frozen=True)
class LayerStats:
    """What came out of one layer over all of the data.

    Attributes:
        path: The layer; `"path#k"` for one of several calls of it, counted in the order of execution.
        type: Its class.
        mean: The mean of all values.
        std: Their standard deviation.
        zeros: The share of them that is exactly zero: the average percentage of zeros (APoZ, Hu et al. 2016).
        dead: The channels that are zero everywhere.
        channel_mean: The mean of each channel.
        channel_std: The standard deviation of each.
        channel_zeros: The share of zeros of each.
    """

    path: str
    type: str
    mean: float
    std: float
    zeros: float
    dead: tuple[int, ...]
    channel_mean: tuple[float, ...]
    channel_std: tuple[float, ...]
    channel_zeros: tuple[float, ...]

    @property
    def channels(self) -> int:
        """How many channels it has."""
        return len(self.channel_mean)


@dataclass(frozen=True)
class ActivationStats:
    """What came out of the layers of a model. `str()` is a table, `to_dict()` plain data.

    Attributes:
        model: The model's class.
        layers: The layers, in the order of execution.
        rows: How many rows of data went through.
    """

    model: str
    layers: tuple[LayerStats, ...]
    rows: int

    @property
    def dead(self) -> dict[str, tuple[int, ...]]:
        """The channels that are zero everywhere, by layer, where there are any."""
        return {layer.path: layer.dead for layer in self.layers if layer.dead}

    def __getitem__(self, path: str) -> LayerStats:
        for layer in self.layers:
            if layer.path == path:
                return layer
        names = [layer.path for layer in self.layers]
        raise PathError("there are no statistics of this layer", path=path, hint=nearest(str(path), names))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return {**asdict(self), "dead": {path: list(channels) for path, channels in self.dead.items()}}

    def table(self) -> Table:
        """A row for each layer."""
        rows = tuple(
            (
                layer.path,
                layer.type,
                str(layer.channels),
                f"{layer.mean:.4g}",
                f"{layer.std:.4g}",
                f"{layer.zeros:.1%}",
                str(len(layer.dead)) if layer.dead else "",
            )
            for layer in self.layers
        )
        columns = ("layer", "type", "channels", "mean", "std", "zeros", "dead")
        notes = [f"- of {self.rows} rows; dead: channels that are zero everywhere"]
        return Table(f"Activations of {self.model}", columns, rows, notes, left=2)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def activation_stats(
    model: nn.Module, data: Iterable[Any], paths: What | None = None, example_inputs: ExampleInputs | None = None
) -> ActivationStats:
    """Measure what comes out of the layers of a model, in one forward pass and without keeping any of it.

    The model runs in eval mode as a copy that shares its weights, and is left as it was.

    Args:
        model: Any `nn.Module`.
        data: Batches, gone through once: tensors, `(inputs, targets)` pairs or dicts; labels are not looked at.
        paths: The modules: paths, globs, types, predicates, or a list of these. By default the activation functions
            that are modules; where there are none, all layers that have weights.
        example_inputs: As for `cut`; where it is left out and the history does not know it, the first batch.

    Returns:
        For each call of each module the statistics of its first tensor of real numbers.

    Raises:
        PathError: A path does not exist, or is never called.
        InputError: The data holds nothing, or does not fit the model.
        ModelError: What comes out of a layer is not finite.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
        >>> with torch.no_grad():
        ...     _ = net[0].weight.copy_(torch.eye(2)), net[0].bias.copy_(torch.tensor([0.0, -9.0]))
        >>> found = activation_stats(net, [torch.tensor([[1.0, 1.0], [-1.0, 1.0]])])
        >>> found["1"].zeros, found["1"].channel_mean, found.dead
        (0.75, (0.5, 0.0), {'1': (1,)})
    """
    model = unwrap(model)
    if is_meta(model):
        raise ModelError("the model is on the meta device: there are no values to measure")
    inputs, data = example_of(model, data, example_inputs)
    wanted = _wanted(model, paths)
    twin = runnable_copy(model).eval()
    sums: dict[tuple[str, int], _Sums] = {}
    counts: dict[str, int] = {}
    along: list[int | None] = [None]  # the axis of the channels that the last layer with weights wrote along
    for path, module in twin.named_modules():
        axis = channel_axis_of(module)
        if axis is not None:
            module.register_forward_hook(_noting(axis, along))
        if path in wanted:
            module.register_forward_hook(_adding(path, counts, sums, along))
    rows = 0
    with calm():
        for number, batch in enumerate(watched(data, "activations")):
            given = arguments_in(batch, number, model, inputs)
            rows += given.batch
            counts.clear()
            answer_to(given.fresh(), twin, number)
    for path in wanted:
        if paths is not None and (path, 0) not in sums:
            raise PathError(
                "nothing came out of it: it is not called, or returns no tensor of real numbers",
                path=path,
                hint="a path that tt.summary lists with its calls",
            )
    several = {path for path, call in sums if call}
    layers = tuple(
        each.result(f"{path}#{call}" if path in several else path, type(model.get_submodule(path)).__name__)
        for (path, call), each in sums.items()
    )
    return ActivationStats(type(model).__name__, layers, rows)


def channel_axis_of(module: nn.Module) -> int | None:
    """Along which axis a layer with weights writes channels: 1, or -1 for the last; `None` for what is no such layer.

    Example:
        >>> channel_axis_of(nn.Conv2d(1, 1, 1)), channel_axis_of(nn.Linear(1, 1)), channel_axis_of(nn.ReLU())
        (1, -1, None)
    """
    convolution = (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)
    if isinstance(module, convolution):
        return 1
    weight = module._parameters.get("weight")
    return -1 if weight is not None and not any(True for _ in module.children()) else None


def _wanted(model: nn.Module, paths: What | None) -> list[str]:
    names = {module: path for path, module in reversed(list(model.named_modules()))}
    if paths is not None:
        return list(dict.fromkeys(names[model.get_submodule(path)] for path in select(model, paths)))
    leaves = [(path, module) for path, module in model.named_modules() if path and not any(module.children())]
    functions = [path for path, module in leaves if _is_function(module)]
    return functions or [path for path, module in leaves if channel_axis_of(module) is not None]


def _is_function(module: nn.Module) -> bool:
    own = type(module).__module__ == "torch.nn.modules.activation" and not isinstance(module, nn.MultiheadAttention)
    return own or ("activation" in type(module).__module__ and not any(True for _ in module.parameters()))


def _noting(axis: int, along: list[int | None]) -> Any:
    def note(_module: nn.Module, _args: Any, _output: Any) -> None:
        along[0] = axis

    return note


def _adding(path: str, counts: dict[str, int], sums: dict[tuple[str, int], _Sums], along: list[int | None]) -> Any:
    def add(module: nn.Module, _args: Any, output: Any) -> None:
        call = counts[path] = counts.get(path, -1) + 1
        items = output if isinstance(output, (tuple, list)) else [output]
        value = next((each for each in items if isinstance(each, torch.Tensor) and each.is_floating_point()), None)
        if value is None or value.dim() < 2:
            return
        if not bool(torch.isfinite(value).all()):
            raise ModelError("on this data what comes out of it is not finite", path=path, hint="data without NaN")
        axis = -1 if along[0] is None else along[0]
        flat = value.detach().movedim(axis, -1).flatten(0, -2)
        sums.setdefault((path, call), _Sums()).add(flat, path)

    return add


class _Sums:
    """Sums over rows and places for each channel, shifted by the first mean so that offsets cost no precision."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, flat: torch.Tensor, path: str) -> None:
        values = flat.double()
        if not self.count:
            self.shift = values.mean(0)
            self.first, self.second, self.zero = (torch.zeros_like(self.shift) for _ in range(3))
        if values.shape[1] != len(self.shift):
            raise ModelError(
                "its channels are not as many in each batch", path=path, found=values.shape[1], expected=len(self.shift)
            )
        self.zero += (values == 0).sum(0)
        values = values - self.shift
        self.first += values.sum(0)
        self.second += values.square().sum(0)
        self.count += len(values)

    def result(self, path: str, kind: str) -> LayerStats:
        moved = self.first / self.count
        means = moved + self.shift
        variances = (self.second / self.count - moved.square()).clamp_min(0)
        mean = float(means.mean())
        deviation = float((variances + (means - mean).square()).mean().sqrt())
        dead = torch.nonzero(self.zero == self.count).flatten().tolist()
        shares = self.zero / self.count
        numbers = (tuple(each.tolist()) for each in (means, variances.sqrt(), shares))
        return LayerStats(path, kind, mean, deviation, float(shares.mean()), tuple(dead), *numbers)
