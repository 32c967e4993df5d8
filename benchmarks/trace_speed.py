"""Time of `tt.trace` beside torchvision's `create_feature_extractor`; memory of `tt.summary` at a billion parameters.

    python benchmarks/trace_speed.py              # efficientnet_b7, densenet201, swin_t; 9 rounds
    python benchmarks/trace_speed.py --quick      # resnet18; 3 rounds

Checks against the original are left out on both sides; both read the model in eval and in train mode. The candidates
take turns, so that a busy machine slows all of them. The memory is that of a fresh process, with the model on the meta
device. Writes `trace_speed.json` and `trace_speed.md`.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from rich.progress import track
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

FULL = ("efficientnet_b7", "densenet201", "swin_t")
QUICK = ("resnet18",)
OURS = ("trace", "trace, nodes listed")
BILLION = "vit_giant_patch14_clip_224"

MEMORY = """
import json, re, resource, sys
def peak():
    if sys.platform == "linux":  # where ru_maxrss counts what the parent process held
        return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2
found = {}
import torch, timm
found["import torch and timm"] = peak()
import torchtrim as tt
str(tt.summary(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)), torch.zeros(1, 3, 8, 8)))
found["summary of one small layer (all imports made)"] = peak()
with torch.device("meta"):
    model = timm.create_model(sys.argv[1])
    x = torch.zeros(1, 3, 224, 224)
found["model built on the meta device"] = peak()
summary = tt.summary(model, x)
text = str(summary)
found["its summary, printed"] = peak()
print(json.dumps({"params": summary.params, "rows": len(summary.rows), "peak_mb": found}))
"""


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, help="rounds (9; quick: 3)")
    options = made.parse_args()
    torch.set_num_threads(1)
    rounds = options.rounds or (3 if options.quick else 9)
    speeds = [speed(name, rounds) for name in (QUICK if options.quick else FULL)]
    memory = summary_memory(BILLION)
    stem = "trace_speed_quick" if options.quick else "trace_speed"
    write(stem, {"rounds": rounds, "speed": speeds, "memory": memory}, *tables(speeds, memory), out=options.out)
    return 0


def speed(name: str, rounds: int) -> dict[str, Any]:
    """Milliseconds of each candidate in each round."""
    model = torchvision.models.get_model(name, weights=None).eval()
    x = torch.zeros(1, 3, 224, 224)
    last = get_graph_node_names(model)[1][-1]
    candidates: dict[str, Callable[[], object]] = {
        "trace": lambda: tt.trace(model, x, check=False),
        "trace, nodes listed": lambda: tt.trace(model, x, check=False).nodes,
        "create_feature_extractor": lambda: create_feature_extractor(model, [last]),
        "get_graph_node_names": lambda: get_graph_node_names(model),
    }
    for call in candidates.values():
        call()  # imports and caches
    times: dict[str, list[float]] = {candidate: [] for candidate in candidates}
    for turn in track(range(rounds), name, disable=not sys.stderr.isatty()):
        order = list(candidates) if turn % 2 == 0 else list(candidates)[::-1]
        for candidate in order:
            began = time.perf_counter()
            candidates[candidate]()
            times[candidate].append((time.perf_counter() - began) * 1e3)
    return {"model": name, "modules": _modules(model), "ms": times}


def _modules(model: nn.Module) -> int:
    return sum(1 for _ in model.modules())


def summary_memory(name: str) -> dict[str, Any]:
    """Peak memory of a fresh process after each stage, in MiB."""
    answer = subprocess.run([sys.executable, "-c", MEMORY, name], capture_output=True, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"the summary of {name} failed:\n{answer.stderr}")
    return {"model": name, **json.loads(answer.stdout)}


def tables(speeds: list[dict[str, Any]], memory: dict[str, Any]) -> tuple[Table, Table]:
    """Medians and the median of the rounds' ratios; peak memory by stage."""
    rows = []
    for found in speeds:
        ms = found["ms"]
        medians = [f"{statistics.median(times):.0f}" for times in ms.values()]
        ratios = [
            statistics.median(a / b for a, b in zip(ms[ours], ms["create_feature_extractor"], strict=True))
            for ours in OURS
        ]
        rows.append((found["model"], str(found["modules"]), *medians, *(f"{ratio:.2f}" for ratio in ratios)))
    columns = ("model", "modules", *(f"{name} (ms)" for name in speeds[0]["ms"]), *(f"ratio, {ours}" for ours in OURS))
    notes = ["- medians; the ratio is the median of each round's, to `create_feature_extractor`: below 1 is faster"]
    stages = tuple((stage, f"{peak:.0f}") for stage, peak in memory["peak_mb"].items())
    title = f"Peak memory of `summary` on {memory['model']}: {memory['params'] / 1e9:.2f} billion parameters"
    return Table("Time to trace", columns, tuple(rows), notes), Table(
        title, ("after", "peak of the process, MiB"), stages
    )


if __name__ == "__main__":
    sys.exit(main())
