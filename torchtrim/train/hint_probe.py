"""What the values at some places of a model look like: shapes, channels, and whether they outlive the forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchtrim.edits.addresses import Address
from torchtrim.edits.cut import cut
from torchtrim.errors import EditError, InputError
from torchtrim.graph.copying import kept_random_state, structural_copy, unwrap
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.layout import width_of
from torchtrim.graph.structure import leaves
from torchtrim.train.capture import Capture


@dataclass(frozen=True)
class Probed:
    """The value at one place.

    Attributes:
        shape: Its shape for the example inputs.
        axis: Which dimension is the channels': 1 or -1; `None` where it cannot be told.
        overwritten: Whether an in-place operation writes to it later in the forward.
        calls: How often it was called.
    """

    shape: tuple[int, ...]
    axis: int | None
    overwritten: bool
    calls: int = 1


def probe(model: nn.Module, inputs: Inputs, places: Sequence[Address], whose: str) -> dict[str, Probed]:
    """One forward in eval mode, of a copy that shares the weights.

    Raises:
        InputError: The model refuses the inputs.
        PathError: A place is never called, or called several times; those of functions are looked up as `cut` does.
        EditError: A function's place cannot be watched.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True))
        >>> probe(net, Inputs.of(torch.zeros(2, 3, 8, 8)), [Address.of(net, "0")], "student")
        {'0': Probed(shape=(2, 8, 6, 6), axis=1, overwritten=True, calls=1)}
    """
    twin = structural_copy(unwrap(model), own_buffers=True, user_hooks=False).eval()
    log: list[tuple[int, bool]] = []  # the widths of the layers with weights, as they are called
    marks: dict[str, int] = {}
    for module in twin.modules():
        width = width_of(module)
        if width is not None:
            module.register_forward_hook(lambda *_, width=width: log.append(width))
    # A cut knows best what is wrong with the name of a function.
    references = {place.text: _cut_there(model, inputs, place) for place in places if place.function is not None}
    capture = _Marked(twin, places, log, marks)
    with torch.no_grad(), kept_random_state(), capture:
        _called(twin, inputs, whose)
    overwritten = capture.overwritten
    for place in places:
        if place.function is not None:
            _check_function(model, inputs, place, references[place.text])
    return {
        place.text: Probed(
            tuple(capture.values[place.text].shape),
            _axis(tuple(capture.values[place.text].shape), log[: marks[place.text]]),
            place.text in overwritten,
            capture.calls[place.text],
        )
        for place in places
    }


class _Marked(Capture):
    """Also notes how many layers with weights had been called by then."""

    def __init__(
        self, model: nn.Module, places: Sequence[Address], log: list[tuple[int, bool]], marks: dict[str, int]
    ) -> None:
        super().__init__(model, places)
        self._log, self._marks = log, marks

    def _keep(self, place: Address, output: Any) -> None:
        before = place.text in self.values
        super()._keep(place, output)
        if not before:
            self._marks[place.text] = len(self._log)


def _called(model: nn.Module, inputs: Inputs, whose: str) -> Any:
    try:
        return inputs.fresh().call(model)
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise InputError(
            f"the {whose} does not take the example inputs: {type(error).__name__}: {str(error).rstrip('.')}",
            path="example_inputs",
            found=inputs.describe(),
        ) from error


def _axis(shape: tuple[int, ...], log: list[tuple[int, bool]]) -> int | None:
    """Which dimension has the width of the nearest layer before: a convolution says first, a linear layer last."""
    if len(shape) <= 2:
        return 1
    for width, first in reversed(log[-8:]):
        here = shape[1] == width, shape[-1] == width
        if here == (True, True):
            return 1 if first else -1
        if any(here):
            return 1 if here[0] else -1
    if len(shape) == 3:
        return -1
    # Pictures are square more often than as wide as they have channels.
    squares = len(set(shape[2:])) == 1, len(set(shape[1:-1])) == 1
    return None if squares[0] == squares[1] else (1 if squares[0] else -1)


def _cut_there(model: nn.Module, inputs: Inputs, place: Address) -> nn.Module:
    twin = structural_copy(unwrap(model), own_buffers=True, user_hooks=False)
    return cut(twin, inputs, after=place.text, copy=False, check=False).eval()


def _check_function(model: nn.Module, inputs: Inputs, place: Address, reference: nn.Module) -> None:
    """What is seen of a function while the model runs is to be what a cut there computes."""
    twin = structural_copy(unwrap(model), own_buffers=True, user_hooks=False).eval()
    capture = Capture(twin, [place])
    with torch.no_grad(), kept_random_state():
        with capture:
            inputs.fresh().call(twin)
        if capture.overwritten:
            capture = Capture(twin, [place], frozenset([place.text]))
            with capture:
                inputs.fresh().call(twin)
        expected = next(iter(leaves(inputs.fresh().call(reference), torch.Tensor)), None)
    seen = capture.values[place.text]
    if expected is None or seen.shape != expected.shape or not torch.allclose(seen, expected, 1e-3, 1e-5):
        raise EditError(
            "this call cannot be told from others while the model runs",
            path=place.text,
            hint=f"the path of a module, such as {place.path!r}" if place.path else "the path of a module",
        )
