"""What was decided when weights came to share values: the values and which of them each entry has, in few bits."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from torchtrim.bench.table import Table
from torchtrim.edits.bits import pack, unpack
from torchtrim.edits.sparse_record import reasons
from torchtrim.edits.weights import Weights
from torchtrim.errors import EditError
from torchtrim.importance.shared_values import Shared

_MOST = 256  # what a byte can number


@dataclass(frozen=True)
class ClusteredLayer:
    """What became of one weight.

    Attributes:
        path: Its full name.
        shape: Its shape.
        values: How many values it has, zero among them.
        zeros: How many of its entries are zero.
        error: The length of the difference from what it was, over the length of that; of a trained one 0.
    """

    path: str
    shape: tuple[int, ...]
    values: int
    zeros: int
    error: float = 0.0

    @property
    def weights(self) -> int:
        """How many entries it has."""
        return math.prod(self.shape)

    @property
    def bits(self) -> int:
        """How many bits tell the value of an entry."""
        return _bits(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "path": self.path,
            "shape": list(self.shape),
            "weights": self.weights,
            "values": self.values,
            "bits": self.bits,
            "zeros": self.zeros,
            "error": self.error,
        }


@dataclass(frozen=True)
class Clustered:
    """What a clustering decided.

    Attributes:
        layers: What became of each weight.
        left_out: The names of the other parameters, and why.
        notes: What the user was told.
        values: For each weight its values.
        index: For each weight the number of each entry's value, packed; see `bits`.
    """

    bits_field: ClassVar[str] = "index"
    layers: tuple[ClusteredLayer, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    values: Weights | None = None
    index: Weights | None = None

    @staticmethod
    def of(
        found: Mapping[str, Shared],
        before: Mapping[str, torch.Tensor],
        left_out: Mapping[str, str],
        notes: Sequence[str] = (),
    ) -> Clustered:
        """The record of some weights, by name, that share values."""
        layers = tuple(_layer(name, shared, before[name]) for name, shared in found.items())
        packed = {layer.path: pack(found[layer.path].index, layer.bits) for layer in layers}
        values = {name: shared.values for name, shared in found.items()}
        return Clustered(layers, dict(left_out), tuple(notes), Weights(values), Weights(packed))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The weights that the record makes, by name.

        Raises:
            EditError: The record holds no values, or not those of its layers.
        """
        found = {}
        for layer in self.layers:
            values = None if self.values is None else self.values.get(layer.path)
            packed = None if self.index is None else self.index.get(layer.path)
            if values is None or packed is None or values.shape != (layer.values,):
                raise EditError(
                    "the record does not hold the values of this weight",
                    path=layer.path,
                    hint="a record written with its weights: to_dict(weights=True)",
                )
            index = unpack(packed, layer.shape, layer.bits, name=layer.path)
            if index.numel() and int(index.max()) >= layer.values:
                raise EditError("an entry has a value that is not there", path=layer.path, expected=layer.values)
            found[layer.path] = values[index.int()]
        return found

    def bits_of(self, path: str, part: torch.Tensor) -> torch.Tensor | None:
        """Which of the record's values each entry of a part of a weight has; see `FollowsWeights`.

        Of values that are the same in the weight's type, the first.
        """
        values = None if self.values is None else self.values.get(path)
        if values is None or values.dim() != 1 or not 0 < len(values) <= _MOST or not values.is_floating_point():
            return None
        exact = torch.float64 if part.dtype == torch.float64 else torch.float32  # of half precision too
        own, order = values.to(part.dtype).to(exact).sort(stable=True)
        entries = part.to(exact)
        places = torch.searchsorted(own, entries).clamp_(max=len(own) - 1)
        return pack(order.take(places), _bits(len(own))) if torch.equal(own.take(places), entries) else None

    def told(self) -> tuple[str, ...]:
        """The totals, what the user was told, and what was left out: in words."""
        bits = sum(layer.bits * layer.weights for layer in self.layers)
        weights = sum(layer.weights for layer in self.layers)
        most = max((layer.values for layer in self.layers), default=0)
        share = bits / max(weights, 1)
        tensors = f"{weights:,} weights in {len(self.layers)} tensors"
        total = f"{tensors} share up to {most} values each ({share:.3g} bits a weight)"
        return (total, *self.notes, *reasons(self.left_out))


def cluster_table(title: str, layers: Sequence[ClusteredLayer], notes: Sequence[str]) -> Table:
    """A table of weights that share values."""
    rows = tuple(
        (
            layer.path,
            "x".join(map(str, layer.shape)),
            f"{layer.weights:,}",
            str(layer.values),
            str(layer.bits),
            f"{layer.zeros / max(layer.weights, 1):.2%}",
            f"{layer.error:.3%}" if layer.error else "",
        )
        for layer in layers
    )
    columns = ("weight", "shape", "entries", "values", "bits", "sparsity", "error")
    return Table(title, columns, rows, notes, left=2)


def _bits(values: int) -> int:
    return max((values - 1).bit_length(), 1)


def _layer(name: str, shared: Shared, before: torch.Tensor) -> ClusteredLayer:
    after = shared.weight()
    length = float(before.double().norm())
    error = float((after.double() - before.double()).norm()) / length if length else 0.0
    return ClusteredLayer(name, tuple(shared.index.shape), shared.values.numel(), int((after == 0).sum()), error)
