"""Compressed files: the same to the bit, small where there is something to gain, and safe where they are forged."""

from __future__ import annotations

import json
import random
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import nn

from torchtrim.checkpoint import packing
from torchtrim.checkpoint.container import FORMAT, read
from torchtrim.checkpoint.container_write import write
from torchtrim.checkpoint.load import load
from torchtrim.checkpoint.save import save
from torchtrim.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointTooNew, MissingDependency


def model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 400), nn.BatchNorm1d(400), nn.ReLU(), nn.Linear(400, 300), nn.Linear(300, 5))


def sparse(net: nn.Module, share: float) -> nn.Module:
    for weight in net.parameters():
        if weight.dim() > 1:
            cut = weight.detach().abs().flatten().kthvalue(int(weight.numel() * share)).values
            weight.data.masked_fill_(weight.data.abs() <= cut, 0.0)
    return net


def shared(net: nn.Module, count: int = 16) -> nn.Module:
    for weight in (each for each in net.parameters() if each.dim() > 1):
        kept = weight.data != 0
        values = weight.data[kept]
        centres = torch.quantile(values, torch.linspace(0.02, 0.98, count))
        weight.data[kept] = centres[torch.bucketize(values, (centres[1:] + centres[:-1]) / 2)]
    return net


def same(one: nn.Module, other: nn.Module) -> bool:
    def raw(net: nn.Module) -> list[bytes]:
        return [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in net.state_dict().values()]

    return raw(one) == raw(other)


def masked(net: nn.Module) -> nn.Module:
    """A weight times a mask: half of the zeros have a minus."""
    with torch.no_grad():
        for weight in net.parameters():
            weight.mul_((torch.rand_like(weight) < 0.1).to(weight.dtype))
    return net


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (lambda: model(), 0.87),
        (lambda: sparse(model(), 0.5), 0.46),
        (lambda: sparse(model(), 0.9), 0.12),
        (lambda: sparse(model(), 0.99), 0.03),
        (lambda: shared(model()), 0.15),
        (lambda: shared(sparse(model(), 0.9)), 0.05),
        (lambda: masked(model()), 0.16),
        (lambda: sparse(model(), 0.9).double(), 0.11),
        (lambda: sparse(model(), 0.9).bfloat16(), 0.13),
    ],
)
def test_it_is_small_and_comes_back_to_the_bit(make: Callable[[], nn.Module], most: float, tmp_path: Path) -> None:
    net = make()
    save(net, tmp_path / "plain.trim")
    save(net, tmp_path / "packed.trim", compress="zstd")
    plain, packed = ((tmp_path / name).stat().st_size for name in ("plain.trim", "packed.trim"))
    assert packed < most * plain
    again = load(tmp_path / "packed.trim", model=model(1))
    assert same(net, again)
    save(again, tmp_path / "again.trim", compress="zstd")
    assert (tmp_path / "again.trim").read_bytes() == (tmp_path / "packed.trim").read_bytes()


def test_the_plain_form_is_what_it_was(tmp_path: Path) -> None:
    save(model(), tmp_path / "net.trim")
    assert header(tmp_path / "net.trim")["__metadata__"]["torchtrim_format"] == "1"
    save(model(), tmp_path / "net.trim", compress="zstd")
    assert header(tmp_path / "net.trim")["__metadata__"]["torchtrim_format"] == "2" == str(FORMAT)
    with safe_open(tmp_path / "net.trim", "pt") as file:  # any reader of safetensors opens this form too
        assert file.get_tensor("model.0.weight").dtype == torch.uint8


def test_an_optimizer_goes_along(tmp_path: Path) -> None:
    net = sparse(model(), 0.9)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    save(net, tmp_path / "net.trim", optimizer=optimizer, compress="zstd")
    other = torch.optim.Adam([torch.zeros(1)])
    again = load(tmp_path / "net.trim", model=model(1), optimizer=other)
    assert same(net, again)
    for ours, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    load(tmp_path / "net.trim", model=model(1))  # checked, and not kept


DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128, torch.uint16, torch.uint64, torch.float8_e4m3fn,
]  # fmt: skip


def test_every_type_and_shape(tmp_path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}
    for dtype in DTYPES:
        for shape in ((), (0, 3), (1,), (70, 7), (3, 5, 7, 11)):
            values = torch.randint(-3, 4, shape)
            values = values * (torch.rand(shape) < 0.5)
            tensors[f"{dtype} {list(shape)}"] = (values.abs() if "u" in str(dtype) else values).to(dtype)
    tensors["odd"] = torch.tensor([float("nan"), -float("inf"), -0.0, 1e-45] * 100)
    tensors["strided"] = torch.randn(40, 60).T
    tensors["zeros"] = torch.zeros(3 * packing.BLOCK // 4 + 5)
    write(tmp_path / "t.trim", "{}", tensors, packed=True)
    file = read(tmp_path / "t.trim")
    assert any(entry.packed for entry in file.entries.values()) and not file.entries["torch.bool []"].packed
    for name, tensor in file.tensors(tensors).items():
        assert tensor.dtype == tensors[name].dtype and tensor.shape == tensors[name].shape, name
        raw = [each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, tensors[name])]
        assert torch.equal(*raw), name
    zeros = file.entries["zeros"]
    assert zeros.size <= packing.RATIO * (zeros.end - zeros.begin) < 1.1 * zeros.size


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([1, 2, 4, 8]), st.integers(1, 3000), st.floats(0, 1), st.integers(0, 400), st.integers(0, 99))
def test_any_block_comes_back(word: int, count: int, zeros: float, values: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    most = 2 ** (8 * word) if values == 0 else min(values, 2 ** (8 * word))
    words = rng.integers(0, most, count, dtype=f"<u{word}" if values == 0 else np.uint64).astype(f"<u{word}")
    words[rng.random(count) < zeros] = 0
    words[rng.random(count) < zeros / 3] = 1 << (8 * word - 1)
    data = memoryview(words).cast("B")
    block = packing.Packer().pack(data, word)
    assert int.from_bytes(block[:4], "little") == len(block) - 4 <= packing.packed_size_limit(len(data))
    assert len(data) <= packing.RATIO * len(block)
    assert packing.unpack(block[4:], len(data)) == bytes(data)


def header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return found


def test_accidents(tmp_path: Path) -> None:
    path = tmp_path / "net.trim"
    save(sparse(model(), 0.9), path, compress="zstd")
    data = path.read_bytes()
    start, rng = 8 + int.from_bytes(data[:8], "little"), random.Random(0)
    places = [start, start + 1, start + 5, len(data) - 1, *rng.sample(range(len(data)), 80)]
    damaged = [data[:place] for place in places]
    for place in places:
        turned = bytearray(data)
        turned[place] ^= 1 << rng.randrange(8)
        damaged += [bytes(turned), data[:place] + data[place + 1 :]]
    for content in [*damaged, data + b"\0", data + data]:
        path.write_bytes(content)
        with pytest.raises(CheckpointDamaged, match=r"net\.trim"):
            load(path, model=model())


class Forged:
    """A file of one tensor, `model.weight`, with checksums that are right whatever its blocks are."""

    def __init__(self, shape: list[int], blocks: list[bytes], contents: list[bytes], kind: str = "F32") -> None:
        self.shape, self.kind = shape, kind
        self.data = b"".join(len(block).to_bytes(4, "little") + block for block in blocks)
        crc = 0
        for block, content in zip(blocks, [*contents, *[b""] * len(blocks)], strict=False):
            crc = zlib.crc32(content, zlib.crc32(len(block).to_bytes(4, "little") + block, crc))
        self.crc = crc
        self.text = "{}"
        self.format = "2"
        self.stored: Any = {"dtype": "U8", "shape": [len(self.data)], "data_offsets": [0, len(self.data)]}
        self.packed: Any = {"model.weight": [kind, shape]}

    def write(self, path: Path) -> None:
        texts = {
            "torchtrim_format": self.format,
            "torchtrim": self.text,
            "torchtrim_dtypes": "{}",
            "torchtrim_header": "00000000",
            "torchtrim_tensors": f"{self.crc:08x}",
            "torchtrim_packed": json.dumps(self.packed),
        }

        def made() -> bytes:
            table = {"__metadata__": texts, "model.weight": self.stored}
            return json.dumps(table, separators=(",", ":")).encode()

        texts["torchtrim_header"] = f"{zlib.crc32(made()):08x}"
        path.write_bytes(len(made()).to_bytes(8, "little") + made() + self.data)


def part(plain: bytes, stored: bytes | None = None, size: int | None = None) -> bytes:
    stored = plain if stored is None else stored
    return len(stored).to_bytes(4, "little") + (len(plain) if size is None else size).to_bytes(4, "little") + stored


def block(kind: int, word: int, count: int, *parts: bytes) -> bytes:
    return bytes([kind, word]) + count.to_bytes(4, "little") + b"".join(parts)


FOUR = [part(bytes(100))] * 4
ZSTD = zstandard.ZstdCompressor()


def lying(content_size: int) -> bytes:
    """A frame that says it holds more than it does."""
    return bytes.fromhex("28b52ffd") + bytes([0xE0]) + content_size.to_bytes(8, "little") + b"\1\0\0"


# Each for a tensor of 100 float32.
BLOCKS = {
    "nothing": b"",
    "half a head": b"\0\4",
    "no such kind": block(16, 4, 100, *FOUR),
    "bits and gaps": block(3, 4, 100, *FOUR),
    "signs alone": block(4, 4, 100, *FOUR),
    "no such word": block(0, 3, 100, *FOUR),
    "words of nothing": block(0, 0, 100, *FOUR),
    "words that do not divide": block(0, 8, 50, *FOUR),
    "too many": block(0, 4, 101, *FOUR),
    "too few": block(0, 4, 99, *FOUR),
    "four billion": block(1, 4, 2**32 - 1, *FOUR),
    "a plane less": block(0, 4, 100, *FOUR[:3]),
    "a plane more": block(0, 4, 100, *FOUR, part(b"\1")),
    "a short plane": block(0, 4, 100, *FOUR[:3], part(bytes(99))),
    "a part that ends early": block(0, 4, 100, *FOUR[:3], part(bytes(100))[:50]),
    "a part of four billion": block(0, 4, 100, *FOUR[:3], part(b"", bytes(9), 2**32 - 1)),
    "no zstd": block(0, 4, 100, *FOUR[:3], part(bytes(100), b"this is not zstd")),
    "zstd cut short": block(0, 4, 100, *FOUR[:3], part(bytes(100), ZSTD.compress(bytes(100))[:-1])),
    "zstd of less": block(0, 4, 100, *FOUR[:3], part(bytes(100), ZSTD.compress(bytes(90)))),
    "zstd of more": block(0, 4, 100, *FOUR[:3], part(bytes(100), ZSTD.compress(bytes(2**24)))),
    "zstd twice": block(0, 4, 100, *FOUR[:3], part(bytes(100), ZSTD.compress(bytes(100)) * 2)),
    "zstd that lies": block(0, 4, 100, *FOUR[:3], part(bytes(100), lying(100))),
    "zstd of 2**60": block(0, 4, 100, *FOUR[:3], part(bytes(100), lying(2**60))),
    "bits of another count": block(1, 4, 1, part(bytes(13)), *[part(b"\0")] * 4),
    "gaps of another count": block(2, 4, 2, part(b"\1"), *[part(b"\0\0")] * 4),
    "gaps that go on": block(2, 4, 1, part(b"\xff"), *[part(b"\0")] * 4),
    "a place outside": block(2, 4, 1, part(b"\x64"), *[part(b"\0")] * 4),
    "a place far outside": block(2, 4, 3, part(b"\1\1\xfe"), *[part(b"\0\0\0")] * 4),
    "too many gaps": block(2, 4, 1, part(b"\xff" * 200 + b"\1"), *[part(b"\0")] * 4),
    "a value outside": block(8, 4, 100, *[part(b"\0\0")] * 4, part(bytes([2]) * 100)),
    "no values": block(8, 4, 100, *[part(b"")] * 4, part(bytes(100))),
    "too many values": block(8, 4, 100, *[part(bytes(257))] * 4, part(bytes(100))),
    "values of two lengths": block(8, 4, 100, part(bytes(2)), *[part(bytes(3))] * 3, part(bytes(100))),
}


def document(folder: Path) -> str:
    save(nn.Linear(100, 1, bias=False), folder / "made.trim")
    return str(header(folder / "made.trim")["__metadata__"]["torchtrim"])


def asked(path: Path, width: int = 100) -> nn.Module:
    return load(path, model=nn.Linear(width, 1, bias=False))


def test_forged_blocks(tmp_path: Path) -> None:
    path, text = tmp_path / "case.trim", document(tmp_path)
    right = Forged([1, 100], [block(0, 4, 100, *FOUR)], [bytes(400)])
    right.text = text
    right.write(path)
    assert not asked(path).weight.any()  # type: ignore[union-attr,operator]
    for name, content in BLOCKS.items():
        forged = Forged([1, 100], [content], [bytes(400)])
        forged.text = text
        forged.write(path)
        with pytest.raises(CheckpointDamaged) as caught:
            asked(path)
        assert str(path) in str(caught.value), name


def test_forged_tables(tmp_path: Path) -> None:
    path, text = tmp_path / "case.trim", document(tmp_path)
    good = block(0, 4, 100, *FOUR)
    cases: list[tuple[str, Any, type[CheckpointError]]] = [
        ("no pair", {"model.weight": ["F32"]}, CheckpointDamaged),
        ("no type", {"model.weight": ["F31", [1, 100]]}, CheckpointDamaged),
        ("a list as type", {"model.weight": [[], [1, 100]]}, CheckpointDamaged),
        ("no shape", {"model.weight": ["F32", [1, -100]]}, CheckpointDamaged),
        ("another name", {"model.sabi": ["F32", [1, 100]]}, CheckpointDamaged),
        ("a list", [], CheckpointDamaged),
        ("larger than can be", {"model.weight": ["F32", [2**20, 2**10]]}, CheckpointDamaged),
        ("larger than memory", {"model.weight": ["F32", [2**40, 2**40]]}, CheckpointDamaged),
        ("another shape", {"model.weight": ["F32", [1, 99]]}, CheckpointMismatch),
        ("fewer bytes", {"model.weight": ["F16", [1, 100]]}, CheckpointDamaged),
        ("more bytes", {"model.weight": ["F64", [1, 100]]}, CheckpointDamaged),
        ("nothing packed", {}, CheckpointError),
    ]
    for name, packed, error in cases:
        forged = Forged([1, 100], [good], [bytes(400)])
        forged.text, forged.packed = text, packed
        forged.write(path)
        with pytest.raises(error) as caught:
            asked(path)
        assert str(path) in str(caught.value), name
    for blocks in ([good, good], [good[:0]], []):
        forged = Forged([1, 100], blocks, [bytes(400)])
        forged.text = text
        forged.write(path)
        with pytest.raises(CheckpointDamaged):
            asked(path)
    forged = Forged([1, 100], [good], [bytes(400)])
    forged.text, forged.format = text, "3"
    forged.write(path)
    with pytest.raises(CheckpointTooNew, match="a newer torchtrim"):
        asked(path)


def test_a_small_file_does_not_fill_the_memory(tmp_path: Path) -> None:
    """A tensor of as many bytes as a file of its size may claim is refused by the model's shapes, before it is made."""
    path, text = tmp_path / "bomb.trim", document(tmp_path)
    one = packing.Packer().pack(memoryview(bytes(packing.BLOCK)), 4)[4:]
    forged = Forged([1, 512 * packing.BLOCK // 4], [one] * 512, [])
    forged.text = text
    forged.write(path)
    assert path.stat().st_size < 10**6
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointMismatch, match=r"bomb\.trim: weight: the model that was rebuilt has another"):
            asked(path)
        assert tracemalloc.get_traced_memory()[1] < 20 * 2**20
    finally:
        tracemalloc.stop()


def test_packing_and_checking_take_little_memory(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(2**24), "b": torch.ones(2**23)}
    tensors["a"][::7] = 2.5
    tracemalloc.start()
    try:
        write(tmp_path / "t.trim", "{}", tensors, packed=True)
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20  # of 96 MiB
        tracemalloc.reset_peak()
        read(tmp_path / "t.trim").verify(tensors)
        assert tracemalloc.get_traced_memory()[1] < 24 * 2**20
    finally:
        tracemalloc.stop()


def test_a_failure_while_packing_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.trim"
    save(model(), path, compress="zstd")
    old, left = path.read_bytes(), [3]
    pack = packing.Packer.pack

    def failing(self: packing.Packer, data: memoryview, word: int) -> bytes:
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        return pack(self, data, word)

    monkeypatch.setattr(packing.Packer, "pack", failing)
    with pytest.raises(KeyboardInterrupt):
        save(model(2), path, compress="zstd")
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ["net.trim"]


def test_without_zstandard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(model(), tmp_path / "net.trim", compress="zstd")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingDependency, match=r'pip install "torchtrim\[zstd\]"'):
        save(model(), tmp_path / "other.trim", compress="zstd")
    assert not (tmp_path / "other.trim").exists()
    with pytest.raises(MissingDependency):
        load(tmp_path / "net.trim", model=model())
    save(model(), tmp_path / "plain.trim")
    load(tmp_path / "plain.trim", model=model())


def test_an_unknown_compression(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="compress: no such compression"):
        save(model(), tmp_path / "net.trim", compress="gzip")
