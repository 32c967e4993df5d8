"""Xception (timm's legacy_xception) by the strategies that keras-surgeon is used with: one call each.

    python benchmarks/prune_xception.py            # 299 pixels, some minutes on two cores
    python benchmarks/prune_xception.py --quick    # 96 pixels, short measurements

Global magnitude (the smallest half of all channels, ranked together), thresholds by name (of some layers, the channels
whose score is below a number), and random ones (a tenth of each layer). With keras-surgeon a strategy is a loop over
layers that collects channels for `Surgeon.add_job`; here it is an argument.

Weights are random, and scaled filter by filter so that their sizes differ as much as those of trained networks do:
there are no pretrained weights to be had where this runs, so it says nothing of accuracy. Each network is checked: it
runs in both modes at several batch sizes, equals the original that ignores the pruned channels, and its ONNX file
agrees with it. Latency is that of the files in ONNX Runtime, measured in alternating rounds of one run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

THRESHOLDS = {"conv1": 0.8, "block2.rep.1.*": 0.85, "block3.*": 0.9, "block1[0-2].rep.[14].*": 0.95}
STRATEGIES: dict[str, dict[str, Any]] = {
    "global magnitude, half": {"ratio": 0.5, "importance": "l1", "scope": "global"},
    "thresholds by name": {"thresholds": THRESHOLDS, "importance": "l1"},
    "random, a tenth": {"ratio": 0.1, "importance": "random"},
}


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--seconds", type=float, help="seconds for each file (15; quick: 1)")
    options = made.parse_args()
    pixels = 96 if options.quick else 299
    seconds = options.seconds or (1.0 if options.quick else 15.0)
    stem = "prune_xception_quick" if options.quick else "prune_xception"
    model, x = xception(), torch.randn(2, 3, pixels, pixels)
    tt.prune_channels(nn.Linear(2, 2), torch.zeros(1, 2), ratio=0.0)  # what has to be imported is
    rows: dict[str, dict[str, Any]] = {"original": {"macs": 1.0, "params": 1.0}}
    with tempfile.TemporaryDirectory() as folder:
        files = {"original": exported(model, x, folder, "original")[0]}
        for name, asked in STRATEGIES.items():
            print(f"{name} ...", file=sys.stderr, flush=True)
            started = time.perf_counter()
            tt.prune_channels(model, x, **asked, check=False)
            step = time.perf_counter()
            net = tt.prune_channels(model, x, **asked)
            seconds_of = {"seconds": step - started, "checked_seconds": time.perf_counter() - step}
            rows[name] = seconds_of | measured(net, model, x)
            files[name], rows[name]["onnx"] = exported(net, x, folder, name)
        timed = tt.benchmark(files, x[:1], threads=1, seconds=seconds)
    for timing in timed.timings:
        rows[timing.name] |= {"ms": timing.median_ms, "ratio": timing.ratio}
    columns = (
        "strategy",
        "call",
        "seconds",
        "with checks",
        "channels",
        "parameters",
        "MACs",
        "ONNX, ms",
        "of the original",
    )
    table = Table(f"Xception at {pixels} pixels", columns, [row(*each) for each in rows.items()], notes(rows), left=2)
    write(stem, {"pixels": pixels, "strategies": rows}, table, out=options.out)
    return 0


def xception() -> nn.Module:
    """The network, with filters whose sizes differ by a factor of two or so."""
    torch.manual_seed(0)
    model: nn.Module = timm.create_model("legacy_xception").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 4:
                parameter *= torch.exp(0.7 * torch.randn(len(parameter), 1, 1, 1))
    return model


def measured(net: nn.Module, model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """What is left, in shares of the original, and what was said of it."""
    whole, found = tt.summary(model, x), tt.summary(net, x)
    entry = tt.history(net).entries[-1]
    widths = [(group.before, group.after) for group in entry.edit.pruned.groups]  # type: ignore[attr-defined]
    return {
        "macs": found.macs / whole.macs,
        "params": found.params / whole.params,
        "channels": [sum(side) for side in zip(*widths, strict=True)],
        "notes": list(entry.notes),
        "checked": list(entry.checked),
    }


def exported(net: nn.Module, x: torch.Tensor, folder: str, name: str) -> tuple[Path, str]:
    """The ONNX file, which is compared with the network; and by how much it differs."""
    report = tt.export_onnx(net, x, f"{folder}/{name.replace(' ', '_')}.onnx", benchmark=False)
    return Path(report.path), str(report.verification)


def row(name: str, found: dict[str, Any]) -> tuple[str, ...]:
    asked = STRATEGIES.get(name, {})
    call = ", ".join(f"{key}={json.dumps(value) if key != 'thresholds' else '{...}'}" for key, value in asked.items())
    before, after = found.get("channels", (0, 0))
    return (
        name,
        f"`{call}`" if call else "",
        *(f"{found[key]:.1f}" if key in found else "" for key in ("seconds", "checked_seconds")),
        f"{before:,} -> {after:,}" if before else "",
        f"{found['params']:.1%}",
        f"{found['macs']:.1%}",
        f"{found['ms']:.1f}",
        f"{found['ratio']:.2f}",
    )


def notes(rows: dict[str, dict[str, Any]]) -> list[str]:
    checked = next(found["checked"] for found in rows.values() if "checked" in found)
    return [
        "- Each was checked: " + "; ".join(checked) + ".",
        f"- The thresholds are `{json.dumps(THRESHOLDS)}`; 1 is the mean score of a layer.",
        "- Random weights: this says nothing of accuracy. Widths are rounded to 8.",
    ]


if __name__ == "__main__":
    sys.exit(main())
