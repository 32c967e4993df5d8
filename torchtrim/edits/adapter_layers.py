"""The layers that stand where something was removed: they hand on what they get, as it is needed there."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from torch.nn import functional


class PassOn(nn.Module):
    """Hands on one of its arguments, in the form that the module it stands for returned.

    Args:
        argument: Which argument: its position, or its name.
        item: Which item of it, where the argument is a list.
        form: `"value"`: the value alone; `"tuple"` or `"list"`: with others around it.
        outputs: What such a tuple holds: `"value"`, `"none"`, or an argument by position or name (`"=1"`, `"=mask"`).
        copied: Whether it is a copy, because what follows writes to it.
        adapter: What the value goes through.

    Example:
        >>> hidden, mask = torch.zeros(1, 4), torch.ones(1)
        >>> [output.shape[-1] for output in PassOn(form="tuple", outputs=("value", "=1"))(hidden, mask)]
        [4, 1]
    """

    def __init__(
        self,
        argument: int | str = 0,
        item: int | None = None,
        form: str = "value",
        outputs: tuple[str, ...] = (),
        copied: bool = False,
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.argument = argument
        self.item = item
        self.form = form
        self.outputs = tuple(outputs)
        self.copied = copied
        self.adapter = adapter

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The value, from the arguments of the module it stands for."""
        value = _argument(self.argument, args, kwargs)
        if self.item is not None:
            value = value[self.item]
        if self.copied:
            value = value.clone()
        if self.adapter is not None:
            value = self.adapter(value)
        if self.form == "value":
            return value
        found = [value if one == "value" else _other(one, args, kwargs) for one in self.outputs]
        return found if self.form == "list" else tuple(found)

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        given = f"{self.argument!r}" if self.item is None else f"{self.argument!r}, item={self.item}"
        return given if self.form == "value" else f"{given}, {self.form}({', '.join(self.outputs)})"


def _argument(which: int | str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[which] if isinstance(which, int) else kwargs[which]


def _other(which: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if which == "none":
        return None
    name = which.removeprefix("=")
    return args[int(name)] if name.isdigit() else kwargs[name]


class FitChannels(nn.Module):
    """The first channels of a value, or all of them with zeros behind: the shortcut "A" of ResNet.

    Source: He et al., Deep Residual Learning for Image Recognition, 2015, section 3.3.

    Args:
        channels: How many there are to be.
        dim: The dimension that they are in.

    Example:
        >>> FitChannels(5)(torch.ones(1, 3, 2, 2)).sum(dim=(2, 3))
        tensor([[4., 4., 4., 0., 0.]])
    """

    pads_channels: ClassVar = True  # it can be told to add fewer, when channels are deleted

    def __init__(self, channels: int, dim: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The value with the wanted number of channels."""
        missing = self.channels - x.shape[self.dim]
        if missing <= 0:
            return x.narrow(self.dim, 0, self.channels)
        behind = (x.dim() - 1 - self.dim % x.dim()) * 2
        return functional.pad(x, [0] * (behind + 1) + [missing])

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"{self.channels}, dim={self.dim}"


class ChannelsLast(nn.Module):
    """A layer made for channels in front, for values that have them last.

    Args:
        layer: The layer, which takes the channels as dimension 1.

    Example:
        >>> ChannelsLast(nn.AvgPool2d(2))(torch.zeros(1, 4, 6, 8)).shape
        torch.Size([1, 2, 3, 8])
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output, channels last."""
        found: torch.Tensor = self.layer(x.movedim(-1, 1))
        return found.movedim(1, -1)


class TokenGrid(nn.Module):
    """A layer made for pictures, for tokens (batch, tokens, channels) that lie in a square grid.

    Args:
        layer: The layer, which takes (batch, channels, height, width).
        prefix: How many tokens in front (class tokens) are not of the grid; they stay as they are.

    Example:
        >>> TokenGrid(nn.AvgPool2d(2), prefix=1)(torch.zeros(1, 17, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(self, layer: nn.Module, prefix: int = 0) -> None:
        super().__init__()
        self.layer = layer
        self.prefix = prefix

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The tokens of the grid that the layer made, behind those in front."""
        side = round((x.shape[1] - self.prefix) ** 0.5)
        grid = x[:, self.prefix :].transpose(1, 2).unflatten(2, (side, side))
        tokens = self.layer(grid).flatten(2).transpose(1, 2)
        return torch.cat([x[:, : self.prefix], tokens], dim=1) if self.prefix else tokens

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"prefix={self.prefix}"


class ToTokens(nn.Module):
    """Pictures (batch, channels, height, width) as tokens (batch, height * width, channels).

    Example:
        >>> ToTokens()(torch.zeros(1, 8, 2, 3)).shape
        torch.Size([1, 6, 8])
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The picture as tokens."""
        return x.flatten(2).transpose(1, 2)


class MeanOver(nn.Module):
    """The mean over one dimension.

    Args:
        dim: The dimension, which goes.

    Example:
        >>> MeanOver(1)(torch.zeros(2, 7, 8)).shape
        torch.Size([2, 8])
    """

    def __init__(self, dim: int = 1) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The mean."""
        return x.mean(self.dim)

    def extra_repr(self) -> str:
        """The settings, for `print`."""
        return f"dim={self.dim}"
