"""What a parameter or buffer does for its channels: write them, read them, or hold one value each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from torchtrim.channels.labels import Label, Layer, varying
from torchtrim.channels.run import Flow, Step

Role: TypeAlias = Callable[[Label, Layer], str]

_PRODUCTS = {"convolution": (1,), "_convolution": (1,), "mm": (0, 1), "bmm": (0, 1), "mv": (0, 1), "dot": (0, 1)}
_PRODUCTS |= {"addmm": (1, 2), "baddbmm": (1, 2), "addmv": (1, 2)}  # where their operands are


def roles(flow: Flow) -> Role:
    """A function that says what a tensor's label does for the channels of one of its layers.

    `"reads"`: they are summed over in a product; `"writes"`: they are the others of such a weight; `"holds"`: all else.
    A weight that is computed from a parameter (standardised, normalised) counts as that.
    """
    consumed, made = np.zeros((2, flow.channels.count), dtype=bool)
    for layer in flow.channels.consumed:
        consumed[layer] = True
    sources: set[int] = set()
    for run in flow.runs:
        makers = {id(label): step for step in run.steps for _, label in step.outputs}
        for step in run.steps:
            for weight in _weights(step):
                for layer in weight.layers:
                    made[layer] = True
                sources |= _sources(weight, makers)

    def role(label: Label, layer: Layer) -> str:
        first = layer.flat[0]
        if consumed[first] or made[first]:
            return "reads" if consumed[first] else "writes"
        if id(label) not in sources or layer.ndim < 2 or len(label.layers) < 2:
            return "holds"
        return "reads" if varying(layer) == {1} else "writes"

    return role


def _weights(step: Step) -> Iterator[Label]:
    """The weights of a product; where both operands are computed from parameters alone, the second is."""
    operands = [step.given[number][1] for number in _PRODUCTS.get(step.name.removesuffix("_"), ())]
    static = [label for label in operands if label.static]
    yield from static[-1:]


def _sources(weight: Label, makers: dict[int, Step]) -> set[int]:
    """The labels that a weight is computed from."""
    found: set[int] = set()
    waiting = [weight]
    while waiting:
        label = waiting.pop()
        if id(label) not in found:
            found.add(id(label))
            step = makers.get(id(label))
            waiting += [] if step is None or not step.static else [given for _, given in step.given]
    return found
