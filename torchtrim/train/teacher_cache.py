"""What a teacher said before, kept: by the bytes of each sample, or by its number."""

from __future__ import annotations

import hashlib
import json
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.checkpoint.container import place_of, read
from torchtrim.checkpoint.container_write import write
from torchtrim.errors import CheckpointDamaged, CheckpointMismatch, InputError
from torchtrim.graph.inputs import Inputs

_KEY = 16  # bytes: two samples in 2**64 have the same by chance


class TeacherCache:
    """Keeps a teacher's outputs in half precision, in memory and, with a path, in a file.

    Samples are known by a hash (BLAKE2b) of all their input bytes: a sample that was augmented anew is another sample,
    so that an answer is never that of another picture; it pays where inputs repeat to the bit. Hashing takes about a
    millisecond for each megabyte, and inputs on a GPU are copied to the CPU for it. With `index=` samples are known by
    their number instead, and one of each batch is hashed to see that the input is the same as it was.

    Memory: two bytes for each number of an output, 32 for the keys, and about 200 for Python's dict: a million samples
    of 1,000 classes take 2.2 GB, a segmentation of 21 classes at 128 x 128 takes 0.7 MB a sample. Outputs are rounded
    to 16-bit floats (a relative error of 0.05%), on their first use too, so that all epochs see the same; those out of
    that range are not kept.

    Args:
        path: A file to begin with, where it exists, and to `save` to. It belongs to one teacher, and is refused for
            another. It is in the safetensors format.
        max_mb: How many megabytes of outputs to keep. Then no more is added, and the teacher is asked again.

    Example:
        >>> cache = TeacherCache()
        >>> x = Inputs.of(torch.eye(3))
        >>> for _ in range(2):
        ...     answer = cache.answers(x, None, lambda inputs: 2 * inputs.args[0])
        >>> cache.hits, cache.misses, len(cache), cache.size_bytes
        (3, 3, 3, 18)
    """

    def __init__(self, path: str | PathLike[str] | None = None, *, max_mb: float = 1024.0) -> None:
        self.path: Path | None = None if path is None else place_of(path)
        self.max_mb = max_mb
        self.hits = 0
        self.misses = 0
        self.teacher = ""
        self._where: dict[bytes, _Row] = {}
        self._stores: dict[tuple[int, ...], torch.Tensor] = {}
        self._used: dict[tuple[int, ...], int] = {}
        self._bound: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return len(self._where)

    @property
    def size_bytes(self) -> int:
        """The size of the outputs that are kept."""
        return sum(2 * self._used[shape] * _numel(shape) for shape in self._stores)

    def answers(
        self, inputs: Inputs, index: torch.Tensor | Sequence[int] | None, ask: Callable[[Inputs], torch.Tensor]
    ) -> torch.Tensor:
        """The teacher's outputs for a batch; it is asked for those samples that are not here yet.

        Args:
            inputs: The batch.
            index: The number of each sample, where samples are known by it.
            ask: Gives the teacher's outputs for inputs.

        Raises:
            InputError: Not a number for each sample, or a sample whose input is not what it was under this number.
        """
        keys = self._keys(inputs, index)
        missing = [row for row, key in enumerate(keys) if key not in self._where]
        self.hits += len(keys) - len(missing)
        self.misses += len(missing)
        if index is not None and len(missing) < len(keys):
            self._check_same(inputs, keys)
        if len(missing) == len(keys):
            fresh = self._kept(inputs, keys, missing, index is not None, ask(inputs))
            return fresh.to(inputs.tensors[0].device)
        found: dict[int, torch.Tensor] = {}
        if missing:
            fresh = self._kept(inputs, keys, missing, index is not None, ask(_rows(inputs, missing)))
            found = dict(zip(missing, fresh, strict=True))
        places = [self._where[key] if row not in found else None for row, key in enumerate(keys)]
        if not missing and len({place.shape for place in places if place}) == 1:
            shape = next(place.shape for place in places if place)
            rows = torch.tensor([place.row for place in places if place])
            answer = self._stores[shape][rows].float()
        else:
            answer = torch.stack(
                [
                    found[row].cpu() if place is None else self._stores[place.shape][place.row].float()
                    for row, place in enumerate(places)
                ]
            )
        return answer.to(inputs.tensors[0].device)

    def belongs_to(self, teacher: nn.Module, what: str) -> None:
        """Bind the cache to a teacher: of another one, and of one that was changed, everything is forgotten.

        Args:
            teacher: The teacher.
            what: What else its outputs depend on (their type, which output is taken).

        Raises:
            CheckpointMismatch: The file holds what another teacher said.
            CheckpointError: The file cannot be read.
        """
        now = (weakref.ref(teacher), what, *_versions(teacher))
        if self._bound == now:
            return
        mark = _fingerprint(teacher, what)  # reads all weights: only when something may have changed
        if self.teacher not in ("", mark):
            self.clear()
        elif not self.teacher and self.path is not None and self.path.exists():
            self._load(mark)
        self.teacher, self._bound = mark, now

    def __getstate__(self) -> dict[str, Any]:
        """For copies, whose teacher is another object."""
        return self.__dict__ | {"_bound": None}

    def clear(self) -> None:
        """Forget everything that is in memory."""
        self._where, self._stores, self._used = {}, {}, {}

    def save(self) -> None:
        """Write the file, whole or not at all. With several processes the first one writes what it has seen.

        Raises:
            CheckpointError: It cannot be written.
        """
        import torch.distributed as distributed

        if self.path is None:
            raise InputError("a cache in memory has no file to write", path="cache", hint='cache="teacher.safetensors"')
        if distributed.is_available() and distributed.is_initialized() and distributed.get_rank():
            return
        tensors: dict[str, torch.Tensor] = {}
        for number, (shape, store) in enumerate(self._stores.items()):
            rows = sorted(
                ((place.row, key, place.check) for key, place in self._where.items() if place.shape == shape),
                key=lambda item: item[0],
            )
            tensors[f"{number}.outputs"] = store[: self._used[shape]]
            tensors[f"{number}.keys"] = _packed([key for _, key, _ in rows])
            tensors[f"{number}.checks"] = _packed([check for _, _, check in rows])
        write(self.path, json.dumps({"kind": _KIND, "teacher": self.teacher}), tensors)

    def _load(self, mark: str) -> None:
        path = self.path or Path()
        container = read(path)
        try:
            about = json.loads(container.text)
        except ValueError as error:
            raise CheckpointDamaged("not a cache of a teacher's outputs", path=path) from error
        if not isinstance(about, dict) or about.get("kind") != _KIND:
            raise CheckpointDamaged("not a cache of a teacher's outputs", path=path, expected=_KIND)
        if about.get("teacher") != mark:
            raise CheckpointMismatch(
                "it holds the outputs of another teacher (or of this one in another type)",
                path=path,
                found=str(about.get("teacher"))[:16],
                expected=mark[:16],
                hint="another file, or delete this one",
            )
        tensors = container.tensors(container.entries)
        for name in [name for name in tensors if name.endswith(".outputs")]:
            number = name.partition(".")[0]
            outputs, keys, checks = (tensors.get(f"{number}.{each}") for each in ("outputs", "keys", "checks"))
            whole = outputs is not None and keys is not None and checks is not None
            if not whole or outputs is None or keys is None or checks is None or outputs.dtype != torch.float16:
                raise CheckpointDamaged("its tables do not belong together", path=path, found=name)
            if keys.shape != (len(outputs), _KEY) or checks.shape != keys.shape or keys.dtype != torch.uint8:
                raise CheckpointDamaged("its tables do not belong together", path=path, found=list(keys.shape))
            shape = tuple(outputs.shape[1:])
            self._stores[shape], self._used[shape] = outputs, len(outputs)
            for row, (key, check) in enumerate(zip(keys, checks, strict=True)):
                self._where[bytes(key.numpy())] = _Row(shape, row, bytes(check.numpy()))

    def _keys(self, inputs: Inputs, index: torch.Tensor | Sequence[int] | None) -> list[bytes]:
        if index is None:
            return _hashes(inputs, range(inputs.batch))
        numbers = torch.as_tensor(index)
        if numbers.shape != (inputs.batch,) or numbers.is_floating_point() or numbers.dtype == torch.bool:
            raise InputError(
                "not a number for each sample",
                path="index",
                found=f"{numbers.dtype}{list(numbers.shape)}",
                expected=f"{inputs.batch} whole numbers",
            )
        return [hashlib.blake2b(f"sample {n}".encode(), digest_size=_KEY).digest() for n in numbers.tolist()]

    def _check_same(self, inputs: Inputs, keys: list[bytes]) -> None:
        row = next(row for row, key in enumerate(keys) if key in self._where)
        (now,) = _hashes(inputs, [row])
        if now != self._where[keys[row]].check:
            raise InputError(
                "its input is not what it was when the teacher's answer was kept",
                path=f"index[{row}]",
                hint="leave index out where inputs are augmented: samples are then known by their bytes",
            )

    def _kept(
        self, inputs: Inputs, keys: list[bytes], rows: list[int], numbered: bool, outputs: torch.Tensor
    ) -> torch.Tensor:
        """The new outputs, rounded as those are that are kept; kept where there is room."""
        outputs = outputs.detach().float()
        if len(outputs) != len(rows):
            raise InputError(
                "the teacher does not give an output for each sample, which a cache needs",
                path="cache",
                found=list(outputs.shape),
                expected=f"{len(rows)} rows",
            )
        rounded = outputs.to(torch.float16).cpu()
        fits = rounded.isfinite().flatten(1).all(1)
        shape = tuple(rounded.shape[1:])
        checks = _hashes(inputs, rows) if numbered else [keys[row] for row in rows]
        room = int((self.max_mb * 2**20 - self.size_bytes) // max(2 * _numel(shape), 1))
        new = [place for place in range(len(rows)) if fits[place] and keys[rows[place]] not in self._where]
        new = list({keys[rows[place]]: place for place in new}.values())[: max(room, 0)]
        if new:
            begin = self._used.get(shape, 0)
            store = self._grown(shape, begin + len(new))
            store[begin : begin + len(new)] = rounded[new]
            for offset, place in enumerate(new):
                self._where[keys[rows[place]]] = _Row(shape, begin + offset, checks[place])
            self._used[shape] = begin + len(new)
        known = fits.to(outputs.device).reshape(-1, *(1,) * (outputs.dim() - 1))
        return torch.where(known, rounded.float().to(outputs.device), outputs)

    def _grown(self, shape: tuple[int, ...], count: int) -> torch.Tensor:
        store = self._stores.get(shape)
        if store is None or len(store) < count:
            larger = torch.empty(
                (max(count, 64, 0 if store is None else len(store) * 3 // 2), *shape), dtype=torch.float16
            )
            if store is not None:
                larger[: len(store)] = store
            self._stores[shape] = store = larger
        return store


_KIND = "torchtrim teacher outputs 1"


@dataclass(frozen=True)
class _Row:
    shape: tuple[int, ...]
    row: int
    check: bytes


def _hashes(inputs: Inputs, rows: Sequence[int] | range) -> list[bytes]:
    """A hash of each sample: its rows of all tensors that have one for each sample, and all of the other arguments."""
    batch = inputs.batch
    whole = hashlib.blake2b(digest_size=_KEY)
    parts: list[torch.Tensor] = []
    for tensor in inputs.tensors:
        whole.update(f"{tensor.dtype}{list(tensor.shape[1:])}".encode())
        flat = tensor.detach().cpu().contiguous()
        if tensor.dim() and len(tensor) == batch:
            parts.append(flat.reshape(batch, -1).view(torch.uint8))
        else:
            whole.update(_bytes_of(flat))
    whole.update(repr(inputs.map(lambda tensor: "tensor")).encode())
    found = []
    for row in rows:
        each = whole.copy()
        for part in parts:
            each.update(_bytes_of(part[row]))
        found.append(each.digest())
    return found


def _rows(inputs: Inputs, rows: list[int]) -> Inputs:
    batch = inputs.batch

    def taken(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[torch.tensor(rows, device=tensor.device)] if tensor.dim() and len(tensor) == batch else tensor

    return inputs.map(taken)


def _versions(model: nn.Module) -> tuple[int, int]:
    """Numbers that change when an operation writes to a weight, and when weights are others."""
    tensors = (*model.parameters(), *model.buffers())
    plain = (nn.Parameter, torch.Tensor)
    places = tuple(tensor.data_ptr() if type(tensor) in plain else id(tensor) for tensor in tensors)
    return sum(tensor._version for tensor in tensors if not tensor.is_inference()), hash(places)


def _fingerprint(model: nn.Module, what: str) -> str:
    found = hashlib.blake2b(f"{type(model).__name__} {what}".encode(), digest_size=_KEY)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        found.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        found.update(_bytes_of(tensor.detach().cpu().contiguous()))
    return found.hexdigest()


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _packed(keys: list[bytes]) -> torch.Tensor:
    return torch.frombuffer(bytearray(b"".join(keys)), dtype=torch.uint8).reshape(-1, _KEY)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()
