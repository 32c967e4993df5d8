"""Prune half of the channels of every classification model of torchvision and the smallest of each of timm's families.

    python benchmarks/prune_zoo.py                           # torchtrim: 178 models, two or three hours
    python benchmarks/prune_zoo.py --engine torch-pruning    # torch-pruning by itself, with the same settings
    python benchmarks/prune_zoo.py --quick                   # a dozen small ones
    python benchmarks/prune_zoo.py timm:resnet18 torchvision:swin_t      # only these (nothing is written)
    python benchmarks/prune_zoo.py --retry                   # again what failed the last time

A process a model, limited in memory and time; a run that is stopped goes on where it was. Weights are random (no tensor
holds one value throughout), pictures as small as the model takes. Pruned networks are exported to ONNX, and the files
compared with PyTorch. Writes `prune_zoo.json` and `prune_zoo.md`, with the other engine's last results.
"""

from __future__ import annotations

import json
import signal
import sys
from functools import partial as bind
from pathlib import Path
from statistics import median
from typing import Any

import torchvision
from isolated import run_each
from prune_zoo_steps import ENGINES, STEPS, try_all
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from written import parser, write
from zoo_models import timm_families

from torchtrim.bench.table import Table

QUICK = (
    "torchvision:resnet18", "torchvision:mobilenet_v3_small", "torchvision:squeezenet1_1",
    "torchvision:shufflenet_v2_x0_5",
    "timm:test_resnet", "timm:test_vit", "timm:test_efficientnet", "timm:test_convnext", "timm:test_byobnet",
    "timm:ghostnet_050", "timm:crossvit_tiny_240", "timm:levit_128s",
)  # fmt: skip
PRELOAD = ["timm", "torchvision", "prune_zoo_steps", "torchtrim.edits.channels"]
TARGET = 0.45  # MACs, as a share of the original's
OUTPUT = "the model's output has its width"


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # stop the processes too
    stem = "prune_zoo_quick" if options.quick else "prune_zoo"
    wanted = options.models or (list(QUICK) if options.quick else names())
    options.out.mkdir(parents=True, exist_ok=True)
    whole, partial = options.out / f"{stem}.json", options.out / f"{stem}.{options.engine}.partial"
    stored = json.loads(whole.read_text("utf-8"))["results"] if whole.is_file() else {}
    kept = {engine: found for engine, found in stored.items() if engine in ENGINES}
    if options.retry:
        _forget_failures(kept.get(options.engine, {}), partial, options.engine)
    done = {} if options.models else _read(partial)
    left = [] if options.table else [name for name in wanted if name not in done]
    limits = {"jobs": options.jobs, "memory_gb": options.memory, "seconds": options.seconds}
    settings = {"engine": options.engine, "ratio": options.ratio, "round_to": options.round_to}
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("models", total=len(left))
        for name, found in run_each(bind(try_all, **settings), left, preload=PRELOAD, **limits):
            done[name] = found
            if not options.models:
                with partial.open("a") as file:
                    file.write(json.dumps({"model": name, **found}) + "\n")
            for step, error in errors(found).items():
                progress.console.print(f"{name}: {step}: {error}", markup=False, highlight=False, soft_wrap=True)
            if options.models:
                progress.console.print(f"{name}: {_short(found)}", markup=False, highlight=False, soft_wrap=True)
            progress.advance(task)
    results = {name: done[name] for name in wanted if name in done}
    missing = [name for name in wanted if name not in done]
    every = kept | {options.engine: results}
    if not options.models:
        tables = [totals(every), *(details(engine, found) for engine, found in every.items())]
        told = {engine: _without_tracebacks(found) for engine, found in every.items()}
        write(stem, {"limits": limits, "settings": settings, "results": told}, *tables, out=options.out, show=False)
        if not missing:
            partial.unlink(missing_ok=True)
    print(totals({options.engine: results}).text())
    return 1 if any(errors(found) for found in results.values()) else 0


def parse() -> Any:
    made = parser(__doc__)
    made.add_argument("models", nargs="*", help="only these (nothing is written), such as timm:resnet18")
    made.add_argument("--engine", choices=list(ENGINES), default="torchtrim", help="what prunes (torchtrim)")
    made.add_argument("--ratio", type=float, default=0.5, help="the share of channels that goes (0.5)")
    made.add_argument("--round-to", type=int, default=8, help="widths are multiples of this (8)")
    made.add_argument("--jobs", type=int, default=1, help="processes at once, of one thread each (1)")
    made.add_argument(
        "--memory", type=float, default=16.0, help="GB that one process may take, model and all that is checked (16)"
    )
    made.add_argument("--seconds", type=float, default=900.0, help="seconds that one model may take (900)")
    made.add_argument("--retry", action="store_true", help="keep what passed the last time, and run again what failed")
    made.add_argument("--table", action="store_true", help="write what was found so far, and run nothing")
    return made.parse_args()


def names() -> list[str]:
    """All of them: `torchvision:NAME` and `timm:NAME`."""
    found = [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    return [f"timm:{name}" for name in timm_families().values()] + found


def errors(found: dict[str, Any]) -> dict[str, str]:
    """What went wrong, by step; a step that was not reached is not listed."""
    return {step: reported["error"] for step, reported in found.items() if "error" in reported}


def steps_of(engine: str, name: str) -> list[str]:
    """The steps of an engine for a model: timm's own only for its models."""
    return [step for step in ENGINES[engine] if step != "timm" or name.startswith("timm:")]


def totals(every: dict[str, dict[str, Any]]) -> Table:
    """For each engine and zoo, how many models passed each step, and what it cost."""
    rows = []
    for engine, results in every.items():
        for zoo in ("torchvision", "timm"):
            models = [found for name, found in results.items() if name.startswith(f"{zoo}:")]
            if not models:
                continue
            passed = {step: sum(_passed(found, step) for found in models) for step in ENGINES[engine]}
            small = [found for found in models if _share(found) is not None and _share(found) <= TARGET]  # type: ignore[operator]
            tried = steps_of(engine, f"{zoo}:")
            right = [found for found in models if all(_passed(found, step) for step in tried)]
            both = [found for found in right if "macs" not in tried or found in small]
            took = [found["prune"]["seconds"] for found in models if "seconds" in found.get("prune", {})]
            peak = [found["prune"]["engine_mb"] for found in models if "engine_mb" in found.get("prune", {})]
            rows.append(
                (
                    f"{engine}, {zoo}",
                    str(len(models)),
                    *(str(passed[step]) if step in tried else "-" for step in STEPS[1:]),
                    str(len(small)) if "macs" in tried else "-",
                    str(len(right)),
                    str(len(both)),
                    f"{median(took):.1f} / {max(took):.1f}" if took else "-",
                    f"{median(peak):.0f} / {max(peak)}" if peak else "-",
                )
            )
    columns = (
        "engine, zoo", "models", *STEPS[1:], f"MACs <= {TARGET}", "all steps", f"all steps, MACs <= {TARGET}",
        "prune s, median / most", "prune MB, median / most",
    )  # fmt: skip
    return Table("Models that pass", columns, tuple(rows))


def details(engine: str, results: dict[str, Any]) -> Table:
    """One row a model: sizes, MACs, what was left alone, what it cost, and what failed."""
    rows = []
    notes = [
        "- s and MB of the pruning alone (with torchtrim's own checks): CPU seconds of one thread; MB is the peak of"
        " the process above what it held before, when the model was there and had run forward and backward",
        "- equal: to the original whose removed channels are zero, in double precision; `without norms` where a norm or"
        " a mean goes over channels, and both are run with norms that only scale",
        "- timm's feature extractors, which come without a classifier, were given one of ten classes",
    ]
    for name, found in results.items():
        wrong = errors(found)
        built, pruned = found.get("build", {}), found.get("prune", {})
        share = _share(found)
        rows.append(
            (
                name,
                "x".join(map(str, built.get("input", [])[1:])),
                f"{built.get('params', 0) / 1e6:.1f}",
                f"{found['macs']['params'] / 1e6:.1f}" if "params" in found.get("macs", {}) else "-",
                "-" if share is None else f"{share:.2f}",
                str(sum(reason != OUTPUT for reason in pruned.get("left_alone", {}).values())),
                str(pruned.get("seconds", "-")),
                str(pruned.get("engine_mb", "-")),
                str(found.get("equal", {}).get("verdict", "-")),
                ", ".join(f"**{step}**" for step in wrong) or "right",
            )
        )
        notes += [f"- **{name}**, {step}: {error[:300]}" for step, error in wrong.items()]
    columns = (
        "model", "input", "params (M)", "after (M)", "MACs", "left alone", "prune s", "prune MB", "equal", "outcome",
    )  # fmt: skip
    return Table(f"Each model: {engine}", columns, tuple(rows), notes)


def _short(found: dict[str, Any]) -> str:
    pruned = found.get("prune", {})
    share = _share(found)
    told = {
        "s": pruned.get("seconds"),
        "MB": pruned.get("engine_mb"),
        "MACs": None if share is None else round(share, 3),
    }
    told |= {"equal": found.get("equal", {}).get("verdict"), "left alone": pruned.get("left_alone")}
    return str(told)[:1500]


def _passed(found: dict[str, Any], step: str) -> bool:
    return step in found and "error" not in found[step]


def _share(found: dict[str, Any]) -> float | None:
    share = found.get("macs", {}).get("share")
    return None if share is None else float(share)


def _without_tracebacks(results: dict[str, Any]) -> dict[str, Any]:
    """Those hold the paths of a machine; they are in the `.partial` file while it runs."""
    return {
        name: {
            step: {key: value for key, value in told.items() if key != "traceback"} if isinstance(told, dict) else told
            for step, told in found.items()
        }
        for name, found in results.items()
    }


def _read(partial: Path) -> dict[str, Any]:
    if not partial.is_file():
        return {}
    lines = [json.loads(line) for line in partial.read_text("utf-8").splitlines()]
    return {line.pop("model"): line for line in lines}


def _forget_failures(kept: dict[str, Any], partial: Path, engine: str) -> None:
    """Start from the last run's results (and those so far) without the failures, and without those that lack a step."""
    kept = kept | _read(partial)
    good = {
        name: found
        for name, found in kept.items()
        if not errors(found) and all(step in found for step in steps_of(engine, name))
    }
    partial.write_text("".join(json.dumps({"model": name, **found}) + "\n" for name, found in good.items()), "utf-8")


if __name__ == "__main__":
    sys.exit(main())
