"""Exports: right at any batch, named, quantized, for the GPU, and without a trace where they fail."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from torch import nn

from torchtrim.edits.cut import cut
from torchtrim.errors import ExportError, ExportMismatch, InputError, ModelError
from torchtrim.export.compare import Tolerance
from torchtrim.export.onnx import export_onnx
from torchtrim.export.targets import cuda_unsupported, has_cuda_kernel

IMAGE = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )


def run(path: Path, **feed: torch.Tensor) -> list[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return list(session.run(None, {name: tensor.numpy() for name, tensor in feed.items()}))


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_any_batch_from_an_example_of_one(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=7).eval()
    x = torch.randn(5, *model.pretrained_cfg["input_size"])
    report = export_onnx(model, x[:1], tmp_path / "m.onnx", benchmark=False)
    assert report.verification.batches == (1, 3)
    (found,) = run(report.path, x=x)
    with torch.no_grad():
        np.testing.assert_allclose(found, model(x).numpy(), rtol=1e-3, atol=1e-5)
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = small()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    calls: list[int] = []
    hook = model[2].register_forward_hook(lambda *_: calls.append(1))
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    parameters = [id(parameter) for parameter in model.parameters()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    export_onnx(model, IMAGE, tmp_path / "m.onnx", benchmark=False)
    assert torch.equal(random, torch.get_rng_state())
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    assert [id(parameter) for parameter in model.parameters()] == parameters
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert len(model[2]._forward_hooks) == 1
    assert torch.is_grad_enabled()
    hook.remove()


def test_file_says_who_made_it_and_keeps_no_local_paths(tmp_path: Path) -> None:
    report = export_onnx(small(), IMAGE, tmp_path / "m.onnx", opset=19, benchmark=False)
    model = onnx.load(report.path)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert model.producer_name == "torchtrim"
    assert model.opset_import[0].version == report.opset == 19
    assert notes["torch.version"] == torch.__version__
    assert notes["torchtrim.target"] == "cpu"
    assert "5.weight" in {tensor.name for tensor in model.graph.initializer}
    assert b".py" not in report.path.read_bytes()
    onnx.checker.check_model(model, full_check=True)


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 4)

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, *, extra: dict[str, torch.Tensor], scale: float = 1.0
    ) -> dict[str, Any]:
        hidden = self.words(ids) * scale
        if mask is not None:
            hidden = hidden * mask.unsqueeze(-1)
        return {"hidden": hidden + extra["bias"].unsqueeze(1), "pooled": (hidden.mean(1), None), "loss": None}


def test_several_inputs_a_nested_dict_and_optional_arguments(tmp_path: Path) -> None:
    model = Several().eval()
    ids, mask, bias = torch.randint(0, 10, (2, 6)), torch.ones(2, 6), torch.randn(2, 4)
    inputs = {"ids": ids, "extra": {"bias": bias}, "scale": 2.0}
    without = export_onnx(model, inputs, tmp_path / "a.onnx", benchmark=False)
    assert without.input_names == ("ids", "extra_bias")
    assert without.output_names == ("hidden", "pooled")
    report = export_onnx(model, {**inputs, "mask": mask}, tmp_path / "b.onnx", benchmark=False)
    assert set(report.input_names) == {"ids", "extra_bias", "mask"}
    hidden, _ = run(report.path, ids=ids[:1], extra_bias=bias[:1], mask=mask[:1])
    with torch.no_grad():
        expected = model(ids[:1], mask[:1], extra={"bias": bias[:1]}, scale=2.0)["hidden"]
    np.testing.assert_allclose(hidden, expected.numpy(), rtol=1e-5)


@dataclass
class Answer:
    logits: torch.Tensor
    features: torch.Tensor


class TwoHeads(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.fc, self.kind = nn.Linear(4, 3), kind

    def forward(self, x: torch.Tensor) -> Any:
        logits = self.fc(x)
        return Answer(logits, x * 2) if self.kind == "dataclass" else (logits, [x * 2])


def test_outputs_of_a_dataclass_and_a_tuple(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    named = export_onnx(TwoHeads("dataclass"), x, tmp_path / "a.onnx", benchmark=False)
    assert named.output_names == ("logits", "features")
    plain = export_onnx(TwoHeads("tuple"), x, tmp_path / "b.onnx", benchmark=False)
    assert plain.output_names == ("output", "output_1")
    given = export_onnx(
        TwoHeads("tuple"), x, tmp_path / "c.onnx", input_names=["in"], output_names=["p", "q"], benchmark=False
    )
    assert (given.input_names, given.output_names) == (("in",), ("p", "q"))
    with pytest.raises(InputError, match="output_names needs one name for each"):
        export_onnx(TwoHeads("tuple"), x, tmp_path / "d.onnx", output_names=["p"], benchmark=False)


def test_inputs_may_come_from_the_history(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="input is not known"):
        export_onnx(small(), path=tmp_path / "m.onnx")
    edited = cut(small().eval(), IMAGE, after="2")
    report = export_onnx(edited, path=tmp_path / "m.onnx", benchmark=False)
    assert report.verification.outputs[0].shape[1:] == (8, 94, 94)


def test_fixed_batch(tmp_path: Path) -> None:
    report = export_onnx(small(), IMAGE.repeat(2, 1, 1, 1), tmp_path / "m.onnx", dynamic=False, benchmark=False)
    assert report.verification.batches == (2,)
    with pytest.raises(Exception, match="Got invalid dimensions"):
        run(report.path, input=IMAGE)


def test_dynamic_int8_is_smaller_and_measured_beside_float(tmp_path: Path) -> None:
    model = timm.create_model("test_vit")
    x = torch.randn(1, *model.pretrained_cfg["input_size"])
    report = export_onnx(model, x, tmp_path / "m.onnx", quantize="dynamic", threads=1)
    assert report.quantized_nodes > 10
    assert report.size_mb < report.float_mb / 2
    assert report.verification.cosine > 0.98
    assert report.latency is not None
    assert [timing.name for timing in report.latency.timings] == ["PyTorch eager", "ONNX float32", "ONNX int8"]
    assert any("than ONNX float32" in note for note in report.notes)
    assert report.machine.processor in str(report)
    assert "<table>" in report._repr_html_()
    assert json.loads(json.dumps(report.to_dict()))["quantize"] == "dynamic"
    graph = onnx.load(report.path).graph
    assert any(t.data_type == onnx.TensorProto.INT8 and t.name.endswith("_quantized") for t in graph.initializer)


def test_dynamic_int8_leaves_convolutions_unless_asked(tmp_path: Path) -> None:
    kept = export_onnx(small(), IMAGE, tmp_path / "a.onnx", quantize="dynamic", benchmark=False)
    assert "ConvInteger" not in {node.op_type for node in onnx.load(kept.path).graph.node}
    wider = export_onnx(
        small(), IMAGE, tmp_path / "b.onnx", quantize="dynamic", dynamic_ops=("Conv", "MatMul"), benchmark=False
    )
    assert "ConvInteger" in {node.op_type for node in onnx.load(wider.path).graph.node}
    with pytest.raises(ExportError, match="no dynamic int8 form"):
        export_onnx(small(), IMAGE, tmp_path / "c.onnx", quantize="dynamic", dynamic_ops=("Relu",), benchmark=False)


def test_nothing_to_quantize_is_said(tmp_path: Path) -> None:
    report = export_onnx(
        nn.Sequential(nn.Conv2d(3, 4, 3)), IMAGE, tmp_path / "m.onnx", quantize="dynamic", benchmark=False
    )
    assert report.quantized_nodes == 0
    assert any("nothing was quantized" in note for note in report.notes)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet"])
def test_cuda_file_is_half_and_every_node_has_a_kernel(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    report = export_onnx(model, x, tmp_path / "m.onnx", target="cuda", benchmark=False)
    proto = onnx.load(report.path)
    assert report.size_mb < 0.65 * report.float_mb
    assert cuda_unsupported(proto) == []
    assert proto.graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    place = "CUDAExecutionProvider" if torch.cuda.is_available() else "checked on CPUExecutionProvider"
    assert any(place in note for note in report.notes)


def test_cuda_file_with_half_inputs(tmp_path: Path) -> None:
    report = export_onnx(small(), IMAGE, tmp_path / "m.onnx", target="cuda", half_io=True, benchmark=False)
    assert onnx.load(report.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16


def test_cuda_names_the_nodes_without_a_kernel(tmp_path: Path) -> None:
    class Arc(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.acos(x.tanh())

    with pytest.raises(ExportError, match=r"hand them back to the CPU .*Acos"):
        export_onnx(Arc(), torch.randn(2, 3), tmp_path / "m.onnx", target="cuda", benchmark=False)
    assert list(tmp_path.iterdir()) == []


def test_cuda_kernel_table() -> None:
    assert has_cuda_kernel("Conv", 18, "h")
    assert has_cuda_kernel("MaxPool", 21, "h")
    assert not has_cuda_kernel("MaxPool", 22, "h")  # the provider stops at version 12 of it
    assert not has_cuda_kernel("GridSample", 20, "h")
    assert not has_cuda_kernel("DynamicQuantizeLinear", 20)


def test_cuda_refuses_dynamic_and_unknown_targets_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="DynamicQuantizeLinear has no CUDA kernel"):
        export_onnx(small(), IMAGE, tmp_path / "m.onnx", target="cuda", quantize="dynamic")
    with pytest.raises(ExportError, match="cpu or cuda"):
        export_onnx(small(), IMAGE, tmp_path / "m.onnx", target="tpu")
    with pytest.raises(ExportError, match="'dynamic'"):
        export_onnx(small(), IMAGE, tmp_path / "m.onnx", quantize="int3")


def test_failed_check_leaves_no_file_and_an_earlier_one_untouched(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ExportMismatch) as raised:
        export_onnx(small(), IMAGE, path, quantize="dynamic", tolerance=Tolerance(relative=1e-9), benchmark=False)
    assert raised.value.path == path
    assert raised.value.verification.max_abs > 0  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []
    path.write_bytes(b"before")
    with pytest.raises(ExportMismatch):
        export_onnx(small(), IMAGE, path, quantize="dynamic", tolerance=1e-9, overwrite=True, benchmark=False)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    assert export_onnx(small(), IMAGE, path, overwrite=True, benchmark=False).verification.passed


def test_path_is_checked_before_any_work(tmp_path: Path) -> None:
    class Watched(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("the model was run")

    (tmp_path / "there.onnx").write_bytes(b"before")
    x = torch.zeros(1, 2)
    with pytest.raises(ExportError, match=r"exists already.*overwrite=True"):
        export_onnx(Watched(2, 2), x, tmp_path / "there.onnx")
    with pytest.raises(ExportError, match="is a folder"):
        export_onnx(Watched(2, 2), x, tmp_path)
    with pytest.raises(ExportError, match="does not exist"):
        export_onnx(Watched(2, 2), x, tmp_path / "no" / "m.onnx")
    with pytest.raises(ExportError, match="cannot be written to"):
        export_onnx(Watched(2, 2), x, "/proc/m.onnx")


def test_models_that_cannot_be_exported(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    with pytest.raises(ModelError, match="meta device"):
        export_onnx(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2), path)
    broken = small()
    with torch.no_grad():
        broken[5].weight[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"^5\.weight: weights that are NaN"):
        export_onnx(broken, IMAGE, path)
    with pytest.raises(ModelError, match="bfloat16"):
        export_onnx(nn.Linear(2, 2).bfloat16(), torch.zeros(1, 2).bfloat16(), path)
    with pytest.raises(InputError, match=r"does not take these inputs.*float32.*Try: inputs in float16"):
        export_onnx(nn.Linear(2, 2).half(), torch.zeros(1, 2), path)
    with pytest.raises(InputError, match=r"does not take these inputs.*float32\[1, 5\]"):
        export_onnx(nn.Linear(2, 2), torch.zeros(1, 5), path)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_model_with_half_inputs(tmp_path: Path) -> None:
    model = small().eval().half()
    report = export_onnx(model, IMAGE.half(), tmp_path / "m.onnx", benchmark=False)
    assert onnx.load(report.path).graph.input[0].type.tensor_type.elem_type == onnx.TensorProto.FLOAT16
    assert report.verification.passed


def test_wrapped_models_are_unwrapped(tmp_path: Path) -> None:
    for number, wrapped in enumerate((torch.compile(small()), nn.DataParallel(small()))):
        assert export_onnx(wrapped, IMAGE, tmp_path / f"{number}.onnx", benchmark=False).verification.passed
