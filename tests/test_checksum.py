"""The checksum of files: zlib's, whichever library computes it."""

from __future__ import annotations

import importlib
import sys
import zlib

import pytest

from torchtrim.checkpoint import checksum

DATA = bytes(range(256)) * 700


def test_it_is_that_of_zlib_also_in_pieces() -> None:
    assert checksum.crc32(DATA) == zlib.crc32(DATA)
    assert checksum.crc32(memoryview(DATA)[1000:], checksum.crc32(DATA[:1000])) == zlib.crc32(DATA)


def test_zlib_takes_the_place_of_a_library_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zlib_ng", None)
    monkeypatch.setitem(sys.modules, "zlib_ng.zlib_ng", None)
    try:
        assert importlib.reload(checksum).crc32 is zlib.crc32
    finally:
        monkeypatch.undo()
        importlib.reload(checksum)
    assert checksum.crc32(DATA) == zlib.crc32(DATA)
