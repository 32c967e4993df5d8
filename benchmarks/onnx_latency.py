"""Latency of int8 and float32 ONNX files beside PyTorch eager and torch.compile, in alternating rounds of one run.

    python benchmarks/onnx_latency.py            # the full size: vit_tiny, resnet50, convnext_tiny at 224 pixels
    python benchmarks/onnx_latency.py --quick    # tiny models, under a minute

Weights are random: they do not change the latency. Writes a JSON file and a Markdown table.
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

FULL = ("vit_tiny_patch16_224", "resnet50", "convnext_tiny")
QUICK = ("test_vit", "test_resnet", "test_convnext")
CANDIDATES = ("PyTorch eager", "PyTorch eager (torch.compile)", "ONNX float32", "ONNX int8")


def main() -> int:
    options = parse(sys.argv[1:])
    names = options.models or (QUICK if options.quick else FULL)
    seconds = options.seconds if options.seconds is not None else (0.5 if options.quick else 10.0)
    print(machine(), file=sys.stderr)
    results = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        results.append(measure(name, threads=options.threads, batch=options.batch, seconds=seconds))
    write(results, options.out, "onnx_latency_quick" if options.quick else "onnx_latency")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="timm models instead of the three")
    parser.add_argument("--quick", action="store_true", help="tiny models and short measurements")
    parser.add_argument("--threads", type=int, default=1, help="threads of PyTorch and of ONNX Runtime (1)")
    parser.add_argument("--batch", type=int, default=1, help="the batch size (1)")
    parser.add_argument("--seconds", type=float, help="seconds for the slowest candidate of a model (10; quick: 0.5)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="where the results go")
    return parser.parse_args(arguments)


def measure(name: str, *, threads: int, batch: int, seconds: float) -> dict[str, Any]:
    """Export a model in float32 and int8, and time the two files beside it."""
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    x = torch.randn(batch, *size)
    with tempfile.TemporaryDirectory() as folder:
        plain = tt.export_onnx(model, x, f"{folder}/float32.onnx", benchmark=False)
        small = tt.export_onnx(model, x, f"{folder}/int8.onnx", quantize="dynamic", benchmark=False)
        candidates = {"PyTorch eager": model, "ONNX float32": plain.path, "ONNX int8": small.path}
        timed = tt.benchmark(candidates, x, threads=threads, seconds=seconds, compile=True)
    return {
        "model": name,
        "float_mb": plain.size_mb,
        "int8_mb": small.size_mb,
        "int8_nodes": small.quantized_nodes,
        "float_max_abs": plain.verification.max_abs,
        "int8_cosine": small.verification.cosine,
        "inputs": timed.inputs,
        "batch": timed.batch,
        "threads": timed.threads,
        "rounds": timed.rounds,
        "noisy": timed.noisy,
        "timings": [asdict(timing) for timing in timed.timings],
        "int8_over_float32": timed["ONNX int8"].median_ms / timed["ONNX float32"].median_ms,
    }


def write(results: list[dict[str, Any]], out: Path, stem: str) -> None:
    """Write the results as JSON and as a Markdown table, and print the table."""
    columns = ("model", "eager ms", "compile ms", "ONNX float32 ms", "ONNX int8 ms", "int8 / float32", "int8 / eager")
    columns += ("MB float32", "MB int8", "int8 cosine")
    rows = []
    for result in results:
        timings = {timing["name"]: timing for timing in result["timings"]}
        times = tuple(f"{timings[name]['median_ms']:.2f} (p95 {timings[name]['p95_ms']:.2f})" for name in CANDIDATES)
        eager = timings["ONNX int8"]
        ratio = f"{eager['ratio']:.2f} ({eager['ratio_low']:.2f} - {eager['ratio_high']:.2f})"
        sizes = (f"{result['float_mb']:.1f}", f"{result['int8_mb']:.1f}", f"{result['int8_cosine']:.4f}")
        model = result["model"] + " (noisy)" * result["noisy"]
        rows.append((model, *times, f"{result['int8_over_float32']:.2f}", ratio, *sizes))
    first = results[0]
    notes = [
        f"- median and 95th percentile; batch {first['batch']}, {first['threads']} thread(s), alternating rounds; a "
        "ratio below 1 is faster, its 95% interval in brackets",
        *(f"- {line}" for line in str(machine()).splitlines()),
    ]
    table = Table("Latency of one forward", columns, tuple(rows), notes)
    out.mkdir(parents=True, exist_ok=True)
    data = {"machine": machine().to_dict(), "results": results}
    (out / f"{stem}.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    (out / f"{stem}.md").write_text(table.markdown() + "\n", encoding="utf-8")
    print(table.markdown())


if __name__ == "__main__":
    raise SystemExit(main())
