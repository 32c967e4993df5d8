"""One call of `trim`: the data, the plans, the search, the best once more, the result."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from torchtrim.autopilot.asked import Asked
from torchtrim.autopilot.building import Builder, Step, cost_of
from torchtrim.autopilot.files import FileOf, Files
from torchtrim.autopilot.finishing import norms_distilled, recovered, trained
from torchtrim.autopilot.plans import PlanSpace, TrimPlan
from torchtrim.autopilot.removal_order import search_order, searched
from torchtrim.autopilot.reporting import Reported, report_of
from torchtrim.autopilot.result import Candidate, TrimResult, front_of
from torchtrim.autopilot.scoring import read_rows, score_on
from torchtrim.autopilot.search import Search, best_of, candidates_of
from torchtrim.autopilot.study import TrimStudy
from torchtrim.checkpoint.save import save
from torchtrim.edits.heal_data import Calibration
from torchtrim.edits.heal_norms import Judge
from torchtrim.errors import EditError, InputError, TorchTrimError
from torchtrim.graph.copying import full_copy, kept_modes, kept_random_state, structural_copy
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.progress import progress
from torchtrim.graph.summary import summary
from torchtrim.importance.blocks import blocks_of
from torchtrim.importance.example import example_of
from torchtrim.importance.rank_blocks import rank_blocks
from torchtrim.importance.ranking import Ranking
from torchtrim.search.evaluation import Evaluate, baseline_of, evaluated
from torchtrim.search.measured import content_of, content_of_batch, key_of
from torchtrim.train.outcome import FineTuning

_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5, 0.4, 0.3)
_MOST_REMOVALS = 12  # numbers of blocks to choose from
_MOST = 2 / 3  # of the blocks
_MOST_SEARCHED = 6  # steps of the search for an order


class Trimming:
    """What one call of `trim` holds while it works.

    Args:
        model: The user's model.
        data: Batches.
        example_inputs: What the forward takes.
        asked: The options.
        stack: What is put back at the end.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Iterable[Any],
        example_inputs: ExampleInputs | None,
        asked: Asked,
        stack: ExitStack,
    ) -> None:
        self._began = time.perf_counter()
        self.asked, self._user = asked, model
        self.inputs, data = _example(model, data, example_inputs)
        stack.enter_context(kept_random_state())
        stack.enter_context(kept_modes(model))
        self.say: Callable[[str, float], Any] = stack.enter_context(progress("trim"))
        # Processes that share a study share its folder, and must not write to each other's files.
        self.scratch = Path(stack.enter_context(TemporaryDirectory(prefix="torchtrim.")))
        self.folder = _made(asked.folder) or self.scratch
        self.original = full_copy(model).eval()
        self.say("reading the data", 0.0)
        read = read_rows(
            data, self.original, self.inputs, asked.rows, split=asked.evaluate is None and asked.val_data is None
        )
        self.data, self.rows, self.notes = read.calibration, read.count, [*read.notes]
        self.score, self.score_name = self._score(asked.evaluate, read.scored)
        self.study = TrimStudy(self._storage(), asked.study, self._about(), seed=asked.seed)
        held = self.study.kept("baseline")
        if held is None:
            times = 2 if asked.evaluate is not None else 1  # our own scores do not move by themselves
            held = list(baseline_of(self.score, self.original, times=times))
            self.study.keep("baseline", held)
        self.baseline, self.noise = float(held[0]), float(held[1])
        calibration = Calibration.of(self.data, self.original, self.inputs, what="the search")
        self.judge = Judge(structural_copy(self.original, own_buffers=True, user_hooks=False).eval(), calibration)
        self.files = self._files()
        limits = asked.budget.computed
        self.cost = "latency_ms" if self.timed else next(iter(limits), "macs")

    @property
    def timed(self) -> bool:
        """Whether latencies are measured: they are limited, or the smallest model is asked for as a file."""
        budget = self.asked.budget
        return budget.latency_ms is not None or (bool(self.asked.schemes) and not budget.computed)

    def result(self) -> TrimResult:
        """Search, make the best once more, and measure it."""
        asked, budget = self.asked, self.asked.budget
        space, ranking = self._space()
        builder = Builder(self.original, self.inputs, space.order, budget, self.data, repair=asked.heal)
        chosen = None
        if self._is_met(builder):
            self.notes.append("the model is within the budget as it is: nothing was done")
        else:
            search = Search(self, builder, space)
            search.run(asked.trials, asked.seconds)
            chosen = self._chosen(candidates_of(self.study))
        plan = TrimPlan(0, "none", None, "float32") if chosen is None else chosen.plan
        steps, training = self._finished(builder, plan, None if chosen is None else chosen.share)
        net = steps[-1].model
        file = self._file(net, plan.scheme)
        score = self.scored(net, file)
        left = summary(net, self.inputs)
        found: dict[str, float] = {**cost_of(left), "max_drop": self.baseline - score}
        if file is not None:
            found["size_mb"] = file.report.size_mb
            if file.ms is not None:
                found["latency_ms"] = file.ms
        wanted = {**budget.to_dict(), **builder.limits}
        limits = {name: (float(wanted[name]), float(found[name])) for name in budget.to_dict()}
        tried = candidates_of(self.study)
        front = front_of(tried, self.cost)
        if self.noise and plan.remove + len(plan.pruning):
            self.notes.append(f"the score moves by {self.noise:.3g} by itself: smaller differences say nothing")
        export = file.report if file is not None and asked.folder is not None else None
        path = None
        self._give_back(net)
        if asked.folder is not None:
            path = self.folder / "net.trim"
            save(net, path)
        seconds = time.perf_counter() - self._began
        shown = Reported(
            steps=steps, plan=plan, limits=limits, found=found, score=score, candidates=tried, front=front,
            ranking=ranking, export=export, seconds=seconds,
        )  # fmt: skip
        result = TrimResult(
            model=net,
            plan=plan,
            score=score,
            baseline=self.baseline,
            noise=self.noise,
            score_name=self.score_name,
            met={name: pair for name, pair in limits.items() if pair[1] <= pair[0]},
            missed={name: pair for name, pair in limits.items() if not pair[1] <= pair[0]},
            pareto=front,
            candidates=tuple(tried),
            cost=self.cost,
            training=training,
            export=export,
            path=path,
            report=report_of(self, shown),
            seconds=seconds,
            notes=tuple(self.notes),
        )
        if asked.folder is not None:
            result.report.write(asked.folder)
        return result

    # What there is to choose from.

    def _space(self) -> tuple[PlanSpace, Ranking | None]:
        asked, budget = self.asked, self.asked.budget
        ranking = asked.ranking
        held = self.study.kept("space")
        if held is not None:
            return PlanSpace.from_dict(held), ranking
        order: list[str] = []
        macs: dict[str, int] = {}
        params: dict[str, int] = {}
        if asked.removal:
            order, macs, params, ranking = self._order()
        only_drop = not budget.computed and budget.latency_ms is None
        counts = self._removals(order, macs, params)
        space = PlanSpace(
            removals=counts,
            prunings=asked.pruning or ("none",),
            shares=(_SHARES if asked.pruning else (1.0,)) if only_drop else (),
            schemes=self._schemes(),
            order=tuple(order),
        )
        if all(not plan.remove and plan.pruning == "none" and plan.scheme == "float32" for plan in space):
            raise EditError("there is no plan to try", found="no block to remove, no channels to prune")
        self.study.keep("space", space.to_dict())
        return space, ranking

    def _order(self) -> tuple[list[str], dict[str, int], dict[str, int], Ranking | None]:
        """The blocks in the order in which they go, what each costs, and the ranking where there is one."""
        asked, ranking = self.asked, self.asked.ranking
        try:
            blocks = blocks_of(self.original, self.inputs)
        except EditError as error:
            self.notes.append(f"no block is removed: {error.message}")
            return [], {}, {}, ranking
        macs = {block.path: block.macs for block in blocks}
        params = {block.path: block.params for block in blocks}
        paths = list(macs)
        wanted = asked.order or ("search" if ranking is None and searched(len(paths)) else "ranked")
        if wanted == "search":
            most = min(_MOST_SEARCHED, max(1, round(len(paths) * _MOST)))
            order = search_order(self.original, self.inputs, paths, most, self.judge, self.say)
            return order, macs, params, ranking
        try:
            ranking = ranking or rank_blocks(self.original, self.data, asked.metric, self.inputs)
        except TorchTrimError as error:
            self.notes.append(f"no block is removed, since they cannot be ranked: {error.message}")
            return [], {}, {}, None
        known = [path for path in ranking.order if path in macs]
        if not known:
            raise InputError(
                "the ranking is of another model's blocks",
                path="ranking",
                found=list(ranking.order[:3]),
                expected=paths[:3],
            )
        return known[: max(1, round(len(known) * _MOST))], macs, params, ranking

    def _removals(self, order: list[str], macs: dict[str, int], params: dict[str, int]) -> tuple[int, ...]:
        """How many blocks may go: no more than bring the model within the budget by themselves."""
        whole = summary(self.original, self.inputs)
        limits = self.asked.budget.limits({"macs": whole.macs, "params": whole.params})
        shares = [
            limits[name] / max(getattr(whole, name), 1) for name in ("macs", "params", "size_mb") if name in limits
        ]
        latency = self.asked.budget.latency_ms
        if latency is not None and self.files is not None and self.files.base_ms:
            shares.append(0.8 * latency / self.files.base_ms)  # MACs are not time: some more may have to go
        most = len(order)
        if shares:
            for count in range(len(order) + 1):
                left = 1 - sum(macs[path] for path in order[:count]) / max(whole.macs, 1)
                kept = 1 - sum(params[path] for path in order[:count]) / max(whole.params, 1)
                if max(left, kept if "macs" not in limits and latency is None else 0.0) <= min(shares):
                    most = count
                    break
        if most + 1 <= _MOST_REMOVALS:
            return tuple(range(most + 1))
        return tuple(sorted({round(most * number / (_MOST_REMOVALS - 1)) for number in range(_MOST_REMOVALS)}))

    def _schemes(self) -> tuple[str, ...]:
        if self.asked.schemes == ("auto",) and self.files is not None:
            self.say("which numbers make the file faster?", 0.0)
            return tuple(self.files.schemes())
        return self.asked.schemes or ("float32",)

    def _files(self) -> Files | None:
        if not self.asked.makes_files:
            return None
        drop = self.asked.budget.max_drop
        files = Files(
            self.scratch / "candidates",
            self.original,
            self.inputs,
            self.data,
            target=self.asked.target,
            max_drop=0.01 if drop is None else min(max(drop, 0.001), 0.5),
            threads=self.asked.threads,
            base_ms=self.study.kept("base_ms"),
            timed=self.timed,
        )
        if files.base_ms is not None:
            self.study.keep("base_ms", files.base_ms)
        return files

    # The best.

    def _is_met(self, builder: Builder) -> bool:
        """Whether the untouched model is within every limit, and nothing smaller is asked for."""
        budget = self.asked.budget
        if not budget.computed and budget.latency_ms is None:
            return False
        if not builder.keeps(builder.whole, builder.limits):
            return False
        return budget.latency_ms is None or (
            self.files is not None and self.files.base_ms is not None and self.files.base_ms <= budget.latency_ms
        )

    def _chosen(self, candidates: list[Candidate]) -> Candidate | None:
        """The candidate to keep; None for the model as it is, where every plan is past the only limit, a drop."""
        budget = self.asked.budget
        only_drop = not budget.computed and budget.latency_ms is None
        best = best_of(candidates, self.cost, self.noise, smallest=only_drop)
        if best is None:
            whys = list(dict.fromkeys(each.why for each in candidates if each.why))
            raise EditError(
                "no plan could be made and scored",
                found="; ".join(whys[:3]) or f"{len(candidates)} plans",
                hint="more trials, another pruning=, or removal=False",
            )
        if only_drop and best.excess:
            self.notes.append("every plan loses more than is allowed: the model is given back as it was")
            return None
        return best

    def _finished(self, builder: Builder, plan: TrimPlan, share: float | None) -> tuple[list[Step], FineTuning | None]:
        """The best once more with all checks, healed, and trained where that is asked for."""
        asked = self.asked
        self.say(f"with all checks: {plan}", 0.9)
        steps = builder.steps(plan, share, check=True)
        touched = steps[-1].name != "untouched"
        if touched and asked.heal:
            step = norms_distilled(steps[-1].model, self.original, self.inputs, self.data, self.say)
            if step is not None and not self.scored(step.model) < self.scored(steps[-1].model) - self.noise:
                steps.append(step)
        training = None
        if asked.train_data is not None:
            folder = None if asked.folder is None else self.folder / "training"
            step, training = trained(
                steps[-1].model,
                self.original,
                self.inputs,
                asked.train_data,
                asked.val_data,
                asked.training or {},
                folder,
            )
            steps.append(step)
        if asked.recover is not None:
            steps.append(recovered(asked.recover, steps[-1].model))
        return steps, training

    def _file(self, net: nn.Module, scheme: str) -> FileOf | None:
        if self.files is None:
            return None
        self.say("the file of the best", 0.97)
        return self.files.of(net, scheme, self.folder / "model.onnx", timed=self.timed)

    def scored(self, net: nn.Module, file: FileOf | None = None) -> float:
        """The score of a model, or of its file where that computes in other numbers."""
        if file is not None and self.files is not None and file.report.quantize != "float32":
            net = self.files.as_model(file)
        return evaluated(self.score, net, "the result")

    def _give_back(self, net: nn.Module) -> None:
        """The modes and gradients of the user's model, for what is left of it."""
        learn = {name: held.requires_grad for name, held in self._user.named_parameters()}
        for name, held in net.named_parameters():
            held.requires_grad_(learn.get(name, True))
        modes = {path: module.training for path, module in self._user.named_modules()}
        for path, module in net.named_modules():
            module.training = modes.get(path, self._user.training)

    def _score(self, evaluate: Evaluate | None, scored: list[Any]) -> tuple[Evaluate, str]:
        if evaluate is not None:
            return evaluate, "score"
        scored = scored if self.asked.val_data is None else [*self.asked.val_data]
        if not scored:
            raise InputError("there is no data to score on", path="val_data", found="no batches")
        return score_on(scored, self.original, self.inputs)

    def _storage(self) -> Any:
        if self.asked.storage is not None:
            return self.asked.storage
        return None if self.asked.folder is None else self.folder / "study.journal"

    def _about(self) -> str:
        asked = self.asked
        return key_of(
            content_of(self.original), str(asked.budget), asked.target, asked.schemes, asked.removal, asked.pruning,
            asked.heal, asked.order, asked.metric, None if asked.ranking is None else asked.ranking.order,
            [content_of_batch(batch) for batch in self.data], self.score_name, asked.seed,
        )  # fmt: skip


def _example(
    model: nn.Module, data: Iterable[Any], example_inputs: ExampleInputs | None
) -> tuple[Inputs, Iterable[Any]]:
    inputs, data = example_of(model, data, example_inputs)
    if example_inputs is None and inputs.batch:
        inputs = inputs.with_batch(1)
    device = next((held.device for held in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return inputs.map(lambda tensor: tensor.to(device)), data


def _made(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder cannot be made: {error.strerror}", path=folder) from error
    return folder
