"""Folding batch norms: what can be, to the same output; what cannot be, with the reason."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import torchtrim as tt
from torchtrim.edits.edit import Edit
from torchtrim.edits.fuse import FuseBatchNorm, fuse_batchnorm
from torchtrim.edits.norms import is_norm

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def trained(model: nn.Module) -> nn.Module:
    """With statistics, scales and shifts that are not 0 and 1."""
    for module in filter(is_norm, model.modules()):
        nn.init.normal_(module.running_mean, 0.0, 0.2)
        nn.init.uniform_(module.running_var, 0.5, 1.5)
        if module.weight is not None:
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0.0, 0.1)
    return model.eval()


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= 1e-5 * one.abs().max())


@pytest.mark.parametrize(
    ("make", "left"),
    [
        (lambda: timm.create_model("test_resnet"), 0),
        (lambda: timm.create_model("test_efficientnet"), 0),
        (lambda: torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d), 0),
        (lambda: torchvision.models.shufflenet_v2_x0_5(), 0),
    ],
)
def test_a_network_without_its_batch_norms_computes_the_same(make: Any, left: int) -> None:
    model = trained(make())
    state = copy.deepcopy(model.state_dict())
    net = fuse_batchnorm(model, X)
    assert sum(map(is_norm, net.modules())) == left
    assert close(model(X), net(X))
    assert type(net) is type(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    again = tt.apply(model, X, [Edit.from_dict(tt.history(net).edits[0].to_dict())], check=False)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), net.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        ([nn.Conv1d(4, 6, 3, groups=2, bias=False), nn.BatchNorm1d(6)], (3, 4, 9)),
        ([nn.Conv3d(2, 4, 1), nn.BatchNorm3d(4)], (3, 2, 3, 3, 3)),
        ([nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6, affine=False)], (3, 4, 5, 5)),
        ([nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6)], (3, 4, 5)),
        ([nn.Linear(4, 6), nn.BatchNorm1d(6)], (3, 4)),
        ([nn.ReLU(), nn.BatchNorm1d(4), nn.Linear(4, 6)], (3, 4)),
        ([nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 6, 3, groups=2)], (3, 4, 5, 5)),
        ([nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False)], (3, 4, 5, 5)),
        ([nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)], (3, 4, 5, 5)),
    ],
)
def test_every_pair_is_exact(layers: list[nn.Module], shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    model = trained(nn.Sequential(*layers))
    net = fuse_batchnorm(model, x)
    assert not any(map(is_norm, net.modules()))
    assert close(model(x), net(x))


def test_half_precision_and_frozen_weights() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).to(torch.bfloat16)
    model[0].weight.requires_grad_(False)
    net = fuse_batchnorm(model, X.to(torch.bfloat16))
    assert net[0].weight.dtype == net[0].bias.dtype == torch.bfloat16
    assert not net[0].weight.requires_grad
    assert not net[0].bias.requires_grad


def test_in_place_the_parameters_stay_the_same_objects() -> None:
    model = trained(torchvision.models.resnet18())
    parameters, expected = dict(model.named_parameters()), model(X)
    net = fuse_batchnorm(model, X, copy=False)
    assert net is model
    assert all(held is parameters[name] for name, held in net.named_parameters() if not name.endswith("bias"))
    assert close(expected, net(X))


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.padded, self.before = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.twice, self.first, self.second = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.train_only, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.hooked, self.behind = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.good, self.fine = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x)
        x = self.norm(y) + y
        x = self.padded(self.before(x))
        x = self.second(self.twice(self.first(self.twice(x.relu())).relu()))
        z = self.train_only(x)
        x = self.last(z)
        if self.training:
            x = x + z
        return self.fine(self.good(self.behind(self.hooked(x)))).relu()


def test_what_cannot_be_folded_is_left_with_the_reason() -> None:
    model = trained(Branches())
    model.hooked.register_forward_hook(lambda _m, _a, out: out)
    x = torch.randn(2, 3, 8, 8)
    net = fuse_batchnorm(model, x)
    entry = tt.history(net).entries[0]
    assert entry.edit.folded == (("second", "train_only"), ("behind", "good"), ("fine", "good"))
    notes = "\n".join(entry.notes)
    for norm, reason in (
        ("norm", "used by add.Tensor too"),
        ("before", "does not come from one layer"),
        ("first", "used by second too"),
        ("last", "used by add.Tensor too"),
    ):
        assert any(f"{norm!r} was not folded" in note and reason in note for note in entry.notes), notes
    assert close(model(x), net(x))
    for path in ("norm", "conv"):
        with pytest.raises(tt.EditError, match=path):
            fuse_batchnorm(model, x, path)


def test_layers_that_compute_their_weight_are_left() -> None:
    model = nn.Sequential(
        timm.layers.StdConv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)
    )
    net = fuse_batchnorm(trained(model), X)
    assert tt.history(net).edits[0].folded == (("4", "3"),)
    assert "a way of its own" in tt.history(net).entries[0].notes[0]
    parametrized = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    with pytest.raises(tt.EditError, match="computed from others"):
        fuse_batchnorm(parametrized, X)
    shared = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 3, 1))
    shared[3].weight = shared[0].weight
    with pytest.raises(tt.EditError, match="shares its weights"):
        fuse_batchnorm(shared, X)


def test_some_of_them() -> None:
    net = fuse_batchnorm(trained(torchvision.models.resnet18()), X, "layer1.**")
    assert [norm for norm, _ in tt.history(net).edits[0].folded] == [
        f"layer1.{i}.bn{j}" for i in (0, 1) for j in (1, 2)
    ]
    assert str(tt.history(net).edits[0]) == "fuse_batchnorm(layer1.0.bn1, layer1.0.bn2, ...): 4 folded"
    with pytest.raises(tt.PathError):
        fuse_batchnorm(net, None, "layer9")
    with pytest.raises(tt.SelectionError):
        fuse_batchnorm(net, None, "layer1.**")
    with pytest.raises(tt.EditError, match="no batch norm"):
        fuse_batchnorm(nn.Sequential(nn.ReLU()), X)


def test_a_plan_counts_what_is_saved() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)))
    planned = tt.plan(model, X, FuseBatchNorm())
    assert planned.params == (3 * 4 * 9 + 8, 3 * 4 * 9 + 4)
    assert planned.steps[0].joints[0].how == "folded into '0'"


def test_a_record_for_a_place_that_is_not_there() -> None:
    x = torch.randn(2, 3, 8, 8)
    edits = tt.history(tt.fuse_batchnorm(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), x)).edits
    with pytest.raises(tt.PathError):
        tt.apply(nn.Sequential(nn.Conv2d(3, 3, 1)), x, edits)
