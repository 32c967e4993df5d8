"""Biases of static int8 files that make up for what rounding shifts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

import torchtrim as tt
from torchtrim.export.bias_correction import BiasCorrection, correct_biases, counted, output_errors
from torchtrim.export.calibration import calibrate
from torchtrim.export.calibration_data import CalibrationData
from torchtrim.export.prepare import prepare
from torchtrim.export.static import calibration_tensors, quantize_static
from torchtrim.export.targets import TARGETS
from torchtrim.export.workbench import Options, Workbench

BITS_7 = Options(reduce_range=True)  # the same weights whatever processor this runs on


def chain(path: Path, length: int = 32) -> Path:
    """1 x 1 convolutions one after the other: what one shifts, those after it would all make up for once more."""
    rng = np.random.default_rng(0)
    weights, nodes, last = [], [], "x"
    for i in range(length):
        weight = np.exp(rng.normal(size=(16, 16, 1, 1)) * 2)
        arrays = {f"w{i}": weight / weight.sum(1, keepdims=True), f"b{i}": rng.normal(size=16) * 0.01}
        weights += [numpy_helper.from_array(array.astype(np.float32), name) for name, array in arrays.items()]
        nodes += [
            helper.make_node("Conv", [last, f"w{i}", f"b{i}"], [f"c{i}"], name=f"conv{i}"),
            helper.make_node("Relu", [f"c{i}"], [f"y{i}"], name=f"relu{i}"),
        ]
        last = f"y{i}"
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 16, 4, 4]) for name in ("x", last))
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def corrected_by_tensor(source: Path, given: torch.Tensor, layers: int) -> tuple[BiasCorrection, Path]:
    """Quantize a file with one scale a tensor, in 7 bits, and correct it."""
    folder = source.parent
    path, quantized, corrected = (folder / f"{name}.onnx" for name in ("prepared", "int8", "corrected"))
    prepare(source, path)
    data = CalibrationData.spool([given], nn.Identity(), path, folder / "data")
    statistics = calibrate(path, data.calibration(), calibration_tensors(path))
    assert quantize_static(path, quantized, statistics, per_channel=False, reduce_range=True) == layers
    found = correct_biases(path, quantized, corrected, data)
    assert found is not None
    return found, corrected


def test_no_layer_makes_up_for_what_those_before_it_put_right(tmp_path: Path) -> None:
    given = torch.rand(64, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    found, _ = corrected_by_tensor(chain(tmp_path / "source.onnx"), given, 32)
    assert found.corrected == 32
    assert found.after < 0.7 * found.before


def products(path: Path) -> Path:
    """MatMul, Add of a bias, Gelu, MatMul without one: as in transformers. Bad weights for one scale."""
    rng = np.random.default_rng(0)
    constants = {"w": rng.normal(size=(8, 8)) * np.geomspace(0.01, 1, 8), "b": rng.normal(size=8), "v": np.ones((8, 2))}
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 4, 8])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n", 4, 2])
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["m"], name="first"),
        helper.make_node("Add", ["b", "m"], ["a"], name="bias"),
        helper.make_node("Gelu", ["a"], ["g"], name="gelu"),
        helper.make_node("MatMul", ["g", "v"], ["y"], name="second"),
    ]
    weights = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [x], [y], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def test_bias_correction_of_matmul_and_its_add(tmp_path: Path) -> None:
    given = torch.rand(64, 4, 8, generator=torch.Generator().manual_seed(0)) + 0.5
    found, corrected = corrected_by_tensor(products(tmp_path / "source.onnx"), given, 2)
    assert (found.corrected, found.skipped) == (1, 1)
    assert found.helped
    bias = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(corrected).graph.initializer}["b"]
    assert bias.dtype == np.float32


class Told(nn.Module):
    """A forward told by a function, with parameters."""

    def __init__(self, function: Callable[..., torch.Tensor], **parameters: torch.Tensor) -> None:
        super().__init__()
        self.function = function
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(self, x)


def rows(*sizes: int) -> torch.Tensor:
    return torch.randn(48, *sizes, generator=torch.Generator().manual_seed(0))


def exported(net: nn.Module, path: Path, data: torch.Tensor, **options: Any) -> tt.ExportReport:
    options = {"quantize": "static", "tolerance": tt.Tolerance(None), "benchmark": False, **options}
    return tt.export_onnx(net.eval(), data[:2], path, data=[data[:24], data[24:]], **options)


def drawn(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "net",
    [
        # Wider than the product it is added to, twice; made of an activation; expanded.
        Told(lambda m, x: (x @ m.w)[..., None] + m.b, w=drawn(6), b=drawn(5)),
        Told(lambda m, x: x @ m.w + m.b, w=drawn(6, 1), b=drawn(5)),
        Told(lambda m, x: torch.addmm(m.b + x[:, :4], x, m.w), w=drawn(6, 4), b=drawn(4)),
        Told(lambda m, x: torch.addmm(m.b.expand(x.shape[0], 4), x, m.w), w=drawn(6, 4), b=drawn(4)),
    ],
    ids=["vector", "wider", "activation", "expanded"],
)
def test_a_bias_that_is_not_the_layers_own_is_left_as_it_is(net: nn.Module, tmp_path: Path) -> None:
    report = exported(net, tmp_path / "net.onnx", rows(6))
    assert report.quantize == "static"
    assert not any("corrected" in note for note in report.notes)


def test_a_bias_with_a_negative_factor(tmp_path: Path) -> None:
    """ONNX Runtime puts the factor into the scale, which is negative then."""
    net = Told(lambda m, x: torch.addmm(m.b, x, m.w, beta=-1), w=drawn(16, 16), b=drawn(16)).eval()
    path = tt.export_onnx(net, rows(16)[:2], tmp_path / "net.onnx", benchmark=False).path
    data = CalibrationData.spool([rows(16)], net, path, tmp_path / "data")
    bench = Workbench(path, tmp_path, target=TARGETS["cpu"], data=data, options=BITS_7, threads=1)
    found = correct_biases(bench.prepared, bench.static().path, tmp_path / "corrected.onnx", data)
    assert found is not None and found.corrected == 1
    assert found.after < 1.1 * found.before < 0.1


def test_outputs_whose_shape_depends_on_values(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 256), Told(lambda m, y: y[y > 0]))
    with pytest.raises(tt.ExportMismatch, match="shape"):
        exported(net, tmp_path / "net.onnx", rows(6))
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_what_was_corrected(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())])
    report = exported(net, tmp_path / "net.onnx", rows(8, 8, 8), calibration="percentile", reduce_range=True)
    assert [note for note in report.notes if note.startswith("static: 6 biases corrected")]
    assert (counted(1), counted(2)) == ("1 bias", "2 biases")


def bench_of(path: Path, folder: Path) -> Workbench:
    data = CalibrationData.spool([rows(16, 4, 4)], nn.Identity(), path, folder / "data")
    return Workbench(path, folder, target=TARGETS["cpu"], data=data, options=BITS_7, threads=1)


def test_only_what_helps_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_of(chain(tmp_path / "net.onnx"), tmp_path)
    built = bench.static()
    better = bench.corrected(built)
    assert better.path != built.path and better.notes == ("static: 32 biases corrected for what rounding shifts",)
    assert bench.corrected(better).path == better.path  # nothing is left to correct
    monkeypatch.setattr("torchtrim.export.bias_correction._means", lambda *_: {})
    with pytest.raises(KeyError):  # what is no error of a file is not taken for one
        bench.corrected(built)
    monkeypatch.undo()
    bench.data = None
    assert bench.corrected(built) is built


def test_a_correction_that_cannot_be_measured_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise tt.ExportError("no room on the disk")

    bench = bench_of(chain(tmp_path / "net.onnx"), tmp_path)
    built = bench.static()
    monkeypatch.setattr("torchtrim.export.workbench.correct_biases", full)
    found = bench.corrected(built)
    assert found.path == built.path
    assert found.notes == ("static: biases are not corrected: no room on the disk",)


def test_what_is_infinite_in_both_counts_for_nothing(tmp_path: Path) -> None:
    def masked(path: Path, factor: float, value: float) -> Path:
        x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in "xy")
        constants = {"f": np.float32(factor), "low": np.float32(value), "zero": np.float32(0)}
        nodes = [
            helper.make_node("Mul", ["x", "f"], ["m"]),
            helper.make_node("Less", ["x", "zero"], ["c"]),
            helper.make_node("Where", ["c", "low", "m"], ["y"]),
        ]
        graph = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(v, k) for k, v in constants.items()])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
        return path

    feed = {"x": np.array([[-1.0, 3.0, 4.0]], np.float32)}
    first = masked(tmp_path / "a.onnx", 1.0, -np.inf)
    others = [masked(tmp_path / "b.onnx", 1.5, -np.inf), masked(tmp_path / "c.onnx", 1.0, 0.0)]
    assert output_errors(first, others, [feed]) == [pytest.approx(0.5), np.inf]
