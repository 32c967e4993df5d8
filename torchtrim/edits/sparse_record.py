"""What was decided when weights were pruned one by one: the masks, as bits, and a table of what they come to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from torchtrim.bench.table import Table
from torchtrim.edits.bits import pack, unpack
from torchtrim.edits.weights import Weights
from torchtrim.errors import EditError


@dataclass(frozen=True)
class SparseLayer:
    """What became of one weight.

    Attributes:
        path: Its full name: `layer1.0.conv1.weight`.
        shape: Its shape.
        zeros: How many of its values the mask keeps at zero.
        threshold: The largest score among what went last, where scores are magnitudes; `None` for N:M, random scores,
            and where nothing went.
    """

    path: str
    shape: tuple[int, ...]
    zeros: int
    threshold: float | None = None

    @property
    def weights(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        """The fraction of them that is zero."""
        return self.zeros / max(self.weights, 1)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "path": self.path,
            "shape": list(self.shape),
            "weights": self.weights,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "threshold": self.threshold,
        }


@dataclass(frozen=True)
class Sparsified:
    """What a sparsification decided.

    Attributes:
        layers: What became of each weight.
        left_out: The names of the other parameters, and why.
        notes: What the user was told.
        masks: For each weight its mask as bits, one where the weight stays; see `bits`.
    """

    bits_field: ClassVar[str] = "masks"
    layers: tuple[SparseLayer, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    masks: Weights | None = None

    @staticmethod
    def of(
        gone: Mapping[str, torch.Tensor],
        thresholds: Mapping[str, float | None],
        left_out: Mapping[str, str],
        notes: Sequence[str] = (),
    ) -> Sparsified:
        """The record of some masks, true where a weight goes."""
        return Sparsified(
            layers_of(gone, thresholds),
            dict(left_out),
            tuple(notes),
            Weights({name: pack(~mask) for name, mask in gone.items()}),
        )

    def gone(self) -> dict[str, torch.Tensor]:
        """The masks, true where a weight goes.

        Raises:
            EditError: The record holds none, or not those of its layers.
        """
        if self.masks is None or set(self.masks) != {layer.path for layer in self.layers}:
            raise EditError(
                "the record does not hold the masks of its layers",
                path="decided.masks",
                found="none" if self.masks is None else f"{len(self.masks)}",
                expected=f"{len(self.layers)}",
                hint="a record written with its weights: to_dict(weights=True)",
            )
        return {layer.path: unpack(self.masks[layer.path], layer.shape, name=layer.path) == 0 for layer in self.layers}

    def bits_of(self, path: str, part: torch.Tensor) -> torch.Tensor:
        """The mask of a part of a weight in which all zeros are the mask's; see `FollowsWeights`."""
        return pack(part != 0)

    def told(self) -> tuple[str, ...]:
        """The totals, what the user was told, and what was left out: in words."""
        zeros, weights = totals(self.layers)
        share = zeros / max(weights, 1)
        total = f"{zeros:,} of {weights:,} weights in {len(self.layers)} tensors are zero ({share:.2%})"
        return (total, *self.notes, *reasons(self.left_out))


def layers_of(gone: Mapping[str, torch.Tensor], thresholds: Mapping[str, float | None]) -> tuple[SparseLayer, ...]:
    """A row for each mask, true where a weight goes."""
    return tuple(
        SparseLayer(name, tuple(mask.shape), int(mask.sum()), thresholds.get(name)) for name, mask in gone.items()
    )


def totals(layers: Sequence[SparseLayer]) -> tuple[int, int]:
    """How many values are zero, and how many there are."""
    return sum(layer.zeros for layer in layers), sum(layer.weights for layer in layers)


def reasons(left_out: Mapping[str, str]) -> list[str]:
    """What was left out, a line for each reason.

    Example:
        >>> reasons({"fc.weight": "the last layer", "fc.bias": "a bias", "bn.bias": "a bias"})
        ['left out: fc.weight: the last layer', 'left out: fc.bias, bn.bias: a bias']
    """
    by_reason: dict[str, list[str]] = {}
    for name, why in left_out.items():
        by_reason.setdefault(why, []).append(name)
    return [
        f"left out: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: {why}"
        for why, names in by_reason.items()
    ]


def table(title: str, layers: Sequence[SparseLayer], notes: Sequence[str]) -> Table:
    """A table of weights, with the total in the last row."""
    zeros, weights = totals(layers)
    rows = [
        (
            layer.path,
            "x".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            f"{layer.zeros:,}",
            f"{layer.sparsity:.2%}",
            "" if layer.threshold is None else f"{layer.threshold:.4g}",
        )
        for layer in layers
    ]
    total = ("all of these", "", f"{weights:,}", f"{zeros:,}", f"{zeros / max(weights, 1):.2%}", "")
    return Table(title, ("weight", "shape", "values", "zeros", "sparsity", "threshold"), (*rows, total), notes, left=2)
