"""Two ONNX files tensor by tensor: the node that goes wrong is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError, ExportMismatch, InputError
from torchtrim.export.layers import LayerComparison, compare_layers
from torchtrim.export.onnx import export_onnx
from torchtrim.export.verify import verify_onnx


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.three(torch.relu(self.two(torch.relu(self.one(x))))).relu()
        return self.head(x.mean((2, 3)))


X = torch.randn(6, 3, 12, 12, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def plain(net: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_onnx(net, X[:2], tmp_path_factory.mktemp("layers") / "plain.onnx", benchmark=False).path


def tampered(plain: Path, weight: str, place: Path, scale: float) -> str:
    """Write the file with one weight changed, and tell the node that reads it."""
    model = onnx.load(plain)
    for tensor in model.graph.initializer:
        if tensor.name == weight:
            values = numpy_helper.to_array(tensor) * scale
            tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float32), weight))
    onnx.save(model, place)
    return next(str(node.name) for node in model.graph.node if weight in node.input)


@pytest.mark.parametrize("weight", ["one.weight", "two.weight", "head.weight"])
def test_a_weight_that_was_changed_is_named(net: Net, plain: Path, tmp_path: Path, weight: str) -> None:
    node = tampered(plain, weight, tmp_path / "bad.onnx", 1.3)
    found = compare_layers(plain, tmp_path / "bad.onnx", X)
    assert found.first is not None
    assert found.worst is not None
    assert found.first.node == found.worst.node == node
    assert 0.05 < found.first.error < 0.4  # the bias is as it was
    assert found.unmatched == 0
    assert f"first over the threshold: {node}" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["first"]["node"] == node
    with pytest.raises(ExportMismatch, match=f"it goes wrong at the node '{node}'") as raised:
        verify_onnx(tmp_path / "bad.onnx", net, X, reference=plain)
    assert raised.value.layers.first.node == node  # type: ignore[attr-defined]
    assert "<table>" in found._repr_html_()


def rows_compared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows that layers are compared on from now on."""
    given: list[int] = []

    def compared(reference: Path, path: Path, feed: dict[str, Any]) -> LayerComparison:
        given.append(len(next(iter(feed.values()))))
        return compare_layers(reference, path, feed)

    monkeypatch.setattr("torchtrim.export.layers.compare_layers", compared)
    return given


@pytest.mark.parametrize(("scale", "expected"), [(1.3, 2), (float("nan"), 6)])
def test_the_layers_of_a_file_that_is_too_far_are_compared_on_two_rows_and_of_one_with_nan_on_all(
    net: Net, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scale: float, expected: int
) -> None:
    rows = rows_compared(monkeypatch)
    node = tampered(plain, "two.weight", tmp_path / "bad.onnx", scale)
    with pytest.raises(ExportMismatch, match=f"it goes wrong at the node '{node}'"):
        verify_onnx(tmp_path / "bad.onnx", net, X, reference=plain)
    assert rows == [expected]


def test_what_only_a_late_row_shows_is_looked_for_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(nn.ReLU6(), nn.Linear(4, 4))
    x = torch.rand(8, 4)
    x[5] = 5.0
    plain = export_onnx(net, x[:2], tmp_path / "plain.onnx", benchmark=False).path
    model = onnx.load(plain)
    tensor = next(each for each in model.graph.initializer if float(numpy_helper.to_array(each).max()) == 6.0)
    tensor.CopyFrom(numpy_helper.from_array(np.array(3.0, np.float32), tensor.name))
    onnx.save(model, tmp_path / "bad.onnx")
    rows = rows_compared(monkeypatch)
    with pytest.raises(ExportMismatch, match=r"it goes wrong at the node '.*' \(Clip\)"):
        verify_onnx(tmp_path / "bad.onnx", net, x, reference=plain)
    assert rows == [2, 8]


def test_equal_files_have_no_first(plain: Path) -> None:
    found = compare_layers(plain, plain, {"x": X.numpy()})
    assert (found.first, found.worst) == (None, None)
    assert {tensor.error for tensor in found.tensors} == {0.0}
    assert found.to_dict()["tensors"][0]["sqnr_db"] == "inf"


def test_quantized_tensors_are_matched_and_a_clipped_range_is_named(plain: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": X.numpy()}]

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[type-arg]
            return self.left.pop() if self.left else None

    good = tmp_path / "int8.onnx"
    quantize_static(plain, good, Reader(), quant_format=QuantFormat.QDQ, per_channel=True, reduce_range=True)
    found = compare_layers(plain, good, X)
    assert found.threshold == 0.2
    assert found.first is None
    assert all(0 < tensor.error < 0.1 for tensor in found.tensors)
    assert len(found.tensors) >= 6

    model = onnx.load(good)
    clipped = next(
        node for node in model.graph.node if node.op_type == "DequantizeLinear" and "relu_1" in node.input[0]
    )
    for tensor in model.graph.initializer:
        if tensor.name == clipped.input[1]:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / 8, tensor.name))
    onnx.save(model, tmp_path / "clipped.onnx")
    wrong = compare_layers(plain, tmp_path / "clipped.onnx", X)
    assert wrong.first is not None
    assert (wrong.first.reference, wrong.first.op) == ("relu_1", "Conv")  # ReLU is done by the range


def test_dynamic_int8_keeps_the_names(plain: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(plain, tmp_path / "dynamic.onnx", op_types_to_quantize=["Conv", "MatMul"])
    found = compare_layers(plain, tmp_path / "dynamic.onnx", X)
    assert len(found.tensors) >= 7
    assert max(tensor.error for tensor in found.tensors) < 0.2


def test_more_tensors_than_a_group_holds(tmp_path: Path) -> None:
    body = " ".join(f"t{i + 1} = Tanh(t{i})" for i in range(60))
    text = f'<ir_version: 9, opset_import: ["": 18]> g (float[N, 4] t0) => (float[N, 4] t60) {{ {body} }}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    text = text.replace("t31 = Tanh", "t31 = Sigmoid")
    onnx.save(onnx.parser.parse_model(text), tmp_path / "b.onnx")
    found = compare_layers(tmp_path / "a.onnx", tmp_path / "b.onnx", torch.randn(2, 4))
    assert [tensor.tensor for tensor in found.tensors] == [f"t{i}" for i in range(1, 61)]
    assert found.first is not None
    assert (found.first.tensor, found.first.node) == ("t31", "Sigmoid -> t31")


def test_weights_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Sequential(*(layer for _ in range(15) for layer in (nn.Linear(128, 128), nn.Tanh())))
    path = export_onnx(net, torch.zeros(1, 128), tmp_path / "a.onnx", benchmark=False).path
    shutil.copy(path, tmp_path / "b.onnx")
    (tmp_path / "a.onnx.data").write_bytes(b"of another file")
    monkeypatch.chdir(tmp_path)
    opened: list[tuple[int, int]] = []

    def session(path: Path, **options: Any) -> OnnxSession:
        weights = (path.parent / "weights.data").stat()
        opened.append((weights.st_ino, weights.st_mtime_ns))
        assert path.stat().st_size < weights.st_size / 10
        return OnnxSession(path, **options)

    monkeypatch.setattr("torchtrim.export.layers.OnnxSession", session)
    found = compare_layers(path, tmp_path / "b.onnx", torch.randn(2, 128))
    assert found.first is None and len(found.tensors) >= 30
    assert len(opened) >= 4 and len(set(opened)) == 2  # two groups of each file


@pytest.mark.parametrize("name", ["v1..2.onnx", "..x.onnx", "a" * 246 + ".onnx"])
def test_names_that_are_odd(plain: Path, tmp_path: Path, name: str) -> None:
    shutil.copy(plain, tmp_path / name)
    assert compare_layers(plain, tmp_path / name, X).first is None


def test_nan_on_one_side_is_the_first_wrong_node(tmp_path: Path) -> None:
    text = (
        '<ir_version: 9, opset_import: ["": 18]> g (float[N] x) => (float[N] y) { a = Abs(x) b = Sqrt(a) y = Relu(b) }'
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "a.onnx")
    onnx.save(onnx.parser.parse_model(text.replace("Sqrt(a)", "Sqrt(x)")), tmp_path / "b.onnx")
    found = compare_layers(tmp_path / "a.onnx", tmp_path / "b.onnx", torch.tensor([-1.0, 2.0]))
    assert found.first is not None
    assert found.first.tensor == "b"
    assert found.worst == found.first
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["first"]["error"] == "inf"


def test_what_cannot_be_compared(plain: Path, tmp_path: Path) -> None:
    text = '<ir_version: 9, opset_import: ["": 18]> g (float[N] q) => (float[N] r) { r = Relu(q) }'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "other.onnx")
    with pytest.raises(ExportError, match="no tensor in common"):
        compare_layers(plain, tmp_path / "other.onnx", X)
    with pytest.raises(ExportError, match="no such ONNX file"):
        compare_layers(plain, tmp_path / "no.onnx", X)
    with pytest.raises(InputError, match="threshold"):
        compare_layers(plain, plain, X, threshold=0.0)
    with pytest.raises(InputError, match="does not take"):
        compare_layers(plain, plain, X[:, :2])
