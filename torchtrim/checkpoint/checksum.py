"""CRC-32, which takes most of the time of loading a large file: zlib-ng gives what zlib does, several times faster."""

from __future__ import annotations

try:
    from zlib_ng.zlib_ng import crc32
except ImportError:  # a platform without wheels of it
    from zlib import crc32

__all__ = ["crc32"]
