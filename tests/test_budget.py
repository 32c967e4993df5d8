"""Budgets: what a limit is, and the smallest choice of channels that keeps it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import torchtrim as tt
from torchtrim.channels.labels import Mask
from torchtrim.edits.budget import Budget
from torchtrim.edits.prune_budget import smallest
from torchtrim.search.share import Try, largest_share


@pytest.mark.parametrize("limit", [0, -1, math.nan, math.inf, True, "0.5", [1]])
@pytest.mark.parametrize("name", ["macs", "params", "size_mb", "latency_ms"])
def test_a_limit_is_a_number_above_zero(name: str, limit: Any) -> None:
    with pytest.raises(tt.EditError, match="above zero") as told:
        Budget(**{name: limit})
    assert told.value.path == f"budget.{name}"


def test_a_budget_has_a_limit() -> None:
    with pytest.raises(tt.EditError, match="without a limit"):
        Budget()


def test_shares_and_absolute_numbers() -> None:
    original = {"macs": 1000.0, "params": 50.0, "size_mb": 0.2}
    assert Budget(macs=0.25, params=1, size_mb=0.1).limits(original) == {"macs": 250, "params": 50, "size_mb": 0.1}
    assert Budget(macs=900).limits(original) == {"macs": 900}
    assert Budget(latency_ms=3).limits(original) == {}
    assert str(Budget(macs=0.5, latency_ms=2.5)) == "macs=0.5, latency_ms=2.5"


class Layers:
    """A chain of layers that are narrowed by the same ratio, in steps; each pays for its inputs times its outputs."""

    def __init__(self, widths: list[int], step: int) -> None:
        self.step = step
        ends = np.cumsum(widths)
        self.groups: list[npt.NDArray[np.int64]] = [
            np.arange(end - width, end) for end, width in zip(ends, widths, strict=True)
        ]

    def choose(self, ratio: float) -> Mask:
        gone = np.zeros(sum(map(len, self.groups)), dtype=bool)
        for units in self.groups:
            count = round(len(units) * ratio / self.step) * self.step
            gone[units[: min(count, len(units) - 1)]] = True
        return gone

    def cost(self, gone: Mask) -> dict[str, float]:
        widths = [3, *(int((~gone[units]).sum()) for units in self.groups), 10]
        return {
            "macs": float(sum(a * b for a, b in itertools.pairwise(widths))),
            "params": float(sum(widths)),
        }


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 64), min_size=1, max_size=6), st.sampled_from([1, 2, 8]), st.floats(0.05, 1.0))
def test_a_budget_is_kept_with_no_more_than_one_ratio_would_take(widths: list[int], step: int, share: float) -> None:
    net = Layers(widths, step)
    found = smallest(Budget(macs=share), net.cost, net.choose, net.groups, most=0.9)
    limit = share * found.original["macs"]
    assert found.cost == {"macs": net.cost(found.units)["macs"]}
    if found.missed:
        assert found.missed == ("macs",)
        assert (found.units == net.choose(0.9)).all()
        assert net.cost(found.units)["macs"] > limit
        return
    assert found.cost["macs"] <= limit
    tried = [net.choose(ratio) for ratio in np.linspace(0, 0.9, 400)]
    assert found.units.sum() <= min(gone.sum() for gone in tried if net.cost(gone)["macs"] <= limit)


def test_alike_groups_take_the_last_step_one_after_the_other() -> None:
    net = Layers([64] * 8, 32)
    found = smallest(Budget(params=0.8), net.cost, net.choose, net.groups[::-1], most=0.9)
    widths = [int((~found.units[units]).sum()) for units in net.groups]
    assert widths == [64, 64, 64, 64, 32, 32, 32, 32]


def test_every_limit_is_kept() -> None:
    net = Layers([64, 64], 1)
    one = smallest(Budget(macs=0.5), net.cost, net.choose, net.groups, most=0.9)
    two = smallest(Budget(macs=0.5, params=0.3), net.cost, net.choose, net.groups, most=0.9)
    assert one.units.sum() < two.units.sum()
    assert two.cost["macs"] <= 0.5 * two.original["macs"]
    assert two.cost["params"] <= 0.3 * two.original["params"]


def test_nothing_goes_where_the_model_is_within_its_budget() -> None:
    net = Layers([64, 64], 1)
    found = smallest(Budget(macs=1), net.cost, net.choose, net.groups, most=0.9)
    assert not found.units.any() and not found.missed


@settings(max_examples=100, deadline=None)
@given(
    st.floats(0, 0.6),  # what does not fall with the cost
    st.floats(0.6, 1.6),  # how the rest falls
    st.floats(0.65, 0.97),
    st.lists(st.floats(-0.01, 0.01), min_size=6, max_size=6),
)
def test_the_largest_share_within_a_latency(floor: float, power: float, limit: float, noise: list[float]) -> None:
    wobbles = iter(noise)

    def measure(share: float) -> Try[None]:
        return Try(share, 10 * (floor + (1 - floor) * share**power) * (1 + next(wobbles)), None)

    best, tried = largest_share(10 * limit, Try(1.0, 10.0, None), measure)
    assert best in tried and len(tried) <= 6
    assert 10 * limit * 0.9 <= best.ms <= 10 * limit


def test_a_latency_that_is_out_of_reach_gives_the_fastest_there_is() -> None:
    asked = []

    def measure(share: float) -> Try[str]:
        asked.append(share)
        share = max(share, 0.4)
        return Try(share, 10 * share, "smallest" if share == 0.4 else "larger", smaller=share > 0.4)

    best, tried = largest_share(3.0, Try(1.0, 10.0, "whole"), measure)
    assert (best.model, best.ms) == ("smallest", 4.0)
    assert len(tried) == len(asked) == 1


def test_a_share_in_coarse_steps_is_not_measured_again_and_again() -> None:
    def measure(share: float) -> Try[None]:
        return Try(share // 0.25 * 0.25, 10 * (share // 0.25 * 0.25), None)

    best, tried = largest_share(6.0, Try(1.0, 10.0, None), measure)
    assert len(tried) <= 3 and best.share == 0.5


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_vit", "test_convnext"])
def test_a_budget_holds_for_the_model_as_it_is_measured(name: str) -> None:
    model, x = timm.create_model(name).eval(), torch.zeros(1, 3, 160, 160)
    whole = tt.summary(model, x)
    for scope in ("uniform", "global"):
        net = tt.prune_channels(model, x, budget=Budget(macs=0.5), scope=scope, check=False)
        assert 0.35 * whole.macs <= tt.summary(net, x).macs <= 0.5 * whole.macs
    limits = Budget(params=0.6 * whole.params, size_mb=0.5 * whole.size_mb)
    found = tt.summary(tt.prune_channels(model, x, budget=limits, check=False), x)
    assert found.params <= 0.6 * whole.params and found.size_mb <= 0.5 * whole.size_mb
    assert found.size_mb >= 0.4 * whole.size_mb


def test_a_budget_out_of_reach_gives_the_smallest_and_says_so() -> None:
    model, x = timm.create_model("test_resnet").eval(), torch.zeros(1, 3, 64, 64)
    with pytest.warns(tt.TorchTrimWarning, match="macs missed"):
        net = tt.prune_channels(model, x, budget=Budget(macs=1e-4), max_ratio=0.5, check=False)
    half = tt.prune_channels(model, x, ratio=0.5, check=False)
    assert tt.summary(net, x).macs == tt.summary(half, x).macs
    assert "macs missed" in tt.history(net).entries[0].notes[0]
