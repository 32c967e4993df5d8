"""Save edited models, load them in new processes, and compare to the bit; time and memory beside pickled models.

    python benchmarks/round_trip.py                      # all (about 200 models, three edits each; hours)
    python benchmarks/round_trip.py --quick              # a few small ones
    python benchmarks/round_trip.py --together --jobs 2  # all, in minutes: without first loads and memory
    python benchmarks/round_trip.py timm:resnet18 torchvision:swin_t      # only these (nothing is written)

Each model is made with random weights and edited in three ways: cut in its middle and given a head; a layer removed; a
layer with a weight inserted. Each result is saved with `torchtrim.save` and with `torch.save`. New processes, which
have imported torch and nothing else, load one each, and compare every parameter and buffer, and the outputs in eval
mode and in train mode. The first load of such a process imports what the model is made of; three more show what is left
without that. Memory is what the first load adds to the process at its peak. A run that is stopped goes on where it was.
Writes `round_trip.json` and `round_trip.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial as bind
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import torch
from isolated import Report, run_each
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from round_trip_load import load_both, load_pickle, load_trim, outputs, quiet, sums
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

QUICK = (
    "torchvision:resnet18",
    "torchvision:mobilenet_v3_small",
    "timm:test_resnet",
    "timm:test_vit",
    "timm:test_convnext",
)
PRELOAD = ["torch", "psutil"]
EDITS = ("cut + head", "remove", "insert")
TRIES = 12


def main() -> int:
    from zoo_models import names

    options = parse()
    stem = "round_trip_together" if options.together else "round_trip_quick" if options.quick else "round_trip"
    wanted = options.models or (list(QUICK) if options.quick else names())
    partial = options.out / f"{stem}.partial"
    options.out.mkdir(parents=True, exist_ok=True)
    done = {} if options.models else _read(partial)
    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeElapsedColumn())
    left = [] if options.table else [name for name in wanted if name not in done]
    left.sort(key=lambda name: not name.startswith("timm:"))  # those are the small ones
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress, partial.open("a") as file:
        task = progress.add_task("models", total=len(left))
        function = together if options.together else one
        pool = ThreadPoolExecutor(options.jobs)
        waiting = {pool.submit(function, name, options.memory, options.seconds): name for name in left}
        for finished in as_completed(waiting):
            name = waiting[finished]
            done[name] = finished.result()
            if not options.models:
                file.write(json.dumps({"model": name, **done[name]}) + "\n")
                file.flush()
            for edit, error in errors(done[name]).items():
                progress.console.print(f"{name}: {edit}: {error}", markup=False, highlight=False)
            progress.advance(task)
    results = {name: done[name] for name in wanted if name in done}
    tables = (totals(results), details(results))
    if not options.models:
        write(stem, {"results": results}, *tables, out=options.out, show=False)
    if options.models or len(results) == len(wanted):
        partial.unlink()
    print(totals(results).text())
    return 1 if any(errors(found) for found in results.values()) else 0


def parse() -> Any:
    made = parser(__doc__)
    made.add_argument("models", nargs="*", help="only these, such as timm:resnet18 or detection:ssd300_vgg16")
    made.add_argument("--memory", type=float, default=10.0, help="GB that one process may take (10)")
    made.add_argument("--seconds", type=float, default=600.0, help="seconds that one process may take (600)")
    made.add_argument("--together", action="store_true", help="all files of a model in one new process: repeats alone")
    made.add_argument("--jobs", type=int, default=1, help="how many models at once (1)")
    made.add_argument("--table", action="store_true", help="write what was found so far, and run nothing")
    return made.parse_args()


def one(name: str, memory_gb: float, seconds: float) -> dict[str, Any]:
    """Every edit of one model: made in one process, loaded in one new process for each file."""

    def alone(function: Callable[[str, Report], None]) -> dict[str, Any]:
        limits = {"jobs": 1, "memory_gb": memory_gb, "seconds": seconds}
        ((_, found),) = run_each(function, [name], preload=PRELOAD, **limits)
        return found

    with tempfile.TemporaryDirectory() as folder:
        found = alone(bind(make, folder=Path(folder)))
        for edit, made in found.items():
            if "error" in made:
                continue
            for loader in (load_trim, load_pickle):
                reported = alone(bind(loader, stem=Path(folder) / edit))
                made |= reported.get("loaded", reported.get("ended", {"error": "nothing was reported"}))
                if "error" in made:
                    break
    return found


def together(name: str, memory_gb: float, seconds: float) -> dict[str, Any]:
    """Every edit of one model: made in one process, all loaded in another."""

    def alone(function: Callable[[str, Report], None]) -> dict[str, Any]:
        ((_, found),) = run_each(function, [name], preload=PRELOAD, jobs=1, memory_gb=memory_gb, seconds=seconds)
        return found

    with tempfile.TemporaryDirectory() as folder:
        found = alone(bind(make, folder=Path(folder)))
        edits = [edit for edit, made in found.items() if edit in EDITS and "error" not in made]
        loaded = alone(bind(load_both, folder=Path(folder), edits=edits))
        for edit in edits:
            found[edit] |= loaded.get(edit, {"error": str(loaded.get("ended", "nothing was reported"))})
    return found


def make(name: str, report: Report, folder: Path) -> None:
    """Edit a model in each way, save it in both forms, and write down what it computes."""
    from zoo_models import build  # not above: the processes that load import this file too

    quiet()
    model, x = build(name)
    for edit, function in zip(EDITS, (cut_and_head, remove_one, insert_one), strict=True):
        if edit == "cut + head" and name.startswith("detection:"):
            function = cut_only
        began = time.perf_counter()
        try:
            net, what = function(model, x)
            seconds = time.perf_counter() - began
            began = time.perf_counter()
            stem = folder / edit
            factory = False if name.startswith("detection:") else name
            tt.save(net, stem.with_suffix(".trim"), factory=factory)
            saved = time.perf_counter() - began
            torch.save(net, stem.with_suffix(".pt"))
            torch.save({"x": x, "outputs": outputs(net, x), "sums": sums(net)}, stem.with_suffix(".expected"))
            sizes = {kind: stem.with_suffix(f".{kind}").stat().st_size for kind in ("trim", "pt")}
            report(edit, {"edit": what, "edit_s": seconds, "save_s": saved, "bytes": sizes})
            del net  # before the next is made
        except Exception as error:  # noqa: BLE001 (whatever is raised is the result)
            report(edit, {"error": f"{type(error).__name__}: {error}"[:600]})


def cut_and_head(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, str]:
    """A head behind a cut at half of the layers, or behind the next place where one can be."""
    return _first(places(model, x), lambda at: tt.attach_head(_cut(model, x, at), x, num_classes=7, check=False))


def cut_only(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, str]:
    return _first(places(model, x), lambda at: _cut(model, x, at))


def remove_one(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, str]:
    return _first(places(model, x), lambda at: tt.remove(model, x, [at], check=False))


def insert_one(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, str]:
    return _first(places(model, x), lambda at: tt.insert(model, x, nn.PReLU(), after=at, check=False))


def _cut(model: nn.Module, x: torch.Tensor, at: str) -> nn.Module:
    return tt.cut(model, x, after=at, check=False)


def places(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The modules from the middle on that give one float tensor in both modes."""
    graph = tt.trace(model, x, check=False)  # zoo.py checks what it reads; here that would be nine tenths of the time
    able = [node for node in graph if node.op == "module" and node.modes == "both" and node.users]
    able = [n for n in able if isinstance(n.output_shape, tuple) and str(n.output_dtype).startswith("float")]
    middle = len(able) // 2
    return [node.address for node in (*able[middle:], *able[:middle])]


def _first(able: list[str], edit: Callable[[str], nn.Module]) -> tuple[nn.Module, str]:
    """The result of the first place where the edit can be done: near the middle, else at places all over the model."""
    refused = []
    tried = list(dict.fromkeys((*able[: TRIES // 2], *able[TRIES // 2 :: max(1, len(able) // TRIES)])))
    for address in tried:
        try:
            return edit(address), address
        except tt.TorchTrimError as error:
            refused.append(f"{address}: {error}")
    raise RuntimeError(f"none of {len(tried)} places takes it: {refused[:2]}")


def errors(found: dict[str, Any]) -> dict[str, str]:
    """What went wrong, by edit."""
    return {edit: made["error"] for edit, made in found.items() if "error" in made}


def totals(results: dict[str, Any]) -> Table:
    """For each edit: how many came back to the bit, and time and memory beside pickle's."""
    rows = []
    for edit in EDITS:
        tried = [found[edit] for found in results.values() if edit in found]
        right = [made for made in tried if "error" not in made]
        if not right:
            rows.append((edit, str(len(tried)), "0", *("-",) * 7))
            continue
        alone = [made for made in right if "pt_first_s" in made]
        first = [made["trim_first_s"] / made["pt_first_s"] for made in alone]
        again = [made["trim_s"] / made["pt_s"] for made in right]
        rows.append(
            (
                edit,
                str(len(tried)),
                str(len(right)),
                _median([made["trim_first_s"] for made in alone], 2),
                _median([made["pt_first_s"] for made in alone], 2),
                f"{geometric_mean(first):.2f}" if first else "-",
                " / ".join(_median([made[f"{kind}_s"] * 1e3 for made in right], 0) for kind in ("trim", "pt")),
                f"{geometric_mean(again):.2f}",
                " / ".join(_median([made[f"{kind}_peak_mb"] for made in alone], 0) for kind in ("trim", "pt")),
                f"{median(made['save_s'] for made in right):.2f}",
            )
        )
    columns = (
        "edit", "models", "equal to the bit", "first load, s", "first torch.load, s", "ratio",
        "again, ms, ours / torch.load", "ratio again", "peak MB, ours / torch.load", "save, s",
    )  # fmt: skip
    notes = [
        "- first load: in a new process, with the imports that it needs (torch's are made); again: best of three more",
        "- medians over the models; ratios are geometric means",
    ]
    return Table("Round trips", columns, tuple(rows), notes)


def _median(values: list[float], digits: int) -> str:
    return f"{median(values):.{digits}f}" if values else "-"


def details(results: dict[str, Any]) -> Table:
    """One row a model and edit."""
    rows, notes = [], []
    for name, found in results.items():
        notes += [f"- **{name}**, {edit}: {error}" for edit, error in errors(found).items()]
        for edit, made in found.items():
            if "error" in made:
                rows.append((name, edit, "-", "**fails**", "-", "-", "-"))
                continue
            rows.append(
                (
                    name,
                    f"{edit} at {made['edit']}",
                    f"{made['bytes']['trim'] / 1e6:.1f}",
                    *(f"{made[key] * 1e3:.0f}" for key in ("trim_s", "pt_s")),
                    *(f"{made[key]:.0f}" if key in made else "-" for key in ("trim_peak_mb", "pt_peak_mb")),
                )
            )
    columns = ("model", "edit", "MB", "load again, ms", "torch.load, ms", "peak MB", "torch.load, peak MB")
    return Table("Each model", columns, tuple(rows), notes)


def _read(partial: Path) -> dict[str, Any]:
    if not partial.is_file():
        return {}
    lines = [json.loads(line) for line in partial.read_text("utf-8").splitlines()]
    return {line.pop("model"): line for line in lines}


if __name__ == "__main__":
    sys.exit(main())
