"""Measurements kept on disk by what they are of: found again, shared by processes, never half-written."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.checkpoint.atomic import replacing
from torchtrim.errors import InputError

_STALE = 3600.0  # seconds: a claim older than that was left by a process that ended


class Measured:
    """A folder of measurements.

    Several processes may share it, on one machine or on a common disk: one that finds a measurement claimed by another
    leaves it to that one. A claim is given up after an hour, in case its process was killed.

    Args:
        folder: Where they are kept; made where it is missing. None: in memory only.

    Raises:
        InputError: The folder cannot be made.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._held: dict[str, Any] = {}
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"the folder cannot be made: {error.strerror}", path=self.folder) from error

    def find(self, key: str) -> Any | None:
        """What was measured; None where nothing was, or where the file is no measurement."""
        if key in self._held or self.folder is None:
            return self._held.get(key)
        try:
            found = json.loads((self.folder / f"{key}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        self._held[key] = found.get("value") if isinstance(found, dict) else None
        return self._held[key]

    def claim(self, key: str) -> bool:
        """Whether this process is to measure it."""
        if self.folder is None:
            return True
        place = self.folder / f"{key}.claim"
        try:
            if place.exists() and time.time() - place.stat().st_mtime > _STALE:
                place.unlink(missing_ok=True)
            descriptor = os.open(place, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(f"the folder cannot be written to: {error.strerror}", path=self.folder) from error
        os.close(descriptor)
        return True

    def keep(self, key: str, value: Any, about: dict[str, Any]) -> None:
        """Write a measurement, with what it is of."""
        self._held[key] = value
        if self.folder is not None:
            with replacing(self.folder / f"{key}.json") as file:
                file.write(json.dumps({"value": value, **about}).encode())
            self.release(key)

    def release(self, key: str) -> None:
        """Give a claim up."""
        if self.folder is not None:
            (self.folder / f"{key}.claim").unlink(missing_ok=True)

    def of(self, key: str, about: dict[str, Any], measure: Callable[[], Any]) -> Any | None:
        """What was measured, or is measured now; None where another process is at it."""
        found = self.find(key)
        if found is not None:
            return found
        if not self.claim(key):
            return None
        try:
            value = measure()
        except BaseException:
            self.release(key)
            raise
        self.keep(key, value, about)
        return value


def key_of(*parts: Any) -> str:
    """A name for what a measurement is of, from its content.

    Example:
        >>> key_of("a", 0.5) == key_of("a", 0.5), key_of("a", 0.5) == key_of("a", 0.25)
        (True, False)
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


def content_of(model: nn.Module) -> str:
    """A digest of a model: the classes of its modules, and every parameter and buffer, to the bit."""
    digest = hashlib.sha256()
    for path, module in model.named_modules():
        digest.update(f"{path}:{type(module).__module__}.{type(module).__qualname__}:{module.extra_repr()};".encode())
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]


def content_of_batch(batch: Any) -> str:
    """A digest of the tensors of a batch."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor):
            digest.update(f"{leaf.dtype}:{tuple(leaf.shape)};".encode())
            digest.update(leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:24]
