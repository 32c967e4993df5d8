"""What goes together in a model: units, groups, families, and which of them are chosen."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

from torchtrim.channels.follow import follow
from torchtrim.channels.groups import Dependencies, Group, dependencies
from torchtrim.channels.select import select
from torchtrim.graph.inputs import Inputs


def found_in(model: nn.Module, *shape: int, protect: tuple[str, ...] = ()) -> Dependencies:
    return dependencies(model, follow(model, Inputs.of(torch.zeros(*shape))), protect=protect)


def by_name(found: Dependencies) -> dict[str, Group]:
    return {group.name: group for group in found.groups}


def roles(group: Group) -> dict[str, str]:
    return {f"{member.path}{list(member.units.shape)}": member.role for member in group.members}


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
        x = x + self.two(torch.relu(self.norm(self.one(x))))
        return self.head(x.mean((2, 3)))


def test_a_residual_block() -> None:
    found = found_in(Residual(), 2, 3, 8, 8)
    groups = by_name(found)
    assert list(groups) == ["stem", "one"]
    assert len(groups["stem"].units) == 8
    assert len(groups["one"].units) == 6
    assert roles(groups["stem"]) == {
        "stem.weight[8, 1, 1, 1]": "writes",
        "stem.bias[8]": "holds",
        "one.weight[1, 8, 1, 1]": "reads",
        "two.weight[8, 1, 1, 1]": "writes",
        "two.bias[8]": "holds",
        "head.weight[1, 8]": "reads",
    }
    assert roles(groups["one"])["norm.running_var[6]"] == "holds"
    assert found.left_alone == {"head": "the model's output has its width"}
    assert found.count == 14
    assert found.groups[0].units.tolist() == list(range(8))


def test_units_are_closed() -> None:
    found = found_in(Residual(), 2, 3, 8, 8)
    one = np.zeros(found.count, dtype=bool)
    one[found.groups[0].units[3]] = True
    gone = found.gone(one)
    for member in found.groups[0].members:
        assert (member.units == found.groups[0].units[3]).sum() == 1
    assert gone.sum() == 6  # a channel of each of its tensors
    assert not found.gone(np.zeros(found.count, dtype=bool)).any()


def test_a_protected_layer_keeps_its_width() -> None:
    found = found_in(Residual(), 2, 3, 8, 8, protect=("st*",))
    assert list(by_name(found)) == ["one"]
    assert found.left_alone["stem"] == found.left_alone["two"] == "it is protected"


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 1)
        self.c = nn.Conv2d(10, 5, 1)
        self.head = nn.Conv2d(5, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.c(torch.cat([self.a(x), self.b(x)], 1)))


def test_what_is_concatenated_is_chosen_apart() -> None:
    found = found_in(Concatenated(), 2, 3, 4, 4)
    groups = by_name(found)
    assert {name: len(group.units) for name, group in groups.items()} == {"a": 4, "b": 6, "c": 5}
    reader = next(member for member in groups["b"].members if member.path == "c.weight" and member.role == "reads")
    assert reader.units.ravel().tolist() == [*groups["a"].units, *groups["b"].units]


class Parts(nn.Module):
    """Grouped, depthwise, normalised in groups."""

    def __init__(self, groups: int, norm: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 1)
        self.grouped = nn.Conv2d(16, 24, 3, groups=groups)
        self.norm = nn.GroupNorm(norm, 24)
        self.deep = nn.Conv2d(24, 48, 3, groups=24)
        self.head = nn.Conv2d(48, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.deep(self.norm(self.grouped(self.stem(x)))))


@pytest.mark.parametrize(
    ("groups", "norm", "sizes"),
    [
        (8, 8, {"stem": (8, 2)}),  # whole groups: two that are read, three that are written, six behind
        (2, 1, {"stem": (8, 2), "grouped": (12, 2)}),  # the same place of both groups
        (1, 4, {"stem": (16, 1), "grouped": (6, 4)}),  # the same place of four normalised parts
    ],
)
def test_parts_stay_equal(groups: int, norm: int, sizes: dict[str, tuple[int, int]]) -> None:
    found = found_in(Parts(groups, norm), 2, 3, 8, 8)
    assert {name: (len(g.units), g.channels_each) for name, g in by_name(found).items()} == sizes


class Attention(nn.Module):
    def __init__(self, width: int = 12, heads: int = 3, kv_heads: int | None = None) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, width // heads
        self.kv_heads = kv_heads or heads
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * self.kv_heads * self.head_dim)
        self.proj = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n = x.shape[:2]
        q = self.q(x).reshape(b, n, self.heads, self.head_dim).transpose(1, 2)
        k, v = self.kv(x).reshape(b, n, 2, self.kv_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        times = self.heads // self.kv_heads
        k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
        y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(y.transpose(1, 2).flatten(2))


def test_attention_heads_go_whole() -> None:
    found = found_in(Attention(), 2, 7, 12)
    (group,) = found.groups
    assert group.name == "q"
    assert (len(group.units), group.channels_each) == (3, 4)
    assert {member.path: member.role for member in group.members if "weight" in member.path} == {
        "q.weight": "writes",
        "kv.weight": "writes",
        "proj.weight": "reads",
    }


def test_heads_that_share_keys_go_together() -> None:
    (group,) = found_in(Attention(24, 6, 2), 2, 7, 24).groups
    assert (len(group.units), group.channels_each) == (2, 12)


def test_a_single_head_loses_channels_of_its_values() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 6)
            self.proj = nn.Linear(6, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scores = self.q(x) @ self.k(x).transpose(-2, -1) * 8**-0.5
            return self.proj(scores.softmax(-1) @ self.v(x))

    found = found_in(Single(), 2, 7, 12)
    assert {name: (len(g.units), g.channels_each) for name, g in by_name(found).items()} == {"v": (6, 1)}
    assert "sets the scale" in found.left_alone["q"]
    # Keys and values in one layer are taken apart as a table: of both the same go, and keys cannot.
    assert not found_in(Attention(12, 1), 2, 7, 12).groups


def test_a_recurrent_layer() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 6, batch_first=True)
            self.head = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.lstm(x)[0][:, -1])

    found = found_in(Net(), 2, 4, 5)
    (group,) = found.groups
    assert (len(group.units), group.channels_each) == (6, 4)  # four gates
    assert {member.role for member in group.members if member.path == "lstm.weight_hh_l0"} == {"writes", "reads"}


def test_heads_of_models_are_found_from_their_outputs() -> None:
    squeezenet = found_in(torchvision.models.squeezenet1_1(), 1, 3, 64, 64)
    assert list(squeezenet.left_alone) == ["classifier.1"]
    resnet = found_in(torchvision.models.resnet18(), 1, 3, 64, 64)
    assert list(resnet.left_alone) == ["fc"]
    assert len(resnet.groups) == 12
    vit = found_in(timm.create_model("test_vit"), 1, 3, 160, 160)
    assert list(vit.left_alone) == ["head"]
    assert {(len(g.units), g.channels_each) for g in vit.groups if g.name.endswith("qkv")} == {(2, 96)}


def test_shared_layers_are_one() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)
            self.b = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(torch.relu(self.a(torch.relu(self.a(x)))))

    found = found_in(Net(), 2, 6)
    assert not found.groups  # the input's width cannot change, and the layer writes what it reads
    assert "a" in found.left_alone


# -- which of them are chosen


def chosen(found: Dependencies, ratio: float, scores: Any = None, **settings: Any) -> dict[str, int]:
    """How many units stay of each group."""
    if scores is None:
        scores = np.arange(found.count, dtype=float)
    gone = select(found, scores, np.full(len(found.groups), ratio), **settings)
    return {group.name: int((~gone[group.units]).sum()) for group in found.groups}


class Chain(nn.Sequential):
    def __init__(self, *widths: int) -> None:
        sizes = [3, *widths, 2]
        super().__init__(*(nn.Linear(a, b) for a, b in itertools.pairwise(sizes)))


def test_uniform_rounds_to_the_nearest() -> None:
    found = found_in(Chain(64, 100, 24, 8, 7, 1), 2, 3)
    assert chosen(found, 0.5) == {"0": 32, "1": 48, "2": 16, "3": 4, "4": 4}  # one channel alone is no group
    assert chosen(found, 0.5, round_to=1) == {"0": 32, "1": 50, "2": 12, "3": 4, "4": 4}
    assert chosen(found, 0.0) == {"0": 64, "1": 100, "2": 24, "3": 8, "4": 7}


def test_something_stays() -> None:
    found = found_in(Chain(64, 8), 2, 3)
    assert chosen(found, 0.99, max_ratio=0.99) == {"0": 8, "1": 4}
    assert chosen(found, 0.99, max_ratio=0.99, round_to=1) == {"0": 1, "1": 1}
    assert chosen(found, 0.99, max_ratio=0.99, round_to=1, min_channels=5) == {"0": 5, "1": 5}
    assert chosen(found, 0.99, round_to=1, max_ratio=0.75) == {"0": 16, "1": 2}


def test_the_least_important_go() -> None:
    found = found_in(Chain(4), 2, 3)
    gone = select(found, np.array([0.3, 0.1, 0.4, 0.2]), np.array([0.5]), round_to=1)
    assert gone.tolist() == [False, True, False, True]


def test_global_ranks_all_together() -> None:
    found = found_in(Chain(32, 32), 2, 3)
    scores = np.concatenate([np.full(32, 0.1), np.full(32, 1.0)])
    scores[40:48] = 0.01
    assert chosen(found, 0.5, scores, scope="global", max_ratio=0.75) == {"0": 8, "1": 24}
    assert chosen(found, 0.5, scores, scope="uniform") == {"0": 16, "1": 16}


def test_isomorphic_ranks_those_of_the_same_structure() -> None:
    net = nn.Sequential(nn.Linear(3, 16), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16), nn.Linear(16, 2))
    found = found_in(net, 2, 3)
    scores = np.concatenate([np.full(16, 0.1), np.full(16, 9.0), np.full(16, 0.2)])
    assert chosen(found, 0.5, scores, scope="isomorphic", round_to=1) == {"0": 2, "1": 8, "3": 16}


def test_zero_ratios_are_left_out_of_a_ranking() -> None:
    found = found_in(Chain(16, 16), 2, 3)
    gone = select(found, np.zeros(32), np.array([0.0, 0.5]), "global")
    assert not gone[found.groups[0].units].any()
    assert gone[found.groups[1].units].sum() == 8


def test_what_only_a_buffer_makes_stays() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("grid", torch.rand(1, 16, 16, 4))
            self.fc, self.out = nn.Linear(4, 8), nn.Linear(8, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean((1, 2, 3))[:, None] + self.out(self.fc(self.grid).mean((1, 2)))

    found = found_in(Grid(), 2, 3, 8, 8)
    assert {name: len(group.units) for name, group in by_name(found).items()} == {"fc": 8}


def test_tied_widths_keep_the_same_fraction() -> None:
    class Tied(nn.Module):
        def __init__(self, heads: int) -> None:
            super().__init__()
            self.stem = nn.Linear(3, 60)
            self.heads, self.width = heads, 60 // heads
            self.qkv, self.proj, self.head = nn.Linear(60, 180), nn.Linear(60, 60), nn.Linear(60, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            b, n, c = x.shape
            q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, self.width).permute(2, 0, 3, 1, 4)
            y = (q @ k.transpose(-2, -1) * self.width**-0.5).softmax(-1) @ v
            return self.head(x + self.proj(y.transpose(1, 2).reshape(b, n, c)))

    groups = by_name(found_in(Tied(3), 2, 7, 3))
    assert groups["stem"].family == groups["qkv"].family
    found = found_in(Tied(3), 2, 7, 3)
    scores = np.arange(found.count, dtype=float)
    left = {group.name: int((~select(found, scores, np.full(2, 0.5))[group.units]).sum()) for group in found.groups}
    assert left == {"stem": 40, "qkv": 2}


def test_a_layer_that_shares_the_weight_of_one_that_is_left_alone_is_named_too() -> None:
    class Shares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Linear(4, 8), nn.Linear(8, 6), nn.Linear(8, 6)
            self.two.weight = self.one.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.stem(x)
            return self.one(x) + self.two(x)

    found = found_in(Shares(), 2, 4)
    assert list(by_name(found)) == ["stem"]
    assert found.left_alone == dict.fromkeys(("one", "two"), "the model's output has its width")
