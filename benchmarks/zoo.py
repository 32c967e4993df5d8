"""Trace, summarise, cut and re-head every model of torchvision and one of each of timm's families, a process each.

    python benchmarks/zoo.py                      # all (about 200 models; half an hour on two cores)
    python benchmarks/zoo.py --quick              # a dozen small ones
    python benchmarks/zoo.py timm:resnet18 torchvision:swin_t
    python benchmarks/zoo.py --retry              # again what failed the last time

A run that is stopped goes on where it was. Weights are random. The values of the cut models are compared with hooks on
the original, in both modes. Writes `zoo.json` and `zoo.md`.
"""

from __future__ import annotations

import json
import signal
import sys
from functools import partial as bind
from pathlib import Path
from typing import Any

from isolated import run_each
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from written import parser, write
from zoo_models import names
from zoo_steps import STEPS, try_all

from torchtrim.bench.table import Table

QUICK = (
    "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1",
    "torchvision:shufflenet_v2_x0_5",
    "timm:test_resnet", "timm:test_vit", "timm:test_efficientnet", "timm:test_convnext", "timm:test_byobnet",
    "timm:ghostnet_050", "timm:crossvit_tiny_240", "timm:levit_128s",
)  # fmt: skip
PRELOAD = ["timm", "torchvision", "zoo_steps", "torchtrim.edits.cut", "torchtrim.edits.head", "torchtrim.graph.summary"]


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the processes too
    stem = "zoo_quick" if options.quick else "zoo"
    wanted = options.models or (list(QUICK) if options.quick else names())
    partial = options.out / f"{stem}.partial"
    if options.retry:
        _forget_failures(options.out / f"{stem}.json", partial)
    done = _read(partial)
    options.out.mkdir(parents=True, exist_ok=True)
    left = [] if options.table else [name for name in wanted if name not in done]
    limits = {"jobs": options.jobs, "memory_gb": options.memory, "seconds": options.seconds}
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, partial.open("a") as file:
        task = progress.add_task("models", total=len(left))
        for name, found in run_each(bind(try_all, upto=options.upto), left, preload=PRELOAD, **limits):
            done[name] = found
            file.write(json.dumps({"model": name, **found}) + "\n")
            file.flush()
            for step, error in errors(found).items():
                progress.console.print(f"{name}: {step}: {error}", markup=False, highlight=False)
            progress.advance(task)
    results = {name: done[name] for name in wanted if name in done}
    missing = [name for name in wanted if name not in done]
    if not options.models and options.upto == STEPS[-1]:
        tables = (totals(results), details(results, missing))
        write(stem, {"limits": limits, "results": results}, *tables, out=options.out, show=False)
        if len(results) == len(wanted):
            partial.unlink()
    print(totals(results).text())
    return 1 if any(errors(found) for found in results.values()) else 0


def parse() -> Any:
    made = parser(__doc__)
    made.add_argument(
        "models", nargs="*", help="only these (nothing is written), such as timm:resnet18 or detection:ssd300_vgg16"
    )
    made.add_argument("--jobs", type=int, default=2, help="processes at once, of one thread each (2)")
    made.add_argument("--memory", type=float, default=10.0, help="GB that one process may take (10)")
    made.add_argument("--seconds", type=float, default=900.0, help="seconds that one model may take (900)")
    made.add_argument("--upto", choices=STEPS, default=STEPS[-1], help="the last step to try (nothing is written)")
    made.add_argument(
        "--retry", action="store_true", help="keep the results of the last run, and run again what failed"
    )
    made.add_argument("--table", action="store_true", help="write what was found so far, and run nothing")
    return made.parse_args()


def errors(found: dict[str, Any]) -> dict[str, str]:
    """What went wrong, by step; a step that was not reached is not listed."""
    return {step: reported["error"] for step, reported in found.items() if "error" in reported}


def totals(results: dict[str, Any]) -> Table:
    """For each zoo, how many models passed each step."""
    zoos = sorted({name.partition(":")[0] for name in results}, reverse=True)
    rows = []
    for zoo in zoos:
        models = [found for name, found in results.items() if name.startswith(f"{zoo}:")]
        tried = [step for step in STEPS if zoo != "detection" or step != "head"]
        passed = {step: sum(_passed(found, step) for found in models) for step in tried}
        whole = sum(all(_passed(found, step) for step in tried) for found in models)
        title = "torchvision detection backbones" if zoo == "detection" else zoo
        rows.append((title, str(len(models)), *(str(passed.get(step, "-")) for step in STEPS[1:]), str(whole)))
    return Table("Models that pass", ("zoo", "models", *STEPS[1:], "all"), tuple(rows))


def _passed(found: dict[str, Any], step: str) -> bool:
    return step in found and "error" not in found[step]


def details(results: dict[str, Any], missing: list[str]) -> Table:
    """One row a model: what was read, the seconds of each step, the peak memory."""
    rows = []
    notes = ["- seconds of each step, with its checks, of one thread; peak memory of the process, imports included"]
    for name, found in results.items():
        read = found.get("trace", {})
        cells = [
            f"{found[s]['seconds']:.1f}" if _passed(found, s) else "**fails**" if s in found else "-" for s in STEPS[1:]
        ]
        size = "x".join(map(str, found.get("build", {}).get("input", [])[1:]))
        params = found.get("build", {}).get("params", 0) / 1e6
        peak = max((reported.get("peak_mb", 0) for reported in found.values()), default=0)
        closed = len(read.get("closed", {}))
        rows.append((name, size, f"{params:.1f}", str(read.get("nodes", "")), str(closed), *cells, str(peak)))
        notes += [f"- **{name}**, {step}: {error}" for step, error in errors(found).items()]
    if missing:
        notes.append(f"- not run yet ({len(missing)}): {', '.join(missing)}")
    columns = (
        "model",
        "input",
        "params (M)",
        "nodes",
        "closed modules",
        *(f"{step} (s)" for step in STEPS[1:]),
        "peak MB",
    )
    return Table("Each model", columns, tuple(rows), notes)


def _read(partial: Path) -> dict[str, Any]:
    if not partial.is_file():
        return {}
    lines = [json.loads(line) for line in partial.read_text("utf-8").splitlines()]
    return {line.pop("model"): line for line in lines}


def _forget_failures(results: Path, partial: Path) -> None:
    """Start from the last run's results (or those so far) without the failures."""
    kept = json.loads(results.read_text("utf-8"))["results"] if results.is_file() else {}
    kept |= _read(partial)
    good = {name: found for name, found in kept.items() if not errors(found)}
    partial.write_text("".join(json.dumps({"model": name, **found}) + "\n" for name, found in good.items()), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
