"""Where a file goes: checked before the work, and put in place whole or not at all after it."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torchtrim.errors import ExportError
from torchtrim.export.graph import files_of
from torchtrim.export.workshop import workshop

__all__ = ["free_place", "put_in_place", "workshop"]

_PATIENCE = 60.0  # seconds


def free_place(path: str | os.PathLike[str], *, overwrite: bool, beside: bool) -> Path:
    """The absolute path of a file that can be written.

    Args:
        path: What the user gave.
        overwrite: Whether a file may be there.
        beside: Whether weights will lie beside it, in `PATH.data`.

    Raises:
        ExportError: No path, a folder, a file in a folder that does not exist, or a file that is there.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ExportError("not the path of a file", found=repr(path), expected="a str or a Path")
    destination = Path(path).absolute()
    try:
        os.lstat(destination)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # too long a name; a null character
        reason = getattr(error, "strerror", None) or error
        raise ExportError(f"not the path of a file: {reason}", path=repr(path)) from error
    if destination.is_dir():
        raise ExportError("the path is a folder", path=path, expected="a file", hint=str(Path(path) / "model.onnx"))
    if not destination.parent.is_dir():
        raise ExportError("the folder does not exist", path=destination.parent, hint="create it first")
    _refuse_taken([destination, _beside(destination)] if beside else [destination], overwrite)
    return destination


def put_in_place(final: Path, destination: Path, *, overwrite: bool, aside: Path) -> tuple[Path, ...]:
    """Move a file, and the weights beside it, to where they go: all of them, or none.

    Weights that lay beside an earlier file, and belong to it, go with it. Of several that are put in one place at once,
    each is put there whole, one after the other.

    Args:
        final: The file, which has the destination's name, in another folder of the same disk.
        destination: Where it goes.
        overwrite: Whether files may be there.
        aside: A folder of the same disk, for what was there until all is well.

    Raises:
        ExportError: A file is in the way or cannot be moved; everything is as it was.
    """
    sources = files_of(final)
    targets = [destination.with_name(source.name) for source in sources]
    with _alone(destination):
        _put(final, destination, targets, overwrite, aside)
    return tuple(sorted(targets))


def _put(final: Path, destination: Path, targets: Sequence[Path], overwrite: bool, aside: Path) -> None:
    _refuse_taken(targets, overwrite)
    weights = _beside(destination)
    stale = weights not in targets and weights.is_file() and _owns(destination, weights.name)
    with ExitStack() as undo:
        try:
            # The weights first, so that the model never stands without them.
            if weights in targets:
                if os.path.lexists(weights):
                    os.replace(weights, aside / "before")
                    undo.callback(os.replace, aside / "before", weights)
                else:
                    undo.callback(weights.unlink, missing_ok=True)
                _move(_beside(final), weights, overwrite)
            _move(final, destination, overwrite)
        except FileExistsError as error:
            raise _taken(Path(str(error.filename2 or destination))) from error
        except OSError as error:
            raise ExportError(f"the file cannot be put in place: {error.strerror}", path=destination) from error
        undo.pop_all()
    if stale:
        weights.unlink()


def _move(source: Path, target: Path, overwrite: bool) -> None:
    """Move a file; what is there is replaced only where it may be, even if it came this very moment."""
    if not overwrite:
        try:
            os.link(source, target)
        except FileExistsError:
            raise
        except OSError:
            pass  # a disk without links
        else:
            source.unlink()
            return
    os.replace(source, target)


@contextmanager
def _alone(destination: Path) -> Iterator[None]:
    """Be the only one who puts files in a folder; others wait, for what takes milliseconds.

    The lock is on the folder itself, so that it leaves nothing behind and goes with the process that holds it; where a
    folder cannot be locked, it is a file.
    """
    with ExitStack() as held:
        if not _lock_folder(destination.parent, held):
            _lock_by_file(destination, held)
        yield


def _lock_folder(folder: Path, held: ExitStack) -> bool:
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:  # some network disks
        if descriptor is not None:
            os.close(descriptor)
        return False
    held.callback(os.close, descriptor)
    return True


def _lock_by_file(destination: Path, held: ExitStack) -> None:
    lock = destination.with_name(".torchtrim.lock")
    began = time.monotonic()
    while True:
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            break
        except (FileExistsError, PermissionError) as error:  # the latter on Windows, while it is being deleted
            if time.monotonic() - began > _PATIENCE:
                raise ExportError(
                    "another export holds the folder", path=lock, hint="delete it if none is running"
                ) from error
            time.sleep(0.01)
        except OSError as error:
            raise ExportError(f"the file cannot be put in place: {error.strerror}", path=destination) from error
    held.callback(lock.unlink, missing_ok=True)


def _refuse_taken(files: Sequence[Path], overwrite: bool) -> None:
    """Refuse where something has one of the names: a link that leads nowhere does, and no folder is ever replaced."""
    for file in files:
        if file.is_dir():
            raise ExportError("a folder is in the way", path=file, hint="another path")
        if os.path.lexists(file) and not overwrite:
            raise _taken(file)


def _taken(file: Path) -> ExportError:
    return ExportError("the file exists already", path=file, hint="overwrite=True, or another path")


def _beside(path: Path) -> Path:
    return path.with_name(f"{path.name}.data")


def _owns(path: Path, weights: str) -> bool:
    """Whether a file says that it has its weights in the other, as ONNX files do."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    return b"location" in content and weights.encode() in content
