"""What a candidate needs besides time: memory, and how long it takes to load."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.bench.candidates import OnnxFile, is_compiled, open_file, working_copy
from torchtrim.bench.openvino_session import OPENVINO
from torchtrim.graph.inputs import Inputs

_LIMIT = 600  # seconds a candidate may take to load and run
_CALLS = 5


@dataclass(frozen=True)
class Resources:
    """Memory and load time of one candidate, in a process of its own that only loads and runs it.

    The process first imports what it runs with (PyTorch, ONNX Runtime, the code of the model's classes) and notes its
    size; the figures are what came on top, so libraries hardly count, and weights, work space and compiled code do.
    Memory of a GPU is not in them.

    Attributes:
        name: The candidate's name.
        resident_mb: Growth of the resident set after several calls, in MB (10^6 bytes): what serving it holds. None
            where the system does not tell (outside Linux), or `problem` says why.
        peak_mb: Growth up to the largest it ever was, loading included, in MB.
        load_ms: From the file to being ready, in milliseconds, with the file in the system's cache: the creation of the
            session, `torch.load` of the whole module (median of three); for `torch.compile` that and the first call, in
            which it compiles (once; faster where its cache on the disk knows the model).
        problem: Why it could not be measured; None where it was.
    """

    name: str
    resident_mb: float | None = None
    peak_mb: float | None = None
    load_ms: float | None = None
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def measured_resources(
    named: Mapping[str, nn.Module | OnnxFile | Callable[..., Any]], inputs: Inputs, threads: int
) -> tuple[Resources, ...]:
    """Memory and load time of each candidate.

    A model travels to its process in a file that pickle wrote, in a folder that only this user reads and that is gone
    afterwards. What pickle cannot write, or find again by its name, is not measured, and says so.

    Args:
        named: Models, files and callables by name.
        inputs: What to run them on.
        threads: Threads they may use.
    """
    return tuple(_measured(name, candidate, inputs, threads) for name, candidate in named.items())


def _measured(
    name: str, candidate: nn.Module | OnnxFile | Callable[..., Any], inputs: Inputs, threads: int
) -> Resources:
    with tempfile.TemporaryDirectory(prefix="torchtrim.") as place:
        folder = Path(place)
        try:
            _hand_over(name, candidate, inputs, threads, folder)
        except (pickle.PicklingError, AttributeError, TypeError, OSError, RuntimeError) as error:
            return Resources(name, problem=f"it cannot be handed to another process: {_last_line(str(error))}")
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            answer = subprocess.run(
                [sys.executable, "-m", "torchtrim.bench.resources", str(folder)],
                capture_output=True,
                text=True,
                check=False,
                timeout=_LIMIT,
                env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
            )
        except subprocess.TimeoutExpired:
            return Resources(name, problem=f"not ready in {_LIMIT} seconds")
        if answer.returncode:
            return Resources(name, problem=_last_line(answer.stderr) or f"the process ended with {answer.returncode}")
        return Resources(name, **json.loads(answer.stdout.splitlines()[-1]))


def _hand_over(
    name: str, candidate: nn.Module | OnnxFile | Callable[..., Any], inputs: Inputs, threads: int, folder: Path
) -> None:
    """Write what the other process needs."""
    order: dict[str, Any] = {"threads": threads, "kind": "callable", "imports": []}
    if isinstance(candidate, OnnxFile):
        order |= {"kind": "file", "path": str(Path(candidate.path).absolute()), "provider": candidate.runtime}
    else:
        sent = candidate
        if isinstance(candidate, nn.Module):
            order["kind"] = "compiled" if is_compiled(candidate) else "model"
            sent = working_copy(name, candidate, inputs).eval()
        torch.save(sent, folder / "candidate")
        kinds = [type(each) for each in sent.modules()] if isinstance(sent, nn.Module) else [sent]
        places = {getattr(kind, "__module__", "") or "" for kind in kinds} - {""}
        if "__main__" in places:
            raise TypeError("its code is in the script that runs, not in a module that can be imported")
        order["imports"] = sorted(places)
    torch.save(inputs, folder / "inputs")
    (folder / "order").write_text(json.dumps(order), encoding="utf-8")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _carried_out(folder: Path) -> dict[str, float | None]:
    """Load the candidate and run it, in the process made for it: the files come from the one that started it."""
    order = json.loads((folder / "order").read_text(encoding="utf-8"))
    torch.set_num_threads(order["threads"])
    inputs: Inputs = torch.load(folder / "inputs", weights_only=False)
    ready = {"file": _file_ready, "compiled": _compiled_ready}.get(order["kind"], _model_ready)
    for library in (*_LIBRARIES.get(order.get("provider", order["kind"]), ("onnxruntime",)), *order["imports"]):
        importlib.import_module(library)
    before = _status("VmRSS")
    _forget_peak()
    start = time.perf_counter()
    run = ready(folder, order, inputs)
    taken = [(time.perf_counter() - start) * 1e3]
    for _ in range(_CALLS):
        run()
    after, peak = _status("VmRSS"), _status("VmHWM")
    for _ in range(0 if order["kind"] == "compiled" else 2):
        start = time.perf_counter()
        run = ready(folder, order, inputs)
        taken.append((time.perf_counter() - start) * 1e3)
    return {
        "resident_mb": None if before is None or after is None else max(0.0, after - before),
        "peak_mb": None if before is None or peak is None else max(0.0, peak - before),
        "load_ms": statistics.median(taken),
    }


# What a candidate runs with, which is imported before its memory is looked at.
_LIBRARIES = {
    "model": (),
    "callable": (),
    "compiled": ("torch._dynamo", "torch._inductor.compile_fx"),
    OPENVINO: ("openvino",),
}


def _file_ready(folder: Path, order: dict[str, Any], inputs: Inputs) -> Callable[[], object]:
    session = open_file(OnnxFile(order["path"], order["provider"]), order["threads"])
    return session.bound(session.feed(inputs, cast=True))


def _model_ready(folder: Path, order: dict[str, Any], inputs: Inputs) -> Callable[[], object]:
    return _forward(torch.load(folder / "candidate", weights_only=False), inputs)


def _compiled_ready(folder: Path, order: dict[str, Any], inputs: Inputs) -> Callable[[], object]:
    run = _forward(torch.load(folder / "candidate", weights_only=False), inputs, torch.compile)
    run()
    return run


def _forward(
    model: Callable[..., Any], inputs: Inputs, around: Callable[[Any], Any] = lambda model: model
) -> Callable[[], object]:
    device = next(model.parameters(), torch.empty(0)).device if isinstance(model, nn.Module) else None
    moved = inputs if device is None else inputs.map(lambda tensor: tensor.to(device))
    called = around(model)

    def run() -> object:
        with torch.inference_mode():
            return moved.call(called)

    return run


def _status(field: str) -> float | None:
    """A size that the system keeps of this process, in MB; None where it is not Linux."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found) * 1024 / 1e6


def _forget_peak() -> None:
    """Let the largest size count from here; where that is not allowed, it counts from the start of the process."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


if __name__ == "__main__":
    print(json.dumps(_carried_out(Path(sys.argv[1]))))
