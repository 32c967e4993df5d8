"""The autopilot: budgets that are met and missed, every kind of limit, bad input, and what is never changed."""

from __future__ import annotations

import itertools
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.autopilot.search import TrimStopped
from torchtrim.errors import EditError, InputError


class Unit(nn.Module):
    def __init__(self, channels: int, inner: int, size: float) -> None:
        super().__init__()
        self.one = nn.Conv2d(channels, inner, 3, padding=1)
        self.norm = nn.BatchNorm2d(inner)
        self.two = nn.Conv2d(inner, channels, 1)
        nn.init.normal_(self.two.weight, std=size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.two(torch.relu(self.norm(self.one(x))))


class Net(nn.Module):
    """Four blocks, of which the second matters least by far."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.body = nn.Sequential(*(Unit(16, 16, size) for size in (0.05, 0.0005, 0.04, 0.03)))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.body(torch.relu(self.stem(x))).mean((2, 3)))


def make() -> tuple[nn.Module, list[Any]]:
    """A network, and data whose labels are what it says itself."""
    torch.manual_seed(3)
    net = Net().eval()
    x = torch.randn(64, 3, 8, 8)
    with torch.no_grad():
        y = net(x).argmax(1)
    return net, [(x[:40], y[:40]), (x[40:], y[40:])]


def state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


def test_a_share_of_the_macs() -> None:
    net, data = make()
    before = state(net)
    result = tt.trim(net, data, budget=tt.Budget(macs=0.7), pruning=["magnitude"], trials=4)
    whole, left = tt.summary(net, data[0][0][:1]).macs, tt.summary(result.model, data[0][0][:1]).macs
    assert left <= 0.7 * whole
    assert result.met == {"macs": (0.7 * whole, left)}
    assert not result.missed
    assert type(result.model) is Net
    assert result.score_name == "accuracy"
    assert result.baseline == 1.0
    assert result.score == pytest.approx(result.baseline - result.drop)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_block_that_matters_least_goes_first() -> None:
    net, data = make()
    result = tt.trim(net, data, budget=tt.Budget(macs=0.8), pruning=[], trials=3)
    (entry,) = [entry for entry in tt.history(result.model).entries if entry.edit.kind == "remove"]
    assert isinstance(entry.edit, tt.Remove)
    assert "body.1" in entry.edit.paths
    assert result.score >= 0.9
    replayed = tt.apply(make()[0], data[0][0][:1], [entry.edit for entry in tt.history(result.model).entries])
    assert tt.summary(replayed, data[0][0][:1]).macs == tt.summary(result.model, data[0][0][:1]).macs


def test_only_a_drop_asks_for_the_smallest_within_it() -> None:
    net, data = make()
    free = tt.trim(net, data, budget={"max_drop": 1.0}, pruning=["magnitude"], trials=5)
    strict = tt.trim(net, data, budget={"max_drop": 0.05}, pruning=["magnitude"], trials=5)
    size = [tt.summary(each.model, data[0][0][:1]).macs for each in (free, strict)]
    assert size[0] <= size[1]
    assert strict.drop <= 0.05
    assert list(strict.met) == ["max_drop"]
    within = [each for each in free.candidates if each.score is not None]
    assert size[0] == min(each.macs for each in within)


def test_a_budget_below_what_any_plan_reaches_gives_the_nearest_and_says_so() -> None:
    net, data = make()
    result = tt.trim(net, data, budget=tt.Budget(macs=0.0001), pruning=["magnitude"], trials=3)
    assert not result.met
    limit, found = result.missed["macs"]
    assert found > limit
    assert found == min(each.macs for each in result.candidates if each.score is not None)
    assert "MISSED" in str(result)
    assert result.model(data[0][0]).shape == (40, 4)


def test_limits_that_contradict_each_other() -> None:
    net, data = make()
    result = tt.trim(net, data, budget=tt.Budget(macs=0.05, max_drop=0.0), pruning=["magnitude"], trials=4)
    assert result.missed
    assert {*result.met, *result.missed} == {"macs", "max_drop"}
    for limit, found in result.missed.values():
        assert found > limit


def test_a_model_that_is_within_the_budget_is_given_back() -> None:
    net, data = make()
    result = tt.trim(net, data, budget=tt.Budget(macs=10**9), trials=3)
    assert not result.candidates
    assert "within the budget as it is" in " ".join(result.notes)
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in result.model.state_dict().items())
    assert result.model is not net


def test_no_removable_layer() -> None:
    net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 8, 3), nn.Flatten(), nn.Linear(128, 4))
    result = tt.trim(net, [torch.randn(30, 3, 8, 8)], budget=tt.Budget(macs=0.6), pruning=["magnitude"], trials=2)
    assert not result.missed
    assert any("no block is removed" in note for note in result.notes)
    with pytest.raises(EditError, match="no plan to try"):
        tt.trim(net, [torch.randn(30, 3, 8, 8)], budget=tt.Budget(macs=0.6), pruning=[], trials=2)


def test_one_small_batch_is_both_scored_and_calibrated_on() -> None:
    net, data = make()
    x, y = data[0]
    result = tt.trim(net, [(x[:16], y[:16])], budget=tt.Budget(macs=0.7), pruning=["magnitude"], trials=1)
    assert any("16 rows are scored on, and calibrated on" in note for note in result.notes)
    with pytest.raises(InputError, match="too little data"):
        tt.trim(net, [(x[:4], y[:4])], budget=tt.Budget(macs=0.7), trials=1)
    with pytest.raises(InputError, match=r"no batches|too little"):
        tt.trim(net, [], example_inputs=x[:1], budget=tt.Budget(macs=0.7), trials=1)


def test_data_that_can_be_gone_through_once() -> None:
    net, data = make()
    result = tt.trim(net, iter(data), budget=tt.Budget(macs=0.8), pruning=["magnitude"], trials=1)
    assert not result.missed


def test_unlabelled_data_is_scored_by_agreement() -> None:
    net, data = make()
    result = tt.trim(net, [data[0][0]], budget=tt.Budget(macs=0.8), pruning=["magnitude"], trials=2)
    assert result.score_name.startswith("agreement")
    assert result.baseline == 1.0


def test_evaluate_that_raises_is_named_and_what_was_measured_is_kept() -> None:
    net, data = make()
    calls = itertools.count()

    def evaluate(model: nn.Module) -> float:
        if next(calls) == 3:  # two of the untouched model, one candidate
            raise RuntimeError("no such file")
        return 0.5

    with pytest.raises(TrimStopped, match=r"evaluate failed .*no such file") as stopped:
        tt.trim(net, data, evaluate, budget=tt.Budget(macs=0.7), pruning=["magnitude"], trials=5)
    assert len([each for each in stopped.value.candidates if each.score == 0.5]) == 1
    with pytest.raises(InputError, match="untouched model"):
        tt.trim(net, data, lambda model: 1 / 0, budget=tt.Budget(macs=0.7), trials=1)


def test_evaluate_that_gives_nan() -> None:
    net, data = make()
    with pytest.raises(InputError, match="NaN for the untouched"):
        tt.trim(net, data, lambda model: math.nan, budget=tt.Budget(macs=0.7), trials=1)
    calls = itertools.count()

    def evaluate(model: nn.Module) -> float:
        return math.nan if next(calls) == 2 else 0.5

    result = tt.trim(net, data, evaluate, budget=tt.Budget(macs=0.7), pruning=["magnitude"], trials=3)
    assert result.score == 0.5
    assert [each.why for each in result.candidates].count("evaluate gave NaN") == 1
    with pytest.raises(EditError, match="no plan could be made and scored"):
        calls = itertools.count(1)  # every candidate from now on
        tt.trim(
            net,
            data,
            lambda model: 0.5 if next(calls) < 3 else math.nan,
            budget=tt.Budget(macs=0.7),
            pruning=["magnitude"],
            trials=2,
        )


def test_noise_is_told_and_not_chased() -> None:
    net, data = make()
    calls = itertools.count()

    def evaluate(model: nn.Module) -> float:
        return 0.5 + 0.1 * (next(calls) % 2)

    result = tt.trim(net, data, evaluate, budget=tt.Budget(macs=0.8), pruning=["magnitude"], trials=4)
    assert result.noise == pytest.approx(0.1)
    assert any("moves by 0.1 by itself" in note for note in result.notes)
    measured = [each for each in result.candidates if each.score is not None and not each.excess]
    assert result.plan == min(measured, key=lambda each: each.macs).plan


def test_training_with_the_untouched_model_as_teacher(tmp_path: Path) -> None:
    net, data = make()
    result = tt.trim(
        net,
        data,
        budget=tt.Budget(macs=0.5),
        pruning=["magnitude"],
        trials=2,
        train_data=data,
        val_data=data,
        training={"epochs": 3, "lr": 1e-2},
        folder=tmp_path / "out",
    )
    assert result.training is not None
    assert len(result.training.epochs) == 3
    assert not result.missed
    loaded = tt.load(result.path, model=Net())
    x = data[0][0]
    with torch.no_grad():
        assert torch.allclose(loaded.eval()(x), result.model.eval()(x), atol=1e-5)
    stages = [stage.name for stage in result.report.stages]
    assert stages[0] == "original"
    assert stages[-1] == "fine-tuned"
    assert {"report.html", "report.md", "report.json", "net.trim", "study.journal"} <= {
        path.name for path in (tmp_path / "out").iterdir()
    }
    told = json.loads((tmp_path / "out" / "report.json").read_text())
    assert told["limits"][0]["name"] == "macs"


def test_a_function_that_recovers() -> None:
    net, data = make()

    def recover(model: nn.Module) -> None:
        with torch.no_grad():
            model.get_submodule("fc").bias.add_(torch.tensor([100.0, 0, 0, 0]))

    result = tt.trim(net, data, budget=tt.Budget(macs=0.7), pruning=["magnitude"], trials=1, recover=recover)
    with torch.no_grad():
        assert bool((result.model(data[0][0]).argmax(1) == 0).all())
    with pytest.raises(InputError, match="recover failed: ZeroDivisionError"):
        tt.trim(net, data, budget=tt.Budget(macs=0.7), pruning=["magnitude"], trials=1, recover=lambda model: 1 / 0)


@pytest.mark.slow
def test_a_latency_is_that_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtrim.autopilot.files._SECONDS", 0.05)
    net, data = make()
    x = data[0][0][:1]
    exported = tt.export_onnx(net, x, tmp_path / "whole.onnx", benchmark=False)
    whole = tt.benchmark(exported.path, x, seconds=0.3).timings[0].median_ms
    result = tt.trim(
        net,
        data,
        None,
        x,
        budget=tt.Budget(latency_ms=0.8 * whole),
        pruning=["magnitude"],
        trials=2,
        folder=tmp_path / "o",
    )
    limit, found = {**result.met, **result.missed}["latency_ms"]
    assert limit == pytest.approx(0.8 * whole)
    assert 0 < found < whole * 2
    assert result.cost == "latency_ms"
    assert result.export is not None
    assert result.export.path.is_file()
    assert all(each.latency_ms for each in result.candidates if each.score is not None)


def test_an_int8_file_is_scored_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtrim.autopilot.files._SECONDS", 0.05)
    net, data = make()
    seen: list[str] = []

    def evaluate(model: nn.Module) -> float:
        seen.append(type(model).__name__)
        with torch.no_grad():
            return float(sum((model(x).argmax(1) == y).float().mean() for x, y in data)) / len(data)

    result = tt.trim(
        net, data, evaluate, budget=tt.Budget(size_mb=0.02), quantize="static", pruning=["magnitude"], trials=2,
        folder=tmp_path,
    )  # fmt: skip
    assert "FileModel" in seen
    assert result.plan.scheme == "static"
    assert result.export is not None
    assert result.export.quantize == "static"
    assert {**result.met, **result.missed}["size_mb"][1] == pytest.approx(result.export.size_mb)
    assert result.report.stages[-1].name == "file, static"


def test_modes_gradients_and_random_state_stay() -> None:
    net, data = make()
    net.train()
    net.get_submodule("body.2").eval()
    net.get_submodule("stem").requires_grad_(False)
    modes = {path: module.training for path, module in net.named_modules()}
    random = torch.get_rng_state()
    result = tt.trim(net, data, budget=tt.Budget(macs=0.8), pruning=["magnitude"], trials=1)
    assert torch.equal(random, torch.get_rng_state())
    assert modes == {path: module.training for path, module in net.named_modules()}
    assert not result.model.get_submodule("stem").weight.requires_grad
    assert result.model.get_submodule("fc").weight.requires_grad
    assert result.model.training


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"budget": {}}, "without a limit"),
        ({"budget": {"speed": 3}}, "no such limit"),
        ({"budget": {"macs": -1}}, "above zero"),
        ({"budget": {"max_drop": -0.1}}, "above zero"),
        ({"pruning": ["magnitud"]}, "unknown way to prune"),
        ({"quantize": "int3"}, "unknown scheme"),
        ({"quantize": ["auto", "static"]}, "unknown scheme"),
        ({"order": "last"}, "unknown order"),
        ({"trials": 0}, "positive whole number"),
        ({"seconds": 0}, "above zero"),
        ({"seed": -1}, "0 or more"),
        ({"study": ""}, "needs a name"),
        ({"training": {"epochs": 2}}, "nothing to train on"),
        ({"train_data": [], "recover": print}, "not both"),
        ({"removal": False, "pruning": []}, "nothing may be done"),
        ({"evaluate": 3}, "a function of a model"),
    ],
)
def test_bad_options_are_refused_before_any_work(options: dict[str, Any], told: str) -> None:
    net, data = make()
    with pytest.raises((EditError, InputError), match=told):
        tt.trim(net, data, **{"budget": {"macs": 0.5}, **options})


def test_a_drop_is_not_for_pruning_alone() -> None:
    net, data = make()
    with pytest.raises(EditError, match=r"tt\.trim") as error:
        tt.prune_channels(net, data[0][0], budget=tt.Budget(macs=0.5, max_drop=0.1))
    assert error.value.path == "budget.max_drop"


def test_the_result_is_plain_data_and_a_table() -> None:
    net, data = make()
    result = tt.trim(net, data, budget=tt.Budget(macs=0.6, params=0.9), pruning=["magnitude"], trials=3)
    told = json.loads(json.dumps(result.to_dict()))
    assert told["met"]["macs"]["found"] == result.met["macs"][1]
    assert len(told["candidates"]) == len(result.candidates)
    assert str(result.plan) in str(result)
    assert "<table" in result._repr_html_()
    costs = [each.macs for each in result.pareto]
    scores = [each.score for each in result.pareto]
    assert costs == sorted(costs)
    assert scores == sorted(scores)


def test_the_guide_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torchtrim.autopilot.files._SECONDS", 0.05)
    text = (Path(__file__).parent.parent / "docs" / "trim.md").read_text(encoding="utf-8")
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(compile(block, "trim.md", "exec"), names)
    assert (tmp_path / "trimmed" / "report.html").is_file()
    assert {*names["result"].met, *names["result"].missed} == {"size_mb", "max_drop"}


@pytest.mark.slow
def test_a_language_model_with_its_cache() -> None:
    import transformers

    torch.manual_seed(1)
    config = transformers.GPT2Config(n_embd=32, n_layer=4, n_head=2, n_positions=32, vocab_size=64)
    net: Any = transformers.GPT2LMHeadModel(config).eval()
    data = [{"input_ids": torch.randint(0, 64, (16, 6))} for _ in range(2)]
    result = tt.trim(net, data, budget=tt.Budget(macs=0.7), pruning=[], trials=3)
    assert not result.missed, result.candidates
    assert result.model.config.num_hidden_layers == 4 - result.plan.remove
    found = result.model.generate(data[0]["input_ids"], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert found.shape == (16, 11)


@pytest.mark.slow
def test_what_loses_less_is_no_reason_against_what_is_smaller() -> None:
    """Where everything may be lost, the smallest of all plans is the best."""
    net, data = make()
    result = tt.trim(net, data, budget={"max_drop": 1.0}, pruning=["magnitude"], trials=12, seed=3)
    assert all(each.score is not None for each in result.candidates)
    assert tt.summary(result.model, data[0][0][:1]).macs == min(each.macs for each in result.candidates)


def test_an_int8_file_alone_is_seen_in_the_report(tmp_path: Path) -> None:
    net, data = make()
    result = tt.trim(
        net, data, budget=tt.Budget(macs=1.0), quantize="static", removal=False, pruning=["magnitude"], trials=1,
        folder=tmp_path,
    )  # fmt: skip
    assert [stage.name for stage in result.report.stages] == ["original", "file, static"]
    assert result.export is not None
    assert result.export.quantize == "static"


def test_a_folder_is_gone_on_with(tmp_path: Path) -> None:
    """More plans, and another training than the one that lies there."""
    net, data = make()
    asked: dict[str, Any] = {
        "budget": tt.Budget(macs=0.7), "pruning": ["magnitude"], "train_data": data, "folder": tmp_path,
    }  # fmt: skip
    first = tt.trim(net, data, trials=1, training={"epochs": 1}, **asked)
    second = tt.trim(net, data, trials=3, training={"epochs": 2}, val_data=None, **asked)
    assert (len(first.candidates), len(second.candidates)) == (1, 3)
    assert second.candidates[0] == first.candidates[0]
    assert second.training is not None
    assert len(second.training.epochs) == 2
    with pytest.raises(InputError, match="of another model, budget, data"):
        tt.trim(net, [(data[1][0], data[1][1])], trials=3, **asked)
    with pytest.raises(InputError, match="of another model, budget, data"):
        tt.trim(net, data, trials=3, **{**asked, "budget": tt.Budget(macs=0.6)})


def test_validation_data_that_can_be_gone_through_once() -> None:
    net, data = make()
    result = tt.trim(
        net, data, budget=tt.Budget(macs=0.8), pruning=["magnitude"], trials=1, val_data=iter(data), train_data=data,
        training={"epochs": 1},
    )  # fmt: skip
    assert result.training is not None
    assert result.training.epochs[0].val_metric is not None


def test_an_evaluate_function_that_changes_its_model() -> None:
    net, data = make()

    def evaluate(model: nn.Module) -> float:
        device = next(model.parameters()).device
        return float(model.half().float()(data[0][0].to(device)).std())

    result = tt.trim(net, data, evaluate, budget=tt.Budget(macs=0.8), pruning=["magnitude"], trials=2)
    assert not result.missed
    assert next(result.model.parameters()).dtype == torch.float32


def test_a_plan_that_fails_in_the_end_gives_way_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    from torchtrim.autopilot.building import Builder

    net, data = make()
    steps = Builder.steps
    refused: list[str] = []

    def refuse(self: Builder, plan: Any, *given: Any, **asked: Any) -> Any:
        if asked.get("check") and not refused:
            refused.append(str(plan))
            raise EditError("it does not compute what it should")
        return steps(self, plan, *given, **asked)

    monkeypatch.setattr(Builder, "steps", refuse)
    result = tt.trim(net, data, budget=tt.Budget(macs=0.8), pruning=["magnitude"], trials=3)
    assert str(result.plan) not in refused
    assert any("passed over" in note for note in result.notes)
    assert not result.missed
