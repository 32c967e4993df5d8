"""torch-pruning's criteria on our groups: each tensor of a group stands in as a small layer that it knows.

torch-pruning (https://github.com/VainF/Torch-Pruning, Fang 2023) reads a group as a list of dependencies: a layer, the
function that would prune it, and the indices. Its rules for how weights lie in layers would have to hold for the user's
model; so it gets plain `nn.Linear`, `nn.BatchNorm1d` and `nn.LayerNorm` layers that hold the group's matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from torchtrim.channels.units import IntArray
from torchtrim.importance.matrices import ChannelGroup, GroupTensor, is_bias


@dataclass(frozen=True, eq=False)
class Dependency:
    """What torch-pruning's criteria ask of a dependency: a layer, and the function that would prune it."""

    layer: nn.Module
    handler: Callable[..., Any]

    @property
    def pruning_fn(self) -> Callable[..., Any]:
        """The handler, by its other name."""
        return self.handler

    trigger = pruning_fn

    @property
    def target(self) -> Dependency:
        """The node of the layer: itself."""
        return self

    @property
    def module(self) -> nn.Module:
        """The layer, as a node calls it."""
        return self.layer


class Item(tuple[Dependency, list[int]]):
    """A dependency and its indices, which unpack as two; and the place of each index in the group."""

    root_idxs: list[int]

    @staticmethod
    def of(layer: nn.Module, handler: Callable[..., Any], rows: IntArray) -> Item:
        """All units of a layer that stands in."""
        item = Item((Dependency(layer, handler), list(range(len(rows)))))
        item.root_idxs = rows.tolist()
        return item

    @property
    def dep(self) -> Dependency:
        """The dependency."""
        return self[0]

    @property
    def idxs(self) -> list[int]:
        """The indices in the layer."""
        return self[1]


def stand_ins(group: ChannelGroup, *, shifted: bool = False) -> list[Item]:
    """A group as torch-pruning reads one.

    Weights that write or read, batch norms and layer norms stand for themselves. As in torch-pruning, other norms,
    buffers and parameters that lie outside of layers are not looked at, unless there is nothing else. Depthwise
    convolutions are: torch-pruning leaves them out.

    Args:
        group: The group.
        shifted: Take the smallest value of a matrix off all others. Distances between rows stay, and no value is
            negative: torch-pruning's criterion of distances takes those between the sizes of the weights.
    """
    if shifted:
        tensors = tuple(replace(each, values=each.values - each.values.min()) for each in group.tensors)
        group = replace(group, tensors=tensors)
    items = [_item(each) for each in group.tensors]
    return [item for item in items if item is not None] or [_weights(each) for each in group.tensors]


def observed(rows: IntArray, values: torch.Tensor) -> Item:
    """A statistic of what is read of each unit, as torch-pruning's criterion of activations takes it."""
    from torch_pruning.pruner import function

    layer = _layer(nn.Linear, None, _importance=values)
    return Item.of(layer, function.prune_linear_in_channels, rows)


def _item(tensor: GroupTensor) -> Item | None:
    bias = is_bias(tensor.role, tensor.path)
    norm = isinstance(tensor.owner, (nn.modules.batchnorm._BatchNorm, nn.LayerNorm))
    if norm and (bias or tensor.path.endswith("weight")):
        return _norm(tensor)
    return _weights(tensor) if bias or tensor.role != "holds" else None


def _weights(tensor: GroupTensor) -> Item:
    """A matrix as a linear layer, or as a convolution with a kernel of size 1 where it is one of a convolution."""
    from torch_pruning.pruner import function

    reads = tensor.role == "reads"
    convolution = isinstance(tensor.owner, nn.modules.conv._ConvNd)
    ones = (1,) * len(tensor.owner.kernel_size) if convolution else ()  # type: ignore[arg-type]

    def shaped(values: torch.Tensor) -> torch.Tensor:
        turned = values.T if reads else values
        return turned.reshape(*turned.shape, *ones)

    weight = _parameter(tensor, shaped)
    wide, deep = weight.shape[:2]
    sizes = {"out_channels": wide, "in_channels": deep, "out_features": wide, "in_features": deep}
    layer = _layer((nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)[len(ones)], weight, transposed=False, groups=1, **sizes)
    if convolution:
        handler = function.prune_conv_in_channels if reads else function.prune_conv_out_channels
    else:
        handler = function.prune_linear_in_channels if reads else function.prune_linear_out_channels
    return Item.of(layer, handler, tensor.rows)


def _norm(tensor: GroupTensor) -> Item:
    """A norm's scale or shift, as the scale of one. A unit of several channels (a head) has as many entries there."""
    from torch_pruning.pruner import function

    batch = isinstance(tensor.owner, nn.modules.batchnorm._BatchNorm)
    weight = _parameter(tensor, torch.flatten)
    layer = _layer(nn.BatchNorm1d if batch else nn.LayerNorm, weight, affine=True, elementwise_affine=True)
    handler = function.prune_batchnorm_out_channels if batch else function.prune_layernorm_out_channels
    return Item.of(layer, handler, tensor.rows.repeat(tensor.values.shape[1]))


def _layer(kind: type[nn.Module], weight: nn.Parameter | None, **attributes: Any) -> nn.Module:
    """A layer without weights of its own, which would be drawn at random."""
    layer = kind.__new__(kind)
    nn.Module.__init__(layer)
    layer._parameters |= {"weight": weight, "bias": None}
    layer.__dict__ |= {"extra_repr": str, **attributes}  # its own asks for attributes that it does not have
    return layer


def _parameter(tensor: GroupTensor, shaped: Callable[[torch.Tensor], torch.Tensor]) -> nn.Parameter:
    parameter = nn.Parameter(shaped(tensor.values), requires_grad=False)
    if tensor.gradient is not None:
        parameter.grad = shaped(tensor.gradient)
    return parameter
