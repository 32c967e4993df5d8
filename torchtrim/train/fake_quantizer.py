"""Rounding to 8 bits in the forward of one layer, with gradients straight through: a hook, and no other parameters.

The arithmetic is torchao's: `choose_qparams_affine_with_min_max` makes scales and zero points of ranges as ONNX
Runtime does, and `_fake_quantize_affine` rounds tensors of any shape, convolutions' weights among them, and gives
learned scales the gradient of Esser et al. (LSQ, 2020). torchao's own quantization-aware modules are not used: they are
for `nn.Linear` only, take its place, and have 256 levels where ONNX Runtime's symmetric weights have 255, or 129 in 7
bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchtrim.errors import MissingDependency, ModelError


def primitives() -> Any:
    """torchao's quantization primitives.

    Raises:
        MissingDependency: torchao is not installed, or too old.
    """
    try:
        from torchao.quantization import quant_primitives
    except ImportError as error:
        raise MissingDependency(
            "torchao is needed for quantization-aware training", hint='pip install "torchtrim[qat]"'
        ) from error
    if not hasattr(quant_primitives, "_fake_quantize_affine"):
        raise MissingDependency("this version of torchao does not fit", hint='pip install "torchtrim[qat]"')
    return quant_primitives


def round_weight(weight: torch.Tensor, levels: int) -> torch.Tensor:
    """A weight rounded to whole multiples of a step for each output channel; its gradient goes straight through.

    The step is the channel's largest absolute value by `levels`. So zero stays zero; equal values of a channel stay
    equal; and rounding commutes with a factor for each channel, as a folded batch norm is.

    Args:
        weight: Outputs along the first dimension.
        levels: The largest multiple.

    Example:
        >>> round_weight(torch.tensor([[0.0, 0.4, -1.0], [2.0, 2.0, 0.9]]), 2)
        tensor([[ 0.0000,  0.5000, -1.0000],
                [ 2.0000,  2.0000,  1.0000]])
    """
    ao = primitives()
    block = (1, *weight.shape[1:])
    largest = weight.detach().abs().flatten(1).amax(1).float()
    scale, _ = ao.choose_qparams_affine_with_min_max(
        -largest, largest, ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR, block, torch.int8, -levels, levels
    )
    zero = torch.zeros_like(scale, dtype=torch.int32)
    rounded: torch.Tensor = ao._fake_quantize_affine(
        weight.float(), block, scale, zero, torch.int8, quant_min=-levels, quant_max=levels
    )
    return rounded.to(weight.dtype)


class ActivationRange:
    """The range of the values that one or several layers take, and the 8-bit grid in it.

    Args:
        unsigned: Whether they are `uint8` or `int8`.
        symmetric: Whether the range lies around zero.
        momentum: How far a batch moves the range.
    """

    def __init__(self, *, unsigned: bool, symmetric: bool, momentum: float) -> None:
        self.unsigned, self.symmetric, self.momentum = unsigned, symmetric, momentum
        self.low: torch.Tensor | None = None
        self.high: torch.Tensor | None = None
        self.scale: nn.Parameter | None = None  # where it is learned, with the zero point held
        self.zero: torch.Tensor | None = None

    @torch.no_grad()
    def see(self, values: torch.Tensor, *, widen: bool = False) -> None:
        """Move the range towards the values' own, or `widen` it to hold them all."""
        if not values.numel():
            return
        low, high = (bound.float() for bound in torch.aminmax(values.detach()))
        low, high = low.clamp(max=0), high.clamp(min=0)
        if self.low is None or self.high is None:
            self.low, self.high = low, high
        elif widen:
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        else:
            self.low = self.low.to(low.device).lerp(low, self.momentum)
            self.high = self.high.to(high.device).lerp(high, self.momentum)

    def set(self, low: float, high: float) -> None:
        """Take a range."""
        device = None if self.low is None else self.low.device
        self.low, self.high = torch.tensor(low, device=device), torch.tensor(high, device=device)
        if self.scale is not None:
            with torch.no_grad():
                scale, zero = self._grid(self.low, self.high)
                self.scale.copy_(scale)
                self.zero = zero

    def learn(self) -> nn.Parameter:
        """Make the scale a parameter."""
        if self.scale is None:
            low, high = self._bounds()
            scale, self.zero = self._grid(low, high)
            self.scale = nn.Parameter(scale.clone())
        return self.scale

    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest value of the grid."""
        if self.scale is not None and self.zero is not None:
            least, most = self._limits
            scale = abs(float(self.scale.detach()))
            return (least - int(self.zero)) * scale, (most - int(self.zero)) * scale
        low, high = self._bounds()
        if self.symmetric:
            high = torch.maximum(-low, high)
            low = -high
        return float(low), float(high)

    def round(self, values: torch.Tensor) -> torch.Tensor:
        """The values on the grid; their gradient goes straight through inside the range, and is zero outside."""
        least, most = self._limits
        if self.scale is not None and self.zero is not None:
            # Esser et al. 2020: gradients of scales as large beside them as those of weights are beside weights.
            size = (max(values.numel() // max(values.shape[0], 1), 1) * most) ** -0.5
            scale = self.scale.to(values.device).abs().clamp(min=1e-9)
            scale = (scale - scale * size).detach() + scale * size
            zero = self.zero.to(values.device)
        else:
            low, high = self._bounds()
            scale, zero = self._grid(low.to(values.device), high.to(values.device))
        kind = torch.uint8 if self.unsigned else torch.int8
        rounded: torch.Tensor = primitives()._fake_quantize_affine(
            values.float(), values.shape, scale, zero, kind, quant_min=least, quant_max=most
        )
        return rounded.to(values.dtype)

    @property
    def _limits(self) -> tuple[int, int]:
        if self.unsigned:
            return 0, 255
        return (-127 if self.symmetric else -128), 127

    def _bounds(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.low is None or self.high is None:
            raise ModelError("a layer ran that had not run when the ranges were taken", hint="data that it runs on")
        return self.low, self.high

    def _grid(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ao = primitives()
        kind = torch.uint8 if self.unsigned else torch.int8
        mapping = ao.MappingType.SYMMETRIC_NO_CLIPPING_ERR if self.symmetric else ao.MappingType.ASYMMETRIC
        least, most = self._limits
        scale, zero = ao.choose_qparams_affine_with_min_max(
            low, high, mapping, (), kind, least, most, eps=1e-9, zero_point_dtype=torch.int32
        )
        return scale, zero


class FakeQuantizer:
    """The hooks of one layer: its input and its weight are rounded while it runs.

    The layer's parameter is not touched: for the time of its forward an attribute of the same name lies over it, so the
    names in a `state_dict`, what an optimizer holds, and masks and clusters of weights are what they were.

    Args:
        layer: A convolution or `nn.Linear`.
        range: Of its input.
        levels: Of its weight.
    """

    def __init__(self, layer: nn.Module, range: ActivationRange, levels: int) -> None:
        self.range, self.levels = range, levels
        self.frozen = False
        self._handles: list[Any] = [
            layer.register_forward_pre_hook(self.before, with_kwargs=True),
            layer.register_forward_hook(self.after, always_call=True),
        ]

    @staticmethod
    def owns(hook: Any) -> bool:
        """Whether a hook is one of quantization-aware training."""
        owner = getattr(hook, "__self__", None)
        return isinstance(owner, (FakeQuantizer, FakeOutput)) or getattr(hook, "counts_batches", False)

    def before(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Round the input, and lay the rounded weight over the layer's own."""
        values = args[0] if args else kwargs["input"]
        if layer.training and not self.frozen and self.range.scale is None:
            self.range.see(values)
        rounded = self.range.round(values)
        layer.__dict__["weight"] = round_weight(layer._parameters["weight"], self.levels)  # type: ignore[arg-type]
        return ((rounded, *args[1:]), kwargs) if args else (args, {**kwargs, "input": rounded})

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Take the rounded weight away again, also where the forward failed."""
        layer.__dict__.pop("weight", None)

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()


class FakeOutput:
    """The hook that rounds what a module gives.

    Args:
        module: A convolution, or the norm behind it.
        range: Of its output.
    """

    def __init__(self, module: nn.Module, range: ActivationRange) -> None:
        self.range, self.frozen = range, False
        self._handle = module.register_forward_hook(self.after)

    def after(self, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Round the output."""
        if module.training and not self.frozen and self.range.scale is None:
            self.range.see(output)
        return self.range.round(output)

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()
