"""How an ONNX model is written: with its weights in the file, or beside it."""

from __future__ import annotations

import math
from pathlib import Path

import onnx
from onnx.external_data_helper import set_external_data

LARGE = 2_000_000_000  # bytes; one protobuf file cannot hold more


def save_model(
    model: onnx.ModelProto, path: Path, *, external_data: bool, location: str | None = None, least: int = 1024
) -> None:
    """Write a model to a file, with its weights in it or beside it.

    Args:
        model: The model; where its weights go beside the file, it is without them afterwards.
        path: Where it goes.
        external_data: Whether its weights go beside the file.
        location: The name of what holds them; the file's with `.data` at the end by default.
        least: The bytes from which a tensor goes there. ONNX Runtime reads some small ones before it looks there.
    """
    if external_data:
        # Not by the options of `onnx.save`: it refuses where the working directory has a file of that name.
        for tensor in model.graph.initializer:
            if tensor.HasField("raw_data") and len(tensor.raw_data) >= least:
                set_external_data(tensor, location or f"{path.name}.data")
    onnx.save(model, path)


def save_whole(model: onnx.ModelProto, path: Path) -> None:
    """Write a model that holds its weights, which go beside the file where one file cannot hold them.

    Args:
        model: The model; where weights went beside the file, it is without them afterwards.
        path: Where it goes.
    """
    save_model(model, path, external_data=held_bytes(model) > LARGE)


def held_bytes(model: onnx.ModelProto) -> int:
    """The bytes of the weights inside a model; its `ByteSize` raises past 2 GiB."""
    return sum(
        len(tensor.raw_data) or (0 if tensor.external_data else 4 * math.prod(tensor.dims))
        for tensor in model.graph.initializer
    )
