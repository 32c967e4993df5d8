"""What a user asks of an export, checked before the work begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from torchtrim.errors import InputError, ModelError, nearest
from torchtrim.export.inputs import in_order
from torchtrim.export.quantize import checked_ops
from torchtrim.export.ranges import METHODS
from torchtrim.export.stand_in import stand_in
from torchtrim.export.weight_only import MOST_BLOCK
from torchtrim.export.workbench import Options
from torchtrim.graph.copying import is_meta
from torchtrim.graph.inputs import ExampleInputs, Inputs


def checked_options(
    ops: str | Sequence[str],
    per_channel: bool,
    reduce_range: bool | None,
    calibration: str,
    bits: int,
    block: int,
    half_io: bool,
) -> Options:
    """The options of quantization, where they make sense.

    Raises:
        ExportError: Operators without a dynamic int8 form.
        InputError: An unknown way to choose ranges, or a number of bits or a block that does not exist.
    """
    if calibration not in METHODS:
        raise InputError(
            "an unknown way to choose ranges",
            path="calibration",
            found=calibration,
            expected=", ".join(METHODS),
            hint=nearest(str(calibration), METHODS),
        )
    if isinstance(bits, bool) or bits not in (4, 8):
        raise InputError("weights have 8 bits or 4", path="bits", found=bits)
    if isinstance(block, bool) or not isinstance(block, int) or not 16 <= block <= MOST_BLOCK or block & (block - 1):
        raise InputError(f"a block is a power of two, 16 to {MOST_BLOCK}", path="block", found=block)
    return Options(checked_ops(ops), per_channel, reduce_range, calibration, bits, block, half_io)


def check_number(name: str, number: object) -> None:
    """Refuse what is no positive whole number."""
    if number is not None and (isinstance(number, bool) or not isinstance(number, int) or number < 1):
        raise InputError(f"{name} is a positive whole number", found=number)


def check_share(name: str, number: object) -> None:
    """Refuse what is no share."""
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 <= number <= 1:
        raise InputError(f"{name} is a share of the rows", found=number, expected="0 to 1: 0.01 is a point")


def check_weights(model: nn.Module) -> None:
    """Refuse a model that has no weights, or some that are no numbers."""
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


def checked_inputs(model: nn.Module, example_inputs: ExampleInputs | None) -> Inputs:
    """The example, or what the model's history recorded, in the order of the forward's parameters."""
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


def checked_stand_in(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy to export; where the inputs are refused and have another precision than the weights, that is said."""
    try:
        return stand_in(model, inputs)
    except InputError as error:
        precision = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
        floats = {tensor.dtype for tensor in inputs.tensors if tensor.is_floating_point()}
        if precision is not None and floats and precision not in floats:
            error.hint = f"inputs in {str(precision).removeprefix('torch.')}, as the weights are, or model.float()"
        raise


def has_doubles(model: nn.Module, inputs: Inputs) -> bool:
    """Whether any weight, buffer or input is float64."""
    tensors = (*model.parameters(), *model.buffers(), *inputs.tensors)
    return any(tensor.dtype is torch.float64 for tensor in tensors)


def single(tensor: torch.Tensor) -> torch.Tensor:
    """A float64 tensor as float32, any other as it is."""
    return tensor.float() if tensor.dtype is torch.float64 else tensor


def _finite(tensor: torch.Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
