"""Pruned, int8, and both: size on disk, zipped, latency and accuracy of the tutorial's CNN and of EfficientNet-Lite0.

    python benchmarks/prune_int8.py DATA --pictures imagenet-sample.npz
    python benchmarks/prune_int8.py DATA --quick

The tutorial's CNN (MNIST, see `mnist_tutorial.py`; `--epochs` of training) loses half of its channels and learns for
one more epoch. Lite0 (real weights, no training) goes to 0.8 of its MACs, its readers solved again from half of the
pictures; accuracy is on the other half. Each is exported in float and with `quantize="auto"`, `"static"`, and timed in
alternating rounds with one thread.
"""

from __future__ import annotations

import copy
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from heal_lite0 import read
from mnist_data import fetch
from mnist_tutorial import network, pictures, train
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table
from torchtrim.demo.lite0 import efficientnet_lite0
from torchtrim.export.compare import Tolerance

SCHEMES = {"float": None, "static": "static", "auto": "auto"}
Rows = list[tuple[torch.Tensor, torch.Tensor]]


def main() -> int:
    made = parser(__doc__)
    made.add_argument("root", type=Path, help="the folder with MNIST, see mnist_data.py")
    made.add_argument("--pictures", type=Path, help="a .npz with jpeg, offsets and labels, for Lite0")
    made.add_argument("--epochs", type=int, default=3, help="epochs of the CNN before it is pruned (3)")
    options = made.parse_args()
    torch.set_num_threads(1)
    results = {"tutorial CNN": measured(*tutorial(options))}
    stem = "prune_int8_quick" if options.quick else "prune_int8"
    write(stem, {"results": results}, *tables(results), out=options.out, show=False)
    if options.pictures is not None:
        results["EfficientNet-Lite0"] = measured(*lite0(options))
    write(stem, {"results": results}, *tables(results), out=options.out)
    return 0


def tutorial(options: Any) -> tuple[nn.Module, nn.Module, Rows, Rows]:
    """The trained CNN, the pruned one, rows to calibrate on and rows for the figure."""
    fetch("mnist", options.root)
    few = 2_000 if options.quick else None
    training, test = (pictures("MNIST", options.root, each, few) for each in (True, False))
    torch.manual_seed(0)
    net = network()
    train(net, training, 1 if options.quick else options.epochs)
    pruned = tt.prune_channels(copy.deepcopy(net), training[0][:2], 0.5)
    train(pruned, training, 1)
    held = list(zip(training[0][:512].split(32), training[1][:512].split(32), strict=True))
    return net.eval(), pruned.eval(), held, list(zip(test[0].split(100), test[1].split(100), strict=True))


def lite0(options: Any) -> tuple[nn.Module, nn.Module, Rows, Rows]:
    model = efficientnet_lite0()
    values, labels = read(options.pictures)
    if options.quick:
        values, labels = values[:64], labels[:64]
    held, shown = (list(zip(values[i::2].split(25), labels[i::2].split(25), strict=True)) for i in (1, 0))
    pruned = tt.prune_channels(
        model,
        values[:1],
        budget=tt.Budget(macs=0.8),
        data=[batch for batch, _ in held],
        reconstruct=True,
        importance="reconstruction",
        scope="global",
        check=False,
    )
    return model, pruned.eval(), held, shown


def measured(whole: nn.Module, pruned: nn.Module, held: Rows, shown: Rows) -> dict[str, Any]:
    """Every file of both networks."""
    x = shown[0][0][:1]
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, net in {"whole": whole, "pruned": pruned}.items():
            for scheme, quantize in SCHEMES.items():
                path = Path(folder) / f"{name}-{scheme}.onnx"
                anything = Tolerance(relative=None, top1=None)
                report = tt.export_onnx(
                    net, x, path, quantize=quantize, data=held, tolerance=anything, benchmark=False, threads=1
                )
                checked = tt.verify_onnx(path, net, shown, tolerance=anything)
                kept = None if report.selection is None else report.selection.kept.name
                found[f"{name}, {scheme}"] = {
                    "mb": report.size_mb,
                    "zip_mb": zipped(path),
                    "accuracy": checked.accuracy,
                    "cosine": checked.cosine,
                    "kept": kept,
                }
                files[f"{name}, {scheme}"] = path
        timed = tt.benchmark(files, x, threads=1, seconds=4.0)
    for name in found:
        found[name] |= {"median_ms": timed[name].median_ms, "ratio": timed[name].ratio}
    return found


def zipped(path: Path) -> float:
    place = path.with_suffix(".zip")
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        file.write(path, path.name)
    return place.stat().st_size / 1e6


def tables(results: dict[str, Any]) -> list[Table]:
    made = []
    for name, found in results.items():
        rows = tuple(
            (
                each + (f" ({facts['kept']})" if facts["kept"] else ""),
                f"{facts['mb']:.2f}",
                f"{facts['zip_mb']:.2f}",
                f"{facts['median_ms']:.2f}",
                f"{facts['ratio']:.2f}",
                f"{facts['accuracy']:.2%}",
            )
            for each, facts in found.items()
        )
        made.append(
            Table(name, ("file", "MB", "zipped", "ms", "of float", "accuracy"), rows, ["- one thread, batch 1"])
        )
    return made


if __name__ == "__main__":
    raise SystemExit(main())
