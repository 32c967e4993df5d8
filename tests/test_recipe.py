"""Recipes: what they may hold, what is said of a wrong one, what a run writes, and that it can be repeated."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import yaml
from torch import nn

import torchtrim as tt
from torchtrim.errors import EditError, InputError, ModelError, RecipeError, TorchTrimError
from torchtrim.graph.inputs import Inputs
from torchtrim.models import load_model
from torchtrim.recipe.edit_forms import edits_of, short_form
from torchtrim.recipe.module_text import names_a_type, read_module, read_type
from torchtrim.recipe.new import new_recipe
from torchtrim.recipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
SMALL = [1, 3, 32, 32]
FAST = {"benchmark": False}
BASE = {"model": "timm:test_resnet", "input": SMALL, "export": None}


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def written(data: Any, name: str = "r.yaml") -> Path:
    path = Path(name)
    path.write_text(data if isinstance(data, str) else yaml.safe_dump(data), encoding="utf-8")
    return path


def same(one: nn.Module, other: nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)


def labelled(path: str, rows: int = 12) -> None:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 255, (rows, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(rows) % 3)


# What is said of a wrong recipe.


@pytest.mark.parametrize(
    ("change", "where", "says"),
    [
        ({"modle": "x"}, "modle", "'model'"),
        ({"model": {"nam": "x"}}, "model.nam", "'name'"),
        ({"model": {}}, "model.name", "needed"),
        ({"model": {"name": "x", "seed": -1}}, "model.seed", "greater"),
        ({"model": {"name": "x", "pretrained": "perhaps"}}, "model.pretrained", "boolean"),
        ({"model": ["x"]}, "model", "keys and values"),
        ({"input": [1, "three"]}, "input[0].shape[1]", "integer"),
        ({"input": {"shape": [1], "dtyp": "int64"}}, "input[0].dtyp", "'dtype'"),
        ({"input": [[1, 3], {"shape": [1], "dtype": "flaot"}]}, "input[1].dtype", "flaot"),
        ({"input": {"ids": {"shapes": [1]}}}, "input.ids.shapes", "'shape'"),
        ({"data": {"file": "a", "limit": 0}}, "data.limit", "greater"),
        ({"training": {"epochs": 3}}, "training.data", "needed"),
        ({"training": {"data": "a", "optimiser": "sgd"}}, "training.optimiser", "'optimizer'"),
        ({"training": {"data": "a", "optimizer": "adam"}}, "training.optimizer", "adamw"),
        ({"training": {"data": {"fle": "a"}}}, "training.data.fle", "'file'"),
        ({"export": {"file": "../a.onnx"}}, "export.file", "folder"),
        ({"export": {"quantise": "dynamic"}}, "export.quantise", "'quantize'"),
        ({"recipe": 2}, "recipe", "newer"),
        ({"recipe": True}, "recipe", "form"),
        ({"edits": {"cut": {"after": "layer2"}}}, "edits", "list"),
        ({"edits": [{"ctu": {"after": "layer2"}}]}, "edits[0].ctu", "'cut'"),
        ({"edits": ["cut", 3]}, "edits[0]", "cut"),
        ({"edits": [{"cut": {"after": "layer1"}}, {"cut": {"aftr": "layer2"}}]}, "edits[1].cut.aftr", "'after'"),
        ({"edits": [{"cut": {"after": 3}}]}, "edits[0].cut.after", "string"),
        ({"edits": [{"cut": "layer2"}]}, "edits[0].cut", "by name"),
        ({"edits": [{"cut": {"after": "a"}, "attach_head": {}}]}, "edits[0]", "dash"),
        ({"edits": [{"kind": "cut", "version": 99, "after": ["a"]}]}, "edits[0].version", "newer"),
        ({"edits": [{"remove": {"pats": "layer1"}}]}, "edits[0].remove.pats", "'paths'"),
        ({"edits": [{"insert": {"module": "nn.Dropot(0.1)", "after": "a"}}]}, "edits[0].insert.module", "Dropout"),
        ({"edits": [{"replace": {"waht": "a", "new": "nn.ReLU6()"}}]}, "edits[0].replace.waht", "'what'"),
        ({"head": {"num_class": 3}}, "head.num_class", "'num_classes'"),
        ({"head": {"head": "open('x')"}}, "head.heads", "open"),
    ],
)
def test_a_wrong_key_says_where_and_what_was_meant(change: dict[str, Any], where: str, says: str) -> None:
    with pytest.raises((RecipeError, EditError)) as caught:
        Recipe.from_dict({**BASE, **change})
    assert str(caught.value.path).startswith(where)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: a\nmodel: b\n", "'model' comes twice"),
        ('{"model": "a", "model": "b"}', "'model' comes twice"),
        ("model: [a\n", "neither YAML nor JSON"),
        ("model: !!python/object/apply:os.system ['true']\n", "neither YAML nor JSON"),
        ("- a\n", "sections by name"),
        ("", "sections by name"),
        ("[" * 5000, "neither YAML nor JSON"),
        ("{" * 5000, "neither YAML nor JSON"),
        ("? [a]\n: b\n", "neither YAML nor JSON"),
    ],
)
def test_a_text_that_is_no_recipe(text: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        Recipe.load(written(text))


def test_a_file_that_cannot_be_read() -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load("none.yaml")
    Path("bytes.yaml").write_bytes(b"\xff\xfe\x00model")
    with pytest.raises(RecipeError, match="cannot be read"):
        Recipe.load("bytes.yaml")


# What is read.


def test_short_forms_and_json_mean_the_same() -> None:
    short = {"model": "timm:test_resnet", "input": SMALL, "edits": [{"cut": {"after": "layer2"}}]}
    long = {
        "recipe": 1,
        "model": {"name": "timm:test_resnet"},
        "input": [{"shape": SMALL}],
        "edits": [{"kind": "cut", "version": 1, "after": ["layer2"]}],
    }
    first, second = Recipe.load(written(short)), Recipe.load(written(json.dumps(long), "r.json"))
    assert first.edits == second.edits
    assert (first.form.model, first.form.input) == (second.form.model, second.form.input)


def test_yaml_goes_there_and_back() -> None:
    recipe = Recipe.from_dict(
        {**BASE, "edits": [{"cut": {"after": {"layer2": "c3"}}}], "training": {"data": "a.npz", "lr": "1e-5"}}
    )
    again = Recipe.from_dict(yaml.safe_load(recipe.to_yaml()))
    assert again.form == recipe.form
    assert again.edits == recipe.edits
    assert again.form.training is not None
    assert again.form.training.lr == 1e-5


def test_a_merge_key_may_be_overridden() -> None:
    text = "x: &x {name: a, seed: 1}\nmodel:\n  <<: *x\n  seed: 2\n"
    with pytest.raises(RecipeError, match="no such key"):
        Recipe.load(written(text))
    assert Recipe.load(written("model: {<<: {name: a, seed: 1}, seed: 2}\n")).form.model.seed == 2


def test_healing_without_data_is_told_before_any_work() -> None:
    recipe = Recipe.from_dict({**BASE, "edits": [{"remove": {"paths": "layer3", "heal": "auto"}}]}, name="r")
    with pytest.raises(RecipeError, match=r"edits\[0\].remove.heal.*data: FILE"):
        recipe.run()
    assert recipe.run(plan=True).removed


def test_arguments_without_a_name_are_told_which() -> None:
    with pytest.raises(EditError, match=r"Try: remove: {paths: layer1.0}"):
        Recipe.from_dict({**BASE, "edits": [{"remove": "layer1.0"}]})


def test_yaml_may_begin_with_a_brace() -> None:
    recipe = Recipe.from_dict(BASE, ["head={num_classes: 7}"])
    assert recipe.form.head == {"num_classes": 7}
    assert Recipe.load(written("{model: 'timm:test_resnet', input: [1, 3, 32, 32]}")).form.model.name


def test_overrides() -> None:
    given = {**BASE, "edits": [{"cut": {"after": "layer2"}}]}
    recipe = Recipe.from_dict(
        given,
        [
            "model.pretrained=true",
            "edits[0].cut.after=layer3",
            "export.quantize=dynamic",
            "training.data=x.npz",
            "training.data.batch=4",
            "input=[1, 3, 32, 32]",
        ],
    )
    assert recipe.form.model.pretrained
    assert recipe.form.model.name == "timm:test_resnet"
    assert recipe.edits[0] == tt.Cut(("layer3",))
    assert recipe.form.export is not None
    assert recipe.form.export.quantize == "dynamic"
    assert recipe.form.training is not None
    assert (recipe.form.training.data.file, recipe.form.training.data.batch) == ("x.npz", 4)
    assert given["model"] == "timm:test_resnet"


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("model.pretraned=true", "'pretrained'"),
        ("model.pretrained", "key=value"),
        ("=3", "key=value"),
        ("edits[3].cut.after=a", "nothing to set"),
        ("edits.0.cut.after=a", "edits[0] for an item"),
        ("recipe.version=3", "nothing to set"),
        ("input[x]=3", "nothing to set"),
    ],
)
def test_a_wrong_override(override: str, says: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(says)):
        Recipe.from_dict({"recipe": 1, **BASE, "edits": [{"cut": {"after": "layer2"}}]}, [override])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("nn.Dropout(0.2)", "Dropout(p=0.2, inplace=False)"),
        ("ReLU6", "ReLU6()"),
        ("torch.nn.Conv2d(3, 8, kernel_size=(3, 1), bias=False)", "Conv2d(3, 8, kernel_size=(3, 1), stride=(1, 1), "),
        ("nn.Sequential(nn.Linear(2, 2), nn.ReLU())", "Sequential("),
        ("nn.ModuleList([nn.ReLU(), nn.ReLU()])", "ModuleList("),
        ("nn.Hardtanh(-1.0, 1e3)", "Hardtanh(min_val=-1.0, max_val=1000.0)"),
        ("timm.layers.Mlp(8, act_layer=nn.ReLU)", "Mlp("),
        ("torchvision.ops.StochasticDepth(0.1, 'row')", "StochasticDepth(p=0.1, mode=row)"),
    ],
)
def test_modules_as_text(text: str, shown: str) -> None:
    assert repr(read_module(text)).startswith(shown)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nn.Dropout(0.2",
        "os.system('true')",
        "__import__('os').system('true')",
        "nn.Module.__subclasses__()",
        "nn.init.zeros_(1)",
        "nn.functional.relu",
        "nn.modules.module.torch",
        "(lambda: nn.ReLU())()",
        "[nn.ReLU() for _ in range(3)]",
        "nn.Linear(2, 10 ** 10)",
        "nn.Linear(**{'in_features': 2})",
        "nn.Linear()",
        "nn.Dropout(2.0)",
        "nn.LazyLinear(3)",
        "timm.layers.create_conv2d(3, 3, 3)",
        "timm.models.load_checkpoint('x')",
        "torch.hub.load('a', 'b')",
        "3",
        "'nn.ReLU'",
        "nn.ReLU() if True else nn.GELU()",
        "(" * 400 + ")" * 400,
    ],
)
def test_no_other_text_is_run(text: str) -> None:
    with pytest.raises(EditError):
        read_module(text)


def test_types_as_text() -> None:
    assert read_type("nn.ReLU") is nn.ReLU
    assert [names_a_type(text) for text in ("nn.ReLU", "timm.layers.DropPath", "nn", "layer1.0", "nn.*")] == [
        True,
        True,
        False,
        False,
        False,
    ]
    with pytest.raises(EditError):
        read_type("nn.ReLU()")


# What a run does.


def test_a_run_writes_a_folder_that_repeats_it() -> None:
    data = {**BASE, "edits": [{"cut": {"after": "layer2"}}], "head": {"num_classes": 5}, "export": FAST}
    run = Recipe.load(written(data)).run()
    assert {each.name for each in Path("r").iterdir()} == {
        "net.trim",
        "model.onnx",
        "recipe.yaml",
        "report.md",
        "report.json",
    }
    assert all(path.is_file() for path in run.files.values())
    assert run.export is not None
    assert run.export.path.samefile("r/model.onnx")
    assert not list(Path().glob(".torchtrim*"))
    assert same(tt.load("r/net.trim"), run.model)
    assert [edit.kind for edit in tt.history(run.model).edits] == ["cut", "attach_head"]
    assert onnx.load("r/model.onnx").graph.output[0].type.tensor_type.shape.dim[1].dim_value == 5
    assert run.after.params < run.before.params

    told = json.loads(Path("r/report.json").read_text())
    assert told["after"]["params"] == run.after.params
    assert told["machine"]["versions"]["torch"]
    report = Path("r/report.md").read_text()
    for text in ("## What went in", "timm:test_resnet", "attach_head", "## ONNX", "onnxruntime"):
        assert text in report

    again = Recipe.load("r/recipe.yaml").run("again")
    assert same(again.model, run.model)
    assert tt.history(again.model).edits == tt.history(run.model).edits
    x = torch.randn(SMALL)
    assert torch.equal(again.model(x), run.model(x))


def test_a_plan_writes_nothing() -> None:
    planned = Recipe.from_dict({**BASE, "out": "x", "edits": [{"cut": {"after": "layer2"}}]}).run(plan=True)
    assert "layer3" in planned.removed
    assert not list(Path().iterdir())


def test_a_run_leaves_the_random_state_and_depends_on_the_seed_alone() -> None:
    data = {**BASE, "edits": [{"cut": {"after": "layer1"}}], "head": {"num_classes": 2}}
    random = torch.get_rng_state()
    first = Recipe.from_dict(data).run("a").model
    assert torch.equal(random, torch.get_rng_state())
    torch.randn(10)
    second = Recipe.from_dict(data).run("b").model
    other = Recipe.from_dict(data, ["model.seed=1"]).run("c").model
    assert same(first, second)
    assert not same(first, other)


def test_a_recipe_may_run_twice_and_start_from_a_run() -> None:
    width = load_model("timm:test_resnet").model.fc.in_features
    recipe = Recipe.from_dict({**BASE, "head": {"head": f"nn.Linear({width}, 4)"}, "edits": []})
    one, two = recipe.run("one").model, recipe.run("two").model
    assert same(one, two)
    assert one.fc is not two.fc
    data = {"model": "one/net.trim", "edits": [{"attach_head": {"num_classes": 7}}], "export": None}
    later = Recipe.load(written(data)).run("three")
    assert len(tt.history(later.model).edits) == 2
    repeated = Recipe.load("three/recipe.yaml").run("four")
    assert same(repeated.model, later.model)
    assert tt.history(repeated.model).edits == tt.history(later.model).edits


def test_all_kinds_of_edits_are_repeated_to_the_bit_without_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipenets.py").write_text(
        "from torch import nn\n"
        "def part(before, after):\n"
        "    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())\n"
        "def parts():\n"
        "    return nn.Sequential(part(3, 6), part(6, 6), part(6, 8), nn.Flatten(), nn.Linear(8 * 36, 10))\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    np.save("x.npy", np.random.default_rng(0).standard_normal((16, 3, 6, 6), dtype=np.float32))
    edits = [
        {"insert": {"module": "nn.Sequential(nn.Conv2d(6, 6, 1), nn.ReLU())", "after": "0"}},
        {"replace": {"what": "nn.ReLU", "new": "nn.Hardswish()"}},
        {"remove": {"paths": "1", "heal": "scale"}},
        {"delete_channels": {"channels": {"2.0": [0, 3]}}},
        "fuse_batchnorm",
        {"cut": {"after": "2"}},
    ]
    data = {"model": "recipenets:parts", "input": [1, 3, 6, 6], "data": {"file": "x.npy", "batch": 8}, "edits": edits}
    trusted = ["recipenets:parts"]
    run = Recipe.from_dict({**data, "head": {"num_classes": 4, "hidden": 8}, "export": None}).run("a", trusted=trusted)
    assert [edit.kind for edit in run.history.edits] == [
        *("insert", "replace", "remove", "delete_channels", "fuse_batchnorm", "cut", "attach_head")
    ]
    Path("x.npy").unlink()
    again = Recipe.load("a/recipe.yaml").run("b", trusted=trusted)
    assert same(again.model, run.model)
    assert again.history.edits == run.history.edits
    assert same(tt.load("b/net.trim", trusted=trusted), run.model)


def test_training() -> None:
    Path("data").mkdir()
    labelled("data/train.npz")
    data = {
        "model": "timm:test_resnet",
        "input": [1, 3, 32, 32],
        "edits": [{"cut": {"after": "layer2"}}],
        "head": {"num_classes": 3},
        "training": {
            "data": {"file": "data/train.npz", "batch": 4},
            "validation": "data/train.npz",
            "epochs": 2,
            "freeze_upto": "layer1",
        },
        "export": None,
    }
    Path("deep").mkdir()
    run = Recipe.load(written({**data, "out": "deep/result"})).run()
    assert run.training is not None
    assert len(run.training.epochs) == 2
    original = load_model("timm:test_resnet").model.state_dict()
    trained = run.model.state_dict()
    assert torch.equal(trained["layer1.0.conv1.weight"], original["layer1.0.conv1.weight"])
    assert not torch.equal(trained["layer2.0.conv1.weight"], original["layer2.0.conv1.weight"])
    assert same(tt.load("deep/result/net.trim"), run.model)
    assert "## Training" in Path("deep/result/report.md").read_text()
    assert json.loads(Path("deep/result/report.json").read_text())["read"]["data/train.npz"].startswith("sha256:")
    again = Recipe.load("deep/result/recipe.yaml").run("again")
    assert same(again.model, run.model)


def test_a_failed_run_leaves_nothing_and_an_old_folder_stays() -> None:
    good = {**BASE, "edits": [{"cut": {"after": "layer2"}}]}
    bad = {**BASE, "edits": [{"cut": {"after": "layer9"}}]}
    with pytest.raises(TorchTrimError, match="layer9"):
        Recipe.from_dict(bad).run("out")
    assert not list(Path().iterdir())
    Recipe.from_dict(good).run("out")
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    with pytest.raises(RecipeError, match="exists"):
        Recipe.from_dict(good).run("out")
    with pytest.raises(TorchTrimError, match="layer9"):
        Recipe.from_dict(bad).run("out", overwrite=True)
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    Recipe.from_dict({**good, "export": FAST}).run("out", overwrite=True)
    assert Path("out/model.onnx").is_file()
    Recipe.from_dict(good).run("out", overwrite=True)
    assert not Path("out/model.onnx").exists()
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_only_a_folder_of_a_run_is_replaced() -> None:
    recipe = Recipe.from_dict({**BASE, "edits": [{"cut": {"after": "layer1"}}]})
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("years")
    with pytest.raises(RecipeError, match="not a folder that a run wrote"):
        recipe.run("mine", overwrite=True)
    recipe.run("out")
    Path("out/notes.txt").write_text("mine")
    with pytest.raises(RecipeError, match="not a folder that a run wrote"):
        recipe.run("out", overwrite=True)
    Path("file").write_text("x")
    with pytest.raises(RecipeError, match="not a folder"):
        recipe.run("file", overwrite=True)
    with pytest.raises(RecipeError, match="no such folder"):
        recipe.run("no/such/place")
    with pytest.raises(RecipeError, match="where does the run write"):
        recipe.run()
    assert Path("mine/thesis.txt").read_text() == "years"


def test_code_is_imported_only_where_it_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("recipemodels.py").write_text(
        "from pathlib import Path\nfrom torch import nn\nPath('imported').touch()\n"
        "def tiny(width=4):\n    return nn.Sequential(nn.Linear(3, width), nn.ReLU(), nn.Linear(width, 2))\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    name = "recipemodels:tiny"
    recipe = Recipe.from_dict({"model": {"name": name, "arguments": {"width": 6}}, "input": [1, 3], "export": None})
    for trusted in ((), "recipemodels:tiny and more", ["recipemodels"]):
        with pytest.raises(RecipeError, match="not trusted"):
            recipe.run("out", trusted=trusted)
    assert not Path("imported").exists()
    run = recipe.run("out", trusted=[name])
    assert run.model[0].out_features == 6


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        ({"model": {"name": "timm:test_resnet", "arguments": {"checkpoint_path": "x.pt"}}}, RecipeError, "weights"),
        ({"model": "timm:test_resnt"}, ModelError, "test_resnet"),
        ({"model": "none.trim"}, TorchTrimError, "none.trim"),
        ({"model": {"name": "timm:test_resnet", "weights": "no.pt"}}, ModelError, "no.pt"),
        ({"model": "torchvision:ssdlite320_mobilenet_v3_large", "input": None}, RecipeError, "input"),
        ({"data": "none.npz"}, InputError, "none.npz"),
        ({"training": {"data": "none"}}, InputError, "no such file"),
    ],
)
def test_what_a_run_refuses(data: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=re.escape(says)):
        Recipe.from_dict({**BASE, **data}).run("out")
    assert not Path("out").exists()


# Recipes to begin with, and the documentation's.


@pytest.mark.parametrize("name", ["timm:test_vit", "timm:test_efficientnet"])
def test_a_new_recipe_runs_as_it_is_and_so_do_its_examples(name: str) -> None:
    named = load_model(name)
    assert named.input_shape is not None
    text = new_recipe(name, named.model, Inputs.of(torch.zeros(1, *named.input_shape)), file="new.yaml")
    recipe = Recipe.load(written(text, "new.yaml"), ["export.benchmark=false"])
    assert recipe.form.model.name == name
    run = recipe.run("out")
    assert same(run.model, named.model)

    examples = yaml.safe_load("\n".join(re.findall(r"^#   (- .*)$", text, re.MULTILINE)))
    for example in examples:
        if "replace" not in example:  # neither has a ReLU of its own
            Recipe.from_dict({"model": name, "edits": [example]}).run(plan=True)
    commented = re.findall(r"^# (\w+:.*(?:\n#   .*)*)", text, re.MULTILINE)
    sections = [yaml.safe_load(each.replace("\n# ", "\n")) for each in commented]
    assert {key for section in sections for key in section} == {"data", "head", "training"}
    for section in sections:
        Recipe.from_dict({"model": name, **section})


def test_the_recipes_in_the_documentation_are_right() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 3
    for block in blocks:
        Recipe.load(written(block))
    form = Recipe.load(written(blocks[0]))
    labelled("train.npz")
    labelled("val.npz")
    run = Recipe.load(written(blocks[2], "t.yaml"), ["export.benchmark=false"]).run()
    assert run.training is not None
    assert len(form.run(plan=True).steps) == 4


def test_the_schema_knows_every_section_and_edit() -> None:
    schema = Recipe.json_schema()
    json.dumps(schema)
    assert set(schema["properties"]) == set(Recipe.from_dict(BASE).form.model_fields_set) | {
        "recipe",
        "data",
        "edits",
        "head",
        "training",
        "out",
    }
    short = [next(iter(form["properties"])) for form in schema["properties"]["edits"]["items"]["anyOf"][:3]]
    assert len(set(short)) == 3
    references = set(re.findall(r'"#/\$defs/(\w+)"', json.dumps(schema)))
    assert references <= set(schema["$defs"])


def test_edits_take_the_python_names() -> None:
    found = edits_of([{"attach_head": {"head": {"fc": "nn.Linear(4, 2)"}, "hidden": 8}}])
    assert isinstance(found[0], tt.AttachHead)
    assert found[0].hidden == (8,)
    assert list(found[0].heads) == ["fc"]


def test_a_short_record_is_read_as_the_whole_one() -> None:
    items = [
        {"cut": {"after": {"a": "b"}}},
        {"attach_head": {"num_classes": 3, "pool": None, "hidden": [4, 5]}},
        {"insert": {"module": "nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))", "before": "a"}},
        {"replace": {"what": ["nn.ReLU", "a.*"], "new": "nn.Conv2d(2, 4, 3)"}},
        {"remove": {"paths": ["a", "b:add"], "adapter": {"a": "nn.Conv2d(2, 2, 1)"}}},
        {"remove": {"paths": "a", "adapter": None}},
    ]
    for edit in edits_of(items):
        short = short_form(edit)
        assert edits_of([yaml.safe_load(yaml.safe_dump(short, sort_keys=False))]) == [edit]
        assert len(str(short)) < len(str(edit.to_dict()))
