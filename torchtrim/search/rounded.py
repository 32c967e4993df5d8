"""One layer of a model with weights and inputs rounded to 8 bits, as a static int8 file would have it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from torchtrim.edits.heal_data import Calibration
from torchtrim.errors import InputError
from torchtrim.graph.copying import full_copy
from torchtrim.graph.inputs import Inputs


def rounded_to_int8(model: nn.Module, path: str, inputs: Inputs, data: Iterable[Any]) -> nn.Module:
    """A copy of a model in which one layer computes with 8-bit numbers.

    Weights have a symmetric scale for each output channel, the input has one range, from its least to its largest value
    over the data (zero is in it). Everything else stays as it is.

    Args:
        model: The model; left as it was.
        path: A convolution or a linear layer.
        inputs: Example inputs.
        data: Batches to take the range from.

    Raises:
        InputError: The layer is of another kind, or is never reached.
    """
    net = full_copy(model).eval()
    layer = net.get_submodule(path)
    weight = getattr(layer, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.dim() < 2:
        raise InputError("it has no matrix or kernel to round", path=path, found=type(layer).__name__)
    seen = [0.0, 0.0, 0.0]

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        low, high = torch.aminmax(args[0].detach())
        seen[:] = [min(seen[0], float(low)), max(seen[1], float(high)), seen[2] + 1]

    handle = layer.register_forward_pre_hook(look)
    try:
        with torch.no_grad():
            pieces = Calibration.of(data, net, inputs, what="rounding")
            for piece in (*pieces.to_fit(), *pieces.held_back()):
                piece.call(net)
    finally:
        handle.remove()
    if not seen[2]:
        raise InputError("the layer is never called", path=path)
    low, high = seen[0], seen[1]
    scale = max(high - low, 1e-12) / 255
    zero = int(min(max(round(-low / scale), 0), 255))
    with torch.no_grad():
        largest = weight.detach().abs().flatten(1).amax(1).clamp_min(1e-12)
        shape = (-1, *(1,) * (weight.dim() - 1))
        step = (largest / 127).view(shape)
        weight.copy_((weight / step).round().clamp(-127, 127) * step)

    def round_input(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (torch.fake_quantize_per_tensor_affine(args[0], scale, zero, 0, 255), *args[1:])

    layer.register_forward_pre_hook(round_input)
    return net
