"""New heads: in place of a model's own, after a cut, for every layout of features; and heads that do not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import torchtrim as tt
from torchtrim.graph.check import differs

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18()


def test_in_place_the_class_and_everything_else_stay(resnet: nn.Module) -> None:
    net = tt.attach_head(resnet, X, num_classes=7).eval()
    assert type(net) is type(resnet)
    assert net(X).shape == (2, 7)
    assert list(net.state_dict()) == list(resnet.state_dict())
    same = {name: value for name, value in net.state_dict().items() if not name.startswith("fc.")}
    assert differs(same, {name: resnet.state_dict()[name] for name in same}) is None
    assert resnet.fc.out_features == 1000
    assert not {p.data_ptr() for p in net.parameters()} & {p.data_ptr() for p in resnet.parameters()}


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize(
    "name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_mambaout", "test_nfnet"]
)
def test_timm_models_tell_the_truth(name: str, bare: bool) -> None:
    model = timm.create_model(name, num_classes=0 if bare else 20)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    net = tt.attach_head(model, x, num_classes=7)
    assert type(net) is type(model)
    assert net.num_classes == 7
    assert net.get_classifier().out_features == 7
    assert net.eval()(x).shape == (2, 7)
    net.reset_classifier(5)
    assert net(x).shape == (2, 5)


def test_distilled_models_have_two_heads() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32)
    net = tt.attach_head(model, torch.zeros(1, 3, 32, 32), num_classes=7)
    assert [head.out_features for head in net.get_classifier()] == [7, 7]
    assert tt.history(net).edits[0].paths == ("head", "head_dist")


def test_auxiliary_and_convolutional_heads() -> None:
    squeeze = tt.attach_head(torchvision.models.squeezenet1_1(), X, num_classes=7)
    assert (squeeze.classifier[1].out_channels, squeeze.num_classes) == (7, 7)
    assert squeeze(X).shape == (2, 7)
    google = torchvision.models.googlenet(init_weights=False)
    net = tt.attach_head(google, X, num_classes=7).train()
    assert [tuple(output.shape) for output in net(X)] == [(2, 7)] * 3
    fcn = torchvision.models.segmentation.fcn_resnet50(weights=None, weights_backbone=None, aux_loss=True)
    outputs = tt.attach_head(fcn, X, num_classes=7).eval()(X)
    assert {name: tuple(value.shape) for name, value in outputs.items()} == {
        "out": (2, 7, 64, 64),
        "aux": (2, 7, 64, 64),
    }


def test_hidden_layers_and_dropout(resnet: nn.Module) -> None:
    head = tt.attach_head(resnet, X, num_classes=7, hidden=(32, 16), dropout=0.3).fc
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Linear", "ReLU", "Dropout", "Linear"]
    assert [layer.out_features for layer in head if isinstance(layer, nn.Linear)] == [32, 16, 7]
    assert head.dropout.p == 0.3


@pytest.mark.parametrize(
    ("name", "after", "layout", "width"),
    [
        ("test_resnet", "layer2", "NCHW", 48),
        ("test_vit", "blocks.1", "NLC", 64),
        ("test_convnext", "stages.1", "NCHW", 32),
        ("test_mambaout", "stages.1", "NHWC", 32),
        ("test_vit", "norm", "NLC", 64),
        ("test_resnet", "global_pool", "flat", 96),
    ],
)
def test_layout_and_width_are_found(name: str, after: str, layout: str, width: int) -> None:
    model = timm.create_model(name)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    net = tt.attach_head(tt.cut(model, x, after=after), x, num_classes=7)
    record = tt.history(net).edits[1]
    assert (record.layout, record.in_features) == (layout, width)
    assert net.eval()(x).shape == (2, 7)
    assert net.head.fc.in_features == width


def test_swin_and_video_layouts() -> None:
    swin = torchvision.models.swin_t()
    x = torch.randn(1, 3, 64, 64)
    cut = tt.cut(swin, x, after="features.3", check=False)
    assert tt.history(tt.attach_head(cut, num_classes=3, check=False)).edits[1].layout == "NHWC"
    video = torchvision.models.video.r3d_18()
    clip = torch.randn(1, 3, 4, 32, 32)
    net = tt.attach_head(tt.cut(video, clip, after="layer2"), num_classes=3)
    assert tt.history(net).edits[1].layout == "NCDHW"
    assert net.eval()(clip).shape == (1, 3)
    sound = nn.Sequential(nn.Conv1d(1, 6, 3), nn.ReLU(), nn.Conv1d(6, 6, 3), nn.BatchNorm1d(6))
    net = tt.attach_head(sound, torch.randn(2, 1, 30), num_classes=3)
    assert tt.history(net).edits[0].layout == "NCL"


def test_as_many_channels_as_places() -> None:
    first = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8))
    last = nn.Sequential(nn.Linear(3, 8), nn.LayerNorm(8))
    assert tt.history(tt.attach_head(first, torch.zeros(1, 3, 8, 8), num_classes=2)).edits[0].layout == "NCHW"
    assert tt.history(tt.attach_head(last, torch.zeros(1, 8, 8, 3), num_classes=2)).edits[0].layout == "NHWC"


@pytest.mark.parametrize(
    ("pool", "shape"), [("avg", (2, 7)), ("max", (2, 7)), ("token", (2, 7)), ("attention", (2, 7)), (None, (2, 101, 7))]
)
def test_pooling_of_tokens(pool: str | None, shape: tuple[int, ...]) -> None:
    model = timm.create_model("test_vit")
    x = torch.randn(2, 3, 160, 160)
    cut = tt.cut(model, x, after="blocks.3", check=False).eval()
    net = tt.attach_head(cut, x, num_classes=7, pool=pool, check=False).eval()
    assert net(x).shape == shape
    features = cut(x)
    pooled = {"avg": features.mean(1), "max": features.amax(1), "token": features[:, 0], "attention": features.mean(1)}
    expected = net.head.fc(pooled[pool] if pool else features)  # an untrained attention pool is the mean
    torch.testing.assert_close(net(x), expected)


def test_a_head_of_ones_own(resnet: nn.Module) -> None:
    own = nn.Sequential(nn.Linear(512, 9), nn.ReLU(), nn.Linear(9, 4))
    net = tt.attach_head(resnet, X, head=own)
    assert net.fc is own
    assert net(X).shape == (2, 4)
    behind = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 3))
    net = tt.attach_head(tt.cut(resnet, X, after="layer3"), head=behind)
    assert net.head is behind
    assert net(X).shape == (2, 3)
    dist = timm.create_model("deit_tiny_distilled_patch16_224", img_size=32)
    heads = {"head": nn.Linear(192, 3), "head_dist": nn.Linear(192, 3)}
    assert tt.attach_head(dist, torch.zeros(1, 3, 32, 32), head=heads).num_classes == 3
    with pytest.raises(tt.HeadError, match="several heads"):
        tt.attach_head(dist, torch.zeros(1, 3, 32, 32), head=nn.Linear(192, 3))


def test_a_head_that_does_not_fit_says_both_shapes(resnet: nn.Module) -> None:
    before = copy.deepcopy(resnet.state_dict())
    with pytest.raises(tt.HeadError, match=r"\(N, 512\).*100 features") as caught:
        tt.attach_head(resnet, X, head=nn.Linear(100, 3))
    assert caught.value.path == "fc"
    with pytest.raises(tt.HeadError, match=r"\(N, 256, 4, 4\)"):
        tt.attach_head(tt.cut(resnet, X, after="layer3"), head=nn.Sequential(nn.Flatten(), nn.Linear(100, 3)))
    assert differs(before, dict(resnet.state_dict())) is None


def test_modes_types_and_second_heads(resnet: nn.Module) -> None:
    model = copy.deepcopy(resnet).eval()
    assert not tt.attach_head(model, X, num_classes=3).fc.training
    half = tt.attach_head(copy.deepcopy(resnet).double(), X.double(), num_classes=3)
    assert half.fc.weight.dtype == torch.float64
    net = tt.attach_head(tt.cut(resnet, X, after="layer3"), num_classes=3, hidden=(8,))
    again = tt.attach_head(net, num_classes=5)
    assert again(X).shape == (2, 5)
    assert again.head.hidden1.out_features == 8
    assert tt.history(again).edits[2].paths == ("head.fc",)


def test_attaching_behind_a_class_of_its_own(resnet: nn.Module) -> None:
    class Features(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 6, 3)
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.norm(self.conv(x))

    features = Features()
    net = tt.attach_head(features, X, num_classes=4)
    assert net(X).shape == (2, 4)
    assert set(features.state_dict()) < set(net.state_dict())
    with pytest.raises(tt.HeadError, match="no head of its own"):
        tt.attach_head(features, X, num_classes=4, replace=True)
    kept = tt.attach_head(resnet, X, num_classes=4, replace=False)
    assert kept.fc.out_features == 1000
    assert kept(X).shape == (2, 4)


def test_in_place_editing(resnet: nn.Module) -> None:
    model = copy.deepcopy(resnet)
    conv = model.conv1.weight
    net = tt.attach_head(model, X, num_classes=3, copy=False)
    assert net is model
    assert net.conv1.weight is conv


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "num_classes= or head="),
        ({"num_classes": 0}, "above 0"),
        ({"num_classes": 2.5}, "above 0"),
        ({"num_classes": 3, "head": nn.Identity()}, "num_classes= or head="),
        ({"num_classes": 3, "dropout": 1.5}, "probability"),
        ({"num_classes": 3, "hidden": (0,)}, "above 0"),
        ({"num_classes": 3, "pool": "mean"}, "one of avg, max"),
        ({"num_classes": 3, "pool": "token"}, "pools before its own head"),
        ({"num_classes": 3, "layout": "CHW"}, "one of flat"),
        ({"head": "linear"}, "a head is a module"),
        ({"head": {"fc2": nn.Linear(2, 2)}}, "fc"),
    ],
)
def test_bad_arguments(resnet: nn.Module, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(tt.HeadError, match=message):
        tt.attach_head(resnet, X, **arguments)


def test_several_outputs_take_no_head(resnet: nn.Module) -> None:
    net = tt.cut(resnet, X, after=["layer1", "layer2"], check=False)
    with pytest.raises(tt.HeadError, match="2 outputs"):
        tt.attach_head(net, num_classes=3)
