"""`size_report`: how large a model or a file really is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from torchtrim.bench.size import Counter, ModelSize, SizeReport, Squeezed, TensorSize, pieces_of
from torchtrim.checkpoint.container import bytes_of, read
from torchtrim.checkpoint.document import Document
from torchtrim.errors import InputError, ModelError
from torchtrim.graph.copying import unwrap
from torchtrim.report.onnx_tensors import onnx_tensors
from torchtrim.report.stored import Stored, safetensors_stored

Sized: TypeAlias = "nn.Module | str | os.PathLike[str]"

_NO_SIGN = {torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu}


def size_report(
    model_or_file: Sized | Mapping[str, Sized],
    *,
    tensors: bool = False,
    compress: bool = True,
    gzip_level: int = 6,
    zstd_level: int = 3,
) -> SizeReport:
    """How large a model or a file is: parameters, those that are not zero, different values, bytes plain and packed.

    A pruned network has as many bytes as a dense one until something packs them; this says what gzip and zstd make of
    each form. Files are read a mebibyte at a time, and mapped where they are pickles or ONNX, so that memory does not
    grow with them. Nothing in them is run, and nothing is unpickled but tensors. Tied weights count once.

    Args:
        model_or_file: An `nn.Module`; or the path of a `.trim` file, of an `.onnx` file (the weights beside it count
            too), of a `state_dict` of `torch.save`, of `.safetensors`; or a dict `{name: one of these}`.
        tensors: Whether the text has a table of each one's tensors too. `to_dict()` always has them.
        compress: Whether to find out what gzip and zstd make of it, which takes most of the time.
        gzip_level: 1 to 9; 6 is what gzip does by itself.
        zstd_level: 1 to 22; 3 is what zstd does by itself.

    Returns:
        The sizes, in bytes. For a model, gzip and zstd are those of its tensors' bytes, one after the other.

    Raises:
        InputError: A file that is not there, cannot be read or is none of these; a level out of range.
        CheckpointDamaged: A `.trim` file that was altered.
        ModelError: A model on the meta device, or with lazy parameters.

    Example:
        >>> net = nn.Linear(100, 10)
        >>> _ = net.weight.data[:9].zero_()
        >>> size = size_report(net).sizes[0]
        >>> size.params, size.nonzeros, size.memory_bytes, size.gzip_bytes < 800
        (1010, 110, 4040, True)
    """
    if isinstance(model_or_file, Mapping):
        named = dict(model_or_file)
    elif isinstance(model_or_file, nn.Module):
        named = {type(unwrap(model_or_file)).__name__: model_or_file}
    else:
        named = {_name(model_or_file): model_or_file}
    if not named:
        raise InputError("there is nothing to measure", found="no models and no files")
    _check_level("gzip_level", gzip_level, 9)
    _check_level("zstd_level", zstd_level, 22)
    sizes = []
    for name, each in named.items():
        squeezed = Squeezed(gzip_level, zstd_level) if compress else None
        sizes.append(_model(name, each, squeezed) if isinstance(each, nn.Module) else _file(name, each, squeezed))
    notes = []
    if compress and any(size.zstd_bytes is None for size in sizes):
        notes.append('zstd is not measured: pip install "torchtrim[zstd]"')
    return SizeReport(tuple(sizes), gzip_level, zstd_level, by_tensor=tensors, notes=tuple(notes))


def _name(path: object) -> str:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError("neither a model nor the path of a file", found=type(path).__name__)
    return Path(path).name


def _check_level(name: str, level: object, most: int) -> None:
    if not isinstance(level, int) or isinstance(level, bool) or not 1 <= level <= most:
        raise InputError("no such level", path=name, found=level, expected=f"1 to {most}")


def _model(name: str, model: nn.Module, squeezed: Squeezed | None) -> ModelSize:
    model = unwrap(model)
    held: list[tuple[str, torch.Tensor, bool]] = [(key, each, True) for key, each in model.named_parameters()]
    held += [(key, tensor, False) for key, tensor in model.named_buffers()]
    tensors = []
    for key, tensor, parameter in held:
        if isinstance(tensor, nn.UninitializedParameter) or tensor.is_meta:
            raise ModelError("a tensor without values", path=key, hint="run the model once, or load its weights")
        stored = _plain(key, tensor, parameter)
        tensors.append(_counted(stored, squeezed))
    return _summed(name, "model", tensors, None, squeezed)


def _plain(name: str, tensor: torch.Tensor, parameter: bool = True) -> Stored:
    """A tensor in memory. A sparse one counts as it is: its values."""
    if tensor.layout is not torch.strided:
        tensor = tensor.detach().coalesce().values() if tensor.layout is torch.sparse_coo else tensor.detach().values()
    plain = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    return _stored_as(name, plain.dtype, tuple(plain.shape), lambda: pieces_of(bytes_of(plain)), parameter)


def _stored_as(name: str, dtype: torch.dtype, shape: tuple[int, ...], pieces: Any, parameter: bool = True) -> Stored:
    """A tensor of a type of torch."""
    parts = 2 if dtype.is_complex else 1
    signed = (dtype.is_floating_point or dtype.is_complex) and dtype not in _NO_SIGN
    bits = 8 * dtype.itemsize // parts
    return Stored(name, str(dtype).removeprefix("torch."), shape, bits, signed, pieces, parts, parameter)


def _counted(stored: Stored, squeezed: Squeezed | None = None) -> TensorSize:
    counter = Counter(stored.bits, signed_zero=stored.signed_zero, parts=stored.parts, numel=stored.numel)
    count = 0
    for piece in stored.pieces():
        counter.add(piece)
        count += len(piece)
        if squeezed is not None:
            squeezed.add(piece)
    return TensorSize(
        name=stored.name,
        dtype=stored.dtype,
        shape=stored.shape,
        parameter=stored.parameter,
        numel=stored.numel,
        nonzeros=counter.nonzeros,
        distinct=counter.distinct,
        bytes=count,
    )


def _file(name: str, given: str | os.PathLike[str], squeezed: Squeezed | None) -> ModelSize:
    _name(given)
    path = Path(given)
    try:
        if not path.is_file():
            raise InputError("there is no such file", path=path)
        kind, stored, files, notes = _opened(path)
        tensors = [_counted(each) for each in stored]
        for file in files:
            _squeeze(file, squeezed)
        disk = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise InputError(f"cannot be read: {error.strerror or error}", path=path) from error
    return _summed(name, kind, tensors, disk, squeezed, notes)


def _squeeze(path: Path, squeezed: Squeezed | None) -> None:
    if squeezed is None:
        return
    with path.open("rb") as file:
        while piece := file.read(2**20):
            squeezed.add(piece)


def _summed(
    name: str,
    kind: str,
    tensors: list[TensorSize],
    disk: int | None,
    squeezed: Squeezed | None,
    notes: Iterable[str] = (),
) -> ModelSize:
    if squeezed is not None:
        squeezed.end()
    parameters = [each for each in tensors if each.parameter]
    return ModelSize(
        name,
        kind,
        params=sum(each.numel for each in parameters),
        nonzeros=sum(each.nonzeros for each in parameters),
        memory_bytes=sum(each.bytes for each in tensors),
        disk_bytes=disk,
        gzip_bytes=None if squeezed is None else squeezed.gzip_bytes,
        zstd_bytes=None if squeezed is None else squeezed.zstd_bytes,
        tensors=tuple(tensors),
        notes=tuple(notes),
    )


def _opened(path: Path) -> tuple[str, Iterator[Stored], list[Path], list[str]]:
    """What kind of file it is, its tensors, all of its files, and what there is to say."""
    if path.suffix == ".onnx":
        found, files = onnx_tensors(path)
        return "onnx", iter(found), [path, *files], ["every initializer counts as a parameter"]
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04" or start[:2] == b"\x80\x02":
        return "torch", _pickled(path), [path], ["every tensor counts as a parameter, buffers too"]
    if start[8:] == b"{":
        found, metadata = safetensors_stored(path)
        if "torchtrim_format" in metadata:
            return _trim(path)
        return "safetensors", iter(found), [path], ["every tensor counts as a parameter, buffers too"]
    raise InputError(
        "not a file of a model", path=path, expected=".trim, .onnx, .safetensors, or a state_dict of torch.save"
    )


def _trim(path: Path) -> tuple[str, Iterator[Stored], list[Path], list[str]]:
    file = read(path)
    document = Document.of(path, file.text)
    parameters = {f"model.{name}" for name in document.parameters}
    packed = any(entry.packed for entry in file.entries.values())

    def stored() -> Iterator[Stored]:
        for name, entry in file.entries.items():
            yield _stored_as(
                name.removeprefix("model."),
                entry.dtype,
                entry.shape,
                lambda name=name: file.pieces(name),
                name in parameters,
            )

    return ".trim (zstd)" if packed else ".trim", stored(), [path], []


def _pickled(path: Path) -> Iterator[Stored]:
    try:
        try:
            held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old form cannot be mapped
            held = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what a pickle that is none raises is not said anywhere
        reason = str(error).partition("\n")[0][:200]
        raise InputError(
            f"cannot be read without running code in it: {reason}", path=path, expected="a state_dict of torch.save"
        ) from error
    seen: set[tuple[Any, ...]] = set()
    for name, tensor in _named(held, ""):
        if tensor.layout is torch.strided and tensor.numel():
            place = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
            if place in seen:
                continue  # a tied weight
            seen.add(place)
        yield _plain(name, tensor)


def _named(held: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors in dicts and lists."""
    if isinstance(held, torch.Tensor):
        yield name, held
    elif isinstance(held, Mapping):
        for key, value in held.items():
            yield from _named(value, f"{name}.{key}" if name else str(key))
    elif isinstance(held, (list, tuple)):
        for number, value in enumerate(held):
            yield from _named(value, f"{name}.{number}" if name else str(number))
