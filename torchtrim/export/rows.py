"""Other rows of the same kind as those of an example, so that a file is not compared on one row again and again."""

from __future__ import annotations

import torch

from torchtrim.graph.inputs import Inputs


def with_other_rows(inputs: Inputs, batch: int) -> Inputs:
    """The inputs at a larger batch size, where the new rows differ from those of the example.

    Floats are scaled by random factors between 0.8 and 1: their sign and range stay, so that a row still is what the
    model takes; a row of zeros becomes small positive numbers. Whole numbers and truth values are moved along their
    last dimension, by the same number of places in every tensor: ids and their mask still fit together.

    Example:
        >>> rows = with_other_rows(Inputs.of(torch.ones(1, 4)), 3).tensors[0]
        >>> bool((rows[0] == 1).all()), bool((rows[1] == rows[2]).any())
        (True, False)
    """
    old = inputs.batch
    generator = torch.Generator().manual_seed(0)

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dim() == 0 or tensor.shape[0] != old or old == 0:
            return tensor
        rows = [tensor[i % old : i % old + 1] for i in range(batch)]
        return torch.cat([row if i < old else _other(row, i, generator) for i, row in enumerate(rows)])

    return inputs.map(resize)


def _other(row: torch.Tensor, number: int, generator: torch.Generator) -> torch.Tensor:
    if not (row.is_floating_point() or row.is_complex()):
        return row.roll(number, dims=-1) if row.dim() > 1 else row
    noise = torch.rand(row.shape, generator=generator).to(row.device)
    varied = row * (1 - 0.2 * noise) if row.any() else 0.1 * noise
    return varied.to(row.dtype)
