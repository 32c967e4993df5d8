"""What keras-surgeon does, in PyTorch terms: the 42 cases of its tests as ours, and each weight where it should be.

How they map (its test, ours):

- rebuild_submodel: `test_a_model_without_edits_is_copied_whole`
- delete_channels_rec_1: `test_dense_chain`
- conv2d_conv2d, conv2d_conv2d_next_layer, flatten: `test_conv_conv`, `test_flatten`. Channels last there is a permuted
  activation here: PyTorch's layers have their channels in the second dimension.
- maxpooling, cropping, upsampling, zeropadding, averagepooling in 1d, 2d, 3d: `test_layers_between`; a cropping is a
  padding by negative amounts. globalaveragepooling1d, 2d: `test_global_pooling`
- merge_concatenate, merge_others: `test_concatenate`, `test_merge`
- advanced_activations, noise, batchnormalization: `test_layers_between` too
- simplernn, gru, lstm: `test_recurrent`
- delete_layer, delete_layer_reuse, delete_layer_same_layer_outputs: `test_delete_layer...`
- replace_layer, insert_layer: `test_replace_layer`, `test_insert_layer`
- delete_channels_downstream_sharing: `test_downstream_sharing`. There two layers that feed a shared one lose a channel
  each, and the shared one keeps the wrong weights for one of them; here both lose both.
- delete_all_channels_in_branch, in_long_branch: `test_every_channel_of_a_branch`

What it never had: residual networks, several inputs and outputs, copies in place; here and in test_channels.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchtrim.edits.channels import delete_channels
from torchtrim.edits.insert import insert
from torchtrim.edits.remove import remove
from torchtrim.edits.replace import replace

CHANNELS = [[0], [-1], [1, 2]]


@pytest.fixture(params=CHANNELS, ids=str)
def channels(request: pytest.FixtureRequest) -> list[int]:
    return list(request.param)


@pytest.fixture(params=["channels_first", "channels_last"])
def channels_last(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "channels_last")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def without(tensor: torch.Tensor, numbers: list[int], axis: int) -> torch.Tensor:
    """The tensor without some indices along one dimension."""
    gone = {number % tensor.shape[axis] for number in numbers}
    return tensor[(slice(None),) * axis + ([each for each in range(tensor.shape[axis]) if each not in gone],)]


class Flat(nn.Module):
    """Flatten, with the channels first or last."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.movedim(1, -1) if self.last else x).flatten(1)

    def columns(self, numbers: list[int], width: int, size: int) -> list[int]:
        """Where channels of `size` values each end up."""
        gone = [number % width for number in numbers]
        if self.last:
            return [place * width + number for place in range(size) for number in gone]
        return [number * size + place for number in gone for place in range(size)]


def test_a_model_without_edits_is_copied_whole() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(32, 2))
    twin = insert(net, torch.randn(1, 1, 8, 8), nn.Identity(), after="1")
    x = torch.randn(2, 1, 8, 8)
    assert torch.equal(net(x), twin(x))


def test_dense_chain() -> None:
    net = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3), nn.Softmax(1))
    narrow = delete_channels(net, torch.randn(1, 20), "2", [0])
    assert torch.equal(narrow[2].weight, net[2].weight[1:]) and torch.equal(narrow[2].bias, net[2].bias[1:])
    assert torch.equal(narrow[4].weight, net[4].weight[:, 1:])
    assert (narrow[2].out_features, narrow[4].in_features) == (5, 5)


def test_conv_conv(channels: list[int]) -> None:
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(27, 3), nn.Linear(3, 1))
    narrow = delete_channels(net, torch.randn(1, 1, 7, 7), "0", channels)
    assert torch.equal(narrow[0].weight, without(net[0].weight, channels, 0))
    assert torch.equal(narrow[0].bias, without(net[0].bias, channels, 0))
    assert torch.equal(narrow[1].weight, without(net[1].weight, channels, 1))
    assert torch.equal(narrow[1].bias, net[1].bias)


def through(net: nn.Sequential, shape: tuple[int, ...], flat: Flat, channels: list[int]) -> None:
    """Conv, layers between, flatten, linear: the linear layer loses what read the deleted channels."""
    x = torch.randn(1, *shape)
    net.eval()
    size = net[:-1](x)[0].numel() // 3
    net.append(nn.Linear(3 * size, 5))
    narrow = delete_channels(net, x, "0", channels)
    right = without(net[-1].weight, flat.columns(channels, 3, size), 1)
    assert torch.equal(narrow[-1].weight, right)
    assert narrow[-1].in_features == right.shape[1]


def test_flatten(channels: list[int], channels_last: bool) -> None:
    flat = Flat(channels_last)
    through(nn.Sequential(nn.Conv2d(2, 3, 3), nn.Identity(), flat), (2, 6, 7), flat, channels)


class GaussianNoise(nn.Module):
    """Noise that is added in train mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.5 * torch.randn_like(x) if self.training else x


class GaussianDropout(nn.Module):
    """Noise that is multiplied in train mode."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.normal(1.0, 0.5, x.shape, device=x.device) if self.training else x


BETWEEN: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "maxpooling1d": (1, lambda: nn.MaxPool1d(2)),
    "cropping1d": (1, lambda: nn.ZeroPad1d(-3)),
    "upsampling1d": (1, lambda: nn.Upsample(scale_factor=3)),
    "zeropadding1d": (1, lambda: nn.ZeroPad1d(3)),
    "averagepooling1d": (1, lambda: nn.AvgPool1d(3)),
    "maxpooling2d": (2, lambda: nn.MaxPool2d(2)),
    "cropping2d": (2, lambda: nn.ZeroPad2d((-2, -2, -1, -1))),
    "upsampling2d": (2, lambda: nn.Upsample(scale_factor=(2, 3))),
    "zeropadding2d": (2, lambda: nn.ZeroPad2d((3, 3, 2, 2))),
    "averagepooling2d": (2, lambda: nn.AvgPool2d((2, 3))),
    "maxpooling3d": (3, lambda: nn.MaxPool3d((2, 3, 2))),
    "cropping3d": (3, lambda: nn.ConstantPad3d((-1, -1, -1, -1, 0, -1), 0.0)),
    "upsampling3d": (3, lambda: nn.Upsample(scale_factor=(2, 3, 2))),
    "zeropadding3d": (3, lambda: nn.ConstantPad3d(1, 0.0)),
    "averagepooling3d": (3, lambda: nn.AvgPool3d((2, 3, 2))),
    "leaky relu": (2, lambda: nn.LeakyReLU()),
    "elu": (2, lambda: nn.ELU(inplace=True)),
    "thresholded relu": (2, lambda: nn.Threshold(1.0, 0.0)),
    "gaussian noise": (2, GaussianNoise),
    "gaussian dropout": (2, GaussianDropout),
    "alpha dropout": (2, lambda: nn.AlphaDropout(0.5)),
    "batchnormalization": (2, lambda: nn.BatchNorm2d(3)),
}


@pytest.mark.parametrize(("channels", "last"), [([-1], False), ([1, 2], True)], ids=str)
@pytest.mark.parametrize("name", BETWEEN)
def test_layers_between(name: str, channels: list[int], last: bool) -> None:
    ndim, between = BETWEEN[name]
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[ndim - 1]
    flat = Flat(last)
    shape = (2, *((14,), (9, 8), (7, 8, 6))[ndim - 1])
    through(nn.Sequential(conv(2, 3, 3), between(), flat), shape, flat, channels)


@pytest.mark.parametrize("ndim", [1, 2])
def test_global_pooling(ndim: int, channels: list[int]) -> None:
    conv, pool = ((nn.Conv1d, nn.AdaptiveAvgPool1d), (nn.Conv2d, nn.AdaptiveAvgPool2d))[ndim - 1]
    net = nn.Sequential(conv(2, 3, 3), pool(1), nn.Flatten(), nn.Linear(3, 5))
    narrow = delete_channels(net, torch.randn(1, 2, *(8,) * ndim), "0", channels)
    assert torch.equal(narrow[3].weight, without(net[3].weight, channels, 1))


class Merged(nn.Module):
    """Two inputs, a convolution each, merged."""

    def __init__(self, merge: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], width: int, last: bool) -> None:
        super().__init__()
        self.conv_1 = nn.Conv2d(2, 3, 3)
        self.conv_2 = nn.Conv2d(2, 3, 3)
        self.flat = Flat(last)
        self.dense = nn.Linear(width * 16, 5)
        self.merge = merge

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.dense(self.flat(self.merge(self.conv_1(x), self.conv_2(y))))


def concatenated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, y], 1)


def summed(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x + y


def multiplied(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return x * y


def averaged(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.stack([x, y]).mean(0)


def maximum(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x, y)


INPUTS = (torch.zeros(1, 2, 6, 6), torch.zeros(1, 2, 6, 6))


def test_concatenate(channels: list[int], channels_last: bool) -> None:
    net = Merged(concatenated, 6, channels_last)
    narrow = delete_channels(net, INPUTS, "conv_1", channels)
    gone = net.flat.columns([number % 3 for number in channels], 6, 16)
    assert torch.equal(narrow.dense.weight, without(net.dense.weight, gone, 1))
    assert torch.equal(narrow.conv_2.weight, net.conv_2.weight)
    narrow = delete_channels(net, INPUTS, "conv_2", channels)
    gone = net.flat.columns([3 + number % 3 for number in channels], 6, 16)
    assert torch.equal(narrow.dense.weight, without(net.dense.weight, gone, 1))


@pytest.mark.parametrize("merge", [summed, multiplied, averaged, maximum])
def test_merge(merge: Any, channels: list[int], channels_last: bool) -> None:
    net = Merged(merge, 3, channels_last)
    both = delete_channels(net, INPUTS, {"conv_1": channels, "conv_2": channels})
    one = delete_channels(net, INPUTS, "conv_1", channels)
    gone = net.flat.columns(channels, 3, 16)
    for narrow in (both, one):
        assert torch.equal(narrow.dense.weight, without(net.dense.weight, gone, 1))
        assert torch.equal(narrow.conv_2.weight, without(net.conv_2.weight, channels, 0))


class Recurrent(nn.Module):
    """A recurrent layer, another, and a classifier."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first = first
        self.second = nn.GRU(9, 4, batch_first=True)
        self.dense = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.dense(self.second(self.first(x)[0])[0][:, -1])


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent(kind: Any, channels: list[int]) -> None:
    net = Recurrent(kind(10, 9, batch_first=True))
    narrow = delete_channels(net, torch.randn(1, 6, 10), "first", channels)
    assert torch.equal(narrow.second.weight_ih_l0, without(net.second.weight_ih_l0, channels, 1))
    assert (narrow.first.hidden_size, narrow.second.input_size) == (9 - len(channels), 9 - len(channels))
    gates = net.first.weight_ih_l0.shape[0] // 9
    rows = [gate * 9 + number % 9 for gate in range(gates) for number in channels]
    assert torch.equal(narrow.first.weight_ih_l0, without(net.first.weight_ih_l0, rows, 0))
    right = without(without(net.first.weight_hh_l0, rows, 0), channels, 1)
    assert torch.equal(narrow.first.weight_hh_l0, right)


class Dense(nn.Module):
    """Layers in the order of a list of names."""

    def __init__(self, order: str) -> None:
        super().__init__()
        for name, wide in (("a", 3), ("b", 3), ("c", 3), ("d", 3)):
            setattr(self, name, nn.Linear(3, wide))
        self.order = order

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def same_weights(net: nn.Module, order: str) -> Dense:
    right = Dense(order)
    right.load_state_dict(net.state_dict())
    return right


def test_delete_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(27, 3), nn.Linear(3, 3), nn.Linear(3, 1)
    )
    x = torch.randn(2, 1, 7, 7)
    assert torch.equal(remove(net, x, "4")(x), net[5](net[:4](x)))


def test_delete_layer_reuse() -> None:
    net, x = Dense("abcbd"), torch.randn(2, 3)
    assert torch.equal(remove(net, x, "b")(x), same_weights(net, "acd")(x))


def test_delete_layer_reuse_in_place() -> None:
    net, x = Dense("abcbd"), torch.randn(2, 3)
    right = same_weights(net, "acd")(x)
    assert torch.equal(remove(net, x, "b", copy=False)(x), right)


class TwoOutputs(nn.Module):
    """One layer read by two others, and a last one that both share."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_1, self.dense_2 = nn.Linear(10, 3), nn.Linear(3, 3)
        self.dense_3, self.dense_4 = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.dense_1(x)
        return self.dense_4(self.dense_3(x)), self.dense_4(self.dense_2(x))


def test_delete_layer_same_layer_outputs() -> None:
    net, x = TwoOutputs(), torch.randn(2, 10)
    one, other = remove(net, x, "dense_3")(x)
    hidden = net.dense_1(x)
    assert torch.equal(one, net.dense_4(hidden))
    assert torch.equal(other, net.dense_4(net.dense_2(hidden)))


def test_replace_layer() -> None:
    net, x, new = Dense("abd"), torch.randn(2, 3), nn.Linear(3, 3)
    assert torch.equal(replace(net, x, "b", new)(x), net.d(new(net.a(x))))


def test_insert_layer() -> None:
    net, x, new = Dense("abd"), torch.randn(2, 3), nn.Linear(3, 3)
    right = net.d(new(net.b(net.a(x))))
    assert torch.equal(insert(net, x, new, before="d")(x), right)
    assert torch.equal(insert(net, x, new, after="b")(x), right)


class Shared(nn.Module):
    """Two layers that feed a shared one."""

    def __init__(self) -> None:
        super().__init__()
        self.dense_1, self.dense_2, self.dense_3 = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.dense_3(self.dense_1(x)), self.dense_3(self.dense_2(x))


def test_downstream_sharing() -> None:
    net, x = Shared(), torch.randn(2, 5)
    narrow = delete_channels(net, x, {"dense_1": [0], "dense_2": [1]})
    assert torch.equal(narrow.dense_1.weight, net.dense_1.weight[2:])
    assert torch.equal(narrow.dense_2.weight, net.dense_2.weight[2:])
    assert torch.equal(narrow.dense_3.weight, net.dense_3.weight[:, 2:])
    one = net.dense_1(x)[:, 2:] @ net.dense_3.weight[:, 2:].T + net.dense_3.bias
    torch.testing.assert_close(narrow(x)[0], one)


class Branches(nn.Module):
    """A short branch or a long one beside another, concatenated."""

    def __init__(self, long: bool) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = nn.Conv2d(3, 2, 3), nn.Conv2d(3, 3, 3)
        self.conv_3 = nn.Conv2d(2, 4, 1) if long else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.conv_3(self.conv_1(x)), self.conv_2(x)], 1)


@pytest.mark.parametrize("long", [False, True])
def test_every_channel_of_a_branch(long: bool) -> None:
    net, x = Branches(long), torch.randn(2, 3, 20, 20)
    narrow = delete_channels(net, x, "conv_1", [0, 1], output=True)
    assert sorted(narrow.state_dict()) == ["conv_2.bias", "conv_2.weight"]
    assert torch.equal(narrow(x), net.conv_2(x))
    headed = nn.Sequential(net, nn.Conv2d(7 if long else 5, 4, 1))
    narrow = delete_channels(headed, x, "0.conv_1", slice(None))
    assert torch.equal(narrow[1].weight, headed[1].weight[:, -3:])
