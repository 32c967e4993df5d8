"""EfficientNet-Lite0 with channels pruned: accuracy plain, with batch norms recalibrated, reconstructed. No training.

    python benchmarks/prune_lite0.py imagenet-sample.npz                   # everything: a quarter of an hour
    python benchmarks/prune_lite0.py imagenet-sample.npz --macs 0.8 --importance reconstruction
    python benchmarks/prune_lite0.py imagenet-sample.npz --quick           # one budget, few pictures

Every second picture is for the figure, the others for calibration: importance, statistics and weights come of these
alone, without labels. The file holds `jpeg`, `offsets` and `labels`. What was measured in an earlier run stays in the
results, so that a run may do a part.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from heal_lite0 import EXAMPLE, read, run, scores, sizes
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import dependencies
from torchtrim.demo.lite0 import efficientnet_lite0
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.channels import scores as importance_of

# Magnitude takes the same fraction of each layer, as torch-pruning does by default; the other ranks all channels.
SCOPES = {"magnitude": "uniform", "reconstruction": "global"}
METHODS = ("plain", "batch norm", "reconstruction", "both")
MACS = (0.9, 0.8, 0.7)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("pictures", type=Path, help="the .npz file")
    made.add_argument("--macs", nargs="+", type=float, default=MACS, help="shares of the whole model's")
    made.add_argument("--importance", nargs="+", choices=list(SCOPES), default=list(SCOPES))
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    options = made.parse_args()
    pictures, labels = read(options.pictures)
    if options.quick:
        pictures, labels = pictures[:64], labels[:64]
    model = efficientnet_lite0()
    figure, seen, calibration = pictures[0::2], labels[0::2], list(pictures[1::2].split(25))
    results = Results("prune_lite0_quick" if options.quick else "prune_lite0", options.out, len(seen))
    whole = run(model, figure)
    results.add("whole", scores(whole, whole, seen) | sizes(model))
    for name in options.importance:
        criterion = scored(model, name, calibration)
        for share in options.macs[:1] if options.quick else options.macs:
            nets: dict[str, nn.Module] = {}
            for method in (each for each in METHODS if each in options.methods):
                started = time.perf_counter()
                if method == "both" and "reconstruction" in nets:
                    net = nets["reconstruction"]
                    notes = recalibrated(net, calibration, model)
                else:
                    net, notes = pruned(model, calibration, share, method, criterion, SCOPES[name])
                nets[method] = net
                seconds = time.perf_counter() - started
                found = scores(run(net, figure), whole, seen) | sizes(net)
                results.add(f"{name} {share:g} {method}", found | {"seconds": round(seconds, 1), "notes": notes})
    return 0


def scored(model: nn.Module, importance: str, calibration: list[torch.Tensor]) -> Callable[[tt.ChannelGroup], Any]:
    """An importance by name, worked out once for all budgets."""
    inputs = Inputs.of(EXAMPLE)
    groups = dependencies(model, follow(model, inputs))
    started = time.perf_counter()
    values = importance_of(model, groups, importance, data=calibration, inputs=inputs)
    print(f"{importance}: {time.perf_counter() - started:.1f} s", flush=True)
    by_name = {group.name: values[group.units] for group in groups.groups}
    return lambda group: by_name[group.name]


def pruned(
    model: nn.Module, calibration: list[torch.Tensor], share: float, method: str, criterion: Any, scope: Any
) -> tuple[nn.Module, list[str]]:
    net = tt.prune_channels(
        model,
        EXAMPLE,
        budget=tt.Budget(macs=share),
        data=calibration,
        reconstruct=method in ("reconstruction", "both"),
        check=False,
        importance=criterion,
        scope=scope,
    )
    notes = list(tt.history(net).entries[-1].notes)
    if method in ("batch norm", "both"):
        notes += recalibrated(net, calibration, model)
    return net, notes


def recalibrated(net: nn.Module, calibration: list[torch.Tensor], model: nn.Module) -> list[str]:
    found = tt.recalibrate_batchnorm(net, calibration, original=model)
    return [f"batch norms {found.what} ({found.before:.4f} -> {found.after:.4f})"]


class Results:
    """What was measured; written after every row."""

    def __init__(self, stem: str, out: Path, figure: int) -> None:
        self.stem, self.out, self.figure = stem, out, figure
        path = out / f"{stem}.json"
        self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else {}

    def add(self, key: str, found: dict[str, Any]) -> None:
        self.rows[key] = found
        print(f"{key}: {found}", flush=True)
        self.write()

    def write(self) -> None:
        whole = self.rows["whole"]
        rows = [("whole", "1.000", f"{whole['top1']:.1f}", *[""] * (len(METHODS) - 1))]
        for start in dict.fromkeys(
            key.rpartition(" ")[0].removesuffix(" batch") for key in self.rows if key != "whole"
        ):
            name, share = start.split()
            found = {each: self.rows[f"{start} {each}"] for each in METHODS if f"{start} {each}" in self.rows}
            macs = next(iter(found.values()))["macs"] / whole["macs"]
            top1 = [f"{found[each]['top1']:.1f}" if each in found else "" for each in METHODS]
            rows.append((f"{name}, budget {share}", f"{macs:.3f}", *top1))
        notes = [
            f"- top-1 in percent of {self.figure} pictures ({100 / self.figure:.1f} is one picture), without training",
            "- magnitude: the same fraction of each layer; reconstruction: all channels ranked together, by what the "
            "outputs lose for each MAC saved when the readers are solved again",
            "- batch norm: statistics moved by what the pruning changed, as far as held-back pictures agree; "
            "reconstruction: readers solved again in closed form; both: one after the other",
        ]
        columns = ("ranked by", "MACs", *METHODS)
        table = Table("EfficientNet-Lite0, channels pruned", columns, tuple(rows), notes)
        write(self.stem, {"rows": self.rows}, table, out=self.out, show=False)


if __name__ == "__main__":
    raise SystemExit(main())
