"""Static int8: what is quantized, how, and how near the float file it stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
import torchvision
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import nn

import torchtrim as tt
from torchtrim.bench.int8_format import HALF_UNSIGNED, UNSIGNED, best_format, exact_formats
from torchtrim.bench.machine import machine
from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError, InputError
from torchtrim.export.bias_correction import correct_biases, output_errors
from torchtrim.export.calibration import Statistics, calibrate
from torchtrim.export.calibration_data import CalibrationData
from torchtrim.export.graph import names_for, write_float
from torchtrim.export.int8_nodes import int8_nodes
from torchtrim.export.prepare import _pool_means, prepare
from torchtrim.export.static import calibration_tensors, quantize_static
from torchtrim.graph.inputs import Inputs


class Residual(nn.Module):
    """A small residual network: conv, add, pool, means, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.b = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 2)
        x = (self.b(self.a(x)) + x).relu()
        return self.head(x.mean((2, 3)))


def built(name: str) -> tuple[nn.Module, int]:
    torch.manual_seed(0)
    if name == "residual":
        model: nn.Module = Residual()
        size = 16
    elif name == "resnet18":
        model, size = torchvision.models.resnet18(num_classes=10), 64
    else:
        model = timm.create_model(name)
        size = 160
    model.train()
    with torch.no_grad():
        for _ in range(2):  # batch norms that are not as they were made
            model(torch.randn(8, 3, size, size))
    return model.eval(), size


class Case:
    """A model as a prepared file, data for it, and its calibration."""

    def __init__(self, name: str, folder: Path) -> None:
        model, size = built(name)
        self.folder = folder
        inputs = Inputs.of(torch.randn(2, 3, size, size))
        self.source, self.path = folder / f"{name}.onnx", folder / f"{name}.prepared.onnx"
        with torch.no_grad():
            names = names_for(model, inputs, inputs.call(model), None, None)
        write_float(model, inputs, self.source, names=names, dynamic=True, opset=None)
        prepare(self.source, self.path)
        data = torch.randn(16, 3, size, size) + torch.randn(16, 3, 1, 1)
        self.data = CalibrationData.spool([data], model, self.path, folder / f"{name}.data")
        tensors = calibration_tensors(self.path) + calibration_tensors(self.path, form="tensorrt")
        self.statistics = calibrate(self.path, self.data.calibration(), tensors)

    def quantized(self, **options: Any) -> tuple[onnx.ModelProto, Path, int]:
        path = self.folder / "int8.onnx"
        count = quantize_static(self.path, path, self.statistics, **options)
        model = onnx.load(path)
        onnx.checker.check_model(model, full_check=True)
        return model, path, count

    def cosine(self, path: Path) -> float:
        feed = next(self.data.comparison())
        one, other = (exactly(file, feed) for file in (self.path, path))
        return float((one * other).sum() / np.sqrt((one**2).sum() * (other**2).sum()))


def exactly(path: Path, feed: dict[str, NDArray[Any]]) -> NDArray[np.float64]:
    """Run a file without fusion, so that what its numbers mean is told and not what a processor's kernels saturate."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0], np.float64)


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    folder = tmp_path_factory.mktemp("static")
    return {name: Case(name, folder) for name in ("residual", "resnet18", "test_efficientnet")}


@pytest.fixture
def residual(cases: dict[str, Case]) -> Case:
    return cases["residual"]


def kinds(graph: onnx.GraphProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.node)


def fused(path: Path) -> Counter[str]:
    """What ONNX Runtime makes of a file."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".fused.onnx"))
    options.log_severity_level = 3
    onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return kinds(onnx.load(options.optimized_model_filepath).graph)


def test_prepared_file_computes_the_same(cases: dict[str, Case]) -> None:
    for case in cases.values():
        feed = next(case.data.comparison())
        expected = OnnxSession(case.source).run(feed)[0]
        assert OnnxSession(case.path).run(feed)[0] == pytest.approx(expected, rel=1e-4, abs=1e-4)
        graph = onnx.load(case.path).graph
        names = [node.name for node in graph.node]
        assert all(names)
        assert len(set(names)) == len(names)
        assert "BatchNormalization" not in kinds(graph)
    assert kinds(onnx.load(cases["residual"].path).graph)["GlobalAveragePool"] == 1


@pytest.mark.parametrize("name", ["residual", "test_efficientnet"])
@pytest.mark.parametrize(
    "options",
    [
        {"reduce_range": True},
        {"weights": "uint8"},
        {"activations": "int8", "method": "percentile"},
        {"method": "mse"},
        {"form": "tensorrt"},
    ],
    ids=str,
)
def test_int8_agrees_with_float(cases: dict[str, Case], name: str, options: dict[str, Any]) -> None:
    _, path, count = cases[name].quantized(**options)
    assert count >= 4
    assert cases[name].cosine(path) > 0.99


def test_resnet_agrees_and_its_tensorrt_form_too(cases: dict[str, Case]) -> None:
    for options in ({"reduce_range": True}, {"form": "tensorrt"}):
        _, path, count = cases["resnet18"].quantized(**options)
        assert count >= 21
        assert cases["resnet18"].cosine(path) > 0.99


def test_file_is_smaller_and_runs_at_other_batch_sizes(cases: dict[str, Case]) -> None:
    case = cases["resnet18"]
    _, path, _ = case.quantized()
    assert path.stat().st_size < 0.3 * case.path.stat().st_size
    feed = next(case.data.comparison())
    session = OnnxSession(path)
    whole = session.run(feed)[0]
    one = session.run({name: array[:1] for name, array in feed.items()})[0]
    assert one == pytest.approx(whole[:1], rel=1e-3, abs=1e-3)


def test_nothing_floats_between_int8_nodes(cases: dict[str, Case], residual: Case) -> None:
    _, path, _ = residual.quantized()
    found = fused(path)
    assert found["QLinearConv"] == 3
    assert found["QLinearAdd"] == found["QLinearGlobalAveragePool"] == found["QGemm"] == found["QuantizeLinear"] == 1
    assert not found["DequantizeLinear"] + found["Relu"] + found["Conv"] + found["Add"]
    _, path, _ = cases["test_efficientnet"].quantized()
    found = fused(path)
    assert found["QLinearSigmoid"] == found["QLinearMul"] == 13
    assert not found["DequantizeLinear"] + found["Sigmoid"] + found["Mul"]


def conv_names(case: Case) -> list[str]:
    return [node.name for node in onnx.load(case.path).graph.node if node.op_type == "Conv"]


def test_means_whose_output_has_no_shape_written_down() -> None:
    x = helper.make_tensor_value_info("x", 1, ["n", 4, 6, 6])
    y = onnx.ValueInfoProto(name="y")
    axes = numpy_helper.from_array(np.array([2, 3]), "axes")
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], name="mean", keepdims=0),
        helper.make_node("Relu", ["m"], ["y"], name="relu"),
    ]
    graph = helper.make_graph(nodes, "g", [x], [y], [axes])
    _pool_means(graph)
    assert [node.op_type for node in graph.node] == ["GlobalAveragePool", "Flatten", "Relu"]
    assert not graph.value_info


class Tapped(nn.Module):
    """A float node's value is an output too, and is read by a float node and by a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        middle = torch.erf(self.one(x))
        return middle, self.two(middle), torch.sin(middle)


def test_an_output_is_float_and_its_int8_readers_stay_int8(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, data = Tapped().eval(), torch.randn(16, 3, 12, 12)
    source, prepared, path = (tmp_path / f"{name}.onnx" for name in ("source", "prepared", "int8"))
    inputs = Inputs.of(data[:2])
    with torch.no_grad():
        names = names_for(model, inputs, inputs.call(model), None, ["middle", "two", "sine"])
    write_float(model, inputs, source, names=names, dynamic=True, opset=None)
    prepare(source, prepared)
    for form in ("tensorrt", "cpu"):
        statistics = calibrate(prepared, [{"x": data.numpy()}], calibration_tensors(prepared, form=form))
        assert quantize_static(prepared, path, statistics, form=form) == 2
        onnx.checker.check_model(str(path), full_check=True)
        graph = onnx.load(path).graph
        makers = {name: node for node in graph.node for name in node.output}
        by_op = {node.op_type: node for node in graph.node}
        assert makers["middle"].op_type == "Erf"
        assert by_op["Sin"].input[0] == "middle"
        convolutions = [node for node in graph.node if node.op_type == "Conv"]
        assert {makers[node.input[0]].op_type for node in convolutions} == {"DequantizeLinear"}
        with torch.no_grad():
            expected = model(data)
        plain = onnxruntime.SessionOptions()
        plain.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # as in `exactly`
        session = onnxruntime.InferenceSession(str(path), plain, providers=["CPUExecutionProvider"])
        for ours, theirs in zip(session.run(None, {"x": data.numpy()}), expected, strict=True):
            assert np.linalg.norm(ours - theirs.numpy()) < 0.05 * np.linalg.norm(theirs.numpy())
    run = fused(path)
    assert (run["QLinearConv"], run["Conv"]) == (2, 0)


def test_only_the_named_nodes_are_quantized(residual: Case) -> None:
    names = conv_names(residual)
    model, path, count = residual.quantized(nodes=names[1:2])
    assert count == 1
    quantized = fused(path)
    assert quantized["QLinearConv"] == 1
    makers = {name: node for node in model.graph.node for name in node.output}
    weights = [makers.get(node.input[1]) for node in model.graph.node if node.op_type == "Conv"]
    assert sum(maker is not None for maker in weights) == 1
    # The float neighbours read floats: the residual add does not see the rounding of the convolution's input.
    add = next(node for node in model.graph.node if node.op_type == "Add")
    assert makers[add.input[1]].op_type == "MaxPool"


def test_two_named_neighbours_share_what_is_between(residual: Case) -> None:
    names = conv_names(residual)
    _, path, count = residual.quantized(nodes=names[:2])
    assert count == 3  # the MaxPool between them; the Relus went into the convolutions
    found = fused(path)
    assert found["QLinearConv"] == 2
    assert found["QuantizeLinear"] == 1  # of the file's input only


def test_no_nodes_leave_the_file_as_it_is(residual: Case) -> None:
    model, path, count = residual.quantized(nodes=[])
    assert count == 0
    assert "QuantizeLinear" not in kinds(model.graph)
    assert residual.cosine(path) == pytest.approx(1.0)


def test_last_layer_gives_floats(residual: Case) -> None:
    model, path, _ = residual.quantized()
    last = next(node for node in model.graph.node if model.graph.output[0].name in node.output)
    assert last.op_type == "Gemm"
    outputs = OnnxSession(path).run(next(residual.data.comparison()))[0]
    assert len(np.unique(outputs)) > 0.9 * outputs.size


def test_weights_are_per_channel_and_in_seven_bits_where_asked(residual: Case) -> None:
    for options, most, scales in (
        ({}, 127, 8),
        ({"reduce_range": True}, 64, 8),
        ({"per_channel": False}, 127, 1),
    ):
        graph = residual.quantized(**options)[0].graph
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        makers = {name: node for node in graph.node for name in node.output}
        for node in graph.node:
            if node.op_type == "Conv":
                stored, scale = (tensors[name] for name in makers[node.input[1]].input[:2])
                assert stored.dtype == np.int8
                assert np.abs(stored.astype(int)).max() == most
                assert scale.size == scales


def test_tensorrt_form(cases: dict[str, Case]) -> None:
    model, _, count = cases["resnet18"].quantized(form="tensorrt")
    graph = model.graph
    assert model.opset_import[0].version >= 13
    assert count == 21
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {name: node for node in graph.node for name in node.output}
    readers = Counter(name for node in graph.node for name in node.input)
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = tensors[node.input[2]]
            assert zero.dtype == np.int8
            assert not zero.any()
            assert readers[node.output[0]] == 1  # nothing shares a pair
        if node.op_type in ("Conv", "Gemm"):
            assert [makers[name].op_type for name in node.input[:2]] == ["DequantizeLinear"] * 2
            assert tensors[makers[node.input[1]].input[1]].size == tensors[node.input[2]].size  # a scale a channel
            assert tensors[node.input[2]].dtype == np.float32
        if node.op_type == "Relu":
            assert makers[node.input[0]].op_type in ("Conv", "Add")  # nothing in the way of fusion
        if node.op_type == "Add":
            assert sorted(makers[name].op_type for name in node.input) == ["Conv", "DequantizeLinear"]


def test_methods_give_other_scales_from_one_calibration(residual: Case) -> None:
    first = {}
    for method in ("minmax", "percentile", "mse", "entropy"):
        graph = residual.quantized(method=method)[0].graph
        tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        quantize = next(node for node in graph.node if node.op_type == "QuantizeLinear")
        first[method] = float(tensors[quantize.input[1]])
    assert len(set(first.values())) > 2
    assert max(first.values()) == first["minmax"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "median"}, "no such calibration method"),
        ({"form": "openvino"}, "no such form"),
        ({"activations": "int4"}, "no such type of activations"),
        ({"weights": "fp8"}, "no such type of weights"),
        ({"nodes": ["nowhere"]}, "no such nodes.*nowhere"),
    ],
)
def test_bad_options(residual: Case, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        residual.quantized(**options)


def test_bad_files(residual: Case, tmp_path: Path) -> None:
    softmax = tmp_path / "softmax.onnx"
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Softmax", ["x"], ["y"], name="s")], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), softmax)
    with pytest.raises(InputError, match=r"no int8 form.*Softmax"):
        quantize_static(softmax, tmp_path / "q.onnx", Statistics({}), nodes=["s"])
    with pytest.raises(InputError, match="no calibration figures"):
        quantize_static(residual.path, tmp_path / "q.onnx", Statistics({}))
    assert not (tmp_path / "q.onnx").exists()
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(residual.source.read_bytes()[:900])
    with pytest.raises(ExportError, match="cannot prepare"):
        prepare(cut, tmp_path / "p.onnx")


# Biases.


def test_bias_correction_gives_the_float_means(residual: Case, tmp_path: Path) -> None:
    _, path, _ = residual.quantized(per_channel=False, reduce_range=True)
    corrected = tmp_path / "corrected.onnx"
    found = correct_biases(residual.path, path, corrected, residual.data)
    assert (found.corrected, found.skipped) == (4, 0)
    assert found.after == pytest.approx(output_errors(residual.path, [corrected], residual.data.comparison())[0])
    assert found.to_dict()["helped"] == (found.after < found.before)
    assert "4 biases" in str(found)
    feed = next(residual.data.calibration())
    goal, before, after = (exactly(file, feed).mean(0) for file in (residual.path, path, corrected))
    assert np.abs(goal - after).max() < 0.2 * np.abs(goal - before).max()
    assert fused(corrected) == fused(path)


def test_bias_correction_helps_where_rounding_shifts_means(cases: dict[str, Case], tmp_path: Path) -> None:
    case = cases["test_efficientnet"]
    _, path, _ = case.quantized(reduce_range=True)
    found = correct_biases(case.path, path, tmp_path / "corrected.onnx", case.data)
    assert found.helped


@pytest.mark.parametrize("options", [{"rows": 0}, {"rows": -1}, {"rows": 1.5}])
def test_bad_bias_correction(residual: Case, tmp_path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="positive"):
        correct_biases(residual.path, residual.path, tmp_path / "c.onnx", residual.data, **options)


# Formats.


@pytest.mark.parametrize(
    ("instructions", "system", "expected"),
    [
        (("avx2", "avx_vnni"), "Linux 6.1 x86_64", ("uint8", "int8", False)),
        (("avx2", "avx512f", "avx512_vnni"), "Linux 6.1 x86_64", ("uint8", "int8", False)),
        (("avx2",), "Linux 6.1 x86_64", ("uint8", "int8", True)),
        (("asimd", "asimddp"), "Linux 6.1 aarch64", ("int8", "int8", False)),
        ((), "Darwin 24.1 arm64", ("int8", "int8", False)),
        ((), "Windows 11 AMD64", ("uint8", "int8", True)),
    ],
)
def test_format_for_a_processor(instructions: tuple[str, ...], system: str, expected: tuple[str, str, bool]) -> None:
    here = replace(machine(), instructions=instructions, system=system)
    assert best_format(here)[:3] == expected
    nearer = [HALF_UNSIGNED, UNSIGNED] if expected[2] else []  # where no bit is left out there is nothing to mend
    assert [each for _, each in exact_formats(best_format(here))] == nearer


def test_the_range_behind_an_activation_counts_where_a_float_node_reads_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Softmax(1)).eval()
    path = tt.export_onnx(model, torch.zeros(1, 3, 4, 4), tmp_path / "a.onnx", benchmark=False).path
    prepare(path, tmp_path / "p.onnx")
    graph = onnx.load(tmp_path / "p.onnx").graph
    relu = next(node for node in graph.node if node.op_type == "Relu")
    assert relu.name in int8_nodes(graph)


def test_depthwise_weights_keep_their_eighth_bit_and_do_not_saturate(tmp_path: Path) -> None:
    """All weights and values at the ends of their ranges, where 16-bit sums of 8-bit products would saturate."""
    model = nn.Conv2d(16, 16, 3, padding=1, groups=16)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[::2] = -1.0
    source, path, int8 = (tmp_path / f"{name}.onnx" for name in ("float", "prepared", "int8"))
    inputs = Inputs.of(torch.ones(2, 16, 8, 8))
    with torch.no_grad():
        names = names_for(model, inputs, inputs.call(model), None, None)
    write_float(model, inputs, source, names=names, dynamic=True, opset=None)
    prepare(source, path)
    data = CalibrationData.spool([torch.ones(16, 16, 8, 8)], model, path, tmp_path / "data")
    statistics = calibrate(path, data.calibration(), calibration_tensors(path))
    for options in ({"reduce_range": True}, {"weights": "uint8"}):
        quantize_static(path, int8, statistics, **options)
        weights = [
            numpy_helper.to_array(each) for each in onnx.load(int8).graph.initializer if each.dims == [16, 1, 3, 3]
        ]
        assert [(each.dtype, int(abs(each.astype(int)).max())) for each in weights] == [(np.int8, 127)]
        feed = next(data.comparison())
        fused = onnxruntime.InferenceSession(str(int8), providers=["CPUExecutionProvider"]).run(None, feed)[0]
        assert np.abs(fused - exactly(int8, feed)).max() < 0.1  # one step of the output is 0.07


def weights_of(model: onnx.ModelProto) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """The weights of the convolutions and products of a file, as they are stored, and their zero points."""
    held = {each.name: numpy_helper.to_array(each) for each in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    pairs = [makers[node.input[1]].input for node in model.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    return [(held[pair[0]], held[pair[2]]) for pair in pairs]


@pytest.mark.parametrize("per_channel", [True, False])
def test_a_share_of_the_multiplications_keeps_eight_bits(residual: Case, per_channel: bool) -> None:
    types: list[set[Any]] = []
    close = []
    for exact in (0.0, 0.5, 1.0):
        model, path, _ = residual.quantized(reduce_range=True, exact=exact, per_channel=per_channel)
        held = weights_of(model)
        types.append({stored.dtype.name for stored, _ in held})
        assert all(np.unique(zero).size == 1 for _, zero in held)  # several are refused by ONNX Runtime 1.24
        close.append(residual.cosine(path))
        feed = next(residual.data.comparison())
        fused = OnnxSession(path).run(feed)[0]
        assert np.abs(fused - exactly(path, feed)).max() < 0.03 * np.abs(fused).max()
    assert types == [{"int8"}, {"int8", "uint8"}, {"uint8"}]
    assert close[0] < close[2] and close[1] > 0.99


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_is_between_nothing_and_all(residual: Case, share: float) -> None:
    with pytest.raises(InputError, match="no share of the multiplications"):
        residual.quantized(reduce_range=True, exact=share)


class Odd(nn.Module):
    """A channel of nothing with a bias, and a product with one column."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.column = nn.Parameter(torch.randn(8))
        with torch.no_grad():
            self.conv.weight[2] *= 1e-9
            self.conv.weight[3] = 0.0
            self.conv.bias[2:4] = 2.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.conv(x).relu().mean((2, 3)) @ self.column)[:, None]


@pytest.mark.parametrize(
    "options", [{"reduce_range": True, "exact": 1.0}, {"weights": "uint8"}, {"reduce_range": True}]
)
def test_channels_of_nothing_keep_their_bias(tmp_path: Path, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    source, path, int8 = (tmp_path / f"{name}.onnx" for name in ("float", "prepared", "int8"))
    model, data = Odd().eval(), torch.randn(16, 3, 8, 8)
    inputs = Inputs.of(data[:2])
    with torch.no_grad():
        names = names_for(model, inputs, inputs.call(model), None, None)
    write_float(model, inputs, source, names=names, dynamic=True, opset=None)
    prepare(source, path)
    spooled = CalibrationData.spool([data], model, path, tmp_path / "data")
    quantize_static(path, int8, calibrate(path, spooled.calibration(), calibration_tensors(path)), **options)
    written = onnx.load(int8)
    stored, zero = next(pair for pair in weights_of(written) if pair[0].ndim == 4)
    assert stored.dtype == np.int8 and np.unique(zero).size == 1
    with torch.no_grad():
        right = model(data).numpy()
    found = OnnxSession(int8).run({names.inputs[0]: data.numpy()})[0]
    assert np.abs(found - right).max() < 0.05 * np.abs(right).max()


class Stacked(nn.Module):
    """A product with several matrices at once, as gemma4's table of positions and grouped layers have it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(6, 4)
        self.several = nn.Parameter(torch.randn(2, 8, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last((self.first(x) @ self.several).relu())


@pytest.mark.parametrize(("scheme", "nodes"), [("static", 3), ("dynamic", 2), ("mixed", None)])
def test_weights_that_are_no_matrix(scheme: str, nodes: int | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, data = Stacked().eval(), list(torch.randn(4, 8, 2, 5, 8))
    found = tt.export_onnx(net, data[0], tmp_path / "net.onnx", quantize=scheme, data=data, benchmark=False)
    assert found.verification is not None
    assert found.verification.passed
    assert nodes is None or found.quantized_nodes == nodes
