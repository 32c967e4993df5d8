"""EfficientNet-Lite0 with blocks taken out of its middle, plain and healed: accuracy, MACs, latency. No training.

    python benchmarks/heal_lite0.py imagenet-sample.npz                      # everything: most of an hour on two cores
    python benchmarks/heal_lite0.py imagenet-sample.npz --methods plain auto --counts 3 5
    python benchmarks/heal_lite0.py imagenet-sample.npz --quick              # one block, few pictures

Every second picture is for the figure, the others for calibration: the blocks are chosen on these by greedy search, and
healing sees these alone, without labels. The file holds `jpeg`, `offsets` and `labels`. What was measured in an earlier
run with the same blocks stays in the results, so that a run may do a part.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table
from torchtrim.demo.lite0 import efficientnet_lite0

METHODS = ("plain", "scale", "linear", "norm", "auto")
EXAMPLE = torch.zeros(1, 3, 224, 224)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("pictures", type=Path, help="the .npz file")
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    made.add_argument("--counts", nargs="+", type=int, default=(1, 2, 3, 4, 5), help="how many blocks to take out")
    made.add_argument("--order", nargs="+", help="the blocks, as 2.1; without it they are searched for")
    made.add_argument("--no-latency", action="store_true", help="without exporting and timing")
    options = made.parse_args()
    pictures, labels = read(options.pictures)
    if options.quick:
        pictures, labels = pictures[:64], labels[:64]
    counts: Sequence[int] = (1,) if options.quick else options.counts
    model = efficientnet_lite0()
    figure, calibration = (pictures[0::2], labels[0::2]), (pictures[1::2], labels[1::2])
    order = options.order or search(model, *calibration, count=max(counts))
    # A search may end in another order than the one of the table that is there: it has a table of its own.
    stem = "heal_lite0_quick" if options.quick else "heal_lite0" if options.order else "heal_lite0_searched"
    results = Results(stem, options.out, order, len(figure[1]))
    logits = run(model, figure[0])
    results.add(0, "plain", scores(logits, logits, figure[1]) | sizes(model))
    for count in counts:
        for method in options.methods:
            started = time.perf_counter()
            net, notes = removed(model, order[:count], method, calibration[0])
            seconds = time.perf_counter() - started
            found = scores(run(net, figure[0]), logits, figure[1]) | sizes(net)
            results.add(count, method, found | {"seconds": round(seconds, 1), "notes": notes})
    if not options.no_latency:
        results.add_latency(latency(model, order, counts))
    return 0


def read(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The pictures, centre 224 x 224 in [-1, 1], and their classes."""
    held = np.load(path)
    found = []
    for start, end in zip(held["offsets"][:-1], held["offsets"][1:], strict=True):
        picture = PIL.Image.open(io.BytesIO(held["jpeg"][start:end].tobytes())).convert("RGB")
        left, top = (picture.width - 224) // 2, (picture.height - 224) // 2
        found.append(np.asarray(picture.crop((left, top, left + 224, top + 224))))
    values = torch.from_numpy(np.stack(found)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return values, torch.from_numpy(held["labels"])


def search(model: nn.Module, pictures: torch.Tensor, labels: torch.Tensor, *, count: int) -> list[str]:
    """One block after the other: that without which most calibration pictures stay right."""
    blocks = [f"{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(1, len(stage))]  # type: ignore[arg-type]
    chosen: list[str] = []
    for _ in range(count):
        right = {}
        for block in blocks:
            if block not in chosen:
                net = tt.remove(model, EXAMPLE, [f"blocks.{one}" for one in [*chosen, block]], check=False)
                right[block] = int((run(net, pictures).argmax(1) == labels).sum())
        chosen.append(max(right, key=lambda block: right[block]))
        print(f"taken out: {chosen}, {right[chosen[-1]]} of {len(labels)} calibration pictures right", flush=True)
    return chosen


def removed(
    model: nn.Module, blocks: Sequence[str], method: str, pictures: torch.Tensor
) -> tuple[nn.Module, list[str]]:
    paths = [f"blocks.{block}" for block in blocks]
    if method == "plain":
        return tt.remove(model, EXAMPLE, paths), []
    net = tt.remove(model, EXAMPLE, paths, heal=method, data=pictures.split(25))
    return net, list(tt.history(net).entries[-1].notes)


@torch.no_grad()
def run(model: nn.Module, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.eval()(part) for part in pictures.split(25)])


def scores(logits: torch.Tensor, whole: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Top-1, how often the class is that of the whole model, and the error that healing looks at."""
    error = ((logits - whole).square().mean() / whole.var()).sqrt()
    same = (logits.argmax(1) == whole.argmax(1)).float().mean()
    return {
        "top1": 100 * float((logits.argmax(1) == labels).float().mean()),
        "agreement": 100 * float(same),
        "error": float(error),
    }


def sizes(model: nn.Module) -> dict[str, Any]:
    found = tt.summary(model, EXAMPLE)
    return {"macs": found.macs, "params": found.params}


def latency(model: nn.Module, order: Sequence[str], counts: Sequence[int]) -> dict[str, Any]:
    """ONNX Runtime, one thread, all files in alternating rounds of one run."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for count in (0, *counts):
            net = tt.remove(model, EXAMPLE, [f"blocks.{one}" for one in order[:count]]) if count else model
            files[str(count)] = tt.export_onnx(net, EXAMPLE, f"{folder}/{count}.onnx", benchmark=False).path
        timed = tt.benchmark(files, EXAMPLE, threads=1, seconds=4.0)
    return timed.to_dict()


class Results:
    """What was measured; written after every row."""

    def __init__(self, stem: str, out: Path, order: Sequence[str], figure: int) -> None:
        self.stem, self.out, self.order, self.figure = stem, out, list(order), figure
        self.rows: dict[str, dict[str, Any]] = {}
        self.timed: dict[str, Any] | None = None
        path = out / f"{stem}.json"
        if path.exists():
            earlier = json.loads(path.read_text("utf-8"))
            length = min(len(earlier["order"]), len(order))
            if earlier["order"][:length] == self.order[:length]:
                self.rows, self.timed = earlier["rows"], earlier["latency"]
                self.order = max(earlier["order"], self.order, key=len)

    def add(self, count: int, method: str, found: dict[str, Any]) -> None:
        self.rows[f"{count} {method}"] = found
        print(f"{count} {method}: {found}", flush=True)
        self.write()

    def add_latency(self, timed: dict[str, Any]) -> None:
        self.timed = timed
        self.write()

    def write(self) -> None:
        whole = self.rows["0 plain"]
        ratios = {each["name"]: each for each in (self.timed or {}).get("timings", ())}
        rows = []
        for count in sorted({int(key.split()[0]) for key in self.rows}):
            found = {method: self.rows[f"{count} {method}"] for method in METHODS if f"{count} {method}" in self.rows}
            first = found.get("plain") or next(iter(found.values()))
            ratio = f"{ratios[str(count)]['ratio']:.2f}" if str(count) in ratios else ""
            top1 = (f"{found[method]['top1']:.1f}" if method in found else "" for method in METHODS)
            rows.append((str(count), *top1, f"{first['macs'] / whole['macs']:.2f}", ratio))
        lost = {
            key: whole["top1"] - row["top1"] for key, row in self.rows.items() if key in ("3 auto", "5 auto", "5 plain")
        }
        notes = [
            f"- blocks {', '.join(self.order)} of `blocks`, in this order; top-1 in percent of {self.figure} pictures "
            f"({100 / self.figure:.1f} is one picture)",
            "- MACs (plain) and latency (ONNX Runtime, batch 1, 1 thread, alternating rounds) as ratios to the whole",
            *(f"- {key}: {value:.1f} points lost" for key, value in lost.items()),
        ]
        columns = ("blocks out", *METHODS, "MACs", "latency")
        table = Table("EfficientNet-Lite0, blocks out of the middle", columns, tuple(rows), notes)
        data = {"order": self.order, "rows": self.rows, "latency": self.timed}
        write(self.stem, data, table, out=self.out, show=False)


if __name__ == "__main__":
    raise SystemExit(main())
