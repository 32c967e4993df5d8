"""Fake tensors: a forward that computes shapes and nothing else."""

from __future__ import annotations

import logging
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

_LOG = logging.getLogger("torch._subclasses.fake_tensor")


class Fakes(FakeTensorMode):
    """torch's `FakeTensorMode`, which takes real weights beside fakes and does not write to the log.

    A shape that does not fit is an answer here, told in an error of our own; torch writes a traceback of it to stderr
    besides.
    """

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)

    def __enter__(self) -> Fakes:
        _silence.depth += 1
        _LOG.addFilter(_silence)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        _silence.depth -= 1
        if not _silence.depth:
            _LOG.removeFilter(_silence)
        super().__exit__(*error)


class _Silence(logging.Filter):
    depth = 0

    def filter(self, record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("failed while attempting to run meta")


_silence = _Silence()
