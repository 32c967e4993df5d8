"""Example inputs: one form for a tensor, a tuple of them, or a dict of keyword arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.errors import InputError

ExampleInputs: TypeAlias = "torch.Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any] | Inputs"


@dataclass(frozen=True)
class Inputs:
    """The arguments of one forward call.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def of(example_inputs: ExampleInputs) -> Inputs:
        """Read what a user gives: a tensor is the only argument, a tuple or list the positional ones, a dict the named.

        Raises:
            InputError: It holds no tensor, or is none of these.

        Example:
            >>> Inputs.of(torch.zeros(2, 3)).batch
            2
            >>> sorted(Inputs.of({"ids": torch.zeros(1, 4)}).kwargs)
            ['ids']
        """
        if isinstance(example_inputs, Inputs):
            inputs = example_inputs
        elif isinstance(example_inputs, torch.Tensor):
            inputs = Inputs((example_inputs,))
        elif isinstance(example_inputs, Mapping):
            if not all(isinstance(key, str) for key in example_inputs):
                raise InputError(
                    "a dict of example inputs holds the forward's keyword arguments, so its keys are strings",
                    found=[type(key).__name__ for key in example_inputs],
                    hint="({...},) where the model takes a dict as its first argument",
                )
            inputs = Inputs((), dict(example_inputs))
        elif isinstance(example_inputs, (tuple, list)):
            inputs = Inputs(tuple(example_inputs))
        else:
            raise InputError(
                "example inputs are a tensor, or a tuple, list or dict of them", found=type(example_inputs).__name__
            )
        if not inputs.tensors:
            raise InputError("the example inputs hold no tensor", expected="at least one tensor")
        return inputs

    @property
    def tensors(self) -> list[torch.Tensor]:
        """Every tensor in it, in order."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, torch.Tensor)]

    @property
    def batch(self) -> int:
        """The size of the first dimension of the first tensor that has dimensions (1 where none has).

        Example:
            >>> Inputs.of((torch.tensor(2.0), torch.zeros(5, 3))).batch
            5
        """
        return next((int(tensor.shape[0]) for tensor in self.tensors if tensor.dim()), 1)

    def map(self, function: Callable[[torch.Tensor], Any]) -> Inputs:
        """The same arguments with every tensor passed through `function`."""
        args, kwargs = pytree.tree_map_only(torch.Tensor, function, (self.args, self.kwargs))
        return Inputs(tuple(args), dict(kwargs))

    def with_batch(self, batch: int) -> Inputs:
        """The same arguments at another batch size: rows are repeated or dropped.

        Only tensors whose first dimension is the batch are changed.

        Example:
            >>> Inputs.of(torch.zeros(2, 3)).with_batch(5).tensors[0].shape
            torch.Size([5, 3])
        """
        old = self.batch

        def resize(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.dim() == 0 or tensor.shape[0] != old or old == 0:
                return tensor
            return tensor[torch.arange(batch, device=tensor.device) % old]

        return self if batch == old else self.map(resize)

    def fresh(self) -> Inputs:
        """A copy that a model may write to."""
        return self.map(lambda tensor: tensor.detach().clone())

    def bind(self, module: nn.Module) -> dict[str, Any]:
        """The arguments by parameter name of `module.forward`, in order.

        Raises:
            InputError: They do not fit the signature.
        """
        signature = inspect.signature(module.forward)
        try:
            return dict(signature.bind(*self.args, **self.kwargs).arguments)
        except TypeError as error:
            name = f"{type(module).__name__}.forward{signature}"
            raise InputError(f"the example inputs do not fit {name}: {error}") from error

    def call(self, module: Callable[..., Any]) -> Any:
        """Call `module` with these arguments."""
        return module(*self.args, **self.kwargs)

    def describe(self) -> str:
        """Shapes and types in one line.

        Example:
            >>> Inputs.of(torch.zeros(2, 3)).describe()
            'float32[2, 3]'
        """

        def one(tensor: torch.Tensor) -> str:
            return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"

        parts = [str(pytree.tree_map_only(torch.Tensor, one, arg)).replace("'", "") for arg in self.args]
        parts += [f"{k}={pytree.tree_map_only(torch.Tensor, one, v)}".replace("'", "") for k, v in self.kwargs.items()]
        return ", ".join(parts)
