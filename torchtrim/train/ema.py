"""The running mean of a model's weights over the steps of a training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from torchtrim.errors import InputError


class Averaged:
    """An exponential moving average (EMA) of the weights and the running statistics of a model.

    The averaging is torch's (`torch.optim.swa_utils.get_ema_multi_avg_fn`); the model keeps its own weights, and has
    the averaged ones inside `swapped()`. In the first steps the decay is lower, `(1 + steps) / (10 + steps)`, so
    that the weights from before the training do not stay in the mean. Memory: one more copy of the model.

    Args:
        model: The model.
        decay: How much of the mean stays at each step, from 0 to below 1.

    Raises:
        InputError: A decay out of range.

    Example:
        >>> net = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(net.weight, 0.0)
        >>> mean = Averaged(net, decay=0.5)
        >>> _ = nn.init.constant_(net.weight, 1.0)
        >>> mean.update()
        >>> with mean.swapped():
        ...     print(round(net.weight.item(), 3))
        0.9
        >>> net.weight.item()
        1.0
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        if isinstance(decay, bool) or not isinstance(decay, (int, float)) or not 0 <= decay < 1:
            raise InputError("the decay of an average", path="ema", found=decay, expected="from 0 to below 1")
        self._model, self._decay, self._steps = model, float(decay), 0
        self._mean = {name: tensor.detach().clone() for name, tensor in self._tensors()}

    def _tensors(self) -> list[tuple[str, torch.Tensor]]:
        return [*self._model.named_parameters(), *self._model.named_buffers()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the weights as they are now into the mean."""
        decay = min(self._decay, (1 + self._steps) / (10 + self._steps))
        self._steps += 1
        of_kind: dict[tuple[torch.device, torch.dtype], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
        for name, tensor in self._tensors():
            mean = self._mean[name] = self._mean[name].to(tensor.device)
            if tensor.is_floating_point():
                means, tensors = of_kind.setdefault((tensor.device, tensor.dtype), ([], []))
                means.append(mean)
                tensors.append(tensor.detach())
            else:
                mean.copy_(tensor)
        for means, tensors in of_kind.values():
            get_ema_multi_avg_fn(decay)(means, tensors, self._steps)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Inside, the model has the averaged weights; afterwards its own again."""
        own = {name: tensor.detach().clone() for name, tensor in self._tensors()}
        self.write()
        try:
            yield
        finally:
            self._copy(own)

    def write(self) -> None:
        """Put the averaged weights into the model, for good."""
        self._copy(self._mean)

    @torch.no_grad()
    def _copy(self, values: dict[str, torch.Tensor]) -> None:
        for name, tensor in self._tensors():
            tensor.copy_(values[name])

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The averages themselves."""
        return list(self._mean.values())

    def state_dict(self) -> dict[str, object]:
        """What it takes to go on later."""
        return {"steps": self._steps, "mean": {name: tensor.clone() for name, tensor in self._mean.items()}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Go on from what `state_dict` gave."""
        steps, mean = state["steps"], state["mean"]
        if not isinstance(steps, int) or not isinstance(mean, dict) or mean.keys() != self._mean.keys():
            raise InputError("not the average of such a model", path="ema", found=type(state).__name__)
        self._steps, self._mean = steps, {name: tensor.clone() for name, tensor in mean.items()}
