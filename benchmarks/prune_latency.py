"""Latency of pruned networks in ONNX Runtime, with widths rounded to multiples of 8 and not, beside the original.

    python benchmarks/prune_latency.py            # resnet50, mobilenetv3_large_100, vit_tiny at 224 pixels
    python benchmarks/prune_latency.py --quick    # tiny models, under a minute

Each network is pruned to a share of its MACs (half). The three files are measured in alternating rounds of one run.
Weights are random: they do not change the latency. Writes a JSON file and a Markdown table, and fails where a rounded
network is slower than its original.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

import torchtrim as tt
from torchtrim.bench.machine import machine
from torchtrim.bench.table import Table

FULL = ("resnet50", "mobilenetv3_large_100", "vit_tiny_patch16_224")
QUICK = ("test_resnet", "test_efficientnet", "test_vit")
WIDTHS = {"rounded to 8": 8, "not rounded": 1}


def main() -> int:
    options = parse(sys.argv[1:])
    names = options.models or (QUICK if options.quick else FULL)
    seconds = options.seconds if options.seconds is not None else (0.5 if options.quick else 15.0)
    print(machine(), file=sys.stderr)
    results = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(measure(name, options.macs, threads=options.threads, seconds=seconds))
    write(results, options.out, "prune_latency_quick" if options.quick else "prune_latency")
    slower = [result["model"] for result in results if result["timings"]["rounded to 8"]["ratio_low"] > 1]
    if slower:
        print(f"slower than the original: {', '.join(slower)}", file=sys.stderr)
    return int(bool(slower))


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm models instead of the three")
    parser.add_argument("--quick", action="store_true", help="tiny models and short measurements")
    parser.add_argument("--macs", type=float, default=0.5, help="the share of the MACs that stays (0.5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (1)")
    parser.add_argument("--seconds", type=float, help="seconds for each candidate (15; quick: 0.5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the results go")
    return parser.parse_args(arguments)


def measure(name: str, share: float, *, threads: int, seconds: float) -> dict[str, Any]:
    """Prune a network with rounded and with plain widths, and time the files beside the original's."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    whole = tt.summary(model, x)
    pruned: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        files = {"original": tt.export_onnx(model, x, f"{folder}/original.onnx", benchmark=False).path}
        for label, step in WIDTHS.items():
            net = tt.prune_channels(model, x, budget=tt.Budget(macs=share), round_to=step)
            found = tt.summary(net, x)
            pruned[label] = {
                "macs": found.macs / whole.macs,
                "params": found.params / whole.params,
                "notes": list(tt.history(net).entries[-1].notes),
            }
            files[label] = tt.export_onnx(net, x, f"{folder}/{label}.onnx", benchmark=False).path
        timed = tt.benchmark(files, x, threads=threads, seconds=seconds)
    return {
        "model": name,
        "asked": share,
        "original": {"macs": whole.macs, "params": whole.params},
        "pruned": pruned,
        "inputs": timed.inputs,
        "threads": timed.threads,
        "rounds": timed.rounds,
        "noisy": timed.noisy,
        "timings": {timing.name: asdict(timing) for timing in timed.timings},
    }


def write(results: list[dict[str, Any]], out: Path, stem: str) -> None:
    """Write the results as JSON and as a Markdown table, and print the table."""
    columns = ("model", "widths", "MACs", "parameters", "ms (p95)", "ratio to the original", "95% interval")
    rows = []
    for result in results:
        for label, timing in result["timings"].items():
            shares = result["pruned"].get(label, {"macs": 1.0, "params": 1.0})
            rows.append(
                (
                    result["model"] + " (noisy)" * result["noisy"],
                    label,
                    f"{shares['macs']:.3f}",
                    f"{shares['params']:.3f}",
                    f"{timing['median_ms']:.2f} ({timing['p95_ms']:.2f})",
                    f"{timing['ratio']:.3f}",
                    f"{timing['ratio_low']:.3f} - {timing['ratio_high']:.3f}",
                )
            )
    first = results[0]
    notes = [
        f"- pruned to {first['asked']} of the MACs by magnitude, the same ratio in each layer; MACs and parameters as "
        "shares of the original's",
        f"- ONNX Runtime, batch 1, {first['threads']} thread(s), alternating rounds of one run for each network; "
        "a ratio below 1 is faster",
        *(f"- {line}" for line in str(machine()).splitlines()),
    ]
    table = Table("Latency of pruned networks", columns, tuple(rows), notes, left=2)
    out.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine().to_dict(), "results": results}
    (out / f"{stem}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (out / f"{stem}.md").write_text(table.markdown() + "\n", encoding="utf-8")
    print(table.markdown())


if __name__ == "__main__":
    raise SystemExit(main())
