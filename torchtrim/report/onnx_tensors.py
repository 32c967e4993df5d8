"""The weights of an ONNX file, found in its bytes without loading it.

`onnx.load` brings the whole file into memory, and its message objects take as much again. Here the file is mapped, and
the few fields of the format that lead to tensors are followed (onnx.proto: a model's graph, a graph's initializers and
nodes, a node's attributes, an attribute's tensors and graphs); everything else is stepped over.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeGuard

import numpy as np

from torchtrim.bench.size import pieces_of
from torchtrim.errors import InputError
from torchtrim.report.stored import Stored, pieces_in

# Of TensorProto.DataType: a name, bits of a number, whether its zero can have a minus, numbers in an element.
_TYPES = {
    1: ("float32", 32, True, 1), 2: ("uint8", 8, False, 1), 3: ("int8", 8, False, 1), 4: ("uint16", 16, False, 1),
    5: ("int16", 16, False, 1), 6: ("int32", 32, False, 1), 7: ("int64", 64, False, 1), 9: ("bool", 8, False, 1),
    10: ("float16", 16, True, 1), 11: ("float64", 64, True, 1), 12: ("uint32", 32, False, 1),
    13: ("uint64", 64, False, 1), 14: ("complex64", 32, True, 2), 15: ("complex128", 64, True, 2),
    16: ("bfloat16", 16, True, 1), 17: ("float8_e4m3fn", 8, True, 1), 18: ("float8_e4m3fnuz", 8, False, 1),
    19: ("float8_e5m2", 8, True, 1), 20: ("float8_e5m2fnuz", 8, False, 1), 21: ("uint4", 4, False, 1),
    22: ("int4", 4, False, 1), 23: ("float4_e2m1", 4, True, 1),
}  # fmt: skip
_STRING = 8
_DEPTH = 32  # graphs in graphs
# Numbers of the fields that are followed.
_MODEL_GRAPH, _MODEL_FUNCTIONS = 7, 25
_GRAPH_NODES, _GRAPH_INITIALIZERS, _FUNCTION_NODES, _NODE_ATTRIBUTES = 1, 5, 7, 5
_GRAPH_SPARSE, _ATTRIBUTE_SPARSE, _SPARSE_VALUES = 15, 22, 1
_ATTRIBUTE_TENSOR, _ATTRIBUTE_GRAPH, _ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS = 5, 6, 10, 11
_TENSOR_DIMS, _TENSOR_TYPE, _TENSOR_NAME, _TENSOR_RAW, _TENSOR_EXTERNAL = 1, 2, 8, 9, 13

Span = tuple[int, int]


def onnx_tensors(path: Path) -> tuple[list[Stored], list[Path]]:
    """The initializers and constants of a file, and the other files that hold some of them.

    Raises:
        InputError: It is no ONNX file, or one of its files is not there.
    """
    if not path.stat().st_size:
        raise InputError("not an ONNX file", path=path, found="0 bytes")
    found: list[Stored] = []
    beside: dict[Path, None] = {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            whole = (0, len(data))
            graphs = list(_messages(data, whole, _MODEL_GRAPH))
            if len(graphs) != 1:
                raise ValueError("it has no graph")
            spans = [span for graph in graphs for span in _of_graph(data, graph, 0)]
            for function in _messages(data, whole, _MODEL_FUNCTIONS):
                spans += _of_nodes(data, function, _FUNCTION_NODES, 0)
            for span in spans:
                stored = _stored(path, data, span, beside)
                found += [] if stored is None else [stored]
        except (IndexError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"not an ONNX file: {error}", path=path) from error
    return found, list(beside)


def _of_graph(data: mmap.mmap, graph: Span, depth: int) -> Iterator[Span]:
    if depth > _DEPTH:
        raise ValueError("graphs are nested too deep")
    yield from _messages(data, graph, _GRAPH_INITIALIZERS)
    for sparse in _messages(data, graph, _GRAPH_SPARSE):  # one counts as it is: its values
        yield from _messages(data, sparse, _SPARSE_VALUES)
    yield from _of_nodes(data, graph, _GRAPH_NODES, depth)


def _of_nodes(data: mmap.mmap, owner: Span, nodes: int, depth: int) -> Iterator[Span]:
    for node in _messages(data, owner, nodes):
        for attribute in _messages(data, node, _NODE_ATTRIBUTES):
            yield from _messages(data, attribute, _ATTRIBUTE_TENSOR, _ATTRIBUTE_TENSORS)
            for sparse in _messages(data, attribute, _ATTRIBUTE_SPARSE):
                yield from _messages(data, sparse, _SPARSE_VALUES)
            for graph in _messages(data, attribute, _ATTRIBUTE_GRAPH, _ATTRIBUTE_GRAPHS):
                yield from _of_graph(data, graph, depth + 1)


def _stored(path: Path, data: mmap.mmap, span: Span, beside: dict[Path, None]) -> Stored | None:
    """A TensorProto; nothing for texts."""
    dims: list[int] = []
    name, kind, raw = "", 0, None
    external: dict[str, str] = {}
    for number, value in _fields(data, span):
        if number == _TENSOR_DIMS:
            dims += [value] if isinstance(value, int) else _varints(data, value)
        elif number == _TENSOR_TYPE and isinstance(value, int):
            kind = value
        elif isinstance(value, int):
            continue
        elif number == _TENSOR_NAME:
            name = data[slice(*value)].decode("utf-8")
        elif number == _TENSOR_RAW:
            raw = value
        elif number == _TENSOR_EXTERNAL:
            texts = {key: data[slice(*text)].decode("utf-8") for key, text in _fields(data, value) if _is_span(text)}
            external[texts.get(1, "")] = texts.get(2, "")
    if kind == _STRING:
        return None
    called, bits, signed, parts = _TYPES[kind]
    size = (math.prod(dims) * bits * parts + 7) // 8
    if external:
        place = path.parent / external["location"]
        if not place.resolve().is_relative_to(path.parent.resolve()):
            raise InputError("its weights are outside of its folder", path=path, found=external["location"][:200])
        if not place.is_file():
            raise InputError("a file with weights of the model is not there", path=place, found=f"named by {path.name}")
        beside[place] = None
        begin = int(external.get("offset", 0))
        return Stored(name, called, tuple(dims), bits, signed, lambda: pieces_in(place, begin, size), parts)
    if raw is not None:
        begin, end = raw
        if end - begin != size:
            raise ValueError(f"the tensor {name!r} has not as many bytes as its shape says")
        return Stored(name, called, tuple(dims), bits, signed, lambda: pieces_in(path, begin, size), parts)
    return Stored(name, called, tuple(dims), bits, signed, _typed(data[slice(*span)], bits, size), parts)


def _typed(message: bytes, bits: int, size: int) -> Callable[[], Iterator[memoryview]]:
    """The bytes of a tensor that is written as a list of numbers, as small ones sometimes are."""
    import onnx
    from onnx import numpy_helper

    array = numpy_helper.to_array(onnx.TensorProto.FromString(message))
    if bits == 4:  # one in a byte there
        each = np.append(array.reshape(-1).view(np.uint8) & 15, np.zeros(array.size % 2, np.uint8))
        array = each[::2] | (each[1::2] << 4)
    plain = np.ascontiguousarray(array).tobytes()
    if len(plain) != size:
        raise ValueError("a tensor has not as many numbers as its shape says")
    return lambda: pieces_of(memoryview(plain))


def _messages(data: mmap.mmap, span: Span, *numbers: int) -> Iterator[Span]:
    """The parts of a message under these numbers, where they are messages themselves."""
    for number, value in _fields(data, span):
        if number in numbers and not isinstance(value, int):
            yield value


def _is_span(value: int | Span) -> TypeGuard[Span]:
    return isinstance(value, tuple)


def _fields(data: mmap.mmap, span: Span) -> Iterator[tuple[int, int | Span]]:
    """The fields of a message: number, and either the value or where it lies."""
    at, end = span
    while at < end:
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            length, at = _varint(data, at)
        elif wire in (1, 5):
            length = 8 if wire == 1 else 4
        else:
            raise ValueError("its bytes are not a message")
        if at + length > end:
            raise ValueError("it ends early")
        yield number, (at, at + length)
        at += length


def _varints(data: mmap.mmap, span: Span) -> list[int]:
    at, end = span
    found = []
    while at < end:
        value, at = _varint(data, at)
        found.append(value)
    return found


def _varint(data: mmap.mmap, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("its bytes are not a message")
