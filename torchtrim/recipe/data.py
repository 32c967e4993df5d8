"""Data for a recipe: arrays in a file, or pictures in a folder, as batches."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

from torchtrim.errors import InputError, MissingDependency, nearest
from torchtrim.graph.inputs import Inputs
from torchtrim.recipe.form import DataSection
from torchtrim.recipe.torchvision_data import PREFIX, TorchvisionRows

# Of ImageNet, in red, green and blue: what nearly every network of a zoo was trained with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_INPUT_NAMES = ("inputs", "input", "images", "image", "x", "data")
_TARGET_NAMES = ("targets", "target", "labels", "label", "y")
_CROP = 0.875  # the share of a picture's shorter side that is kept, as in most evaluations on ImageNet

ModelInputs: TypeAlias = "torch.Tensor | tuple[torch.Tensor, ...] | dict[str, torch.Tensor]"


class _Rows(Protocol):
    """Where rows come from."""

    labels: torch.Tensor | None

    def __len__(self) -> int: ...

    def take(self, indices: list[int]) -> ModelInputs: ...


class Batches:
    """Batches of inputs, or of `(inputs, targets)`; they can be gone through again and again.

    Args:
        rows: Where the rows come from.
        size: Rows in a batch. A last batch of a single row joins the one before it, since batch norm cannot train on
            one row.
        labelled: Whether the batches hold targets.
        seed: Go through the rows in a random order, another one each time, the same ones for the same seed.
        limit: Use this many rows, spread evenly.
    """

    def __init__(
        self, rows: _Rows, size: int, *, labelled: bool = False, seed: int | None = None, limit: int | None = None
    ) -> None:
        count = len(rows) if limit is None else min(limit, len(rows))
        self._rows, self._size, self._labelled = rows, size, labelled
        self._chosen = [number * len(rows) // count for number in range(count)]
        self._generator = None if seed is None else torch.Generator().manual_seed(seed)

    @property
    def rows(self) -> int:
        """How many rows they hold in all."""
        return len(self._chosen)

    def __len__(self) -> int:
        return len(self._cuts())

    def __iter__(self) -> Iterator[Any]:
        order = self._chosen
        if self._generator is not None:
            order = [order[index] for index in torch.randperm(len(order), generator=self._generator).tolist()]
        start = 0
        for end in self._cuts():
            indices = order[start:end]
            start = end
            inputs = self._rows.take(indices)
            if self._labelled and self._rows.labels is not None:
                yield inputs, self._rows.labels[indices]
            else:
                yield inputs

    def _cuts(self) -> list[int]:
        ends = [*range(self._size, self.rows, self._size), self.rows]
        if len(ends) > 1 and ends[-1] - ends[-2] == 1:
            del ends[-2]
        return ends


def read_data(
    section: DataSection, inputs: Inputs, *, folder: Path = Path(), labelled: bool = False, seed: int | None = None
) -> Batches:
    """The batches that a recipe's data section means.

    Pictures, in a folder or as whole numbers from 0 to 255 in an array of four dimensions, become floats, less
    `mean` and over `std`, channels first. Those of a folder or a data set of torchvision (`torchvision:CIFAR10:FOLDER`)
    are resized and cropped to the model's input.

    Args:
        section: Which file, and how.
        inputs: The model's example inputs.
        folder: Where a relative path starts.
        labelled: Give `(inputs, targets)`; else inputs alone.
        seed: Shuffle with this seed.

    Raises:
        InputError: No such file or array, one that cannot be read, or no targets where they are needed.
        MissingDependency: Pictures, and torchvision is not installed.
    """
    path = folder / section.file
    rows: _Rows
    if section.file.startswith(PREFIX):
        rows = _DataSet(folder, section, inputs)
    elif not path.exists():
        raise InputError("no such file or folder", path=path)
    else:
        rows = _Pictures(path, section, inputs) if path.is_dir() else _Arrays(path, section, labelled)
    if labelled and rows.labels is None:
        raise InputError(
            "training needs labels",
            path=path,
            hint="a folder for each class" if path.is_dir() else "targets: the name of the array of labels",
        )
    if not len(rows):
        raise InputError("there are no rows in it", path=path)
    return Batches(rows, section.batch, labelled=labelled, seed=seed, limit=section.limit)


class _Arrays:
    """Arrays in a file, all with the rows first."""

    def __init__(self, path: Path, section: DataSection, labelled: bool) -> None:
        found = _read(path)
        targets = section.targets
        if targets is None and (labelled or section.inputs is None):
            targets = next((name for name in _TARGET_NAMES if name in found), None)
        names = section.inputs
        if names is None:
            left = [name for name in found if name != targets]
            names = left[0] if len(left) == 1 else next((name for name in _INPUT_NAMES if name in found), None)
            if names is None:
                raise InputError("which arrays does the model take?", path=path, found=left, hint="inputs: NAME")
        self.labels = None if targets is None else _named(found, targets, path)
        if self.labels is not None and not self.labels.is_floating_point():
            self.labels = self.labels.long()
        self._inputs: Mapping[str, str] | Sequence[str] = [names] if isinstance(names, str) else names
        wanted = self._inputs.values() if isinstance(self._inputs, Mapping) else self._inputs
        self._held = {name: _named(found, name, path) for name in wanted}
        lengths = {
            name: len(held) for name, held in [*self._held.items(), ("targets", self.labels)] if held is not None
        }
        if len(set(lengths.values())) > 1:
            raise InputError("arrays of different lengths", path=path, found=lengths)
        self._section = section

    def __len__(self) -> int:
        return len(next(iter(self._held.values())))

    def take(self, indices: list[int]) -> ModelInputs:
        """These rows."""
        taken = {name: _floats(held[indices], self._section) for name, held in self._held.items()}
        if isinstance(self._inputs, Mapping):
            return {argument: taken[name] for argument, name in self._inputs.items()}
        values = tuple(taken[name] for name in self._inputs)
        return values[0] if len(values) == 1 else values


class _Pictures:
    """Pictures in a folder, or in a folder for each class."""

    def __init__(self, path: Path, section: DataSection, inputs: Inputs) -> None:
        if importlib.util.find_spec("torchvision") is None:
            raise MissingDependency("torchvision is not installed", hint='pip install "torchtrim[zoo]"')
        from torchvision.datasets.folder import IMG_EXTENSIONS

        def pictures(place: Path) -> list[Path]:
            return sorted(each for each in place.iterdir() if each.suffix.lower() in IMG_EXTENSIONS)

        classes = sorted(each for each in path.iterdir() if each.is_dir() and not each.name.startswith("."))
        labels = [(file, number) for number, place in enumerate(classes) for file in pictures(place)]
        self.labels = torch.tensor([number for _, number in labels]) if labels else None
        self._files = [file for file, _ in labels] or pictures(path)
        self._fit = _Fit(inputs, path)
        self._section = section

    def __len__(self) -> int:
        return len(self._files)

    def take(self, indices: list[int]) -> ModelInputs:
        """These pictures."""
        return _floats(torch.stack([self._read(self._files[index]) for index in indices]), self._section)

    def _read(self, file: Path) -> torch.Tensor:
        from PIL import Image

        try:
            with Image.open(file) as opened:
                return self._fit(opened)
        except OSError as error:
            raise InputError(f"the picture cannot be read: {error}", path=file) from error


class _DataSet:
    """Pictures of a data set of torchvision."""

    def __init__(self, folder: Path, section: DataSection, inputs: Inputs) -> None:
        self._rows = TorchvisionRows(section.file, folder, _Fit(inputs, section.file))
        self.labels = self._rows.labels
        self._section = section

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: list[int]) -> ModelInputs:
        """These pictures."""
        return _floats(self._rows.take(indices), self._section)


class _Fit:
    """Resizes and crops a picture to a model's input."""

    def __init__(self, inputs: Inputs, path: object) -> None:
        shape = inputs.tensors[0].shape
        if len(shape) != 4:
            raise InputError("pictures need a model that takes them", path=path, expected="an input (N, C, H, W)")
        self._size = (int(shape[2]), int(shape[3]))
        self._mode = "L" if shape[1] == 1 else "RGB"

    def __call__(self, picture: Any) -> torch.Tensor:
        from torchvision.transforms import functional

        shorter = round(max(self._size) / _CROP)
        cropped = functional.center_crop(functional.resize(picture.convert(self._mode), shorter), list(self._size))
        pixels: torch.Tensor = functional.pil_to_tensor(cropped)
        return pixels


def _floats(values: torch.Tensor, section: DataSection) -> torch.Tensor:
    """Pictures as a network takes them; everything else as it is."""
    if values.dtype != torch.uint8 or values.dim() != 4:
        return values
    if values.shape[1] not in (1, 3) and values.shape[3] in (1, 3):
        values = values.permute(0, 3, 1, 2)
    channels = values.shape[1]
    mean, std = (
        torch.tensor(given if given is not None else usual if channels == 3 else [sum(usual) / 3] * channels)
        for given, usual in ((section.mean, _MEAN), (section.std, _STD))
    )
    if len(mean) != channels or len(std) != channels:
        raise InputError("mean and std have a value for each channel", found=(len(mean), len(std)), expected=channels)
    return ((values.float() / 255 - mean[:, None, None]) / std[:, None, None]).contiguous()


def _read(path: Path) -> dict[str, torch.Tensor]:
    """The arrays in a file, by name; without pickle."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return {name: _tensor(arrays[name]) for name in arrays.files if arrays[name].dtype.kind in "biuf"}
        if path.suffix == ".npy":
            return {"inputs": _tensor(np.load(path, allow_pickle=False))}
        if path.suffix in (".pt", ".pth"):
            return _tensors(torch.load(path, map_location="cpu", weights_only=True), path)
    except InputError:
        raise
    except Exception as error:  # torch.load and np.load raise what they like on a file that is not theirs
        raise InputError(f"the data cannot be read: {error}", path=path) from error
    raise InputError("not a file of data", path=path, expected="a .npz, .npy or .pt file, or a folder of pictures")


def _tensor(array: Any) -> torch.Tensor:
    # torch has no arithmetic on the larger unsigned types, and knows only this machine's order of bytes.
    wider = {"uint16": np.int32, "uint32": np.int64, "uint64": np.int64}.get(array.dtype.name)
    return torch.from_numpy(np.array(array, dtype=wider or array.dtype.newbyteorder("="), order="C"))


def _tensors(held: Any, path: Path) -> dict[str, torch.Tensor]:
    if isinstance(held, torch.Tensor):
        held = {"inputs": held}
    if isinstance(held, (tuple, list)) and len(held) == 2:
        held = {"inputs": held[0], "targets": held[1]}
    if not isinstance(held, Mapping) or not all(isinstance(value, torch.Tensor) for value in held.values()):
        raise InputError(
            "not data",
            path=path,
            found=type(held).__name__,
            expected="a tensor, (inputs, targets) or a dict of tensors",
        )
    return {str(name): value for name, value in held.items()}


def _named(found: Mapping[str, torch.Tensor], name: str, path: Path) -> torch.Tensor:
    if name not in found:
        raise InputError(
            "there is no such array in it", path=path, found=name, expected=list(found), hint=nearest(name, found)
        )
    if found[name].dim() == 0:
        raise InputError("an array without rows", path=path, found=name)
    return found[name]
