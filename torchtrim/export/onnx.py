"""A PyTorch model to a verified ONNX file."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import torch
from torch import nn

from torchtrim.bench.latency import Benchmark, benchmark
from torchtrim.bench.machine import machine
from torchtrim.errors import ExportMismatch, InputError, ModelError
from torchtrim.export.compare import TOLERANCES, Tolerance
from torchtrim.export.graph import (
    LARGE,
    has_dynamic_batch,
    join_files,
    names_for,
    opset_of,
    size_mb,
    stamp,
    weight_bytes,
    write_float,
)
from torchtrim.export.inputs import in_order
from torchtrim.export.kernels import refuse_unsupported
from torchtrim.export.place import free_place, put_in_place, workshop
from torchtrim.export.quantize import DYNAMIC_OPS, checked_ops, quantize_dynamic, to_float16
from torchtrim.export.report import ExportReport
from torchtrim.export.stand_in import run_once, stand_in
from torchtrim.export.targets import Target, resolve
from torchtrim.export.verify import Data, Verification, scheme_of, verify_onnx
from torchtrim.graph.copying import full_copy, is_meta, kept_random_state, structural_copy, unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs

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
    reduce_range: bool = False,
    half_io: bool = False,
    tolerance: float | Tolerance | None = None,
    overwrite: bool = False,
    benchmark: bool = True,
    threads: int | None = None,
) -> ExportReport:
    """Write a model to one ONNX file, run the file beside the model, and keep it only if they agree.

    The model is exported as it is in eval mode, and is left as it was. The file is written in a folder beside its
    destination and moved into place after it passed: a failed export leaves nothing, and an earlier file stays.
    Weights past 2 GB lie in a second file, `PATH.data`. Forward hooks that are plain functions run once, and go into
    the file only where they change what the model gives.

    Args:
        model: The model; one inside `torch.compile` or `DistributedDataParallel` is taken out of it.
        example_inputs: A tensor, or a tuple or dict of them. What the model's history recorded, where it is left out.
        path: Where the file goes. Its folder must exist.
        target: `cpu` or `cuda`. For `cuda` the weights are float16 (of a float64 model too), and every node is one that
            ONNX Runtime's CUDA provider has a kernel for; the file runs on that provider where there is one, and on the
            CPU elsewhere.
        quantize: None, or for the CPU `"dynamic"`: int8 weights in matrix products, activations quantized as it runs.
        data: What to compare on: batches (tensors, `(inputs, targets)` pairs, dicts). The example by default.
        dynamic: Whether the file takes any batch size; False for that of the example only. The batch is the first
            dimension of the first tensor that has one, and of the others where they have the same size there.
        input_names: Names of the inputs; those of the forward's parameters by default.
        output_names: Names of the outputs; by default the output's keys, or `output`, `output_1`, ...
        opset: The ONNX opset; what PyTorch's exporter recommends by default.
        dynamic_ops: The operators that `"dynamic"` quantizes, or one. Adding `Conv` makes most networks slower.
        per_channel: One int8 scale for each output channel.
        reduce_range: 7-bit weights, for x86 processors without VNNI.
        half_io: For `cuda`: take and give float16 as well.
        tolerance: How far the file may be from the model; see `verify_onnx`.
        overwrite: Replace a file that is there.
        benchmark: Measure the latency of the model and of each file, at batch 1 (a second or so).
        threads: Threads to measure with; PyTorch's present number by default.

    Returns:
        What was written, how near it is and how fast.

    Raises:
        ExportError: The path cannot be written or is taken, the target or the scheme is unknown, or the model cannot be
            expressed: at all, with any batch size, or in the opset asked for.
        ExportMismatch: The file ran and was past the tolerance (`error.verification`).
        ModelError: The model is on the meta device, or holds NaN or infinite weights.
        InputError: No example inputs, or some the model does not take; names that do not fit; a bad option.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = export_onnx(nn.Linear(4, 2), torch.zeros(1, 4), f"{folder}/linear.onnx", benchmark=False)
        >>> report.input_names, report.output_names, report.verification.passed
        (('input',), ('output',), True)
    """
    start = time.perf_counter()
    place, scheme = resolve(target, quantize)
    ops = checked_ops(dynamic_ops)
    wanted = None if tolerance is None else Tolerance.of(tolerance)
    _check_number("opset", opset)
    _check_number("threads", threads)
    inner = unwrap(model)
    destination = free_place(path, overwrite=overwrite, beside=weight_bytes(inner) * _SHARE[scheme] > LARGE)
    _check_weights(inner)
    inputs = _check_inputs(inner, example_inputs)
    notes: list[str] = []
    with workshop(destination) as folder, kept_random_state(), _progress() as say:
        copied = _stand_in(inner, inputs)
        names = names_for(
            copied, inputs, run_once(structural_copy(copied, own_buffers=True), inputs), input_names, output_names
        )
        say("reading the model")
        plain = folder / "float" / destination.name
        plain.parent.mkdir()
        # The exporter leaves its own tensors in attributes that a forward writes to.
        exported, given = structural_copy(copied, own_buffers=True), inputs
        if scheme == "fp16" and _has_doubles(copied, inputs):
            exported, given = full_copy(copied).float(), inputs.map(_single)
            notes.append("the model is float64; it was turned into float32 first, and so are its inputs and outputs")
        write_float(exported, given, plain, names=names, dynamic=dynamic, opset=opset)
        precision = scheme_of(plain)
        scheme = precision if scheme == "float32" else scheme
        final, quantized = plain, 0
        if scheme != precision:
            final = folder / scheme / destination.name
            final.parent.mkdir()
            say(f"converting to {'int8' if scheme == 'dynamic' else scheme}")
            large = weight_bytes(exported) > LARGE
            if scheme == "dynamic":
                quantized = quantize_dynamic(
                    plain, final, ops=ops, per_channel=per_channel, reduce_range=reduce_range, external_data=large
                )
                notes += _dynamic_notes(quantized, ops, reduce_range, precision)
            else:
                to_float16(plain, final, half_io=half_io, external_data=large)
            join_files(final)
        about = {"torchtrim.target": place.name, "torchtrim.quantize": scheme, "torch.version": torch.__version__}
        stamp(final, version=_version(), notes=about)
        if place.name == "cuda":
            _check_kernels(final)
        say("comparing with PyTorch")
        limits = wanted or TOLERANCES["fp16" if scheme == "fp16" else scheme_of(final)]
        verification = _verify(final, destination, copied, inputs, data, limits, place, notes)
        latency = None
        if benchmark:
            say("timing")
            names_timed = {plain: f"ONNX {precision}", final: f"ONNX {'int8' if scheme == 'dynamic' else scheme}"}
            latency = _time(copied, inputs, names_timed, verification.provider, threads)
            if verification.provider == place.provider:
                notes += _speed_notes(latency)
        sizes = (size_mb(plain), size_mb(final))
        opset, dynamic = opset_of(final), has_dynamic_batch(final)
        files = put_in_place(final, destination, overwrite=overwrite, aside=folder)
    return ExportReport(
        path=destination,
        files=files,
        target=place.name,
        quantize=scheme,
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
    )


# How large the file may be at least, beside the weights of the model; int8 weights are a quarter of float32 ones.
_SHARE = {"float32": 1.0, "fp16": 0.5, "dynamic": 0.25}


def _check_number(name: str, number: object) -> None:
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise InputError(f"{name} is a positive whole number", found=number)


def _check_weights(model: nn.Module) -> None:
    if is_meta(model):
        raise ModelError(
            "the model has no weights to export", found="the meta device", hint="model.to_empty(...) and load weights"
        )
    # An infinite buffer can be meant (an attention mask); an infinite weight cannot.
    bad = [name for name, tensor in model.named_parameters() if tensor.is_floating_point() and not _finite(tensor)]
    bad += [name for name, tensor in model.named_buffers() if tensor.is_floating_point() and bool(tensor.isnan().any())]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise ModelError(
            "weights that are NaN or infinite",
            path=", ".join(bad[:3]) + more,
            hint="a checkpoint from before they broke",
        )
    if any(tensor.dtype is torch.bfloat16 for tensor in model.parameters()):
        raise ModelError(
            "ONNX Runtime's CPU provider does not compute in bfloat16, so the file could not be checked",
            found="bfloat16 weights",
            hint='model.float(), with target="cuda" for a half-precision file',
        )


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _check_inputs(model: nn.Module, example_inputs: ExampleInputs | None) -> Inputs:
    if example_inputs is None:
        from torchtrim.edits.history import recorded_inputs

        recorded = recorded_inputs(model)
        if recorded is None:
            raise InputError("the model's input is not known", hint="pass example_inputs as the second argument")
        return recorded.fresh()
    inputs = in_order(Inputs.of(example_inputs).fresh(), model)
    inputs.bind(model)
    if not inputs.batch:
        raise InputError("the example has no rows", found=inputs.describe(), expected="at least one")
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    return inputs.map(lambda tensor: tensor.to(device))


def _stand_in(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy to export; where the inputs are refused and have another precision than the weights, that is said."""
    try:
        return stand_in(model, inputs)
    except InputError as error:
        precision = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        floats = {tensor.dtype for tensor in inputs.tensors if tensor.is_floating_point()}
        if precision is not None and floats and precision not in floats:
            error.hint = f"inputs in {str(precision).removeprefix('torch.')}, as the weights are, or model.float()"
        raise


def _has_doubles(model: nn.Module, inputs: Inputs) -> bool:
    tensors = (*model.parameters(), *model.buffers(), *inputs.tensors)
    return any(tensor.dtype is torch.float64 for tensor in tensors)


def _single(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.float() if tensor.dtype is torch.float64 else tensor


def _check_kernels(path: Path) -> None:
    import onnx

    refuse_unsupported(onnx.load(path, load_external_data=False), "cuda")


def _verify(
    path: Path,
    destination: Path,
    model: nn.Module,
    inputs: Inputs,
    data: Data | None,
    limits: float | Tolerance,
    place: Target,
    notes: list[str],
) -> Verification:
    import onnxruntime

    provider = place.provider
    if provider not in onnxruntime.get_available_providers() or (
        place.name == "cuda" and not torch.cuda.is_available()
    ):
        provider = "CPUExecutionProvider"
    compared = inputs if data is None else data
    try:
        verification = verify_onnx(path, model, compared, tolerance=limits, providers=[provider])
    except ExportMismatch as error:
        error.path = destination
        raise
    if verification.provider != place.provider:
        notes.append(
            f"checked on {verification.provider}, since {place.provider} is not here; every node has a kernel there"
        )
    elif place.name != "cpu":
        notes.append(f"run on {place.provider}")
    return replace(verification, path=destination)


def _time(model: nn.Module, inputs: Inputs, files: dict[Path, str], provider: str, threads: int | None) -> Benchmark:
    candidates: dict[str, nn.Module | Path] = {"PyTorch eager": model}
    candidates |= {name: path for path, name in files.items()}
    batch = 1 if inputs.batch > 1 and all(has_dynamic_batch(path) for path in files) else None
    return benchmark(candidates, inputs, batch=batch, threads=threads, seconds=0.3, warmup=2, providers=[provider])


def _dynamic_notes(quantized: int, ops: Sequence[str], reduce_range: bool, precision: str) -> list[str]:
    notes = []
    if not quantized:
        notes.append(
            f"nothing was quantized: the model has no {' or '.join(ops)} with float32 weights; it is {precision}"
        )
    if "Conv" in ops:
        notes.append("dynamic int8 convolutions are usually slower than float32 ones")
    has = machine().instructions
    if quantized and not reduce_range and "avx2" in has and not {"avx_vnni", "avx512_vnni"} & set(has):
        notes.append("this processor has no VNNI: reduce_range=True avoids overflow in its 8-bit sums")
    return notes


def _speed_notes(latency: Benchmark) -> list[str]:
    if len(latency.timings) < 3:
        return []
    plain, final = latency.timings[1], latency.timings[2]
    ratio = plain.median_ms / final.median_ms
    word = "faster" if ratio >= 1 else "slower"
    return [f"{final.name} is {max(ratio, 1 / ratio):.2f} x {word} than {plain.name}"]


def _version() -> str:
    from torchtrim import __version__

    return __version__


@contextmanager
def _progress() -> Iterator[_Say]:
    """Say what is being done, where a person is watching."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console

    with Console(file=sys.stderr).status("exporting") as status:
        yield lambda step: status.update(step)
