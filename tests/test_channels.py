"""`delete_channels`: what follows a deleted channel, what cannot be deleted, and that the rest computes what it did."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

import torchtrim as tt
from torchtrim.channels.follow import follow
from torchtrim.edits.channel_check import _alike_in_double
from torchtrim.edits.channels import DeleteChannels, delete_channels
from torchtrim.edits.edit import Edit, from_json, to_json
from torchtrim.errors import EditError, PathError, SelectionError, TorchTrimError
from torchtrim.graph.check import variants
from torchtrim.graph.inputs import Inputs


class Residual(nn.Module):
    """A stem, a residual block, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.one = nn.Conv2d(8, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = self.two(torch.relu(self.norm(self.one(x))))
        y += x
        return self.head(y.mean((2, 3)))


class AddsItself(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.conv(x))


X = torch.randn(2, 3, 8, 8)


def unlike_new(net: nn.Module) -> nn.Module:
    """With batch norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return net


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in net.state_dict().items()}


def same(net: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    now = net.state_dict()
    return list(now) == list(before) and all(torch.equal(now[name], before[name]) for name in before)


def all_equal(net: nn.Module) -> bool:
    """Whether every variant of the last edit's check was compared, and found equal."""
    checked = tt.history(net).entries[-1].checked[1:]
    return all("equal to" in each or "the original refuses" in each for each in checked) and "equal" in checked[0]


def test_inside_a_block() -> None:
    net = unlike_new(Residual())
    narrow = delete_channels(net, X, "one", [1, -1])
    assert [narrow.one.out_channels, narrow.norm.num_features, narrow.two.in_channels] == [4, 4, 4]
    assert torch.equal(narrow.norm.running_mean, net.norm.running_mean[[0, 2, 3, 4]])
    assert torch.equal(narrow.two.weight, net.two.weight[:, [0, 2, 3, 4]])
    silent = copy.deepcopy(net).eval()
    silent.two.weight.data[:, [1, 5]] = 0
    torch.testing.assert_close(narrow.eval()(X), silent(X))
    assert all_equal(narrow)


def test_a_residual_stream_goes_together() -> None:
    net = unlike_new(Residual())
    for path in ("stem", "two"):
        narrow = delete_channels(net, X, path, [0])
        shapes = [narrow.stem.out_channels, narrow.one.in_channels, narrow.two.out_channels, narrow.head.in_features]
        assert shapes == [7, 7, 7, 7]
        assert all_equal(narrow)


def test_resnet18() -> None:
    net = unlike_new(torchvision.models.resnet18(weights=None))
    x = torch.randn(1, 3, 64, 64)
    narrow = delete_channels(net, x, {"layer4.1.conv2": [5, 6], "layer1.0.conv1": slice(0, 32)})
    assert narrow.fc.in_features == 510 and narrow.layer4[0].downsample[0].out_channels == 510
    assert narrow.layer1[0].conv1.out_channels == 32
    assert type(narrow) is type(net) and all_equal(narrow)
    narrow(x).sum().backward()
    assert sum(p.numel() for p in narrow.parameters()) < sum(p.numel() for p in net.parameters())


def test_auxiliary_heads_of_train_mode_follow() -> None:
    net = torchvision.models.googlenet(weights=None, init_weights=False)
    narrow = delete_channels(net, torch.randn(1, 3, 96, 96), "inception4a.branch1.conv", [0, 1])
    assert narrow.aux1.conv.conv.in_channels == net.aux1.conv.conv.in_channels - 2
    assert narrow.train()(torch.randn(2, 3, 96, 96)).aux_logits1.shape == (2, 1000)


class Depthwise(nn.Module):
    """An inverted residual with squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, 12, 1)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.norm = nn.BatchNorm2d(12)
        self.reduce, self.excite = nn.Conv2d(12, 4, 1), nn.Conv2d(4, 12, 1)
        self.project = nn.Conv2d(12, 5, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.silu(self.norm(self.depthwise(self.expand(x))), inplace=True)
        gate = self.excite(torch.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return self.project(x * gate)


@pytest.mark.parametrize("path", ["expand", "depthwise", "excite"])
def test_depthwise(path: str) -> None:
    net = unlike_new(Depthwise())
    narrow = delete_channels(net, X, path, [0, 7])
    assert (narrow.depthwise.groups, narrow.depthwise.in_channels, narrow.depthwise.out_channels) == (10, 10, 10)
    assert narrow.depthwise.weight.shape == (10, 1, 3, 3)
    assert narrow.project.in_channels == narrow.reduce.in_channels == narrow.excite.out_channels == 10
    assert all_equal(narrow)


def grouped(transposed: bool = False) -> nn.Sequential:
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    return nn.Sequential(nn.Conv2d(3, 8, 1), kind(8, 12, 3, groups=4), nn.Conv2d(12, 2, 1))


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_keep_as_many_channels_each(transposed: bool) -> None:
    net = grouped(transposed)
    narrow = delete_channels(net, X, "0", [0, 3, 4, 7])
    assert (narrow[1].groups, narrow[1].in_channels, narrow[1].out_channels) == (4, 4, 12)
    assert all_equal(narrow)
    narrow = delete_channels(net, X, "1", [0, 4, 8, 9])
    assert (narrow[1].groups, narrow[1].in_channels, narrow[1].out_channels) == (4, 8, 8)
    assert all_equal(narrow)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("path", "numbers"), [("0", [2, 3]), ("1", [3, 4, 5])])
def test_whole_groups_go(path: str, numbers: list[int], transposed: bool) -> None:
    narrow = delete_channels(grouped(transposed), X, path, numbers)
    assert (narrow[0].out_channels, narrow[1].groups, narrow[1].in_channels, narrow[1].out_channels) == (6, 3, 6, 9)
    assert narrow[2].in_channels == 9 and all_equal(narrow)


def test_uneven_groups_are_refused() -> None:
    net = grouped()
    before = state(net)
    with pytest.raises(EditError, match="groups of `convolution` in '1'") as caught:
        delete_channels(net, X, "0", [0, 1, 2])
    assert caught.value.found == [0, 1, 2, 2] and "every group" in str(caught.value.hint)
    assert same(net, before)


def test_group_norm_keeps_its_groups_even() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(4, 8), nn.Conv2d(8, 2, 1))
    narrow = delete_channels(net, X, "0", [0, 2, 4, 6])
    assert (narrow[1].num_channels, narrow[1].num_groups) == (4, 4)
    whole = delete_channels(net, X, "0", [2, 3])
    assert (whole[1].num_channels, whole[1].num_groups) == (6, 3)
    with pytest.raises(EditError, match="different numbers"):
        delete_channels(net, X, "0", [2])


@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_is_run_and_not_compared(affine: bool) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8, elementwise_affine=affine), nn.Linear(8, 2))
    narrow = delete_channels(net, torch.randn(2, 5, 6), "0", [3])
    assert narrow[1].normalized_shape == (7,) and narrow[2].in_features == 7
    assert any("runs (a norm" in each for each in tt.history(narrow).entries[-1].checked)


class Shuffled(nn.Module):
    """Channels that are split, shuffled and put in space."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 8, 1)
        self.second, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = self.first(x).chunk(2, 1)
        x = nn.functional.channel_shuffle(torch.cat([self.left(one), other], 1), 2)
        return self.last(nn.functional.pixel_shuffle(self.second(x), 2))


def test_splits_shuffles_and_pixel_shuffles() -> None:
    net = Shuffled()
    narrow = delete_channels(net, X, {"first": [9], "left": [1]})  # the same of each half
    assert (narrow.left.out_channels, narrow.first.out_channels, narrow.second.in_channels) == (7, 15, 14)
    assert all_equal(narrow)
    for whole in ("left", "second"):
        with pytest.raises(EditError, match=r"a part would go whole|cannot do without it"):
            delete_channels(net, X, whole, slice(None) if whole == "left" else [0, 1, 4, 5])
    with pytest.raises(EditError, match="parts into which `channel_shuffle`"):
        delete_channels(net, X, {"first": [9], "left": [2]})
    narrow = delete_channels(net, X, "second", [0])
    assert (narrow.second.out_channels, narrow.last.in_channels) == (4, 1) and all_equal(narrow)
    with pytest.raises(TorchTrimError):
        delete_channels(net, X, "first", [1])  # the halves would no longer be halves


class Vit(nn.Module):
    """A transformer layer whose head sizes are written into its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.qkv, self.project = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)
        self.position = nn.Parameter(torch.randn(1, 5, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x) + self.position
        q, k, v = self.qkv(self.norm(x)).reshape(x.shape[0], 5, 3, 2, 4).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.project(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 5, 8))
        return self.head((x + self.down(nn.functional.gelu(self.up(x)))).mean(1))


TOKENS = torch.randn(2, 5, 6)


def test_transformer_layers() -> None:
    net = Vit()
    narrow = delete_channels(net, TOKENS, "up", [0, 5, 15])
    assert (narrow.up.out_features, narrow.down.in_features) == (13, 13) and all_equal(narrow)
    with pytest.raises(EditError, match=r"channels|shape"):
        delete_channels(net, TOKENS, "qkv", [0])


class Tied(nn.Module):
    """An embedding whose weight is the decoder's too, and a layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix = nn.Embedding(11, 6), nn.Linear(6, 6)
        self.decode = nn.Linear(6, 11, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.decode(torch.tanh(self.mix(torch.tanh(self.mix(self.embed(ids))))))


def test_tied_and_shared_layers() -> None:
    net, ids = Tied(), torch.randint(0, 11, (2, 4))
    narrow = delete_channels(net, ids, "embed", [2])
    assert narrow.decode.weight is narrow.embed.weight and narrow.embed.weight.shape == (11, 5)
    assert (narrow.embed.embedding_dim, narrow.decode.in_features) == (5, 5)
    assert (narrow.mix.in_features, narrow.mix.out_features) == (5, 5) and all_equal(narrow)


def test_weights_that_are_computed() -> None:
    net = nn.Sequential(weight_norm(nn.Linear(6, 8)), nn.PReLU(8), weight_norm(nn.Linear(8, 2)))
    narrow = delete_channels(net, torch.randn(2, 6), "0", [0, 1])
    assert narrow[0].parametrizations.weight.original1.shape == (6, 6)
    assert (narrow[0].out_features, narrow[1].num_parameters, narrow[2].in_features) == (6, 6, 6)
    assert narrow(torch.randn(3, 6)).shape == (3, 2)


class Many(nn.Module):
    """Several inputs and outputs, in a dict; a sum of places that flatten to fixed sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.words = nn.Conv2d(3, 4, 3), nn.Linear(5, 4)
        self.mix, self.unflatten = nn.Linear(144, 18), nn.Unflatten(1, (2, 9))
        self.left, self.right = nn.Linear(9, 2), nn.Linear(4, 3)

    def forward(self, image: torch.Tensor, words: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.image(image) * self.words(words)[:, :, None, None]
        return {"a": self.left(self.unflatten(self.mix(x.flatten(1)))), "b": self.right(x.amax((2, 3)))}


def test_several_inputs_and_outputs() -> None:
    net, inputs = Many(), {"image": torch.randn(2, 3, 8, 8), "words": torch.randn(2, 5)}
    narrow = delete_channels(net, inputs, "words", [3])
    assert narrow.image.out_channels == 3 and narrow.mix.in_features == 108 and narrow.right.in_features == 3
    assert all_equal(narrow)
    narrow = delete_channels(net, inputs, {"mix": [0, 9], "right": [1]}, output=True)
    assert narrow.unflatten.unflattened_size == (2, 8) and narrow.left.in_features == 8
    assert narrow(**inputs)["b"].shape == (2, 2) and all_equal(narrow)


class Gated(nn.Module):
    """Branches that are added, multiplied and concatenated."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.gate = (nn.Conv2d(3, 4, 1) for _ in range(4))
        self.norm, self.head = nn.BatchNorm2d(4), nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one = self.a(x) + self.norm(self.b(x))
        return self.head(torch.cat([one, self.c(x) * self.gate(x).sigmoid()], 1))


def test_a_whole_branch_of_a_sum() -> None:
    net = unlike_new(Gated()).eval()
    narrow = delete_channels(net, X, "b", range(4))
    assert not hasattr(narrow, "b") and not hasattr(narrow, "norm")
    right = net.head(torch.cat([net.a(X), net.c(X) * net.gate(X).sigmoid()], 1))
    torch.testing.assert_close(narrow(X), right)
    assert "b" in tt.history(narrow).entries[-1].removed


def test_a_whole_residual_branch_whose_activation_is_shared() -> None:
    net = unlike_new(torchvision.models.resnet18(weights=None)).eval()
    x = torch.randn(2, 3, 32, 32)
    narrow = delete_channels(net, x, "layer1.0.conv1", slice(None))
    assert sorted(name for name, _ in narrow.layer1[0].named_children()) == ["relu"] and all_equal(narrow)
    stem = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    torch.testing.assert_close(narrow.layer1(stem), net.layer1[1](stem.relu()))
    deeper = delete_channels(net, x, "layer2.1.conv2", slice(None))  # what is left is written to by a later layer
    assert all_equal(deeper)
    deeper.train()(x).sum().backward()


def test_a_whole_branch_in_place() -> None:
    net = unlike_new(Gated()).eval()
    head, right = net.head, delete_channels(net, X, "a", range(4))
    narrow = delete_channels(net, X, "a", range(4), copy=False)
    assert narrow.head is head and sorted(narrow.state_dict()) == sorted(right.state_dict())
    torch.testing.assert_close(narrow(X), right(X))


def test_a_whole_branch_and_channels_in_one_pass() -> None:
    net = unlike_new(Gated()).eval()
    narrow = delete_channels(net, X, {"b": range(4), "a": [0], "c": [2, 3]})
    assert narrow.head.in_channels == 5 and narrow.gate.out_channels == 2
    right = net.head.weight[:, [1, 2, 3, 4, 5]]
    assert torch.equal(narrow.head.weight, right)


def test_what_needs_a_branch_keeps_it() -> None:
    net = Gated()
    before = state(net)
    with pytest.raises(EditError, match="`mul` in the model's forward cannot do without it"):
        delete_channels(net, X, "gate", range(4))
    with pytest.raises(EditError, match="every channel of the model's output"):
        delete_channels(net, X, "head", range(2), output=True)
    assert same(net, before) and not tt.history(net).entries


WRONG: list[tuple[Any, Any, type[TorchTrimError], str]] = [
    ("stme", [0], PathError, "'stem'"),
    ("stem", [8], SelectionError, "found: 8; expected: -8 to 7"),
    ("stem", [-9], SelectionError, "-8 to 7"),
    ("stem", [0.5], SelectionError, "whole numbers"),
    ("stem", [True, 3], SelectionError, "whole numbers"),
    ("stem", "0", SelectionError, "whole numbers"),
    ("stem", [], EditError, "no channels"),
    ("stem", None, EditError, "which channels"),
    ({"stem": [0]}, [0], EditError, "in a dict"),
    ({}, None, EditError, "no channels"),
    ("stem", [True, False], SelectionError, "a mask of another length"),
    ("head", [0], EditError, "output=True"),
    ("stem", range(8), EditError, "every channel of the model's output"),
]


@pytest.mark.parametrize(("path", "channels", "kind", "text"), WRONG, ids=[str(row[:2]) for row in WRONG])
def test_what_cannot_be_asked(path: Any, channels: Any, kind: type[TorchTrimError], text: str) -> None:
    net = Residual()
    before = state(net)
    with pytest.raises(kind) as caught:
        delete_channels(net, X, path, channels)
    assert text in str(caught.value)
    assert same(net, before)


def test_ways_of_naming_channels() -> None:
    net = Residual()
    right = delete_channels(net, X, "one", [0, 2])
    mask = torch.tensor([True, False, True, False, False, False])
    for channels in (
        torch.tensor([2, 0]),
        mask,
        mask.tolist(),
        mask.numpy(),
        slice(0, 4, 2),
        (2, 0, -6),
        range(0, 3, 2),
    ):
        assert same(delete_channels(net, X, "one", channels), state(right))
    assert delete_channels(net, X, "one", 3).one.out_channels == 5


class Fixed(nn.Module):
    """Widths that are written into the forward, each in its own way."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.conv, self.head, self.way = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1), way
        self.tail = nn.Conv2d(2, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        if self.way == "view":
            x = x.view(-1, 8, 8, 8)
        elif self.way == "picked":
            x = x + x[:, 0].unsqueeze(1)
        elif self.way == "one":
            x = x + x[:, 1:2]
        elif self.way == "window":
            return self.tail(x[:, 4:6])
        elif self.way == "steps":
            x = torch.cat([x[:, ::2], x[:, 1::2]], 1)
        elif self.way == "sort":
            x = x.sort(1).values
        return self.head(x)


@pytest.mark.parametrize(
    ("way", "text"),
    [
        ("view", "view"),
        ("picked", "select"),
        ("one", "slice"),
        ("window", "slice"),
        ("steps", "slice"),
        ("sort", "sort"),
    ],
)
def test_where_the_forward_does_not_follow(way: str, text: str) -> None:
    net = Fixed(way)
    before = state(net)
    with pytest.raises(EditError, match=text if way != "view" else "shape|width"):
        delete_channels(net, X, "conv", [0, 1])
    assert same(net, before)


def test_in_place_parameters_keep_their_identity_and_their_gradients() -> None:
    net = unlike_new(Residual())
    net.stem.weight.requires_grad_(False)
    net(X).sum().backward()
    held, gradient = dict(net.named_parameters()), net.two.weight.grad.clone()
    right = delete_channels(net, X, "one", [0])
    narrow = delete_channels(net, X, "one", [0], copy=False)
    assert narrow is net and dict(net.named_parameters()).keys() == held.keys()
    assert all(parameter is held[name] for name, parameter in net.named_parameters())
    assert torch.equal(net.two.weight.grad, gradient[:, 1:])
    assert net.two.weight.shape == (8, 5, 3, 3) and net.norm.num_features == 5
    assert not net.stem.weight.requires_grad and same(net, state(right))


def test_recurrent_in_place() -> None:
    net = nn.Sequential()
    net.append(nn.LSTM(5, 4, num_layers=2, batch_first=True))
    held = list(net.parameters())
    narrow = delete_channels(net, torch.randn(2, 3, 5), "0", [1], output=True, copy=False)
    assert all(one is other for one, other in zip(narrow.parameters(), held, strict=True))
    assert narrow(torch.randn(2, 3, 5))[0].shape == (2, 3, 3)


def test_types_flags_and_modes_stay() -> None:
    net = Residual().double().eval()
    net.one.weight.requires_grad_(False)
    narrow = delete_channels(net, X.double(), "one", [0])
    assert narrow.one.weight.dtype == torch.float64 and not narrow.one.weight.requires_grad
    assert not narrow.training and not any(module.training for module in narrow.modules())


def test_the_record_does_it_again() -> None:
    net = unlike_new(Gated())
    narrow = delete_channels(net, X, {"a": [-1], "gate": [0, 0]})
    (edit,) = tt.history(narrow).edits
    assert isinstance(edit, DeleteChannels) and edit.channels == {"a": (3,), "gate": (0,)}
    assert edit.narrowed["head.weight"] == {"1": (3, 4)}
    assert from_json(to_json([edit])) == [edit] and Edit.from_dict(edit.to_dict()) == edit
    assert same(tt.apply(net, X, [edit.to_dict()]), state(narrow))
    assert str(edit) == "delete_channels(a: 3; gate: 0)"
    assert same(tt.apply(net, X, [{"kind": "delete_channels", "channels": {"a": [3], "gate": [0]}}]), state(narrow))


def test_plan_says_what_follows() -> None:
    planned = tt.plan(Residual(), X, DeleteChannels({"one": (0, 1)}))
    assert planned.params[1] < planned.params[0] and planned.macs[1] < planned.macs[0]
    assert "one: (1, 6, 8, 8) -> (1, 4, 8, 8) narrowed" in str(planned)
    assert "narrowed with them: norm, two" in planned.steps[0].notes


def test_after_other_edits_and_before() -> None:
    net = unlike_new(Residual())
    body = tt.cut(net, X, after=":add")
    narrow = delete_channels(body, X, "one", [0])
    again = delete_channels(narrow, X, "stem", [0], output=True)
    assert again(X).shape == (2, 7, 8, 8) and len(tt.history(again).entries) == 3


def test_it_computes_nothing_of_a_model_on_the_meta_device() -> None:
    net = Residual().to("meta")
    narrow = delete_channels(net, X.to("meta"), "stem", [0])
    assert narrow.one.weight.shape == (6, 7, 3, 3) and narrow.one.weight.is_meta


class Standardised(nn.Conv2d):
    """A convolution whose weight is standardised over its inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = self.weight.reshape(1, self.out_channels, -1)
        weight = nn.functional.batch_norm(flat, None, None, training=True).reshape_as(self.weight)
        return nn.functional.conv2d(x, weight, self.bias, groups=self.groups)


def test_standardised_weights() -> None:
    net = nn.Sequential(Standardised(3, 8, 3), nn.ReLU(), Standardised(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1))
    narrow = delete_channels(net, X, "0", [1, 5])
    assert (narrow[2].in_channels, narrow[2].groups, narrow[2].weight.shape[1]) == (6, 2, 3)
    assert all_equal(delete_channels(net, X, "2", [1, 5]))


class Functional(nn.Module):
    """A layer whose weight is read without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(nn.functional.linear(x, self.first.weight, self.first.bias).relu())


def test_a_layer_that_is_not_called() -> None:
    narrow = delete_channels(Functional(), torch.randn(2, 6), "first", [0, -1])
    assert narrow.first.out_features == narrow.second.in_features == 6 and all_equal(narrow)


@pytest.mark.parametrize(("name", "path", "size"), [("test_resnet", "layer4.0.conv2", 64), ("test_vit2", "norm", 64)])
def test_the_model_counts_its_features(name: str, path: str, size: int) -> None:
    net, x = timm.create_model(name), torch.randn(1, 3, size, size)
    narrow = delete_channels(net, x, path, [0, 1])
    assert narrow.num_features == net.num_features - 2
    narrow.reset_classifier(7)
    assert narrow(x).shape == (1, 7)


def test_a_norm_over_two_values_makes_much_of_rounding() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5).eval()
    net = tt.delete_channels(model, torch.randn(2, 3, 32, 32), "layer1.0.conv1", [0])
    assert net.get_submodule("layer1.0.conv1").out_channels == 63


def test_a_wrong_model_is_as_wrong_in_double_precision() -> None:
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=5)
    inputs = Inputs.of(torch.randn(2, 3, 32, 32))
    flow = follow(model, inputs)
    none, train = np.zeros(flow.channels.count, dtype=bool), variants(inputs)[1]
    wrong = copy.deepcopy(model)
    with torch.no_grad():
        wrong.get_submodule("layer4.1.bn2").weight[3] += 0.01
    assert _alike_in_double(model, copy.deepcopy(model), train, flow.runs[1], none)
    assert not _alike_in_double(model, wrong, train, flow.runs[1], none)


@pytest.mark.parametrize(
    ("adapter", "widths", "channel", "left"),
    [("auto", (4, 8), 0, 7), ("slice", (8, 4), 0, 3), ("slice", (8, 4), 6, 4)],
)
def test_channels_before_an_adapter(adapter: str, widths: tuple[int, int], channel: int, left: int) -> None:
    x = torch.randn(2, 3, 16, 16)
    one, two = widths
    model = nn.Sequential(nn.Conv2d(3, one, 1), nn.Conv2d(one, two, 1), nn.ReLU(), nn.Conv2d(two, 2, 1))
    net = tt.delete_channels(tt.remove(model, x, "1", adapter=adapter), x, "0", [channel])
    assert net[1].channels == left


@pytest.mark.parametrize(
    ("numbers", "left"), [([6], (4, 7)), ([1], (3, 7)), ([1, 4, 5], (3, 5)), ([4, 5, 6, 7], (4, 4))]
)
def test_channels_behind_an_adapter(numbers: list[int], left: tuple[int, int]) -> None:
    x = torch.randn(2, 3, 16, 16)
    widening = nn.Conv2d(4, 8, 3, stride=2, padding=1)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), widening, AddsItself(8), nn.Conv2d(8, 2, 1))
    net = tt.remove(model, x, "1", adapter="pool")
    for path in ("2.conv", "1"):
        narrow = tt.delete_channels(net, x, path, numbers)
        assert (narrow[0].out_channels, narrow[1].channels.channels) == left
        assert (narrow[2].conv.in_channels, narrow[3].in_channels) == (left[1], left[1])


def test_the_count_of_classes_and_a_cumulative_average() -> None:
    model = timm.create_model("test_resnet", num_classes=7)
    net = tt.delete_channels(model, torch.randn(2, 3, 64, 64), "fc", [0], output=True)
    assert (net.num_classes, net.fc.out_features) == (6, 6)
    norm = nn.BatchNorm2d(8, momentum=None)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), norm, nn.Conv2d(8, 2, 1)).eval()
    net = tt.delete_channels(model, torch.randn(2, 3, 16, 16), "0", [0])
    assert (net[1].num_features, net[1].momentum) == (7, None)


class Recurrent(nn.Module):
    def __init__(self, layers: int, both: bool) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 5, layers, batch_first=True, bidirectional=both, proj_size=3)
        self.head = nn.Linear(6 if both else 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.rnn(x)[0])


@pytest.mark.parametrize(("layers", "both"), [(1, False), (2, False), (2, True)])
def test_a_recurrent_layer_with_a_projection(layers: int, both: bool) -> None:
    net = tt.delete_channels(Recurrent(layers, both), torch.randn(2, 7, 6), "rnn", [0])
    assert (net.rnn.hidden_size, net.rnn.proj_size) == (5, 2)
    assert net.head.in_features == (4 if both else 2)


def test_residual_sums_keep_as_few_layers_as_their_parts() -> None:
    net = torchvision.models.swin_t(weights=None).eval()
    flow = follow(net, Inputs.of(torch.zeros(1, 3, 64, 64)))
    most = max(len(label.layers) for run in flow.runs for step in run.steps for _, label in step.outputs)
    assert most <= 8  # not twice as many with each sum
