"""A folder to serve from: the same answers as PyTorch's pipeline, from a script that does not know PyTorch."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

from torchtrim.errors import ExportError, InputError
from torchtrim.export.in_graph import preprocess_in_graph
from torchtrim.export.onnx import export_onnx
from torchtrim.export.preprocessing import Preprocessing
from torchtrim.export.serving import write_serving_folder

LABELS = [f"class {number}" for number in range(1000)]
SIZES = [(301, 207), (90, 131), (224, 224), (640, 97)]


def picture(size: tuple[int, int], seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Soft colours with noise on them."""
    random = np.random.default_rng(seed)
    soft = Image.fromarray(random.integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noisy = np.asarray(soft).astype(int) + random.integers(-20, 20, (size[1], size[0], 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).convert(mode)


class Served:
    """A model, the transform of its own library, and its ONNX file."""

    def __init__(self, model: nn.Module, transform: Callable[[Any], torch.Tensor], source: Any, size: int, place: Path):
        self.model, self.transform, self.source = model.eval(), transform, source
        with torch.no_grad():
            for layer in [each for each in model.modules() if isinstance(each, nn.Linear)][-1:]:
                layer.weight.mul_(30)  # random weights give classes that are all but equal
        self.file = place / "net.onnx"
        export_onnx(model, torch.zeros(1, 3, size, size), self.file, benchmark=False)

    def top5(self, shown: Image.Image) -> list[int]:
        with torch.inference_mode():
            scores = self.model(self.transform(shown.convert("RGB"))[None])[0]
        return [int(index) for index in scores.argsort(descending=True)[:5]]


@pytest.fixture(scope="module", params=["timm", "torchvision"])
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Served:
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp(str(request.param))
    if request.param == "timm":
        model = timm.create_model("test_resnet")
        config = timm.data.resolve_model_data_config(model)
        return Served(model, timm.data.create_transform(**config, is_training=False), model, 160, place)
    weights = torchvision.models.MobileNet_V3_Small_Weights.DEFAULT
    return Served(torchvision.models.mobilenet_v3_small(), weights.transforms(), weights, 224, place)


def told(folder: Path, *pictures: Path) -> list[list[int]]:
    """What `predict.py` prints, by picture, run by a Python that must not import torch."""
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "sys.exit(bool({'torch', 'torchvision', 'timm', 'torchtrim', 'onnx'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(folder / "predict.py"), *map(str, pictures)]
    run = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder.parent)
    assert run.returncode == 0, run.stderr
    answers: list[list[int]] = []
    for line in run.stdout.splitlines():
        if line.startswith(" "):
            answers[-1].append(int(line.split()[1]))
        else:
            answers.append([])
    return answers


def test_the_script_gives_the_answers_of_pytorch(served: Served, tmp_path: Path) -> None:
    pictures = [picture(size, seed) for seed, size in enumerate(SIZES)] + [picture((70, 200), 9, "L")]
    files = [tmp_path / f"{number}.png" for number in range(len(pictures))]
    for shown, file in zip(pictures, files, strict=True):
        shown.save(file)
    expected = [served.top5(shown) for shown in pictures]
    assert len({tuple(each) for each in expected}) > 1
    for in_graph in ("nothing", "normalise", "everything"):
        made = write_serving_folder(
            served.file, tmp_path / in_graph, preprocessing=served.source, labels=LABELS, in_graph=in_graph
        )
        found = told(made.path, *files)
        if in_graph == "everything":  # a grey level off, here and there
            assert made.levels is not None
            assert made.levels[0] <= 2
            assert [each[0] for each in found] == [each[0] for each in expected]
        else:
            assert found == expected


class Ended(nn.Module):
    """Features, then classes as logits or as probabilities."""

    def __init__(self, ending: nn.Module) -> None:
        super().__init__()
        self.conv, self.ending = nn.Conv2d(3, 4, 8), ending

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        maps = self.conv(x)
        scores = maps.mean((2, 3)) * 5
        return maps, self.ending(scores), -scores


@pytest.mark.parametrize("ending", [nn.Softmax(1), nn.Identity()], ids=["probabilities", "logits"])
def test_probabilities_are_printed_as_they_are_and_outputs_chosen(ending: nn.Module, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, how = Ended(ending).eval(), Preprocessing(crop=(8, 8), resize=(8, 8))
    names = ["maps", "classes", "other"]
    export_onnx(net, torch.zeros(1, 3, 8, 8), tmp_path / "net.onnx", output_names=names, benchmark=False)
    picture((20, 20)).save(tmp_path / "a.png")
    x = torch.from_numpy(how.apply(tmp_path / "a.png"))[None]
    with torch.no_grad():
        logits = net.conv(x).mean((2, 3))[0] * 5
    for output, expected in ((None, logits.softmax(0)), ("other", (-logits).softmax(0))):
        made = write_serving_folder(
            tmp_path / "net.onnx",
            tmp_path / "served",
            preprocessing=how,
            labels=list("abcd"),
            output=output,
            overwrite=True,
        )
        assert json.loads((made.path / "preprocessing.json").read_text())["output"] == (output or "classes")
        command = [sys.executable, str(made.path / "predict.py"), str(tmp_path / "a.png")]
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[1:]
        found = {int(line.split()[1]): float(line.split()[0].rstrip("%")) / 100 for line in lines}
        assert len(found) == 4
        for index, share in found.items():
            assert abs(share - float(expected[index])) < 1e-4
    with pytest.raises(InputError, match="no such output"):
        write_serving_folder(tmp_path / "net.onnx", tmp_path / "no", preprocessing=how, output="none")
    with pytest.raises(InputError, match="one label for each column"):
        write_serving_folder(tmp_path / "net.onnx", tmp_path / "no", preprocessing=how, output="maps", labels=["a"])


def test_the_file_and_the_folder_say_the_same(served: Served, tmp_path: Path) -> None:
    made = write_serving_folder(served.file, tmp_path / "served", preprocessing=served.source, labels=LABELS)
    names = ["README.md", "labels.json", "net.onnx", "predict.py", "preprocessing.json"]
    assert [file.name for file in made.files] == names
    session = onnxruntime.InferenceSession(str(made.model), providers=["CPUExecutionProvider"])
    notes = session.get_modelmeta().custom_metadata_map
    settings = json.loads((made.path / "preprocessing.json").read_text())
    assert json.loads(notes["torchtrim.preprocessing"]) == settings
    assert json.loads(notes["torchtrim.labels"]) == LABELS == json.loads((made.path / "labels.json").read_text())
    assert notes["torchtrim.target"] == "cpu"
    assert settings["crop"] == list(made.preprocessing.crop)
    assert settings["input"] == session.get_inputs()[0].name
    told = (made.path / "README.md").read_text()
    assert "python predict.py" in told
    assert str(made.preprocessing) in told
    assert "class 7" not in told
    assert json.loads(json.dumps(made.to_dict()))["labels"] == 1000
    assert str(made.preprocessing) in str(made)
    assert "torchtrim.labels" not in {entry.key for entry in onnx.load(served.file).metadata_props}


def test_the_script_needs_three_packages() -> None:
    import torchtrim.export.predict as script

    tree = ast.parse(Path(str(script.__file__)).read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert names - set(sys.stdlib_module_names) == {"numpy", "onnxruntime", "PIL"}


CONFIGS: list[dict[str, Any]] = [
    {"input_size": (3, 160, 160), "crop_pct": 0.95, "interpolation": "bicubic"},
    {"input_size": (3, 96, 96), "crop_pct": 1.0, "interpolation": "bilinear", "mean": (0.5,) * 3, "std": (0.5,) * 3},
    {"input_size": (3, 64, 96), "crop_pct": 0.9},
    {"input_size": (3, 80, 80), "crop_pct": 0.94, "crop_mode": "squash"},
    {"input_size": (3, 64, 64), "crop_pct": None, "interpolation": "lanczos"},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_equals_timms_transform(config: dict[str, Any]) -> None:
    resolved = timm.data.resolve_data_config(pretrained_cfg=config)
    transform = timm.data.create_transform(**resolved, is_training=False)
    ours = Preprocessing.of(config)
    for seed, size in enumerate(SIZES):
        shown = picture(size, seed)
        np.testing.assert_allclose(ours.apply(shown), transform(shown).numpy(), atol=1e-5)


@pytest.mark.parametrize("resize", [232, 100, [140, 180]], ids=str)
def test_equals_torchvisions_transform(resize: Any) -> None:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms._presets import ImageClassification

    preset = ImageClassification(crop_size=151, resize_size=232, interpolation=InterpolationMode.BICUBIC)
    preset.resize_size = resize if isinstance(resize, list) else [resize]
    ours = Preprocessing.of(preset)
    for seed, size in enumerate(SIZES):  # some end up smaller than the crop, with black around
        shown = picture(size, seed)
        np.testing.assert_allclose(ours.apply(shown), preset(shown).numpy(), atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "RGBA", "CMYK", "P", "1", "LA"])
def test_pictures_of_every_mode(mode: str, tmp_path: Path) -> None:
    how = Preprocessing(crop=(32, 40), resize=(36, 44), interpolation="bilinear")
    shown = picture((61, 47), mode="L" if mode == "LA" else "RGB").convert(mode)
    assert np.array_equal(how.apply(shown), how.apply(shown.convert("RGB")))
    file = tmp_path / ("shown.jpg" if mode == "CMYK" else "shown.png")
    shown.save(file)
    assert how.apply(file).shape == (3, 32, 40)


def test_a_picture_is_turned_upright(tmp_path: Path) -> None:
    how = Preprocessing(crop=(24, 24), resize=24)
    shown = picture((50, 30))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    shown.save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(how.apply(tmp_path / "turned.png"), how.apply(shown.transpose(Image.Transpose.ROTATE_270)))


def test_grey_and_bgr() -> None:
    shown = picture((40, 30))
    grey = Preprocessing(crop=(20, 20), resize=22, channels="L", mean=(0.5,), std=(0.25,)).apply(shown)
    assert grey.shape == (1, 20, 20)
    plain: dict[str, Any] = {"crop": (20, 20), "resize": 22, "mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
    rgb, bgr = (Preprocessing(**plain, channels=order).apply(shown) for order in ("RGB", "BGR"))
    means = np.float32([0.1, 0.2, 0.3])[:, None, None]
    np.testing.assert_allclose((bgr + means)[::-1], rgb + means, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"crop": (0, 8)}, "crop"),
        ({"crop": 8}, "crop"),
        ({"crop": (8, 8), "resize": 0}, "resize"),
        ({"crop": (8, 8), "resize": 8.5}, "resize"),
        ({"crop": (8, 8), "interpolation": "bilinaer"}, "bilinear"),
        ({"crop": (8, 8), "channels": "RGBX"}, "channels"),
        ({"crop": (8, 8), "fit": "pad"}, "fit"),
        ({"crop": (8, 8), "mean": (0.5,)}, "mean"),
        ({"crop": (8, 8), "mean": (float("nan"),) * 3}, "finite"),
        ({"crop": (8, 8), "std": (1.0, 0.0, 1.0)}, "std"),
    ],
)
def test_what_makes_no_sense_is_refused(options: dict[str, Any], names: str) -> None:
    with pytest.raises(InputError, match=names):
        Preprocessing(**options)


def test_a_source_that_says_nothing_is_refused() -> None:
    for source in (nn.Linear(2, 2), torchvision.models.squeezenet1_1(), {}, 3):
        with pytest.raises(InputError, match="how its pictures are prepared"):
            Preprocessing.of(source)
    with pytest.raises(InputError, match="border"):
        Preprocessing.of({"input_size": (3, 8, 8), "crop_mode": "border"})
    video = torchvision.models.video.R3D_18_Weights.DEFAULT
    assert Preprocessing.of(video).resize == (128, 171)


class Small(nn.Module):
    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 4, 3, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).mean((2, 3))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("small") / "small.onnx"
    export_onnx(Small(), torch.zeros(1, 3, 32, 48), place, benchmark=False)
    return place


HOW = Preprocessing(crop=(32, 48), resize=(36, 54), fit="cover")


@pytest.mark.parametrize(
    "options",
    [
        {"resize": 50},
        {"resize": 50, "interpolation": "bilinear"},
        {"resize": (36, 54), "fit": "cover"},
        {"resize": (36, 54), "interpolation": "bilinear"},
        {"resize": 48, "channels": "BGR", "mean": (0.1, 0.2, 0.3)},
    ],
    ids=str,
)
def test_the_graph_prepares_as_pillow_does(options: dict[str, Any], small: Path, tmp_path: Path) -> None:
    how = Preprocessing(crop=(32, 48), **options)
    made = preprocess_in_graph(small, tmp_path / "whole.onnx", how)
    assert made.largest <= 2
    assert made.mean < 0.05
    onnx.checker.check_model(str(made.path), full_check=True)
    whole, plain = (onnxruntime.InferenceSession(str(path)) for path in (made.path, small))
    for seed, size in enumerate(SIZES):
        shown = picture(size, seed)
        found = whole.run(None, {made.input_name: np.asarray(shown)[None].repeat(2, 0)})[0]
        expected = plain.run(None, {plain.get_inputs()[0].name: how.apply(shown)[None]})[0]
        np.testing.assert_allclose(found, expected.repeat(2, 0), atol=2e-2)


def test_a_graph_that_only_normalises_is_exact(small: Path, tmp_path: Path) -> None:
    made = preprocess_in_graph(small, tmp_path / "part.onnx", HOW, resize=False)
    assert made.largest < 1e-3
    session = onnxruntime.InferenceSession(str(made.path))
    assert session.get_inputs()[0].shape[1:] == [32, 48, 3]
    assert "Resize" not in {node.op_type for node in onnx.load(made.path).graph.node}


def test_what_a_graph_cannot_do_is_refused(small: Path, tmp_path: Path) -> None:
    for how in (Preprocessing(crop=(32, 48)), Preprocessing(crop=(32, 48), resize=50, interpolation="lanczos")):
        with pytest.raises(InputError, match="cannot go into the graph"):
            preprocess_in_graph(small, tmp_path / "no.onnx", how)
    values = [onnx.helper.make_tensor_value_info(name, 1, ["batch", 3, 32, 48]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "old", values[:1], values[1:])
    old = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(old, tmp_path / "old.onnx")
    with pytest.raises(ExportError, match="opset 18"):
        preprocess_in_graph(tmp_path / "old.onnx", tmp_path / "no.onnx", HOW)
    with pytest.raises(InputError, match="does not give what the file takes"):
        preprocess_in_graph(small, tmp_path / "no.onnx", Preprocessing(crop=(32, 32), resize=36))
    with pytest.raises(ExportError, match="exists already"):
        preprocess_in_graph(small, small, HOW)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["old.onnx"]


def test_what_does_not_fit_is_refused_and_leaves_nothing(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    with pytest.raises(InputError, match="one label for each column"):
        write_serving_folder(small, folder, preprocessing=HOW, labels=["a", "b"])
    with pytest.raises(InputError, match="names of the classes"):
        write_serving_folder(small, folder, preprocessing=HOW, labels="abcd")
    with pytest.raises(InputError, match="in_graph"):
        write_serving_folder(small, folder, preprocessing=HOW, in_graph="all")
    with pytest.raises(ExportError, match="no such ONNX file"):
        write_serving_folder(tmp_path / "none.onnx", folder, preprocessing=HOW)
    with pytest.raises(ExportError, match="around it does not exist"):
        write_serving_folder(small, tmp_path / "a" / "b", preprocessing=HOW)
    with pytest.raises(ExportError, match="cannot be written to"):
        write_serving_folder(small, "/proc/served", preprocessing=HOW)
    (tmp_path / "altered.onnx").write_bytes(small.read_bytes()[:-100])
    with pytest.raises(ExportError, match="not an ONNX file that is whole"):
        write_serving_folder(tmp_path / "altered.onnx", folder, preprocessing=HOW)
    assert [file.name for file in tmp_path.iterdir()] == ["altered.onnx"]


def test_a_folder_is_replaced_only_where_nothing_is_lost(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    write_serving_folder(small, folder, preprocessing=HOW, labels=list("abcd"))
    with pytest.raises(ExportError, match="exists already"):
        write_serving_folder(small, folder, preprocessing=HOW)
    assert not write_serving_folder(folder / "small.onnx", folder, preprocessing=HOW, overwrite=True).labels
    assert not (folder / "labels.json").exists()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ExportError, match=r"notes\.txt"):
        write_serving_folder(small, folder, preprocessing=HOW, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    assert [file.name for file in tmp_path.iterdir()] == ["served"]


FULL_DISK = """
import resource, signal, sys
from torchtrim.errors import ExportError
from torchtrim.export.preprocessing import Preprocessing
from torchtrim.export.serving import write_serving_folder

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
how = Preprocessing(crop=(32, 48), resize=(36, 54), fit="cover")
try:
    write_serving_folder(sys.argv[1], sys.argv[2], preprocessing=how, overwrite=True)
except ExportError as error:
    print("refused:", error)
"""


def test_a_full_disk_leaves_what_was_there(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    write_serving_folder(small, folder, preprocessing=HOW, labels=list("abcd"))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    command = [sys.executable, "-c", FULL_DISK, str(small), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "refused: " in run.stdout, run.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert [file.name for file in tmp_path.iterdir()] == ["served"]


def test_weights_beside_the_file_come_along(small: Path, tmp_path: Path) -> None:
    model = onnx.load(small)
    place = tmp_path / "apart.onnx"
    onnx.save(model, place, save_as_external_data=True, location="apart.onnx.data", size_threshold=100)
    made = write_serving_folder(place, tmp_path / "served", preprocessing=HOW)
    assert made.path / "apart.onnx.data" in made.files
    onnxruntime.InferenceSession(str(made.model))
    whole = preprocess_in_graph(place, tmp_path / "other.onnx", HOW)
    (tmp_path / "apart.onnx.data").unlink()
    onnxruntime.InferenceSession(str(whole.path))


def test_a_half_precision_file_takes_half_precision(tmp_path: Path) -> None:
    file = tmp_path / "half.onnx"
    export_onnx(Small(), torch.zeros(1, 3, 32, 48), file, target="cuda", half_io=True, benchmark=False)
    picture((60, 50)).save(tmp_path / "a.png")
    found = []
    for in_graph in ("nothing", "everything"):
        made = write_serving_folder(file, tmp_path / in_graph, preprocessing=HOW, in_graph=in_graph)
        assert json.loads((made.path / "preprocessing.json").read_text())["providers"][0] == "CUDAExecutionProvider"
        found.append(told(made.path, tmp_path / "a.png"))
    assert found[0] == found[1]


def test_figures_of_a_report_are_in_the_readme(small: Path, tmp_path: Path) -> None:
    from torchtrim.bench.latency import benchmark

    report = benchmark({"file": small, "again": small}, rounds=2)
    made = write_serving_folder(small, tmp_path / "served", preprocessing=HOW, report=report)
    assert report.table().markdown() in (made.path / "README.md").read_text()
