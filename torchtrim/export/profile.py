"""Where a file's time goes: ONNX Runtime's own profile of each node, and the graph that it really runs."""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray

from torchtrim.errors import ExportError, MissingDependency

_SMALL_WEIGHT = 1024  # bytes; smaller ones stay in the graph, where they can be read
_WARM, _LEAST, _MOST = 2, 3, 200  # runs that do not count, and that do


@dataclass(frozen=True)
class NodeTime:
    """What one node of the optimised graph takes.

    Attributes:
        name: The node's name.
        op: Its operator, after ONNX Runtime's fusions.
        provider: The provider it runs on.
        ms: Milliseconds a run, by the call in the middle.
        share: The share of the time of all nodes.
        calls: How often it is called in a run.
        shapes: The shapes of its inputs; weights that ONNX Runtime packed beforehand are not among them.
    """

    name: str
    op: str
    provider: str
    ms: float
    share: float
    calls: float
    shapes: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Profile:
    """The nodes of a file with their times.

    Attributes:
        graph: The graph after ONNX Runtime's optimisations.
        nodes: The times, the largest first.
        run_ms: Milliseconds of a whole run, in the middle; the profiler's own work is in it.
        runs: How many runs were measured.
        providers: The providers of the session, best first.
    """

    graph: onnx.GraphProto
    nodes: tuple[NodeTime, ...]
    run_ms: float
    runs: int
    providers: tuple[str, ...]


def profile_onnx(
    path: Path,
    feed: Mapping[str, NDArray[Any]],
    *,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    seconds: float = 1.0,
) -> Profile:
    """Run a file under ONNX Runtime's profiler.

    What the profiler writes goes to a temporary folder, which is deleted.

    Args:
        path: The file.
        feed: Its inputs.
        threads: Threads for one operator; ONNX Runtime's default where it is None.
        providers: Execution providers, best first; the CPU's by default.
        seconds: About how long to run it, at least three times.

    Raises:
        ExportError: ONNX Runtime cannot open or run the file.
        MissingDependency: ONNX Runtime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("ONNX Runtime is needed to run the file", hint="pip install onnxruntime") from error
    with tempfile.TemporaryDirectory(prefix="torchtrim.") as folder:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # it warns that an optimised graph is for this machine only, as it is meant
        options.enable_profiling = True
        options.profile_file_prefix = f"{folder}/profile"
        options.optimized_model_filepath = f"{folder}/optimised.onnx"
        # So that the graph stays small, and one of more than 2 GB can be written.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_min_size_in_bytes", str(_SMALL_WEIGHT)
        )
        if threads is not None:
            options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        wanted = list(providers or ["CPUExecutionProvider"])
        try:
            session = onnxruntime.InferenceSession(os.fspath(path), options, providers=wanted)
            for _ in range(_WARM):
                session.run(None, dict(feed))
            runs, start = 0, time.perf_counter()
            while runs < _LEAST or (runs < _MOST and time.perf_counter() - start < seconds):
                session.run(None, dict(feed))
                runs += 1
            written = Path(session.end_profiling())
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ExportError(f"ONNX Runtime cannot profile the file: {error}", path=path) from error
        graph = onnx.load(f"{folder}/optimised.onnx", load_external_data=False).graph
        events = json.loads(written.read_text(encoding="utf-8"))
        names = tuple(str(name) for name in session.get_providers())
    whole = [event for event in events if event.get("cat") == "Session" and event["name"] == "model_run"][_WARM:]
    begin = min((float(event["ts"]) for event in whole), default=0.0)
    middle = statistics.median([float(event["dur"]) for event in whole] or [0.0])
    _name(graph, events)
    nodes = _nodes(graph, [event for event in events if event.get("cat") == "Node" and event["ts"] >= begin], runs)
    return Profile(graph, nodes, middle / 1000, runs, names)


def _name(graph: onnx.GraphProto, events: Sequence[Mapping[str, Any]]) -> None:
    """Give nodes without a name that of the profile: the operator and a number, in the order in which they run."""
    named = {node.name for node in graph.node}
    told: dict[str, dict[str, None]] = {}
    for event in sorted((event for event in events if event.get("cat") == "Node"), key=lambda event: event["ts"]):
        name, op = str(event["name"]).removesuffix("_kernel_time"), str(event.get("args", {}).get("op_name", ""))
        if name not in named and name.rpartition("_")[0] == op:
            told.setdefault(op, {})[name] = None
    for op, names in told.items():
        bare = [node for node in graph.node if node.op_type == op and not node.name]
        if len(bare) == len(names):  # those inside an If or a Loop would be among them
            for node, name in zip(bare, names, strict=True):
                node.name = name


def _nodes(graph: onnx.GraphProto, events: Sequence[Mapping[str, Any]], runs: int) -> tuple[NodeTime, ...]:
    # The nodes inside an If or a Loop are in the time of that node already.
    outer = {node.name for node in graph.node}
    spent: dict[str, list[float]] = {}
    about: dict[str, Mapping[str, Any]] = {}
    for event in events:
        name = str(event["name"])
        if not name.endswith("_kernel_time"):
            continue
        name = name.removesuffix("_kernel_time")
        if name in outer:
            spent.setdefault(name, []).append(float(event["dur"]) / 1000)
            about[name] = event.get("args", {})
    # A run in the middle: on a busy machine a mean is that of the interruptions.
    usual = {name: statistics.median(durations) * len(durations) / runs for name, durations in spent.items()}
    total = sum(usual.values()) or 1.0
    found = [
        NodeTime(
            name=name,
            op=str(about[name].get("op_name", "")),
            provider=str(about[name].get("provider", "")),
            ms=usual[name],
            share=usual[name] / total,
            calls=len(durations) / runs,
            shapes=_shapes(about[name].get("input_type_shape", [])),
        )
        for name, durations in spent.items()
    ]
    return tuple(sorted(found, key=lambda node: -node.ms))


def _shapes(described: Sequence[Mapping[str, Sequence[int]]]) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(int(size) for size in shape) for entry in described for shape in entry.values())
