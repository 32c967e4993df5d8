"""Calibration batches as arguments for a model: in small pieces, part of them held back to judge by."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError
from torchtrim.graph.batches import arguments_of
from torchtrim.graph.copying import kept_random_state, structural_copy
from torchtrim.graph.inputs import Inputs

_ROWS = 16  # in one piece: bounds the memory of a step, whatever the size of a batch
HELD_BACK = 5  # one row of so many
_MOST_HELD = 512  # rows to judge by; more would cost time and memory, and tell little
_LEAST = 10


@dataclass(frozen=True)
class Calibration:
    """Batches of inputs, gone through several times.

    Attributes:
        data: An iterable of batches: tensors, `(inputs, targets)` pairs or dicts. A tensor or dict by itself is one.
        model: Whose arguments they are.
        example: Example inputs of that model.
        taken: What the model was seen to take: shapes and types.
    """

    data: Iterable[Any]
    model: nn.Module
    example: Inputs
    taken: set[str] = field(default_factory=set)

    @staticmethod
    def of(data: Iterable[Any] | None, model: nn.Module, example: Inputs, *, what: str = "healing") -> Calibration:
        """Read what a user gives.

        Args:
            data: What the user gave.
            model: Whose arguments the batches are.
            example: Example inputs of it.
            what: What the data is for, in words.

        Raises:
            InputError: There is none, it can be gone through only once, it holds too little to judge by, or a batch
                holds nothing for the forward. One that the forward refuses raises where it is read.

        Example:
            >>> net, example = nn.Linear(3, 2), Inputs.of(torch.zeros(1, 3))
            >>> found = Calibration.of([torch.zeros(8, 3), torch.zeros(4, 3)], net, example)
            >>> [piece.batch for piece in found.to_fit()], [piece.batch for piece in found.held_back()]
            ([7, 3], [1, 1])
        """
        if data is None:
            raise InputError(
                f"{what} looks at what flows through the model, so it needs data",
                expected="data=, an iterable of batches (tensors, (inputs, targets) pairs or dicts)",
                hint="data=loader, some hundred unlabelled inputs" + ("; or heal=None" if what == "healing" else ""),
            )
        if isinstance(data, (torch.Tensor, Mapping)):
            data = [data]
        if not isinstance(data, Iterable):
            raise InputError(
                "data is an iterable of batches", found=type(data).__name__, expected="a list, a DataLoader"
            )
        if iter(data) is data:
            raise InputError(
                f"{what} goes through the data several times, and this can be gone through once",
                found=type(data).__name__,
                hint="data=list(batches), or a DataLoader",
            )
        found = Calibration(data, model, example)
        count = 0
        for number, batch in enumerate(data):
            count += found._read(number, batch).batch
            if count >= _LEAST:
                return found
        raise InputError(
            f"too little data for {what}", path="data", found=f"{count} inputs", expected=f"{_LEAST} or more"
        )

    def to_fit(self, rows: int = _ROWS) -> Iterator[Inputs]:
        """What is fitted on, in pieces of at most so many rows."""
        yield from self._pieces(lambda row: row % HELD_BACK != HELD_BACK - 1, rows=rows)

    def all(self, rows: int = _ROWS) -> Iterator[Inputs]:
        """Everything, likewise."""
        yield from self._pieces(lambda row: True, rows=rows)

    def held_back(self) -> Iterator[Inputs]:
        """What is judged by, likewise: one row in five, up to some hundreds."""
        yield from self._pieces(lambda row: row % HELD_BACK == HELD_BACK - 1, _MOST_HELD)

    def _pieces(self, wanted: Callable[[int], bool], most: int | None = None, *, rows: int = _ROWS) -> Iterator[Inputs]:
        start = found = 0
        for number, batch in enumerate(self.data):
            inputs = self._read(number, batch)
            size = inputs.batch
            taken = [row for row in range(size) if wanted(start + row)]
            start += size
            for piece in range(0, len(taken), rows):
                if most is not None and found >= most:
                    return
                chosen = taken[piece : piece + rows]
                found += len(chosen)
                part = _taken(inputs, chosen, size).map(self._on_device)
                self._refuse_untaken(number, part)
                yield part

    def _read(self, number: int, batch: Any) -> Inputs:
        try:
            return arguments_of(batch, self.model, self.example)
        except InputError as error:
            raise InputError(
                "a batch holds none of the forward's arguments",
                path=f"data[{number}]",
                found=error.found or type(batch).__name__,
                expected=error.expected or "a tensor, an (inputs, targets) pair or a dict",
            ) from error

    def _refuse_untaken(self, number: int, part: Inputs) -> None:
        """Run the model on shapes and types that it has not had yet, so that an error names the data."""
        kind = part.with_batch(1).describe()
        if kind in self.taken:
            return
        twin = structural_copy(self.model, own_buffers=True, user_hooks=False).eval()
        try:
            with torch.no_grad(), kept_random_state():
                part.fresh().call(twin)
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever the user's model raises: it does not take these inputs
            raise InputError(
                f"the model does not take the data: {type(error).__name__}: {str(error).rstrip('.')}",
                path=f"data[{number}]",
                found=part.describe(),
                expected=self.example.describe(),
            ) from error
        self.taken.add(kind)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.detach().to(self.example.tensors[0].device)


def _taken(inputs: Inputs, rows: list[int], size: int) -> Inputs:
    """Some rows of every tensor whose first dimension is the batch."""
    if len(rows) == size:
        return inputs

    def take(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != size:
            return tensor
        return tensor[torch.tensor(rows, device=tensor.device)]

    return inputs.map(take)
