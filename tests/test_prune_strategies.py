"""The strategies that keras-surgeon is used with on Xception, on a small network of its kind: one call each."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

import torchtrim as tt
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import dependencies
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.channels import scores

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


class Separable(nn.Module):
    def __init__(self, wide: int, deep: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(wide, wide, 3, padding=1, groups=wide, bias=False)
        self.pointwise = nn.Conv2d(wide, deep, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.pointwise(self.depthwise(x))
        return out


class Block(nn.Module):
    def __init__(self, wide: int, deep: int) -> None:
        super().__init__()
        self.rep = nn.Sequential(
            *(nn.ReLU(), Separable(wide, deep), nn.BatchNorm2d(deep)),
            *(nn.ReLU(), Separable(deep, deep), nn.BatchNorm2d(deep)),
        )
        self.skip = nn.Conv2d(wide, deep, 1, bias=False) if wide != deep else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.rep(x) + self.skip(x)
        return out


class SmallXception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.block1, self.block2, self.block3 = Block(16, 24), Block(24, 24), Block(24, 32)
        self.fc = nn.Linear(32, 5)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter *= torch.exp(0.5 * torch.randn(len(parameter), *[1] * (parameter.dim() - 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        x = self.block3(self.block2(self.block1(x)))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]


def by_name(net: nn.Module, importance: str) -> dict[str, np.ndarray]:
    units = dependencies(net, follow(net, Inputs.of(X)))
    found = scores(net, units, importance)
    return {group.name: found[group.units] for group in units.groups}


def widths(net: nn.Module) -> dict[str, int]:
    return {name: len(held) for name, held in net.state_dict().items() if name.endswith("weight") and held.dim() == 4}


def test_global_magnitude_by_percentage() -> None:
    net = SmallXception()
    ranked = by_name(net, "l1")
    pruned = tt.prune_channels(net, X, ratio=0.5, importance="l1", scope="global", round_to=1)
    every = np.sort(np.concatenate(list(ranked.values())))
    limit = every[len(every) // 2]
    found = widths(pruned)
    for name, values in ranked.items():
        kept = values >= limit
        assert found[f"{name}.weight"] == kept.sum() > 0
    kept_first = torch.from_numpy(ranked["conv1"] >= limit)
    assert torch.equal(pruned.conv1.weight, net.conv1.weight[kept_first])
    assert torch.equal(pruned.bn1.weight, net.bn1.weight[kept_first])
    pruned.train()(X).sum().backward()
    assert pruned(X).shape == (2, 5)


def test_thresholds_by_name() -> None:
    net = SmallXception()
    ranked = by_name(net, "l1")
    thresholds = {"conv1": 0.9, "block3.rep.1.*": 1.0}
    pruned = tt.prune_channels(net, X, thresholds=thresholds, importance="l1", round_to=1)
    found, before = widths(pruned), widths(net)
    left = {"conv1.weight": (ranked["conv1"] >= 0.9).sum()}
    left["block1.rep.1.depthwise.weight"] = left["conv1.weight"]
    left["block3.rep.1.pointwise.weight"] = (ranked["block3.rep.1.pointwise"] >= 1.0).sum()
    left["block3.rep.4.depthwise.weight"] = left["block3.rep.1.pointwise.weight"]
    assert found == before | left
    assert 0 < left["conv1.weight"] < 16 and 0 < left["block3.rep.1.pointwise.weight"] < 32
    rounded = tt.prune_channels(net, X, thresholds={"conv1": 0.9}, importance="l1")
    assert widths(rounded)["conv1.weight"] % 8 == 0


def test_thresholds_on_a_scale_of_ones_own() -> None:
    net = SmallXception()
    size = net.conv1.weight.detach().abs().mean((1, 2, 3))
    limit = float(size.median())

    def mean_weight(group: tt.ChannelGroup) -> torch.Tensor:
        return group.tensors[0].values.abs().mean(1)

    pruned = tt.prune_channels(net, X, thresholds={"conv1": limit}, importance=mean_weight, round_to=1)
    assert torch.equal(pruned.conv1.weight, net.conv1.weight[size >= limit])


def test_random_ones() -> None:
    net = SmallXception()
    one, same, other = (
        tt.prune_channels(net, X, ratio=0.25, importance=f"random:{seed}", round_to=4) for seed in (1, 1, 2)
    )
    assert widths(one) == widths(other) and widths(one)["conv1.weight"] == 12
    assert torch.equal(one.conv1.weight, same.conv1.weight)
    assert not torch.equal(one.conv1.weight, other.conv1.weight)


def test_a_name_that_fits_no_layer_is_refused() -> None:
    with pytest.raises(tt.SelectionError, match="blok3"):
        tt.prune_channels(SmallXception(), X, thresholds={"blok3.*": 0.5})
