"""Write the file that `container` reads, and put it in its place whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from torchtrim.checkpoint import packing
from torchtrim.checkpoint.atomic import replacing
from torchtrim.checkpoint.checksum import crc32
from torchtrim.checkpoint.container import FORMAT, HEADER_LIMIT, KEYS, NAMES, NO_SUM, PACKED_KEYS, bytes_of
from torchtrim.errors import CheckpointError

_ALIGNMENT = 64
_WORTH_PACKING = 256  # bytes


def write(path: Path, text: str, tensors: Mapping[str, torch.Tensor], *, packed: bool = False) -> None:
    """Write a file whole or not at all; one tensor at a time is brought to the CPU.

    Raises:
        CheckpointError: It cannot be written there.
        MissingDependency: It is to be packed, and zstandard is not installed.
    """
    packer = packing.Packer() if packed else None
    with replacing(path) as file:
        _fill(file, text, tensors, packer)


def _fill(file: IO[bytes], text: str, tensors: Mapping[str, torch.Tensor], packer: packing.Packer | None) -> None:
    # Wide types first: then every tensor lies at a multiple of its item's size, as safetensors has it. What is packed
    # is bytes, and goes last.
    packed = {name for name in tensors if packer is not None and _size(tensors[name]) >= _WORTH_PACKING}
    names = sorted(tensors, key=lambda name: (name in packed, -tensors[name].dtype.itemsize, name))
    raw = {name: str(tensors[name].dtype).removeprefix("torch.") for name in names if tensors[name].dtype not in NAMES}
    kinds = {name: [raw.get(name) or NAMES[tensors[name].dtype], list(tensors[name].shape)] for name in names}
    # The sizes of packed ones are known when they are written, behind the header: until then, the largest they can be.
    sizes = {
        name: packing.packed_size_limit(_size(tensors[name])) if name in packed else _size(tensors[name])
        for name in names
    }

    def header(sums: str, own: str) -> bytes:
        table: dict[str, Any] = {}
        end = 0
        for name in names:
            kind, shape = kinds[name]
            if name in packed:
                kind, shape = "U8", [sizes[name]]
            elif name in raw:
                kind, shape = "U8", [*shape, tensors[name].dtype.itemsize]
            table[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + sizes[name]]}
            end += sizes[name]
        unpacked = {name: kind for name, kind in raw.items() if name not in packed}
        texts = [str(FORMAT if packer is not None else 1), text, json.dumps(unpacked, ensure_ascii=False), own, sums]
        if packer is not None:
            texts.append(json.dumps({name: kinds[name] for name in names if name in packed}, ensure_ascii=False))
        keys = KEYS if packer is None else PACKED_KEYS
        content = {"__metadata__": dict(zip(keys, texts, strict=True)), **table}
        data = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        return data + b" " * (-(8 + len(data)) % _ALIGNMENT)

    length = len(header(NO_SUM * len(names), NO_SUM))
    if length > HEADER_LIMIT:
        raise CheckpointError("too much to describe", found=f"{length:,} bytes", expected=f"{HEADER_LIMIT:,} or less")
    file.seek(8 + length)
    sums = ""
    for name in names:
        data = bytes_of(tensors[name].detach().cpu().resolve_conj().resolve_neg().contiguous())
        if packer is not None and name in packed:
            sizes[name], crc = _write_packed(file, data, packer, _word(tensors[name].dtype))
        else:
            file.write(data)
            crc = crc32(data)
        sums += f"{crc:08x}"
    file.seek(0)
    file.write(length.to_bytes(8, "little"))
    blank = header(sums, NO_SUM).ljust(length)
    file.write(header(sums, f"{crc32(blank):08x}").ljust(length))


def _write_packed(file: IO[bytes], data: memoryview, packer: packing.Packer, word: int) -> tuple[int, int]:
    """Write a tensor's blocks; how long they are, and their checksum."""
    size = crc = 0
    for begin, end in packing.blocks_of(len(data)):
        block = packer.pack(data[begin:end], word)
        crc = crc32(data[begin:end], crc32(block, crc))
        file.write(block)
        size += len(block)
    return size, crc


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.dtype.itemsize


def _word(dtype: torch.dtype) -> int:
    """How many bytes of an element are one number."""
    return dtype.itemsize // 2 if dtype.is_complex else dtype.itemsize
