"""Without the known, harmless noise of the exporters: on their own insides, and on what is checked here anyway."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr

# Each writes of steps whose outcome is looked at afterwards: an error that is raised too, the opset of the file, and
# what it computes.
_LOGGERS = (
    "onnxruntime.quantization.matmul_nbits_quantizer",
    "onnx_ir.passes.common.initializer_deduplication",
    "onnxscript.version_converter",
    "torch._subclasses.fake_tensor",
    "torch.fx.experimental.symbolic_shapes",
    "torch.onnx._internal.exporter._compat",
    "root",  # ONNX Runtime's advice to pre-process, which it gives even where that has been done
)
# A forward may keep tensors in attributes, as recurrent layers do: it writes to the copy that is exported.
_ATTRIBUTES = r"The tensor attributes? self\..* assigned during export"
# From torch 2.15 on: torch.export calls it itself, for recurrent layers of an open batch size.
_SIZES = "_check_is_size will be removed"


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back the messages named in this file, and no others."""
    loggers = [logging.getLogger(None if name == "root" else name) for name in _LOGGERS]
    for logger in loggers:
        logger.addFilter(_nothing)
    try:
        with warnings.catch_warnings(), _no_partial_graph():
            warnings.filterwarnings("ignore", message=_ATTRIBUTES, category=UserWarning)
            warnings.filterwarnings("ignore", message=_SIZES, category=FutureWarning)
            yield
    finally:
        for logger in loggers:
            logger.removeFilter(_nothing)


@contextmanager
def _no_partial_graph() -> Iterator[None]:
    """Hold back the graph that `torch.export` prints, up to where it failed; all else that is written passes."""
    graph = ""
    told = io.StringIO()
    try:
        with redirect_stderr(told):
            yield
    except Exception as error:
        graph = f"{getattr(error, 'partial_fx_graph', '')}\n"
        raise
    finally:
        sys.stderr.write(told.getvalue().replace(graph, "") if graph.strip() else told.getvalue())


def _nothing(record: logging.LogRecord) -> bool:
    return False
