"""Pruning from the shell and from recipes, and to a latency that is measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from typer.testing import CliRunner, Result

import torchtrim as tt
from torchtrim.cli import app
from torchtrim.recipe.recipe import Recipe
from torchtrim.search import prune_latency

ROOT = Path(__file__).parent.parent
NAME, SMALL = "timm:test_resnet", "1,3,64,64"
EXPORTED = {"benchmark": False}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(*args: object) -> Result:
    return CliRunner().invoke(app, ["prune", *map(str, args)])


def pruned(path: str) -> tt.PruneChannels:
    (edit,) = tt.history(tt.load(path)).edits
    assert isinstance(edit, tt.PruneChannels)
    return edit


def test_to_a_budget_of_macs() -> None:
    answer = run(NAME, "--macs", 0.5, "--input", SMALL, "--out", "net.trim", "--json")
    assert answer.exit_code == 0, answer.output
    whole = tt.summary(tt.load_model(NAME).model, torch.zeros(1, 3, 64, 64)).macs
    assert 0.4 * whole < json.loads(answer.stdout)["macs"] <= 0.5 * whole
    assert "asked for macs=0.5" in answer.stderr
    assert pruned("net.trim").budget == tt.Budget(macs=0.5)


def test_by_paths_and_with_every_option() -> None:
    options = ["--importance", "random:3", "--scope", "uniform", "--round-to", 4, "--min-channels", 20]
    options += ["--max-ratio", 0.6, "--protect", "layer2.*", "--protect", "layer4.0.conv2"]
    ratios = ["--ratio", "layer3.*=0.5", "--ratio", "layer1.0.conv1=0.25", "--ratio", "layer4*=0.9"]
    answer = run(NAME, *ratios, *options, "--input", SMALL, "--out", "net.trim")
    assert answer.exit_code == 0, answer.output
    edit = pruned("net.trim")
    assert edit.ratio == {"layer3.*": 0.5, "layer1.0.conv1": 0.25, "layer4*": 0.9}
    assert (edit.importance, edit.round_to, edit.min_channels, edit.max_ratio) == ("random:3", 4, 20, 0.6)
    assert edit.protect == ("layer2.*", "layer4.0.conv2")
    net = tt.load("net.trim")
    widths = {path: module.out_channels for path, module in net.named_modules() if isinstance(module, nn.Conv2d)}
    assert widths["layer1.0.conv1"] == 24 and widths["layer2.0.conv1"] == 48 and widths["layer4.0.conv2"] == 96
    assert widths["layer4.0.conv1"] == 40  # not 96 * 0.1


def test_by_thresholds_of_the_score() -> None:
    answer = run(NAME, "--threshold", "layer3.*=1.0", "--input", SMALL, "--out", "net.trim")
    assert answer.exit_code == 0, answer.output
    edit = pruned("net.trim")
    assert edit.thresholds == {"layer3.*": 1.0} and edit.pruned is not None
    narrower = {group.name for group in edit.pruned.groups if group.after < group.before}
    assert narrower and all(name.startswith("layer3.") for name in narrower)


def test_an_onnx_file_of_the_pruned_model() -> None:
    answer = run(NAME, "--ratio", 0.5, "--input", SMALL, "--out", "net.onnx", "--json")
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["verification"]["passed"]


def test_the_plan_says_each_group_and_writes_nothing(tmp_path: Path) -> None:
    answer = run(NAME, "--ratio", 0.5, "--input", SMALL, "--plan", "--json")
    assert answer.exit_code == 0, answer.output
    (step,) = json.loads(answer.stdout)["steps"]
    joints = {joint["address"]: joint for joint in step["joints"]}
    assert joints["layer2.0.conv1"]["before"] == [48] and joints["layer2.0.conv1"]["after"] == [24]
    assert "layer2.0.bn1" in joints["layer2.0.conv1"]["how"]
    assert not list(tmp_path.iterdir())


def test_importances_that_need_data() -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (12, 64, 64, 3), dtype=np.uint8)
    np.savez("few.npz", images=images, labels=np.arange(12))
    for name in ("taylor", "apoz"):
        asked = [NAME, "--ratio", 0.3, "--importance", name, "--input", SMALL, "--out", f"{name}.trim"]
        refused = run(*asked)
        assert refused.exit_code == 2 and f"{name} looks at data" in refused.output
        answer = run(*asked, "--data", "few.npz")
        assert answer.exit_code == 0, answer.output
        assert pruned(f"{name}.trim").importance == name
    assert pruned("taylor.trim").narrowed != pruned("apoz.trim").narrowed


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "one of these says how much"),
        (["--ratio", 0.5, "--macs", 0.5], "one of these says how much"),
        (["--ratio", 0.5, "--threshold", "layer3*=0.1"], "one of these says how much"),
        (["--ratio", "half"], "not a number"),
        (["--ratio", 0.5, "--ratio", "layer3.*=0.5"], "a path or glob and a number"),
        (["--ratio", "=0.5"], "a path or glob and a number"),
        (["--ratio", 0.5, "--reconstruct"], "--data"),
        (["--ratio", 0.5, "--importance", "taylor"], "taylor looks at data"),
        (["--ratio", 0.5], "--out"),
    ],
)
def test_wrong_usage_is_told_before_any_work(options: list[Any], says: str) -> None:
    out = [] if says == "--out" else ["--out", "net.trim"]
    answer = run("timm:no_such_model", *options, *out)
    assert answer.exit_code == 2
    assert says in " ".join(re.sub(r"[│╭╮╰╯─]", " ", answer.output).split())


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--ratio", 1.5], "torchtrim: ratio: the fraction"),
        (["--ratio", 0.5, "--max-ratio", 2], "torchtrim: max_ratio: the fraction"),
        (["--macs", -1], "above zero"),
        (["--ratio", "layer9.*=0.5"], "fits 'layer9"),
        (["--ratio", 0.5, "--importance", "magnitud"], "'magnitude'"),
        (["--ratio", 0.5, "--scope", "everywhere"], "isomorphic"),
    ],
)
def test_what_cannot_be_is_explained(options: list[Any], says: str) -> None:
    answer = run(NAME, *options, "--input", SMALL, "--out", "net.trim")
    assert answer.exit_code == 1
    assert says in answer.output and not Path("net.trim").exists()


# Recipes.


def recipe(edit: Any, **more: Any) -> Recipe:
    data = {"model": NAME, "input": [1, 3, 64, 64], "export": None, "edits": [{"prune_channels": edit}], **more}
    return Recipe.from_dict(yaml.safe_load(yaml.safe_dump(data)))


def test_a_recipe_prunes_and_can_be_repeated() -> None:
    found = recipe({"budget": {"macs": 0.5}, "scope": "global", "protect": "layer4.*"}).run("out")
    (edit,) = found.history.edits
    assert isinstance(edit, tt.PruneChannels) and edit.protect == ("layer4.*",)
    assert found.after.macs <= 0.5 * found.before.macs
    again = Recipe.load("out/recipe.yaml").run("again")
    first, second = found.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first | second)


def test_a_recipe_asks_for_data_before_any_work() -> None:
    for edit in ({"ratio": 0.5, "importance": "taylor"}, {"ratio": 0.5, "reconstruct": True}):
        with pytest.raises(tt.RecipeError, match="names none"):
            recipe(edit).run("out")
    assert not Path("out").exists()


def test_a_recipe_with_wrong_values_says_where() -> None:
    for edit, where in (
        ({"budget": {"mcas": 0.5}}, "mcas"),
        ({"ratio": 2}, "edits[0]"),
        ({"ratio": 0.5, "scope": "everywhere"}, "scope"),
    ):
        with pytest.raises(tt.EditError) as told:
            recipe(edit)
        assert where in str(told.value)


# To a latency.


class Wide(nn.Sequential):
    """Convolutions whose latency is theirs alone."""

    def __init__(self) -> None:
        layers = [nn.Conv2d(3, 96, 3, padding=1), nn.ReLU()]
        for _ in range(4):
            layers += [nn.Conv2d(96, 96, 3, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prune_latency, "_SECONDS", 0.3)


def latency(model: nn.Module, x: torch.Tensor) -> float:
    path = tt.export_onnx(model, x, "whole.onnx", benchmark=False, overwrite=True).path
    return tt.benchmark(path, x, seconds=0.3).median_ms


@pytest.mark.usefixtures("_short")
@pytest.mark.slow
def test_a_latency_is_measured_on_the_file_and_kept() -> None:
    torch.manual_seed(0)
    model, x = Wide().eval(), torch.randn(1, 3, 16, 16)
    limit = 0.5 * latency(model, x)
    net = tt.prune_channels(model, x, budget=tt.Budget(latency_ms=limit))
    (entry,) = tt.history(net).entries
    assert isinstance(entry.edit, tt.PruneChannels) and entry.edit.budget == tt.Budget(latency_ms=limit)
    assert entry.notes[0].startswith("latency ") and "ms were asked for" in entry.notes[0]
    whole = tt.export_onnx(model, x, "whole.onnx", benchmark=False, overwrite=True).path
    small = tt.export_onnx(net, x, "small.onnx", benchmark=False).path
    assert tt.benchmark({"whole": whole, "small": small}, x, seconds=0.5)["small"].ratio < 0.75
    again = tt.apply(model, None, tt.history(net))  # nothing is measured again
    assert torch.equal(again(x), net(x)) and tt.history(again).entries[0].notes == entry.notes


@pytest.mark.usefixtures("_short")
def test_a_latency_out_of_reach_gives_the_fastest_and_says_so() -> None:
    model, x = Wide().eval(), torch.randn(1, 3, 8, 8)
    with pytest.warns(tt.TorchTrimWarning, match="latency_ms=1e-05 is not reached"):
        net = tt.prune_channels(model, x, budget=tt.Budget(latency_ms=1e-5), max_ratio=0.5)
    assert 48 <= net.get_submodule("0").out_channels < 96
    # Which of the small ones is the fastest is for a busy machine to say.
    note = tt.history(net).entries[0].notes[0]
    assert "the smallest that there is" in note or "the fastest of those tried" in note


@pytest.mark.usefixtures("_short")
@pytest.mark.slow
def test_a_latency_that_is_kept_already_takes_nothing_out() -> None:
    model, x = Wide().eval(), torch.randn(1, 3, 8, 8)
    net = tt.prune_channels(model, x, budget=tt.Budget(latency_ms=1e4))
    assert net.get_submodule("0").out_channels == 96
    both = tt.prune_channels(model, x, budget=tt.Budget(latency_ms=1e4, macs=0.5))
    assert tt.summary(both, x).macs <= 0.5 * tt.summary(model, x).macs


@pytest.mark.usefixtures("_short")
@pytest.mark.slow
def test_a_recipe_measures_too() -> None:
    found = recipe({"budget": {"latency_ms": 1e4, "macs": 0.5}}, head={"num_classes": 3}).run("out")
    edit, head = found.history.edits
    assert isinstance(edit, tt.PruneChannels) and edit.budget == tt.Budget(latency_ms=1e4, macs=0.5)
    assert head.kind == "attach_head"
    assert found.plan.steps[0].macs[1] <= 0.5 * found.before.macs


def test_a_record_alone_cannot_measure() -> None:
    with pytest.raises(tt.EditError, match="measured"):
        tt.apply(Wide(), torch.randn(1, 3, 8, 8), tt.PruneChannels(budget=tt.Budget(latency_ms=1)))


@pytest.mark.usefixtures("_short")
@pytest.mark.slow
def test_the_code_in_the_guide_runs() -> None:
    text = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 10
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "pruning.md", "exec"), names)
    assert Path("pruned.onnx").is_file() and Path("pruned.trim").is_file()
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        Recipe.from_dict({"model": NAME, "edits": yaml.safe_load(block)})
