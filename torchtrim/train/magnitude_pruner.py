"""`MagnitudePruner`: weights go to zero little by little while a model is trained, in the user's own loop."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchtrim.edits.history import Applied, count_params, record
from torchtrim.edits.sparse_decide import decide, numbers_of
from torchtrim.edits.sparse_record import SparseLayer, Sparsified
from torchtrim.edits.sparse_weights import choose, held_at
from torchtrim.edits.sparsify import SparseScope, Sparsify, asked_for, fraction
from torchtrim.errors import EditError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import known_inputs
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import What
from torchtrim.importance.weights import Pool, weight_scores
from torchtrim.train.sparsity_report import SparsityReport
from torchtrim.train.sparsity_schedule import SparsitySchedule, checked_schedule
from torchtrim.train.weight_masks import WeightMasks


class MagnitudePruner:
    """Gradual magnitude pruning (Zhu and Gupta, *To prune, or not to prune*, 2017): two lines in a training loop.

    `p.step()` goes behind `optimizer.step()`, `p.finish()` behind the loop. At the steps that the schedule says the
    weights with the smallest absolute values are set to zero, as many as belong to the schedule's sparsity; at all
    steps those that were are set to zero again, in place. There are no wrappers, no hooks and no other parameters: the
    names of a `state_dict` never change, and when the pruner is dropped nothing of it is left in the model.

    The numbers are exact. The first pruning is at the schedule's `begin`; at its `end` the final sparsity is reached,
    whether or not `every` divides the range; and `finish` reaches it where training was shorter than that.

    A weight that has been pruned stays zero. With `regrow=True` it may come back: between two prunings all weights are
    trained, and each pruning chooses among all of them, until the schedule's `end` (as in Guo et al., *Dynamic network
    surgery*, 2016).

    Which weights: as for `tt.sparsify`. Those of frozen layers go too, since the model is to be sparse in the end, and
    the report says which these are (`exclude=` leaves them out). Shared weights are one. Models in
    `DistributedDataParallel` are pruned alike on every rank, without a word between them: equal weights give equal
    masks. Edits of the model in between with `copy=False` (pruned channels, removed layers) are followed, as its
    history tells them; `follow` takes a copy.

    Args:
        model: The model; its weights are changed in place.
        schedule: `PolynomialDecay`, `ConstantSparsity`, `OneShotSparsity`, or anything with `final`, `at(step)` and
            `due(step)`.
        optimizer: The optimizer, where what it keeps of pruned weights is to be zero too: momentum, Adam's moments.
        scope: `"uniform"`: each weight loses the schedule's fraction. `"global"`: all are ranked together.
        importance: `"magnitude"`; `"random"` or `"random:SEED"`, a baseline.
        sparsity: Final sparsities by path, glob, type or predicate, of which the first that fits counts; other weights
            stay. The schedule says how far each is on its way.
        thresholds: By path, in place of it: in the end all weights that are smaller are zero; on the way, all that are
            smaller than the threshold's share.
        pattern: `"2:4"`: in the end 2 of 4 neighbours along the inputs are zero, exactly; on the way a growing share of
            the groups are so, those first that lose least. The schedule has to end at the pattern's own sparsity.
        block: Weights go in blocks of this shape.
        pool: Whether blocks are ranked by their mean (`"avg"`) or their largest (`"max"`).
        include: Only these.
        exclude: What is left out besides.
        max_sparsity: The largest fraction that one weight may lose with `scope="global"`.
        regrow: Whether weights may come back.
        example_inputs: To tell the first and the last layer by the order of execution; without them it is that of
            registration.

    Raises:
        EditError: A schedule or setting that is none, or nothing to prune.
        PathError: A path that does not exist; the nearest are named.
        SelectionError: A glob, type or predicate that nothing fits.
        ModelError: A weight is lazy, not finite, parametrized, or masked by `torch.nn.utils.prune`.

    Example:
        >>> import torchtrim as tt
        >>> net, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 2)), torch.randn(32, 4)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        >>> schedule = tt.PolynomialDecay(0.5, 0.9, begin=0, end=20, every=5)
        >>> p = MagnitudePruner(net, schedule, optimizer=optimizer)
        >>> for _ in range(15):
        ...     optimizer.zero_grad(); net(x).square().mean().backward(); optimizer.step()
        ...     _ = p.step()
        >>> p.finish().zeros, round(0.9 * 128)
        (115, 115)
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: SparsitySchedule,
        *,
        optimizer: torch.optim.Optimizer | None = None,
        scope: SparseScope = "uniform",
        importance: str = "magnitude",
        sparsity: Mapping[Any, float] | None = None,
        thresholds: Mapping[Any, float] | None = None,
        pattern: str | None = None,
        block: Iterable[int] | None = None,
        pool: Pool = "avg",
        include: What | Iterable[What] | None = None,
        exclude: What | Iterable[What] = (),
        max_sparsity: float = 0.99,
        regrow: bool = False,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        model = unwrap(model)
        self._schedule = checked_schedule(schedule)
        if sparsity is not None and not isinstance(sparsity, Mapping):
            raise EditError(
                "the schedule says how sparse all are",
                path="sparsity",
                found=repr(sparsity),
                expected="numbers by path",
            )
        if sparsity is not None and (thresholds is not None or pattern is not None):
            raise EditError("one of these says how sparse: sparsity, thresholds or pattern", path="sparsity")
        given = self._schedule.final if sparsity is None else sparsity
        self._asked = asked_for(
            model,
            None if thresholds is not None else given,
            thresholds=thresholds,
            pattern=pattern,
            block=block,
            pool=pool,
            scope=scope,
            importance=importance,
            include=include,
            exclude=exclude,
            max_sparsity=max_sparsity,
        )
        self._inputs = known_inputs(model) if example_inputs is None else Inputs.of(example_inputs)
        chosen = choose(model, self._asked.include, self._asked.exclude, also=self._asked.by_path, inputs=self._inputs)
        taking, self._numbers, left_out = numbers_of(self._asked, model, chosen.weights)
        self._left_out = chosen.left_out | left_out
        for weight in taking:
            weight_scores(weight.name, weight.parameter, "magnitude")  # refuses what is not finite
        self._regrow = regrow
        self._masks = WeightMasks(model, taking)
        self.optimizer = optimizer
        self._step = 0
        self._reached = 0.0
        self._finished = False
        self._edges: dict[str, float | None] = {}
        self._course: list[tuple[int, float]] = []

    @property
    def model(self) -> nn.Module:
        """The model, out of its wrapper."""
        return self._masks.model

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer whose state of pruned weights is zero too; another may be set, as after unfreezing layers."""
        return self._masks.optimizer

    @optimizer.setter
    def optimizer(self, optimizer: torch.optim.Optimizer | None) -> None:
        self._masks.optimizer = _plain_optimizer(optimizer, [each.parameter for each in self._masks.weights])

    @property
    def schedule(self) -> SparsitySchedule:
        """The schedule."""
        return self._schedule

    @property
    def steps(self) -> int:
        """How many steps were taken: the number of the next."""
        return self._step

    @property
    def finished(self) -> bool:
        """Whether `finish` was called."""
        return self._finished

    @property
    def sparsity(self) -> float:
        """The fraction of the weights that take part which is held at zero now; where they may come back, is zero."""
        if self._finished or self._holds():
            held = sum(int(mask.sum()) for mask in self._masks.gone.values())
        else:  # weights come back between two prunings
            held = sum(int((weight.parameter.detach() == 0).sum()) for weight in self._masks.weights)
        return held / sum(weight.parameter.numel() for weight in self._masks.weights)

    @property
    def reached(self) -> bool:
        """Whether the schedule's final sparsity is there."""
        there = bool(self._course) and self._reached >= self._schedule.final
        return self._finished or (there and self._holds())

    def step(self) -> bool:
        """Prune where the schedule says so, and keep at zero what has been pruned: behind `optimizer.step()`.

        Returns:
            Whether weights were chosen at this step.

        Raises:
            EditError: After `finish`; a weight was replaced or reshaped, and the model's history does not say how; or
                the schedule gives what is no sparsity.
            ModelError: A weight is not finite, where weights are chosen.
        """
        if self._finished:
            raise EditError("the pruner has finished", path="step", hint="a new MagnitudePruner")
        self._rename(self._masks.refresh())
        due = self._schedule.due(self._step)
        if due:
            self._prune(fraction(self._schedule.at(self._step), f"schedule.at({self._step})"))
        elif self._holds():
            self._masks.apply()
        self._step += 1
        return due

    def finish(self) -> SparsityReport:
        """Reach the final sparsity, wherever the schedule is, and write what was done into the model's history.

        Returns:
            What it came to. A second call only tells that again.

        Raises:
            EditError: As for `step`.
            ModelError: A weight is not finite.
        """
        if not self._finished:
            self._rename(self._masks.refresh())
            self._prune(self._schedule.final, whole=True)
            self._masks.settle()
            self._record(self.model, self._checked())
            self._finished = True
        return self.report()

    def follow(self, model: nn.Module) -> None:
        """Go on with a model that an edit with `copy=True` made of this one: the masks go over by name, and narrower.

        Pass the copy's own optimizer through `tt.sync_optimizer(optimizer, copy, before=model)` as well.

        Raises:
            EditError: What became of a weight is not in its history.
        """
        self._rename(self._masks.follow(unwrap(model)))

    @torch.no_grad()
    def mask(self, other: nn.Module) -> None:
        """Set to zero in another model of the same names what is held at zero here: in an average of weights (EMA).

        After `finish` that model's history gets the record too.

        Raises:
            PathError: It has not all of the weights.
            EditError: One has another shape there. Nothing has changed.
        """
        other, gone = unwrap(other), self._masks.whole()
        held = held_at(other, gone)
        for name, mask in gone.items():
            if held[name].shape != mask.shape:
                found, expected = list(held[name].shape), list(mask.shape)
                raise EditError("this weight has another shape there", path=name, found=found, expected=expected)
        for name, mask in gone.items():
            held[name].masked_fill_(mask.to(held[name].device), 0)
        if self._finished:
            self._record(other, ("all pruned weights are zero",))

    def report(self) -> SparsityReport:
        """How sparse each weight is now, what was left out and why."""
        layers = tuple(
            SparseLayer(
                weight.name,
                tuple(weight.parameter.shape),
                int((weight.parameter.detach() == 0).sum()),
                self._edges.get(weight.name),
            )
            for weight in self._masks.weights
        )
        return SparsityReport(
            layers, dict(self._left_out), self._step, self._schedule.final, tuple(self._course), tuple(self._notes())
        )

    def log(self, writer: Any, step: int | None = None) -> None:
        """Write sparsities and thresholds to TensorBoard.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`, or anything with its `add_scalar(tag, value, step)`.
            step: The step to write them under; by default the pruner's own.

        Raises:
            EditError: It is no such writer.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise EditError(
                "not a TensorBoard writer", path="writer", found=type(writer).__name__, expected="add_scalar"
            )
        report, at = self.report(), self._step if step is None else step
        writer.add_scalar("sparsity/all", report.sparsity, at)
        for layer in report.layers:
            writer.add_scalar(f"sparsity/{layer.path}", layer.sparsity, at)
            if layer.threshold is not None:
                writer.add_scalar(f"threshold/{layer.path}", layer.threshold, at)

    def state_dict(self) -> dict[str, Any]:
        """Where the pruner is, for a checkpoint: numbers, and the masks as bits (an eighth of a byte a weight)."""
        return {
            "version": 1,
            "step": self._step,
            "reached": self._reached,
            "finished": self._finished,
            "thresholds": dict(self._edges),
            "course": [list(each) for each in self._course],
            **self._masks.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave; what it holds at zero is set to zero.

        Raises:
            EditError: It is not such a state, or of another model. Nothing has changed.
        """
        if not isinstance(state, Mapping) or state.get("version") != 1:
            raise EditError("not the state of a pruner", found=type(state).__name__, expected="what state_dict() gives")
        gone = self._masks.read(state)
        try:
            step, reached, finished = int(state["step"]), float(state["reached"]), bool(state["finished"])
            edges = {str(name): None if edge is None else float(edge) for name, edge in state["thresholds"].items()}
            course = [(int(at), float(sparsity)) for at, sparsity in state["course"]]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise EditError(f"not the state of a pruner: {error!r}", expected="what state_dict() gives") from error
        self._step, self._reached, self._finished = step, reached, finished
        self._edges, self._course = edges, course
        self._masks.put(gone)
        if self._holds() or finished:
            self._masks.apply()

    def _holds(self) -> bool:
        """Whether what was pruned is held at zero between two prunings."""
        end = getattr(self._schedule, "end", None)
        return not self._regrow or (end is not None and self._step >= end)

    def _rename(self, names: Mapping[str, str]) -> None:
        """Take over the names that weights have since an edit."""
        self._edges = {names.get(name, name): edge for name, edge in self._edges.items()}
        if self._numbers is not None:
            self._numbers = {names.get(name, name): number for name, number in self._numbers.items()}

    def _prune(self, sparsity: float, whole: bool = False) -> None:
        final = self._schedule.final
        sparsity = sparsity if self._regrow else max(sparsity, self._reached)
        moving = self._regrow or self._asked.thresholds is not None  # there is more to find at the same sparsity
        if moving or whole or sparsity > self._reached or not self._course:
            share = 1.0 if whole or final == 0 else sparsity / final
            gone, edges = decide(
                self._asked,
                self._masks.weights,
                self._numbers,
                None if self._regrow else self._masks.gone,
                sparsity=sparsity,
                share=share,
            )
            self._masks.put(gone)
            self._edges = {name: self._edges.get(name) if edge is None else edge for name, edge in edges.items()}
            self._reached = sparsity
        self._masks.apply()
        self._course.append((self._step, self.sparsity))

    def _record(self, model: nn.Module, checked: tuple[str, ...]) -> None:
        notes = (f"reached in training, in {self._step:,} steps", *self._notes())
        decided = Sparsified.of(self._masks.whole(), self._edges, self._left_out, notes)
        edit: Sparsify = replace(self._asked, decided=decided)
        count = count_params(model)
        inputs = known_inputs(model) or self._inputs or Inputs()
        record(model, model, inputs, Applied(edit, count, count, decided.told(), checked))

    def _checked(self) -> tuple[str, ...]:
        """Look whether everything that the masks hold at zero is.

        Raises:
            EditError: It is not.
        """
        held = {weight.name: weight.parameter.detach() for weight in self._masks.weights}
        for name, mask in self._masks.gone.items():
            if bool(held[name][mask].any()):
                raise EditError("pruned weights are not zero", path=name)
        return ("all pruned weights are zero",)

    def _notes(self) -> list[str]:
        frozen = [weight.name for weight in self._masks.weights if not weight.parameter.requires_grad]
        notes = (
            [f"{len(frozen)} of these are frozen, and pruned all the same: {', '.join(frozen[:4])}"] if frozen else []
        )
        return notes + self._masks.notes

    def __repr__(self) -> str:
        return f"MagnitudePruner({self._schedule!r}: step {self._step:,}, sparsity {self.sparsity:.2%})"


def _plain_optimizer(optimizer: Any, weights: list[nn.Parameter]) -> torch.optim.Optimizer | None:
    """The optimizer, out of accelerate's wrapper.

    Raises:
        EditError: It is none, or holds none of the weights.
    """
    if optimizer is None:
        return None
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Optimizer):
        raise EditError("not an optimizer", path="optimizer", found=type(optimizer).__name__)
    held = {id(each) for group in inner.param_groups for each in group["params"]}
    if not any(id(weight) in held for weight in weights):
        raise EditError(
            "the optimizer holds none of the weights that are pruned",
            path="optimizer",
            hint="the optimizer that trains this model",
        )
    return inner
