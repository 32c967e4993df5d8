"""The file: tensors and text in the safetensors format, with a checksum for each. Here it is read; `container_write`
writes it.

Any safetensors reader opens it. The metadata of the header holds `torchtrim_format` (the version of the format),
`torchtrim` (text, see `document`), `torchtrim_dtypes` (types that safetensors does not know; such tensors are stored as
their bytes, in one more dimension) and two checksums, CRC-32 in eight hexadecimal digits: `torchtrim_tensors` one of
each tensor, in the order of the file, and `torchtrim_header` one of the header, with zeros in its own place. They are
against accidents. Nothing in a file is believed because its checksum is right.

Format 1 is that. In format 2 most tensors are packed (see `packing`): to a reader of safetensors they are bytes, and
`torchtrim_packed` in the metadata has the type and the shape of each. Their checksums are over each block and what it
stands for, in turn. What records hold in bits may be left out there, where the model's tensors say it too (see
`follow`). Nothing is packed or left out in format 1, and it is written wherever compression is not asked for.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from typing import IO, Any

import torch

from torchtrim.checkpoint import packing
from torchtrim.checkpoint.checksum import crc32
from torchtrim.errors import CheckpointDamaged, CheckpointError, CheckpointTooNew

FORMAT = 2
HEADER_LIMIT = 100_000_000  # bytes: safetensors' own
NO_SUM = "00000000"
_THREADS = 4
_SHARE = 2**22  # bytes: for less a thread of its own is not worth its start
_CHUNK = 2**20
KEYS = ("torchtrim_format", "torchtrim", "torchtrim_dtypes", "torchtrim_header", "torchtrim_tensors")
PACKED_KEYS = (*KEYS, "torchtrim_packed")
NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.int32: "I32",
    torch.int64: "I64", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in NAMES.items()}
_RAW = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        torch.uint16, torch.uint32, torch.uint64, torch.complex32, torch.complex64, torch.complex128,
        torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu,
    )
}  # fmt: skip


def storable(dtype: torch.dtype) -> bool:
    """Whether a file can hold tensors of this type."""
    return dtype in NAMES or dtype in _RAW.values()


def place_of(path: object) -> Path:
    """A path as users give it.

    Raises:
        CheckpointError: It is none.
    """
    if isinstance(path, (str, Path)) or (hasattr(path, "__fspath__") and isinstance(os.fspath(path), str)):
        return Path(path)
    raise CheckpointError("not the path of a file", found=repr(path)[:60], expected="a text, or a pathlib.Path")


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a tensor that lies row by row on the CPU."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


@dataclass(frozen=True)
class Entry:
    """Where a tensor lies in the file, and whether it is packed there."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    crc: int
    packed: bool = False

    @property
    def size(self) -> int:
        """How many bytes the tensor has."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Container:
    """A file whose header was read and checked; its tensors are read when asked for.

    Attributes:
        path: The file.
        text: What `container_write.write` was given.
        entries: Its tensors, by name.
    """

    path: Path
    text: str
    entries: Mapping[str, Entry]

    @property
    def size(self) -> int:
        """How many bytes its tensors have."""
        return sum(entry.size for entry in self.entries.values())

    def pieces(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor, a piece at a time, and its checksum at the end.

        Raises:
            CheckpointDamaged: It was altered; names it.
            CheckpointError: It cannot be read.
            MissingDependency: It is packed, and zstandard is not installed.
        """
        entry, crc = self.entries[name], 0
        with _reading(self.path), self.path.open("rb") as file:
            file.seek(entry.begin)
            for begin, end in packing.blocks_of(entry.size):
                if entry.packed:
                    block, data = self._block(file, name, end - begin)
                    crc = crc32(block, crc)
                else:
                    data = file.read(end - begin)
                    if len(data) != end - begin:
                        raise _damaged(self.path, "was cut short while it was read", f"{name!r} ends early")
                crc = crc32(data, crc)
                yield memoryview(data)
            if file.tell() != entry.end:
                raise _damaged(self.path, "was altered: a tensor is not as long as its header says", name)
        if crc != entry.crc:
            raise _damaged(self.path, "was altered: a tensor has not its checksum", name)

    def _block(self, file: IO[bytes], name: str, size: int) -> tuple[bytes, bytes]:
        """The next block as it is in the file, and what it stands for."""
        entry = self.entries[name]
        start = file.read(4)
        length = int.from_bytes(start, "little")
        if len(start) < 4 or length > min(entry.end - file.tell(), packing.packed_size_limit(size)):
            raise _damaged(self.path, "was altered: a block of a tensor is longer than the tensor", name)
        block = file.read(length)
        try:
            return start + block, packing.unpack(block, size)
        except packing.Corrupt as error:
            raise _damaged(self.path, f"was altered: a tensor holds {error}", name) from error

    def tensors(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Read tensors, each into memory of its own, and check them against their checksums.

        Raises:
            CheckpointDamaged: One was altered; names it.
            CheckpointError: They cannot be read, or do not fit into memory.
        """
        wanted = list(names)
        shares = _shares({name: self.entries[name] for name in wanted})
        if len(shares) < 2:
            read = [self._share(each) for each in shares]
        else:
            # Reading and checksums both leave the interpreter free.
            with ThreadPoolExecutor(len(shares)) as pool:
                read = list(pool.map(self._share, shares))
        found = {name: tensor for each in read for name, tensor in each.items()}
        return {name: found[name] for name in wanted}

    def verify(self, names: Iterable[str]) -> None:
        """Check tensors against their checksums without keeping them.

        Raises:
            CheckpointDamaged: One was altered; names it.
        """
        for name in names:
            for _ in self.pieces(name):
                pass

    def _share(self, names: list[str]) -> dict[str, torch.Tensor]:
        with _reading(self.path), self.path.open("rb", buffering=0) as file:
            return {name: self._tensor(file, name) for name in names}

    def _tensor(self, file: FileIO, name: str) -> torch.Tensor:
        entry = self.entries[name]
        try:
            tensor = torch.empty(entry.shape, dtype=entry.dtype)
        except RuntimeError as error:
            raise CheckpointError(f"a tensor cannot be made: {error}", path=self.path, found=name) from error
        data = bytes_of(tensor)
        if entry.packed:
            done = 0
            for part in self.pieces(name):
                data[done : done + len(part)] = part
                done += len(part)
            return tensor
        file.seek(entry.begin)
        done = crc = 0
        while done < len(data):  # in pieces that are still in the processor's cache when they are summed
            piece = data[done : done + _CHUNK]
            count = file.readinto(piece)
            if not count:
                raise _damaged(self.path, "was cut short while it was read", f"{name!r} ends early")
            crc = crc32(piece[:count], crc)
            done += count
        if crc != entry.crc:
            raise _damaged(self.path, "was altered: a tensor has not its checksum", name)
        return tensor


def _shares(entries: Mapping[str, Entry]) -> list[list[str]]:
    """Names of tensors for each thread to read: about as many bytes for each, in the order of the file."""
    total = sum(entry.end - entry.begin for entry in entries.values())
    count = min(_THREADS, total // _SHARE + 1)
    shares: list[list[str]] = [[] for _ in range(count)]
    done = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].begin):
        shares[min(done * count // max(total, 1), count - 1)].append(name)
        done += entry.end - entry.begin
    return [each for each in shares if each]


def read(path: Path) -> Container:
    """Open a file: its header is checked, nothing else is read.

    Raises:
        CheckpointDamaged: It is no such file, was cut short, or altered; says which.
        CheckpointTooNew: It has a format that this version does not know.
        CheckpointError: It cannot be opened.
    """
    with _reading(path):
        if path.exists() and not path.is_file():
            raise CheckpointError("not a file", path=path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(9)
            length = int.from_bytes(start[:8], "little")
            if len(start) < 9 or start[8:] != b"{":
                pickled = start[:2] in (b"PK", b"\x80\x02", b"\x80\x04")
                raise _damaged(
                    path,
                    "not a .trim file",
                    "a file of torch.save, which is pickle" if pickled else f"{size:,} bytes that are not safetensors",
                    hint="torch.load, if you trust it, then tt.save" if pickled else None,
                )
            if length > HEADER_LIMIT:
                raise _damaged(path, "its header is too large", f"{length:,} bytes", f"{HEADER_LIMIT:,} or less")
            if size < 8 + length:
                raise _damaged(path, "was cut short", f"{size:,} bytes", f"{8 + length:,} of the header alone")
            header = start[8:] + file.read(length - 1)
    content = _parsed(path, header)
    texts = _texts(path, content.pop("__metadata__", {}), header)
    entries = _entries(path, content, texts, 8 + length)
    end = max((entry.end for entry in entries.values()), default=8 + length)
    if size != end:
        what = "was cut short" if size < end else "has more in it than its header says"
        raise _damaged(path, what, f"{size:,} bytes", f"{end:,}")
    return Container(path, texts["torchtrim"], entries)


def parsed(text: str | bytes) -> Any:
    """JSON, strictly: every key once, numbers that are numbers, as deep as Python can read.

    Raises:
        ValueError: It is not that.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key comes twice")
        return found

    def number(name: str) -> float:
        raise ValueError(f"{name} is no number of JSON")

    try:
        return json.loads(text, object_pairs_hook=once, parse_constant=number)
    except RecursionError as error:
        raise ValueError("nested too deep") from error


def _parsed(path: Path, header: bytes) -> dict[str, Any]:
    try:
        content = parsed(header)
    except ValueError as error:
        raise _damaged(path, f"its header is not JSON: {error}", None) from error
    if not isinstance(content, dict):
        raise _damaged(path, "its header is not an object", type(content).__name__)
    return content


def _texts(path: Path, metadata: Any, header: bytes) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise _damaged(path, "its metadata are not texts", type(metadata).__name__)
    version = metadata.get("torchtrim_format")
    if version is None:
        hint = "safetensors.torch.load_file, then model.load_state_dict"
        raise _damaged(path, "a safetensors file that torchtrim did not write", sorted(metadata)[:8] or None, hint=hint)
    if version not in map(str, range(1, FORMAT + 1)):
        if version.isascii() and version.isdigit() and int(version[:9]) > FORMAT:
            found = f"format {version[:20]}"
            raise CheckpointTooNew(
                "written by a later version", path=path, found=found, expected=FORMAT, hint="a newer torchtrim"
            )
        raise _damaged(path, "no such format", version[:20], FORMAT)
    keys = KEYS if version == "1" else PACKED_KEYS
    if set(metadata) != set(keys):
        raise _damaged(path, "its metadata are not those of the format", sorted(metadata)[:8], sorted(keys))
    own = metadata["torchtrim_header"]
    before, mark, after = header.partition(f'"torchtrim_header":"{own}"'.encode())
    blank = before + f'"torchtrim_header":"{NO_SUM}"'.encode() + after
    if not mark or f"{crc32(blank):08x}" != own:
        raise _damaged(path, "was altered: its header has not its checksum", own[:20])
    return metadata


def _entries(path: Path, table: dict[str, Any], texts: dict[str, str], start: int) -> dict[str, Entry]:
    try:
        raw, packed = parsed(texts["torchtrim_dtypes"]), parsed(texts.get("torchtrim_packed", "{}"))
    except ValueError as error:
        raise _damaged(path, f"its table of types is not JSON: {error}", None) from error
    sums = texts["torchtrim_tensors"]
    known = all(isinstance(each, dict) and set(each) <= set(table) for each in (raw, packed))
    if not known or set(raw) & set(packed) or len(sums) != 8 * len(table):
        raise _damaged(path, "its tables do not belong together", f"{len(table)} tensors, {len(sums) // 8} checksums")
    entries: dict[str, Entry] = {}
    end = start
    for position, (name, item) in enumerate(table.items()):
        entry = _entry(item, raw.get(name), sums[8 * position : 8 * position + 8], start)
        if entry is not None and name in packed:
            entry = _packed_entry(entry, packed[name])
        if entry is None:
            raise _damaged(path, "an entry of its header is not a tensor", name)
        if entry.packed and entry.size > packing.RATIO * (entry.end - entry.begin):
            claimed = f"{entry.size:,} bytes in {entry.end - entry.begin:,}"
            raise _damaged(path, f"{name!r} claims to hold more than its bytes can", claimed)
        if entry.begin != end:
            what = "overlap" if entry.begin < end else "leave a hole"
            raise _damaged(path, f"its tensors {what}", name)
        end = entry.end
        entries[name] = entry
    return entries


def _entry(item: Any, raw: Any, crc: str, start: int) -> Entry | None:
    """A tensor's entry; `None` where it is none."""
    if not isinstance(item, dict) or set(item) != {"dtype", "shape", "data_offsets"}:
        return None
    kind, shape, offsets = item["dtype"], item["shape"], item["data_offsets"]
    if not isinstance(kind, str) or not _sizes(shape) or not _sizes(offsets) or len(offsets) != 2:
        return None
    dtype = _DTYPES.get(kind)
    if raw is not None:
        dtype = _RAW.get(raw) if isinstance(raw, str) and kind == "U8" else None
        if dtype is None or not shape or shape.pop() != dtype.itemsize:
            return None
    if dtype is None or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        return None
    with contextlib.suppress(ValueError):
        return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1], int(crc, 16))
    return None


def _packed_entry(entry: Entry, packed: Any) -> Entry | None:
    """The entry of a tensor that is packed in these bytes; `None` where it is none."""
    if not isinstance(packed, list) or len(packed) != 2 or entry.dtype != torch.uint8 or len(entry.shape) != 1:
        return None
    kind, shape = packed
    dtype = (_DTYPES.get(kind) or _RAW.get(kind)) if isinstance(kind, str) else None
    if dtype is None or not _sizes(shape):
        return None
    return replace(entry, dtype=dtype, shape=tuple(shape), packed=True)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(type(n) is int and 0 <= n < 2**48 for n in value)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path=path) from error


def _damaged(
    path: Path, message: str, found: object, expected: object = None, hint: str | None = None
) -> CheckpointDamaged:
    return CheckpointDamaged(message, path=path, found=found, expected=expected, hint=hint)
