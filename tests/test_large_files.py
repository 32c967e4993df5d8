"""Files whose weights lie beside them, as past 2 GB, in every scheme; here everything over 4 kB is large."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from torchtrim.bench.session import OnnxSession
from torchtrim.export.bias_correction import correct_biases
from torchtrim.export.equalise import equalise_layers
from torchtrim.export.layers import compare_layers
from torchtrim.export.onnx import export_onnx
from torchtrim.export.saving import held_bytes, save_whole
from torchtrim.export.targets import resolve
from torchtrim.export.workbench import Workbench
from torchtrim.graph.inputs import Inputs

_LEAST = 4_000


class Net(nn.Module):
    """Two convolutions and two products, each of which is over a kilobyte in int8: smaller weights stay in a file."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 32, 3)
        self.wide, self.head = nn.Linear(32, 128), nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.two(torch.relu(self.one(x)))).mean((2, 3))
        return self.head(torch.relu(self.wide(x)))


X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(3))
DATA = [torch.randn(16, 3, 16, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]


@pytest.fixture(autouse=True)
def all_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchtrim.export.graph.LARGE", _LEAST)
    monkeypatch.setattr("torchtrim.export.saving.LARGE", _LEAST)
    monkeypatch.setattr("torchtrim.export.onnx.LARGE", _LEAST)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def result(path: Path) -> Any:
    session = OnnxSession(path)
    return session.run(session.feed(Inputs.of(X)))[0]


@pytest.mark.parametrize(
    ("scheme", "options", "cosine"),
    [
        ("dynamic", {}, 0.99),
        ("static", {"data": DATA}, 0.98),
        ("static", {"data": DATA, "target": "tensorrt"}, 0.98),
        ("mixed", {"data": DATA}, 0.98),
        ("weight_only", {}, 0.999),
        ("weight_only", {"target": "openvino"}, 0.999),
        ("fp16", {"target": "cuda"}, 0.999),
    ],
)
def test_every_scheme(scheme: str, options: dict[str, Any], cosine: float, net: nn.Module, tmp_path: Path) -> None:
    plain = export_onnx(net, X, tmp_path / "plain.onnx", benchmark=False)
    assert [file.name for file in plain.files] == ["plain.onnx", "plain.onnx.data"]
    report = export_onnx(net, X, tmp_path / "small.onnx", quantize=scheme, benchmark=False, threads=1, **options)
    assert [file.name for file in report.files] == ["small.onnx", "small.onnx.data"]
    onnx.checker.check_model(str(report.path), full_check=scheme != "weight_only" or "target" in options)
    with torch.no_grad():
        expected = net(X).numpy().ravel()
    found = result(report.path).ravel()
    assert float(expected @ found / np.linalg.norm(expected) / np.linalg.norm(found)) > cosine
    layers = compare_layers(plain.path, report.path, X)
    assert layers.tensors[-1].cosine > cosine
    names = {"plain.onnx", "plain.onnx.data", "small.onnx", "small.onnx.data"}
    assert {file.name for file in tmp_path.iterdir()} == names


def test_equalised_and_corrected_files(net: nn.Module, tmp_path: Path) -> None:
    from torchtrim.export.calibration_data import CalibrationData

    plain = export_onnx(net, X, tmp_path / "plain.onnx", benchmark=False).path
    data = CalibrationData.spool(DATA, net, plain, tmp_path / "data")
    bench = Workbench(plain, tmp_path, target=resolve("cpu", None)[0], data=data, external=True)
    equal = tmp_path / "equal" / "plain.onnx"
    equal.parent.mkdir()
    assert equalise_layers(bench.prepared, equal) == 1
    assert (equal.parent / "plain.onnx.data").is_file()
    np.testing.assert_allclose(result(equal), result(plain), rtol=1e-3, atol=1e-5)
    static, corrected = bench.static(), tmp_path / "corrected.onnx"
    found = correct_biases(bench.prepared, static.path, corrected, data)
    assert found.corrected == 4
    assert (tmp_path / "corrected.onnx.data").is_file()
    assert found.after < 1.2 * found.before  # weights that were lost would give zeros, or no file at all


def test_a_file_in_the_working_directory_is_no_hindrance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = np.arange(4096, dtype=np.float32)
    values = [onnx.helper.make_tensor_value_info(name, 1, [4096]) for name in "xy"]
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "g", values[:1], values[1:], [onnx.numpy_helper.from_array(weights, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    assert held_bytes(model) == 4 * 4096
    (tmp_path / "a.onnx.data").write_bytes(b"of another file")
    (tmp_path / "made").mkdir()
    monkeypatch.chdir(tmp_path)
    save_whole(model, tmp_path / "made" / "a.onnx")
    assert (tmp_path / "made" / "a.onnx.data").stat().st_size == 4 * 4096
    assert held_bytes(model) == 0
    again = onnx.load(tmp_path / "made" / "a.onnx")
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(again.graph.initializer[0]), weights)
