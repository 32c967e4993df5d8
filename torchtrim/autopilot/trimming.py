"""One call of `trim`: the data, the plans, the search, the best once more, the result."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from torchtrim.autopilot.asked import Asked
from torchtrim.autopilot.best import best_made
from torchtrim.autopilot.building import Builder, cost_of
from torchtrim.autopilot.files import FileOf, Files
from torchtrim.autopilot.plans import PlanSpace
from torchtrim.autopilot.removal_order import search_order, searched
from torchtrim.autopilot.reporting import Reported, report_of
from torchtrim.autopilot.result import NEAR, TrimResult, front_of
from torchtrim.autopilot.scoring import read_rows, score_on, without_held_back
from torchtrim.autopilot.search import Search, TrimStopped, candidates_of, stopped_by
from torchtrim.autopilot.study import TrimStudy
from torchtrim.bench.machine import machine
from torchtrim.checkpoint.save import save
from torchtrim.edits.heal_data import Calibration
from torchtrim.edits.heal_norms import Judge
from torchtrim.errors import CheckpointError, EditError, InputError, TorchTrimError
from torchtrim.export.file_model import FileModel
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
        self.val_data = _again(asked.val_data)
        self.score, self.score_name = self._score(asked.evaluate, read.scored)
        self.study = TrimStudy(self._storage(), asked.study, self._about(), seed=asked.seed)
        times = 2 if asked.evaluate is not None else 1  # our own scores do not move by themselves
        held = self.study.settled("baseline", lambda: list(baseline_of(self.score, self.original, times=times)))
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
        fitted_to = without_held_back(self.data, self.original, self.inputs)
        builder = Builder(self.original, self.inputs, space.order, budget, fitted_to, repair=asked.heal)
        with self._stopping():
            if self._is_met(builder):
                trained = asked.train_data is not None or asked.recover is not None
                self.notes.append("the model is within the budget as it is" + ("" if trained else ": nothing was done"))
            else:
                Search(self, builder, space).run(asked.trials, asked.seconds)
            with self.study.turn("finish"):  # processes that share a folder write to it one after the other
                return self._finished(builder, ranking)

    def _finished(self, builder: Builder, ranking: Ranking | None) -> TrimResult:
        asked, budget = self.asked, self.asked.budget
        tried = candidates_of(self.study)
        best = best_made(self, builder, tried)
        net, file, plan = best.steps[-1].model, best.file, best.plan
        score = self.scored(net, file)
        found: dict[str, float] = {**cost_of(summary(net, self.inputs)), "max_drop": self.baseline - score}
        if file is not None:
            found["size_mb"] = file.report.size_mb
            if file.ms is not None:
                found["latency_ms"] = file.ms
        wanted = {**budget.to_dict(), **builder.limits}
        limits = {name: (float(wanted[name]), float(found[name])) for name in budget.to_dict()}
        front = front_of(tried, self.cost)
        if self.noise:
            self.notes.append(f"the score moves by {self.noise:.3g} by itself: smaller differences say nothing")
        self._give_back(net)
        shown = Reported(
            steps=best.steps, plan=plan, limits=limits, found=found, score=score, candidates=tried, front=front,
            ranking=ranking, export=file.report if file is not None and asked.folder is not None else None,
            seconds=time.perf_counter() - self._began,
        )  # fmt: skip
        path = self._saved(net)
        result = TrimResult(
            model=net,
            plan=plan,
            score=score,
            baseline=self.baseline,
            noise=self.noise,
            score_name=self.score_name,
            met={name: pair for name, pair in limits.items() if pair[1] <= pair[0] + NEAR},
            missed={name: pair for name, pair in limits.items() if not pair[1] <= pair[0] + NEAR},
            pareto=front,
            candidates=tuple(tried),
            cost=self.cost,
            training=best.training,
            export=shown.export,
            path=path,
            report=report_of(self, shown),
            seconds=shown.seconds,
            notes=tuple(self.notes),
        )
        if asked.folder is not None:
            result.report.write(asked.folder)
        return result

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """An evaluate function that fails late has its candidates with it, too."""
        try:
            yield
        except TrimStopped:
            raise
        except InputError as error:
            if error.path != "evaluate":
                raise
            raise stopped_by(error, self.study) from error

    def _saved(self, net: nn.Module) -> Path | None:
        """The checkpoint in the folder; a model that cannot be saved is given back all the same."""
        if self.asked.folder is None:
            return None
        path = self.folder / "net.trim"
        try:
            save(net, path)
        except CheckpointError as error:
            self.notes.append(f"net.trim was not written: {error.message}")
            return None
        return path

    # What there is to choose from.

    def _space(self) -> tuple[PlanSpace, Ranking | None]:
        held = self.study.settled("space", self._settled_space)
        self.notes += held["notes"]
        ranking = None if held["ranking"] is None else Ranking.from_dict(held["ranking"])
        return PlanSpace.from_dict(held["space"]), ranking

    def _settled_space(self) -> dict[str, Any]:
        """The plans, as plain data: the same for all processes, and when the search goes on."""
        asked, budget = self.asked, self.asked.budget
        said = len(self.notes)
        ranking: Ranking | None = None
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
        notes, self.notes = self.notes[said:], self.notes[:said]
        return {"space": space.to_dict(), "ranking": None if ranking is None else ranking.to_dict(), "notes": notes}

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
        )
        if self.timed:
            files.base_ms = float(self.study.settled("base_ms", files.timed_original))
        return files

    # The best.

    def _is_met(self, builder: Builder) -> bool:
        """Whether the untouched model is within every limit, and nothing smaller is asked for."""
        budget = self.asked.budget
        if not budget.computed and budget.latency_ms is None:
            return False
        if self.asked.schemes and not {"float32", "auto"} & {*self.asked.schemes}:
            return False  # another file is asked for, at least
        if not builder.keeps(builder.whole, builder.limits):
            return False
        return budget.latency_ms is None or (
            self.files is not None and self.files.base_ms is not None and self.files.base_ms <= budget.latency_ms
        )

    def scored(self, net: nn.Module, file: FileOf | None = None) -> float:
        """The score of a model, or of its file where that computes in other numbers."""
        if file is not None and self.files is not None and file.report.quantize != "float32":
            net = self.files.as_model(file)
        score = evaluated(self.score, net, "the result")
        if math.isnan(score):
            raise InputError("evaluate gives NaN for the result", path="evaluate", found="nan", expected="a number")
        return score

    def _give_back(self, net: nn.Module) -> None:
        """The modes and gradients of the user's model, for what is left of it."""
        learn = {name: held.requires_grad for name, held in self._user.named_parameters()}
        for name, held in net.named_parameters():
            held.requires_grad_(learn.get(name, True))
        modes = {path: module.training for path, module in self._user.named_modules()}
        for path, module in net.named_modules():
            module.training = modes.get(path, self._user.training)

    def _score(self, evaluate: Evaluate | None, scored: list[Any]) -> tuple[Evaluate, str]:
        if evaluate is None:
            return score_on(scored if self.val_data is None else self.val_data, self.original, self.inputs)

        def on_a_copy(net: nn.Module) -> float:
            # It may move its model or change its type; what is searched with has to stay as it is.
            return evaluate(net if isinstance(net, FileModel) else full_copy(net))

        return on_a_copy, "score"

    def _storage(self) -> Any:
        if self.asked.storage is not None:
            return self.asked.storage
        return None if self.asked.folder is None else self.folder / "study.journal"

    def _about(self) -> str:
        asked = self.asked
        return key_of(
            content_of(self.original), str(asked.budget), asked.target, asked.schemes, asked.removal, asked.pruning,
            asked.heal, asked.order, asked.metric, None if asked.ranking is None else asked.ranking.order,
            [content_of_batch(batch) for batch in self.data], self.score_name, asked.seed, self.inputs.describe(),
            None if self.val_data is None else content_of_batch(next(iter(self.val_data), None)),
            [machine().processor, asked.threads or torch.get_num_threads()] if self.timed else None,
        )  # fmt: skip


def _example(
    model: nn.Module, data: Iterable[Any], example_inputs: ExampleInputs | None
) -> tuple[Inputs, Iterable[Any]]:
    inputs, data = example_of(model, data, example_inputs)
    if example_inputs is None and inputs.batch:
        inputs = inputs.with_batch(1)
    device = next((held.device for held in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    return inputs.map(lambda tensor: tensor.to(device)), data


def _again(data: Iterable[Any] | None) -> Iterable[Any] | None:
    """Batches that can be gone through again and again."""
    return data if data is None or iter(data) is not data else list(data)


def _made(folder: Path | None) -> Path | None:
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder cannot be made: {error.strerror}", path=folder) from error
    return folder
