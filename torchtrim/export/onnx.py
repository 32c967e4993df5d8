"""A PyTorch model to a verified ONNX file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

import torch
from torch import nn

from torchtrim.bench.machine import machine
from torchtrim.errors import InputError
from torchtrim.export.asked import (
    check_number,
    check_share,
    check_weights,
    checked_inputs,
    checked_options,
    checked_stand_in,
    has_doubles,
    single,
)
from torchtrim.export.calibration_data import CalibrationData
from torchtrim.export.compare import Tolerance
from torchtrim.export.convert import Batches, convert
from torchtrim.export.graph import has_dynamic_batch, names_for, opset_of, size_mb, weight_bytes, write_float
from torchtrim.export.place import free_place, put_in_place, workshop
from torchtrim.export.proven import Limits, proven, speed_notes, timed_beside, word_of
from torchtrim.export.quantize import DYNAMIC_OPS
from torchtrim.export.report import ExportReport
from torchtrim.export.runs import Data, at_most
from torchtrim.export.saving import LARGE
from torchtrim.export.scheme import scheme_of
from torchtrim.export.stand_in import run_once
from torchtrim.export.targets import resolve, run_on
from torchtrim.export.trained import checked_ranges, find_ranges
from torchtrim.export.workbench import Workbench
from torchtrim.graph.copying import full_copy, kept_random_state, structural_copy, unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.train.quantization import QuantizationAware
from torchtrim.train.trained_ranges import TrainedRanges

__all__ = ["ExportReport", "export_onnx"]

_Say: TypeAlias = Callable[[str], None]


def export_onnx(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    path: str | os.PathLike[str] = "model.onnx",
    *,
    target: str = "cpu",
    quantize: str | None = None,
    data: Data | None = None,
    dynamic: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    opset: int | None = None,
    dynamic_ops: str | Sequence[str] = DYNAMIC_OPS,
    per_channel: bool = True,
    reduce_range: bool | None = None,
    calibration: str = "minmax",
    bits: int = 8,
    block: int = 128,
    max_drop: float = 0.01,
    half_io: bool = False,
    tolerance: float | Tolerance | None = None,
    overwrite: bool = False,
    benchmark: bool = True,
    threads: int | None = None,
    ranges: QuantizationAware | TrainedRanges | None = None,
) -> ExportReport:
    """Write a model to one ONNX file, run the file beside the model, and keep it only if they agree.

    The model is exported as it is in eval mode, and is left as it was. The file is written in a folder beside its
    destination and moved into place after it passed: a failed export leaves nothing, and an earlier file stays.
    Weights past 2 GB lie in a second file, `PATH.data`. Forward hooks that are plain functions run once, and go into
    the file only where they change what the model gives.

    Schemes, of which each target takes some:

    - `"float32"`, `"fp16"`, `"bf16"`: that precision.
    - `"dynamic"`: int8 weights in matrix products, activations quantized as it runs. Needs no data.
    - `"static"`: int8 with scales fixed from calibration on `data` (QuantizeLinear and DequantizeLinear pairs).
    - `"weight_only"`: int8 or int4 weights, float arithmetic.
    - `"mixed"`: static, dynamic or float for each kind of layer, whichever makes the file fastest here, and float for
      the layers at which the error jumps most, until the outputs are near enough.
    - `"auto"`: all that make sense are made, timed in alternating rounds beside the float file, and compared; the
      fastest that loses at most `max_drop` is kept, the float file where nothing is faster (`report.selection`).

    At most 512 rows of the data are read. Where something is calibrated, half of them are to calibrate on and half to
    compare on; they are kept on disk while it works, so that memory does not grow with them.

    Args:
        model: The model; one inside `torch.compile` or `DistributedDataParallel` is taken out of it.
        example_inputs: A tensor, or a tuple or dict of them. What the model's history recorded, where it is left out.
        path: Where the file goes. Its folder must exist.
        target: `cpu`, `openvino`, `cuda` or `tensorrt`. For the GPU targets every node is one that the provider has a
            kernel for. The file runs where the target is installed, and on the CPU elsewhere, which the report says.
        quantize: A scheme; None: float32, and fp16 for GPUs.
        data: Batches (tensors, `(inputs, targets)` pairs, dicts) to calibrate and compare on. The example by default,
            on which nothing can be calibrated. With integer targets, accuracy is compared.
        dynamic: Whether the file takes any batch size; False for that of the example only. The batch is the first
            dimension of the first tensor that has one, and of the others where they have the same size there.
        input_names: Names of the inputs; those of the forward's parameters by default.
        output_names: Names of the outputs; by default the output's keys, or `output`, `output_1`, ...
        opset: The ONNX opset; what PyTorch's exporter recommends by default.
        dynamic_ops: The operators that `"dynamic"` quantizes, or one. Adding `Conv` makes most networks slower.
        per_channel: One int8 scale for each output channel.
        reduce_range: 7-bit weights, but for depthwise convolutions, as x86 without VNNI needs them; by default where
            this is one.
        calibration: How the ranges of activations are chosen: `minmax`, `entropy`, `percentile`, `mse`.
        bits: Of `"weight_only"`: 8 or 4.
        block: How many weights share a scale there.
        max_drop: How much accuracy `"mixed"` and `"auto"` may lose, 0.01 for one point (without classes: as the float
            file's own probabilities let expect). They ask for a cosine to the float file of 0.99, too, or for what a
            `Tolerance` says. Where no mixture is near enough `"mixed"` writes the nearest, and a note says so.
        half_io: For `fp16`: take and give float16 as well.
        tolerance: How far the file may be from the model; see `verify_onnx`.
        overwrite: Replace a file that is there.
        benchmark: Measure the latency of the model and of each file, at batch 1 (a second or so).
        threads: Threads to measure with; PyTorch's present number by default.
        ranges: With `"static"`: the `QuantizationAware` that the model was trained with, or its `ranges()`. The file
            gets the scales that were trained with; the `data` gives those of tensors in between.

    Returns:
        What was written, how near it is and how fast.

    Raises:
        ExportError: The path cannot be written or is taken, the target or the scheme is unknown, or the model cannot be
            expressed: at all, with any batch size, or in the opset asked for.
        ExportMismatch: The file ran and was past the tolerance (`error.verification`).
        ModelError: The model is on the meta device, or holds NaN or infinite weights.
        InputError: No example inputs, or some the model does not take; names that do not fit; a bad option; data that
            cannot be calibrated on, or none where some is needed.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(nn.Linear(4, 2), torch.zeros(1, 4), f"{folder}/linear.onnx", benchmark=False)
        >>> report.input_names, report.output_names, report.verification.passed
        (('input',), ('output',), True)
    """
    start = time.perf_counter()
    place, scheme = resolve(target, quantize)
    options = checked_options(dynamic_ops, per_channel, reduce_range, calibration, bits, block, half_io)
    wanted = None if tolerance is None else Tolerance.of(tolerance)
    check_number("opset", opset)
    check_number("threads", threads)
    check_share("max_drop", max_drop)
    inner = unwrap(model)
    destination = free_place(path, overwrite=overwrite, beside=weight_bytes(inner) * _SHARE.get(scheme, 0.125) > LARGE)
    check_weights(inner)
    inputs = checked_inputs(inner, example_inputs)
    trained = None
    if ranges is not None:
        trained = checked_ranges(
            ranges, inner, scheme=scheme, target=place, per_channel=per_channel, reduce_range=reduce_range
        )
        inner = trained.rounded(inner)
    if data is None and scheme == "static":
        raise InputError(
            "static int8 is calibrated on data, and there is none",
            path="data",
            expected="batches of inputs, some hundred rows",
            hint='data=, or quantize="dynamic"',
        )
    provider, note = run_on(place.name)
    notes = [] if note is None else [note]
    with workshop(destination) as folder, kept_random_state(), _progress() as say:
        copied = checked_stand_in(inner, inputs)
        names = names_for(
            copied, inputs, run_once(structural_copy(copied, own_buffers=True), inputs), input_names, output_names
        )
        say("reading the model")
        plain = folder / "float" / destination.name
        plain.parent.mkdir()
        # The exporter leaves its own tensors in attributes that a forward writes to.
        exported, given, beside = structural_copy(copied, own_buffers=True), inputs, copied
        cast = scheme != "float32" and has_doubles(copied, inputs)
        if cast:
            exported, given, beside = full_copy(copied).float(), inputs.map(single), full_copy(copied).float()
            notes.append("the model is float64; it was turned into float32 first, and so are its inputs and outputs")
        wanted_opset = opset or _NEEDED.get((place.name, scheme, bits if scheme == "weight_only" else 0))
        write_float(exported, given, plain, names=names, dynamic=dynamic, opset=wanted_opset)
        precision = scheme_of(plain)
        scheme = precision if scheme == "float32" else scheme
        spooled = None
        if data is not None and (scheme in _CALIBRATED or cast):
            spooled = CalibrationData.spool(data, copied, plain, folder / "data", example=given)
            notes += spooled.notes
        bench = Workbench(
            plain,
            folder,
            target=place,
            data=spooled,
            options=options,
            external=weight_bytes(exported) > LARGE,
            threads=threads,
        )
        if trained is not None:
            bench.asked_format = trained.format
            bench.trained = find_ranges(trained, inner, bench.prepared)
            notes += bench.trained.notes()
        limits = Limits(wanted, max_drop, spooled is not None and spooled.labelled)
        converted = convert(
            bench,
            scheme,
            precision,
            inputs=given,
            max_drop=max_drop,
            cosine=wanted.cosine if wanted is not None else None,
            provider=provider,
            timed=note is None,
            threads=threads,
            say=say,
        )
        # A file that was calibrated is not compared on what it was calibrated on.
        compared = (
            given if data is None else at_most(data) if spooled is None else Batches(spooled, given, names.inputs)
        )
        say("comparing with PyTorch")
        about = {"torch.version": str(torch.__version__)}
        converted, verification = proven(converted, bench, destination, beside, compared, limits, provider, about)
        final, notes = converted.built.path, [*notes, *converted.notes]
        quantized = converted.built.nodes
        latency = None
        if benchmark:
            say("timing")
            names_timed = {plain: f"ONNX {precision}", final: f"ONNX {word_of(converted.built.scheme)}"}
            latency = timed_beside(copied, inputs, names_timed, verification.provider, threads)
            if verification.provider == place.provider:
                notes += speed_notes(latency)
        sizes = (size_mb(plain), size_mb(final))
        opset, dynamic = opset_of(final), has_dynamic_batch(final)
        files = put_in_place(final, destination, overwrite=overwrite, aside=folder)
    return ExportReport(
        path=destination,
        files=files,
        target=place.name,
        quantize=converted.built.scheme,
        precision=precision,
        provider=verification.provider,
        opset=opset,
        input_names=names.inputs,
        output_names=names.outputs,
        dynamic_batch=dynamic,
        float_mb=sizes[0],
        size_mb=sizes[1],
        quantized_nodes=quantized,
        verification=verification,
        latency=latency,
        machine=machine(),
        seconds=time.perf_counter() - start,
        notes=tuple(notes),
        selection=converted.selection,
    )


# How large the file may be at least, beside the weights of the model; int8 weights are a quarter of float32 ones.
_SHARE = {"float32": 1.0, "fp16": 0.5, "bf16": 0.5, "dynamic": 0.25, "static": 0.25, "mixed": 0.25, "auto": 1.0}
# Where a scheme needs a later opset than the exporter's own: bfloat16 convolutions, int4 in DequantizeLinear.
_NEEDED = {
    ("tensorrt", "bf16", 0): 22,
    ("tensorrt", "weight_only", 4): 21,
    ("openvino", "weight_only", 4): 21,
}
_CALIBRATED = ("static", "mixed", "auto")


@contextmanager
def _progress() -> Iterator[_Say]:
    """Say what is being done, where a person is watching."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console

    with Console(file=sys.stderr).status("exporting") as status:
        yield lambda step: status.update(step)
