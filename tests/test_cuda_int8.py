"""Files for a GPU: no node falls back by the table, and the numbers hold where the CPU provider computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import timm
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError
from torchtrim.export.bfloat16 import to_bfloat16, widen_bfloat16
from torchtrim.export.cuda_int8 import quantize_for_cuda
from torchtrim.export.graph import names_for, write_float
from torchtrim.export.kernels import unsupported
from torchtrim.export.quantize import to_float16
from torchtrim.export.stand_in import run_once
from torchtrim.export.weight_only import quantize_weights
from torchtrim.graph.inputs import Inputs

MODELS = {"test_resnet": 1, "test_vit": 9, "test_convnext": 9}  # and how many products with constant weights each has


SHALLOW: dict[str, dict[str, Any]] = {"test_vit": {"depth": 2}, "test_convnext": {"depths": (1, 1, 1, 1)}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The float files of three small networks, with random weights and biases."""
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    made = {}
    for name in MODELS:
        model = timm.create_model(name, num_classes=40, **SHALLOW.get(name, {})).eval()
        for parameter in model.parameters():
            if parameter.dim() == 1:
                torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
        size = model.pretrained_cfg["input_size"] if name == "test_vit" else (3, 64, 64)
        inputs = Inputs.of(torch.randn(2, *size))
        made[name] = folder / f"{name}.onnx"
        names = names_for(model, inputs, run_once(model, inputs), None, None)
        write_float(model, inputs, made[name], names=names, dynamic=True, opset=None)
    return made


def run(path: Path, feed: dict[str, NDArray[Any]]) -> NDArray[Any]:
    return OnnxSession(path, threads=1).run(feed)[0]


def noise(path: Path, batch: int = 3) -> dict[str, NDArray[Any]]:
    session = OnnxSession(path)
    return session.feed(session.random_inputs(batch))


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    a, b = a.astype(np.float64).ravel(), b.astype(np.float64).ravel()
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


@pytest.mark.parametrize("name", MODELS)
def test_dynamic_int8_for_cuda(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "int8.onnx"
    assert quantize_for_cuda(files[name], path) == MODELS[name] == ops(path).count("MatMulInteger")
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert unsupported(model, "cuda") == []
    assert "DynamicQuantizeLinear" not in ops(path)
    feed = noise(files[name])
    assert cosine(run(files[name], feed), run(path, feed)) > 0.999
    weights = {tensor.name: tensor.data_type for tensor in model.graph.initializer if "conv" in tensor.name}
    assert set(weights.values()) <= {TensorProto.FLOAT16}
    assert [item.name for item in tmp_path.iterdir()] == ["int8.onnx"]


@pytest.mark.parametrize("name", MODELS)
def test_half_and_weight_only_for_cuda(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    half, small = tmp_path / "half.onnx", tmp_path / "small.onnx"
    to_float16(files[name], half)
    onnx.checker.check_model(onnx.load(half), full_check=True)
    count = quantize_weights(half, small, bits=8, block=32)
    assert count == ops(small).count("MatMulNBits") >= 1
    for path in (half, small):
        assert unsupported(onnx.load(path), "cuda") == []
    assert unsupported(onnx.load(half), "tensorrt") == []
    feed = noise(files[name])
    assert cosine(run(files[name], feed), run(half, feed)) > 0.9999
    assert small.stat().st_size < half.stat().st_size


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_bfloat16_computes_what_its_wide_form_says(name: str, files: dict[str, Path], tmp_path: Path) -> None:
    path, wide = tmp_path / "bf16.onnx", tmp_path / "wide.onnx"
    assert to_bfloat16(files[name], path) >= MODELS[name]
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert unsupported(model, "cuda") == []
    assert path.stat().st_size < 0.75 * files[name].stat().st_size
    widen_bfloat16(path, wide)
    onnx.checker.check_model(onnx.load(wide), full_check=True)
    feed = noise(files[name], 1)
    exact, found = run(files[name], feed), run(wide, feed)
    assert cosine(exact, found) > 0.999
    assert np.abs(exact - found).max() > 1e-4 * np.abs(exact).max()  # it rounds, indeed
    # The reference evaluator rounds inside its sums too, and so is a little further away.
    (reference,) = onnx.reference.ReferenceEvaluator(str(path)).run(None, feed)
    assert cosine(found, reference) > 0.999


def test_convolutions_in_bfloat16_need_opset_22(files: dict[str, Path], tmp_path: Path) -> None:
    model = onnx.load(files["test_resnet"])
    assert to_bfloat16(files["test_resnet"], tmp_path / "old.onnx", target="tensorrt") == 1
    model.opset_import[0].version = 22  # nothing that it holds changed its meaning
    onnx.save(model, tmp_path / "new.onnx")
    assert to_bfloat16(tmp_path / "new.onnx", tmp_path / "out.onnx", target="tensorrt") == 16
    with pytest.raises(ExportError, match=r"MaxPool .*no kernel for version 22"):
        to_bfloat16(tmp_path / "new.onnx", tmp_path / "out.onnx", target="cuda")


def test_bfloat16_where_nothing_can(tmp_path: Path) -> None:
    path = single(tmp_path, helper.make_node("Exp", ["x"], ["y"], name="exp"), {}, (2, 4))
    with pytest.raises(ExportError, match="no node of the file can compute in bfloat16"):
        to_bfloat16(path, tmp_path / "out.onnx")


def single(
    folder: Path, node: onnx.NodeProto, weights: dict[str, NDArray[Any]], shape: tuple[int, ...], opset: int = 20
) -> Path:
    """A file of one node that turns `x` into `y`."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()]
    graph = helper.make_graph([node], "one", [x], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    path = folder / "one.onnx"
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("opset", [17, 18, 19, 21])
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (2, 3, 5, 16)])
def test_activations_of_any_rank_and_opset(half: bool, opset: int, shape: tuple[int, ...], tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    path = single(tmp_path, node, {"w": RANDOM.standard_normal((16, 8))}, shape, opset)
    out = tmp_path / "int8.onnx"
    assert quantize_for_cuda(path, out, half=half) == 1
    onnx.checker.check_model(onnx.load(out), full_check=True)
    x = RANDOM.standard_normal(shape).astype(np.float32)
    expected, found = run(path, {"x": x}), run(out, {"x": x})
    assert expected.shape == found.shape
    assert np.abs(expected - found).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("half", [False, True])
def test_zeros_and_tiny_and_large_inputs(half: bool, tmp_path: Path) -> None:
    weights = {"w": RANDOM.standard_normal((16, 8)), "b": RANDOM.standard_normal(8)}
    weights["w"][:, 3] = 0  # a channel of zeros has a scale too
    path = single(tmp_path, helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="gemm"), weights, (4, 16))
    out = tmp_path / "int8.onnx"
    assert quantize_for_cuda(path, out, half=half) == 1
    zeros = run(out, {"x": np.zeros((4, 16), np.float32)})
    np.testing.assert_allclose(zeros, np.tile(weights["b"], (4, 1)), atol=1e-3)
    for size in (1e-4, 1e-2, 1e2, 6e3):
        x = (size * RANDOM.standard_normal((4, 16))).astype(np.float32)
        exact, found = (run(file, {"x": x}) - weights["b"] for file in (path, out))
        allowed = 0.03 * np.abs(exact).max() + (2e-3 if half else 0)  # float16's own step beside the bias
        assert np.abs(exact - found).max() < allowed


@pytest.mark.parametrize(("k", "n"), [(15, 8), (16, 7), (18, 8), (16, 6)])
def test_odd_widths_stay_in_half_precision(k: int, n: int, tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    path = single(tmp_path, node, {"w": RANDOM.standard_normal((k, n))}, (3, k))
    out = tmp_path / "int8.onnx"
    assert quantize_for_cuda(path, out) == 0
    assert "MatMul" in ops(out)
    x = RANDOM.standard_normal((3, k)).astype(np.float32)
    np.testing.assert_allclose(run(out, {"x": x}), run(path, {"x": x}), atol=0.02)


def test_gemm_with_everything(tmp_path: Path) -> None:
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], name="gemm", transB=1, alpha=0.5, beta=2.0)
    weights = {"w": RANDOM.standard_normal((8, 16)), "b": RANDOM.standard_normal((1, 8))}
    path = single(tmp_path, node, weights, (3, 16))
    out = tmp_path / "int8.onnx"
    assert quantize_for_cuda(path, out, half=False) == 1
    x = RANDOM.standard_normal((3, 16)).astype(np.float32)
    expected = run(path, {"x": x})
    assert np.abs(expected - run(out, {"x": x})).max() < 0.02 * np.abs(expected).max()
    turned = single(tmp_path, helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), {"w": np.ones((4, 8))}, (4, 3))
    assert quantize_for_cuda(turned, out) == 0


def test_one_scale_for_each_channel_is_nearer(tmp_path: Path) -> None:
    weight = RANDOM.standard_normal((32, 16)) * np.logspace(-3, 0, 16)
    path = single(tmp_path, helper.make_node("MatMul", ["x", "w"], ["y"]), {"w": weight}, (8, 32))
    x = RANDOM.standard_normal((8, 32)).astype(np.float32)
    expected = run(path, {"x": x})
    errors = []
    for per_channel in (True, False):
        quantize_for_cuda(path, tmp_path / "out.onnx", per_channel=per_channel, half=False)
        found = run(tmp_path / "out.onnx", {"x": x})
        errors.append(float((np.abs(expected - found) / np.abs(expected).max(0)).max()))
    assert errors[0] < 0.03 < errors[1]


def test_products_of_two_activations_stay_and_one_activation_is_quantized_once(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["q"], name="q"),
        helper.make_node("MatMul", ["x", "w"], ["k"], name="k"),
        helper.make_node("Transpose", ["k"], ["t"], name="t", perm=[1, 0]),
        helper.make_node("MatMul", ["q", "t"], ["y"], name="scores"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (4, 16))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (4, 4))
    weight = numpy_helper.from_array(RANDOM.standard_normal((16, 8)).astype(np.float32), "w")
    graph = helper.make_graph(nodes, "attention", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), tmp_path / "in.onnx")
    assert quantize_for_cuda(tmp_path / "in.onnx", tmp_path / "out.onnx") == 2
    found = ops(tmp_path / "out.onnx")
    assert (found.count("MatMul"), found.count("QuantizeLinear"), found.count("MatMulInteger")) == (1, 1, 2)
    stored = list(onnx.load(tmp_path / "out.onnx").graph.initializer)
    assert sum(tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2 for tensor in stored) == 1


def test_a_node_without_a_kernel_is_refused_by_name(tmp_path: Path) -> None:
    path = single(tmp_path, helper.make_node("Acos", ["x"], ["y"], name="angle"), {}, (2, 4))
    with pytest.raises(ExportError, match=r"Acos \(angle\): the CUDA provider has no kernel"):
        quantize_for_cuda(path, tmp_path / "out.onnx")
