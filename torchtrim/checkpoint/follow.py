"""What the records hold in bits and the model's own tensors say too (masks, which entry has which value): not written
twice.

At `save` the bits of each weight are made from the model's tensor, by the record (see `edits.follows`), and compared:
where they are the same they are left out, weight by weight. At `load` they are made again. Both sides look at tensors
piece by piece, and read no more than `_TIMES` times what the model's tensors hold, so that a forged file gets neither
much memory nor much time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from torchtrim.checkpoint.container import Container, Entry
from torchtrim.checkpoint.document import Document
from torchtrim.checkpoint.tensors import State
from torchtrim.edits.edit import Edit
from torchtrim.edits.follows import FollowsWeights
from torchtrim.edits.history import History
from torchtrim.edits.weights import Weights
from torchtrim.errors import CheckpointDamaged

_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TIMES = 4
_PART = 2**18  # entries


def left_out(past: History, state: State) -> tuple[History, list[int]]:
    """The history without the bits that the model's tensors say too, and the numbers of the entries that lack some."""
    room = _TIMES * sum(tensor.numel() * tensor.dtype.itemsize for tensor in state.tensors.values())
    changed: dict[int, Weights] = {}
    for number, edit in enumerate(past.edits):
        record = _record(edit)
        held = None if record is None else getattr(record, record.bits_field)
        if record is None or held is None or list(held) != [layer.path for layer in record.layers]:
            continue
        kept = {}
        for layer in record.layers:
            tensor = state.tensors.get(_own_name(layer.path, state))
            size = 0 if tensor is None else tensor.numel() * tensor.dtype.itemsize
            if tensor is not None and size <= room and _says(record, layer.path, layer.shape, tensor, held[layer.path]):
                room -= size
            else:
                kept[layer.path] = held[layer.path]
        if len(kept) < len(held):
            changed[number] = Weights(kept)
    return _with(past, changed), list(changed)


def completed(past: History, document: Document, file: Container) -> History:
    """The history with the bits that `left_out` took, made from the file's tensors again.

    Raises:
        CheckpointDamaged: What the description says to follow from them cannot; names the weight, or it was altered.
        CheckpointError: They cannot be read.
    """
    room = _TIMES * sum(entry.size for name, entry in file.entries.items() if name.startswith("model."))
    changed: dict[int, Weights] = {}
    for number in document.follow:
        record = _record(past.edits[number]) if 0 <= number < len(past.edits) else None
        held = None if record is None else getattr(record, record.bits_field)
        if record is None or held is None:
            raise CheckpointDamaged("says that a record follows from tensors, which it cannot", found=f"edit {number}")
        found: dict[str, torch.Tensor] = {}
        for layer in record.layers:
            if layer.path in found:
                continue
            if layer.path in held:
                found[layer.path] = held[layer.path]
                continue
            entry = file.entries.get(f"model.{_own_name(layer.path, document)}")
            if entry is None or entry.dtype not in _TYPES or entry.shape != layer.shape:
                raise CheckpointDamaged(
                    "is what a record follows from, and not in the file as such",
                    path=layer.path,
                    found="none" if entry is None else f"{list(entry.shape)} of {entry.dtype}",
                    expected=f"{list(layer.shape)}"[:60],
                )
            room -= entry.size
            if room < 0:
                raise CheckpointDamaged("more is said to follow from its tensors than may", path=layer.path)
            found[layer.path] = _made(record, layer.path, entry, file, document)
        if not found.keys() > held.keys():
            raise CheckpointDamaged("says that a record lacks bits, which does not", found=f"edit {number}")
        changed[number] = Weights(found)
    return _with(past, changed)


def _says(record: FollowsWeights, path: str, shape: Sequence[int], tensor: torch.Tensor, bits: torch.Tensor) -> bool:
    """Whether these are the bits that the record makes from a tensor."""
    if tuple(tensor.shape) != tuple(shape) or tensor.dtype not in _TYPES or bits.dtype != torch.uint8:
        return False
    done = 0
    for part in tensor.detach().flatten().split(_PART) if tensor.numel() else ():
        made = record.bits_of(path, part.cpu())
        if made is None or not torch.equal(made, bits[done : done + len(made)]):
            return False
        done += len(made)
    return tuple(bits.shape) == (done,)


def _made(record: FollowsWeights, path: str, entry: Entry, file: Container, document: Document) -> torch.Tensor:
    made = [torch.empty(0, dtype=torch.uint8)]
    for part in _parts(file, f"model.{_own_name(path, document)}", entry):
        bits = record.bits_of(path, part)
        if bits is None:
            raise CheckpointDamaged("is what a record follows from, and has values that this has not", path=path)
        made.append(bits)
    return torch.cat(made)


def _parts(file: Container, name: str, entry: Entry) -> Iterator[torch.Tensor]:
    for piece in file.pieces(name):
        yield torch.frombuffer(bytearray(piece), dtype=entry.dtype)


def _record(edit: Edit) -> FollowsWeights | None:
    decided: Any = getattr(edit, "decided", None)
    return decided if isinstance(decided, FollowsWeights) else None


def _with(past: History, changed: Mapping[int, Weights]) -> History:
    """The history with other bits in some of its records, by the number of the entry."""
    entries = list(past.entries)
    for number, bits in changed.items():
        edit: Any = entries[number].edit
        decided = replace(edit.decided, **{edit.decided.bits_field: bits})
        entries[number] = replace(entries[number], edit=replace(edit, decided=decided))
    return replace(past, entries=tuple(entries))


def _own_name(name: str, names: State | Document) -> str:
    """The name under which a tensor is in the file."""
    tied: Mapping[str, str] = names.tied
    own = tied.get(name, name)
    return names.shared.get(own, own)
