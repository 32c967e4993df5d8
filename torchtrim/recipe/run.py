"""A recipe's run: from a named model to what its steps make of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.bench.machine import Machine, machine
from torchtrim.bench.table import Table
from torchtrim.checkpoint.save import save
from torchtrim.checkpoint.zoo import WEIGHT_ARGUMENTS, ZOOS
from torchtrim.edits.apply import apply
from torchtrim.edits.edit import Edit
from torchtrim.edits.history import History, history
from torchtrim.edits.module_spec import Trusted
from torchtrim.edits.plan import Plan, plan
from torchtrim.edits.prune import PruneChannels
from torchtrim.errors import RecipeError
from torchtrim.export.onnx import export_onnx
from torchtrim.export.report import ExportReport
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.execution import inputs_from_spec
from torchtrim.graph.held import hold, is_held
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.summary import Summary, short, summary
from torchtrim.models import NamedModel, load_model
from torchtrim.recipe.data import Batches, read_data
from torchtrim.recipe.form import DataSection, ExportSection, ModelSection, RecipeForm, TrainingSection
from torchtrim.search.prune import with_latencies
from torchtrim.train.accelerating import refuse_without_accelerate
from torchtrim.train.finetune import finetune
from torchtrim.train.freeze import freeze, unfreeze
from torchtrim.train.outcome import FineTuning

NET = "net.trim"
NEED_LABELS = ("taylor", "hessian")  # importances that look at gradients of the loss
NEED_DATA = (*NEED_LABELS, "apoz", "activation", "reconstruction")


@dataclass(frozen=True)
class RecipeRun:
    """What a recipe's run did.

    Attributes:
        folder: What it wrote.
        files: The files in it, by what they are.
        model: The model that came out, in eval mode.
        inputs: The example inputs.
        plan: What the edits were going to do.
        history: What they did.
        before: The model before the edits.
        after: The model after all steps.
        training: The training; `None` where there was none.
        export: The ONNX file; `None` where there is none.
        machine: What it was run on.
        seconds: How long it took.
    """

    folder: Path
    files: dict[str, Path]
    model: nn.Module = field(repr=False)
    inputs: Inputs = field(repr=False)
    plan: Plan
    history: History
    before: Summary
    after: Summary
    training: FineTuning | None
    export: ExportReport | None
    machine: Machine
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model and its tensors, as plain data that JSON can hold."""
        return {
            "folder": str(self.folder),
            "files": {name: str(path) for name, path in self.files.items()},
            "inputs": self.inputs.describe(),
            "plan": self.plan.to_dict(),
            "history": self.history.to_dict(weights=False),
            "before": self.before.to_dict(),
            "after": self.after.to_dict(),
            "training": None if self.training is None else self.training.to_dict(),
            "export": None if self.export is None else self.export.to_dict(),
            "machine": self.machine.to_dict(),
            "seconds": self.seconds,
        }

    def table(self) -> Table:
        """Before and after, and what was written."""
        before, after = self.before, self.after
        rows = [
            ("parameters", short(before.params), short(after.params), _share(before.params, after.params)),
            ("MACs", short(before.macs), short(after.macs), _share(before.macs, after.macs)),
            ("size, MB", f"{before.size_mb:.2f}", f"{after.size_mb:.2f}", _share(before.size_mb, after.size_mb)),
        ]
        notes = [f"{self.folder}: {', '.join(path.name for path in self.files.values())}; {self.seconds:.1f} s"]
        return Table("recipe", ("", "before", "after", "share"), tuple(rows), notes)

    def tables(self) -> tuple[Table, ...]:
        """All there is to see, one table a part."""
        parts = [self.table()]
        parts += [] if self.training is None else [self.training.table()]
        parts += [] if self.export is None else self.export.tables()
        return tuple(parts)

    def __str__(self) -> str:
        return "\n\n".join(table.text() for table in self.tables())

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())


def plan_recipe(form: RecipeForm, folder: Path, edits: Callable[[], list[Edit]], trusted: Trusted) -> Plan:
    """What a recipe's edits would do.

    Raises:
        RecipeError: The model is code that is not trusted, or its input is not known.
        TorchTrimError: The model cannot be made, or an edit cannot be done.
    """
    named, inputs = _start(form, folder, trusted)
    measured = with_latencies(named.model, inputs, edits, trusted=trusted)
    return plan(named.model, inputs, measured(), trusted=trusted)


def calibration_data(section: DataSection, inputs: Inputs, folder: Path, edits: Sequence[Edit]) -> Batches:
    """The batches that edits are fitted to: with labels where one of them looks at gradients of the loss.

    Raises:
        TorchTrimError: They cannot be read.
    """
    labelled = any(isinstance(edit, PruneChannels) and edit.importance in NEED_LABELS for edit in edits)
    return read_data(section, inputs, folder=folder, labelled=labelled)


def run_recipe(
    form: RecipeForm,
    folder: Path,
    edits: Callable[[], list[Edit]],
    trusted: Trusted,
    workshop: Path,
    place: Path,
) -> RecipeRun:
    """Do the steps of a recipe.

    Args:
        form: The recipe.
        folder: Where its relative paths start.
        edits: Gives its edits, each time with modules of their own.
        trusted: What it may import.
        workshop: Where the files are written.
        place: Where they will lie.

    Raises:
        TorchTrimError: What a step raises.
    """
    start = time.perf_counter()
    named, inputs = _start(form, folder, trusted)
    if form.training is not None:
        refuse_without_accelerate()
    # All data is looked at before any work is done.
    calibration = None if form.data is None else calibration_data(form.data, inputs, folder, edits())
    training = None if form.training is None else _training_data(form.training, inputs, folder)
    before = summary(named.model, inputs)
    with kept_random_state():
        torch.manual_seed(form.model.seed)
        edits = with_latencies(named.model, inputs, edits, data=calibration, trusted=trusted)
        planned = plan(named.model, inputs, edits(), trusted=trusted)
        torch.manual_seed(form.model.seed)
        net = apply(named.model, inputs, edits(), data=calibration, trusted=trusted)
    trained = (
        None if form.training is None or training is None else _train(net, form.training, training, inputs, named.model)
    )
    net.eval()
    files = {"checkpoint": place / NET}
    save(net, workshop / NET)
    report = None
    if form.export is not None:
        report = _export(net, inputs, form.export, calibration, workshop, place)
        files["onnx"] = report.path
    return RecipeRun(
        folder=place,
        files=files,
        model=net,
        inputs=inputs,
        plan=planned,
        history=history(net),
        before=before,
        after=summary(net, inputs),
        training=trained,
        export=report,
        machine=machine(),
        seconds=time.perf_counter() - start,
    )


def _start(form: RecipeForm, folder: Path, trusted: Trusted) -> tuple[NamedModel, Inputs]:
    named = named_model(form.model, folder, trusted)
    if form.input is not None:
        values: Any = {
            "args": [each.model_dump() for each in form.input] if isinstance(form.input, list) else [],
            "kwargs": {name: each.model_dump() for name, each in form.input.items()}
            if isinstance(form.input, dict)
            else {},
        }
        return named, inputs_from_spec(values)
    recorded = history(named.model).inputs
    if recorded is not None:
        return named, inputs_from_spec(recorded)
    if named.input_shape is None:
        raise RecipeError("nothing says which input this model takes", path="input", hint="input: [1, 3, 224, 224]")
    shape = [1, *named.input_shape]
    return named, inputs_from_spec({"args": [{"shape": shape, "dtype": "float32"}], "kwargs": {}})


def named_model(section: ModelSection, folder: Path, trusted: Trusted) -> NamedModel:
    """The model that a recipe starts from.

    Raises:
        RecipeError: It is code that is not trusted.
        ModelError: There is no such model.
    """
    name, (source, _, _) = section.name, section.name.partition(":")
    if name.endswith(".trim"):
        name = str(folder / name)
    elif source not in ZOOS and section.name not in ([trusted] if isinstance(trusted, str) else trusted):
        raise RecipeError(
            "the recipe's model is code to import, which is not trusted",
            path="model.name",
            found=section.name,
            expected="timm:NAME, torchvision:NAME or a .trim file",
            hint=f"--trust {section.name}, or run(trusted=[{section.name!r}]), if you know it",
        )
    refused = sorted(WEIGHT_ARGUMENTS.get(source, set()) & set(section.arguments))
    if refused:
        raise RecipeError(
            "this argument would read weights",
            path=f"model.arguments.{refused[0]}",
            hint="model.pretrained: true, or model.weights: FILE",
        )
    weights = None if section.weights is None else folder / section.weights
    return load_model(
        name,
        pretrained=section.pretrained,
        weights=weights,
        seed=section.seed,
        arguments=section.arguments,
        trusted=trusted,
    )


def _training_data(section: TrainingSection, inputs: Inputs, folder: Path) -> tuple[Batches, Batches | None]:
    data = read_data(section.data, inputs, folder=folder, labelled=True, seed=section.seed)
    if section.validation is None:
        return data, None
    return data, read_data(section.validation, inputs, folder=folder, labelled=True)


def _train(
    net: nn.Module,
    section: TrainingSection,
    data: tuple[Batches, Batches | None],
    inputs: Inputs,
    original: nn.Module,
) -> FineTuning:
    taught = None if section.teacher is None else original
    options = section.model_dump(exclude={"data", "validation", "freeze_upto", "teacher"})
    with _held(net, section.freeze_upto, inputs):
        return finetune(net, data[0], data[1], **options, teacher=taught, example_inputs=inputs)


@contextmanager
def _held(net: nn.Module, upto: str | None, inputs: Inputs) -> Iterator[None]:
    """Inside, all up to the end of a module is frozen; what was frozen before stays so afterwards."""
    if upto is None:
        yield
        return
    before = [name for name, parameter in net.named_parameters() if not parameter.requires_grad]
    held = [path for path, module in net.named_modules() if is_held(module)]
    frozen = freeze(net, upto=upto, example_inputs=inputs)
    try:
        yield
    finally:
        unfreeze(net, list(frozen.paths))
        for name in before:
            net.get_parameter(name).requires_grad_(False)
        for path in held:
            hold(net.get_submodule(path))


def _export(
    net: nn.Module, inputs: Inputs, section: ExportSection, data: Batches | None, workshop: Path, place: Path
) -> ExportReport:
    """The file, calibrated on the data or compared on a batch of it; told with the place where it will lie."""
    calibrated = section.quantize in ("static", "mixed", "auto")
    report = export_onnx(
        net,
        inputs,
        workshop / section.file,
        target=section.target,
        quantize=section.quantize,
        data=data if data is None or calibrated else list(islice(data, 1)),
        calibration=section.calibration,
        max_drop=section.max_drop,
        bits=section.bits,
        opset=section.opset,
        dynamic=section.dynamic,
        tolerance=section.tolerance,
        benchmark=section.benchmark,
    )
    return replace(
        report,
        path=place / section.file,
        files=tuple(place / file.name for file in report.files),
        verification=replace(report.verification, path=place / section.file),
    )


def _share(before: float, after: float) -> str:
    return f"{after / before:.1%}" if before else ""
