"""Batch norms' statistics: measured anew, or moved by what a change did, as far as the original agrees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchtrim as tt


def _net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 5),
    )


def _trained(x: torch.Tensor) -> nn.Module:
    """With the statistics of other data than is recalibrated on."""
    net = _net()
    tt.recalibrate_batchnorm(net, [x * 1.3 + 0.2])
    return net.eval()


def _error(net: nn.Module, original: nn.Module, x: torch.Tensor) -> float:
    return float((net.eval()(x) - original(x)).square().mean())


X = torch.randn(80, 3, 8, 8, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_alone_the_statistics_are_those_of_the_data() -> None:
    net = _net().eval()
    found = tt.recalibrate_batchnorm(net, X.split(20))
    given = net[0](X)
    assert found.norms == 2 and found.before is None
    assert torch.allclose(net[1].running_mean, given.mean((0, 2, 3)), atol=1e-5)
    assert torch.allclose(net[1].running_var, given.var((0, 2, 3)), rtol=1e-4)


@torch.no_grad()
def test_a_model_in_which_nothing_changed_is_left_as_it_is() -> None:
    original = _trained(X)
    net = _net()
    net.load_state_dict(original.state_dict())
    found = tt.recalibrate_batchnorm(net, [X], original=original)
    assert found.what == "kept as they are"
    assert all(
        torch.equal(a, b) for a, b in zip(net.state_dict().values(), original.state_dict().values(), strict=True)
    )


@torch.no_grad()
def test_after_pruning_it_agrees_better_than_before_and_than_what_is_measured() -> None:
    original, other = _trained(X), torch.randn(40, 3, 8, 8)
    nets = [tt.delete_channels(original, X[:1], {"0": [0, 3, 5, 8, 9, 14], "3": [1, 2, 7]}) for _ in range(3)]
    found = tt.recalibrate_batchnorm(nets[1], [X], original=original)
    tt.recalibrate_batchnorm(nets[2], [X])
    assert found.after is not None and found.before is not None and found.after < found.before
    assert found.what.startswith("moved by")
    plain, moved, measured = (_error(net, original, other) for net in nets)
    assert moved < plain and moved < measured
    assert found.after == min(found.tried.values()) and "error" in str(found)


def test_modes_weights_and_random_state_stay() -> None:
    net, original = _net().train(), _trained(X)
    net[4].eval()
    before = {name: each.clone() for name, each in net.state_dict().items() if "running" not in name}
    seed = torch.random.get_rng_state()
    tt.recalibrate_batchnorm(net, [X], original=original)
    assert [module.training for module in net] == [True] * 4 + [False] + [True] * 4
    assert all(torch.equal(net.state_dict()[name], each) for name, each in before.items())
    assert torch.equal(seed, torch.random.get_rng_state())


def test_pairs_dicts_and_little_data() -> None:
    net = _net()
    tt.recalibrate_batchnorm(net, [(X, torch.zeros(80))])
    tt.recalibrate_batchnorm(net, [{"input": X, "labels": torch.zeros(80)}], X[:1])
    with pytest.raises(tt.InputError, match="too little data for recalibration"):
        tt.recalibrate_batchnorm(net, [X[:4]])
    with pytest.raises(tt.InputError, match="can be gone through once"):
        tt.recalibrate_batchnorm(net, iter([X]), X[:1])
    with pytest.raises(tt.ModelError, match="no batch norm"):
        tt.recalibrate_batchnorm(nn.Linear(2, 2), [torch.zeros(20, 2)])


def test_data_that_is_not_finite_leaves_the_model_as_it_was() -> None:
    net = _net()
    with pytest.raises(tt.InputError, match="not finite"):
        tt.recalibrate_batchnorm(net, [X, X[:4] * torch.nan])
    assert torch.equal(net[1].running_mean, torch.zeros(16)) and torch.equal(net[1].running_var, torch.ones(16))


def test_an_original_of_another_kind() -> None:
    with pytest.raises(tt.InputError, match="original: the original is another model"):
        tt.recalibrate_batchnorm(_net(), [X], original=nn.Linear(3, 3))
