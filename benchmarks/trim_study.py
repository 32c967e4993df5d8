"""A search that is killed twice and goes on beside one that was left alone; and two processes on one study.

    python benchmarks/trim_study.py        # some minutes

A timm network with random weights and random pictures, to 0.6 of its MACs. A process is killed while it scores a plan,
and the one that goes on is killed again.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from written import parser, write

from torchtrim.bench.table import Table

TRIALS = 7


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--worker", nargs=3, help="what this script calls itself with")
    options = made.parse_args()
    if options.worker:
        return work(*options.worker)
    with tempfile.TemporaryDirectory() as held:
        folder = Path(held)
        whole = finished(folder / "whole")
        for die_at in (4, 2):  # the first two evaluations of a new study are of the untouched model
            code = start(folder / "killed", str(die_at)).wait()
            print(f"killed at its evaluation {die_at}: exit code {code}", flush=True)
        killed = finished(folder / "killed")
        both = [start(folder / "shared", "-1", f"{number}.json") for number in range(2)]
        for each in both:
            each.wait()
        shared = [json.loads((folder / "shared" / f"{number}.json").read_text()) for number in range(2)]
    plans = [json.dumps(each["plan"], sort_keys=True) for each in shared[0]["candidates"]]
    rows = (
        ("left alone", str(len(whole["candidates"])), f"{whole['plan']}", f"{whole['score']:.6f}"),
        ("killed twice", str(len(killed["candidates"])), f"{killed['plan']}", f"{killed['score']:.6f}"),
        *((f"process {n + 1} of two", str(len(s["candidates"])), f"{s['plan']}", f"{s['score']:.6f}")
          for n, s in enumerate(shared)),
    )  # fmt: skip
    equal = told(whole) == told(killed)
    notes = [
        f"- killed and left alone tried the same plans with the same figures: {'yes' if equal else 'NO'}",
        f"- plans that two processes tried twice: {len(plans) - len(set(plans))} of {len(plans)}",
    ]
    write(
        "trim_study", {"equal": equal, "twice": len(plans) - len(set(plans))},
        Table("one study", ("run", "plans", "chosen", "score"), rows, notes), out=options.out,
    )  # fmt: skip
    return 0 if equal and len(plans) == len(set(plans)) else 1


def told(result: dict[str, Any]) -> Any:
    names = ("plan", "proxy", "score", "macs", "params", "excess", "why")
    return [{name: each[name] for name in names} for each in result["candidates"]], result["plan"], result["score"]


def start(folder: Path, die_at: str, name: str = "result.json") -> subprocess.Popen[bytes]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen([sys.executable, __file__, "--worker", str(folder), die_at, name], env=os.environ)


def finished(folder: Path) -> dict[str, Any]:
    if start(folder, "-1").wait():
        raise SystemExit("a run failed")
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def work(folder: str, die_at: str, name: str) -> int:
    import timm
    import torch

    import torchtrim as tt

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    data = [torch.randn(32, 3, 64, 64) for _ in range(3)]
    with torch.no_grad():
        answers = [model(x).argmax(1) for x in data]

    calls: list[None] = []

    def evaluate(net: Any) -> float:
        calls.append(None)
        if len(calls) == int(die_at):
            os.kill(os.getpid(), signal.SIGKILL)
        same = sum(int((net(x).argmax(1) == y).sum()) for x, y in zip(data, answers, strict=True))
        return same / 96

    result = tt.trim(
        model,
        data,
        evaluate,
        data[0][:1],
        budget=tt.Budget(macs=0.6),
        trials=TRIALS,
        folder=folder,
        seed=3,
        pruning=["magnitude", "magnitude:global", "isomorphic", "reconstruction"],
    )
    (Path(folder) / name).write_text(json.dumps(result.to_dict()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
