"""What happens between the epochs of a training: saving, choosing, stopping, and going on after a break."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from torchtrim.checkpoint.load import load
from torchtrim.checkpoint.save import save
from torchtrim.errors import CheckpointError, SelectionError
from torchtrim.train.ema import Averaged
from torchtrim.train.loop import Loop
from torchtrim.train.outcome import Epoch
from torchtrim.train.shares import Shares
from torchtrim.train.stages import Stages
from torchtrim.train.training_state import (
    FILE,
    copied,
    generators_of,
    named_tensors,
    put_back,
    read_state,
    refuse_closed,
    write_state,
)
from torchtrim.train.watching import Watching

BEST, LAST = "best.trim", "last.trim"


class TrainingRun:
    """A training between its epochs: what it saves, what it keeps, and when it ends.

    Args:
        loop: What makes the epochs.
        stages: What learns in them.
        pruner: A pruner of weights, or `None`.
        average: An average of the weights, or `None`.
        distiller: A distiller, or `None`.
        settings: What decides the training, by name: of another one nothing is resumed.
        epochs: How many there are.
        patience: After how many that were no better it ends.
        folder: Where to save, or `None`.
        choose: Whether the best epoch is kept, and not the last.
        sources: The data, for random generators that it holds.
    """

    def __init__(
        self,
        loop: Loop,
        stages: Stages,
        pruner: Any,
        average: Averaged | None,
        distiller: Any,
        settings: dict[str, Any],
        epochs: int,
        patience: int | None,
        folder: str | Path | None,
        choose: bool,
        sources: list[Any],
    ) -> None:
        self.loop, self.stages, self.pruner, self.average, self.distiller = loop, stages, pruner, average, distiller
        self.model, self.fabric = loop.model, loop.accelerator
        self.total, self.patience = epochs, patience
        self.folder = None if folder is None else Path(folder)
        self.done: list[Epoch] = []
        self.best, self.rows, self.choose = 1, 0, choose
        self.notes: list[str] = []
        self._generators = generators_of(sources)
        self.settings = settings | {"keep": "best" if choose else "last", "generators": len(self._generators)}
        self._best: dict[str, torch.Tensor] | None = None
        self._since = 0  # the first epoch that counts for the best: the first at the final sparsity

    def begin(self, resume: bool) -> None:
        """Make sure that the folder can be written, or go on from what is in it."""
        if self.folder is None:
            return
        rule, schedule = self.loop.optimizer, self.loop.rates.scheduler
        refuse_closed(
            {
                type(rule.optimizer).__name__: rule.state_dict()["param_groups"],
                type(schedule).__name__: schedule.state_dict(),
            }
        )
        there = (self.folder / FILE).is_file()
        if self.fabric.gather(torch.tensor([float(there)], device=self.fabric.device)).unique().numel() > 1:
            raise CheckpointError("not all processes see the same files", path=self.folder, hint="a shared folder")
        if there and not resume:
            raise CheckpointError(
                "there is a training in this folder already", path=self.folder, hint="resume=True, or another folder"
            )
        if there:
            self._go_on(read_state(self.folder, self.settings, self._shapes()))
        elif self.fabric.is_main_process:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise CheckpointError(f"cannot be made: {error.strerror or error}", path=self.folder) from error
            save(self.model, self.folder / LAST)  # a model that cannot be saved is better known before it is trained
        self.fabric.wait_for_everyone()

    def epochs(self, training: Shares, validation: Shares | None, watching: Watching, on_epoch: Any) -> str:
        """Train until the end; returns why it ended there."""
        while len(self.done) < self.total:
            if self._late():
                return f"no better for {self.patience} epochs"
            number = len(self.done)
            good = copied(named_tensors(self.model))
            try:
                epoch = self._epoch(number, training, validation, watching)
            except BaseException:
                put_back(named_tensors(self.model), good)
                self.loop.clear()
                raise
            self._keep(epoch)
            self._write()
            watching.epoch(number + 1, epoch)
            if on_epoch is not None:
                on_epoch(number + 1, epoch)
        return f"all {self.total} epochs done" if self.total > 1 else "the epoch is done"

    def finish(self, validation: Shares | None) -> int | None:
        """Leave the weights that are to be kept; returns the number of their epoch."""
        self.loop.clear()
        if self.average is not None:
            self.average.write()
        if self.pruner is not None:
            self._mask()
        kept: int | None = len(self.done)
        if self.choose and self._best is not None:
            put_back(named_tensors(self.model), self._best)
            kept = self.best
        if self.pruner is not None:
            before = copied(named_tensors(self.model))
            self.pruner.finish()
            after = named_tensors(self.model)
            if any(not torch.equal(tensor, after[name]) for name, tensor in before.items()):
                kept = None
                measured = {} if validation is None else self.loop.measure(validation).means()
                told = "".join(f"; {name} on the validation data {value:.4f}" for name, value in measured.items())
                self.notes.append(
                    f"the training was shorter than the pruner's schedule: pruned to its end after it{told}"
                )
        if self.folder is not None and self.fabric.is_main_process:
            save(self.model, self.folder / LAST)
            if self.choose:
                save(self.model, self.folder / BEST)
        self.fabric.wait_for_everyone()
        return kept

    def _epoch(self, number: int, training: Shares, validation: Shares | None, watching: Watching) -> Epoch:
        start = time.perf_counter()
        if self.stages.enter(number) or number == 0:
            self._refuse_all_frozen()
            self.loop.wrap()
        trained = sum(parameter.numel() for parameter in self._learning())
        watching.begin(number)
        lr = max(group["lr"] for group in self.loop.optimizer.param_groups)
        meter = self.loop.train(training, number, watching.step)
        if self.average is not None:
            self.loop.agree(self.average.tensors)
        means = meter.means()
        self.rows = meter.rows
        with self._averaged():
            held_out = {} if validation is None else self.loop.measure(validation).means()
        parts = {name.removeprefix("part "): value for name, value in means.items() if name.startswith("part ")}
        epoch = Epoch(
            loss=means["loss"],
            metric=means.get("metric"),
            val_loss=held_out.get("loss"),
            val_metric=held_out.get("metric"),
            lr=lr,
            trained=trained,
            seconds=time.perf_counter() - start,
            parts=parts,
            sparsity=None if self.pruner is None else self.pruner.sparsity,
        )
        self.loop.rates.after_epoch(epoch.loss if epoch.val_loss is None else epoch.val_loss)
        return epoch

    def _refuse_all_frozen(self) -> None:
        free = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not free:
            raise SelectionError("no parameter of the model is trainable", hint="torchtrim.unfreeze(model, ...)")
        learning = self._learning()
        if not learning:
            raise SelectionError("the optimizer holds nothing of what is to learn", path="optimizer")
        if len(learning) < len(free):
            note = f"{len(free) - len(learning)} trainable parameters are not in the optimizer, and stayed as they were"
            if note not in self.notes:
                self.notes.append(note)

    def _learning(self) -> list[torch.nn.Parameter]:
        held = {id(each) for group in self.loop.optimizer.param_groups for each in group["params"]}
        return [each for each in self.model.parameters() if each.requires_grad and id(each) in held]

    def _keep(self, epoch: Epoch) -> None:
        """Count an epoch, and keep its weights where they are the best."""
        self.done.append(epoch)
        number = len(self.done)
        if self.pruner is not None and not self.pruner.reached:
            self._since = number
            self.best = number
            return
        value, more = epoch.watched
        if number - 1 > self._since:
            other, _ = self.done[self.best - 1].watched
            better = value > other if more else value < other
            if not (better or (math.isnan(other) and not math.isnan(value))):
                return
        self.best = number
        if self.choose:
            with self._averaged():
                self._best = copied(named_tensors(self.model))

    def _late(self) -> bool:
        return self.patience is not None and bool(self.done) and len(self.done) - self.best >= self.patience

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """Inside, the model has the averaged weights, where there are any, pruned as they are."""
        if self.average is None:
            yield
            return
        with self.average.swapped():
            self._mask()
            yield

    def _mask(self) -> None:
        if self.pruner is not None:
            self.pruner.mask(self.model)

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in named_tensors(self.model).items()}

    def _write(self) -> None:
        """Save where the training stands."""
        if self.folder is not None and self.fabric.is_main_process:
            scaler = self.fabric.scaler
            state = {
                "settings": self.settings,
                "model": {name: tensor.detach() for name, tensor in named_tensors(self.model).items()},
                "optimizer": self.loop.optimizer.state_dict(),
                "schedule": self.loop.rates.scheduler.state_dict(),
                "scaler": None if scaler is None else scaler.state_dict(),
                "ema": None if self.average is None else self.average.state_dict(),
                "pruner": None if self.pruner is None else self.pruner.state_dict(),
                "distiller": self._own_of_distiller(),
                "generators": [generator.get_state() for generator in self._generators],
                "epochs": [epoch.to_dict() for epoch in self.done],
                "best": self.best,
                "since": self._since,
                "rows": self.rows,
            }
            if self.choose and self.best == len(self.done):
                with self._averaged():
                    save(self.model, self.folder / BEST)
            save(self.model, self.folder / LAST)
            write_state(self.folder, state)
        self.fabric.wait_for_everyone()

    def _own_of_distiller(self) -> dict[str, torch.Tensor] | None:
        """Projections and running means, without the student."""
        if self.distiller is None:
            return None
        held = self.distiller.state_dict()
        return {name: tensor for name, tensor in held.items() if not name.startswith("student.")}

    def _go_on(self, state: dict[str, Any]) -> None:
        """Stand where a state says."""
        put_back(named_tensors(self.model), state["model"])
        self.loop.optimizer.load_state_dict(state["optimizer"])
        self.loop.rates.scheduler.load_state_dict(state["schedule"])
        for part, name in ((self.fabric.scaler, "scaler"), (self.average, "ema"), (self.pruner, "pruner")):
            if part is not None and state[name] is not None:
                part.load_state_dict(state[name])
        if self.distiller is not None:
            self.distiller.load_state_dict(state["distiller"], strict=False)  # the student is the model
        for generator, held in zip(self._generators, state["generators"], strict=True):
            generator.set_state(held)
        self.done = [Epoch(**epoch) for epoch in state["epochs"]]
        self.best, self._since, self.rows = state["best"], state["since"], state["rows"]
        if self.choose and self.folder is not None and self._since < len(self.done):
            kept = load(self.folder / BEST, model=self.model)
            self._best = copied({name: tensor.to(self.fabric.device) for name, tensor in named_tensors(kept).items()})
        self.loop.wrap()
