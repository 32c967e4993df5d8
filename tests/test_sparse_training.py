"""Penalties that make channels small while a model is trained, and pruning from inside the loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt


class Net(nn.Module):
    """Two convolutions with norms, the second one added to a shortcut of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(32)
        self.wide = nn.Conv2d(32, 64, 1)
        self.back = nn.Conv2d(64, 32, 1)
        self.fc = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        x = x + self.back(self.wide(x).relu())
        return self.fc(x.mean((2, 3)))


X = torch.randn(16, 3, 6, 6, generator=torch.Generator().manual_seed(2))
Y = torch.arange(16) % 4


def _loss(net: nn.Module) -> torch.Tensor:
    return nn.functional.cross_entropy(net(X), Y)


def test_a_units_length_is_that_of_all_that_goes_with_it() -> None:
    net = Net()
    penalty = tt.SparsityPenalty(net, X, strength=0.5)
    wide = penalty.lengths()["wide"]
    first = torch.cat([net.wide.weight[3].flatten(), net.wide.bias[3:4], net.back.weight[:, 3].flatten()])
    assert wide[3] == pytest.approx(float(first.detach().norm()), rel=1e-5)
    stem = penalty.lengths()["stem"]
    entries = 27 + 2 + 64 + 64 + 1 + 4  # its weight, norm, what reads it, what is added to it, and the head
    expected = 0.5 * (float(wide.sum()) * (32 + 1 + 32) ** 0.5 + float(stem.sum()) * entries**0.5)
    assert float(penalty().detach()) == pytest.approx(expected, rel=1e-5)


def test_scales_are_summed_up_but_for_protected_channels() -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6), nn.Flatten(), nn.Linear(216, 4)
    )
    for norm in (net[1], net[3]):
        nn.init.normal_(norm.weight)
    first, second = (float(norm.weight.detach().abs().sum()) for norm in (net[1], net[3]))
    every = tt.SparsityPenalty(net, X, "bn_scale", strength=0.5)()
    assert float(every.detach()) == pytest.approx(0.5 * (first + second), rel=1e-5)
    one = tt.SparsityPenalty(net, X, "bn_scale", strength=0.5, protect="0")()
    assert float(one.detach()) == pytest.approx(0.5 * second, rel=1e-5)


@pytest.mark.parametrize("kind", ["group_lasso", "bn_scale"])
def test_added_gradients_are_those_of_the_penalty_in_the_loss(kind: str) -> None:
    one, other = Net(), Net()
    other.load_state_dict(one.state_dict())
    (_loss(one) + tt.SparsityPenalty(one, X, kind, strength=0.01)()).backward()
    _loss(other).backward()
    tt.SparsityPenalty(other, X, kind, strength=0.01).add_gradients()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.allclose(a.grad, b.grad, atol=1e-6)


def test_training_with_it_makes_units_small_that_can_then_go() -> None:
    torch.manual_seed(0)
    net = Net()
    penalty = tt.SparsityPenalty(net, X, strength=3e-3)
    before = penalty.lengths()["wide"]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    for _ in range(60):
        optimizer.zero_grad()
        _loss(net).backward()
        penalty.add_gradients()
        optimizer.step()
    lengths = penalty.lengths()["wide"]
    assert float(before.min()) > 0.5 * float(before.max())
    assert float(lengths.min()) < 0.2 * float(lengths.max())


def test_it_follows_a_model_that_is_pruned_in_place() -> None:
    net = Net()
    penalty = tt.SparsityPenalty(net, X)
    tt.delete_channels(net, X, "wide", range(24), copy=False)
    assert len(penalty.lengths()["wide"]) == 40
    penalty().backward()
    assert net.wide.weight.grad is not None and net.wide.weight.grad.shape[0] == 40


def test_lengths_that_are_read_without_gradients_leave_the_penalty_with_them() -> None:
    net = Net()
    penalty = tt.SparsityPenalty(net, X)
    tt.delete_channels(net, X, "wide", range(24), copy=False)
    with torch.inference_mode():
        assert len(penalty.lengths()["wide"]) == 40
    penalty().backward()
    assert net.wide.weight.grad is not None


def test_what_it_cannot_be_used_for_is_said() -> None:
    with pytest.raises(tt.EditError, match="nothing in the model"):
        tt.SparsityPenalty(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.zeros(1, 3), "bn_scale")
    with pytest.raises(tt.EditError, match="no such kind"):
        tt.SparsityPenalty(Net(), X, "lasso")  # type: ignore[arg-type]


@pytest.mark.parametrize("settings", [{}, {"scope": "global"}, {"budget": tt.Budget(macs=0.5)}])
def test_pruning_in_steps_ends_where_it_was_asked_to(settings: dict[str, object]) -> None:
    net = Net()
    whole = tt.summary(net, X).macs
    ratio = None if "budget" in settings else 0.5
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    held = list(net.parameters())
    pruning = tt.GradualPruning(net, X, ratio, 3, optimizer=optimizer, check=False, **settings)  # type: ignore[arg-type]
    widths = [net.wide.out_channels]
    while pruning.step():
        optimizer.zero_grad()
        _loss(net).backward()
        optimizer.step()
        widths.append(net.wide.out_channels)
    assert pruning.done and pruning.taken == 3 and not pruning.step()
    assert widths == sorted(widths, reverse=True)
    assert all(a is b for a, b in zip(held, net.parameters(), strict=True))
    for parameter in net.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape
    if not settings:
        assert (net.stem.out_channels, net.wide.out_channels) == (16, 32)
    if "budget" in settings:
        assert 0.35 * whole < tt.summary(net, X).macs <= 0.5 * whole


def test_layers_by_name_and_the_shape_of_the_schedule() -> None:
    net = Net()
    pruning = tt.GradualPruning(net, X, {"wide": 0.5}, 4, schedule="linear", check=False)
    assert [pruning.share(step) for step in (1, 2, 4)] == [0.25, 0.5, 1.0]
    while pruning.step():
        pass
    assert (net.stem.out_channels, net.wide.out_channels) == (32, 32)
    assert tt.GradualPruning(net, X, 0.5, 4).share(1) == pytest.approx(1 - 0.75**3)
    with pytest.raises(tt.EditError, match="number of steps"):
        tt.GradualPruning(net, X, 0.5, 0)


def test_steps_take_selections_and_rank_only_what_was_asked_for() -> None:
    net = Net()
    stem, wide = net.stem.out_channels, net.wide.out_channels
    pruning = tt.GradualPruning(net, X, {"wide": 0.5}, 2, scope="global", check=False)
    while pruning.step():
        pass
    assert (net.stem.out_channels, net.wide.out_channels) == (stem, wide // 2)
    net = Net()
    pruning = tt.GradualPruning(net, X, {nn.Conv2d: 0.5}, 2, protect=lambda path, module: path == "wide", check=False)
    while pruning.step():
        pass
    assert (net.stem.out_channels, net.wide.out_channels) == (stem // 2, wide)
    with pytest.raises(tt.PathError, match="wide"):
        tt.GradualPruning(net, X, {"wider": 0.5}, 2)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)}, "none of the model's parameters"),
        ({"optimizer": 3}, "not an optimizer"),
        ({"importance": "taylor"}, "looks at data"),
        ({"reconstruct": True}, "looks at data"),
        ({"rond_to": 4}, "'round_to'"),
        ({"copy": True}, "copy: no such setting"),
    ],
)
def test_what_no_step_could_do_is_refused_at_once(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(tt.TorchTrimError, match=told):
        tt.GradualPruning(Net(), X, 0.5, 2, **settings)


def test_a_step_refuses_before_it_prunes() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruning = tt.GradualPruning(net, X, 0.5, 2, optimizer=optimizer)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(1))]
    before = net.wide.out_channels
    with pytest.raises(tt.EditError, match="none of the model's parameters"):
        pruning.step()
    assert net.wide.out_channels == before and pruning.taken == 0


@pytest.mark.parametrize("strength", ["a", None, -1, float("nan")])
def test_a_strength_is_a_number(strength: Any) -> None:
    with pytest.raises(tt.EditError, match="strength"):
        tt.SparsityPenalty(Net(), X, strength=strength)
