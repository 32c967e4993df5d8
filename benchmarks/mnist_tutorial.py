"""The model compression tutorial of the field, rebuilt: a CNN on MNIST, pruned from 50% to 90%, then int8, then zipped.

    python benchmarks/mnist_data.py DATA mnist fashion-mnist    # fetches the pictures
    python benchmarks/mnist_tutorial.py DATA                    # both sets, 18 epochs of 100 CPU seconds
    python benchmarks/mnist_tutorial.py DATA --quick            # few pictures, one epoch each

The network is the Keras tutorial's: convolution 5x5 to 32, pool, batch norm, convolution 5x5 to 64, pool, dense 1024,
dropout, dense 10: 3,274,698 parameters and 64 running statistics of the batch norm, 12.5 MiB as float32. Stages:

- dense: Adam at 1e-3, then a cosine down, `--epochs` epochs;
- fine-tuned: the dense one trained as long again as the pruned one is, without pruning: what more training alone gives;
- pruned: 50% to 90% of the weights of each layer but the first and the last, by magnitude, while training goes on:
  `--prune-epochs` epochs, of which the first two thirds prune, and the same learning rates again;
- clustered: the weights that are left, as 15 values a tensor and zero. Its int8 file has one scale a tensor, so that
  equal weights stay equal;
- the same two once more with the dense layer's weights going in blocks of 4 outputs, side by side in the file: what zip
  makes smallest.

Each is written as PyTorch's state_dict, `.trim` with `compress="zstd"`, ONNX in float32 and ONNX in int8 (the dense
layers; convolutions stay float, as dynamic int8 makes them slower). Sizes are those of the file, and of it after gzip,
zstd and zip. Accuracies are on the 10,000 test pictures, those of the ONNX files in ONNX Runtime. One seed is not the
last word: a tenth of a point is ten pictures. Writes `mnist_tutorial.json` and `.md`.
"""

from __future__ import annotations

import copy
import json
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import torch
from mnist_data import fetch
from torch import nn
from torch.nn import functional as F
from torchvision.datasets import MNIST, FashionMNIST
from written import parser, write

import torchtrim as tt
from torchtrim.bench.session import OnnxSession
from torchtrim.bench.table import Table
from torchtrim.graph.inputs import Inputs

SETS = {"MNIST": MNIST, "Fashion-MNIST": FashionMNIST}
BATCH = 128
CLUSTERS = 16
Pictures = tuple[torch.Tensor, torch.Tensor]


def network() -> nn.Sequential:
    """The tutorial's CNN; "same" padding, so that 28 x 28 become 7 x 7."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 64, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64 * 7 * 7, 1024),
        nn.ReLU(),
        nn.Dropout(0.4),
        nn.Linear(1024, 10),
    )


def main() -> int:
    made = parser(__doc__)
    made.add_argument("root", type=Path, help="the folder with the pictures, see mnist_data.py")
    made.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    made.add_argument("--epochs", type=int, default=3, help="epochs of the dense network (3)")
    made.add_argument("--prune-epochs", type=int, default=3, help="epochs that prune and fine-tune (3)")
    made.add_argument("--seed", type=int, default=0)
    options = made.parse_args()
    settings = {"epochs": options.epochs, "prune_epochs": options.prune_epochs, "seed": options.seed}
    stem = "mnist_tutorial_quick" if options.quick else "mnist_tutorial"
    results = _earlier(options.out / f"{stem}.json", settings)
    for name in options.sets:
        fetch(name.lower(), options.root)
        results[name] = measured(name, options)
        tables = [table(each, found) for each, found in results.items()]
        write(stem, {**settings, "sets": results}, *tables, out=options.out, show=name == options.sets[-1])
    return 0


def _earlier(place: Path, settings: dict[str, int]) -> dict[str, Any]:
    """The sets of earlier runs with the same settings: they stay in the table."""
    if not place.is_file():
        return {}
    held = json.loads(place.read_text("utf-8"))
    return dict(held["sets"]) if all(held.get(key) == value for key, value in settings.items()) else {}


def measured(name: str, options: Any) -> dict[str, Any]:
    """All stages of one set."""
    few = 2_000 if options.quick else None
    training, test = pictures(name, options.root, True, few), pictures(name, options.root, False, few)
    epochs, again = (1, 1) if options.quick else (options.epochs, options.prune_epochs)
    torch.manual_seed(options.seed)
    stages: dict[str, Any] = {}

    net, seconds = network(), time.perf_counter()
    train(net, training, epochs)
    stages["dense"] = {"seconds": time.perf_counter() - seconds, **forms(net, test)}
    _say(name, "dense", stages)

    longer, seconds = copy.deepcopy(net), time.perf_counter()
    train(longer, training, again)
    stages["fine-tuned"] = {"seconds": time.perf_counter() - seconds, **forms(longer, test)}
    _say(name, "fine-tuned", stages)

    for way, blocks in {"pruned": None, "in blocks": (4, 1)}.items():
        pruned, seconds = copy.deepcopy(net), time.perf_counter()
        report = train(pruned, training, again, prune=True, block=blocks)
        stages[f"{way}, 90%"] = {"seconds": time.perf_counter() - seconds, "zeros": report, **forms(pruned, test)}
        _say(name, f"{way}, 90%", stages)

        seconds = time.perf_counter()
        clustered = tt.cluster_weights(pruned, test[0][:2], CLUSTERS)
        found = forms(clustered, test, per_channel=False)
        stages[f"{way}, {CLUSTERS} values"] = {"seconds": time.perf_counter() - seconds, **found}
        _say(name, f"{way}, {CLUSTERS} values", stages)
    return stages


def _say(name: str, stage: str, stages: dict[str, Any]) -> None:
    found = stages[stage]
    text = "; ".join(
        f"{form} {each['accuracy']:.2%} {each['zip'] / 1e6:.3f} MB zipped" for form, each in found["forms"].items()
    )
    print(f"{name}, {stage} ({found['seconds']:.0f} s): {text}", flush=True)


def pictures(name: str, root: Path, train: bool, few: int | None) -> Pictures:
    held = SETS[name](root, train=train)
    return held.data[:few, None].float() / 255, held.targets[:few]


def train(
    net: nn.Module, data: Pictures, epochs: int, prune: bool = False, block: tuple[int, ...] | None = None
) -> dict[str, Any] | None:
    """Adam, 1e-3 to nothing along a cosine. With `prune` from 50% to 90% sparsity in the first two thirds."""
    count = len(data[0]) // BATCH
    steps = count * epochs
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    pruners = []
    if prune:
        decay = tt.PolynomialDecay(0.5, 0.9, begin=0, end=steps * 2 // 3, every=max(1, min(100, steps // 20)))
        parts = [{}] if block is None else [{"block": block, "include": "8"}, {"exclude": "8"}]
        pruners = [tt.MagnitudePruner(net, decay, optimizer=optimizer, **part) for part in parts]
    net.train()
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0])).split(BATCH)[:count]:
            loss = F.cross_entropy(net(data[0][rows]), data[1][rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            for pruner in pruners:
                pruner.step()
    net.eval()
    return {"reports": [pruner.finish().to_dict() for pruner in pruners]} if pruners else None


def forms(net: nn.Module, test: Pictures, per_channel: bool = True) -> dict[str, Any]:
    """The network as files, how large each is, and how right it is."""
    found: dict[str, Any] = {}
    example = test[0][:2]
    with tempfile.TemporaryDirectory() as folder:
        torch.save(net.state_dict(), f"{folder}/net.pt")
        tt.save(net, f"{folder}/net.trim", compress="zstd")
        own = accuracy(net, test)
        tt.export_onnx(net, example, f"{folder}/float.onnx", benchmark=False)
        tt.export_onnx(
            net, example, f"{folder}/int8.onnx", quantize="dynamic", per_channel=per_channel, benchmark=False
        )
        names = {"state_dict": "net.pt", ".trim": "net.trim", "ONNX": "float.onnx", "ONNX int8": "int8.onnx"}
        sizes = tt.size_report({form: f"{folder}/{file}" for form, file in names.items()})
        for form, file in names.items():
            path, size = Path(folder, file), sizes[form]
            right = file_accuracy(path, test) if file.endswith(".onnx") else own
            with zipfile.ZipFile(f"{path}.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
                archive.write(path, file)
            found[form] = {
                "accuracy": right,
                "disk": size.disk_bytes,
                "gzip": size.gzip_bytes,
                "zstd": size.zstd_bytes,
                "zip": Path(f"{path}.zip").stat().st_size,
            }
    weights = [weight for weight in net.parameters() if weight.dim() > 1]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    return {"sparsity": zeros, "forms": found}


@torch.no_grad()
def accuracy(net: nn.Module, data: Pictures) -> float:
    right = sum(int((net(x).argmax(1) == y).sum()) for x, y in zip(*(part.split(500) for part in data), strict=True))
    return right / len(data[0])


def file_accuracy(path: Path, data: Pictures) -> float:
    session = OnnxSession(path, threads=torch.get_num_threads())
    right = 0
    for x, y in zip(*(part.split(500) for part in data), strict=True):
        right += int((session.run(session.feed(Inputs.of(x)))[0].argmax(1) == y.numpy()).sum())
    return right / len(data[0])


def table(name: str, stages: dict[str, Any]) -> Table:
    rows = []
    for stage, found in stages.items():
        for form, each in found["forms"].items():
            sizes = [
                f"{each[key] / 1e6:.3f}" if each[key] is not None else "" for key in ("disk", "gzip", "zstd", "zip")
            ]
            dense = stages["dense"]["forms"][form]["accuracy"]
            change = f"{100 * (each['accuracy'] - dense):+.2f}"
            rows.append((stage, form, f"{found['sparsity']:.1%}", *sizes, f"{each['accuracy']:.2%}", change))
    columns = ("stage", "form", "zeros", "MB", "gzip MB", "zstd MB", "zip MB", "accuracy", "points to dense")
    times = ", ".join(f"{stage} {found['seconds']:.0f} s" for stage, found in stages.items())
    return Table(f"{name}: the tutorial's CNN, stage by stage", columns, tuple(rows), [f"- {times}"], left=2)


if __name__ == "__main__":
    raise SystemExit(main())
