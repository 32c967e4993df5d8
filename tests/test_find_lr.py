"""The learning-rate range test: what it finds, and that it leaves nothing behind."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.errors import InputError, ModelError, SelectionError
from torchtrim.train.find_lr import find_lr


def data(scale: float = 1.0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = scale * torch.randn(256, 8, generator=torch.Generator().manual_seed(1))
    return [(rows, rows[:, :3].argmax(1)) for rows in x.split(32)]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.1), nn.Linear(32, 3))


def test_the_model_is_left_as_it_was() -> None:
    model = net().eval()
    model(torch.randn(2, 8)).sum().backward()
    before, random = copy.deepcopy(model), torch.get_rng_state()
    gradient = model[0].weight.grad
    find_lr(model, data(), steps=20)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    assert model[0].weight.grad is gradient
    assert not model.training
    assert torch.equal(torch.get_rng_state(), random)


def test_a_training_at_the_suggestion_is_better_than_far_below_it() -> None:
    found = find_lr(net(), data(), optimizer="sgd", end=100.0)
    losses = {}
    for factor in (1e-3, 1):
        torch.manual_seed(0)
        done = tt.finetune(net(), data(), epochs=3, optimizer="sgd", lr=found.suggestion * factor)
        losses[factor] = done.epochs[-1].loss
    assert losses[1] == min(losses.values())
    assert found.lrs[0] == pytest.approx(1e-6)
    assert found.suggestion <= 10 * found.largest


def test_it_ends_where_the_loss_grows() -> None:
    found = find_lr(net(), data(), optimizer="sgd", end=1e6)
    assert len(found.lrs) < 100
    assert "ended at" in found.ended
    assert "suggestion" in str(found)


def test_layers_keep_their_shares_of_the_rate() -> None:
    seen: list[list[float]] = []

    def sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        rule = torch.optim.SGD(groups)
        rule.register_step_pre_hook(lambda rule, *_: seen.append([group["lr"] for group in rule.param_groups]))
        return rule

    find_lr(net(), data(), optimizer=sgd, steps=10, layer_decay=0.5, example_inputs=data()[0][0])
    assert min(seen[-1]) == pytest.approx(0.25)
    assert max(seen[-1]) == pytest.approx(1.0)


def test_it_is_drawn(tmp_path: Path) -> None:
    assert find_lr(net(), data(), steps=20).plot(tmp_path / "rates.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"start": 1.0, "end": 0.1}, InputError, "grow"),
        ({"steps": 3}, InputError, "10 or more"),
        ({"optimizer": torch.optim.SGD(nn.Linear(2, 2).parameters())}, InputError, "in use"),
        ({"data": []}, InputError, "step 1"),
        ({"data": iter(data()[:2])}, InputError, "gone through once"),
        ({"data": [(torch.full((2, 8), torch.nan), torch.tensor([0, 1]))]}, ModelError, "from the start"),
        ({"data": [(torch.zeros(2, 8), torch.tensor([0, 7]))]}, InputError, "0 to 2"),
    ],
)
def test_what_cannot_be_tested_is_refused(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model = net()
    before = copy.deepcopy(model)
    with pytest.raises(error, match=says):
        find_lr(model, options.pop("data", data()), **options)
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), before.state_dict().values(), strict=True)
    )
    tt.freeze(model)
    with pytest.raises(SelectionError):
        find_lr(model, data())
