"""`rank_channels`: how much each channel of a model matters, by the criteria that `prune_channels` goes by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from torchtrim.bench.table import Table
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import dependencies
from torchtrim.errors import EditError, InputError, PathError, nearest
from torchtrim.graph.copying import unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import What
from torchtrim.importance.channels import Importance, scores, silent
from torchtrim.importance.example import example_of
from torchtrim.importance.gradients import Loss

_SPARK = "▁▂▃▄▅▆▇█"
_WIDTH = 24


@dataclass(frozen=True)
class RankedChannels:
    """The channels of one group: those of a layer, with all that can only go together with them.

    Attributes:
        path: The layer that makes them, the first in order of execution.
        each: How many entries of that layer one of them is (of attention heads: the width of a head).
        scores: One for each; higher = keep. NaN where the criterion says nothing.
    """

    path: str
    each: int
    scores: tuple[float, ...]


@dataclass(frozen=True)
class ChannelRanking:
    """How much each channel of a model matters. `str()` is a table, `to_dict()` plain data.

    Attributes:
        model: The model's class.
        criterion: What they were ranked by.
        layers: The groups, in the order of execution.
        left_alone: Layers whose channels cannot go, and why.
        notes: What else is to be told.
    """

    model: str
    criterion: str
    layers: tuple[RankedChannels, ...]
    left_alone: dict[str, str]
    notes: tuple[str, ...] = ()

    def __getitem__(self, path: str) -> RankedChannels:
        for layer in self.layers:
            if layer.path == path:
                return layer
        names = [layer.path for layer in self.layers]
        raise PathError("the ranking has no such layer", path=path, hint=nearest(str(path), names))

    def least(self, count: int = 1) -> list[tuple[str, int]]:
        """The least important of all: the layer, and the number of the channel (of the head) in it.

        Raises:
            InputError: There are not so many.
        """
        pairs = [(layer.path, number) for layer in self.layers for number in range(len(layer.scores))]
        values = np.array([score for layer in self.layers for score in layer.scores])
        known = int(np.isfinite(values).sum())
        if not 0 <= count <= known:
            raise InputError(
                "the ranking has not so many channels", path="count", found=count, expected=f"0 to {known}"
            )
        return [pairs[place] for place in np.argsort(values, kind="stable")[:count]]

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold; `null` where the criterion says nothing."""
        layers = [
            {
                "path": layer.path,
                "each": layer.each,
                "scores": [score if np.isfinite(score) else None for score in layer.scores],
            }
            for layer in self.layers
        ]
        return {
            "model": self.model,
            "criterion": self.criterion,
            "layers": layers,
            "left_alone": dict(self.left_alone),
            "notes": list(self.notes),
        }

    def table(self) -> Table:
        """A row for each group, its scores sorted."""
        rows = []
        for layer in self.layers:
            known = np.sort([score for score in layer.scores if np.isfinite(score)])
            numbers = ("", "", "") if not known.size else tuple(f"{f(known):.4g}" for f in (np.min, np.mean, np.max))
            rows.append((layer.path, _sorted_bars(known), str(len(layer.scores)), *numbers))
        columns = ("layer", "scores, sorted", "channels", "least", "mean", "most")
        notes = [f"- by {self.criterion}; higher = keep", *(f"- {note}" for note in self.notes)]
        return Table(f"Channels of {self.model}", columns, tuple(rows), notes, left=2)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def rank_channels(
    model: nn.Module,
    data: Iterable[Any] | None = None,
    criterion: Importance = "magnitude",
    example_inputs: ExampleInputs | None = None,
    *,
    loss: Loss | None = None,
    protect: What | Iterable[What] = (),
) -> ChannelRanking:
    """Rank the channels of a model, as `prune_channels` does before it takes them out.

    Channels that can only go together (through residual connections, norms, heads) are one, named by the first layer
    that makes them.

    Args:
        model: Any `nn.Module`. It is left as it was.
        data: Batches, for `"taylor"`, `"hessian"`, `"apoz"`, `"activation"` and `"reconstruction"`.
        criterion: The `importance` of `prune_channels`: a name, a criterion of torch-pruning, or a function that is
            given a `ChannelGroup` and returns scores.
        example_inputs: As for `cut`; where it is left out and the history does not know it, the first batch.
        loss: For criteria of gradients: `loss(output, target)`.
        protect: Modules whose channels are not ranked, with all in them.

    Returns:
        The scores by layer. But for `lamp`, `apoz` and functions of yours, 1 is a layer's average channel.

    Raises:
        EditError: No such criterion, or the model has no channels that could go.
        InputError: The criterion needs data, or the data does not fit; or nothing says what the model takes.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
        >>> with torch.no_grad():
        ...     _ = net[0].weight[1].zero_(), net[2].weight[:, 1].zero_()
        >>> rank_channels(net, example_inputs=torch.zeros(1, 4)).least()
        [('0', 1)]
    """
    model = unwrap(model)
    inputs, batches = example_of(model, data, example_inputs)
    found = dependencies(model, follow(model, inputs), protect=protect)
    if not found.groups:
        raise EditError(
            "it has no channels that could go",
            found=type(model).__name__,
            hint="tt.plan with prune_channels, which says why",
        )
    values = scores(model, found, criterion, data=None if data is None else batches, loss=loss, inputs=inputs)
    layers = tuple(
        RankedChannels(group.name, group.channels_each, tuple(values[group.units].tolist())) for group in found.groups
    )
    unknown = [layer.path for layer in layers if not np.isfinite(layer.scores).any()]
    notes = tuple(f"{path}: {silent(criterion)}" for path in unknown)
    name = criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)
    return ChannelRanking(type(model).__name__, name, layers, dict(found.left_alone), notes)


def _sorted_bars(values: Any) -> str:
    """Scores from the least to the most as bars, at most so many."""
    if not values.size or values[-1] <= 0:
        return ""
    chosen = values[np.linspace(0, values.size - 1, min(values.size, _WIDTH)).round().astype(int)]
    return "".join(_SPARK[min(int(max(value, 0) / values[-1] * 8), 7)] for value in chosen)
