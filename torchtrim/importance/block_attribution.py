"""Metrics by attribution, through captum: how much of the answer is put down to what comes out of each block."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from torchtrim.errors import EditError, InputError, MissingDependency
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.answers import answer_in, class_axis
from torchtrim.importance.block_metrics import Asked, Found, calm
from torchtrim.importance.spans import Span

_STEPS = 16  # on the way from nothing to the input


def conductance(asked: Asked) -> Found:
    """The conductance of each block's output (Dhamdhere et al. 2018), for the class that the model answers."""
    return _attributed(asked, "LayerConductance", lambda made, given, target: _by_steps(asked, made, given, target))


def relevance(asked: Asked) -> Found:
    """The relevance of each block's output by layer-wise propagation (Bach et al. 2015), where captum has a rule."""

    def by_rules(made: Any, given: Inputs, target: Any) -> Any:
        asked.forwards += 2 * given.batch  # captum runs the model once for its hooks, and once for the gradients
        asked.backwards += given.batch
        return made.attribute(given.args, target=target)

    return _attributed(asked, "LayerLRP", by_rules)


def _by_steps(asked: Asked, made: Any, given: Inputs, target: Any) -> Any:
    asked.forwards += _STEPS * given.batch
    asked.backwards += _STEPS * given.batch
    return made.attribute(given.args, target=target, n_steps=_STEPS, internal_batch_size=given.batch)


def _attributed(asked: Asked, method: str, called: Callable[[Any, Inputs, Any], Any]) -> Found:
    try:
        from captum import attr
    except ImportError as error:
        raise MissingDependency("captum is not installed", hint='pip install "torchtrim[attribution]"') from error
    twin = _Answering(asked.twin())
    totals = [0.0] * len(asked.spans)
    with calm(slopes=True):
        for number, _, given in asked.batches("attribution"):
            if given.kwargs or not all(isinstance(each, torch.Tensor) for each in given.args):
                raise InputError(
                    "captum takes inputs that are tensors by their position",
                    path=f"data[{number}]",
                    found=given.describe(),
                )
            if not all(each.is_floating_point() for each in given.args):
                raise InputError(
                    "attribution goes from nothing to the input by small steps, which whole numbers do not take",
                    path=f"data[{number}]",
                    found=given.describe(),
                    hint='metric="fisher" or "taylor"',
                )
            with torch.no_grad():
                answer = answer_in(asked.answered(twin.model, given, number), number)
            if answer.dim() != 2:
                raise InputError("attribution needs a row of classes for each input", found=list(answer.shape))
            target = answer.argmax(class_axis(answer))
            for place, span in enumerate(asked.spans):
                layer = twin.model.get_submodule(span.blocks[-1].path)
                found = _tried(partial(called, getattr(attr, method)(twin, layer), given, target), span)
                values = found[0] if isinstance(found, (tuple, list)) else found
                totals[place] += float(values.detach().double().abs().sum())
    return Found(
        [total / asked.rows for total in totals],
        f"captum's {method}: sum of sizes over the block's output",
        ("in a chain of blocks the signed sums are all the same: the sizes tell the blocks apart",),
    )


class _Answering(nn.Module):
    """The model, giving the tensor that is meant."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        return answer_in(self.model(*args), 0)


def _tried(attribute: Callable[[], Any], span: Span) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return attribute()
    except (TypeError, AssertionError, RuntimeError, ValueError, AttributeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise EditError(
            f"captum cannot attribute to it: {' '.join(str(error).split())}",
            path=span.name,
            hint='metric="attribution", or "fisher"',
        ) from error
