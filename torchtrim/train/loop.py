"""The steps of a training: forward, backward, clipping, the optimizer, and all that follows a step."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchtrim.errors import InputError, ModelError, TorchTrimError
from torchtrim.graph.batches import answer_to
from torchtrim.graph.inputs import Inputs
from torchtrim.train.meter import Meter
from torchtrim.train.objective import Batch, Metric, Objective
from torchtrim.train.rates import Rates
from torchtrim.train.shares import Share, Shares

_LOOK_EVERY = 32  # steps on a GPU, where looking at a number holds everything up


class Loop:
    """One training's moving parts, and the epochs they make.

    Args:
        model: The model.
        accelerator: accelerate's: where it runs, in which precision, with which other processes.
        optimizer: The optimizer.
        rates: Its learning rates.
        objective: The loss.
        metric: `metric(output, targets)`, a mean over the rows; `None` for accuracy where the targets are classes.
        distiller: What runs the model and its teacher, where there is one.
        mixup: `mixup(inputs, targets)` gives others.
        after_step: Called after each step of the optimizer.
        penalty: Its gradients are added before each step.
        accumulate: How many batches make a step.
        clip_norm: The largest norm of the gradients.
        seed: Of the order of the data, of dropout, and of whatever else draws random numbers.
    """

    def __init__(
        self,
        model: nn.Module,
        accelerator: Any,
        optimizer: torch.optim.Optimizer,
        rates: Rates,
        objective: Objective,
        metric: Metric | None = None,
        *,
        distiller: Any = None,
        mixup: Any = None,
        after_step: Any = None,
        penalty: Any = None,
        accumulate: int = 1,
        clip_norm: float | None = None,
        seed: int = 0,
    ) -> None:
        self.model, self.accelerator, self.rates, self.seed = model, accelerator, rates, seed
        self.optimizer = accelerator.prepare_optimizer(optimizer)
        self._objective, self._metric, self._distiller, self._mixup = objective, metric, distiller, mixup
        self._after_step, self._penalty = after_step, penalty
        self._accumulate, self._clip = accumulate, clip_norm
        self._runs: nn.Module = model if distiller is None else distiller
        self._bad: torch.Tensor | None = None

    def wrap(self) -> None:
        """Wrap the model for several processes, anew whenever other parameters learn.

        accelerate's `prepare_model` is not used: it leaves another `forward` behind in the user's model.
        """
        inner = self.model if self._distiller is None else self._distiller
        if self.accelerator.num_processes == 1:
            self._runs = inner
            return
        device = self.accelerator.device
        ids = [device.index] if device.type == "cuda" else None
        self._runs = DistributedDataParallel(inner, device_ids=ids, find_unused_parameters=True)

    def train(self, shares: Shares, epoch: int, tell: Any = None) -> Meter:
        """One epoch: a step for every `accumulate` batches.

        Raises:
            InputError: A batch that cannot be trained on, or no batches.
            ModelError: The loss is not finite; says in which step.
        """
        self._runs.train()
        self.clear()
        self._bad = None
        meter = Meter(self.accelerator)
        step = 0
        for window in self._windows(shares, epoch):
            total = sum(share.total for share in window)
            for number, share in enumerate(window, start=1):
                held = number < len(window) and isinstance(self._runs, DistributedDataParallel)
                with self._runs.no_sync() if held else contextlib.nullcontext():  # type: ignore[operator]
                    self._learn(share, total, step, step * self._accumulate + number - 1, meter)
            step += 1
            self._look(epoch, step)
            try:
                self._step()
            except ModelError:
                self._look(epoch, step, last=True)  # weights that are no numbers come of a loss that was none
                raise
            if tell is not None:
                tell(len(window), meter, self.optimizer)
        if not step:
            again = "an iterator can be gone through once: give a list or a DataLoader" if epoch else None
            raise InputError(f"the data gave no batches in epoch {epoch + 1}", path="train_data", hint=again)
        self._look(epoch, step, last=True)
        self.agree(self._runs.buffers())
        return meter

    def clear(self) -> None:
        """Drop all gradients, also those from before, and of parameters that the optimizer does not hold."""
        held = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        for parameter in (*self.model.parameters(), *held):
            parameter.grad = None

    def agree(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every process the values of the first: what norms collect is each process's own."""
        if self.accelerator.num_processes > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    @torch.no_grad()
    def measure(self, shares: Shares) -> Meter:
        """Loss and metric on validation data, in eval mode, of the labels as they are.

        Raises:
            InputError: A batch that does not fit, or none.
        """
        self.model.eval()
        meter = Meter(self.accelerator)
        empty = True
        for number, share in enumerate(shares):
            empty = False
            apart = self._distiller is not None
            batch = Batch.of(share.batch, self.model, apart=apart).to(self.accelerator.device)
            with self.accelerator.autocast():
                output = answer_to(batch.inputs, self.model, number)
                loss = self._objective(output, batch, smooth=False)
            meter.add("loss", loss, share.rows)
            self._rate(meter, output, batch, share.rows)
        if empty:
            raise InputError("the validation data gave no batches", path="val_data")
        return meter

    def _windows(self, shares: Shares, epoch: int) -> Iterator[list[Share]]:
        """The batches of each step. Every process draws the same order of the data, and other random numbers then."""
        seed_all(self.seed, epoch)
        shares.begin(epoch)
        window: list[Share] = []
        first = True
        for share in shares:
            if first and self.accelerator.num_processes > 1:
                seed_all(self.seed, epoch, self.accelerator.process_index + 1)
            first = False
            window.append(share)
            if len(window) == self._accumulate:
                yield window
                window = []
        if window:
            yield window

    def _learn(self, share: Share, total: int, step: int, number: int, meter: Meter) -> None:
        alone = self._distiller is None
        batch = Batch.of(share.batch, self.model, labelled=alone, apart=not alone).to(self.accelerator.device)
        mixed = batch if self._mixup is None else _mixed(batch, self._mixup)
        with self.accelerator.autocast():
            if alone:
                output = answer_to(mixed.inputs, self._runs, number)
                loss, parts = self._objective(output, mixed, soft=mixed is not batch), {}
            else:
                given = Inputs((_plain(mixed.inputs), mixed.targets))
                distilled = answer_to(given, self._runs, number, told=mixed.inputs)
                output, loss, parts = distilled.output, distilled.loss, distilled.parts
        self._note(loss, step)
        # Each row counts the same, whatever batch of the step, and whatever process, it is in.
        weight = share.rows * self.accelerator.num_processes / total
        try:
            self.accelerator.backward(loss * weight)
        except RuntimeError as error:
            if "does not require grad" not in str(error):
                raise
            raise ModelError(
                "nothing that learns has a part in the loss", hint="unfreeze, or another output"
            ) from error
        meter.add("loss", loss, share.rows)
        for name, part in parts.items():
            meter.add(f"part {name}", part, share.rows)
        if mixed is batch:
            self._rate(meter, output, batch, share.rows)

    def _step(self) -> None:
        optimizer = self.optimizer
        if self.accelerator.scaler is not None and (self._penalty is not None or self._clip is not None):
            # Once: accelerate would do it for either, and for every optimizer that it knows.
            self.accelerator.scaler.unscale_(optimizer.optimizer)
        if self._penalty is not None:
            self._penalty.add_gradients()
        if self._clip is not None:
            held = [each for group in optimizer.param_groups for each in group["params"] if each.grad is not None]
            torch.nn.utils.clip_grad_norm_(held, self._clip)
        optimizer.step()
        if not optimizer.step_was_skipped:
            self.rates.after_step()
            if self._after_step is not None:
                self._after_step()
        optimizer.zero_grad()

    def _rate(self, meter: Meter, output: Any, batch: Batch, rows: int) -> None:
        if batch.targets is None:
            return
        with torch.no_grad():
            if self._metric is None:
                value: Any = self._objective.accuracy(output, batch)
            else:
                value = self._metric(self._objective.answer(output), batch.targets)
        if value is not None:
            meter.add("metric", value, rows)

    def _note(self, loss: torch.Tensor, step: int) -> None:
        """Remember the first step whose loss is not finite, without waiting for a GPU."""
        loss = loss.detach()
        if self._bad is None:
            self._bad = torch.full((2,), -1.0, device=loss.device)
        now = torch.stack([torch.full_like(self._bad[0], step), loss.float()])
        self._bad = torch.where((self._bad[0] < 0) & ~loss.isfinite(), now, self._bad)

    def _look(self, epoch: int, step: int, *, last: bool = False) -> None:
        if self._bad is None or (self._bad.is_cuda and step % _LOOK_EVERY and not last):
            return
        if self.accelerator.num_processes > 1:
            if not last and step % _LOOK_EVERY:
                return
            every = self.accelerator.gather(self._bad[None])
            first = torch.where(every[:, 0] < 0, torch.inf, every[:, 0]).argmin()
            self._bad = every[first]
        found, loss = self._bad.tolist()
        if found >= 0:
            raise ModelError(
                f"the loss is not finite in epoch {epoch + 1}, step {int(found) + 1}",
                found=loss,
                hint="a smaller lr, clip_norm=1.0, or a look at the data of that step",
            )


def seed_all(seed: int, epoch: int, process: int = 0) -> None:
    """Seed Python's, NumPy's and torch's random numbers, other ones for each epoch and process."""
    mixed = int(np.random.SeedSequence([seed, epoch, process]).generate_state(1)[0])
    random.seed(mixed)
    np.random.seed(mixed)
    torch.manual_seed(mixed)


def _plain(inputs: Inputs) -> Any:
    if inputs.kwargs:
        return inputs.kwargs
    return inputs.args[0] if len(inputs.args) == 1 else inputs.args


def _mixed(batch: Batch, mixup: Any) -> Batch:
    if batch.own_loss:
        hint = "batches of (inputs, targets), the inputs a dict"
        raise InputError(
            "the model works out its loss by itself, of labels that are one class each", path="mixup", hint=hint
        )
    try:
        inputs, targets = mixup(_plain(batch.inputs), batch.targets)
    except TorchTrimError:
        raise
    except (AssertionError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise InputError(f"mixup refuses a batch: {error}", path="mixup", found=batch.inputs.describe()) from error
    return Batch(Inputs.of(inputs), targets)


def known_length(data: Iterable[Any]) -> int | None:
    """How many batches there are; `None` where that is not known before they were gone through."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
