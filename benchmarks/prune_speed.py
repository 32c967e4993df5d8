"""How long does pruning half of the channels take, and how much memory, beside plain torch-pruning?

    python benchmarks/prune_speed.py            # seven networks, both engines, minutes (torch-pruning's limits)
    python benchmarks/prune_speed.py --quick    # two small ones

Each in a process of its own, CPU seconds of one thread, pictures of 224 pixels. *Graph* is what goes together: the
forward followed in both modes and the groups (torch-pruning: the pruner made). *Step* is all of `prune_channels`
without the graph, a copy of the model included and its checks left out (torch-pruning: `step()`, in place, without
checks). *With checks* is all of `prune_channels` as it comes. Best of three, after one that imports; memory is the peak
above the model.
"""

from __future__ import annotations

import copy
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial as bind
from typing import Any

import torch
import torchvision
from isolated import Report, run_each
from prune_zoo_steps import Memory, plain_pruner
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import dependencies
from torchtrim.graph.inputs import Inputs

QUICK = ("resnet18", "mobilenet_v3_small")
MODELS = ("densenet201", "swin_t", "efficientnet_b7", "maxvit_t", "resnet50", "mobilenet_v3_large", "convnext_tiny")
ENGINES = ("torchtrim", "torch-pruning")
PRELOAD = ["torchvision", "prune_zoo_steps", "torchtrim.edits.channels", "torch_pruning"]
TIMES = 3


def main() -> int:
    made = parser(__doc__)
    made.add_argument("models", nargs="*", help="only these torchvision models (nothing is written)")
    made.add_argument("--memory", type=float, default=10.0, help="GB that one process may take (10)")
    made.add_argument("--seconds", type=float, default=300.0, help="seconds that one engine may take on a model (300)")
    options = made.parse_args()
    names = options.models or (QUICK if options.quick else MODELS)
    results: dict[str, dict[str, Any]] = {}
    limits = {"jobs": 1, "memory_gb": options.memory, "seconds": options.seconds}
    for engine in ENGINES:
        for name, found in run_each(bind(measure, engine=engine), names, preload=PRELOAD, **limits):
            results.setdefault(name, {})[engine] = found
            print(f"{engine}, {name}: {found}", file=sys.stderr, flush=True)
    if not options.models:
        stem = "prune_speed_quick" if options.quick else "prune_speed"
        write(stem, {"limits": limits, "results": results}, table(results, limits), out=options.out)
    return 0


def measure(name: str, report: Report, engine: str) -> None:
    """Time one engine on one model."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        model(x)
    for attempt in range(TIMES + 1):
        try:
            found = (_ours if engine == "torchtrim" else _plain)(model, x)
        except Exception as error:  # noqa: BLE001 (whatever is raised is the result)
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        report(f"attempt {attempt}", found)
        if "error" in found:
            return


def _ours(model: torch.nn.Module, x: torch.Tensor) -> dict[str, Any]:
    memory = Memory()
    graph, _ = _timed(lambda: dependencies(model, follow(model, Inputs.of(x))))
    whole, _ = _timed(lambda: tt.prune_channels(model, x, 0.5, check=False))
    peak = memory.told()["engine_mb"]
    checked, _ = _timed(lambda: tt.prune_channels(model, x, 0.5))
    return {"graph": graph, "step": max(whole - graph, 0.0), "both": whole, "checked": checked, "mb": peak}


def _plain(model: torch.nn.Module, x: torch.Tensor) -> dict[str, Any]:
    model = copy.deepcopy(model)
    memory = Memory()
    graph, pruner = _timed(lambda: plain_pruner(model, x, 0.5, 8))
    step, _ = _timed(pruner.step)
    return {"graph": graph, "step": step, "both": graph + step, "mb": memory.told()["engine_mb"]}


def _timed(function: Callable[[], Any]) -> tuple[float, Any]:
    began = time.process_time()
    found = function()
    return time.process_time() - began, found


def table(results: dict[str, dict[str, Any]], limits: dict[str, Any]) -> Table:
    """One row a model and engine."""
    rows, notes = [], []
    for name, by_engine in results.items():
        for engine, found in by_engine.items():
            attempts = [each for step, each in found.items() if step.startswith("attempt") and "error" not in each]
            wrong = next((each["error"] for each in found.values() if "error" in each), None)
            if wrong is not None:
                notes.append(f"- **{name}**, {engine}: {wrong}")
            if not attempts or wrong is not None:
                rows.append((name, engine, *("-",) * 4, "-"))
                continue
            best = attempts[1:] or attempts
            least = {key: min(each[key] for each in best) for key in best[0]}
            checked = f"{least['checked']:.2f}" if "checked" in least else "-"
            seconds = (f"{least[key]:.2f}" for key in ("graph", "step", "both"))
            rows.append((name, engine, *seconds, checked, str(max(each["mb"] for each in attempts))))
    notes.append(f"- limits of a process: {limits['memory_gb']:g} GB, {limits['seconds']:g} s for {TIMES + 1} runs")
    columns = ("model", "engine", "graph, s", "step, s", "both, s", "with checks, s", "peak MB")
    return Table("Pruning half of the channels", columns, tuple(rows), notes, left=2)


if __name__ == "__main__":
    sys.exit(main())
