"""`QuantizationAware`: a model is trained as it will compute in int8, and stays a float model that one can export."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from torchtrim.bench.int8_format import Int8Format, best_format
from torchtrim.bench.machine import machine
from torchtrim.edits.sparse_weights import named
from torchtrim.errors import EditError, InputError, ModelError, nearest
from torchtrim.graph.batches import answer_to, arguments_of
from torchtrim.graph.copying import kept_modes, kept_random_state, unwrap
from torchtrim.graph.execution import known_inputs
from torchtrim.graph.held import hold, is_held, let_go
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import What
from torchtrim.train.fake_quantizer import ActivationRange, FakeOutput, FakeQuantizer, primitives
from torchtrim.train.freeze import has_statistics
from torchtrim.train.rounded_points import LAYERS, Points, find_points
from torchtrim.train.trained_ranges import TrainedRanges

_ROWS = 512  # that the first ranges are taken from
_GPU = ("cuda", "tensorrt")
_TARGETS = ("cpu", "openvino", *_GPU)


class QuantizationAware:
    """Quantization-aware training (Jacob et al. 2018; Krishnamoorthi 2018): one line before a training loop, one after.

    While it is attached, the inputs of convolutions and linear layers are rounded to 8 bits and their weights to the
    levels of their output channel, in training and in eval mode alike, and gradients go straight through the rounding.
    So are outputs of convolutions that no ReLU follows, as the file rounds them too. What is trained are the float
    weights. There are no wrappers and no other parameters: the names of a `state_dict`
    and what an optimizer holds never change, and after `finish` the model is the plain one again, with other weights.
    `tt.export_onnx(model, x, path, quantize="static", data=data, ranges=q)` writes the file that was trained for.

    Ranges of activations are those of `data` first, and then follow the training batches (a moving average of least
    and largest values) until `freeze`; `learn=True` makes their steps parameters instead (LSQ: Esser et al. 2020),
    which the optimizer has to be given: `q.parameters()`. Weights have a step for each output channel, the channel's
    largest value by the number of levels, anew in each forward.

    Batch norms are not folded while training: rounding by output channel commutes with a factor for each channel, so
    that rounding before folding gives the same whole numbers as folding before rounding, as the export does. Norms
    normalise by their batch as ever, until `freeze` holds their statistics.

    Zeros stay zeros, and equal weights of a channel stay equal: `MagnitudePruner` and `WeightClustering` go on beside
    it, on the float weights. Each process of many watches the ranges of its own batches: with several, `freeze` first.

    Args:
        model: The model; hooks are put on its layers.
        data: Batches to take the first ranges from (tensors, `(inputs, targets)` pairs, dicts), up to 512 rows; a
            tensor by itself is one batch.
        example_inputs: What the forward takes, where neither the model's history nor the first batch tells.
        target: What it is trained for: `cpu`, `openvino`, `cuda` or `tensorrt`.
        format: The 8-bit types; by default those of this machine, as exports take them (`best_format`).
        weight_bits: Bits of a weight, 2 to 8. Weights of fewer bits lie in the file as int8 numbers of as few values.
        include: Only these layers: paths, globs, types, predicates.
        exclude: Layers that stay float while training.
        momentum: How far a batch moves a range.
        freeze_after: After how many training batches to `freeze` by itself.
        learn: Learn the steps of activations.

    Raises:
        InputError: No data, data the model does not take, or a setting that is none.
        ModelError: There is nothing to quantize, or another `QuantizationAware` is attached.
        PathError: A path that does not exist.
        SelectionError: Nothing fits a selection.
        MissingDependency: torchao is not installed.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(32, 4)
        >>> q = QuantizationAware(net, x)
        >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> for _ in range(5):
        ...     optimizer.zero_grad(); net(x).square().mean().backward(); optimizer.step()
        >>> sorted(q.finish().activations), sorted(net.state_dict())
        (['0', '2'], ['0.bias', '0.weight', '2.bias', '2.weight'])
    """

    def __init__(
        self,
        model: nn.Module,
        data: Any,
        example_inputs: ExampleInputs | None = None,
        *,
        target: str = "cpu",
        format: Int8Format | None = None,
        weight_bits: int = 8,
        include: What | Iterable[What] | None = None,
        exclude: What | Iterable[What] = (),
        momentum: float = 0.05,
        freeze_after: int | None = None,
        learn: bool = False,
    ) -> None:
        model = unwrap(model)
        _check(target, weight_bits, momentum, freeze_after)
        primitives()
        if any(FakeQuantizer.owns(hook) for each in model.modules() for hook in each._forward_pre_hooks.values()):
            raise ModelError("it is trained for quantization already", path="model", hint="finish() of the first")
        self._format = format or (Int8Format("int8", "int8", False) if target in _GPU else best_format(machine()))
        self._levels = min(2 ** (weight_bits - 1) - 1, 64 if self._format.reduce_range else 127)
        self._symmetric = target in _GPU
        layers, self._left_out = _layers(model, include, exclude)
        batches = _batches(model, data, example_inputs)

        def fresh() -> ActivationRange:
            unsigned = self._format.activations == "uint8"
            return ActivationRange(unsigned=unsigned, symmetric=self._symmetric, momentum=momentum)

        points = _first_ranges(model, layers, batches, fresh)
        names = {layer: path for path, layer in layers.items()}
        self._left_out |= {names[layer]: why for layer, why in points.reasons.items()}
        if not points.inputs:
            raise ModelError(
                "there is no layer to quantize",
                path=type(model).__name__,
                found=next(iter(self._left_out.values()), "no convolution and no linear layer"),
            )
        self._model = model
        self._batches, self._freeze_after = 0, freeze_after
        self._frozen = self._finished = False
        self._held: list[nn.Module] = []
        if self._symmetric:
            points.outputs.clear()  # TensorRT's files round inputs only
        every = dict.fromkeys([*points.inputs.values(), *(each for _, each in points.outputs.values())])
        self._learned = [each.learn() for each in every] if learn else []
        self._fakes = {layer: FakeQuantizer(layer, each, self._levels) for layer, each in points.inputs.items()}
        self._outputs = {layer: FakeOutput(place, each) for layer, (place, each) in points.outputs.items()}
        self._counter = model.register_forward_pre_hook(_Counter(self))
        if freeze_after == 0:
            self.freeze()

    @property
    def model(self) -> nn.Module:
        """The model, out of its wrapper."""
        return self._model

    @property
    def frozen(self) -> bool:
        """Whether ranges and statistics of norms are held."""
        return self._frozen

    @property
    def finished(self) -> bool:
        """Whether `finish` was called."""
        return self._finished

    def parameters(self) -> list[nn.Parameter]:
        """The steps that are learned, for the optimizer; none without `learn=True`."""
        return list(self._learned)

    def freeze(self) -> None:
        """Hold the ranges, and the statistics of batch norms (through `.train()` too), from here on.

        Steps that are learned stop too. Held statistics are those that the exported file computes with, so the last
        part of a training is best done so.
        """
        if self._frozen or self._finished:
            return
        self._frozen = True
        for fake in self._every():
            fake.frozen = True
        for step in self._learned:
            step.requires_grad_(False)
            step.grad = None
        for module in self._model.modules():
            if has_statistics(module) and not is_held(module):
                hold(module)
                self._held.append(module)

    def finish(self) -> TrainedRanges:
        """Take everything off the model, which is a plain one then with its weights as they were trained.

        Returns:
            The ranges. A second call only tells them again.
        """
        if not self._finished:
            found = self.ranges()
            for fake in self._every():
                fake.remove()
            self._counter.remove()
            for module in self._held:
                if is_held(module):
                    let_go(module)
                    module.train(self._model.training)
            self._held = []
            self._finished, self._kept = True, found
        return self._kept

    def ranges(self) -> TrainedRanges:
        """The ranges and levels as they are now, for `tt.export_onnx(..., ranges=)`; `print` shows them.

        Raises:
            EditError: A layer is not in the model any more.
        """
        if self._finished:
            return self._kept
        paths = {module: path for path, module in self._model.named_modules()}
        lost = [layer for layer in self._fakes if layer not in paths]
        if lost:
            raise EditError(
                "a layer that is trained for quantization is not in the model any more",
                found=str(lost[0]),
                hint="finish(), then edit, then a new QuantizationAware",
            )
        activations = {paths[layer]: fake.range.bounds() for layer, fake in self._fakes.items()}
        outputs = {paths[layer]: fake.range.bounds() for layer, fake in self._outputs.items()}
        return TrainedRanges(
            self._format, self._symmetric, self._levels, activations, outputs, dict(self._left_out), self._batches
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the training is, for a checkpoint."""
        return {"version": 1, "frozen": self._frozen, "ranges": self.ranges().to_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave.

        Raises:
            EditError: It is not such a state, it is of another model or format, or this has finished. Nothing has
                changed.
        """
        if self._finished:
            raise EditError("the training for quantization has finished", hint="a new QuantizationAware")
        try:
            if state["version"] != 1:
                raise InputError("another version", found=state["version"])
            frozen, found = bool(state["frozen"]), TrainedRanges.from_dict(state["ranges"])
        except (KeyError, TypeError, InputError) as error:
            raise EditError(
                f"not the state of a quantization-aware training: {error!r}", expected="what state_dict() gives"
            ) from error
        now = self.ranges()
        ours = (now.format, now.symmetric, now.levels, sorted(now.activations), sorted(now.outputs))
        theirs = (found.format, found.symmetric, found.levels, sorted(found.activations), sorted(found.outputs))
        if ours != theirs:
            raise EditError("the state is of another model, or of other types", found=theirs, expected=ours)
        for path, (low, high) in found.activations.items():
            self._fakes[self._model.get_submodule(path)].range.set(low, high)
        for path, (low, high) in found.outputs.items():
            self._outputs[self._model.get_submodule(path)].range.set(low, high)
        self._batches = found.batches
        if frozen:
            self.freeze()

    def _every(self) -> list[FakeQuantizer | FakeOutput]:
        return [*self._fakes.values(), *self._outputs.values()]

    def _count(self) -> None:
        if self._freeze_after is not None and self._batches >= self._freeze_after:
            self.freeze()
        self._batches += 1

    def __repr__(self) -> str:
        state = "finished" if self._finished else "frozen" if self._frozen else "observing"
        return f"QuantizationAware({len(self._fakes)} layers, {self._batches:,} batches, {state})"


class _Counter:
    """The hook of the whole model: counts the batches that are trained on."""

    counts_batches = True

    def __init__(self, owner: QuantizationAware) -> None:
        self._owner = owner

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if model.training and torch.is_grad_enabled():
            self._owner._count()


def _layers(
    model: nn.Module, include: What | Iterable[What] | None, exclude: What | Iterable[What]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers that may be quantized by path, and those that are left out, with the reason."""
    found: dict[str, nn.Module] = {}
    left_out: dict[str, str] = {}
    wanted = None if include is None else set(named(model, include))
    unwanted = set(named(model, exclude)) if exclude != () else set()
    for path, module in model.named_modules():
        if not isinstance(module, LAYERS):
            continue
        weight = module._parameters.get("weight")
        if is_parametrized(module, "weight") or weight is None:
            left_out[path] = "its weight is computed from others"
        elif not weight.is_floating_point():
            left_out[path] = "its weight is not floating point"
        elif (wanted is not None and weight not in wanted) or weight in unwanted:
            left_out[path] = "not included" if weight not in unwanted else "excluded"
        elif not bool(torch.isfinite(weight).all()):
            raise ModelError("weights that are NaN or infinite", path=f"{path}.weight", hint="the last good state")
        else:
            found[path] = module
    return found, left_out


def _batches(model: nn.Module, data: Any, example_inputs: ExampleInputs | None) -> Iterator[Inputs]:
    """The data as arguments of the model, up to some hundred rows."""
    batches = [data] if isinstance(data, (torch.Tensor, Mapping)) else data
    if batches is None or not isinstance(batches, Iterable):
        raise InputError(
            "the first ranges are taken from data",
            path="data",
            found=type(data).__name__,
            expected="batches of inputs, some hundred rows",
        )
    example = known_inputs(model) if example_inputs is None else Inputs.of(example_inputs)
    device = next((each.device for each in model.parameters()), torch.device("cpu"))
    rows = 0
    for number, batch in enumerate(batches):
        if example is None:
            first = batch[0] if isinstance(batch, (tuple, list)) and batch else batch
            example = Inputs.of(first)
        inputs = arguments_of(batch, model, example).map(lambda tensor: tensor.detach().to(device))
        if any(each.is_floating_point() and not bool(torch.isfinite(each).all()) for each in inputs.tensors):
            raise InputError("the data holds NaN or infinite values", path=f"data[{number}]", found=inputs.describe())
        yield inputs
        rows += inputs.batch
        if rows >= _ROWS:
            return
    if not rows:
        raise InputError("the first ranges are taken from data", path="data", found="no batches")


def _first_ranges(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterator[Inputs], fresh: Callable[[], ActivationRange]
) -> Points:
    """Where values are rounded, with ranges that hold all of the data."""
    points: Points | None = None
    handles: list[Any] = []
    try:
        with kept_modes(model), torch.no_grad(), kept_random_state():
            model.eval()
            for number, inputs in enumerate(batches):
                if points is None:
                    few = inputs.with_batch(min(inputs.batch, 2)) if inputs.batch else inputs
                    answer_to(few.fresh(), model, number)  # refuses what it does not take
                    points = find_points(model, layers, few, fresh)
                    handles += [
                        layer.register_forward_pre_hook(partial(_see_input, each), with_kwargs=True)
                        for layer, each in points.inputs.items()
                    ]
                    handles += [
                        place.register_forward_hook(partial(_see_output, each))
                        for place, each in points.outputs.values()
                    ]
                answer_to(inputs, model, number)
    finally:
        for handle in handles:
            handle.remove()
    return points or Points()


def _see_input(range: ActivationRange, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    range.see(args[0] if args else kwargs["input"], widen=True)


def _see_output(range: ActivationRange, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> None:
    range.see(output, widen=True)


def _check(target: str, weight_bits: int, momentum: float, freeze_after: int | None) -> None:
    if target not in _TARGETS:
        raise InputError(
            "no such target",
            path="target",
            found=target,
            expected=", ".join(_TARGETS),
            hint=nearest(str(target), _TARGETS),
        )
    if isinstance(weight_bits, bool) or not isinstance(weight_bits, int) or not 2 <= weight_bits <= 8:
        raise InputError("weights have 2 to 8 bits", path="weight_bits", found=weight_bits)
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float)) or not 0 < momentum <= 1:
        raise InputError("momentum is a share", path="momentum", found=momentum, expected="above 0, at most 1")
    if freeze_after is not None and (
        isinstance(freeze_after, bool) or not isinstance(freeze_after, int) or freeze_after < 0
    ):
        raise InputError("a number of batches", path="freeze_after", found=freeze_after, expected="0 or more")
