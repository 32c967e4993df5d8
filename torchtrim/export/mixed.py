"""Mixed int8: static, dynamic or float for each kind of layer, by its measured time, and for each node by its error.

No one scheme wins: static int8 suits most convolutions and costs attention its accuracy, dynamic int8 suits matrix
products and ruins the speed of convolutions, and a depthwise convolution or a small layer is often fastest in float,
which also depends on what lies between. So whole files are timed, not nodes: from all convolutions static and all
products dynamic, one kind after the other is changed, those that take the most time first, and a change stays where the
file gets faster. Then, while the outputs are too far from the float file's, the nodes at which the error jumps most
become float, twice as many each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from torchtrim.bench.int8_format import Int8Format, exact_formats
from torchtrim.bench.latency import benchmark
from torchtrim.errors import ExportError
from torchtrim.export.calibration_data import Feed
from torchtrim.export.judge import Agreement, Judge
from torchtrim.export.kinds import Kind, kinds_of
from torchtrim.export.layers import compare_layers
from torchtrim.export.profile import profile_onnx
from torchtrim.export.workbench import Built, Workbench
from torchtrim.graph.inputs import Inputs

STATIC, DYNAMIC, FLOAT = "static", "dynamic", "float"
_SMALL = 0.02  # of the float file's time: kinds below it are not worth a measurement
_METHODS = ("percentile", "mse")


@dataclass(frozen=True)
class Mixture:
    """What `mix` chose.

    Attributes:
        built: The file.
        agreement: How far it is from the float file.
        kinds: The choice for each kind of layer, in words.
        kept_float: The nodes that stay float for the sake of the outputs.
        method: How the ranges were chosen.
        notes: What was chosen, in words.
    """

    built: Built
    agreement: Agreement
    kinds: dict[str, str]
    kept_float: tuple[str, ...]
    method: str

    @property
    def notes(self) -> tuple[str, ...]:
        """What was chosen, in words."""
        chosen = "; ".join(f"{kind} {choice}" for kind, choice in self.kinds.items())
        notes = [f"mixed: {chosen}; ranges by {self.method}", *self.built.notes]
        if self.kept_float:
            names = ", ".join(self.kept_float[:5]) + (", ..." if len(self.kept_float) > 5 else "")
            notes.append(f"mixed: {len(self.kept_float)} nodes stay float for accuracy: {names}")
        return tuple(notes)


def mix(bench: Workbench, judge: Judge, feed: Feed, *, threads: int | None = None, seconds: float = 0.3) -> Mixture:
    """Choose static, dynamic or float for every layer of a file, and write it.

    Takes a profile of the float file, one measurement for each change tried (at most two for each kind of layer), and
    one pass over the judge's rows for each try to come nearer to the float file.

    Args:
        bench: The float file.
        judge: Says how far a file is from it.
        feed: One row to time on.
        threads: Threads to time with.
        seconds: How long to time each file, about.

    Returns:
        The fastest mixture found whose outputs are near enough; where none is, the nearest.

    Raises:
        ExportError: There is nothing to quantize, or ONNX Runtime cannot quantize the file.
        InputError: Convolutions, and no data to calibrate on.
    """
    profile = profile_onnx(bench.prepared, feed, threads=threads, seconds=seconds)
    kinds = kinds_of(bench.graph, {node.name: node.ms for node in profile.nodes})
    if not kinds:
        raise ExportError("there is nothing to quantize", found="no convolution or product with constant weights")
    choice, built = _fastest(bench, kinds, feed, threads, seconds)
    return _nearest(bench, judge, kinds, choice, built, feed, threads, seconds)


def _fastest(
    bench: Workbench, kinds: list[Kind], feed: Feed, threads: int | None, seconds: float
) -> tuple[dict[str, str], Built]:
    """The choice for each kind with which the whole file is fastest."""
    choice = {kind.name: FLOAT if kind.share < _SMALL else DYNAMIC if kind.product else STATIC for kind in kinds}
    if set(choice.values()) == {FLOAT}:
        choice[kinds[0].name] = DYNAMIC if kinds[0].product else STATIC
    built = _build(bench, kinds, choice)
    for kind in kinds:
        for other in (STATIC, FLOAT) if kind.product else (FLOAT,):
            changed = {**choice, kind.name: other}
            if choice[kind.name] in (FLOAT, other) or set(changed.values()) == {FLOAT}:
                continue
            rival = _build(bench, kinds, changed)
            if _faster(built.path, rival.path, feed, threads, seconds):
                choice, built = changed, rival
    return choice, built


def _nearest(
    bench: Workbench,
    judge: Judge,
    kinds: list[Kind],
    choice: dict[str, str],
    built: Built,
    feed: Feed,
    threads: int | None = None,
    seconds: float = 0.3,
) -> Mixture:
    """The same choice with other ranges, then with the worst nodes in float, until the outputs are near enough."""

    def mixture(made: Built, found: Agreement, left: tuple[str, ...], how: str) -> Mixture:
        return Mixture(made, found, dict(choice), left, how)

    def corrected(made: Built) -> Built:
        return bench.corrected(made) if STATIC in choice.values() else made

    def rival(method: str, left: tuple[str, ...] = (), int8: Int8Format | None = None) -> Built:
        return corrected(_build(bench, kinds, choice, method=method, left=left, int8=int8))

    method = bench.options.method
    built = corrected(built)
    best = mixture(built, judge.of(built.path), (), method)
    if judge.against(best.agreement) is None:
        return best
    if STATIC in choice.values():
        for other in _METHODS:
            made = rival(other)
            found = judge.of(made.path)
            if found.wrong is None and found.cosine > best.agreement.cosine:
                best = mixture(made, found, (), other)
            if judge.against(found) is None:  # by its accuracy, perhaps, with a lower cosine than the best one's
                return mixture(made, found, (), other)
        for what, int8 in exact_formats(bench.int8):
            made = rival(best.method, int8=int8)
            found = judge.of(made.path)
            if judge.against(found) is None and _faster(bench.prepared, made.path, feed, threads, seconds):
                return mixture(made, found, (), f"{best.method}, {what}")
    order = _worst_first(bench, best.built.path, feed)
    chosen = {node for kind in kinds if choice[kind.name] != FLOAT for node in kind.nodes}
    order = [node for node in order if node in chosen]
    count = 1
    while order and count < len(order):
        left = tuple(order[:count])
        made = rival(best.method, left)
        found = judge.of(made.path)
        if found.wrong is None and found.cosine > best.agreement.cosine:
            best = mixture(made, found, left, best.method)
        if judge.against(found) is None:
            return mixture(made, found, left, best.method)
        count *= 2
    return best


def _faster(now: Path, rival: Path, feed: Feed, threads: int | None, seconds: float) -> bool:
    """Whether the rival is faster beyond the noise."""
    timed = benchmark({"now": now, "rival": rival}, inputs_of(feed), threads=threads, seconds=seconds)
    return timed["rival"].ratio_high < 1


def _build(
    bench: Workbench,
    kinds: list[Kind],
    choice: dict[str, str],
    method: str | None = None,
    left: tuple[str, ...] = (),
    int8: Int8Format | None = None,
) -> Built:
    nodes: dict[str, list[str]] = {STATIC: [], DYNAMIC: [], FLOAT: []}
    for kind in kinds:
        nodes[choice[kind.name]] += [node for node in kind.nodes if node not in left]
    return bench.mixed(nodes[STATIC], nodes[DYNAMIC], method=method, int8=int8)


def _worst_first(bench: Workbench, path: Path, feed: Feed) -> list[str]:
    """The layers by how much the error jumps at each: what feeds it is there with its rounding."""
    jumps: dict[str, float] = {}
    makers = {output: node.name for node in bench.graph.node for output in node.output}
    for tensor in compare_layers(bench.prepared, path, feed).tensors:
        name = makers.get(tensor.reference, tensor.node)
        jumps[name] = max(jumps.get(name, 0.0), tensor.jump)
    return sorted(jumps, key=lambda name: -jumps[name])


def inputs_of(feed: Feed) -> Inputs:
    """A feed as the arguments of a benchmark."""
    return Inputs((), {name: torch.from_numpy(array) for name, array in feed.items()})
