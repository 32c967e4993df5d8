"""The command line: what it prints, what it writes, and the exit codes it ends with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from typer.testing import CliRunner, Result

import torchtrim
from torchtrim.cli import app
from torchtrim.errors import PathError
from torchtrim.models import load_model

Run = Callable[..., Result]
SMALL = "1,3,64,64"
OWN_MODEL = """
import torch
from torch import nn

def tiny():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))

def deep():
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 3)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(6 * 4 * 4, 5))

class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 4)
        self.fc = nn.Linear(4, 3)

    def forward(self, ids, scale):
        return self.fc(self.embed(ids).mean(1)) * scale

class Keyed(nn.Module):
    def forward(self, x):
        return {}["no such key"]

class Dependent(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def broken():
    raise ValueError("no such setting")
"""


@pytest.fixture
def run() -> Run:
    def call(*args: object) -> Result:
        return CliRunner().invoke(app, [str(arg) for arg in args])

    return call


@pytest.fixture
def own_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with a module of models that is not installed."""
    (tmp_path / "ownmodels.py").write_text(OWN_MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "ownmodels", raising=False)
    return tmp_path


def answer(result: Result) -> Any:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_help_names_the_commands_and_exit_codes(run: Run) -> None:
    result = run("--help")
    assert result.exit_code == 0
    for text in ("inspect", "cut", "export", "verify", "bench", "demo", "remove", "run", "recipe", "Exit codes"):
        assert text in result.stdout


def test_help_does_not_import_torch() -> None:
    code = (
        "import sys, torchtrim, torchtrim.cli\n"
        "torchtrim.cli.app(['cut', '--help'], standalone_mode=False)\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'onnx', 'timm')))"
    )
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_python_dash_m_gives_the_version_and_exit_codes() -> None:
    def shell(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-m", "torchtrim", *args], capture_output=True, text=True, check=False)

    assert shell("--version").stdout.startswith("torchtrim 0.")
    assert shell("inspect").returncode == 2
    wrong = shell("inspect", "resnet18")
    assert wrong.returncode == 1
    assert wrong.stderr.strip().splitlines() == [
        "torchtrim: resnet18: not the name of a model (expected: timm:NAME, torchvision:NAME, "
        "package.module:function or a .trim file). Try: timm:resnet18"
    ]


def test_inspect_counts_the_parameters(run: Run) -> None:
    model = load_model("timm:test_resnet").model
    told = answer(run("inspect", "timm:test_resnet", "--json"))
    assert sum(p.numel() for p in model.parameters()) in told.values()
    shown = run("inspect", "timm:test_resnet", "--depth", 1)
    assert shown.exit_code == 0
    assert "layer1" in shown.stdout
    assert "layer1.0.conv1" not in shown.stdout


def test_inspect_a_model_of_ones_own_with_two_inputs(run: Run, own_models: Path) -> None:
    result = run("inspect", "ownmodels:Ids", "--input", "2,7:int64", "--input", "2,1")
    assert result.exit_code == 0, result.output
    assert "embed" in result.stdout


def test_cut_writes_an_onnx_file(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    args = ("cut", "timm:test_resnet", "--after", "layer2", "--num-classes", 7, "--input", SMALL, "--out", out)
    told = answer(run(*args, "--json"))
    assert "summary" in told
    graph = onnx.load(out).graph
    assert [size.dim_value for size in graph.output[0].type.tensor_type.shape.dim][1:] == [7]

    before = out.read_bytes()
    again = run(*args)
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert out.read_bytes() == before
    assert run(*args, "--overwrite").exit_code == 0


def test_cut_writes_a_state_dict_with_the_original_keys(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "net.pt"
    result = run("cut", "timm:test_resnet", "--after", "layer2", "--out", out)
    assert result.exit_code == 0, result.output
    kept = torch.load(out, weights_only=True)
    original = load_model("timm:test_resnet").model.state_dict()
    assert kept
    assert set(kept) < set(original)
    assert all(torch.equal(tensor, original[name]) for name, tensor in kept.items())
    assert not any(name.startswith("layer3") for name in kept)


def test_export_then_verify_then_disagree(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "net.onnx"
    result = run("export", "timm:test_resnet", out, "--input", SMALL)
    assert result.exit_code == 0, result.output
    same = run("verify", out, "timm:test_resnet", "--input", SMALL)
    assert same.exit_code == 0, result.output
    other_weights = run("verify", out, "timm:test_resnet", "--input", SMALL, "--seed", 1, "--json")
    assert other_weights.exit_code == 3
    assert json.loads(other_weights.stdout)["error"]["type"] == "VerificationFailed"
    debugged = run("verify", out, "timm:test_resnet", "--input", SMALL, "--seed", 1, "--debug")
    assert debugged.exit_code == 3
    assert "Traceback" in debugged.stderr


def test_errors_on_standard_error_are_one_line_in_a_process_too(own_models: Path) -> None:
    """The loggers of torch write to standard error by themselves."""
    command = [sys.executable, "-m", "torchtrim", "export", "ownmodels:Dependent", "a.onnx", "--input", "1,3"]
    environment = {**os.environ, "PYTHONPATH": str(Path(torchtrim.__file__).parents[1])}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    (line,) = result.stderr.strip().splitlines()
    assert "cannot be turned into ONNX" in line


def test_wrong_usage_is_told_before_any_work(run: Run, own_models: Path) -> None:
    for args in (
        ("export", "ownmodels:tiny", "net.pt", "--input", "1,3,8,8"),
        ("inspect", "ownmodels:tiny", "--input", "1,3,8,8", "--seed", 10**22),
        ("inspect", "ownmodels:tiny", "--input", "1,3,8,8", "--seed", -1),
    ):
        result = run(*args)
        assert result.exit_code == 2, result.output
    assert not Path("net.pt").exists()


def test_cut_touches_no_other_file(run: Run, own_models: Path) -> None:
    Path("net.pt.part").write_text("mine")
    result = run("cut", "ownmodels:tiny", "--after", "1", "--input", "1,3,8,8", "--out", "net.pt")
    assert result.exit_code == 0, result.output
    assert Path("net.pt.part").read_text() == "mine"
    assert sorted(path.name for path in Path().iterdir() if path.suffix != "") == [
        "net.pt",
        "net.pt.part",
        "ownmodels.py",
    ]


def test_shell_completion_offers_the_commands() -> None:
    environment = {**os.environ, "_TORCHTRIM_COMPLETE": "complete_bash", "COMP_WORDS": "torchtrim ", "COMP_CWORD": "1"}
    command = [sys.executable, "-c", "from torchtrim.cli import main; main()"]
    offered = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    commands = {"inspect", "cut", "export", "verify", "bench", "demo", "remove", "insert", "replace", "plan", "history"}
    assert commands | {"run", "recipe", "explain"} <= set(offered.split())


def test_export_dynamic_is_smaller(run: Run, tmp_path: Path) -> None:
    for name, options in (("fp32", ()), ("int8", ("--quantize", "dynamic"))):
        result = run("export", "timm:test_vit", tmp_path / f"{name}.onnx", *options)
        assert result.exit_code == 0, result.output
    assert (tmp_path / "int8.onnx").stat().st_size < 0.6 * (tmp_path / "fp32.onnx").stat().st_size


def test_weights_from_a_file(run: Run, own_models: Path) -> None:
    torch.manual_seed(5)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 6 * 6, 5))
    torch.save(net.state_dict(), "net.pt")
    torch.save({"other": torch.zeros(1)}, "other.pt")
    model = ("ownmodels:tiny", "--input", "1,3,8,8")
    assert run("export", *model, "net.onnx", "--weights", "net.pt").exit_code == 0
    assert run("verify", "net.onnx", *model, "--weights", "net.pt").exit_code == 0
    assert run("verify", "net.onnx", *model).exit_code == 3
    wrong = run("inspect", *model, "--weights", "other.pt")
    assert wrong.exit_code == 1
    assert "does not hold weights of this model" in wrong.stderr


def test_bench_times_models_and_files_side_by_side(run: Run, own_models: Path) -> None:
    assert run("export", "ownmodels:tiny", "net.onnx", "--input", "1,3,8,8").exit_code == 0
    timing = ("--seconds", 0.05, "--threads", 1)
    told = answer(run("bench", "ownmodels:tiny", "net.onnx", "--input", "1,3,8,8", *timing, "--json"))
    assert [row["kind"] for row in told["timings"]] == ["pytorch", "onnxruntime"]
    assert all(row["median_ms"] > 0 for row in told["timings"])
    alone = run("bench", "net.onnx", *timing)
    assert alone.exit_code == 0
    assert "net.onnx" in alone.stdout
    assert "resident MB" in run("bench", "net.onnx", *timing, "--memory").stdout
    grid = ("--batch", 1, "--batch", 2, "--provider", "cpu", "--provider", "CPUExecutionProvider", "--plot", "net.png")
    told = answer(run("bench", "net.onnx", *timing, *grid, "--json"))
    assert [(row["name"], row["batch"]) for row in told["timings"]] == [
        (f"net.onnx ({provider})", batch) for batch in (1, 2) for provider in ("cpu", "CPUExecutionProvider")
    ]
    assert Path("net.png").stat().st_size > 1000


def test_bench_opens_files_as_often_as_it_is_told(run: Run, own_models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("export", "ownmodels:tiny", "net.onnx", "--input", "1,3,8,8").exit_code == 0
    opened: list[int] = []
    real = onnxruntime.InferenceSession

    def counted(*args: Any, **options: Any) -> Any:
        opened[-1] += 1
        return real(*args, **options)

    monkeypatch.setattr(onnxruntime, "InferenceSession", counted)
    for openings in (1, 4):
        opened.append(0)
        assert run("bench", "net.onnx", "--seconds", 0.05, "--openings", openings).exit_code == 0
    assert opened[1] - opened[0] == 3


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("inspect", "timm:test_resnt"), "test_resnet"),
        (("inspect", "torchvision:resnet81"), "resnet18"),
        (("inspect", "net.trim"), "net.trim"),
        (("inspect", "nosuchmodule:net"), "could not be imported"),
        (("inspect", "ownmodels:tinny"), "'tiny'"),
        (("inspect", "ownmodels:broken"), "no such setting"),
        (("inspect", "ownmodels:tiny"), "--input 1,3,224,224"),
        (("inspect", "ownmodels:tiny", "--pretrained"), "takes no pretrained argument"),
        (("inspect", "ownmodels:tiny", "--input", "1,3,x"), "not a shape"),
        (("inspect", "ownmodels:tiny", "--input", "1,3,8,8:Tensor"), "not a shape"),
        (("inspect", "ownmodels:tiny", "--input", "1,4,8,8"), "[1, 4, 8, 8]"),
        (("cut", "timm:test_resnet", "--after", "layer9", "--out", "a.onnx"), "layer"),
        (("cut", "timm:test_resnet", "--after", "layer1", "--out", "a.txt"), ".trim, .onnx or .pt"),
        (("cut", "timm:test_resnet", "--after", "layer1", "--out", "no/folder/a.onnx"), "no such folder"),
        (("export", "timm:test_resnet", "a.onnx", "--target", "tpu"), "tpu"),
        (("export", "timm:test_vit", "a.onnx", "--input", "1,3,100,100"), "[1, 3, 100, 100]"),
        (("bench", "timm:test_vit", "--input", "1,3,100,100"), "[1, 3, 100, 100]"),
        (("export", "ownmodels:Keyed", "a.onnx", "--input", "1,3"), "no such key"),
        (("export", "ownmodels:Dependent", "a.onnx", "--input", "1,3"), "cannot be turned into ONNX"),
        (("export", "timm:test_resnet", "a.onnx", "--quantize", "int3"), "int3"),
        (("verify", "missing.onnx", "timm:test_resnet"), "missing.onnx"),
        (("bench", "missing.onnx"), "missing.onnx"),
    ],
)
def test_errors_are_one_line(run: Run, own_models: Path, args: tuple[str, ...], says: str) -> None:
    result = run(*args)
    assert result.exit_code == 1, result.output
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("torchtrim: ")
    assert says in line
    assert not Path("a.onnx").exists()
    told = json.loads(run(*args, "--json").stdout)["error"]
    assert set(told) == {"type", "message", "path", "found", "expected", "hint"}


TINY = ("ownmodels:deep", "--input", "1,3,8,8")


def test_remove_writes_each_format_and_a_file_is_a_model(run: Run, own_models: Path) -> None:
    for name in ("net.trim", "net.onnx", "net.pt"):
        told = answer(run("remove", *TINY, "2", "--out", name, "--json"))
        told = told.get("summary", told)
        assert "2" not in {row["path"] for row in told["rows"]}
        assert Path(name).is_file()
    read = answer(run("inspect", "net.trim", "--trust", "ownmodels:deep", "--json"))
    assert "2" not in {row["path"] for row in read["rows"]}
    assert run("verify", "net.onnx", "net.trim", "--trust", "ownmodels:deep").exit_code == 0
    assert run("export", "net.trim", "again.onnx", "--trust", "ownmodels:deep").exit_code == 0
    refused = run("inspect", "net.trim")
    assert refused.exit_code == 1
    assert "trusted" in refused.stderr


def test_edits_one_after_the_other_and_their_history(run: Run, own_models: Path) -> None:
    trust = ("--trust", "ownmodels:deep")
    assert run("insert", *TINY, "nn.Dropout(0.2)", "--after", "1", "--out", "a.trim").exit_code == 0
    assert run("replace", "a.trim", "ReLU", "nn.ReLU6()", "--out", "b.trim", *trust).exit_code == 0
    assert run("cut", "b.trim", "--after", "4", "--out", "c.trim", *trust).exit_code == 0
    net = tt_load("c.trim")
    assert [type(module).__name__ for module in net] == ["Conv2d", "ReLU6", "Dropout", "Conv2d", "ReLU6", "Conv2d"]
    shown = run("history", "c.trim")
    assert shown.exit_code == 0, shown.output
    assert all(kind in shown.stdout for kind in ("insert", "replace", "cut"))
    told = answer(run("history", "c.trim", "--json"))
    assert [entry["edit"]["kind"] for entry in told["entries"]] == ["insert", "replace", "cut"]

    records = run("history", "c.trim", "--edits")
    Path("edits.yaml").write_text(records.stdout)
    planned = answer(run("plan", *TINY, "edits.yaml", "--json"))
    assert len(planned["steps"]) == 3
    Path("r.yaml").write_text("model: ownmodels:deep\ninput: [1, 3, 8, 8]\nexport: null\nedits:\n" + records.stdout)
    done = run("run", "r.yaml", "--out", "done", *trust)
    assert done.exit_code == 0, done.output
    assert all(map(torch.equal, tt_load("done/net.trim").state_dict().values(), net.state_dict().values()))


def tt_load(path: str) -> Any:
    return torchtrim.load(path, trusted=["ownmodels:deep"])


def test_plan_says_what_would_be_done_and_writes_nothing(run: Run, own_models: Path) -> None:
    before = sorted(Path().iterdir())
    for args in (
        ("remove", *TINY, "2", "--plan"),
        ("insert", *TINY, "nn.ReLU()", "--before", "2", "--plan"),
        ("replace", *TINY, "nn.ReLU", "nn.GELU()", "--plan"),
    ):
        result = run(*args)
        assert result.exit_code == 0, result.output
        assert "Plan for Sequential" in result.stdout
        assert answer(run(*args, "--json"))["steps"][0]["edit"]["kind"] == args[0]
    assert [path for path in sorted(Path().iterdir()) if path.name != "__pycache__"] == [
        path for path in before if path.name != "__pycache__"
    ]


def test_remove_with_an_adapter_and_healing(run: Run, own_models: Path) -> None:
    import numpy as np

    np.save("x.npy", np.random.default_rng(0).standard_normal((32, 3, 8, 8), dtype=np.float32))
    healed = run("remove", *TINY, "2", "--heal", "linear", "--data", "x.npy", "--out", "healed.trim")
    assert healed.exit_code == 0, healed.output
    refused = run("remove", *TINY, "4", "--adapter", "none", "--out", "no.trim")
    assert refused.exit_code == 1
    assert not Path("no.trim").exists()
    assert run("remove", *TINY, "4", "--out", "adapted.trim").exit_code == 0


def test_edits_ask_for_what_they_need(run: Run, own_models: Path) -> None:
    for args, says in (
        (("remove", *TINY, "2"), "--out"),
        (("insert", *TINY, "nn.ReLU()", "--out", "a.trim"), "--after"),
        (("insert", *TINY, "nn.ReLU()", "--after", "1", "--before", "2", "--out", "a.trim"), "--after"),
        (("remove", *TINY, "2", "--heal", "linear", "--out", "a.trim"), "--data"),
    ):
        result = run(*args)
        assert result.exit_code == 2, result.output
        assert says in result.stderr
    assert not Path("a.trim").exists()


def test_a_recipe_from_new_to_run(run: Run, own_models: Path) -> None:
    made = run("recipe", "new", "timm:test_resnet", "--input", "1,3,32,32", "--out", "r.yaml")
    assert made.exit_code == 0, made.output
    assert run("recipe", "new", "timm:test_resnet", "--out", "r.yaml").exit_code == 1
    assert run("recipe", "new", "timm:test_resnet", "--input", "1,3,32,32").stdout == Path(
        "r.yaml"
    ).read_text().replace("r.yaml", "recipe.yaml")
    setting = ("--set", "edits=[{cut: {after: layer2}}]", "--set", "export.benchmark=false")
    planned = answer(run("run", "r.yaml", "--plan", *setting, "--json"))
    assert "layer3" in planned["steps"][0]["removed"]
    told = answer(run("run", "r.yaml", *setting, "--out", "done", "--json"))
    assert told["after"]["params"] < told["before"]["params"]
    assert {path.name for path in Path("done").iterdir()} == {Path(file).name for file in told["files"].values()}
    again = run("run", "r.yaml", *setting, "--out", "done")
    assert again.exit_code == 1
    assert "--overwrite" in again.stderr
    assert run("run", "r.yaml", *setting, "--out", "done", "--overwrite").exit_code == 0
    wrong = run("run", "r.yaml", "--set", "model.sed=3")
    assert wrong.exit_code == 1
    assert "model.sed" in wrong.stderr
    assert "'seed'" in wrong.stderr


def test_the_schema_is_json(run: Run) -> None:
    assert "edits" in answer(run("recipe", "schema"))["properties"]


def test_debug_shows_the_traceback(run: Run, tmp_path: Path) -> None:
    result = run("cut", "timm:test_resnet", "--after", "layer9", "--out", tmp_path / "a.onnx", "--debug")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert PathError.__name__ in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("torchtrim: ")


def test_same_name_gives_the_same_weights_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first, second = (load_model("timm:test_resnet").model.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("timm:test_vit", (3, 160, 160)),
        ("torchvision:resnet18", (3, 224, 224)),
        ("torchvision:googlenet", (3, 224, 224)),
        ("torchvision:lraspp_mobilenet_v3_large", (3, 520, 520)),
        ("torchvision:r3d_18", (3, 16, 112, 112)),
        ("torchvision:ssdlite320_mobilenet_v3_large", None),
    ],
)
def test_a_zoo_name_knows_its_input(name: str, shape: tuple[int, ...] | None) -> None:
    named = load_model(name)
    assert named.input_shape == shape
    assert not named.model.training


def test_verify_on_pictures_and_by_layers(run: Run, own_models: Path) -> None:
    from PIL import Image

    model = ("ownmodels:tiny", "--input", "1,3,8,8")
    assert run("export", model[0], "net.onnx", *model[1:]).exit_code == 0
    for number in range(5):
        folder = Path("pictures") / f"class{number}"
        folder.mkdir(parents=True)
        for shade in range(2):
            Image.new("RGB", (9, 9), (40 * number, 100 * shade, 80)).save(folder / f"{shade}.png")
    told = answer(run("verify", "net.onnx", *model, "--data", "pictures", "--max-drop", 0, "--json"))
    assert told["labelled"] == 10
    assert told["accuracy"] == told["reference_accuracy"]
    few = run("verify", "net.onnx", *model, "--data", "pictures", "--limit", 4, "--layers")
    assert few.exit_code == 0, few.output
    assert "accuracy on 4 labelled rows" in few.stdout
    assert "0 have no sibling" in few.stdout
    (Path("pictures") / "class5").mkdir()
    unlabelled = run("verify", "net.onnx", *model, "--data", "pictures")
    assert "6 folders, which are not the 5 classes of the model" in unlabelled.stderr
    assert "accuracy" not in unlabelled.stdout
    torch.save(torch.randn(6, 3, 8, 8), "rows.pt")
    assert answer(run("verify", "net.onnx", *model, "--data", "rows.pt", "--json"))["accuracy"] is None
    torch.save((torch.randn(6, 3, 8, 8), torch.arange(6) % 5), "rows.pt")
    assert answer(run("verify", "net.onnx", *model, "--data", "rows.pt", "--json"))["labelled"] == 6

    wrong = run("verify", "net.onnx", *model, "--seed", 1, "--layers")
    assert wrong.exit_code == 3
    assert "first over the threshold: node_conv2d" in wrong.stdout
    assert "it goes wrong at the node 'node_conv2d'" in wrong.stderr
    assert run("verify", "net.onnx", *model, "--reference", "net.onnx").exit_code == 2
    assert run("verify", "net.onnx", *model, "--max-drop", 2).exit_code == 1


def test_explain(run: Run, own_models: Path) -> None:
    assert run("export", "ownmodels:deep", "net.onnx", "--input", "1,3,8,8").exit_code == 0
    result = run("explain", "net.onnx", "--threads", 1, "--seconds", 0.01, "--plot", "bars.svg")
    assert result.exit_code == 0, result.output
    assert "what keeps it from being faster" in result.stdout
    assert Path("bars.svg").is_file()
    told = answer(run("explain", "net.onnx", "--seconds", 0.01, "--batch", 2, "--json"))
    assert told["inputs"] == "input=float32[2, 3, 8, 8]"
    assert {"op", "ms", "share"} <= set(told["operators"][0])
    assert run("explain", "no.onnx").exit_code == 1
    Path("broken.onnx").write_bytes(Path("net.onnx").read_bytes()[:500])
    broken = run("explain", "broken.onnx")
    assert broken.exit_code == 1
    assert broken.stderr.startswith("torchtrim: broken.onnx: cannot be read as an ONNX file")


def test_export_calibrates_on_pictures_and_writes_a_folder_to_serve(run: Run, own_models: Path) -> None:
    from PIL import Image

    for number in range(5):
        folder = Path("pictures") / f"class{number}"
        folder.mkdir(parents=True)
        for shade in range(4):
            Image.effect_noise((9, 9), 60 + 20 * shade).convert("RGB").save(folder / f"{shade}.png")
    model = ("ownmodels:tiny", "--input", "1,3,8,8")
    told = run("export", model[0], "net.onnx", *model[1:], "--quantize", "static", "--data", "pictures", "--json")
    report = answer(told)
    assert report["quantize"] == "static" and report["quantized_nodes"] > 0
    assert report["verification"]["outputs"][0]["labelled"] == 10  # the other half of the pictures was calibrated on
    refused = run("export", model[0], "other.onnx", *model[1:], "--serve", "served")
    assert refused.exit_code == 1 and "torchtrim: " in refused.stderr and not Path("other.onnx").exists()
    Path("labels.txt").write_text("\n".join(f"name {number}" for number in range(1000)))
    served = answer(
        run("export", "timm:test_resnet", "r.onnx", "--serve", "served", "--labels", "labels.txt", "--json")
    )
    assert served["serving"]["labels"] == 1000
    assert {"predict.py", "preprocessing.json", "labels.json", "README.md", "r.onnx"} <= {
        file.name for file in Path("served").iterdir()
    }
    assert str(Path.cwd()) not in (Path("served") / "README.md").read_text()
    wrong = run("export", model[0], "x.onnx", *model[1:], "--labels", "labels.txt")
    assert wrong.exit_code == 2
