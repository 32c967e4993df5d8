"""Run an ONNX file beside the PyTorch model it came from, and compare."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from torchtrim.bench.session import OnnxSession
from torchtrim.bench.table import Table
from torchtrim.errors import ExportMismatch, InputError, ModelError
from torchtrim.export.compare import TOLERANCES, OutputError, Tally, Tolerance
from torchtrim.export.inputs import arguments_of, in_order, input_names
from torchtrim.export.outputs import named_outputs
from torchtrim.export.rows import with_other_rows
from torchtrim.export.stand_in import run_once, stand_in
from torchtrim.graph.copying import is_meta, kept_random_state, unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs

Data: TypeAlias = "ExampleInputs | Iterable[Any]"


@dataclass(frozen=True)
class Verification:
    """A file that was run beside its model.

    Attributes:
        path: The file.
        provider: The ONNX Runtime provider it ran on.
        batches: The batch sizes it ran at.
        rows: How many rows were compared.
        tolerance: What was asked.
        outputs: The errors, one entry an output.
    """

    path: Path
    provider: str
    batches: tuple[int, ...]
    rows: int
    tolerance: Tolerance
    outputs: tuple[OutputError, ...]

    @property
    def passed(self) -> bool:
        """Whether every output is within the tolerance."""
        return all(output.passed for output in self.outputs)

    @property
    def max_abs(self) -> float:
        """The largest absolute error of any output."""
        return max(output.max_abs for output in self.outputs)

    @property
    def cosine(self) -> float:
        """The least cosine of any output."""
        return min(output.cosine for output in self.outputs)

    @property
    def top1(self) -> float | None:
        """The least top-1 agreement of the outputs that have one."""
        known = [output.top1 for output in self.outputs if output.top1 is not None]
        return min(known) if known else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        outputs = [{**asdict(output), "shape": list(output.shape)} for output in self.outputs]
        listed = {"path": str(self.path), "batches": list(self.batches), "outputs": outputs, "passed": self.passed}
        return {**asdict(self), **listed}

    def table(self) -> Table:
        """The errors as a table."""
        columns = ("output", "shape", "max error", "mean error", "relative", "cosine", "top-1", "within tolerance")
        rows = tuple(
            (
                output.name,
                str(list(output.shape)),
                f"{output.max_abs:.2e}",
                f"{output.mean_abs:.2e}",
                f"{output.relative:.2e}",
                f"{output.cosine:.5f}",
                "-" if output.top1 is None else f"{output.top1:.1%}",
                "yes" if output.passed else "NO",
            )
            for output in self.outputs
        )
        batches = ", ".join(map(str, self.batches))
        return Table(
            f"{self.path.name} against PyTorch",
            columns,
            rows,
            [f"{self.provider}; {self.rows} rows; batches {batches}"],
        )

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


class VerificationFailed(ExportMismatch):
    """The `ExportMismatch` that `verify_onnx` raises; `verification` holds what was measured."""

    verification: Verification


def verify_onnx(
    path: str | os.PathLike[str],
    model: nn.Module,
    data: Data | None = None,
    *,
    tolerance: float | Tolerance | None = None,
    example_inputs: ExampleInputs | None = None,
    providers: Sequence[str] | None = None,
    max_batches: int | None = None,
) -> Verification:
    """Run an ONNX file and the PyTorch model on the same inputs, at batch 1 and another, and compare the outputs.

    The model runs in eval mode and is left as it was. Where the example holds one row, the other batch is made of rows
    that are like it and differ. A NaN on either side, or an infinity on one side only, is past every tolerance.

    Args:
        path: The ONNX file.
        model: The model it was exported from.
        data: Batches (tensors, `(inputs, targets)` pairs or dicts), or one example: a tensor, or a tuple or dict of the
            forward's arguments.
        tolerance: The largest error allowed, relative to the reference's largest absolute value; or a `Tolerance`.
            By default what suits the file: 1e-3 for float32 and float64, 2e-2 for fp16, a cosine of 0.98 for dynamic
            int8.
        example_inputs: The same as one example in `data`; what the model's history recorded where both are left out.
        providers: ONNX Runtime's execution providers; the CPU's by default.
        max_batches: Stop after this many batches of `data`.

    Raises:
        ExportMismatch: An output is past the tolerance, or holds NaN; `error.verification` says how far it is.
        ExportError: No such file, or one that ONNX Runtime cannot run.
        InputError: No inputs, inputs without a row, or inputs that the file or the model does not take.
        ModelError: The model has no weights to compare with.
    """
    wanted = None if tolerance is None else Tolerance.of(tolerance)
    if max_batches is not None and max_batches < 1:
        raise InputError("max_batches must be positive", found=max_batches)
    inner = unwrap(model)
    session = OnnxSession(path, providers=providers)
    if is_meta(inner):
        raise ModelError("the model has no weights to compare with", found="the meta device", hint="load weights first")
    limits = wanted or TOLERANCES[scheme_of(session.path)]
    reference: nn.Module | None = None
    tallies: dict[str, Tally] = {name: Tally(name) for name in session.output_names}
    sizes: list[int] = []
    with kept_random_state():
        for number, inputs in enumerate(islice(_batches(data, example_inputs, inner, session), max_batches)):
            for batch in _runs(inputs, session, first=number == 0):
                feed = _feed(session, inner, batch)
                reference = reference or stand_in(inner, batch)
                _compare(reference, session, batch, feed, tallies)
                sizes.append(batch.batch)
    if not sum(sizes):
        raise InputError("there is no data to compare on", found="batches without rows" if sizes else "no batches")
    verification = Verification(
        path=Path(path),
        provider=session.provider,
        batches=tuple(sorted(set(sizes))),
        rows=sum(sizes),
        tolerance=limits,
        outputs=tuple(tally.result(limits) for tally in tallies.values()),
    )
    if not verification.passed:
        raise _failure(verification, tallies)
    return verification


def scheme_of(path: str | os.PathLike[str]) -> str:
    """What a file computes in: `float32`, `float64`, `fp16` or `dynamic` (int8), told from its nodes and weights."""
    graph = onnx.load(os.fspath(path), load_external_data=False).graph
    if any(node.op_type.startswith(("DynamicQuantize", "MatMulInteger", "ConvInteger")) for node in graph.node):
        return "dynamic"
    types = {tensor.data_type for tensor in graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*graph.input, *graph.output)}
    if types & {onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}:
        return "fp16"
    return "float64" if onnx.TensorProto.DOUBLE in types and onnx.TensorProto.FLOAT not in types else "float32"


def _batches(
    data: Data | None, example_inputs: ExampleInputs | None, model: nn.Module, session: OnnxSession
) -> Iterator[Inputs]:
    if data is None:
        found = Inputs.of(example_inputs) if example_inputs is not None else _recorded(model)
        return iter((found,))
    if isinstance(data, (torch.Tensor, Mapping, tuple, Inputs)):
        return iter((arguments_of(data, model, session.input_names),))
    if not isinstance(data, Iterable):
        raise InputError("data is an iterable of batches, or one example", found=type(data).__name__)
    return (arguments_of(batch, model, session.input_names) for batch in data)


def _recorded(model: nn.Module) -> Inputs:
    from torchtrim.edits.history import recorded_inputs

    found = recorded_inputs(model)
    if found is None:
        raise InputError("the file is compared on inputs, and there are none", hint="pass data or example_inputs")
    return found


def _runs(inputs: Inputs, session: OnnxSession, *, first: bool) -> Iterator[Inputs]:
    """The runs of one batch: as it is, and for the first one at batch 1 and another size."""
    fixed = session.fixed_batch
    if fixed is not None:
        yield inputs.with_batch(fixed)
        return
    yield inputs
    if first:
        yield with_other_rows(inputs, 3) if inputs.batch == 1 else inputs.with_batch(1)


def _feed(session: OnnxSession, model: nn.Module, inputs: Inputs) -> dict[str, NDArray[Any]]:
    """The file's inputs: by the names that an export gives them, or in the order of the forward's parameters."""
    if len(inputs.tensors) != len(session.input_names):
        return session.feed(inputs, cast=True)  # which says what is wrong
    inputs = in_order(inputs, model)
    named = dict(zip(input_names(model, inputs), inputs.tensors, strict=True))
    return session.feed(Inputs((), named), cast=True)


def _compare(
    model: nn.Module,
    session: OnnxSession,
    inputs: Inputs,
    feed: dict[str, NDArray[Any]],
    tallies: Mapping[str, Tally],
) -> None:
    expected = named_outputs(run_once(model, inputs))
    found = session.run(feed)
    if len(expected) != len(found):
        raise ExportMismatch(
            "the file and the model have another number of outputs",
            path=session.path,
            found=session.output_names,
            expected=list(expected),
        )
    for tally, reference, value in zip(tallies.values(), expected.values(), found, strict=True):
        tally.add(_numpy(reference), value, session.path)


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy())


def _failure(verification: Verification, tallies: Mapping[str, Tally]) -> VerificationFailed:
    worst = next(output for output in verification.outputs if not output.passed)
    limits = verification.tolerance
    wrong = tallies[worst.name].wrong
    if wrong is not None:
        error = VerificationFailed(
            f"the output {worst.name!r} is no number that can be compared",
            path=verification.path,
            found=wrong,
            expected="finite numbers, or the same infinities",
        )
    else:
        if worst.agreement is not None:
            found, expected = f"{worst.agreement:.1%} equal", f"at least {limits.agreement:.1%}"
        elif limits.relative is not None and worst.relative > limits.relative:
            found, expected = f"relative error {worst.relative:.2e}", f"at most {limits.relative:.0e}"
        else:
            found, expected = f"cosine {worst.cosine:.4f}", f"at least {limits.cosine}"
        error = VerificationFailed(
            f"the output {worst.name!r} is too far from the PyTorch model's",
            path=verification.path,
            found=found,
            expected=expected,
            hint="a wider tolerance=, if that error is acceptable",
        )
    error.verification = verification
    return error
