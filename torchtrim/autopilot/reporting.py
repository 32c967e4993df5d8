"""From what the autopilot did to its report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from torchtrim.autopilot.building import Step
from torchtrim.autopilot.plans import TrimPlan
from torchtrim.autopilot.result import NEAR, Candidate
from torchtrim.bench.machine import machine
from torchtrim.edits.history import history
from torchtrim.export.report import ExportReport
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.summary import Row, Summary, summary
from torchtrim.importance.ranking import Ranking
from torchtrim.report.trim_report import CandidateRow, EditRow, LayerRow, Limit, Stage, TrimReport

if TYPE_CHECKING:
    from torchtrim.autopilot.trimming import Trimming


@dataclass(frozen=True)
class Reported:
    """What was found in the end.

    Attributes:
        steps: The steps from the original to the result.
        plan: The plan of the result.
        limits: Each limit, and what was found.
        found: All that was measured of the result, by the names of limits.
        score: Its score.
        candidates: All that was tried.
        front: Those that no other beats.
        ranking: The ranking that blocks went by; None where they went by another order.
        export: The file.
        seconds: How long it took.
    """

    steps: Sequence[Step]
    plan: TrimPlan
    limits: dict[str, tuple[float, float]]
    found: dict[str, float]
    score: float
    candidates: Sequence[Candidate]
    front: Sequence[Candidate]
    ranking: Ranking | None
    export: ExportReport | None
    seconds: float


def report_of(work: Trimming, shown: Reported) -> TrimReport:
    """The report of a trim. Where a folder gets it, each stage in between is scored, too."""
    asked, inputs = work.asked, work.inputs
    before = summary(work.original, inputs)
    after = summary(shown.steps[-1].model, inputs)
    front = {each.number for each in shown.front}
    return TrimReport(
        model=type(work.original).__name__,
        score=work.score_name,
        baseline=work.baseline,
        noise=work.noise,
        command=asked.command(),
        machine=machine(),
        limits=tuple(Limit(name, limit, found, found <= limit + NEAR) for name, (limit, found) in shown.limits.items()),
        stages=tuple(_stages(work, shown, before, after)),
        edits=tuple(_edits(work.original, shown.steps, inputs)),
        layers=tuple(_layers(before, after)),
        candidates=tuple(
            CandidateRow(
                number=each.number,
                text=str(each.plan),
                proxy=each.proxy,
                score=each.score,
                macs=each.macs,
                params=each.params,
                size_mb=each.size_mb,
                latency_ms=each.latency_ms,
                state="measured" if each.score is not None else "failed" if each.why else "proxy",
                on_front=each.number in front,
                kept=each.plan == shown.plan,
                why=each.why,
            )
            for each in shown.candidates
        ),
        front=work.cost,
        seconds=shown.seconds,
        notes=tuple(work.notes),
        inputs=inputs.describe(),
        data=f"{work.rows} rows",
        ranking=shown.ranking,
        sensitivity=asked.sensitivity,
        export=shown.export,
    )


def _stages(work: Trimming, shown: Reported, before: Summary, after: Summary) -> list[Stage]:
    base_ms = None if work.files is None else work.files.base_ms
    stages = [Stage("original", work.baseline, before.macs, before.params, before.size_mb, base_ms, 0.0)]
    for number, step in enumerate(shown.steps):
        if step.name == "untouched":
            continue
        left = summary(step.model, work.inputs)
        last = number == len(shown.steps) - 1 and shown.plan.scheme == "float32"
        score = shown.score if last else None
        if score is None and work.asked.folder is not None:
            score = work.scored(step.model)
        ms = shown.found.get("latency_ms") if last else None
        stages.append(Stage(step.name, score, left.macs, left.params, left.size_mb, ms, step.seconds, step.note))
    if shown.plan.scheme != "float32":
        stages.append(
            Stage(
                f"file, {shown.plan.scheme}",
                shown.score,
                after.macs,
                after.params,
                shown.found["size_mb"],
                shown.found.get("latency_ms"),
                0.0,
            )
        )
    return stages


def _edits(original: nn.Module, steps: Sequence[Step], inputs: Inputs) -> list[EditRow]:
    """One row a recorded edit; those of one step share its figures."""
    rows = []
    known = len(history(original).entries)
    left = summary(original, inputs)
    for step in steps:
        now = summary(step.model, inputs)
        new = history(step.model).entries[known:]
        texts = [(entry.edit.kind, str(entry.edit), "; ".join(entry.notes)) for entry in new]
        for kind, text, note in texts or [(step.name, step.note, "")]:
            if step.name != "untouched":
                rows.append(EditRow(kind, text, left.macs, now.macs, left.params, now.params, note))
        known += len(new)
        left = now
    return rows


def _layers(before: Summary, after: Summary) -> list[LayerRow]:
    """The layers of both models, in the order of the original: what became of each."""
    old = {row.path: row for row in _leaves(before)}
    new = {row.path: row for row in _leaves(after)}
    rows = []
    for path in dict.fromkeys((*old, *new)):
        was, now = old.get(path), new.get(path)
        if now is not None and was is not None and now.type == "Identity" != was.type:
            now = None
        rows.append(
            LayerRow(
                path=path,
                type=(was or now or before.rows[0]).type,
                state=_state(was, now),
                params_before=0 if was is None else was.params,
                params_after=0 if now is None else now.params,
                macs_before=0 if was is None else was.macs,
                macs_after=0 if now is None else now.macs,
                shape_before=_shape(was),
                shape_after=_shape(now),
            )
        )
    return rows


def _state(was: Row | None, now: Row | None) -> str:
    if now is None:
        return "removed"
    if was is None:
        return "added"
    same = (was.params, was.macs, was.shapes) == (now.params, now.macs, now.shapes)
    return "kept" if same else "thinned"


def _leaves(found: Summary) -> list[Row]:
    inner = {row.path.rpartition(".")[0] for row in found.rows if row.path}
    return [row for row in found.rows if row.path and row.path not in inner and row.calls and row.alias_of is None]


def _shape(row: Row | None) -> str:
    return "" if row is None else ", ".join("x".join(map(str, shape)) for shape in row.shapes)
