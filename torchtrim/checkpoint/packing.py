"""Tensors packed without loss: what is zero, what repeats and what is even told apart, then coded by zstd.

A tensor is packed in blocks of at most a mebibyte, each by itself, so that memory stays small on both sides. A block is
a length (four bytes, little-endian) and that many bytes: a head, parts, and zeros where it would be too small.

Which weights are not zero is one part: their distances where they are few, a bit for each weight elsewhere; where there
are zeros with a minus (what a weight times a mask leaves), their signs are another. The values of the others are,
where there are at most 256 different ones in the block (shared weights), these and a byte for each; elsewhere the first
bytes of all, the second bytes of all, and so on, rotated by one bit, so that a float's exponent is a byte of its own:
mantissas do not compress, exponents do. zstd then mostly serves as an entropy coder (shortest match: 7 bytes), which
was both faster and smaller than its level 9. A part that it would make larger stays as it is.

No block stands for more than 1024 times its size. A small file can therefore not fill the memory.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from torchtrim.bench.size import zstandard

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[Any]

BLOCK = 2**20  # bytes that a block stands for; the last one of a tensor for fewer
RATIO = 1024
_HEAD = struct.Struct("<BBI")  # what is there, how many bytes a word has, how many words are not zero
_PART = struct.Struct("<II")  # bytes in the file, bytes that they stand for; the same where it is not compressed
_BITS, _GAPS, _SIGNS, _SHARED = 1, 2, 4, 8
_SPARSE = 1 / 16  # zeros that are worth a part of their own
_FEW = 1 / 4  # the share of others below which their distances are shorter than bits
_SHARED_LIMIT = 256
_SAMPLE = 1024


class Corrupt(Exception):
    """Bytes that are not a packed block."""


def packed_size_limit(size: int) -> int:
    """The most bytes that `pack` makes of so many, all blocks together."""
    return size + math.ceil(size / BLOCK) * _OVERHEAD


_OVERHEAD = 4 + _HEAD.size + 16 * _PART.size


class Packer:
    """Makes blocks."""

    def __init__(self) -> None:
        package = zstandard()
        fast = package.ZstdCompressionParameters.from_level(3, strategy=package.STRATEGY_FAST, min_match=7)
        self._coder = package.ZstdCompressor(compression_params=fast)

    def pack(self, data: memoryview, word: int) -> bytes:
        """One block of the bytes of a tensor (at most `BLOCK`), whose numbers have `word` bytes each."""
        words = np.frombuffer(data, dtype=f"<u{word}")
        turned = _turned(words)
        zero = turned <= 1  # zero, and zero with a minus
        parts: list[Words] = []
        kind = 0
        if int(zero.sum()) > _SPARSE * len(words):
            at = np.flatnonzero(~zero)
            few = len(at) < _FEW * len(words)
            parts.append(_gaps(at) if few else np.packbits(~zero))
            kind |= _GAPS if few else _BITS
            signs = turned[zero] == 1
            if signs.any():
                parts.append(np.packbits(signs))
                kind |= _SIGNS
            turned = turned[at]
        shared = _shared(turned)
        if shared is not None:
            kind |= _SHARED
            parts += [*_planes(shared[0]), shared[1]]
        else:
            parts += _planes(turned)
        body = b"".join([_HEAD.pack(kind, word, len(turned)), *map(self._part, parts)])
        body += bytes(max(0, math.ceil(len(data) / RATIO) - 4 - len(body)))
        return len(body).to_bytes(4, "little") + body

    def _part(self, part: Words) -> bytes:
        plain = part.tobytes()
        coded = self._coder.compress(plain) if plain else plain
        if len(coded) >= len(plain):
            coded = plain
        return _PART.pack(len(coded), len(plain)) + coded


def unpack(block: bytes, size: int) -> bytes:
    """The bytes that a block (without its length) stands for, of which there must be `size`.

    Raises:
        Corrupt: It is no block, or not of that many.
    """
    reader = _Reader(block)
    kind, word, count = reader.head()
    if word not in (1, 2, 4, 8) or size % word or kind & ~(_BITS | _GAPS | _SIGNS | _SHARED):
        raise Corrupt("a block of no known kind")
    total = size // word
    sparse = kind & (_BITS | _GAPS)
    if count > total or sparse == _BITS | _GAPS or (not sparse and (count != total or kind & _SIGNS)):
        raise Corrupt("a block whose counts do not fit")
    at = signs = None
    if kind & _GAPS:
        at = _places(reader.part(None, limit=count + total // 255), count, total)
    elif kind & _BITS:
        at = np.flatnonzero(_bits(reader, total))
        if len(at) != count:
            raise Corrupt("a block whose counts do not fit")
    if kind & _SIGNS:
        signs = _bits(reader, total - count)
    turned = _values(reader, word, count, bool(kind & _SHARED))
    reader.end()
    if at is None:
        return _returned(turned).tobytes()
    whole = np.zeros(total, dtype=turned.dtype)
    if signs is not None:
        zero = np.ones(total, dtype=bool)
        zero[at] = False
        whole[zero] = signs
    whole[at] = turned
    return _returned(whole).tobytes()


def blocks_of(size: int) -> Iterator[tuple[int, int]]:
    """Where the blocks of so many bytes begin and end."""
    for begin in range(0, size, BLOCK):
        yield begin, min(begin + BLOCK, size)


def _turned(words: Words) -> Words:
    """Rotated to the left by one bit: the sign goes last."""
    one, last = words.dtype.type(1), words.dtype.type(8 * words.dtype.itemsize - 1)
    found: Words = (words << one) | (words >> last)
    return found


def _returned(turned: Words) -> Words:
    one, last = turned.dtype.type(1), turned.dtype.type(8 * turned.dtype.itemsize - 1)
    found: Words = (turned >> one) | (turned << last)
    return found


def _planes(words: Words) -> list[Words]:
    each = words.view(np.uint8).reshape(len(words), words.dtype.itemsize)
    return [np.ascontiguousarray(each[:, byte]) for byte in range(words.dtype.itemsize)]


def _shared(words: Words) -> tuple[Words, Words] | None:
    """The different words, and which of them each is, where they are few and that is shorter."""
    if words.dtype.itemsize == 1 or not len(words):
        return None
    if len(np.unique(words[:: max(1, len(words) // _SAMPLE)])) > _SHARED_LIMIT:
        return None
    table, index = np.unique(words, return_inverse=True)
    if len(table) > min(_SHARED_LIMIT, len(words) // 2):
        return None
    return table, index.astype(np.uint8)


def _gaps(at: Words) -> Words:
    """Distances less one; 255 goes on in the next byte."""
    gaps = np.diff(at, prepend=-1) - 1
    more = gaps // 255
    coded = np.full(len(gaps) + int(more.sum()), 255, dtype=np.uint8)
    coded[np.cumsum(more + 1) - 1] = gaps % 255
    return coded


def _places(coded: Words, count: int, total: int) -> Words:
    ends = np.flatnonzero(coded != 255)
    if len(ends) != count or (len(coded) and coded[-1] == 255):
        raise Corrupt("a block whose counts do not fit")
    at = np.cumsum(coded, dtype=np.int64)[ends] + np.arange(count)
    if count and int(at[-1]) >= total:
        raise Corrupt("a block with places that it has not")
    return at


def _bits(reader: _Reader, count: int) -> Words:
    return np.unpackbits(reader.part(math.ceil(count / 8)), count=count).view(bool)


def _values(reader: _Reader, word: int, count: int, shared: bool) -> Words:
    if not shared:
        return _words([reader.part(count) for _ in range(word)], word)
    first = reader.part(None, limit=_SHARED_LIMIT)
    table = _words([first, *(reader.part(len(first)) for _ in range(word - 1))], word)
    index = reader.part(count)
    if count and int(index.max()) >= len(table):
        raise Corrupt("a block with values that it has not")
    return table[index]


def _words(planes: list[Words], word: int) -> Words:
    each = np.empty((len(planes[0]), word), dtype=np.uint8)
    for byte, plane in enumerate(planes):
        each[:, byte] = plane
    return each.reshape(-1).view(f"<u{word}")


class _Reader:
    """The parts of a block, each only of the size that it may have."""

    def __init__(self, block: bytes) -> None:
        self._package = zstandard()
        self._coder = self._package.ZstdDecompressor()
        self._left = memoryview(block)

    def head(self) -> tuple[int, int, int]:
        return _HEAD.unpack(self._take(_HEAD.size))

    def part(self, size: int | None, limit: int = 0) -> Words:
        stored, plain = _PART.unpack(self._take(_PART.size))
        if plain != size and not (size is None and plain <= limit):
            raise Corrupt("a part of another size than it must have")
        data = self._take(stored)
        if stored == plain:
            return np.frombuffer(data, dtype=np.uint8)
        # What the frame says of its size is checked before zstd makes room for it.
        try:
            frame = self._package.get_frame_parameters(data)
            if frame.content_size != plain or frame.dict_id:
                raise Corrupt("a part that does not hold what it says")
            found = self._coder.decompress(data, max_output_size=plain, allow_extra_data=False)
        except self._package.ZstdError as error:
            raise Corrupt(f"a part that zstd cannot read: {error}") from error
        if len(found) != plain:
            raise Corrupt("a part that does not hold what it says")
        return np.frombuffer(found, dtype=np.uint8)

    def end(self) -> None:
        if any(self._left):
            raise Corrupt("a block with more in it than it says")

    def _take(self, count: int) -> memoryview:
        if len(self._left) < count:
            raise Corrupt("a block that ends early")
        taken, self._left = self._left[:count], self._left[count:]
        return taken
