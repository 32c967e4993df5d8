"""An optimizer goes on with a model that lost channels, layers or its head in the middle of training."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-3, amsgrad=True),
    "adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3, momentum=0.9, centered=True),
}
X = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(8) % 5
# One channel of each group, a whole group, and one of each of the outputs of those that are left.
PRUNINGS = (("stem", (0, 4, 8, 12)), ("stem", (0, 1, 2)), ("grouped", (1, 4, 8)))


class Net(nn.Module):
    """A grouped convolution, a residual connection, a norm and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(16)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.side = nn.Conv2d(3, 16, 1)
        self.fc = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        grouped = self.grouped(self.bn(self.stem(x)).relu())
        return self.fc((grouped + self.side(x)).relu().mean((2, 3)))


def _step(net: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(net(X), Y)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _held(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _mark(optimizer: torch.optim.Optimizer) -> dict[nn.Parameter, list[str]]:
    """Set what is kept of each parameter to twice the parameter, so that it can be told what became of every entry."""
    marked = {}
    for parameter, state in optimizer.state.items():
        marked[parameter] = [key for key, value in state.items() if getattr(value, "shape", None) == parameter.shape]
        for key in marked[parameter]:
            state[key] = parameter.detach() * 2
    return marked


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("every", [1, 3])
def test_entries_stay_with_their_weights_across_prunings(name: str, every: int) -> None:
    net = Net()
    optimizer = OPTIMIZERS[name](net.parameters())
    _step(net, optimizer)
    marked = _mark(optimizer)
    for number, (path, channels) in enumerate(PRUNINGS, 1):
        tt.delete_channels(net, X, path, channels, copy=False, check=False)
        if number % every == 0:
            assert tt.sync_optimizer(optimizer, net).sliced
    assert set(_held(optimizer)) == set(net.parameters())
    assert net.stem.weight.shape[0] == 9 and net.grouped.weight.shape[:2] == (9, 3)
    for parameter, keys in marked.items():
        for key in keys:
            assert torch.equal(optimizer.state[parameter][key], parameter.detach() * 2), key
    assert _step(net, optimizer) > 0


def test_a_sum_along_one_dimension_loses_what_is_left_of_it() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer = OPTIMIZERS["adafactor"](net.parameters())
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    rows = optimizer.state[net[0].weight]["row_var"].clone()
    columns = optimizer.state[net[0].weight]["col_var"].clone()
    tt.delete_channels(net, torch.zeros(1, 4), "0", [1, 5], copy=False)
    tt.sync_optimizer(optimizer, net)
    assert torch.equal(optimizer.state[net[0].weight]["row_var"], rows[[0, 2, 3, 4]])
    assert torch.equal(optimizer.state[net[0].weight]["col_var"], columns)


def test_a_copy_is_known_by_its_names() -> None:
    original = Net()
    optimizer = OPTIMIZERS["adamw"](original.parameters())
    _step(original, optimizer)
    _mark(optimizer)
    steps = [optimizer.state[original.fc.weight]["step"].clone(), optimizer.param_groups[0]["lr"]]
    net = tt.delete_channels(original, X, "stem", PRUNINGS[0][1])
    with pytest.raises(tt.EditError, match="holds none"):
        tt.sync_optimizer(optimizer, net)
    tt.sync_optimizer(optimizer, net, before=original)
    assert _held(optimizer) == list(net.parameters())
    for parameter in net.parameters():
        assert torch.equal(optimizer.state[parameter]["exp_avg"], parameter.detach() * 2)
    assert steps == [optimizer.state[net.fc.weight]["step"], optimizer.param_groups[0]["lr"]]
    _step(net, optimizer)


def test_layers_that_left_are_dropped_and_new_ones_join_their_neighbours() -> None:
    blocks = [nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(3)]
    net = nn.Sequential(nn.Linear(4, 6), *blocks, nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(tt.param_groups(net, lr=1e-3, weight_decay=0.1))
    net(torch.randn(3, 4)).sum().backward()
    optimizer.step()
    net = tt.remove(net, torch.zeros(1, 4), "2", copy=False)
    net = tt.attach_head(net, torch.zeros(1, 4), num_classes=7, copy=False)
    found = tt.sync_optimizer(optimizer, net)
    assert found.dropped == 6 and len(found.added or {}) == 2
    assert set(_held(optimizer)) == set(net.parameters())
    assert set(optimizer.state) <= set(net.parameters())
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {decay[p] for n, p in net.named_parameters() if n in found.to_dict()["added"] and p.dim() > 1} == {0.1}
    assert {decay[p] for n, p in net.named_parameters() if n in found.to_dict()["added"] and p.dim() == 1} == {0.0}


def test_frozen_parameters_and_those_of_other_modules_are_left_alone() -> None:
    net, scale = Net(), nn.Parameter(torch.ones(3))
    tt.freeze(net, "stem")
    optimizer = torch.optim.SGD([*(p for p in net.parameters() if p.requires_grad), scale], lr=0.1, momentum=0.9)
    tt.delete_channels(net, X, "stem", PRUNINGS[0][1], copy=False)
    assert not net.stem.weight.requires_grad
    found = tt.sync_optimizer(optimizer, net, others=[scale])
    assert found.dropped == 0 and not found.added
    assert set(_held(optimizer)) == {*(p for p in net.parameters() if p.requires_grad), scale}


def test_names_in_a_group_follow() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    optimizer = torch.optim.SGD(net.named_parameters(), lr=0.1)
    net = tt.remove(net, torch.zeros(1, 4), "1", copy=False)
    tt.sync_optimizer(optimizer, net)
    group = optimizer.param_groups[0]
    assert len(group["param_names"]) == len(group["params"]) == 4


def test_what_cannot_be_told_raises_and_changes_nothing() -> None:
    net = Net()
    optimizer = OPTIMIZERS["adamw"](net.parameters())
    _step(net, optimizer)
    optimizer.state[net.bn.weight]["exp_avg"] = torch.zeros(5)
    tt.delete_channels(net, X, "stem", PRUNINGS[0][1], copy=False)
    groups, state = copy.copy(optimizer.param_groups[0]["params"]), dict(optimizer.state)
    with pytest.raises(tt.EditError, match=r"bn.weight: .*exp_avg"):
        tt.sync_optimizer(optimizer, net)
    assert optimizer.param_groups[0]["params"] == groups and dict(optimizer.state) == state


def test_a_schedule_goes_on() -> None:
    net = Net()
    optimizer = OPTIMIZERS["sgd"](net.parameters())
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    for path, channels in PRUNINGS:
        _step(net, optimizer)
        schedule.step()
        tt.delete_channels(net, X, path, channels, copy=False, check=False)
        tt.sync_optimizer(optimizer, net)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01 / 8)


def test_two_optimizers_keep_to_their_own_parameters() -> None:
    net = Net()
    mine = list(net.stem.parameters())
    one = torch.optim.SGD(mine, lr=0.1)
    other = torch.optim.SGD([each for each in net.parameters() if all(each is not held for held in mine)], lr=0.1)
    before = _held(one), _held(other)
    tt.prune_channels(net, X, 0.5, copy=False, check=False)
    for optimizer in (one, other):
        assert not tt.sync_optimizer(optimizer, net).added
    assert (_held(one), _held(other)) == before


def test_what_is_no_optimizer() -> None:
    net = Net()
    with pytest.raises(tt.EditError, match="not an optimizer"):
        tt.sync_optimizer(None, net)  # type: ignore[arg-type]
    with pytest.raises(tt.EditError, match="not a parameter"):
        tt.sync_optimizer(OPTIMIZERS["sgd"](net.parameters()), net, others=[3])  # type: ignore[list-item]
