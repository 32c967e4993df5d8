"""EfficientNet-Lite0 to three quarters of its latency in ONNX Runtime, without training: `tt.trim` beside plain ways.

    python benchmarks/trim_lite0.py imagenet-sample.npz              # a quarter of an hour and more
    python benchmarks/trim_lite0.py imagenet-sample.npz --quick      # few pictures, two plans
    python benchmarks/trim_lite0.py imagenet-sample.npz --ways trim

Every second picture is for the figure; the others are all that each way sees. By hand: torch-pruning's magnitude
pruner with one ratio for all layers; the blocks that turn their input least taken out; static int8 by ONNX Runtime's
own quantizer. Of the first two the mildest that is fast enough is taken. Every file is timed beside the original's.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch_pruning as tp
from heal_lite0 import EXAMPLE, read
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.session import OnnxSession
from torchtrim.bench.table import Table
from torchtrim.demo.lite0 import efficientnet_lite0
from torchtrim.graph.copying import full_copy

SHARE = 0.75


def main() -> int:
    made = parser(__doc__)
    made.add_argument("pictures", type=Path, help="the .npz file")
    made.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    made.add_argument("--trials", type=int, default=10)
    made.add_argument("--pruning", nargs="+", default=["magnitude", "reconstruction"], help="for trim")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--work", type=Path, help="a folder for the study and the report; an earlier run in it goes on")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    pictures, labels = read(options.pictures)
    if options.quick:
        pictures, labels = pictures[:80], labels[:80]
    with tempfile.TemporaryDirectory() as folder:
        trials = 2 if options.quick else options.trials
        case = Case(pictures, labels, Path(folder), trials, options.pruning, options.work)
        results = Results("trim_lite0_quick" if options.quick else "trim_lite0", options.out, case)
        results.add("untouched", case.measured(case.original) | {"seconds": 0.0, "note": ""})
        for name in options.ways:
            started = time.perf_counter()
            found = WAYS[name](case)
            results.add(name, found | {"seconds": round(time.perf_counter() - started, 1)})
    return 0


class Case:
    """The model, its file and its latency; the pictures."""

    def __init__(
        self,
        pictures: torch.Tensor,
        labels: torch.Tensor,
        folder: Path,
        trials: int,
        pruning: list[str],
        work: Path | None,
    ) -> None:
        self.model = efficientnet_lite0().eval()
        self.figure, self.answers = pictures[0::2], labels[0::2]
        self.seen = list(zip(pictures[1::2].split(25), labels[1::2].split(25), strict=True))
        self.folder, self.trials, self.pruning, self.work = folder, trials, pruning, work
        self.original = self.file(self.model, "original")
        looks = [tt.benchmark(self.original, EXAMPLE, seconds=1).timings[0].median_ms for _ in range(8)]
        self.ms = min(looks)  # what disturbs a measurement makes it longer

    def file(self, net: nn.Module, name: str) -> Path:
        return tt.export_onnx(net, EXAMPLE, self.folder / f"{name}.onnx", benchmark=False, overwrite=True).path

    def ratio(self, path: Path, seconds: float = 3.0) -> float:
        return tt.benchmark({"original": self.original, "this": path}, EXAMPLE, seconds=seconds)["this"].ratio

    def measured(self, path: Path) -> dict[str, Any]:
        """Top-1 of a file on the pictures for the figure, and its latency beside the original's."""
        session = OnnxSession(path)
        name = session.input_names[0]
        answers = [session.run({name: part.numpy()})[0].argmax(1) for part in self.figure.split(25)]
        right = float((np.concatenate(answers) == self.answers.numpy()).mean())
        return {"top1": round(100 * right, 1), "latency": round(self.ratio(path, 10.0), 3)}


def trim(case: Case) -> dict[str, Any]:
    def accuracy(net: nn.Module) -> float:
        right = sum(int((net(x).argmax(1) == y).sum()) for x, y in case.seen)
        return right / sum(len(y) for _, y in case.seen)

    folder = case.work or case.folder / "trim"
    result = tt.trim(
        case.model, case.seen, accuracy, EXAMPLE, budget=tt.Budget(latency_ms=SHARE * case.ms), quantize="auto",
        trials=case.trials, pruning=case.pruning, folder=folder,
    )  # fmt: skip
    print(result, flush=True)
    if result.export is None:
        raise SystemExit("trim made no file")
    return case.measured(result.export.path) | {"note": str(result.plan)}


def pruned(case: Case) -> dict[str, Any]:
    """torch-pruning, the least ratio that is fast enough."""
    low, high, best = 0.0, 0.6, 0.6
    for _ in range(5):
        middle = (low + high) / 2
        if case.ratio(case.file(_pruned(case, middle), "pruned")) <= SHARE:
            high = best = middle
        else:
            low = middle
    path = case.file(_pruned(case, best), "pruned")
    return case.measured(path) | {"note": f"ratio {best:.3f}"}


def _pruned(case: Case, ratio: float) -> nn.Module:
    net = full_copy(case.model)
    pruner = tp.pruner.MagnitudePruner(
        net, (EXAMPLE,), tp.importance.MagnitudeImportance(p=2), pruning_ratio=ratio, round_to=8,
        ignored_layers=[net.get_submodule("classifier")],
    )  # fmt: skip
    pruner.step()
    return net.eval()


def removed(case: Case) -> dict[str, Any]:
    order = tt.rank_blocks(case.model, [x for x, _ in case.seen], "influence", EXAMPLE).order
    for count in range(1, len(order) + 1):
        path = case.file(tt.remove(case.model, EXAMPLE, list(order[:count])), "removed")
        if case.ratio(path) <= SHARE:
            break
    return case.measured(path) | {"note": f"{count} blocks: {', '.join(order[:count])}"}


def int8(case: Case) -> dict[str, Any]:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._rows: Iterator[Any] = iter(row[None].numpy() for x, _ in case.seen for row in x)

        def get_next(self) -> dict[str, Any] | None:
            row = next(self._rows, None)
            return None if row is None else {name: row}

    ready, path = case.folder / "ready.onnx", case.folder / "int8.onnx"
    (name,) = OnnxSession(case.original).input_names
    quant_pre_process(str(case.original), str(ready))
    quantize_static(
        str(ready), str(path), Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, reduce_range=True,
    )  # fmt: skip
    return case.measured(path) | {"note": "static, U8S8, 7-bit weights, a scale for each channel"}


WAYS: dict[str, Callable[[Case], dict[str, Any]]] = {
    "trim": trim, "torch-pruning": pruned, "removal": removed, "int8": int8,
}  # fmt: skip


class Results:
    """The results, written after each; those of earlier runs stay."""

    def __init__(self, stem: str, out: Path, case: Case) -> None:
        self._stem, self._out, self._case = stem, out, case
        place = out / f"{stem}.json"
        self.found: dict[str, Any] = json.loads(place.read_text("utf-8"))["results"] if place.is_file() else {}

    def add(self, name: str, row: dict[str, Any]) -> None:
        self.found[name] = row
        rows = tuple(
            (key, f"{each['top1']:.1f}", f"{each['latency']:.3f}", f"{each['seconds']:.0f}", each["note"])
            for key, each in self.found.items()
        )
        notes = [
            f"- top-1 in percent of {len(self._case.answers)} pictures that no way has seen",
            f"- latency of the original's {self._case.ms:.1f} ms (batch 1, {torch.get_num_threads()} threads, "
            f"alternating rounds); asked for: {SHARE}",
        ]
        columns = ("way", "top-1", "latency", "seconds", "what came out")
        write(
            self._stem, {"results": self.found},
            Table("EfficientNet-Lite0 to 0.75 of its latency, no training", columns, rows, notes), out=self._out,
        )  # fmt: skip


if __name__ == "__main__":
    raise SystemExit(main())
