"""Which models can be exported, are equal to PyTorch at several batch sizes, and run in static int8?

    python benchmarks/export_zoo.py              # torchvision's classifiers, the smallest of each timm family; hours
    python benchmarks/export_zoo.py --quick      # a dozen small ones
    python benchmarks/export_zoo.py timm:resnet18 torchvision:swin_t      # only these (nothing is written)

Each model is exported in float, verified (`verify_onnx`: batch 1, 3 and the example's), and quantized to static int8 on
random pictures, in a process of its own, limited in memory and time; a run that is stopped goes on where it was. int8
files that lose too much are refused by the gate, which is what it is for: they count as run.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from isolated import Report, run_each
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table
from torchtrim.errors import ExportMismatch

QUICK = tuple(
    f"timm:{name}"
    for name in ("test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "ghostnet_050")
)
PRELOAD = [
    "timm",
    "torchvision",
    "onnxruntime",
    "onnxscript",
    "torchtrim.export.onnx",
]  # a quarter of a minute's imports


def main() -> int:
    made = parser(__doc__)
    made.add_argument("models", nargs="*", help="only these")
    made.add_argument("--memory", type=float, default=12, help="GB that one process may take (12)")
    made.add_argument("--seconds", type=float, default=900, help="seconds that one model may take (900)")
    made.add_argument("--jobs", type=int, default=1)
    made.add_argument("--table", action="store_true", help="write what was found so far, and run nothing")
    options = made.parse_args()
    stem = "export_zoo_quick" if options.quick else "export_zoo"
    wanted = options.models or (list(QUICK) if options.quick else zoo())
    partial = options.out / f"{stem}.partial"
    options.out.mkdir(parents=True, exist_ok=True)
    done = {} if options.models else _read(partial)
    left = [] if options.table else [name for name in wanted if name not in done]
    left.sort(key=lambda name: not name.startswith("timm:"))  # those are the small ones
    limits = {"jobs": options.jobs, "memory_gb": options.memory, "seconds": options.seconds}
    with partial.open("a", encoding="utf-8") as file:
        for name, found in run_each(one, left, preload=PRELOAD, **limits):
            done[name] = found
            print(f"{name}: {told(found)}", file=sys.stderr, flush=True)
            if not options.models:
                file.write(json.dumps({"model": name, **found}) + "\n")
                file.flush()
    if not options.models:
        results = {name: done[name] for name in wanted if name in done}
        write(stem, {"models": results}, *tables(results, len(wanted)), out=options.out)
    return 0


def zoo() -> list[str]:
    import torchvision
    from zoo_models import timm_families

    found = [f"torchvision:{name}" for name in torchvision.models.list_models(module=torchvision.models)]
    return found + [f"timm:{name}" for name in timm_families().values()]


def one(name: str, report: Report) -> None:
    from zoo_models import build, stir

    torch.set_num_threads(1)
    model, x = build(name)
    stir(model)
    generator = torch.Generator().manual_seed(1)
    data = [torch.randn((4, *x.shape[1:]), generator=generator) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        for scheme in (None, "static"):
            step = scheme or "float"
            began = time.perf_counter()
            try:
                made = tt.export_onnx(model, x, f"{folder}/{step}.onnx", quantize=scheme, data=data, benchmark=False)
                checked = made.verification
                found = {
                    "cosine": checked.cosine,
                    "relative": max(output.relative for output in checked.outputs),
                    "batches": list(checked.batches),
                    "nodes": made.quantized_nodes,
                    "mb": made.size_mb,
                }
            except ExportMismatch as error:
                verification = getattr(error, "verification", None)
                found = {"refused": str(error)[:300], "cosine": verification and verification.cosine}
            except Exception as error:  # noqa: BLE001 (whatever is raised is the result)
                found = {"error": f"{type(error).__name__}: {error}"[:400]}
            report(step, found | {"seconds": time.perf_counter() - began})


def told(found: dict[str, Any]) -> str:
    return "; ".join(f"{step} {outcome(each)}" for step, each in found.items())


def outcome(found: dict[str, Any]) -> str:
    if "error" in found:
        return f"fails: {found['error']}"
    if "refused" in found:
        return f"refused ({_cosine(found)})"
    return f"right ({_cosine(found)})"


def _cosine(found: dict[str, Any]) -> str:
    return "-" if found.get("cosine") is None else f"cosine {found['cosine']:.4f}"


def tables(results: dict[str, Any], wanted: int) -> list[Table]:
    rows, details, notes = [], [], []
    for zoo_name in ("torchvision", "timm"):
        own = {name: found for name, found in results.items() if name.startswith(f"{zoo_name}:")}
        for step in ("float", "static"):
            kinds = [outcome(found[step]).split()[0] for found in own.values() if step in found]
            ended = sum(step not in found for found in own.values())
            counts = (kinds.count("right"), kinds.count("refused"), kinds.count("fails:") + ended)
            rows.append((zoo_name, step, str(len(own)), *map(str, counts)))
    for name, found in results.items():
        steps = [found.get(step, found.get("ended", {"error": "nothing was reported"})) for step in ("float", "static")]
        notes += [f"- **{name}**: {each['error']}" for each in steps if "error" in each]
        details.append((name, *(outcome(each).split(":")[0] for each in steps)))
    total = [
        f"- {len(results)} of {wanted} models were run",
        "- random weights (none the same throughout a tensor), random pictures",
    ]
    return [
        Table(
            "Export over the zoo",
            ("zoo", "scheme", "models", "right", "refused by the gate", "fail"),
            tuple(rows),
            total,
        ),
        Table("Each model", ("model", "float", "static int8"), tuple(details), notes),
    ]


def _read(partial: Path) -> dict[str, Any]:
    if not partial.is_file():
        return {}
    lines = [json.loads(line) for line in partial.read_text("utf-8").splitlines()]
    return {line.pop("model"): line for line in lines}


if __name__ == "__main__":
    raise SystemExit(main())
