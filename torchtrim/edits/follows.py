"""What a record holds in bits, one number an entry of a weight, and the weights of the edited model say too.

A mask is where the weight is zero; which of its values an entry has can be seen from the entry. As long as the model is
what the edit made of it, a file need not hold both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import torch


class Layer(Protocol):
    """What became of one weight."""

    @property
    def path(self) -> str:
        """Its full name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


@runtime_checkable
class FollowsWeights(Protocol):
    """The decided part of a record with bits for each entry of some weights.

    Attributes:
        bits_field: The field that has them, by weight: `Weights`, packed as `bits.pack` does.
    """

    bits_field: ClassVar[str]

    @property
    def layers(self) -> Sequence[Layer]:
        """The weights."""

    def bits_of(self, path: str, part: torch.Tensor) -> torch.Tensor | None:
        """The bits that the record has if it says no more than the weight does.

        Args:
            path: The name of the weight.
            part: Some of the weight's entries in the order of its memory when it lies row by row, as numbers in real
                floating point on the CPU: `(count,)`, a multiple of 8 but for the last part.

        Returns:
            Bytes, packed; `None` where the weight cannot be what the record made of it.
        """
