"""The grids that a model was trained on to be rounded to: what an export needs to write the same ones into a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrim.bench.int8_format import Int8Format
from torchtrim.bench.table import Table
from torchtrim.errors import InputError, nearest
from torchtrim.graph.copying import structural_copy, unwrap
from torchtrim.train.fake_quantizer import FakeQuantizer, round_weight


@dataclass(frozen=True)
class TrainedRanges:
    """The ranges of activations and the levels of weights that a model was trained with. `print` shows them.

    Attributes:
        format: The 8-bit types.
        symmetric: Whether the ranges of activations lie around zero, as TensorRT takes them.
        levels: Weights are whole multiples of their channel's step from `-levels` to `levels`.
        activations: The lowest and the highest value at the input of each layer, by its path, in order of execution.
        outputs: The same at the output of those convolutions (with the norm behind them) where it is rounded too.
        left_out: The layers that were not quantized, and why.
        batches: How many batches were trained on.
    """

    format: Int8Format
    symmetric: bool
    levels: int
    activations: dict[str, tuple[float, float]]
    outputs: dict[str, tuple[float, float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    batches: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        taken = {path: list(each) for path, each in self.activations.items()}
        given = {path: list(each) for path, each in self.outputs.items()}
        return {**self.__dict__, "format": self.format._asdict(), "activations": taken, "outputs": given}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainedRanges:
        """What `to_dict` gave, read again.

        Raises:
            InputError: It is not such data.
        """
        try:
            return cls(
                Int8Format(**data["format"]),
                bool(data["symmetric"]),
                int(data["levels"]),
                {str(path): (float(low), float(high)) for path, (low, high) in data["activations"].items()},
                {str(path): (float(low), float(high)) for path, (low, high) in data["outputs"].items()},
                dict(data["left_out"]),
                int(data["batches"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"not trained ranges: {error!r}", expected="what to_dict() gives") from error

    def check(self, model: nn.Module) -> None:
        """Refuse a model that has not the layers that these are the ranges of.

        Raises:
            InputError: A layer is missing, or is none that can be quantized.
        """
        modules = dict(model.named_modules())
        for path in self.activations:
            if not isinstance(getattr(modules.get(path), "weight", None), torch.Tensor):
                raise InputError(
                    "the ranges are of another model",
                    path=path,
                    found="no such layer" if path not in modules else "a layer without a weight",
                    hint=nearest(path, modules),
                )

    def rounded(self, model: nn.Module) -> nn.Module:
        """A copy of the model with its weights rounded to their levels, and without fake quantization.

        It shares with the model what is not rounded.

        Raises:
            InputError: The ranges are of another model.
            MissingDependency: torchao is not installed.
        """
        model = unwrap(model)
        self.check(model)
        modules = dict(model.named_modules())
        rounded: dict[int, torch.Tensor] = {}
        for path in self.activations:
            weight = modules[path]._parameters["weight"]
            if weight is not None:
                rounded[id(weight)] = nn.Parameter(
                    round_weight(weight.detach(), self.levels), requires_grad=weight.requires_grad
                )
        copied = structural_copy(model, stand_ins=rounded)
        for module in copied.modules():
            for hooks in (module._forward_pre_hooks, module._forward_hooks):
                for key in [key for key, hook in hooks.items() if FakeQuantizer.owns(hook)]:
                    del hooks[key]
                    module._forward_pre_hooks_with_kwargs.pop(key, None)
                    module._forward_hooks_always_called.pop(key, None)
        return copied

    def _table(self) -> Table:
        rows = tuple(
            (path, f"{low:.4g}", f"{high:.4g}", *(f"{each:.4g}" for each in self.outputs.get(path, ())))
            for path, (low, high) in self.activations.items()
        )
        rows = tuple((*row, *("-",) * (5 - len(row))) for row in rows)
        notes = [
            f"activations in {self.format.activations}, weights from -{self.levels} to {self.levels} by output channel",
            f"{self.batches:,} batches of training",
            *(f"left out: {path or 'the model'}: {why}" for path, why in self.left_out.items()),
        ]
        columns = ("layer", "lowest input", "highest", "lowest output", "highest")
        return Table("Quantization-aware training", columns, rows, notes)

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()
