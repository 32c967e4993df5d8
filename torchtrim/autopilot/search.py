"""One trial after the other: a plan is made, judged by a cheap proxy, and measured where that is good enough."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from torchtrim.autopilot.building import Builder, cost_of
from torchtrim.autopilot.files import FileOf
from torchtrim.autopilot.finishing import norms_distilled
from torchtrim.autopilot.plans import PlanSpace, TrimPlan
from torchtrim.autopilot.result import NEAR, Candidate
from torchtrim.autopilot.study import TrimStudy
from torchtrim.errors import InputError, TorchTrimError
from torchtrim.graph.summary import Summary, summary
from torchtrim.search.evaluation import evaluated
from torchtrim.search.share import Try, largest_share

if TYPE_CHECKING:
    from torchtrim.autopilot.trimming import Trimming

_FURTHER = 1.1  # times an error that came with too large a loss
_NEARLY = 1.3  # times the limit of a file's size: once more, a little smaller
_TRIES = 4  # shares that are measured for one plan to come to a latency


class TrimStopped(InputError):
    """The `InputError` of an evaluate function that failed on the way; `candidates` holds what was measured by then."""

    candidates: tuple[Candidate, ...] = ()


@dataclass(frozen=True)
class Made:
    """A candidate before it is scored.

    Attributes:
        model: The model.
        left: Its summary.
        share: The share of the MACs that it was pruned to, where a latency decided that.
        size: The MB of parameters and buffers that it was pruned to, where a limit for the file decided that.
        file: Its file; None where none is made.
    """

    model: nn.Module
    left: Summary
    share: float | None
    size: float | None
    file: FileOf | None


class Search:
    """The trials of a study.

    Args:
        work: What the search is of: the budget, the score, the judge, the study, the files.
        builder: Makes candidates.
        space: The plans.
    """

    def __init__(self, work: Trimming, builder: Builder, space: PlanSpace) -> None:
        self._work, self._builder, self._space = work, builder, space
        self._budget, self._files, self._study = work.asked.budget, work.files, work.study
        self._file = work.scratch / "candidates" / "candidate.onnx"
        self._limits = dict(builder.limits)
        if self._budget.latency_ms is not None:
            self._limits["latency_ms"] = self._budget.latency_ms
        self._unpruned: dict[tuple[int, str], Try[None]] = {}

    def run(self, trials: int, seconds: float | None) -> None:
        """Try plans until so many are done in all, the time is up, or none is left.

        Raises:
            TrimStopped: The evaluate function fails.
        """
        began = time.perf_counter()
        while len(self._study.done()) + self._study.running() < trials:
            if seconds is not None and time.perf_counter() - began > seconds:
                break
            claimed = self._study.next(self._space)
            if claimed is None:
                break
            trial, plan = claimed
            self._work.say(f"plan {len(self._study.done()) + 1} of {trials}: {plan}", len(self._study.done()) / trials)
            try:
                self._try(trial, plan)
            except BaseException:
                self._study.forget(trial)
                raise
        self._study.wait()  # the best may be one that another process is at

    def _try(self, trial: Any, plan: TrimPlan) -> None:
        started = time.perf_counter()
        attributes: dict[str, Any] = {}
        try:
            made = self._made(plan)
            proxy = self._work.judge.error(made.model)
            attributes = {"proxy": proxy, **self._costs(made)}
            if not math.isfinite(proxy):
                self._study.failed(trial, "its outputs are not finite", {**attributes, "proxy": None})
                return
            if not self._worth_it(trial, proxy):
                self._study.gave_up(trial, {**attributes, "seconds": time.perf_counter() - started})
                return
            made = self._with_file(plan, self._healed(plan, made))
        except TorchTrimError as error:
            self._study.failed(trial, error.message, attributes)
            return
        score = self._score(made, str(plan))
        attributes |= self._costs(made) | {"score": score, "seconds": time.perf_counter() - started}
        if math.isnan(score):
            self._study.failed(trial, "evaluate gave NaN", {**attributes, "score": None})
            return
        excess = self.excess(attributes, score)
        attributes["excess"] = {name: over for name, over in excess.items() if over > NEAR}
        self._study.tell(trial, self._value(attributes, score), attributes, excess)

    def _worth_it(self, trial: Any, proxy: float) -> bool:
        """Whether a candidate is scored: its error is good beside those of others that were.

        Where the smallest model is asked for that loses no more than so much, one that loses less says nothing against
        it: it is scored unless another one with less error lost too much.
        """
        if self._limits:
            return self._study.worth_it(trial, proxy)
        lost = [each.proxy for each in candidates_of(self._study) if each.excess and each.proxy is not None]
        return not lost or proxy <= _FURTHER * min(lost)

    def _made(self, plan: TrimPlan) -> Made:
        """The candidate: for a latency at the largest share of the MACs whose file is fast enough."""
        share = None
        if "latency_ms" in self._limits and self._files is not None:
            whole = self._shape(plan, 1.0)
            share = whole.share
            if whole.ms > self._limits["latency_ms"] and plan.pruning != "none":
                best, _ = largest_share(
                    self._limits["latency_ms"], whole, lambda aim: self._shape(plan, aim), tries=_TRIES
                )
                share = best.share
        return self._built(plan, share, self._float_size(plan))

    def _built(self, plan: TrimPlan, share: float | None, size: float | None) -> Made:
        net = self._builder.steps(plan, share, size=size)[-1].model
        return Made(net, summary(net, self._builder.inputs), share, size, None)

    def _float_size(self, plan: TrimPlan) -> float | None:
        """What parameters and buffers may weigh for the file to keep its limit: as their ratio is in the original."""
        limit = self._limits.get("size_mb")
        if limit is None or self._files is None:
            return None
        return limit * self._builder.whole.size_mb / max(self._files.weight(plan.scheme), 1e-9)

    def _shape(self, plan: TrimPlan, share: float) -> Try[None]:
        """The latency of a plan's shapes at a share of the MACs: the weights do not matter for it."""
        key = (plan.remove, plan.scheme)
        if share == 1.0 and key in self._unpruned:
            return self._unpruned[key]
        net = self._builder.steps(plan, share, size=self._float_size(plan), shapes_only=True)[-1].model
        reached = summary(net, self._builder.inputs).macs / max(self._builder.whole.macs, 1)
        ms = math.inf
        if self._files is not None:
            ms = self._files.of(net, plan.scheme, self._file, timed=True).ms or math.inf
        found: Try[None] = Try(reached, ms, None, smaller=reached <= share * 1.02)
        if share == 1.0 and not self._builder.limits:
            self._unpruned[key] = found
        return found

    def _healed(self, plan: TrimPlan, made: Made) -> Made:
        """The candidate as it would be given back: what distilling norm layers brings differs from plan to plan."""
        work = self._work
        if not work.asked.heal or (not plan.remove and made.left.macs == self._builder.whole.macs):
            return made
        step = norms_distilled(made.model, work.original, work.inputs, work.data, work.judge, lambda what, done: None)
        return made if step is None else replace(made, model=step.model)

    def _with_file(self, plan: TrimPlan, made: Made) -> Made:
        """The candidate with its file, where files are made."""
        if self._files is None:
            return made
        file = self._files.of(made.model, plan.scheme, self._file, timed=self._work.timed)
        over = 0.0 if made.size is None else file.report.size_mb / self._limits["size_mb"]
        if 1.0 < over < _NEARLY and made.size is not None:  # a smaller model's file holds less weights for its nodes
            again = self._healed(plan, self._built(plan, made.share, made.size * (2 - over) * 0.99))
            file = self._files.of(again.model, plan.scheme, self._file, timed=self._work.timed)
            made = again
        return replace(made, file=file)

    def _score(self, made: Made, what: str) -> float:
        net = made.model
        if made.file is not None and self._files is not None and made.file.report.quantize != "float32":
            net = self._files.as_model(made.file)
        try:
            return evaluated(self._work.score, net, f"a candidate ({what})")
        except InputError as error:
            raise stopped_by(error, self._study) from error

    def _costs(self, made: Made) -> dict[str, Any]:
        found: dict[str, Any] = cost_of(made.left)
        if made.file is not None:
            found["size_mb"] = made.file.report.size_mb
        return found | {
            "latency_ms": None if made.file is None else made.file.ms,
            "share": made.share,
            "size": made.size,
        }

    def excess(self, costs: dict[str, Any], score: float) -> dict[str, float]:
        """By how much each limit is missed, as a share of it (below zero: met); for `max_drop` in the score's unit."""
        found = {name: (costs[name] - limit) / limit for name, limit in self._limits.items() if costs[name] is not None}
        if self._budget.max_drop is not None:
            found["max_drop"] = self._work.baseline - score - self._budget.max_drop
        return found

    def _value(self, costs: dict[str, Any], score: float) -> float:
        """What the study makes small: the loss, or the cost where the budget names none."""
        return self._work.baseline - score if self._limits else float(costs[self._work.cost])


def stopped_by(error: InputError, study: TrimStudy) -> TrimStopped:
    """The error of an evaluate function, with what was measured by then."""
    stopped = TrimStopped(
        error.message, path=error.path, found=error.found, expected=error.expected, hint="error.candidates"
    )
    stopped.candidates = tuple(candidates_of(study))
    return stopped


def candidates_of(study: TrimStudy) -> list[Candidate]:
    """What a study holds, in its order."""
    found = []
    for trial in study.done():
        held = trial.user_attrs
        found.append(
            Candidate(
                number=trial.number,
                plan=TrimPlan(**held["plan"]),
                proxy=held.get("proxy"),
                score=held.get("score"),
                share=held.get("share"),
                size=held.get("size"),
                macs=held.get("macs", 0),
                params=held.get("params", 0),
                size_mb=held.get("size_mb", 0.0),
                latency_ms=held.get("latency_ms"),
                excess=held.get("excess", {}),
                why=held.get("why", ""),
            )
        )
    return found


def best_of(
    candidates: list[Candidate], cost: str, noise: float, *, baseline: float, smallest: bool = False
) -> Candidate | None:
    """The candidate to keep: of those within all limits the one with the best score, else the one that misses least.

    Scores that lie nearer than the noise are alike: of these the smallest is kept.

    Args:
        candidates: What was tried.
        cost: What tells which is smaller.
        noise: How far a score moves by itself.
        baseline: The score of the original: what a drop is a share of.
        smallest: Of those within all limits keep the smallest.
    """
    measured = [each for each in candidates if each.score is not None]
    if not measured:
        return None

    def missed(each: Candidate) -> float:
        scale = max(abs(baseline), 1e-9)
        return sum(over / scale if name == "max_drop" else over for name, over in each.excess.items())

    least = min(map(missed, measured))
    slack = 0.0 if least == 0 else noise / max(abs(baseline), 1e-9)
    near = [each for each in measured if missed(each) <= least + slack]
    if smallest and least == 0:
        return min(near, key=lambda each: (getattr(each, cost) or 0.0, -(each.score or 0.0)))
    best = max(each.score or 0.0 for each in near)
    alike = [each for each in near if (each.score or 0.0) >= best - noise]
    return min(alike, key=lambda each: (getattr(each, cost) or 0.0, each.number))
