"""Whether a file is an ONNX model at all: the checker's rules, and shapes that fit together."""

from __future__ import annotations

import os
from pathlib import Path

import onnx

from torchtrim.errors import ExportError

_LARGE = 2_000_000_000  # bytes; past it the checker cannot infer shapes, and only the graph is checked


def check_file(path: str | os.PathLike[str], *, rules: bool = True) -> onnx.GraphProto:
    """Refuse a file that is no sound ONNX model: cut short, altered, with weights that are not beside it.

    ONNX's checker holds every node against its operator's definition and infers all shapes. Nodes of operators that
    ONNX does not define (ONNX Runtime's own) are passed over. A changed weight is a sound file still: running it beside
    the model tells that.

    Args:
        path: The file.
        rules: Hold it against the rules too; else only what is no ONNX model at all is refused. ONNX Runtime runs some
            files that break them.

    Returns:
        The file's graph, without weights that lie beside it.

    Raises:
        ExportError: No such file, not an ONNX model, or one that breaks ONNX's rules.
    """
    place = Path(path)
    try:
        size = place.stat().st_size
        model = onnx.load(place, load_external_data=False)
    except Exception as error:  # protobuf's own kinds, and the system's
        raise ExportError(f"cannot be read as an ONNX file: {_line(error)}", path=place, hint=_AGAIN) from error
    if not model.graph.node or not model.graph.output:
        raise ExportError(
            "cannot be read as an ONNX file: there is no graph in it", path=place, found=f"{size} bytes", hint=_AGAIN
        )
    if not rules:
        return model.graph
    try:
        size += sum(_weights(place, model))
        onnx.checker.check_model(os.fspath(place), full_check=size < _LARGE)
    except Exception as error:  # the checker's and shape inference's own kinds, which share no base class
        raise ExportError(f"not a sound ONNX model: {_line(error)}", path=place, hint=_AGAIN) from error
    return model.graph


_AGAIN = "export it again: the file was cut short or altered, or its weights are not beside it"


def _weights(place: Path, model: onnx.ModelProto) -> list[int]:
    """The bytes of each file that lies beside it."""
    names = set()
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            names |= {entry.value for entry in tensor.external_data if entry.key == "location"}
    return [(place.parent / name).stat().st_size for name in names]


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
