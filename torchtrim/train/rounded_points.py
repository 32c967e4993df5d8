"""Where a static int8 file will round what flows through a model, found by running the model once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchtrim.graph.inputs import Inputs
from torchtrim.graph.structure import leaves
from torchtrim.train.fake_quantizer import ActivationRange

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
# ONNX Runtime makes these part of the convolution before them, which is rounded behind them.
_ABSORBED = {"clamp", "clamp_", "clip", "hardtanh", "hardtanh_", "relu", "relu6", "relu_", "threshold"}
_THROUGH = {"batch_norm", "dropout", "feature_dropout"}  # folded into the convolution, or nothing in eval mode
_ASKING = {"__get__", "dim", "size", "numel", "is_floating_point"}  # these look at a tensor and compute nothing


@dataclass
class Points:
    """Where values are rounded.

    Attributes:
        inputs: The range of what each layer takes, in order of execution; layers that take one tensor share it.
        outputs: For convolutions that no activation follows which becomes a part of them: the module whose output is
            rounded (the convolution, or the norm behind it), and the range.
        reasons: The layers that cannot be quantized, and why.
    """

    inputs: dict[nn.Module, ActivationRange] = field(default_factory=dict)
    outputs: dict[nn.Module, tuple[nn.Module, ActivationRange]] = field(default_factory=dict)
    reasons: dict[nn.Module, str] = field(default_factory=dict)


def find_points(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Inputs, fresh: Callable[[], ActivationRange]
) -> Points:
    """Run the model, in the mode it is in, and see what the layers take and where their outputs go.

    Args:
        model: The model, in eval mode.
        layers: The layers that may be quantized.
        inputs: A row or two: every activation is held while it runs.
        fresh: Makes a range.
    """
    points, flow = Points(), _Flow()
    taken: dict[int, tuple[torch.Tensor, ActivationRange]] = {}  # the tensors are held, so that ids are theirs alone
    chosen = set(layers.values())

    def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs.get("input")
        if not isinstance(values, torch.Tensor) or not values.is_floating_point():
            points.reasons[layer] = "its input is no tensor of floats"
        elif layer not in points.inputs:
            with flow.looking_away():
                if not _uses_weight_as_it_is(layer, args, kwargs):
                    points.reasons[layer] = "its forward computes its weight from the parameter"
                    return
            points.inputs[layer] = taken[id(values)][1] if id(values) in taken else fresh()
            taken[id(values)] = values, points.inputs[layer]

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not isinstance(output, torch.Tensor):
            return
        if module in points.inputs and not isinstance(module, nn.Linear):
            flow.give(output, module)
        elif module not in chosen:
            flow.comes_out_of(output, module)

    handles = [layer.register_forward_pre_hook(before, with_kwargs=True) for layer in layers.values()]
    handles += [module.register_forward_hook(after) for module in model.modules()]
    try:
        with flow:
            inputs.call(model)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers.values():
        if layer not in points.inputs:
            points.reasons.setdefault(layer, "it did not run by itself")
    points.outputs = {layer: (place, fresh()) for layer, place in flow.places().items()}
    return points


class _Flow(TorchFunctionMode):
    """Follows what convolutions give to the first function that takes it."""

    def __init__(self) -> None:
        super().__init__()
        self._owners: dict[int, tuple[torch.Tensor, nn.Module]] = {}
        self._places: dict[nn.Module, nn.Module | None] = {}
        self._away = False

    @contextmanager
    def looking_away(self) -> Iterator[None]:
        """Follow nothing meanwhile."""
        before, self._away = self._away, True
        try:
            yield
        finally:
            self._away = before

    def give(self, output: torch.Tensor, layer: nn.Module) -> None:
        """Follow what a convolution gives."""
        if layer in self._places:
            return  # it runs again: the first time counts
        self._owners[id(output)] = output, layer
        self._places[layer] = layer

    def comes_out_of(self, output: torch.Tensor, module: nn.Module) -> None:
        """A module gives a tensor: where it is one that is followed, this is the place to round it."""
        held = self._owners.get(id(output))
        if held is not None:
            self._places[held[1]] = module

    def places(self) -> dict[nn.Module, nn.Module]:
        """The convolutions whose outputs are rounded, and the modules that give them."""
        return {layer: place for layer, place in self._places.items() if place is not None}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        owner = None
        name = getattr(func, "__name__", "")
        if not self._away and name not in _ASKING:
            for tensor in leaves((args, kwargs or {}), torch.Tensor):
                held = self._owners.pop(id(tensor), None)
                if held is None:
                    continue
                if name in _THROUGH:
                    owner = held[1]
                elif name in _ABSORBED:
                    self._places[held[1]] = None
        with self.looking_away() if name in _THROUGH else nullcontext():
            result = func(*args, **(kwargs or {}))
        if owner is not None and isinstance(result, torch.Tensor):
            self._owners[id(result)] = result, owner
            self._places[owner] = None  # until a module gives it
        return result


def _uses_weight_as_it_is(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a layer's own forward is linear in its weight: a standardised weight, for one, is not."""
    if any(type(layer).forward is kind.forward for kind in LAYERS):
        return True
    weight = layer._parameters["weight"]
    if weight is None:
        return False
    try:
        once = layer.forward(*args, **kwargs)
        layer.__dict__["weight"] = weight * 2
        twice = layer.forward(*args, **kwargs)
        layer.__dict__["weight"] = weight * 0
        none = layer.forward(*args, **kwargs)
    finally:
        layer.__dict__.pop("weight", None)
    change = 2 * (once - none)
    return bool((twice - none - change).abs().max() <= 1e-3 * change.abs().max())
