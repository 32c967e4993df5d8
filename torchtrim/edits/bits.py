"""Small whole numbers packed into as few bits as hold them: masks and assignments in records and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from torchtrim.errors import EditError


def pack(numbers: torch.Tensor, width: int = 1) -> torch.Tensor:
    """Numbers from 0 to below 2 to the power of `width` (at most 8), as bytes.

    Args:
        numbers: Truth values, or whole numbers; of any shape.
        width: How many bits each takes.

    Returns:
        Bytes, on the CPU: `(ceil(count * width / 8),)`, the first number in the highest bits.

    Example:
        >>> packed = pack(torch.tensor([True, False, True]))
        >>> packed, unpack(packed, (3,)).tolist()
        (tensor([160], dtype=torch.uint8), [1, 0, 1])
    """
    plain = numbers.detach().flatten().to("cpu", torch.uint8).numpy()
    if width == 1:
        return torch.from_numpy(np.packbits(plain))
    if width in (2, 4):  # bytes hold whole numbers: much faster than bit by bit
        each = np.append(plain, np.zeros(-len(plain) % (8 // width), np.uint8)).reshape(-1, 8 // width)
        whole = np.zeros(len(each), np.uint8)
        for place in range(8 // width):
            whole = (whole << width) | (each[:, place] & (2**width - 1))
        return torch.from_numpy(whole)
    bits = np.unpackbits(plain[:, None], axis=1)[:, 8 - width :]
    return torch.from_numpy(np.packbits(bits))


def unpack(packed: torch.Tensor, shape: Sequence[int], width: int = 1, *, name: str = "bits") -> torch.Tensor:
    """The numbers that `pack` packed, as bytes of a shape.

    Raises:
        EditError: The bytes are not as many as the shape needs.
    """
    count = math.prod(shape)
    needed = -(-count * width // 8)
    if packed.dtype != torch.uint8 or packed.dim() != 1 or packed.numel() != needed:
        raise EditError(
            "not the bits of a tensor of this shape",
            path=name,
            found=f"{list(packed.shape)} of {str(packed.dtype).removeprefix('torch.')}",
            expected=f"{needed} bytes for {list(shape)}",
        )
    bits = np.unpackbits(packed.cpu().numpy(), count=count * width)
    if width > 1:
        padded = np.zeros((count, 8), np.uint8)
        padded[:, 8 - width :] = bits.reshape(count, width)
        bits = np.packbits(padded)
    return torch.from_numpy(bits).reshape(tuple(shape))
