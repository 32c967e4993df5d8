"""Weights alone in int8 or int4: near, smaller, and only those that were asked for."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError, InputError
from torchtrim.export.kernels import unsupported
from torchtrim.export.quantize import to_float16
from torchtrim.export.weight_only import quantize_weights

RANDOM = np.random.default_rng(0)
EVERY = ("MatMul", "Gemm", "Conv", "Gather")


def weight(*shape: int) -> NDArray[np.float32]:
    return RANDOM.standard_normal(shape).astype(np.float32)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return network(tmp_path / "net.onnx", opset=21)


def network(path: Path, opset: int) -> Path:
    """An embedding, a convolution, two products of the same weights, one of activations, a Gemm, and a small one."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["e"], name="embed"),  # (B, 16, 64)
        helper.make_node("Conv", ["e", "kernel"], ["c"], name="conv"),  # (B, 48, 64)
        helper.make_node("MatMul", ["c", "w"], ["m"], name="mix"),
        helper.make_node("MatMul", ["m", "w"], ["n"], name="again"),
        helper.make_node("Transpose", ["n"], ["t"], name="turn", perm=[0, 2, 1]),
        helper.make_node("MatMul", ["m", "t"], ["s"], name="scores"),  # (B, 48, 48)
        helper.make_node("ReduceMean", ["s", "axis"], ["p"], name="pool", keepdims=0),
        helper.make_node("Gemm", ["p", "g", "b"], ["h"], name="head", transB=1, alpha=0.5),
        helper.make_node("MatMul", ["h", "small"], ["y"], name="last"),
    ]
    weights = {
        "table": weight(100, 64),
        "kernel": 0.2 * weight(48, 16, 3)[:, :, :1],
        "w": 0.1 * weight(64, 64),
        "g": weight(96, 48),
        "b": weight(96),
        "small": weight(96, 5),
    }
    stored = [numpy_helper.from_array(np.ascontiguousarray(array), name) for name, array in weights.items()]
    stored.append(numpy_helper.from_array(np.array([1]), "axis"))
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ("batch", 16))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ("batch", 5))
    graph = helper.make_graph(nodes, "net", [ids], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def run(path: Path, batch: int = 3) -> NDArray[Any]:
    ids = np.random.default_rng(batch).integers(0, 100, (batch, 16))
    return OnnxSession(path, threads=1).run({"ids": ids})[0]


def cosine(a: Path, b: Path) -> float:
    x, y = (run(path).astype(np.float64).ravel() for path in (a, b))
    return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def ops(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(path).graph.node]


def stored(path: Path) -> dict[str, onnx.TensorProto]:
    return {tensor.name: tensor for tensor in onnx.load(path).graph.initializer}


@pytest.mark.parametrize(("bits", "symmetric", "least"), [(8, True, 0.9999), (8, False, 0.9999), (4, True, 0.98)])
def test_onnx_runtimes_own_form(bits: int, symmetric: bool, least: float, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert quantize_weights(file, out, bits=bits, block=32, symmetric=symmetric) == 3
    assert ops(out).count("MatMulNBits") == 3
    assert ops(out).count("MatMul") == 2  # the product of two activations, and the small one
    assert unsupported(onnx.load(out), "cuda") == []
    assert cosine(file, out) > least
    assert out.stat().st_size < file.stat().st_size


def test_a_smaller_block_is_nearer_in_four_bits(file: Path, tmp_path: Path) -> None:
    found = []
    for block in (16, 64, 256):
        quantize_weights(file, tmp_path / "out.onnx", bits=4, block=block)
        found.append((cosine(file, tmp_path / "out.onnx"), (tmp_path / "out.onnx").stat().st_size))
    assert found[0][0] > found[1][0] >= found[2][0]
    assert found[0][1] > found[1][1]


def test_standard_form_in_eight_bits(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert quantize_weights(file, out, form="qdq", ops=EVERY) == 3  # the kernel is below 4 KB
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert ops(out).count("DequantizeLinear") == 3  # once for the weights that two nodes share
    for target in ("cuda", "tensorrt"):
        assert unsupported(onnx.load(out), target) == []
    small = [tensor for tensor in stored(out).values() if tensor.data_type == TensorProto.INT8]
    assert sorted(tuple(tensor.dims) for tensor in small) == [(64, 64), (96, 48), (100, 64)]
    assert cosine(file, out) > 0.9995
    assert out.stat().st_size < 0.4 * file.stat().st_size


def test_only_the_operators_asked_for(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert quantize_weights(file, out, form="qdq", ops="Gather") == 1
    assert quantize_weights(file, out, ops="Gemm") == 1
    assert ops(out).count("MatMul") == 4
    assert quantize_weights(file, out, ops=["MatMul"]) == 2
    assert "Gemm" in ops(out)


def test_standard_form_in_four_bits(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    assert quantize_weights(file, out, bits=4, form="qdq", ops=EVERY) == 3
    onnx.checker.check_model(onnx.load(out), full_check=True)
    for target in ("cuda", "tensorrt"):
        assert unsupported(onnx.load(out), target) == []
    kinds = {name: tensor.data_type for name, tensor in stored(out).items()}
    assert sorted(name for name, kind in kinds.items() if kind == TensorProto.INT4) == ["g_int4", "w_int4"]
    blocks = [entry.i for node in onnx.load(out).graph.node for entry in node.attribute if entry.name == "block_size"]
    assert sorted(blocks) == [16, 64]  # 128 is halved until it divides 48, and 64
    assert cosine(file, out) > 0.98


def test_every_number_of_an_int4_file_is_a_step_of_its_block(tmp_path: Path) -> None:
    matrix = weight(32, 64)
    matrix[:16, 0] = 0  # a block of zeros has a scale too
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, (32, 32))
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, (32, 64))
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="product")
    graph = helper.make_graph([node], "g", [x], [y], [numpy_helper.from_array(matrix, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.save(model, tmp_path / "in.onnx")
    assert quantize_weights(tmp_path / "in.onnx", tmp_path / "out.onnx", bits=4, block=16, form="qdq") == 1
    (found,) = OnnxSession(tmp_path / "out.onnx").run({"x": np.eye(32, dtype=np.float32)})
    largest = np.abs(matrix.reshape(2, 16, 64)).max(axis=1, keepdims=True).repeat(16, axis=1).reshape(32, 64)
    assert np.all(np.abs(found - matrix) <= largest / 14 + 1e-6)
    assert np.all(found[:16, 0] == 0)


def test_half_precision_files(file: Path, tmp_path: Path) -> None:
    half, out = tmp_path / "half.onnx", tmp_path / "out.onnx"
    to_float16(file, half)
    for form in ("nbits", "qdq"):
        assert quantize_weights(half, out, form=form, block=32) == (3 if form == "nbits" else 2)
        assert unsupported(onnx.load(out), "cuda") == []
        assert cosine(file, out) > 0.999
        assert out.stat().st_size < half.stat().st_size


def test_weights_that_whole_blocks_would_make_larger_stay(file: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.onnx"
    to_float16(file, half)
    assert quantize_weights(half, tmp_path / "out.onnx", block=128) == 0  # columns of 48 and 64
    assert quantize_weights(half, tmp_path / "out.onnx", block=128, bits=4) == 3


def test_weights_beside_the_file(file: Path, tmp_path: Path) -> None:
    for form in ("nbits", "qdq"):
        out = tmp_path / form / "out.onnx"
        out.parent.mkdir()
        quantize_weights(file, out, form=form, external_data=True)
        assert (out.parent / "out.onnx.data").is_file()
        assert cosine(file, out) > 0.999


def test_four_bits_need_a_late_opset(tmp_path: Path) -> None:
    path = network(tmp_path / "old.onnx", opset=20)
    with pytest.raises(ExportError, match=r"later opset \(found: 20; expected: 21 or more\)"):
        quantize_weights(path, tmp_path / "out.onnx", bits=4, form="qdq")
    assert not (tmp_path / "out.onnx").exists()
    assert quantize_weights(path, tmp_path / "out.onnx", bits=4) == 3


def test_the_programs_logging_is_left_alone(file: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with caplog.at_level(logging.INFO):
        quantize_weights(file, tmp_path / "out.onnx")
    assert (root.handlers, root.level) == (handlers, level)
    assert not [record for record in caplog.records if "matmul_nbits" in record.name]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 3}, InputError, "8 bits or 4"),
        ({"bits": True}, InputError, "8 bits or 4"),
        ({"block": 24}, InputError, "power of two"),
        ({"block": 8}, InputError, "power of two"),
        ({"block": 512}, InputError, "at most 256"),
        ({"form": "gguf"}, InputError, "nbits or qdq"),
        ({"form": "qdq", "symmetric": False}, InputError, "zero points"),
        ({"ops": "Conv"}, ExportError, "no form 'nbits'"),
        ({"ops": ()}, ExportError, "none"),
        ({"form": "qdq", "ops": ("LSTM",)}, ExportError, "LSTM"),
    ],
)
def test_what_cannot_be_asked(options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        quantize_weights(tmp_path / "none.onnx", tmp_path / "out.onnx", **options)
