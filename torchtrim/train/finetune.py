"""`finetune`: train what is left of a model, on one machine or many, with what a good training needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from torchtrim.errors import InputError, ModelError, SelectionError
from torchtrim.graph.copying import is_meta, kept_modes, kept_random_state, unwrap
from torchtrim.graph.execution import known_inputs, refuse_lazy
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.train.accelerating import accelerating
from torchtrim.train.distiller import Distiller
from torchtrim.train.ema import Averaged
from torchtrim.train.groups import param_groups
from torchtrim.train.loop import Loop, known_length, seed_all
from torchtrim.train.mixing import mixing
from torchtrim.train.objective import Batch, Criterion, Metric, Objective
from torchtrim.train.outcome import Epoch, FineTuning
from torchtrim.train.pruner_choice import PrunerChoice, pruner_of
from torchtrim.train.rates import OptimizerChoice, Rates, ScheduleChoice, optimizer_of
from torchtrim.train.shares import Shares
from torchtrim.train.sparsity import SparsityPenalty
from torchtrim.train.stages import Stages, Unfreeze
from torchtrim.train.training_run import TrainingRun
from torchtrim.train.watching import Watching


def finetune(
    model: nn.Module,
    train_data: Iterable[Any],
    val_data: Iterable[Any] | None = None,
    *,
    epochs: int = 3,
    unfreeze: Unfreeze = None,
    lr: float = 1e-3,
    layer_decay: float = 1.0,
    lrs: Mapping[str, float] | None = None,
    weight_decay: float = 0.05,
    optimizer: OptimizerChoice = "adamw",
    schedule: ScheduleChoice = "cosine",
    warmup: float = 0.0,
    schedule_by: Literal["step", "epoch"] | None = None,
    criterion: Criterion | None = None,
    label_smoothing: float = 0.0,
    mixup: Any = None,
    metric: Metric | None = None,
    teacher: Any = None,
    distill: Mapping[str, Any] | None = None,
    pruner: PrunerChoice = None,
    penalty: Any = None,
    precision: Literal["bf16", "fp16"] | None = None,
    accumulate: int = 1,
    clip_norm: float | None = None,
    ema: float | None = None,
    patience: int | None = None,
    keep: Literal["best", "last"] | None = None,
    folder: str | Path | None = None,
    resume: bool = False,
    tensorboard: str | Path | None = None,
    on_epoch: Callable[[int, Epoch], object] | None = None,
    seed: int = 0,
    example_inputs: ExampleInputs | None = None,
    accelerator: Any = None,
) -> FineTuning:
    """Train a model in place.

    Under `torchrun` or `accelerate launch` the same call trains in many processes: each takes its rows of every batch,
    so that the steps are those of one process with the same batches (batch norms aside, which see only the rows
    of their process), and rank 0 alone writes. The data comes in the same order in each process as long as the random
    state decides it (a `DataLoader` with `shuffle=True`); a batch size is that of all processes together.

    A training that fails (a batch that does not fit, a loss that is not finite, ctrl-C) leaves the model as it was
    after the last whole epoch, or before the first, and in the folder that from which it can be resumed. The
    parameters stay the same objects, and `requires_grad`, modes and random states are as they were afterwards.

    Memory: that of the training itself, a copy of the model (the last whole epoch), another for the best epoch, and one
    for `ema`. The model is trained on accelerate's device, and goes back to where it was.

    Args:
        model: The model, not a wrapped one; of several outputs the logits, or the first, are trained.
        train_data: `(inputs, targets)` batches, or dicts with `labels` among the forward's arguments; a `DataLoader`,
            or whatever can be gone through once an epoch. With a teacher, targets may be missing.
        val_data: Batches to measure on after each epoch.
        epochs: Passes over the data.
        unfreeze: What learns: `None` or `"all"`: all that is not frozen; `"head"`: the head alone; `"gradual"`: the
            head first, then more with every epoch, the last layers first; or a dict from epochs (the first is 0) to
            what learns from then on, too: `"head"`, `"all"`, paths, globs, types, predicates.
        lr: The largest learning rate.
        layer_decay: As for `param_groups`.
        lrs: As for `param_groups`: rates by path.
        weight_decay: As for `param_groups`. These four are for the optimizers that are made here, of all that learns
            in any stage.
        optimizer: `"adamw"`, `"sgd"` (Nesterov momentum 0.9), an optimizer of one's own, or a function of parameter
            groups that makes one.
        schedule: `"cosine"`, `"linear"`, `"constant"`, `"plateau"`, a torch scheduler, or a function of the optimizer
            that makes one.
        warmup: The rates rise during so many steps, or, below 1, so large a share of all.
        schedule_by: Whether a scheduler of one's own goes on by `"step"` or by `"epoch"` (`OneCycleLR` and `CyclicLR`
            by step, all others by epoch where this is left out).
        criterion: `criterion(output, targets)`, a mean over rows. Left out: cross-entropy for classes, the mean
            squared error for other numbers, and the model's own loss where the labels are among its arguments.
        label_smoothing: Of the cross-entropy, in training.
        mixup: `mixup(inputs, targets)` as timm's `Mixup` and torchvision's `MixUp` and `CutMix` are; or the alpha of a
            `torchvision.transforms.v2.MixUp`.
        metric: `metric(output, targets)`, a mean over rows, more of it being better. Left out: accuracy, for classes
            (targets of -100 do not count). With a teacher both are given the output that the student learns by.
        teacher: A model to imitate (with a new `Distiller`), or a `Distiller` of the model.
        distill: Options of that `Distiller`: `temperature`, `alpha`, `hints`, ...; hints are lined up by path through
            the model's history unless they are given, or there are no places that both have.
        pruner: A `MagnitudePruner` of the model, a schedule of sparsity for a new one, or a function of the model
            and the optimizer that makes one. Its `step()` follows each of the optimizer's, `finish()` the last.
        penalty: A `SparsityPenalty` of the model.
        precision: `"bf16"` or `"fp16"`: mixed precision.
        accumulate: Batches of one step; the step is that of one batch with all their rows.
        clip_norm: Scale the gradients of a step down to this norm.
        ema: Decay of an exponential moving average of the weights: what is measured and kept is the average.
        patience: End when so many epochs in a row were no better than the best before them.
        keep: `"best"`: the weights of the epoch with the best metric on the validation data (or the smallest loss);
            `"last"`. Left out: the best where there is validation data. With a pruner, only epochs at the final
            sparsity count.
        folder: Where to write `last.trim`, `best.trim` and `state.pt` after each epoch, each replaced in one step.
        resume: Go on with the training in `folder`, where there is one, after its last whole epoch: to the same bits
            as if nothing had happened, in one process. Give the same arguments.
        tensorboard: A folder for TensorBoard.
        on_epoch: Called with the number of each epoch, from 1, and what it gave.
        seed: Of the order of the data, dropout and whatever else draws random numbers: the same weights again on the
            same machine, with the same number of threads and processes.
        example_inputs: What the forward takes, for finding the head and the order of layers; the model's history, or
            else the first batch tells.
        accelerator: An `accelerate.Accelerator` of one's own.

    Raises:
        InputError: Data without batches, without targets, or such as do not fit the model; an option out of range.
        ModelError: The loss became infinite or NaN; says in which step.
        SelectionError: Nothing is trainable, or a rate is out of range.
        HeadError: There is no head to train alone.
        PathError: A path that does not exist.
        CheckpointError: The folder cannot be written, or holds another training.
        MissingDependency: accelerate (or TensorBoard) is not installed.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> x = torch.randn(64, 4)
        >>> batches = [(rows, (rows[:, 0] > 0).long()) for rows in x.split(16)]
        >>> done = finetune(net, batches, batches, epochs=12, lr=0.05, warmup=0.1)
        >>> done.epochs[-1].val_metric > 0.9
        True
    """
    start = time.perf_counter()
    model = _fit(model)
    _check(epochs, accumulate, clip_norm, patience, keep, seed, resume, folder)
    _refuse_idle(model, optimizer, layer_decay, lrs, penalty, teacher, label_smoothing)
    with ExitStack() as stack:
        fabric = stack.enter_context(accelerating(accelerator, precision))
        if fabric.device.type == "cuda":
            torch.cuda.init()  # else there is no random state of it to keep
        for kept in (kept_random_state(), kept_modes(model), _kept_device(model, fabric.device)):
            stack.enter_context(kept)
        seed_all(seed, 0)
        training, validation = _shares(train_data, fabric), None if val_data is None else _shares(val_data, fabric)
        inputs = _inputs(model, example_inputs, train_data, labelled=teacher is None)
        stages = Stages(model, unfreeze, epochs, inputs)
        stack.callback(stages.leave)
        distiller = stack.enter_context(
            _distilling(model, teacher, distill, criterion, label_smoothing, inputs, fabric.device)
        )
        groups = param_groups(
            model, lr, layer_decay=layer_decay, lrs=lrs, weight_decay=weight_decay, example_inputs=inputs
        )
        projections = [] if distiller is None else list(distiller.projections.parameters())
        if projections:
            groups.append({"params": projections, "lr": lr, "weight_decay": 0.0, "name": "projections"})
        rule = optimizer_of(optimizer, groups, model)
        if projections and isinstance(optimizer, torch.optim.Optimizer):
            _add(rule, projections)
        batches = known_length(training)
        steps = None if batches is None else -(-batches // accumulate)
        rates = Rates.of(schedule, rule, epochs=epochs, steps=steps, warmup=warmup, by=schedule_by)
        thinning = pruner_of(pruner, model, rule)
        average = None if ema is None else Averaged(model, ema)

        def after_step() -> None:
            if thinning is not None:
                thinning.step()
            if average is not None:
                average.update()

        loop = Loop(
            model,
            fabric,
            rule,
            rates,
            Objective(_criterion_of(distiller, criterion), label_smoothing, distiller),
            metric,
            distiller=distiller,
            mixup=mixing(mixup, model, inputs, fabric.device),
            after_step=after_step,
            penalty=penalty,
            accumulate=accumulate,
            clip_norm=clip_norm,
            seed=seed,
        )
        settings = {
            "epochs": epochs, "batches": batches, "lr": lr, "layer_decay": layer_decay, "weight_decay": weight_decay,
            "lrs": None if lrs is None else dict(lrs), "accumulate": accumulate, "clip_norm": clip_norm, "ema": ema,
            "seed": seed, "label_smoothing": label_smoothing, "warmup": warmup, "precision": fabric.mixed_precision,
            "optimizer": type(rule).__name__,
            "schedule": schedule if isinstance(schedule, str) else type(rates.scheduler).__name__,
            "unfreeze": repr(unfreeze), "teacher": teacher is not None,
            "distill": None if distiller is None else _asked(distiller, weighed=distiller is not teacher),
            "pruner": type(thinning).__name__,
        }  # fmt: skip
        choose = (keep or ("best" if validation is not None else "last")) == "best"
        sources = [train_data, val_data]
        run = TrainingRun(
            loop, stages, thinning, average, distiller, settings, epochs, patience, folder, choose, sources
        )
        run.begin(resume)
        name = "accuracy" if metric is None else getattr(metric, "__name__", type(metric).__name__)
        watching = stack.enter_context(Watching(fabric, epochs, batches, name, tensorboard, thinning))
        ended = run.epochs(training, validation, watching, on_epoch)
        found = run.finish(validation)
        trained = run.done[-1].trained
        total = sum(parameter.numel() for parameter in model.parameters())
        measured = any(epoch.metric is not None or epoch.val_metric is not None for epoch in run.done)
        return FineTuning(
            epochs=tuple(run.done),
            best=run.best,
            kept=found,
            ended=ended,
            metric=name if measured else None,
            trained=trained,
            frozen=total - trained,
            rows=run.rows,
            processes=fabric.num_processes,
            device=str(fabric.device),
            precision="float32" if fabric.mixed_precision == "no" else fabric.mixed_precision,
            seconds=time.perf_counter() - start,
            folder=None if folder is None else Path(folder),
            notes=tuple(run.notes),
        )


def _fit(model: nn.Module) -> nn.Module:
    model = unwrap(model)
    refuse_lazy(model)
    if is_meta(model):
        raise ModelError("weights on the meta device have no values to train", found=type(model).__name__)
    if next(model.parameters(), None) is None:
        raise ModelError("a model without parameters has nothing to train", found=type(model).__name__)
    return model


def _check(
    epochs: object,
    accumulate: object,
    clip_norm: object,
    patience: object,
    keep: object,
    seed: object,
    resume: bool,
    folder: object,
) -> None:
    for name, value, least in (("epochs", epochs, 1), ("accumulate", accumulate, 1), ("patience", patience, 1)):
        if value is None and name == "patience":
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise InputError("a whole number above 0", path=name, found=repr(value))
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise InputError("a seed is a whole number from 0 up", path="seed", found=repr(seed))
    if clip_norm is not None and (not isinstance(clip_norm, (int, float)) or not clip_norm > 0):
        raise InputError("a norm is above 0", path="clip_norm", found=repr(clip_norm))
    if keep not in (None, "best", "last"):
        raise InputError("which weights to keep", path="keep", found=keep, expected="best or last")
    if resume and folder is None:
        raise InputError("there is nothing to go on from", path="resume", hint="folder=, where the training was saved")


def _refuse_idle(
    model: nn.Module,
    optimizer: OptimizerChoice,
    layer_decay: float,
    lrs: Mapping[str, float] | None,
    penalty: Any,
    teacher: Any,
    label_smoothing: float,
) -> None:
    """Refuse what would do nothing."""
    if isinstance(optimizer, torch.optim.Optimizer):
        for name, given in (("layer_decay", layer_decay != 1), ("lrs", lrs is not None)):
            if given:
                hint = "a function of parameter groups: lambda groups: torch.optim.SGD(groups, momentum=0.9)"
                raise InputError("an optimizer of one's own has its rates already", path=name, hint=hint)
    if penalty is not None and not isinstance(penalty, SparsityPenalty):
        raise InputError("not a penalty", path="penalty", found=type(penalty).__name__, expected="a SparsityPenalty")
    if penalty is not None and penalty.model is not model:
        raise InputError("the penalty is of another model", path="penalty", found=type(penalty.model).__name__)
    if isinstance(teacher, Distiller) and label_smoothing:
        raise InputError("a Distiller has its own", path="label_smoothing", hint="Distiller(..., label_smoothing=)")


def _criterion_of(distiller: Distiller | None, given: Criterion | None) -> Criterion | None:
    """What is measured on validation data is what was learnt from labels."""
    return distiller.criterion if given is None and distiller is not None else given


def _shares(data: Iterable[Any], fabric: Any) -> Shares:
    return Shares(data, fabric.process_index, fabric.num_processes)


def _inputs(model: nn.Module, given: ExampleInputs | None, data: Iterable[Any], *, labelled: bool) -> Inputs:
    """What the forward takes: as given, as the history knows, or as the first batch shows."""
    if given is not None:
        return Inputs.of(given)
    known = known_inputs(model)
    if known is not None:
        return known
    if isinstance(data, Iterator):
        raise InputError(
            "an iterator can be gone through once", path="train_data", hint="a list, a DataLoader, or example_inputs="
        )
    first = next(iter(data), None)
    if first is None:
        raise InputError("the data gave no batches", path="train_data")
    return Batch.of(first, model, labelled=labelled, apart=not labelled).inputs


@contextmanager
def _kept_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Inside, the model is on a device; the parameters stay the same objects."""
    before = next(model.parameters()).device
    moves = before.type != device.type or before.index != device.index
    if moves:
        model.to(device)
    try:
        yield
    finally:
        if moves:
            model.to(before)


@contextmanager
def _distilling(
    model: nn.Module,
    teacher: Any,
    options: Mapping[str, Any] | None,
    criterion: Criterion | None,
    label_smoothing: float,
    inputs: Inputs,
    device: torch.device,
) -> Iterator[Distiller | None]:
    if teacher is None:
        if options is not None:
            raise InputError("there is nobody to imitate", path="distill", hint="teacher=")
        yield None
        return
    if isinstance(teacher, Distiller):
        if options is not None:
            raise InputError("a Distiller has its options already", path="distill", found=list(options))
        if unwrap(teacher.student) is not model:
            raise InputError("the Distiller is another model's", path="teacher", found=type(teacher.student).__name__)
        yield teacher.to(device)
        return
    given: dict[str, Any] = {"criterion": criterion, "label_smoothing": label_smoothing, "example_inputs": inputs}
    given |= options or {}
    with ExitStack() as stack:
        if next(unwrap(teacher).parameters(), None) is not None:
            stack.enter_context(_kept_device(unwrap(teacher), device))
        if "hints" in given or given.get("cache"):  # a cache goes without hints
            made = Distiller(model, teacher, **given)
        else:
            try:
                made = Distiller(model, teacher, hints="auto", **given)
            except SelectionError:  # they have no place in common: the outputs alone teach
                made = Distiller(model, teacher, **given)
        yield stack.enter_context(made).to(device)


def _asked(distiller: Distiller, *, weighed: bool) -> dict[str, Any]:
    """What decides a distillation, as plain data. The weights of a user's own may change while it goes on."""
    return {
        "temperature": distiller.temperature,
        "task": distiller.task,
        "label_smoothing": distiller.label_smoothing,
        "hints": {name: f"{hint.kind} {hint.student} {hint.teacher}" for name, hint in distiller.hints.items()},
        "weights": dict(distiller.weights) if weighed else sorted(distiller.weights),
    }


def _add(optimizer: torch.optim.Optimizer, projections: list[nn.Parameter]) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [parameter for parameter in projections if id(parameter) not in held]:
        optimizer.add_param_group({"params": missing})
