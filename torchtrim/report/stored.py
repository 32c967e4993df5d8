"""Tensors that lie in a file, read a piece at a time; and those of a safetensors file."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtrim.checkpoint.container import HEADER_LIMIT, parsed
from torchtrim.errors import InputError

_PIECE = 2**20
# Bits of a number, and whether its zero can have a minus.
_TYPES = {
    "BOOL": (8, False), "U8": (8, False), "I8": (8, False), "U16": (16, False), "I16": (16, False),
    "U32": (32, False), "I32": (32, False), "U64": (64, False), "I64": (64, False), "F16": (16, True),
    "BF16": (16, True), "F32": (32, True), "F64": (64, True), "F8_E4M3": (8, True), "F8_E5M2": (8, True),
    "F8_E8M0": (8, False), "F4": (4, True), "C64": (32, True),
}  # fmt: skip


@dataclass(frozen=True)
class Stored:
    """A tensor whose bytes can be read.

    Attributes:
        name: Its name.
        dtype: Its type, as its file calls it.
        shape: Its shape.
        bits: Bits of one number.
        signed_zero: Whether its zero can have a minus.
        pieces: Gives its bytes, in pieces of whole elements.
        parts: Numbers in an element: 2 in a complex one.
        parameter: Whether it is a parameter.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    bits: int
    signed_zero: bool
    pieces: Callable[[], Iterator[memoryview]]
    parts: int = 1
    parameter: bool = True

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)


def pieces_in(path: Path, begin: int, size: int) -> Iterator[memoryview]:
    """Bytes of a file, a mebibyte at a time.

    Raises:
        InputError: It has not as many.
    """
    with path.open("rb") as file:
        file.seek(begin)
        for done in range(0, size, _PIECE):
            piece = file.read(min(_PIECE, size - done))
            if len(piece) < min(_PIECE, size - done):
                raise InputError("was cut short", path=path, found=f"{begin + done + len(piece):,} bytes")
            yield memoryview(piece)


def safetensors_stored(path: Path) -> tuple[list[Stored], dict[str, Any]]:
    """The tensors of a safetensors file, and its metadata.

    Raises:
        InputError: It is none.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(HEADER_LIMIT, path.stat().st_size):
            raise InputError("not a safetensors file", path=path, found=f"a header of {length:,} bytes")
        header = file.read(length)
    try:
        table = parsed(header)
        metadata = table.pop("__metadata__", {})
        found = [_stored(path, 8 + length, name, item) for name, item in table.items()]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"not a safetensors file: {error!r}", path=path) from error
    return found, metadata if isinstance(metadata, dict) else {}


def _stored(path: Path, start: int, name: str, item: dict[str, Any]) -> Stored:
    kind, shape, (begin, end) = item["dtype"], tuple(map(int, item["shape"])), item["data_offsets"]
    bits, signed = _TYPES[kind]
    parts = 2 if kind == "C64" else 1
    size = (math.prod(shape) * bits * parts + 7) // 8
    if min(shape, default=0) < 0 or begin < 0 or end - begin != size:
        raise ValueError(f"{name!r} has not as many bytes as its shape says")
    return Stored(name, kind, shape, bits, signed, lambda: pieces_in(path, start + begin, size), parts)
