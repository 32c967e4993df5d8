"""The stack that signal handlers run on, put back after code that leaves another one behind."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager


class _Stack(ctypes.Structure):
    """`stack_t`, as Linux lays it out."""

    _fields_ = (("pointer", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t))


@contextmanager
def kept_signal_stack() -> Iterator[None]:
    """Keep the alternate signal stack of this thread (`sigaltstack`), on Linux; elsewhere nothing is done.

    OpenVINO 2026.4 sets one of its own while a model is compiled, and gives memory back that is still set: the next
    signal, a ctrl-C or the end of a child process, then ends the program without a word.

    Example:
        >>> with kept_signal_stack():
        ...     pass
    """
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    before = _Stack()
    known = library is not None and library.sigaltstack(None, ctypes.byref(before)) == 0
    try:
        yield
    finally:
        if known and library is not None:
            library.sigaltstack(ctypes.byref(before), None)
