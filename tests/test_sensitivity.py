"""`sensitivity`: what is measured is right, is found again by its content, and is shared by processes."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import torchtrim as tt
from torchtrim.errors import InputError
from torchtrim.graph.inputs import Inputs
from torchtrim.search.measured import Measured, content_of
from torchtrim.search.rounded import rounded_to_int8


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.unit = nn.Sequential(nn.Conv2d(16, 16, 3, padding=1))
        self.fc = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.fc((x + self.unit(x)).mean((2, 3)))


X = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def likeness(net: nn.Module) -> Callable[[nn.Module], float]:
    with torch.no_grad():
        whole = net.eval()(X)
    return lambda model: 1 - float((model(X) - whole).norm() / whole.norm())


def test_each_point_is_what_the_edit_by_hand_gives() -> None:
    net = Net().eval()
    evaluate = likeness(net)
    found = tt.sensitivity(net, [X], evaluate, X, kinds=("prune", "sparsify"), ratios=(0.25, 0.5), layers=["stem"])
    assert [(point.kind, point.ratio) for point in found.points] == [
        ("prune", 0.25),
        ("prune", 0.5),
        ("sparsify", 0.25),
        ("sparsify", 0.5),
    ]
    with torch.no_grad():
        pruned = evaluate(tt.prune_channels(net, X, {"stem": 0.5}).eval())
        sparse = evaluate(tt.sparsify(net, X, {"stem": 0.5}, include=["stem"]).eval())
    assert found.points[1].score == pytest.approx(pruned) and found.points[3].score == pytest.approx(sparse)
    assert found.points[1].drop == pytest.approx(found.baseline - pruned)
    assert found.curve("stem") == [(0.0, found.baseline), (0.25, found.points[0].score), (0.5, found.points[1].score)]


def test_blocks_and_int8() -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_resnet", num_classes=10).eval()
    x = torch.randn(16, 3, 32, 32)
    found = tt.sensitivity(net, [x], lambda model: float(model(x).norm()), x, kinds=("remove", "int8"))
    scores = {(point.kind, point.path): point.score for point in found.points}
    assert ("int8", "conv1") in scores or ("int8", "conv1.0") in scores
    block = next(path for kind, path in scores if kind == "remove")
    with torch.no_grad():
        assert scores["remove", block] == pytest.approx(float(tt.remove(net, x, [block])(x).norm()))
    assert all(score is not None for score in scores.values())


def test_rounding_is_to_8_bits_and_near() -> None:
    net = Net().eval()
    rounded = rounded_to_int8(net, "stem", Inputs.of(X), [X])
    weights = rounded.stem.weight.detach().flatten(1)  # type: ignore[union-attr, operator]
    for row in weights:
        steps = row / (row.abs().max() / 127)
        assert torch.allclose(steps, steps.round(), atol=1e-3)
    with torch.no_grad():
        a, b = net(X), rounded(X)
    assert 0 < float((a - b).norm() / a.norm()) < 0.05
    assert not torch.equal(net.stem.weight, rounded.stem.weight)  # type: ignore[arg-type, union-attr]


def test_what_was_measured_is_found_again(tmp_path: Path) -> None:
    net, calls = Net().eval(), []
    evaluate = likeness(net)

    def counted(model: nn.Module) -> float:
        calls.append(1)
        return evaluate(model)

    def measure(model: nn.Module = net, data: torch.Tensor = X, **asked: object) -> tt.Sensitivity:
        calls.clear()
        return tt.sensitivity(model, [data], counted, X, ratios=(0.5,), cache=tmp_path, **asked)  # type: ignore[arg-type]

    first = measure()
    assert first.fresh == 3 and len(calls) == 4  # of the head no channel can go
    again = measure()
    assert again.points == first.points and again.fresh == 0 and calls == []
    measure(layers=["stem"], importance="l1")
    assert len(calls) == 1  # the untouched model is known, another criterion is not
    other = Net().eval()
    other.fc.bias.data[0] += 1
    measure(other)
    assert len(calls) == 4
    measure(data=X + 1)
    assert len(calls) == 4
    measure(name="another way to evaluate")
    assert len(calls) == 4
    kept = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert {each.get("path") for each in kept} >= {"stem", "unit.0", "fc"} and not list(tmp_path.glob("*.claim"))


def test_a_run_that_was_stopped_goes_on(tmp_path: Path) -> None:
    net = Net().eval()
    evaluate, left = likeness(net), iter(range(4))

    def stops(model: nn.Module) -> float:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return evaluate(model)

    with pytest.raises(KeyboardInterrupt):
        tt.sensitivity(net, [X], stops, X, ratios=(0.25, 0.5), cache=tmp_path)
    assert not list(tmp_path.glob("*.claim"))
    found = tt.sensitivity(net, [X], evaluate, X, ratios=(0.25, 0.5), cache=tmp_path)
    assert found.fresh == len(found.points) - 2
    assert found.points == tt.sensitivity(net, [X], evaluate, X, ratios=(0.25, 0.5)).points


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path: Path) -> None:
    script = tmp_path / "measure.py"
    script.write_text(
        textwrap.dedent(f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        import torchtrim as tt
        from test_sensitivity import Net, X, likeness
        net = Net().eval()
        evaluate = likeness(net)
        def slow(model):
            time.sleep(0.3)
            return evaluate(model)
        found = tt.sensitivity(net, [X], slow, X, ratios=(0.25, 0.5, 0.75), cache={str(tmp_path / "kept")!r})
        print(found.fresh)
        """)
    )
    running = [subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    fresh = [int(process.communicate(timeout=120)[0]) for process in running]
    assert sum(fresh) == 9  # nothing twice, nothing left out
    net = Net().eval()
    found = tt.sensitivity(net, [X], likeness(net), X, ratios=(0.25, 0.5, 0.75), cache=tmp_path / "kept")
    assert found.fresh == 0 and all(point.score is not None for point in found.points if not point.why)


def test_a_damaged_file_is_measured_anew(tmp_path: Path) -> None:
    kept = Measured(tmp_path)
    kept.keep("a", 1.5, {})
    (tmp_path / "a.json").write_text("{")
    assert Measured(tmp_path).find("a") is None
    assert Measured(tmp_path).of("a", {}, lambda: 2.5) == 2.5


def test_content_is_told_apart() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.load_state_dict(one.state_dict())
    assert content_of(one) == content_of(other)
    other.weight.data[0, 0] += 1e-6
    assert content_of(one) != content_of(other)
    assert content_of(nn.Sequential(nn.ReLU())) != content_of(nn.Sequential(nn.GELU()))


def test_what_a_layer_can_lose(tmp_path: Path) -> None:
    net = Net().eval()
    found = tt.sensitivity(net, [X], likeness(net), X, ratios=(0.25, 0.5, 0.75), recalibrate=True)
    allowed = found.most("prune", 10.0)
    assert allowed["stem"] == 0.75 and set(allowed) == {"stem", "unit.0", "fc"}
    assert found.most("prune", -10.0)["stem"] == 0.0
    assert found.plot(tmp_path / "curves.png").stat().st_size > 1000
    assert "stem" in str(found) and found.to_dict()["baseline"] == found.baseline


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"kinds": ("prine",)}, "prune, sparsify, remove, int8"),
        ({"kinds": "prune"}, "a list"),
        ({"ratios": (1.0,)}, "between 0 and 1"),
        ({"data": []}, "no data"),
        ({"evaluate": lambda model: math.nan}, "NaN for the untouched model"),
    ],
)
def test_bad_input(asked: dict[str, object], told: str) -> None:
    given = {"data": [X], "evaluate": lambda model: 1.0, "example_inputs": X, **asked}
    with pytest.raises(InputError, match=told):
        tt.sensitivity(Net(), **given)  # type: ignore[arg-type]


def test_a_score_that_is_no_number_is_said() -> None:
    net = Net().eval()
    values = iter([1.0, 1.0])
    found = tt.sensitivity(net, [X], lambda model: next(values, math.nan), X, ratios=(0.5,), layers=["stem"])
    assert found.points[0].score is None and "NaN" in found.points[0].why
