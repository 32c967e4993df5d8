"""A data set of torchvision as rows for a recipe or a command: `torchvision:CIFAR10:FOLDER`."""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torchtrim.errors import InputError, MissingDependency, nearest

PREFIX = "torchvision:"
PARTS = ("train", "test")
_LABELS = ("targets", "labels", "_labels")  # where the data sets keep them


class TorchvisionRows:
    """The pictures and labels of a data set that lies on disk already; nothing is fetched.

    Args:
        name: `torchvision:CLASS:FOLDER`, and `:test` where it is not the training part. A class whose splits have other
            names takes them there.
        folder: Where a relative path starts.
        fitted: Makes a picture into what the model takes.

    Raises:
        InputError: There is no such class, or its data are not there.
        MissingDependency: torchvision is not installed.
    """

    def __init__(self, name: str, folder: Path, fitted: Callable[[Any], torch.Tensor]) -> None:
        if importlib.util.find_spec("torchvision") is None:
            raise MissingDependency("torchvision is not installed", hint='pip install "torchtrim[zoo]"')
        from torchvision import datasets

        kind, _, rest = name.removeprefix(PREFIX).partition(":")
        root, colon, part = rest.rpartition(":")
        if not colon:
            root, part = rest, PARTS[0]
        made: Any = getattr(datasets, kind, None)
        if not inspect.isclass(made) or not root:
            raise InputError(
                "not a data set of torchvision",
                path=name,
                expected="torchvision:CIFAR10:FOLDER, or torchvision:CIFAR10:FOLDER:test",
                hint=nearest(kind, datasets.__all__),
            )
        known = inspect.signature(made).parameters
        asked: dict[str, Any] = {"root": str(folder / root)}
        if "train" in known:
            if part not in PARTS:
                raise InputError("no such part of the data set", path=name, found=part, expected=", ".join(PARTS))
            asked["train"] = part == PARTS[0]
        elif "split" in known:
            asked["split"] = part
        if "download" in known:
            asked["download"] = False
        try:
            held: Any = made(**asked)
        except (RuntimeError, OSError, ValueError, TypeError) as error:
            told = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"the data set cannot be read: {told}", path=name) from error
        self._held, self._fitted = held, fitted
        labels = next((getattr(held, key) for key in _LABELS if hasattr(held, key)), None)
        if labels is None:
            labels = [held[row][1] for row in range(len(held))]
        try:
            self.labels: torch.Tensor | None = torch.as_tensor(labels).long()
        except (TypeError, ValueError, RuntimeError) as error:
            raise InputError(
                "its labels are no numbers of classes", path=name, found=type(labels[0]).__name__
            ) from error

    def __len__(self) -> int:
        return len(self._held)

    def take(self, indices: list[int]) -> torch.Tensor:
        """These pictures."""
        return torch.stack([self._fitted(self._held[row][0]) for row in indices])
