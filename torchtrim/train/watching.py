"""What a person sees of a training: a progress bar in a terminal, and TensorBoard."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from torchtrim.errors import MissingDependency
from torchtrim.train.meter import Meter
from torchtrim.train.outcome import Epoch

_EVERY = 0.25  # seconds between two looks at the loss, each of which a GPU waits for


class Watching:
    """A progress bar with loss, metric, rate and the time left; and TensorBoard's numbers, where they are asked for.

    Args:
        accelerator: accelerate's: only its main process tells anything.
        epochs: How many there are.
        batches: Batches in an epoch; `None` where that is not known.
        metric: The name of the metric.
        tensorboard: A folder for TensorBoard.
        pruner: Writes its own numbers there.

    Raises:
        MissingDependency: TensorBoard is not installed.
    """

    def __init__(
        self,
        accelerator: Any,
        epochs: int,
        batches: int | None,
        metric: str,
        tensorboard: str | Path | None = None,
        pruner: Any = None,
    ) -> None:
        console = Console(file=sys.stderr)
        self._epochs, self._batches, self._metric, self._pruner = epochs, batches, metric, pruner
        self._seen, self._text, self._steps = 0.0, "", 0
        self._writer: Any = None
        if tensorboard is not None and accelerator.is_main_process:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError as error:
                hint = 'pip install "torchtrim[tensorboard]"'
                raise MissingDependency("TensorBoard is not installed", hint=hint) from error
            self._writer = SummaryWriter(str(tensorboard))
        hidden = not console.is_terminal or not accelerator.is_main_process
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._hidden = hidden
        self._progress = Progress(*columns, console=console, disable=hidden)
        self._task = self._progress.add_task("training", total=None if batches is None else epochs * batches)

    def __enter__(self) -> Watching:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def begin(self, number: int) -> None:
        """An epoch begins, the first being 0."""
        done = 0 if self._batches is None else number * self._batches
        self._steps = done if self._batches is not None else self._steps
        self._progress.update(self._task, completed=self._steps, description=f"epoch {number + 1}/{self._epochs}")
        self._text = f"epoch {number + 1}/{self._epochs}"

    def step(self, batches: int, meter: Meter, optimizer: torch.optim.Optimizer) -> None:
        """A step was made of so many batches."""
        self._steps += batches
        now = time.monotonic()
        if self._hidden or now - self._seen < _EVERY:
            return
        self._seen = now
        metric = meter.now("metric")
        told = f"loss {meter.now('loss'):.4f}" + ("" if metric != metric else f"  {self._metric} {metric:.3f}")
        rate = max(group["lr"] for group in optimizer.param_groups)
        text = f"{self._text}  {told}  lr {rate:.2g}"
        self._progress.update(self._task, completed=self._steps, description=text)

    def epoch(self, number: int, epoch: Epoch) -> None:
        """An epoch ended."""
        self._progress.update(self._task, completed=self._steps)
        if self._writer is None:
            return
        for name, value in epoch.to_dict().items():
            values = value if isinstance(value, dict) else {"": value}
            for part, each in values.items():
                if isinstance(each, (int, float)):
                    self._writer.add_scalar(f"{name}/{part}" if part else name, each, number)
        if self._pruner is not None:
            self._pruner.log(self._writer)
        self._writer.flush()
