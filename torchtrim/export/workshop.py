"""The folder that a file is made in: beside where it goes, gone afterwards, and swept up where a kill left it."""

from __future__ import annotations

import errno
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchtrim.errors import ExportError

_PREFIX = ".torchtrim."
_NAME = re.compile(re.escape(_PREFIX) + r"[a-z0-9_]{8}")  # as tempfile makes them
_MARKER, _SAYS = "torchtrim-made-this", "Left by an export that was killed; the next one takes it away.\n"
_OLD = 24 * 3600.0  # seconds
_MAKE_ROOM = "make room"
# What a full disk, a quota and a limit on the size of files give.
_FULL = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))


@contextmanager
def workshop(destination: Path) -> Iterator[Path]:
    """A folder beside the destination, so that moving the file into place cannot fail half way.

    Those that were left there more than a day ago, by an export that was killed, are taken away.

    Raises:
        ExportError: The folder cannot be written to, or the disk is full.
    """
    _sweep(destination.parent)
    try:
        made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=destination.parent)
    except OSError as error:
        raise ExportError(f"the folder cannot be written to: {error.strerror}", path=destination.parent) from error
    with made as folder, _explained(Path(folder), destination):
        (Path(folder) / _MARKER).write_text(_SAYS, encoding="utf-8")
        yield Path(folder)


@contextmanager
def room_beside(path: Path) -> Iterator[Path]:
    """A folder for a copy of a file: beside it, where there is room for it; elsewhere where that cannot be written to.

    Raises:
        ExportError: The disk is full.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=path.parent)
    except OSError:
        made = tempfile.TemporaryDirectory(prefix=_PREFIX)
    with made as folder, _explained(Path(folder), path):
        (Path(folder) / _MARKER).write_text(_SAYS, encoding="utf-8")
        yield Path(folder)


@contextmanager
def _explained(folder: Path, path: Path) -> Iterator[None]:
    """Say what is wrong where the disk is full, or a file in the folder cannot be written; other errors pass."""
    try:
        yield
    except (OSError, ExportError) as error:
        # ONNX Runtime's tools stumble over the same, and what they raise was wrapped already.
        if isinstance(error, ExportError) and error.hint == _MAKE_ROOM:
            raise  # of a folder inside this one
        cause = error.__cause__ if isinstance(error, ExportError) else error
        if isinstance(cause, OSError) and cause.errno in _FULL:
            raise ExportError(
                f"no space left to write it: {cause.strerror}", path=path, found=str(folder.parent), hint=_MAKE_ROOM
            ) from error
        if isinstance(error, ExportError):
            raise
        if error.filename is not None and folder in Path(str(error.filename)).parents:
            raise ExportError(f"cannot be written: {error.strerror}", path=path) from error
        raise


def _sweep(folder: Path) -> None:
    """Take away what exports that were killed have left, as far as that may be done."""
    try:
        found = [entry for entry in folder.iterdir() if _NAME.fullmatch(entry.name)]
    except OSError:
        return  # not ours to read; making a folder there will tell
    for entry in found:
        try:
            marker = (entry / _MARKER).lstat()
            ours = stat.S_ISDIR(entry.lstat().st_mode) and stat.S_ISREG(marker.st_mode)
            used = max(entry.lstat().st_mtime, *(inside.lstat().st_mtime for inside in entry.iterdir()))
        except OSError:
            continue  # no marker, or gone meanwhile
        if ours and time.time() - used > _OLD:
            shutil.rmtree(entry, ignore_errors=True)
