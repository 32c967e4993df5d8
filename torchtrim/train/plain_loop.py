"""A plain training loop: epochs over labelled batches, one optimizer, a cosine schedule."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.bench.table import Table
from torchtrim.errors import InputError, ModelError, nearest
from torchtrim.graph.copying import kept_modes, kept_random_state, unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.train.freeze import freeze
from torchtrim.train.groups import param_groups

OPTIMIZERS = ("adamw", "sgd")


@dataclass(frozen=True)
class Epoch:
    """One pass over the training data.

    Attributes:
        loss: Mean loss of the batches, while they were learnt.
        train_accuracy: Share of the rows that were right then; None where the targets are not classes.
        validation_loss: Mean loss on the validation data afterwards, in eval mode; None without such data.
        validation_accuracy: Share of its rows that were right.
    """

    loss: float
    train_accuracy: float | None
    validation_loss: float | None
    validation_accuracy: float | None


@dataclass(frozen=True)
class Training:
    """What a training did.

    Attributes:
        epochs: One entry for each pass.
        trained: How many parameters learnt.
        frozen: How many did not.
        rows: Rows in an epoch.
        seconds: How long it took.
    """

    epochs: tuple[Epoch, ...]
    trained: int
    frozen: int
    rows: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return {**asdict(self), "epochs": [asdict(epoch) for epoch in self.epochs]}

    def table(self) -> Table:
        """A row for each epoch."""
        rows = tuple(
            (
                str(number),
                f"{epoch.loss:.4f}",
                _percent(epoch.train_accuracy),
                "" if epoch.validation_loss is None else f"{epoch.validation_loss:.4f}",
                _percent(epoch.validation_accuracy),
            )
            for number, epoch in enumerate(self.epochs, start=1)
        )
        note = f"{self.trained:,} parameters trained, {self.frozen:,} frozen; {self.rows:,} rows an epoch"
        columns = ("epoch", "loss", "accuracy", "validation loss", "validation accuracy")
        return Table("training", columns, rows, [f"{note}; {self.seconds:.1f} s"])

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def train_plain(
    model: nn.Module,
    data: Iterable[Any],
    *,
    epochs: int = 1,
    lr: float = 1e-3,
    optimizer: str = "adamw",
    weight_decay: float = 0.05,
    layer_decay: float = 1.0,
    freeze_upto: str | None = None,
    validation: Iterable[Any] | None = None,
    seed: int = 0,
    example_inputs: ExampleInputs | None = None,
) -> Training:
    """Train a model in place, with cross-entropy for whole-number targets and the mean squared error for others.

    The learning rate falls from `lr` along a cosine, epoch by epoch. The same seed and data give the same weights
    again on the same machine and number of threads. What `freeze_upto` froze is free again afterwards, and the mode
    and the random state are as they were. A training that fails leaves the weights as they were before it.

    Args:
        model: The model; of several outputs the first is trained.
        data: `(inputs, targets)` batches, gone through once an epoch: a DataLoader, a list.
        epochs: Passes over the data.
        lr: The learning rate in the first epoch.
        optimizer: `"adamw"`, or `"sgd"` with Nesterov momentum 0.9.
        weight_decay: Weight decay of the weights; biases and norms have none.
        layer_decay: As for `param_groups`.
        freeze_upto: Hold all that runs up to the end of this module, batch-norm statistics included.
        validation: `(inputs, targets)` batches to measure on after each epoch.
        seed: Seed of dropout, and of whatever else draws random numbers in the forward.
        example_inputs: What the forward takes, for the order of layers.

    Raises:
        InputError: The data holds no batches, batches without targets, or targets that do not fit the output.
        SelectionError: A rate is out of range, or nothing is trainable.
        ModelError: The loss became infinite or NaN.
        PathError: `freeze_upto` does not exist.

    Example:
        >>> net = nn.Linear(4, 2)
        >>> batches = [(torch.eye(4), torch.tensor([0, 1, 0, 1]))]
        >>> training = train_plain(net, batches, epochs=20, lr=0.1)
        >>> training.epochs[-1].train_accuracy, training.trained
        (1.0, 10)
    """
    model = unwrap(model)
    _check(epochs, optimizer)
    start = time.perf_counter()
    with kept_random_state(), kept_modes(model), _kept_freezing(model), _undone_on_error(model), _progress() as tell:
        torch.manual_seed(seed)
        if freeze_upto is not None:
            freeze(model, upto=freeze_upto, example_inputs=example_inputs)
        groups = param_groups(
            model, lr=lr, layer_decay=layer_decay, weight_decay=weight_decay, example_inputs=example_inputs
        )
        rule = _optimizer(optimizer, groups, lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(rule, lambda done: 0.5 * (1 + math.cos(math.pi * done / epochs)))
        done: list[Epoch] = []
        rows = 0
        for number in range(epochs):
            model.train()
            tally = _Tally()
            for inputs, targets in _pairs(data, model, number):
                rule.zero_grad()
                loss = tally.add(_output(inputs.call(model)), targets)
                if not torch.isfinite(loss):
                    raise ModelError(
                        f"the loss is not finite in epoch {number + 1}", found=loss.item(), hint="a smaller lr"
                    )
                loss.backward()
                rule.step()
            schedule.step()
            held_out = None if validation is None else _measure(model, validation)
            done.append(
                Epoch(
                    tally.loss,
                    tally.accuracy,
                    None if held_out is None else held_out.loss,
                    None if held_out is None else held_out.accuracy,
                )
            )
            rows = tally.rows
            tell(number + 1, epochs, done[-1])
        rule.zero_grad()
        trained = sum(p.numel() for group in groups for p in group["params"])
    total = sum(parameter.numel() for parameter in model.parameters())
    return Training(tuple(done), trained, total - trained, rows, time.perf_counter() - start)


def _check(epochs: object, optimizer: str) -> None:
    if isinstance(epochs, bool) or not isinstance(epochs, int) or epochs < 1:
        raise InputError("epochs is a whole number above 0", found=epochs)
    if optimizer not in OPTIMIZERS:
        raise InputError("no such optimizer", found=optimizer, expected=OPTIMIZERS, hint=nearest(optimizer, OPTIMIZERS))


def _optimizer(name: str, groups: list[dict[str, Any]], lr: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, lr=lr)


class _Tally:
    """Losses and right answers, counted over batches."""

    def __init__(self) -> None:
        self.rows, self._loss, self._right, self._answers = 0, 0.0, 0, 0

    def add(self, output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The loss of a batch."""
        targets = targets.to(output.device)
        if targets.is_floating_point():
            _check_shape(output, targets, tuple(output.shape))
            loss = nn.functional.mse_loss(output, targets.to(output.dtype))
        else:
            _check_classes(output, targets)
            loss = nn.functional.cross_entropy(output, targets.long())
            self._right += int((output.argmax(1) == targets).sum())
            self._answers += targets.numel()
        self.rows += len(output)
        self._loss += loss.item() * len(output)
        return loss

    @property
    def loss(self) -> float:
        return self._loss / max(self.rows, 1)

    @property
    def accuracy(self) -> float | None:
        return self._right / self._answers if self._answers else None


def _check_classes(output: torch.Tensor, targets: torch.Tensor) -> None:
    if output.dim() < 2:
        raise InputError("whole-number targets are classes, and the model gives no scores for any", found=output.shape)
    _check_shape(output, targets, (output.shape[0], *output.shape[2:]))
    if targets.numel() and not 0 <= int(targets.min()) <= int(targets.max()) < output.shape[1]:
        raise InputError(
            "targets that are not among the classes",
            path="data",
            found=f"{int(targets.min())} to {int(targets.max())}",
            expected=f"0 to {output.shape[1] - 1}",
            hint="attach_head with another num_classes",
        )


def _check_shape(output: torch.Tensor, targets: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(targets.shape) != expected:
        raise InputError(
            f"the targets do not fit an output of shape {list(output.shape)}",
            path="data",
            found=list(targets.shape),
            expected=list(expected),
        )


def _measure(model: nn.Module, data: Iterable[Any]) -> _Tally:
    tally = _Tally()
    model.eval()
    with torch.no_grad():
        for inputs, targets in _pairs(data, model, 0):
            tally.add(_output(inputs.call(model)), targets)
    return tally


def _pairs(data: Iterable[Any], model: nn.Module, epoch: int) -> Iterator[tuple[Inputs, torch.Tensor]]:
    """The batches, on the model's device."""
    device = next(model.parameters()).device
    empty = True
    for batch in data:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2 or not isinstance(batch[1], torch.Tensor):
            raise InputError(
                "training needs labels: batches are (inputs, targets)", path="data", found=type(batch).__name__
            )
        empty = False
        yield Inputs.of(batch[0]).map(lambda tensor: tensor.to(device)), batch[1]
    if empty:
        again = "an iterator can be gone through once: give a list or a DataLoader" if epoch else None
        raise InputError(f"the data gave no batches in epoch {epoch + 1}", path="data", hint=again)


def _output(output: Any) -> torch.Tensor:
    """The output that is trained: the first tensor, where there are several (auxiliary heads come later)."""
    found = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
    if found is None:
        raise ModelError("the model returns no tensor to train", found=type(output).__name__)
    return found


@contextmanager
def _kept_freezing(model: nn.Module) -> Iterator[None]:
    """Give every parameter its `requires_grad` back, and every module the `train` that `freeze` may have replaced."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    ways = [(module, module.__dict__.get("train")) for module in model.modules()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        for module, way in ways:
            module.__dict__.pop("train", None)
            if way is not None:
                module.__dict__["train"] = way


@contextmanager
def _undone_on_error(model: nn.Module) -> Iterator[None]:
    tensors = [*model.parameters(), *model.buffers()]
    before = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, before, strict=True):
                tensor.copy_(value)
                tensor.grad = None
        raise


@contextmanager
def _progress() -> Iterator[Any]:
    """A bar, where a person is watching."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training", total=None)

        def tell(done: int, total: int, epoch: Epoch) -> None:
            text = f"training: loss {epoch.loss:.4f}"
            progress.update(task, description=text, completed=done, total=total)

        yield tell


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"
