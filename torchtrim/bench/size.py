"""What is in tensors: how many numbers, how many of them are not zero, how many are different; and the table of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from torchtrim.bench.table import Table
from torchtrim.errors import MissingDependency

MANY = 256  # different values of a tensor are counted up to here


@dataclass(frozen=True)
class TensorSize:
    """One tensor.

    Attributes:
        name: Its name.
        dtype: Its type.
        shape: Its shape.
        parameter: Whether it is a parameter. In a file that does not tell, every tensor counts as one.
        numel: How many numbers it has.
        nonzeros: How many of its numbers are not zero.
        distinct: How many different numbers it has; None where these are more than 256.
        bytes: What it takes in memory.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parameter: bool
    numel: int
    nonzeros: int
    distinct: int | None
    bytes: int


@dataclass(frozen=True)
class ModelSize:
    """One model, or one file.

    Attributes:
        name: Its name.
        kind: `model`, `.trim`, `.trim (zstd)`, `onnx`, `torch` (a pickle) or `safetensors`.
        params: Numbers in its parameters.
        nonzeros: How many of these are not zero.
        memory_bytes: What all of its tensors take in memory, buffers too.
        disk_bytes: What its files take; None for a model in memory.
        gzip_bytes: The files after gzip; for a model, the bytes of its tensors. None where it was not asked for.
        zstd_bytes: After zstd likewise; None where that is not installed.
        tensors: Each tensor.
        notes: What else there is to know.
    """

    name: str
    kind: str
    params: int
    nonzeros: int
    memory_bytes: int
    disk_bytes: int | None
    gzip_bytes: int | None
    zstd_bytes: int | None
    tensors: tuple[TensorSize, ...]
    notes: tuple[str, ...] = ()

    @property
    def sparsity(self) -> float:
        """The fraction of its parameters that is zero."""
        return 1 - self.nonzeros / self.params if self.params else 0.0

    @property
    def distinct(self) -> int | None:
        """The most different numbers that one of its parameters with two dimensions or more has; None above 256."""
        counts = [each.distinct for each in self.tensors if each.parameter and len(each.shape) > 1]
        return None if None in counts else max((count for count in counts if count is not None), default=0)

    def table(self) -> Table:
        """Its tensors as a table."""
        rows = [
            (
                each.name,
                each.dtype,
                " x ".join(map(str, each.shape)) or "1",
                f"{each.numel:,}",
                f"{each.nonzeros:,}",
                f"{1 - each.nonzeros / each.numel:.1%}" if each.numel else "",
                _many(each.distinct),
                f"{each.bytes:,}",
            )
            for each in self.tensors
        ]
        columns = ("tensor", "type", "shape", "numbers", "not zero", "sparsity", "values", "bytes")
        return Table(self.name, columns, tuple(rows), left=3)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            **asdict(self),
            "sparsity": self.sparsity,
            "distinct": self.distinct,
            "tensors": [{**asdict(each), "shape": list(each.shape)} for each in self.tensors],
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class SizeReport:
    """Sizes of models and files, side by side. `report["name"]` is one of them.

    Attributes:
        sizes: One for each, in the order given.
        gzip_level: The level of gzip, 1 to 9.
        zstd_level: The level of zstd.
        by_tensor: Whether the text has a table of each one's tensors.
        notes: What else there is to know.
    """

    sizes: tuple[ModelSize, ...]
    gzip_level: int
    zstd_level: int
    by_tensor: bool = False
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> ModelSize:
        for size in self.sizes:
            if size.name == name:
                return size
        raise KeyError(name)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "sizes": [size.to_dict() for size in self.sizes],
            "gzip_level": self.gzip_level,
            "zstd_level": self.zstd_level,
            "notes": list(self.notes),
        }

    def tables(self) -> tuple[Table, ...]:
        """The sizes, and where it was asked for the tensors of each."""
        columns = ("", "kind", "parameters", "not zero", "sparsity", "values a tensor", "MB in memory", "MB on disk")
        packed = ("gzip MB", "zstd MB")
        rows = [
            (
                size.name,
                size.kind,
                f"{size.params:,}",
                f"{size.nonzeros:,}",
                f"{size.sparsity:.1%}",
                _many(size.distinct),
                *map(_mb, (size.memory_bytes, size.disk_bytes, size.gzip_bytes, size.zstd_bytes)),
            )
            for size in self.sizes
        ]
        told = [f"{size.name}: {note}" for size in self.sizes for note in size.notes]
        levels = f"MB: 10^6 bytes; gzip at level {self.gzip_level}, zstd at level {self.zstd_level}"
        values = "values a tensor: the most different numbers in one weight"
        first = Table("size", columns + packed, tuple(rows), [levels, values, *told, *self.notes], left=2)
        return (first, *(size.table() for size in self.sizes if self.by_tensor))

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


def _many(count: int | None) -> str:
    return f"> {MANY}" if count is None else str(count)


def _mb(count: int | None) -> str:
    return "" if count is None else f"{count / 1e6:.3f}"


class Counter:
    """Counts the numbers of one tensor from its bytes, which come in pieces of whole elements.

    Args:
        bits: Bits of one number: 4 (two in a byte), 8, 16, 32 or 64.
        signed_zero: Whether there is a zero with a minus, as in floats.
        parts: Numbers in an element: 2 in a complex one.
        numel: How many elements there are.

    Example:
        >>> counter = Counter(32, signed_zero=True)
        >>> counter.add(memoryview(np.array([0.0, -0.0, 1.5, 1.5], dtype=np.float32).tobytes()))
        >>> counter.nonzeros, counter.distinct
        (2, 2)
    """

    def __init__(self, bits: int, *, signed_zero: bool, parts: int = 1, numel: int | None = None) -> None:
        self._bits, self._signed_zero, self._parts = bits, signed_zero, parts
        self._left = numel
        self._seen: Any = np.empty(0, dtype=np.uint64)
        self.nonzeros = 0

    @property
    def distinct(self) -> int | None:
        """How many different ones there were; None above 256, and for complex ones."""
        return None if self._seen is None or self._parts > 1 else len(self._seen)

    def add(self, data: memoryview) -> None:
        """Count a piece."""
        if self._bits == 4:
            both = np.frombuffer(data, dtype=np.uint8)
            words = np.stack((both & 15, both >> 4), axis=1).reshape(-1)[: self._left]
            self._left = None if self._left is None else self._left - len(words)
        else:
            words = np.frombuffer(data, dtype=f"<u{self._bits // 8}")
        if self._signed_zero:
            minus = words.dtype.type(1 << (self._bits - 1))
            words = np.where(words == minus, words.dtype.type(0), words)
        some = words != 0
        self.nonzeros += int((some.reshape(-1, self._parts).any(axis=1) if self._parts > 1 else some).sum())
        if self._seen is not None:
            few = np.union1d(self._seen, words[:4096])
            self._seen = np.union1d(few, words) if len(few) <= MANY else None
            if self._seen is not None and len(self._seen) > MANY:
                self._seen = None


class Squeezed:
    """How many bytes a stream has after gzip and after zstd, without keeping it.

    Example:
        >>> squeezed = Squeezed(6, 3)
        >>> squeezed.add(bytes(100_000)); squeezed.end()
        >>> squeezed.gzip_bytes < 1000
        True
    """

    def __init__(self, gzip_level: int, zstd_level: int) -> None:
        self._gzip = zlib.compressobj(gzip_level, wbits=31)
        try:
            self._zstd = zstandard().ZstdCompressor(level=zstd_level).compressobj()
        except MissingDependency:
            self._zstd = None
        self.gzip_bytes = 0
        self.zstd_bytes: int | None = None if self._zstd is None else 0

    def add(self, data: bytes | memoryview) -> None:
        """The next bytes of the stream."""
        self._count(len(self._gzip.compress(data)), None if self._zstd is None else len(self._zstd.compress(data)))

    def end(self) -> None:
        """There are no more."""
        self._count(len(self._gzip.flush()), None if self._zstd is None else len(self._zstd.flush()))

    def _count(self, gzip: int, zstd: int | None) -> None:
        self.gzip_bytes += gzip
        if zstd is not None and self.zstd_bytes is not None:
            self.zstd_bytes += zstd


def zstandard() -> Any:
    """The package for zstd.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import zstandard as package
    except ImportError as error:
        raise MissingDependency("zstandard is not installed", hint='pip install "torchtrim[zstd]"') from error
    return package


def pieces_of(data: memoryview, size: int = 2**20) -> Iterator[memoryview]:
    """Bytes, a mebibyte at a time."""
    for begin in range(0, len(data), size):
        yield data[begin : begin + size]
