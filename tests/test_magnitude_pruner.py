"""Gradual sparsity in a plain loop: what is reached and when, what stays zero, what survives, what is refused."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt

X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 5
WEIGHTS = 32 * 32 * 9 + 32 * 32


class Net(nn.Module):
    """Two layers between the first and the last, one of them in a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.bn = nn.BatchNorm2d(32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
        self.mix = nn.Conv2d(32, 32, 1)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.stem(x)).relu()
        x = x + self.conv(x).relu()
        return self.fc(self.mix(x).relu().mean((2, 3)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: tt.MagnitudePruner, steps: int) -> list[bool]:
    due = []
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        due.append(pruner.step())
    return due


def zeros(model: nn.Module) -> dict[str, int]:
    return {name: int((model.get_parameter(f"{name}.weight") == 0).sum()) for name in ("conv", "mix")}


def exact(sparsity: float) -> dict[str, int]:
    return {"conv": math.floor(sparsity * 9216 + 0.5), "mix": math.floor(sparsity * 1024 + 0.5)}


# What is reached, and when.


def test_the_first_step_is_due_at_begin_and_every_step_has_the_exact_number_of_zeros() -> None:
    model = net()
    schedule = tt.PolynomialDecay(0.5, 0.9, begin=3, end=17, every=5)
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, schedule, optimizer=optimizer)
    for step in range(22):
        (due,) = train(model, optimizer, p, 1)
        assert due == (step in (3, 8, 13, 17))
        reached = max((at for at in (3, 8, 13, 17) if at <= step), default=None)
        assert zeros(model) == exact(0.0 if reached is None else schedule.at(reached))
    assert schedule.at(17) == 0.9 and p.sparsity == pytest.approx(0.9, abs=1e-4)


def test_short_training_reaches_the_final_sparsity_on_finish() -> None:
    model = nn.Sequential(nn.Linear(4, 20), nn.Linear(20, 50), nn.Linear(50, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.5, 0.8, begin=0, end=1000, every=100), optimizer=optimizer)
    x = torch.randn(8, 4)
    for step in range(770):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        assert p.step() == (step % 100 == 0)
        if step == 0:
            assert int((model[1].weight == 0).sum()) == 500
    assert 0.79 < p.sparsity < 0.8
    report = p.finish()
    assert int((model[1].weight == 0).sum()) == report.zeros == 800 and report.sparsity == 0.8


def test_names_never_change_and_nothing_is_left_in_the_model() -> None:
    model = net()
    before = list(model.state_dict())
    parameters = list(model.parameters())
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5), optimizer=optimizer)
    train(model, optimizer, p, 3)
    assert list(model.state_dict()) == before and all(map(lambda a, b: a is b, model.parameters(), parameters))
    p.finish()
    assert list(model.state_dict()) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(bool(torch.signbit(held[held == 0]).any()) for held in (model.conv.weight, model.mix.weight))


def test_what_went_stays_zero_and_so_do_its_moments() -> None:
    for make in (sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-2, amsgrad=True)):
        model = net()
        optimizer = make(model)
        p = tt.MagnitudePruner(model, tt.OneShotSparsity(0.7, step=2), optimizer=optimizer)
        train(model, optimizer, p, 3)
        gone = model.conv.weight == 0
        before = model.conv.weight.detach().clone()
        train(model, optimizer, p, 5)
        assert torch.equal(model.conv.weight == 0, gone)
        assert bool((model.conv.weight[~gone] != before[~gone]).any())
        moments = [held for held in optimizer.state[model.conv.weight].values() if held is not None and held.dim()]
        assert moments and all(not bool(held[gone].any()) and bool(held[~gone].any()) for held in moments)


def test_without_an_optimizer_only_weights_are_set() -> None:
    model = net()
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.7))
    train(model, optimizer, p, 3)
    assert zeros(model) == exact(0.7)
    assert bool(optimizer.state[model.conv.weight]["momentum_buffer"][model.conv.weight == 0].any())


def test_weights_come_back_only_where_that_is_asked_for() -> None:
    found = {}
    for regrow in (False, True):
        model = net()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        schedule = tt.ConstantSparsity(0.8, end=20, every=5)
        p = tt.MagnitudePruner(model, schedule, optimizer=optimizer, regrow=regrow)
        train(model, optimizer, p, 1)
        first = model.conv.weight == 0
        train(model, optimizer, p, 2)
        assert (zeros(model) == exact(0.8)) is not regrow  # trained on in between
        train(model, optimizer, p, 18)
        last = model.conv.weight == 0
        train(model, optimizer, p, 3)
        assert torch.equal(model.conv.weight == 0, last) and zeros(model) == exact(0.8)
        found[regrow] = torch.equal(first, last)
    assert found == {False: True, True: False}


def test_patterns_follow_the_schedule() -> None:
    model = net()
    optimizer = sgd(model)
    schedule = tt.PolynomialDecay(0.1, 0.5, end=10, every=2, power=1)
    p = tt.MagnitudePruner(model, schedule, pattern="2:4", optimizer=optimizer)
    for step in range(11):
        train(model, optimizer, p, 1)
        groups = (model.conv.weight.detach().movedim(1, -1).reshape(-1, 4) == 0).sum(1)
        assert set(groups.tolist()) <= {0, 2}
        share = float((groups == 2).float().mean())
        assert share == pytest.approx(schedule.at(step - step % 2) / 0.5, abs=1e-3)
    assert bool((groups == 2).all())
    short = net()
    q = tt.MagnitudePruner(short, schedule, pattern="2:4")
    q.step()
    assert q.finish().sparsity == 0.5
    groups = (short.conv.weight.detach().movedim(1, -1).reshape(-1, 4) == 0).sum(1)
    assert bool((groups == 2).all())


@pytest.mark.parametrize(
    "settings",
    [
        {"scope": "global"},
        {"block": (4, 2)},
        {"block": (4, 2), "scope": "global"},
        {"importance": "random:3"},
        {"sparsity": {"conv": 0.9, "fc": 0.5}},
        {"include": "**"},
    ],
)
def test_masks_only_grow_in_every_scope(settings: dict[str, Any]) -> None:
    model = net()
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.2, 0.8, end=8, every=2), optimizer=optimizer, **settings)
    before: dict[str, torch.Tensor] = {}
    for _ in range(9):
        train(model, optimizer, p, 1)
        gone = {layer.path: model.get_parameter(layer.path) == 0 for layer in p.report().layers}
        assert all(bool((gone[name] | ~mask).all()) for name, mask in before.items())
        before = gone
    report = p.finish()
    if "sparsity" in settings:
        assert {layer.path: round(layer.sparsity, 3) for layer in report.layers} == {
            "conv.weight": 0.9,
            "fc.weight": 0.5,
        }
    else:
        assert report.sparsity == pytest.approx(0.8, abs=5e-3)  # as near as whole blocks come
    if settings == {"scope": "global"}:
        assert report.zeros == math.floor(0.8 * WEIGHTS + 0.5)


def test_thresholds_grow_with_the_schedule() -> None:
    model = net()
    start = model.conv.weight.detach().abs().clone()
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.2, 0.8, end=4, every=2, power=1), thresholds={"conv": 0.04})
    p.step()
    assert torch.equal(model.conv.weight == 0, start < 0.01)
    p.step()
    p.step()
    assert torch.equal(model.conv.weight == 0, start < 0.025)
    report = p.finish()
    assert torch.equal(model.conv.weight == 0, start < 0.04) and report.layers[0].threshold == 0.04


@dataclass
class Steps:
    """A schedule of somebody's own, which once asks for less."""

    final: float = 0.6

    def at(self, step: int) -> float:
        return (0.3, 0.5, 0.2)[step]

    def due(self, step: int) -> bool:
        return True


def test_a_schedule_of_ones_own() -> None:
    model = net()
    p = tt.MagnitudePruner(model, Steps())
    found = []
    for _ in range(3):
        p.step()
        found.append(round(p.sparsity, 2))
    assert found == [0.3, 0.5, 0.5] and round(p.finish().sparsity, 2) == 0.6


def test_a_schedule_that_gives_no_sparsity() -> None:
    @dataclass(frozen=True)
    class Wild:
        final: float = 0.5

        def at(self, step: int) -> float:
            return 1.5

        def due(self, step: int) -> bool:
            return True

    model = net()
    p = tt.MagnitudePruner(model, Wild())
    with pytest.raises(tt.EditError, match=r"schedule.at\(0\)"):
        p.step()
    assert zeros(model) == exact(0.0)


def test_it_learns_while_it_is_pruned() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.3, 0.9, end=40, every=5), optimizer=optimizer)
    before = float(nn.functional.cross_entropy(model(X), Y).detach())
    train(model, optimizer, p, 60)
    p.finish()
    after = float(nn.functional.cross_entropy(model(X), Y).detach())
    assert after < 0.5 * before


# What it says.


def test_the_report(tmp_path: Path) -> None:
    model = net()
    model.conv.weight.requires_grad_(False)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.5, 0.8, end=10, every=5), example_inputs=X)
    p.step()
    report = p.report()
    text = str(report)
    assert "conv.weight" in text and "32x32x3x3" in text and "4,608" in text and "50.00%" in text
    assert "fc.weight: the last layer" in text and "bn.weight" in text and "frozen" in text
    assert report._repr_html_().count("<tr>") == 4
    data = report.to_dict()
    assert data["zeros"] == 5120 and data["layers"][0]["threshold"] == pytest.approx(report.layers[0].threshold)
    largest = model.conv.weight.detach().abs()
    assert report.layers[0].threshold is not None and bool((largest[largest > 0] >= report.layers[0].threshold).all())
    report.plot(tmp_path / "sparsity.png")
    assert (tmp_path / "sparsity.png").stat().st_size > 5000
    with pytest.raises(tt.InputError, match="picture"):
        report.plot(tmp_path / "none" / "sparsity.png")
    with pytest.raises(tt.InputError, match="picture"):
        report.plot(tmp_path / "sparsity.xyz")


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = net()
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
    with SummaryWriter(str(tmp_path)) as writer:
        for _ in range(3):
            p.step()
            p.log(writer)
    found = EventAccumulator(str(tmp_path))
    found.Reload()
    assert {"sparsity/all", "sparsity/conv.weight", "threshold/conv.weight"} <= set(found.Tags()["scalars"])
    assert [(each.step, each.value) for each in found.Scalars("sparsity/all")] == [(1, 0.5), (2, 0.5), (3, 0.5)]
    with pytest.raises(tt.EditError, match="add_scalar"):
        p.log(object())


def test_the_history_holds_what_was_done_and_replays_the_zeros(tmp_path: Path) -> None:
    model = net()
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.5, 0.8, end=10, every=5), optimizer=optimizer, example_inputs=X)
    train(model, optimizer, p, 6)
    p.finish()
    (edit,) = tt.history(model).edits
    assert isinstance(edit, tt.Sparsify) and edit.sparsity == 0.8
    assert "reached in training, in 6 steps" in str(tt.history(model))
    again = tt.apply(net(7), None, tt.history(model))
    assert torch.equal(again.get_parameter("conv.weight") == 0, model.conv.weight == 0)
    tt.save(model, tmp_path / "net.trim")
    loaded = tt.load(tmp_path / "net.trim", model=net(9))
    for name, held in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], held)
    assert tt.history(loaded) == tt.history(model)


def test_without_inputs_the_checkpoint_still_loads(tmp_path: Path) -> None:
    model = net()
    tt.MagnitudePruner(model, tt.ConstantSparsity(0.8)).finish()
    tt.save(model, tmp_path / "net.trim")
    assert zeros(tt.load(tmp_path / "net.trim", model=net(9))) == exact(0.8)


# What survives.


def test_a_run_that_is_taken_up_again_ends_at_the_same_bits() -> None:
    def started() -> tuple[Net, torch.optim.Optimizer, tt.MagnitudePruner]:
        model = net()
        optimizer = sgd(model)
        schedule = tt.PolynomialDecay(0.5, 0.9, end=10, every=3)
        return model, optimizer, tt.MagnitudePruner(model, schedule, optimizer=optimizer)

    one, optimizer, p = started()
    train(one, optimizer, p, 5)
    file = io.BytesIO()
    torch.save({"model": one.state_dict(), "optimizer": optimizer.state_dict(), "pruner": p.state_dict()}, file)
    train(one, optimizer, p, 7)
    other, optimizer, q = started()
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    q.load_state_dict(state["pruner"])
    assert q.steps == 5
    assert sum(mask.numel() for mask in state["pruner"]["masks"].values()) == WEIGHTS // 8
    train(other, optimizer, q, 7)
    assert p.finish().to_dict() == q.finish().to_dict()
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda state: state.pop("masks"), "masks"),
        (lambda state: state.pop("step"), "step"),
        (lambda state: state.update(version=2), "state_dict"),
        (lambda state: state["shapes"].update({"conv.weight": [1]}), "conv.weight"),
        (lambda state: state["shapes"].update({"convv.weight": [1]}), "'conv.weight'"),
        (lambda state: state["masks"].update({"conv.weight": torch.zeros(3, dtype=torch.uint8)}), "bytes"),
    ],
)
def test_a_state_that_is_none(change: Callable[[dict[str, Any]], object], says: str) -> None:
    p = tt.MagnitudePruner(net(), tt.ConstantSparsity(0.5))
    p.step()
    state = copy.deepcopy(p.state_dict())
    change(state)
    with pytest.raises(tt.EditError, match=says):
        p.load_state_dict(state)
    assert p.steps == 1


def test_a_copy_of_all_three_goes_its_own_way() -> None:
    model = net()
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.3, 0.8, end=6, every=2), optimizer=optimizer)
    train(model, optimizer, p, 3)
    before = zeros(model)
    twin, twins, q = copy.deepcopy((model, optimizer, p))
    train(twin, twins, q, 5)
    assert q.model is twin and zeros(twin) == exact(0.8) and zeros(model) == before
    train(model, optimizer, p, 5)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), twin.state_dict().values(), strict=True))


def test_masks_follow_pruned_channels() -> None:
    model = net()
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.5, 0.9, end=10, every=5), optimizer=optimizer)
    train(model, optimizer, p, 3)
    gone = {name: model.get_parameter(f"{name}.weight") == 0 for name in ("conv", "mix")}
    tt.delete_channels(model, X, {"mix": [0, 5], "stem": [1, 2, 3]}, copy=False)
    tt.sync_optimizer(optimizer, model)
    rows = [row for row in range(32) if row not in (0, 5)]
    columns = [column for column in range(32) if column not in (1, 2, 3)]
    train(model, optimizer, p, 1)
    assert torch.equal(model.mix.weight == 0, gone["mix"][rows][:, columns])
    assert torch.equal(model.conv.weight == 0, gone["conv"][columns][:, columns])
    momentum = optimizer.state[model.conv.weight]["momentum_buffer"]
    assert not bool(momentum[model.conv.weight == 0].any())
    tt.prune_channels(model, X, 0.25, copy=False)
    tt.sync_optimizer(optimizer, model)
    train(model, optimizer, p, 8)
    report = p.finish()
    assert report.sparsity == pytest.approx(0.9, abs=1e-3) and "narrowed" in str(report)
    again = tt.apply(net(3), X, tt.history(model))
    assert torch.equal(again.get_parameter("conv.weight") == 0, model.conv.weight == 0)


def test_masks_follow_a_gradual_pruning_of_channels() -> None:
    model = net()
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.5, 0.8, end=10, every=2), optimizer=optimizer)
    channels = tt.GradualPruning(model, X, ratio=0.5, steps=3, optimizer=optimizer, check=False)
    for _ in range(4):
        train(model, optimizer, p, 2)
        channels.step()
    report = p.finish()
    assert model.conv.weight.shape[0] == 16 and report.sparsity == pytest.approx(0.8, abs=2e-3)


def test_a_pruned_copy_is_followed_by_name() -> None:
    model = net()
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.6), optimizer=optimizer)
    train(model, optimizer, p, 2)
    narrow = tt.delete_channels(model, X, "mix", [3])
    tt.sync_optimizer(optimizer, narrow, before=model)
    p.follow(narrow)
    rows = [row for row in range(32) if row != 3]
    gone = (model.mix.weight == 0)[rows]
    train(narrow, optimizer, p, 2)
    assert p.model is narrow and torch.equal(narrow.get_parameter("mix.weight") == 0, gone)


def test_an_average_of_weights_gets_the_zeros_too() -> None:
    model = net()
    optimizer = sgd(model)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.3, 0.8, end=6, every=2), optimizer=optimizer)
    for _ in range(5):
        train(model, optimizer, p, 1)
        average.update_parameters(model)
    p.mask(average.module)
    assert not tt.history(average.module).edits
    p.finish()
    assert zeros(average.module) != exact(0.8)
    p.mask(average.module)
    assert torch.equal(average.module.conv.weight == 0, model.conv.weight == 0) and zeros(model) == exact(0.8)
    assert tt.history(average.module).edits == tt.history(model).edits
    with pytest.raises(tt.PathError, match=r"conv.weight"):
        p.mask(nn.Linear(2, 2))
    other = net()
    other.conv = nn.Conv2d(32, 16, 3)
    with pytest.raises(tt.EditError, match="another shape there"):
        p.mask(other)


def test_a_layer_that_an_edit_removed_is_let_go() -> None:
    body = [nn.Linear(8, 8) for _ in range(3)]
    model = nn.Sequential(nn.Linear(4, 8), *body, nn.Linear(8, 2))
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
    p.step()
    tt.remove(model, torch.zeros(1, 4), "2", copy=False)
    p.step()
    report = p.finish()
    assert len(report.layers) == 2 and "2.weight went with an edit" in report.notes
    assert report.sparsity == 0.5


def test_a_pattern_stays_where_channels_went_that_it_does_not_divide_any_more() -> None:
    model = net()
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.25, 0.5, end=4, every=2), pattern="2:4")
    p.step()
    tt.delete_channels(model, X, "stem", [0, 1, 2], copy=False)
    gone = model.conv.weight == 0
    assert p.finish().layers[0].sparsity < 0.5 and torch.equal(model.conv.weight == 0, gone)


def test_a_pattern_goes_on_where_whole_groups_of_a_transposed_convolution_went() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ConvTranspose2d(16, 16, 2, groups=4), nn.Conv2d(16, 2, 1))
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.1, 0.5, end=4, every=2), pattern="2:4", include="1")
    p.step()
    tt.prune_channels(model, X, ratio=0.25, round_to=1, copy=False)
    assert list(model[1].weight.shape) == [12, 4, 2, 2] and model[1].groups == 3
    p.finish()
    groups = model[1].weight.detach().reshape(3, 4, -1)
    assert bool(((groups == 0).sum(1) == 2).all())


def test_moments_of_complex_weights_are_zero_too() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, dtype=torch.complex64), nn.Linear(4, 4))
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5), optimizer=optimizer, include="1")
    model[1](torch.ones(2, 4, dtype=torch.complex64)).abs().sum().backward()
    optimizer.step()
    p.step()
    weight = model[1].weight
    held = [value for value in optimizer.state[weight].values() if value.shape == weight.shape]
    assert len(held) == 3 and not any(bool(value[weight == 0].any()) for value in held)


def test_weights_that_came_back_are_not_called_zero() -> None:
    model = net()
    optimizer = sgd(model)
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.8), optimizer=optimizer, regrow=True)
    train(model, optimizer, p, 3)
    assert p.sparsity < 0.1 and not p.reached
    p.finish()
    assert p.sparsity == pytest.approx(0.8, abs=1e-4) and p.reached


def test_another_optimizer_can_be_set() -> None:
    model = net()
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5), optimizer=sgd(model))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    p.optimizer = optimizer
    train(model, optimizer, p, 2)
    assert not bool(optimizer.state[model.conv.weight]["exp_avg"][model.conv.weight == 0].any())


def test_a_shared_weight_is_pruned_once() -> None:
    shared = nn.Linear(20, 20)
    model = nn.Sequential(nn.Linear(4, 20), shared, nn.ReLU(), nn.Linear(20, 20), shared, nn.Linear(20, 2))
    model[3].weight = shared.weight
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
    p.step()
    report = p.finish()
    assert [layer.path for layer in report.layers] == ["1.weight"] and report.zeros == 200
    assert model[3].weight is shared.weight


def test_other_types_and_devices_of_values() -> None:
    model = net()
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
    p.step()
    model.to(torch.bfloat16)
    p.step()
    assert model.conv.weight.dtype == torch.bfloat16 and zeros(model) == exact(0.5)
    p.finish()


# What is refused.


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: tt.PolynomialDecay(0.5, 0.9), "end="),
        (lambda: tt.PolynomialDecay(0.5, 0.9, begin=100, end=50), "ends before it begins"),
        (lambda: tt.PolynomialDecay(0.5, 0.9, begin=100, end=100), "OneShot"),
        (lambda: tt.PolynomialDecay(0.5, 1.0, end=10), "without 1"),
        (lambda: tt.PolynomialDecay(-0.5, 0.9, end=10), "initial"),
        (lambda: tt.PolynomialDecay(0.9, 0.5, end=10), "come back"),
        (lambda: tt.PolynomialDecay(0.5, 0.9, end=10, every=0), "every"),
        (lambda: tt.PolynomialDecay(0.5, 0.9, begin=-1, end=10), "begin"),
        (lambda: tt.PolynomialDecay(0.5, 0.9, end=10.5), "whole number"),  # type: ignore[arg-type]
        (lambda: tt.PolynomialDecay(0.5, 0.9, end=10, power=0), "power"),
        (lambda: tt.ConstantSparsity(0.5, begin=10, end=5), "ends before it begins"),
        (lambda: tt.ConstantSparsity(1.5), "target"),
        (lambda: tt.OneShotSparsity(0.5, step=-1), "step"),
    ],
)
def test_schedules_that_are_none(make: Callable[[], object], says: str) -> None:
    with pytest.raises(tt.EditError, match=says):
        make()


@pytest.mark.parametrize(
    ("schedule", "settings", "says"),
    [
        (0.5, {}, "PolynomialDecay"),
        (tt.PolynomialDecay, {}, "not a schedule"),
        (tt.ConstantSparsity(0.5), {"exclude": "**"}, "no weights are left"),
        (tt.ConstantSparsity(0.5), {"exclude": "cnv"}, "'conv'"),
        (tt.ConstantSparsity(0.5), {"sparsity": {"cov": 0.5}}, "'conv'"),
        (tt.ConstantSparsity(0.5), {"sparsity": 0.5}, "by path"),
        (tt.ConstantSparsity(0.5), {"sparsity": {"conv": 0.5}, "pattern": "2:4"}, "one of these"),
        (tt.ConstantSparsity(0.6), {"pattern": "2:4"}, "of its own"),
        (tt.ConstantSparsity(0.5), {"pattern": "12:24"}, "multiple of 24"),
        (tt.ConstantSparsity(0.5), {"scope": "layer"}, "uniform or global"),
        (tt.ConstantSparsity(0.5), {"optimizer": "sgd"}, "not an optimizer"),
        (tt.ConstantSparsity(0.5), {"optimizer": torch.optim.SGD([torch.zeros(1)], lr=1)}, "holds none"),
    ],
)
def test_bad_settings(schedule: Any, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(tt.TorchTrimError, match=says):
        tt.MagnitudePruner(net(), schedule, **settings)


def test_a_model_changed_behind_its_back() -> None:
    for change, says in (
        (lambda model: setattr(model.conv, "weight", nn.Parameter(torch.ones(32, 32, 3, 3))), "replaced"),
        (lambda model: setattr(model, "conv", nn.Conv2d(32, 32, 3)), "replaced"),
        (lambda model: delattr(model, "conv"), "replaced"),
        (lambda model: setattr(model.conv.weight, "data", torch.ones(32, 16, 3, 3)), "another shape"),
    ):
        model = net()
        p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
        p.step()
        change(model)
        with pytest.raises(tt.EditError, match=f"conv.weight.*{says}"):
            p.step()
        assert p.steps == 1
        with pytest.raises(tt.EditError, match=r"conv.weight"):
            p.finish()


def test_an_edit_that_takes_no_layer_out_is_no_excuse_for_a_layer_that_is_gone() -> None:
    model = net()
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
    tt.delete_channels(model, X, "mix", [0], copy=False)
    p.step()
    tt.delete_channels(model, X, "mix", [0], copy=False)
    model.conv = nn.Conv2d(32, 32, 3, padding=1, bias=False)
    with pytest.raises(tt.EditError, match=r"conv.weight.*replaced"):
        p.step()


def test_steps_after_finish() -> None:
    model = net()
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
    first = p.finish()
    assert p.finished and p.finish() == first and len(tt.history(model).edits) == 1
    with pytest.raises(tt.EditError, match="finished"):
        p.step()


def test_weights_that_blow_up_are_told_when_weights_are_chosen() -> None:
    model = net()
    with torch.no_grad():
        model.mix.weight[0, 0] = float("inf")
    with pytest.raises(tt.ModelError, match=r"mix.weight"):
        tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
    model = net()
    p = tt.MagnitudePruner(model, tt.ConstantSparsity(0.5))
    p.step()
    with torch.no_grad():
        model.conv.weight[0, 0] = float("nan")
    with pytest.raises(tt.ModelError, match=r"conv.weight.*good"):
        p.finish()
    assert not p.finished and not tt.history(model).edits
