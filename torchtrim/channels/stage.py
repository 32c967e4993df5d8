"""Where a forward is followed: a copy of the model without values, and what operators give there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn

from torchtrim.channels.attention import FusedAttention
from torchtrim.channels.blank import META, Blanks, grouped_product, is_grouped
from torchtrim.channels.labels import Label
from torchtrim.channels.rules import Labels
from torchtrim.graph.copying import structural_copy
from torchtrim.graph.fakes import Fakes
from torchtrim.graph.inputs import Inputs


class Stage:
    """A model without values.

    Args:
        model: The model.
        blank: Whether its tensors are those of the meta device, or torch's fake ones, all on the CPU, where operators
            are plain.
    """

    def __init__(self, model: nn.Module, blank: bool) -> None:
        self.blank = blank
        self._model = model
        self._fakes = None if blank else Fakes()
        self._stand_ins: dict[int, torch.Tensor] = {}

    def twin(self, labels: Labels, tensors: dict[int, Label], *, hooks: bool) -> nn.Module:
        """The modules with such tensors in place of parameters and buffers, which get the labels of these."""
        if not self._stand_ins:
            with self.entered():
                for held in (*self._model.parameters(), *self._model.buffers()):
                    self._stand_ins[id(held)] = self._stand_in(held)
        for each, label in tensors.items():
            if each in self._stand_ins:
                labels.give(self._stand_ins[each], label)
        twin = structural_copy(self._model, user_hooks=hooks, stand_ins=self._stand_ins)
        for module in twin.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
                module.momentum = 0.1  # else it asks for the number of batches that it has seen; shapes are the same
        return twin

    def _stand_in(self, held: torch.Tensor) -> torch.Tensor:
        if isinstance(held, nn.Parameter):
            if type(held) is not nn.Parameter:
                return held  # a subclass (quantized weights) may not have a fake form
            return nn.Parameter(self._empty(held), requires_grad=False)
        return self._empty(held)

    def _empty(self, tensor: torch.Tensor) -> torch.Tensor:
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=META if self.blank else None)

    def given(self, inputs: Inputs) -> Inputs:
        """The inputs without values."""
        return inputs.map(self._empty)

    def entered(self) -> AbstractContextManager[Any]:
        """Tensors that are made here have no values."""
        return FusedAttention() if self._fakes is None else self._fakes

    def caller(self) -> Any:
        """What runs an operator: a function of it, its arguments and its keyword arguments."""
        return Blanks().call if self.blank else _call


def _call(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return grouped_product(*args, **kwargs) if is_grouped(op, args) else op(*args, **kwargs)


@contextmanager
def plain_recurrence() -> Iterator[None]:
    """Keep recurrent layers from running as one operator whose parts cannot be followed."""
    enabled = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)
