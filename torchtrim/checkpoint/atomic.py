"""A file that is replaced in one step: whoever reads it finds the old one or the new one, whole."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from torchtrim.errors import CheckpointError


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Write beside a file; at the end flush it to the disk and put it in its place.

    A kill at any moment leaves the old file or the new one (and, at worst, a file `.NAME.*.partial` beside it).

    Raises:
        CheckpointError: It cannot be written there: no such folder, no right to, the disk is full.

    Example:
        >>> import tempfile
        >>> place = Path(tempfile.mkdtemp()) / "notes"
        >>> with replacing(place) as file:
        ...     _ = file.write(b"all of it")
        >>> place.read_bytes()
        b'all of it'
    """
    place = Path(os.path.realpath(path))  # where it is a link, the link stays
    partial = place.with_name(f".{place.name}.{secrets.token_hex(4)}.partial")
    try:
        with partial.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if place.exists():
            partial.chmod(place.stat().st_mode & 0o7777)
        partial.replace(place)
        _flush_folder(place.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(f"cannot be written: {error.strerror or error}", path=path) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _flush_folder(folder: Path) -> None:
    """Flush the folder's own entry, where the system has that."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
