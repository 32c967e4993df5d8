"""The tables of GPU kernels, the nodes that are not in them, and what each target takes."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from torchtrim.bench.openvino_session import OPENVINO
from torchtrim.errors import ExportError, MissingDependency
from torchtrim.export.kernels import Unsupported, has_kernel, refuse_unsupported, takes, tensorrt_types, unsupported
from torchtrim.export.targets import TARGETS, installed, require, resolve, run_on

FLOAT, HALF, INT8, UINT8 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT8, TensorProto.UINT8


def model_of(
    *nodes: onnx.NodeProto, opset: int = 20, dtype: int = FLOAT, shape: tuple[int, ...] = (1, 4, 8, 8), **weights: Any
) -> onnx.ModelProto:
    x = helper.make_tensor_value_info("x", dtype, shape)
    y = helper.make_tensor_value_info("y", TensorProto.UNDEFINED, None)
    y.type.ClearField("value")
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    graph = helper.make_graph(list(nodes), "g", [x], [y], stored)
    domains = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=domains, ir_version=10)


def node(op: str, *inputs: str, name: str = "it", outputs: tuple[str, ...] = ("y",), **attributes: Any) -> Any:
    return helper.make_node(op, inputs or ("x",), outputs, name=name, **attributes)


def reasons(model: onnx.ModelProto, target: str) -> list[str]:
    return [str(entry) for entry in unsupported(model, target)]


def test_facts_of_the_cuda_table() -> None:
    assert has_kernel("cuda", "Conv", 18)
    assert has_kernel("cuda", "MatMul", 13, "bfloat16")
    assert has_kernel("cuda", "MatMulInteger", 20, "int8")
    assert not has_kernel("cuda", "MatMulInteger", 20, "uint8")
    assert not has_kernel("cuda", "DynamicQuantizeLinear", 20, "float")
    assert not has_kernel("cuda", "NoSuchOperator", 20)
    # QuantizeLinear takes float16 from version 19 on.
    assert (has_kernel("cuda", "QuantizeLinear", 18), has_kernel("cuda", "QuantizeLinear", 19)) == (False, True)
    assert takes("cuda", "DequantizeLinear", 21, "T1", "int4")
    assert not takes("cuda", "DequantizeLinear", 19, "T1", "int4")
    assert not takes("cuda", "LayerNormalization", 20, "U", "bfloat16")


def test_facts_of_the_tensorrt_table() -> None:
    assert tensorrt_types("Conv") == {"float", "float16", "bfloat16"}
    assert {"int8", "int4"} <= tensorrt_types("DequantizeLinear")
    for op in ("MatMulInteger", "DynamicQuantizeLinear", "QLinearConv", "BitShift"):
        assert not tensorrt_types(op)
    assert has_kernel("tensorrt", "MaxPool", 22) and takes("tensorrt", "Conv", 22, "T", "bfloat16")


def test_every_operator_of_the_tables_is_one_that_onnx_has() -> None:
    from torchtrim.export.kernels import _cuda, _table

    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain == ""}
    # Three that ONNX had when it was young, which TensorRT's parser still reads.
    assert set(_cuda()) <= known
    listed = [op for operators in _table("tensorrt")["operators"].values() for op in operators]
    assert set(listed) <= known
    assert len(listed) == len(set(listed))
    for part in ("constant", "attributes", "inputs", "outputs", "ones", "zeros"):
        assert set(_table("tensorrt")[part]) <= set(listed)
    for target in ("cuda", "tensorrt"):
        assert any(digit in _table(target)["source"] for digit in "0123456789")


def test_an_operator_without_a_kernel_is_named() -> None:
    found = unsupported(model_of(node("Acos", name="angle")), "cuda")
    assert found == [Unsupported("angle", "Acos", "the CUDA provider has no kernel for it")]
    assert reasons(model_of(node("MaxPool", kernel_shape=[2, 2]), opset=22), "cuda") == [
        "MaxPool (it): no kernel for version 22 (it has 12)"
    ]
    grid = model_of(node("GridSample", "x", "grid"), dtype=HALF, grid=np.zeros((1, 2, 2, 2), np.float16))
    assert "no kernel for float16" in reasons(grid, "cuda")[0]
    with pytest.raises(ExportError, match=r"m.onnx: ONNX Runtime's CUDA provider .*Acos \(angle\)") as raised:
        refuse_unsupported(model_of(node("Acos", name="angle")), "cuda", path="m.onnx")
    assert "opset" in str(raised.value.hint)
    refuse_unsupported(model_of(node("Acos", name="angle")), "tensorrt")


def test_operators_of_onnx_runtime_itself() -> None:
    nbits = node("MatMulNBits", "x", "w", "s", domain="com.microsoft", K=16, N=4, bits=4, block_size=16)
    model = model_of(nbits, shape=(3, 16), w=np.zeros((4, 1, 8), np.uint8), s=np.ones(4, np.float32))
    assert unsupported(model, "cuda") == []
    assert "domain 'com.microsoft'" in reasons(model, "tensorrt")[0]
    nbits.attribute[2].i = 3
    odd = model_of(nbits, shape=(3, 16), w=np.zeros((4, 1, 8), np.uint8), s=np.ones(4, np.float32))
    assert reasons(odd, "cuda") == ["MatMulNBits (it): no kernel for 3 bits"]
    for op in ("FusedMatMul", "Attention", "SkipLayerNormalization", "FastGelu"):
        assert unsupported(model_of(node(op, domain="com.microsoft")), "cuda") == []
    assert "float" in reasons(model_of(node("QAttention", domain="com.microsoft")), "cuda")[0]
    assert "in the domain" in reasons(model_of(node("DynamicQuantizeMatMul", domain="com.microsoft")), "cuda")[0]


@pytest.mark.parametrize(
    ("nodes", "options", "reason"),
    [
        ([node("DynamicQuantizeLinear", outputs=("y", "s", "z"))], {}, "parser does not know it"),
        ([node("Relu")], {"opset": 25}, "reads opsets 9 to 24"),
        ([node("And", "x", "x")], {}, "does not take float"),
        ([node("Cast", to=INT8)], {}, "does not cast to int8"),
        ([node("MaxPool", kernel_shape=[2, 2], dilations=[2, 2])], {}, "dilations"),
        ([node("MaxPool", kernel_shape=[2, 2], outputs=("y", "at"))], {}, "first 1 outputs"),
        ([node("LayerNormalization", "x", "s", outputs=("y", "mean"))], {"s": np.ones(8, np.float32)}, "outputs"),
        ([node("Resize", "x", "", "s", mode="cubic")], {"s": np.ones(4, np.float32)}, "mode=cubic"),
        ([node("QuantizeLinear", "x", "s", "z")], {"s": np.float32(1), "z": np.uint8(128)}, "zero point of 0"),
        ([node("Shape", outputs=("a",)), node("ReduceSum", "x", "a")], {}, "input 1 to be a constant"),
    ],
)
def test_what_tensorrt_refuses(nodes: list[onnx.NodeProto], options: dict[str, Any], reason: str) -> None:
    found = reasons(model_of(*nodes, **options), "tensorrt")
    assert len(found) == 1
    assert reason in found[0]


def test_quantized_pairs_in_the_form_that_tensorrt_takes() -> None:
    pair = [node("QuantizeLinear", "x", "s", "z", outputs=("q",)), node("DequantizeLinear", "q", "s", "z")]
    assert unsupported(model_of(*pair, s=np.float32(0.1), z=np.int8(0)), "tensorrt") == []
    assert "uint8" in reasons(model_of(*pair, s=np.float32(0.1), z=np.uint8(0)), "tensorrt")[0]
    bias = node("DequantizeLinear", "b", "s")
    assert "int32" in reasons(model_of(bias, s=np.float32(0.1), b=np.zeros(4, np.int32)), "tensorrt")[0]


def test_branches_are_looked_into() -> None:
    x, y = (helper.make_tensor_value_info(name, FLOAT, (2,)) for name in "ay")
    inner = helper.make_graph([helper.make_node("Acos", ["x"], ["y"], name="inside")], "then", [], [y])
    other = helper.make_graph([helper.make_node("Abs", ["x"], ["y"], name="else")], "else", [], [y])
    branch = node("If", "c", then_branch=inner, else_branch=other)
    assert [entry.node for entry in unsupported(model_of(branch, shape=(2,), c=np.array(True)), "cuda")] == ["inside"]
    assert x.name == "a"


def test_a_target_without_a_table() -> None:
    with pytest.raises(ExportError, match="no table of kernels") as raised:
        unsupported(model_of(node("Relu")), "openvino")
    assert raised.value.expected == "cuda or tensorrt"


def test_what_each_target_takes() -> None:
    assert {name: target.schemes[0] for name, target in TARGETS.items()} == {
        "cpu": "float32",
        "openvino": "float32",
        "cuda": "fp16",
        "tensorrt": "fp16",
    }
    for name, target in TARGETS.items():
        assert "auto" in target.schemes
        for scheme in target.schemes:
            assert resolve(name, scheme) == (target, scheme)
    every = {scheme for target in TARGETS.values() for scheme in target.schemes}
    for name, target in TARGETS.items():
        for scheme in every - set(target.schemes):
            with pytest.raises(ExportError) as raised:
                resolve(name, scheme)
            assert "unknown" not in raised.value.message  # there is a reason for each
            assert "target=" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("target", "quantize", "message"),
    [
        ("tpu", None, "unknown target"),
        ("cud", None, "'cuda'"),
        (3, None, "unknown target"),
        ("cpu", "int3", "unknown quantization"),
        ("cpu", "statik", "'static'"),
        ("cpu", 8, "unknown quantization"),
        ("tensorrt", "dynamic", "neither DynamicQuantizeLinear nor MatMulInteger"),
        ("cpu", "bf16", "does not compute in bfloat16"),
    ],
)
def test_what_no_target_takes(target: Any, quantize: Any, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        resolve(target, quantize)


def test_where_a_file_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    assert installed("cpu")
    assert run_on("cpu") == ("CPUExecutionProvider", None)
    for target in ("cuda", "tensorrt"):
        there = TARGETS[target].provider in onnxruntime.get_available_providers()
        if not there:
            assert not installed(target)
            provider, note = run_on(target)
            assert provider == "CPUExecutionProvider"
            assert TARGETS[target].provider in str(note)
            with pytest.raises(MissingDependency, match=f"{target!r} cannot be run here") as raised:
                require(target)
            assert "pip install onnxruntime-gpu" in str(raised.value.hint)
    with pytest.raises(ExportError, match="unknown target"):
        installed("tpu")
    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr("torchtrim.export.targets.find_spec", lambda name: None)
    assert not installed("openvino")
    assert TARGETS["openvino"].provider == OPENVINO
    with pytest.raises(MissingDependency, match="pip install openvino"):
        require("openvino")


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_is_listed_and_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As onnxruntime-gpu is on a machine without a GPU: the package lists the provider, and opens no file with it."""
    import onnxruntime

    from torchtrim.export.targets import _provider_runs

    listed = [*onnxruntime.get_available_providers(), "CUDAExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    _provider_runs.cache_clear()
    try:
        assert installed("cuda") == ("CUDAExecutionProvider" in listed[:-1])
    finally:
        _provider_runs.cache_clear()
