"""Run an ONNX file beside the PyTorch model it came from, and compare."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from torchtrim.bench.openvino_session import open_session
from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportMismatch, InputError, ModelError
from torchtrim.export.compare import TOLERANCES, OutputError, Tally, Tolerance, output_of_classes
from torchtrim.export.outputs import named_outputs
from torchtrim.export.repeat import differing, module_that_differs
from torchtrim.export.rounding import InDouble, Rounding, rounding_of
from torchtrim.export.runs import Data, Run, feed_of, runs_of
from torchtrim.export.scheme import scheme_of
from torchtrim.export.stand_in import run_once, stand_in
from torchtrim.export.valid import check_file
from torchtrim.export.verification import Verification, VerificationFailed
from torchtrim.graph.copying import is_meta, kept_random_state, unwrap
from torchtrim.graph.inputs import ExampleInputs

if TYPE_CHECKING:
    from torchtrim.export.layers import LayerComparison

__all__ = ["Data", "Verification", "VerificationFailed", "scheme_of", "verify_onnx"]

_ROWS = 2  # that the layers are compared on at first: all are given out, each group of them by a run of its own


def verify_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    data: Data | None = None,
    *,
    tolerance: float | Tolerance | None = None,
    example_inputs: ExampleInputs | None = None,
    providers: Sequence[str] | None = None,
    max_batches: int | None = None,
    max_drop: float | None = None,
    reference: str | os.PathLike[str] | None = None,
) -> Verification:
    """Run an ONNX file and the PyTorch model on the same inputs, and compare the outputs.

    The file is first held against ONNX's own rules. Every batch of the data is compared, the first one also at batch
    1, at another batch size, and, where the file leaves height, width or a length open, at other sizes that the model
    takes; a file of one batch size gets the rows in portions. Rows that are made up for this are like those of the
    example, and differ from them. The model runs in eval mode and is left as it was.

    A NaN on either side, or an infinity on one side only, is past every tolerance; numbers below 1e-30 count as zero.
    The file and the model run twice on the first batch: of a file that gives other values each time, the farther ones
    count, and that is said; a model that does so cannot be compared with.

    Where a float32 file is past the default tolerance, a copy of the model runs in double precision too, if it can.
    The difference is rounding where each row of the file is off by at most four times as much as the model's own row
    in float32, or 1e-3 of the largest value; the file passes then, and `notes` tells both errors. Neither may be past a
    tenth of the largest value; what changes from one time to the next, or draws random numbers, is no rounding. A
    tolerance that is given is kept as it is.

    Args:
        path: The ONNX file.
        model: The model it was exported from.
        data: Batches (tensors, `(inputs, targets)` pairs or dicts), or one example: a tensor, or a tuple or dict of the
            forward's arguments. Targets that are whole numbers, one a row, are the labels of the first output of shape
            `(batch, classes)`: with them the accuracy of the model and of the file is told. Negative ones do not count.
        tolerance: The largest error allowed, relative to the reference's largest absolute value; or a `Tolerance`.
            By default what suits the file, see `TOLERANCES`: 1e-3 for float32 and float64, 2e-2 for fp16, 1e-1 for
            bf16; for dynamic int8 a cosine of 0.98 and, on 50 rows or more, a top-1 agreement of 95 %; for static and
            mixed int8 0.95 and 90 %; for weights of 4 or 8 bits 0.98 and 90 %.
        example_inputs: The same as one example in `data`; what the model's history recorded where both are left out.
        providers: ONNX Runtime's execution providers; the CPU's by default.
        max_batches: Stop after this many batches of `data`.
        max_drop: The largest loss of accuracy, 0.01 for one point; of top-1 agreement where there are no labels. In
            place of the tolerance's own top-1 agreement.
        reference: The same model's float ONNX file. Where the comparison fails, the two files are compared node by
            node, and the error names the first one that goes wrong (`error.layers`): on two rows of the first batch,
            and on all of it where these show nothing.

    Raises:
        ExportMismatch: An output is past the tolerance, or holds NaN; `error.verification` says how far it is.
        ExportError: No such file, a file that was cut short or altered, or one that ONNX Runtime cannot run.
        InputError: No inputs, inputs without a row, or inputs that the file or the model does not take; labels past the
            last class; `max_drop` where no output has classes.
        ModelError: The model has no weights to compare with, or gives other values on the same inputs.
    """
    wanted = None if tolerance is None else Tolerance.of(tolerance)
    if max_batches is not None and max_batches < 1:
        raise InputError("max_batches must be positive", found=max_batches)
    inner = unwrap(model)
    if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
        OnnxSession(path)  # which says so
    graph = check_file(path)
    session = _opened(path, providers)
    if is_meta(inner):
        raise ModelError("the model has no weights to compare with", found="the meta device", hint="load weights first")
    scheme = scheme_of(session.path)
    limits = wanted or TOLERANCES[scheme]
    if max_drop is not None:
        limits = replace(limits, max_drop=max_drop)
    beside: nn.Module | None = None
    double: InDouble | None = None
    tallies: dict[str, Tally] = {name: Tally(name) for name in session.output_names}
    sizes: list[int] = []
    shapes: dict[tuple[int, ...], None] = {}
    notes: list[str] = []
    first: Run | None = None
    classes: str | None = None
    with kept_random_state():
        for run in runs_of(data, example_inputs, inner, session, graph, max_batches):
            beside = beside or stand_in(inner, run.inputs)
            if run.resized and not _takes(beside, run):
                notes.append(f"the model does not take {run.inputs.describe()}, so the file was not run on it")
                continue
            if first is None and limits.rounding:
                double = InDouble(beside)
            told, classes = _compare(beside, session, run, tallies, classes, limits, double, twice=first is None)
            if told:
                double = None  # what changes from one time to the next is no rounding
            notes += told
            first = first or run
            sizes.append(run.inputs.batch)
            if run.inputs.batch:
                shapes[tuple(run.inputs.tensors[0].shape)] = None
    if first is None or not sum(sizes):
        raise InputError("there is no data to compare on", found="batches without rows" if sizes else "no batches")
    if limits.max_drop is not None and not any(tally.top1[1] for tally in tallies.values()):
        raise InputError(
            "max_drop is about classes, and no output has them",
            path=path,
            found={name: list(tally.shape) for name, tally in tallies.items()},
            expected="an output of shape (batch, classes)",
            hint="tolerance= alone",
        )
    outputs = tuple(tally.result(limits) for tally in tallies.values())
    notes += _explained(outputs, limits)
    verification = Verification(
        path=Path(path),
        provider=session.provider,
        batches=tuple(sorted(set(sizes))),
        rows=sum(sizes),
        tolerance=limits,
        outputs=outputs,
        scheme=scheme,
        shapes=tuple(shapes),
        notes=tuple(notes),
    )
    if not verification.passed:
        broken = any(tally.wrong is not None for tally in tallies.values())
        layers = None if reference is None else _layers(reference, session, inner, first, few=not broken)
        raise _failure(verification, tallies, layers)
    return verification


def _explained(outputs: Sequence[OutputError], limits: Tolerance) -> list[str]:
    """What passed though it is past the tolerance, since the model's own rounding is as large."""
    return [
        f"{output.name!r}: a relative error of {output.relative:.1e} is rounding: beside double precision the model is "
        f"off by {output.model_rounding:.1e}, the file by {output.file_rounding:.1e}"
        for output in outputs
        if output.passed and output.model_rounding is not None and output.relative > (limits.relative or 0.0)
    ]


def _layers(
    reference: str | os.PathLike[str], session: OnnxSession, model: nn.Module, run: Run, *, few: bool
) -> LayerComparison:
    """Where the file goes wrong. Most errors show in any row, and where two show none, all are looked at.

    What is no number may be so in one row alone: then, not `few`, all rows are looked at from the start.
    """
    from torchtrim.export.layers import compare_layers

    if few and session.fixed_batch is None and run.inputs.batch > _ROWS:
        found = compare_layers(reference, session.path, feed_of(session, model, run.inputs.with_batch(_ROWS)))
        if found.first is not None:
            return found
    return compare_layers(reference, session.path, run.feed)


def _opened(path: str | os.PathLike[str], providers: Sequence[str] | None) -> OnnxSession:
    """The file, ready to run. One for a GPU that runs on the processor runs node by node: the kernels that it would be
    fused into here saturate on some processors, where a GPU's do not."""
    session = open_session(path, providers=providers)
    elsewhere = session.metadata.get("torchtrim.target") in ("cuda", "tensorrt")
    if elsewhere and session.provider == "CPUExecutionProvider":
        return open_session(path, providers=providers, optimise=False)
    return session


def _takes(model: nn.Module, run: Run) -> bool:
    try:
        run_once(model, run.inputs)
    except InputError:
        return False
    return True


def _compare(
    model: nn.Module,
    session: OnnxSession,
    run: Run,
    tallies: Mapping[str, Tally],
    classes: str | None,
    limits: Tolerance,
    double: InDouble | None,
    *,
    twice: bool,
) -> tuple[list[str], str | None]:
    """Add a run to the tallies; twice over, it says what differs from one time to the next.

    Returns:
        What differs, and the output that the labels belong to: the one of the first run that had labels.
    """
    expected = named_outputs(run_once(model, run.inputs))
    found = session.run(run.feed)
    if len(expected) != len(found):
        raise ExportMismatch(
            "the file and the model have another number of outputs",
            path=session.path,
            found=session.output_names,
            expected=list(expected),
        )
    references = {name: _numpy(tensor) for name, tensor in zip(tallies, expected.values(), strict=True)}
    values = dict(zip(tallies, found, strict=True))
    notes = []
    if twice and run.inputs.batch:
        again = dict(zip(tallies, map(_numpy, named_outputs(run_once(model, run.inputs)).values()), strict=True))
        for name in differing(references, again):
            raise ModelError(
                "the model gives other values on the same inputs in eval mode, so no file can be compared with it",
                path=module_that_differs(model, run.inputs),
                found=f"{name!r} differs by {_by(references[name], again[name])}",
                hint="make it repeatable: no dropout or noise that stays on in eval mode",
            )
        repeated = dict(zip(tallies, session.run(run.feed), strict=True))
        for name in differing(values, repeated):
            notes.append(
                f"the file gives other values each time: {name!r} differs by {_by(values[name], repeated[name])}; "
                "the farther ones were compared"
            )
            if _distance(references[name], repeated[name]) > _distance(references[name], values[name]):
                values[name] = repeated[name]
    if classes is None and run.targets is not None:
        classes = output_of_classes(references, run.targets)
    rounding = {} if double is None or notes else _rounding(double, run, references, values, tallies, limits)
    for name, tally in tallies.items():
        targets = run.targets if name == classes else None
        tally.add(references[name], values[name], session.path, targets, rounding.get(name))
    return notes, classes


def _rounding(
    double: InDouble,
    run: Run,
    references: Mapping[str, NDArray[Any]],
    values: Mapping[str, NDArray[Any]],
    tallies: Mapping[str, Tally],
    limits: Tolerance,
) -> dict[str, Rounding]:
    """How far the model and the file are from double precision, in the outputs where the two differ by too much."""
    past = [name for name, each in references.items() if tallies[name].past(each, values[name], limits.relative)]
    exact = double.outputs(run.inputs) if past else None
    if exact is None or len(exact) != len(tallies):
        return {}
    doubles = dict(zip(tallies, exact, strict=True))
    found = {name: rounding_of(references[name], values[name], doubles[name], limits.relative) for name in past}
    return {name: rounding for name, rounding in found.items() if rounding is not None}


def _distance(one: NDArray[Any], other: NDArray[Any]) -> float:
    if one.shape != other.shape or not one.size:
        return 0.0
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())


def _by(one: NDArray[Any], other: NDArray[Any]) -> str:
    return f"up to {_distance(one, other):.2e}" if one.shape == other.shape else "its shape"


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def _failure(
    verification: Verification, tallies: Mapping[str, Tally], layers: LayerComparison | None
) -> VerificationFailed:
    worst = next(output for output in verification.outputs if not output.passed)
    found, expected = worst.missed[0]
    message = f"the output {worst.name!r} is too far from the PyTorch model's"
    hint: str | None = _hint(verification.tolerance)
    if tallies[worst.name].wrong is not None:
        message, hint = f"the output {worst.name!r} is no number that can be compared", None
    wrong = None if layers is None else layers.first or layers.worst
    if wrong is not None:
        message += f"; it goes wrong at the node {wrong.node!r} ({wrong.op})"
    found += "".join(f"; {note}" for note in verification.notes if note.startswith("the file gives"))
    error = VerificationFailed(message, path=verification.path, found=found, expected=expected, hint=hint)
    error.verification, error.layers = verification, layers
    return error


def _hint(limits: Tolerance) -> str:
    if limits.max_drop is not None:
        return "a larger max_drop=, if that loss is acceptable; or another scheme"
    return "a wider tolerance=, if that error is acceptable"
