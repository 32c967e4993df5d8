"""`top_down`: what it takes off, when it stops, what it gives back; and what a bad evaluate function does."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import torchtrim as tt
from torchtrim.errors import EditError, InputError
from torchtrim.search.removal_curve import TopDownStopped


class Unit(nn.Module):
    def __init__(self, weight: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1, bias=False)
        nn.init.constant_(self.conv.weight, weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


class Net(nn.Module):
    """Five units; how much each matters is its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 4, 1)
        self.units = nn.Sequential(*(Unit(weight) for weight in (0.5, 0.0, 0.2, 0.01, 0.3)))
        self.head = nn.Linear(4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.units(self.stem(x)).mean((2, 3)))


X = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(1))


def likeness(net: nn.Module) -> Callable[[nn.Module], float]:
    """How near a model's outputs are to those of the whole one."""
    with torch.no_grad():
        whole = net(X)
    return lambda model: 1 - float(((model(X) - whole).norm() / whole.norm()).detach())


def test_from_the_end_until_the_drop_is_too_large() -> None:
    net = Net()
    found = tt.top_down(net, likeness(net), X, tolerance=0.6)
    assert found.steps[0].paths == ("units.4",)
    assert [step.within for step in found.steps] == [True] * (len(found.steps) - 1) + [False]
    assert found.best is found.steps[-2]
    assert len(found.model.units) == 5 - len(found.removed)  # type: ignore[attr-defined, arg-type]
    assert likeness(net)(found.model) == pytest.approx(found.best.score)
    assert found.best.macs == tt.summary(found.model, X).macs and found.best.params < found.params
    assert len(net.units) == 5 and found.baseline == pytest.approx(1) and found.noise == 0
    assert "past what is allowed" in found.why


def test_the_least_important_go_first() -> None:
    net = Net()
    found = tt.top_down(net, likeness(net), X, order="ranked", data=[X], metric="norm", tolerance=0.05)
    assert set(found.removed) == {"units.1", "units.3"}
    assert [step.paths for step in found.steps][:2] == [("units.1",), ("units.3",)]
    assert len(found.steps) == 3 and not found.steps[-1].within


def test_a_search_takes_what_costs_least() -> None:
    net = Net()
    found = tt.top_down(net, likeness(net), X, order="search", max_steps=2, tolerance=1)
    assert found.removed == ("units.1", "units.3") and "stopped after 2 steps" in found.why
    pair = tt.top_down(net, likeness(net), X, order="search", step=2, max_steps=1, tolerance=1)
    assert set(pair.removed) == {"units.2", "units.3"} or set(pair.removed) == {"units.1", "units.2"}


def test_nothing_is_kept_where_the_first_step_costs_too_much() -> None:
    net = Net()
    found = tt.top_down(net, likeness(net), X, tolerance=1e-6)
    assert found.best is None and found.removed == () and len(found.steps) == 1
    assert torch.equal(found.model(X), net(X))
    assert found.model is not net and found.model.head.weight is not net.head.weight  # type: ignore[union-attr]


def test_all_blocks_may_go() -> None:
    net = Net()
    found = tt.top_down(net, likeness(net), X, tolerance=10, step=2)
    assert len(found.removed) == 5 and [len(step.paths) for step in found.steps] == [2, 2, 1]
    assert found.why == "no block is left"


def test_recovery_is_asked_only_where_it_is_needed() -> None:
    net = Net()
    calls = []

    def recover(model: nn.Module) -> str:
        calls.append(model)
        model.head.weight.data.copy_(net.head.weight * 1.0)  # type: ignore[union-attr, operator]
        model.recovered = True  # type: ignore[assignment]
        return "a report"

    def evaluate(model: nn.Module) -> float:
        return 1.0 if getattr(model, "recovered", False) or len(model.units) > 3 else 0.0  # type: ignore[arg-type]

    found = tt.top_down(net, evaluate, X, tolerance=0.1, recover=recover, max_steps=2)
    assert len(calls) == 1
    assert [step.before_recovery for step in found.steps] == [None, 0.0]
    assert found.steps[1].within and found.best is found.steps[1]


def test_a_noisy_score_is_said_and_not_chased() -> None:
    net = Net()
    values = iter([0.80, 0.84, 0.81, 0.60])
    found = tt.top_down(net, lambda model: next(values), X, tolerance=0.0)
    assert found.noise == pytest.approx(0.04) and found.baseline == pytest.approx(0.82)
    assert [step.within for step in found.steps] == [True, False]  # 0.01 lost is less than the noise
    assert "moved by 0.04" in str(found)


def test_nan_on_the_way_ends_it_and_nan_at_the_start_is_refused() -> None:
    net = Net()
    values = iter([1.0, 1.0, 1.0, math.nan])
    found = tt.top_down(net, lambda model: next(values), X, tolerance=0.5)
    assert [step.within for step in found.steps] == [True, False] and found.removed == ("units.4",)
    assert "NaN" in found.steps[-1].note
    with pytest.raises(InputError, match="NaN for the untouched model"):
        tt.top_down(net, lambda model: math.nan, X)


def test_an_evaluate_function_that_fails_leaves_what_was_reached() -> None:
    net = Net()
    scores = iter([1.0, 1.0, 1.0])

    def evaluate(model: nn.Module) -> float:
        try:
            return next(scores)
        except StopIteration as error:
            raise RuntimeError("the disk is gone") from error

    with pytest.raises(
        TopDownStopped, match=r"evaluate failed on the model without units.4, units.3: .*disk is gone"
    ) as at:
        tt.top_down(net, evaluate, X, tolerance=0.5)
    assert at.value.partial.removed == ("units.4",)
    with pytest.raises(InputError, match="gives no number"):
        tt.top_down(net, lambda model: "good", X)  # type: ignore[arg-type, return-value]

    def recover(model: nn.Module) -> None:
        raise ValueError("no data")

    with pytest.raises(TopDownStopped, match="recover failed: ValueError: no data"):
        tt.top_down(net, likeness(net), X, tolerance=1e-6, recover=recover)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"step": 0}, "step is a positive whole number"),
        ({"max_steps": 0}, "max_steps is a positive"),
        ({"tolerance": -1}, "0 or more"),
        ({"order": "frist"}, "last, ranked, search"),
        ({"order": "ranked"}, "a ranking needs data"),
        ({"heal": "auto"}, "healing needs data"),
    ],
)
def test_bad_options(asked: dict[str, object], told: str) -> None:
    with pytest.raises(InputError, match=told):
        tt.top_down(Net(), lambda model: 1.0, X, **asked)  # type: ignore[arg-type]


def test_a_model_without_blocks() -> None:
    with pytest.raises(EditError, match="it has no block"):
        tt.top_down(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)), lambda model: 1.0, torch.zeros(1, 4))


def test_the_model_is_left_as_it_was_and_runs_in_eval_mode() -> None:
    net = Net().train()
    modes = []

    def evaluate(model: nn.Module) -> float:
        modes.append((model.training, torch.is_grad_enabled()))
        return 1.0

    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = tt.top_down(net, evaluate, X, max_steps=1)
    assert set(modes) == {(False, False)} and net.training and found.model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in net.state_dict().items())


def test_a_transformer_healed_on_data_and_drawn(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, img_size=64).eval()
    x = torch.randn(12, 3, 64, 64)
    with torch.no_grad():
        whole = model(x)
    found = tt.top_down(
        model, lambda net: -float((net(x) - whole).norm()), x, tolerance=1e3, heal="linear", data=[x], max_steps=2
    )
    assert len(found.removed) == 2 and found.model(x).shape == (12, 10)
    assert found.plot(tmp_path / "curve.png").stat().st_size > 1000
    assert found.to_dict()["removed"] == list(found.removed)
    assert [entry.edit.kind for entry in tt.history(found.model).entries] == ["remove", "remove"]


def test_the_code_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "ranking.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "ranking.md", "exec"), names)
    assert isinstance(names["small"], nn.Module) and list((tmp_path / "measured").glob("*.json"))
