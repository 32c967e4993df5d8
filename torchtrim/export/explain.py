"""Why an ONNX file is not faster: where its time goes, what keeps it there, and what to try."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from torchtrim.bench.figure import figure, written
from torchtrim.bench.machine import Machine, machine
from torchtrim.bench.session import OnnxSession
from torchtrim.bench.table import Table
from torchtrim.errors import ExportError, InputError
from torchtrim.export.findings import Finding, find
from torchtrim.export.profile import NodeTime, profile_onnx
from torchtrim.export.runs import Data
from torchtrim.export.scheme import scheme_of
from torchtrim.export.valid import check_file
from torchtrim.graph.inputs import Inputs

_SHOWN = 12


@dataclass(frozen=True)
class OperatorTime:
    """What all nodes of one operator take.

    Attributes:
        op: The operator, after ONNX Runtime's fusions.
        provider: The provider that they run on.
        calls: How often it is called in a run.
        ms: Milliseconds a run.
        share: The share of the time of all nodes.
    """

    op: str
    provider: str
    calls: float
    ms: float
    share: float


@dataclass(frozen=True)
class Explanation:
    """Where a file's time goes.

    Attributes:
        path: The file.
        scheme: What it computes in; see `scheme_of`.
        providers: The execution providers, best first.
        threads: Threads for one operator; None for ONNX Runtime's default.
        inputs: What it was run on.
        runs: How many runs were measured.
        run_ms: Milliseconds of a run in the middle, with the profiler's own work.
        nodes_ms: Milliseconds that all nodes take together, each by its call in the middle.
        operators: The operators, the largest first.
        nodes: The nodes, the largest first.
        findings: What costs time and need not, the largest first.
        machine: What it was run on.
        notes: What else there is to know.
    """

    path: Path
    scheme: str
    providers: tuple[str, ...]
    threads: int | None
    inputs: str
    runs: int
    run_ms: float
    nodes_ms: float
    operators: tuple[OperatorTime, ...]
    nodes: tuple[NodeTime, ...]
    findings: tuple[Finding, ...]
    machine: Machine
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            **asdict(self),
            "path": str(self.path),
            "providers": list(self.providers),
            "operators": [asdict(entry) for entry in self.operators],
            "nodes": [{**asdict(node), "shapes": [list(shape) for shape in node.shapes]} for node in self.nodes],
            "findings": [{**asdict(entry), "nodes": list(entry.nodes)} for entry in self.findings],
            "machine": self.machine.to_dict(),
            "notes": list(self.notes),
        }

    def tables(self, most: int = _SHOWN) -> tuple[Table, ...]:
        """The operators, the nodes that take most, and the findings."""
        threads = (
            "ONNX Runtime's threads" if self.threads is None else f"{self.threads} thread{'s' * (self.threads > 1)}"
        )
        notes = [
            f"{self.scheme}; {self.providers[0]}; {threads}; {self.inputs}",
            f"{self.run_ms:.2f} ms a run under the profiler, {self.nodes_ms:.2f} ms of it in nodes; {self.runs} runs",
            *self.notes,
        ]
        operators = tuple(
            (
                entry.op,
                entry.provider.removesuffix("ExecutionProvider"),
                f"{entry.calls:g}",
                *_time(entry.ms, entry.share),
            )
            for entry in self.operators[:most]
        )
        nodes = tuple(
            (node.name, node.op, " ".join("x".join(map(str, shape)) for shape in node.shapes if shape) or "-",
             *_time(node.ms, node.share))
            for node in self.nodes[:most]
        )  # fmt: skip
        found = tuple(
            (entry.kind, _some(entry.nodes), entry.what, entry.hint, *_time(entry.ms, entry.share))
            for entry in self.findings[:most]
        )
        more = len(self.findings) - len(found)
        rest = [f"and {more} smaller finding{'s' * (more > 1)}"] if more > 0 else []
        if not found:
            rest = ["nothing that the rules know of"]
        columns = ("kind", "nodes", "what is so", "what to try", "ms", "share")
        return (
            Table(
                f"{self.path.name}, by operator", ("operator", "provider", "calls", "ms", "share"), operators, notes, 2
            ),
            Table("the nodes that take most", ("node", "operator", "inputs", "ms", "share"), nodes, (), 3),
            Table("what keeps it from being faster", columns, found, rest, 4),
        )

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the time of each operator as bars, and write the picture; its ending says in which form.

        Raises:
            MissingDependency: matplotlib is not installed.
            InputError: It cannot be written there, or in this form.
        """
        shown = self.operators[:_SHOWN][::-1]
        drawn = figure(8, 1.2 + 0.32 * len(shown))
        axis = drawn.add_subplot()
        bars = axis.barh([entry.op for entry in shown], [entry.ms for entry in shown], color="#4477aa")
        axis.bar_label(bars, [f"{entry.share:.1%}" for entry in shown], padding=3)
        axis.set_xlabel("milliseconds a run")
        axis.set_title(f"{self.path.name}: {self.nodes_ms:.2f} ms in nodes", loc="left")
        return written(drawn, path)


def explain_onnx(
    path: str | os.PathLike[str],
    data: Data | None = None,
    *,
    threads: int | None = None,
    providers: Sequence[str] | None = None,
    batch: int = 1,
    seconds: float = 1.0,
) -> Explanation:
    """Run an ONNX file under ONNX Runtime's profiler, look at the graph that it really runs, and say what costs time.

    What is found: batch norms and activations that were not fused, GELU, layer norm and attention in loose pieces,
    quantize and dequantize nodes that did not melt into their neighbours, with the floats between them, int8 weights
    that are unpacked in every run, nodes on another provider than the first, convolutions in dynamic int8, widths that
    leave many lanes of the processor's vectors empty, casts and transposes over 5 % of the time, products that are too
    small. The time of a finding is that of its nodes now: no more than that can be gained.

    Args:
        path: The file.
        data: What to run it on: an example, or batches, of which the first is taken. Noise of the file's own shapes
            where it is left out.
        threads: Threads for one operator; ONNX Runtime's default where it is None.
        providers: Execution providers, best first; the CPU's by default.
        batch: Rows of the noise.
        seconds: About how long to run it.

    Raises:
        ExportError: No such file, a broken one, or one that ONNX Runtime cannot run.
        InputError: Inputs that the file does not take, or that are needed and missing; a number that is not positive.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from torchtrim.export.onnx import export_onnx
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     net = nn.Sequential(nn.Conv2d(3, 9, 3), nn.SiLU(), nn.Flatten(), nn.Linear(9 * 36, 10))
        ...     file = export_onnx(net, torch.zeros(1, 3, 8, 8), f"{folder}/net.onnx", benchmark=False).path
        ...     why = explain_onnx(file, threads=1, seconds=0.05)
        >>> {"activation", "width"} <= {finding.kind for finding in why.findings}
        True
    """
    for name, number in (("threads", threads), ("batch", batch), ("seconds", seconds)):
        if number is not None and not number > 0:
            raise InputError(f"{name} must be positive", found=number)
    place = Path(path)
    if not place.is_file():
        raise ExportError("there is no such ONNX file", path=path, hint="export_onnx writes one")
    source = check_file(place, rules=False)
    session = OnnxSession(place, providers=providers, threads=threads)
    inputs = session.random_inputs(batch) if data is None else _first(data, session)
    feed = session.feed(inputs, cast=True)
    profile = profile_onnx(place, feed, threads=threads, providers=providers, seconds=seconds)
    here = machine()
    notes = []
    if profile.providers and profile.providers[0] != "CPUExecutionProvider":
        notes.append(f"the times of {profile.providers[0]}'s nodes are those of starting them, where it does not wait")
    return Explanation(
        path=place,
        scheme=scheme_of(place),
        providers=profile.providers,
        threads=threads,
        inputs=inputs.describe(),
        runs=profile.runs,
        run_ms=profile.run_ms,
        nodes_ms=sum(node.ms for node in profile.nodes),
        operators=_by_operator(profile.nodes),
        nodes=profile.nodes,
        findings=find(profile, source, here.instructions),
        machine=here,
        notes=tuple(notes),
    )


def _first(data: Data, session: OnnxSession) -> Inputs:
    """The inputs in an example, or in the first of several batches, without labels."""
    batch: Any = data
    if not isinstance(data, (torch.Tensor, Mapping, tuple, Inputs)):
        if not isinstance(data, Iterable):
            raise InputError("data is an iterable of batches, or one example", found=type(data).__name__)
        batch = next(iter(data), None)
        if batch is None:
            raise InputError("there is no data to run on", found="no batches")
    names = session.input_names
    if isinstance(batch, Mapping) and set(names) <= set(batch):
        batch = {name: batch[name] for name in names}
    if isinstance(batch, (tuple, list)) and len(batch) > len(names):
        batch = tuple(batch[: len(names)])
    return Inputs.of(batch)


def _by_operator(nodes: Sequence[NodeTime]) -> tuple[OperatorTime, ...]:
    kinds = dict.fromkeys((node.op, node.provider) for node in nodes)
    found = []
    for op, provider in kinds:
        own = [node for node in nodes if (node.op, node.provider) == (op, provider)]
        calls, ms, share = (sum(values) for values in zip(*((n.calls, n.ms, n.share) for n in own), strict=True))
        found.append(OperatorTime(op, provider, calls, ms, share))
    return tuple(sorted(found, key=lambda entry: -entry.ms))


def _time(ms: float, share: float) -> tuple[str, str]:
    return f"{ms:.3f}", f"{share:.1%}"


def _some(nodes: Sequence[str]) -> str:
    more = len(nodes) - 1
    return nodes[0] + (f" and {more} more" if more else "")
