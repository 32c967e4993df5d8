"""Why a file is not faster: what is found in graphs that are known to be slow."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

from torchtrim.errors import ExportError, InputError
from torchtrim.export.explain import Explanation, explain_onnx
from torchtrim.export.findings import Finding
from torchtrim.export.onnx import export_onnx
from torchtrim.export.vector_widths import vector_size


def written(folder: Path, body: str, weights: dict[str, tuple[int, ...]], shape: str = "N, 16, 12, 12") -> Path:
    """A file made of ONNX's own text form; weights are random, and positive."""
    text = f'<ir_version: 9, opset_import: ["": 18]> g (float[{shape}] x) => (float y) {{ {body} }}'
    model = onnx.parser.parse_model(text)
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    model.graph.output[0].type.tensor_type.ClearField("shape")
    random = np.random.default_rng(0)
    for name, sizes in weights.items():
        values = random.uniform(0.1, 1, size=sizes).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(values, name))
    onnx.save(model, folder / "m.onnx")
    return folder / "m.onnx"


def explained(path: Path, data: object = None) -> Explanation:
    return explain_onnx(path, data, threads=1, seconds=0.02)


def only(found: Explanation, kind: str) -> Finding:
    (finding,) = [finding for finding in found.findings if finding.kind == kind]
    return finding


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("explain") / "resnet18.onnx"
    return export_onnx(resnet18().eval(), torch.randn(1, 3, 64, 64), place, benchmark=False).path


def test_a_float_resnet_is_well_fused(resnet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))  # other tests make folders in the shared one
    found = explain_onnx(resnet, threads=1, seconds=0.1)
    assert not os.listdir(tmp_path / "temporary")
    assert found.operators[0].op == "Conv"
    assert found.operators[0].calls == 20
    assert sum(entry.share for entry in found.operators) == pytest.approx(1)
    assert sum(node.ms for node in found.nodes) == pytest.approx(found.nodes_ms)
    assert {finding.kind for finding in found.findings} <= {"tiny product"}
    assert "by operator" in str(found)
    assert "<table>" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["operators"][0]["op"] == "Conv"
    assert found.plot(tmp_path / "bars.png").stat().st_size > 5000


def test_dynamic_convolutions_are_found(resnet: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import quantize_dynamic

    quantize_dynamic(resnet, tmp_path / "int8.onnx", op_types_to_quantize=["Conv"])
    found = explained(tmp_path / "int8.onnx")
    finding = only(found, "dynamic convolution")
    assert found.scheme == "dynamic"
    assert sum("Quantize" not in name for name in finding.nodes) == 20
    assert finding.share > 0.3
    assert found.findings[0] is finding  # the most time first
    assert "static" in finding.hint


def test_float_islands_between_int8_nodes_are_found(resnet: Path, tmp_path: Path) -> None:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.left = [{"x": np.random.default_rng(0).normal(size=(2, 3, 64, 64)).astype(np.float32)}]

        def get_next(self) -> dict[str, np.ndarray] | None:  # type: ignore[type-arg]
            return self.left.pop() if self.left else None

    place = tmp_path / "static.onnx"
    quantize_static(resnet, place, Reader(), quant_format=QuantFormat.QDQ, op_types_to_quantize=["Conv"])
    found = explained(place)
    assert found.scheme == "static"
    islands = [finding for finding in found.findings if finding.kind == "float island"]
    between = [finding for finding in islands if finding.what.startswith("a float island between int8 nodes: ")]
    assert any("Add" in finding.what for finding in between)
    assert any(name.endswith(("_DequantizeLinear", "_QuantizeLinear")) for name in between[0].nodes)
    assert all(0 < finding.share < 1 for finding in islands)


def test_batch_norm_and_activations_that_stay_alone(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "n = BatchNormalization(x, a, b, c, d) v = Conv<pads=[1,1,1,1]>(n, w) s = Elu(v) r = Conv(v, w) z = Relu(r) "
        "o = ReduceMean<keepdims=0>(z) p = ReduceMean<keepdims=0>(s) q = ReduceMean<keepdims=0>(r) "
        "t = Add(o, p) y = Add(t, q)",
        {"a": (16,), "b": (16,), "c": (16,), "d": (16,), "w": (16, 16, 3, 3)},
    )
    found = explained(path)
    assert "at the start" in only(found, "batch norm").what
    whats = {finding.what for finding in found.findings if finding.kind == "activation"}
    assert "Elu has no fused form with a convolution" in whats
    assert "Relu after a convolution is not fused: what the convolution gives is read elsewhere too" in whats


def test_loose_pieces_of_a_transformer(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        # Softmax over products, as attention is written; a layer norm whose parts are read elsewhere too.
        "k = MatMul(x, w) t = Transpose<perm=[0,2,1]>(k) s = MatMul(k, t) h = Mul(s, c) p = Softmax<axis=-1>(h) "
        "o = MatMul(p, k) m = ReduceMean(o, ax) d = Sub(o, m) e = Mul(d, d) v = ReduceMean(e, ax) "
        "f = Add(v, c) r = Sqrt(f) n = Div(d, r) g = Erf(n) i = Add(g, c) y = Mul(n, i)",
        {"w": (32, 32), "c": (1,)},
        "N, 24, 32",
    )  # fmt: skip
    model = onnx.load(path)
    model.graph.initializer.append(numpy_helper.from_array(np.array([-1], dtype=np.int64), "ax"))
    onnx.save(model, path)
    kinds = {finding.kind: finding for finding in explained(path).findings}
    assert {"attention", "layer norm", "gelu"} <= set(kinds)
    assert "opset=17" in kinds["layer norm"].hint


def test_casts_and_narrow_widths(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        "a = Conv(x, w) b = Conv(a, v) d = Cast<to=11>(b) e = Neg(d) f = Cast<to=1>(e) y = Relu(f)",
        {"w": (9, 16, 1, 1), "v": (16, 9, 1, 1)},
        "N, 16, 64, 64",
    )
    found = explained(path)
    assert "Cast only moves or converts numbers" in {finding.what for finding in found.findings}
    widths = [finding.what for finding in found.findings if finding.kind == "width"]
    size = vector_size(found.machine.instructions, integer=False)
    assert any(f"9 output channels: {-9 % size} of {9 + -9 % size} lanes stay empty" in what for what in widths)
    assert any(what.startswith("9 input channels") for what in widths)


def test_weights_that_are_unpacked_in_every_run(tmp_path: Path) -> None:
    path = written(tmp_path, "v = DequantizeLinear(w, s) h = Exp(x) y = Mul(h, v)", {"s": ()}, "N, 16, 128")
    model = onnx.load(path)
    weight = np.ones((16, 128), dtype=np.int8)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, path)
    found = explained(path)
    assert found.scheme == "weight_only"
    assert {finding.kind for finding in found.findings} <= {"unpacked weights"}  # folded by some versions


def test_what_it_is_run_on(resnet: Path) -> None:
    labels = torch.tensor([1, 2])
    assert explained(resnet, [(torch.randn(2, 3, 64, 64), labels)]).inputs == "float32[2, 3, 64, 64]"
    assert explained(resnet, {"x": torch.randn(3, 3, 64, 64)}).inputs == "x=float32[3, 3, 64, 64]"
    assert explain_onnx(resnet, batch=2, threads=1, seconds=0.01).inputs == "x=float32[2, 3, 64, 64]"


def test_a_node_in_a_branch_is_not_counted_twice(tmp_path: Path) -> None:
    def branch(op: str) -> onnx.GraphProto:
        made = helper.make_tensor_value_info("o", onnx.TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["x"], ["o"], name=f"inner_{op}")], op, [], [made])

    ask = helper.make_node("ReduceMax", ["x"], ["m"], name="ask", keepdims=0)
    cast = helper.make_node("Cast", ["m"], ["c"], name="cast", to=onnx.TensorProto.BOOL)
    choose = helper.make_node("If", ["c"], ["y"], name="choose", then_branch=branch("Exp"), else_branch=branch("Tanh"))
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["N", 4096])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["N", 4096])
    graph = helper.make_graph([ask, cast, choose], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), tmp_path / "m.onnx")
    found = explained(tmp_path / "m.onnx")
    assert {node.name for node in found.nodes} == {"ask", "cast", "choose"}


def test_what_cannot_be_explained(resnet: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such ONNX file"):
        explain_onnx(tmp_path / "no.onnx")
    (tmp_path / "bad.onnx").write_bytes(resnet.read_bytes()[:5000])
    with pytest.raises(ExportError, match=r"bad\.onnx"):
        explain_onnx(tmp_path / "bad.onnx")
    for options in ({"threads": 0}, {"seconds": 0.0}, {"batch": -1}):
        with pytest.raises(InputError, match="must be positive"):
            explain_onnx(resnet, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no data"):
        explain_onnx(resnet, [])
    with pytest.raises(InputError, match="does not take"):
        explain_onnx(resnet, torch.randn(1, 4, 64, 64))
    with pytest.raises(ExportError, match="execution provider"):
        explain_onnx(resnet, providers=["NoSuchExecutionProvider"])
