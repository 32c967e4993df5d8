"""Exports: right at any batch, named, quantized, for the GPU, and without a trace where they fail."""

from __future__ import annotations

import json
import os
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
from torchtrim.export.kernels import has_kernel, unsupported
from torchtrim.export.onnx import export_onnx

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
    assert any("ONNX int8" in note and "ONNX float32" in note for note in report.notes)
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
    assert unsupported(proto, "cuda") == []
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
    assert has_kernel("cuda", "Conv", 18)
    assert has_kernel("cuda", "MaxPool", 21)
    assert not has_kernel("cuda", "MaxPool", 22)  # the provider stops at version 12 of it
    assert not has_kernel("cuda", "GridSample", 20)
    assert not has_kernel("cuda", "DynamicQuantizeLinear", 20)


def test_unknown_targets_and_schemes_list_the_known(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither DynamicQuantizeLinear nor MatMulInteger"):
        export_onnx(small(), IMAGE, tmp_path / "m.onnx", target="tensorrt", quantize="dynamic")
    with pytest.raises(ExportError, match="cpu or openvino or cuda or tensorrt"):
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
    with pytest.raises(InputError, match=r"Linear refuses .*float32.*Try: inputs in float16"):
        export_onnx(nn.Linear(2, 2).half(), torch.zeros(1, 2), path)
    with pytest.raises(InputError, match=r"Linear refuses .*float32\[1, 5\]"):
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


class Scaled(nn.Module):
    """A scalar before the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * t


def dims(path: Path, side: str = "input") -> list[list[str | int]]:
    values = getattr(onnx.load(path).graph, side)
    return [[d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] for value in values]


@pytest.mark.parametrize("batch", [1, 4])
def test_batch_is_that_of_the_first_tensor_with_dimensions(batch: int, tmp_path: Path) -> None:
    report = export_onnx(Scaled(), (torch.tensor(2.0), torch.randn(batch, 4)), tmp_path / "m.onnx", benchmark=False)
    assert report.dynamic_batch
    assert dims(report.path) == [[], ["batch", 4]]
    assert dims(report.path, "output") == [["batch", 3]]
    assert run(report.path, t=torch.tensor(2.0), x=torch.randn(5, 4))[0].shape == (5, 3)


def test_another_input_of_two_rows_is_no_batch_where_the_example_has_one(tmp_path: Path) -> None:
    class Sized(nn.Module):
        def forward(self, x: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
            return x * size.prod()

    report = export_onnx(Sized(), (torch.randn(1, 4), torch.tensor([3.0, 4.0])), tmp_path / "m.onnx", benchmark=False)
    assert dims(report.path) == [["batch", 4], [2]]


def test_a_batch_that_cannot_be_left_open_is_refused(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(-1).reshape(2, 4).softmax(0)

    x = torch.randn(2, 4)
    with pytest.raises(ExportError, match="dynamic=False"):
        export_onnx(Mixed(), x, tmp_path / "m.onnx", benchmark=False)
    with pytest.raises(ExportError, match=r"no input has a batch.*dynamic=False"):
        export_onnx(nn.Identity(), torch.tensor(1.0), tmp_path / "m.onnx", benchmark=False)
    assert not export_onnx(Mixed(), x, tmp_path / "m.onnx", dynamic=False, benchmark=False).dynamic_batch
    with pytest.raises(InputError, match="no rows"):
        export_onnx(nn.Identity(), torch.zeros(0, 4), tmp_path / "n.onnx", benchmark=False)


def test_cuda_file_of_a_double_model_is_half(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 5)).double()
    report = export_onnx(model, torch.randn(2, 64).double(), tmp_path / "m.onnx", target="cuda", benchmark=False)
    types = {tensor.data_type for tensor in onnx.load(report.path).graph.initializer}
    assert types == {onnx.TensorProto.FLOAT16}
    assert any("float64" in note for note in report.notes)
    assert model[0].weight.dtype is torch.float64


@pytest.mark.parametrize(
    ("dtype", "scheme", "name"), [(torch.float16, "fp16", "ONNX fp16"), (torch.float64, "float64", "ONNX float64")]
)
def test_the_report_says_what_the_weights_are(dtype: torch.dtype, scheme: str, name: str, tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)).to(dtype), torch.randn(2, 4).to(dtype)
    report = export_onnx(model, x, tmp_path / "m.onnx", threads=1)
    assert (report.quantize, report.precision) == (scheme, scheme)
    assert report.latency is not None
    assert report.latency.timings[1].name == name
    notes = {entry.key: entry.value for entry in onnx.load(report.path).metadata_props}
    assert notes["torchtrim.quantize"] == scheme
    assert report.verification.tolerance.relative == (2e-2 if scheme == "fp16" else 1e-3)
    int8 = export_onnx(model, x, tmp_path / "n.onnx", quantize="dynamic", benchmark=False)
    told = f"it is {scheme}" if dtype is torch.float16 else "turned into float32 first"
    assert any(told in note for note in int8.notes)


@pytest.mark.parametrize("opset", [7, 30])
def test_an_opset_that_cannot_be_written_is_refused(
    opset: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=rf"in that opset \(found: 18; expected: {opset}\)"):
        export_onnx(small(), IMAGE, tmp_path / "m.onnx", opset=opset, benchmark=False)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().err == ""


class Named(nn.Module):
    """Parameters named as values of the graph are."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("x", "output", "mul", "relu"):
            setattr(self, name, nn.Parameter(torch.randn(4)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x * self.mul + self.x) * self.relu + self.output


def test_parameters_named_like_inputs_and_operators(tmp_path: Path) -> None:
    report = export_onnx(Named(), torch.randn(2, 4), tmp_path / "m.onnx", benchmark=False)
    assert (report.input_names, report.output_names) == (("x",), ("output",))
    onnx.checker.check_model(onnx.load(report.path), full_check=True)


def test_files_say_nothing_of_how_they_were_made(tmp_path: Path) -> None:
    content = export_onnx(small(), IMAGE, tmp_path / "m.onnx", benchmark=False).path.read_bytes()
    assert not any(word in content for word in (b"torchtrim.export", b"_Flat", b"fx_node", b"namespace"))


class Picky(nn.Module):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.inner, self.error = nn.Identity(), error

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise self.error


@pytest.mark.parametrize("error", [AssertionError("wrong size"), KeyError("wrong size"), AttributeError("wrong size")])
def test_whatever_a_forward_raises_is_an_input_error(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="wrong size"):
        export_onnx(Picky(error), torch.zeros(1, 2), tmp_path / "m.onnx", benchmark=False)
    assert list(tmp_path.iterdir()) == []


def test_hooks_run_once_and_see_real_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    seen: list[object] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    report = export_onnx(model, torch.randn(2, 4), tmp_path / "m.onnx", threads=1)
    assert report.latency is not None
    assert [type(value) for value in seen] == [torch.Tensor]


def test_hooks_that_change_the_output_are_in_the_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model[0].register_forward_hook(lambda module, inputs, output: output * 3)
    x = torch.randn(3, 4)
    report = export_onnx(model, x, tmp_path / "m.onnx", benchmark=False)
    np.testing.assert_allclose(run(report.path, input=x)[0], model(x).detach().numpy(), rtol=1e-5, atol=1e-6)


def test_a_forward_that_keeps_its_last_output(tmp_path: Path) -> None:
    class Keeper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.last = self.fc(x)
            return self.last.relu()

    model = Keeper()
    assert export_onnx(model, torch.randn(2, 4), tmp_path / "m.onnx", threads=1).latency is not None
    assert not hasattr(model, "last")


def test_transformer_with_padding(tmp_path: Path) -> None:
    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
            self.layers = nn.TransformerEncoder(layer, 1)

        def forward(self, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
            return self.layers(x, src_key_padding_mask=padding)

    padding = torch.zeros(2, 7, dtype=torch.bool)
    padding[:, 5:] = True
    report = export_onnx(Encoder(), (torch.randn(2, 7, 16), padding), tmp_path / "m.onnx", benchmark=False)
    assert report.verification.max_abs < 1e-4
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_distributed_model_is_unwrapped(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(small())
        report = export_onnx(wrapped, IMAGE, tmp_path / "m.onnx", benchmark=False)
    finally:
        torch.distributed.destroy_process_group()
    assert report.verification.passed
    assert "5.weight" in {tensor.name for tensor in onnx.load(report.path).graph.initializer}


@pytest.mark.filterwarnings("error")
def test_recurrent_layers_export_without_noise(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(4, 3, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.lstm(x)[0]

    export_onnx(Recurrent(), torch.randn(2, 5, 4), tmp_path / "m.onnx", benchmark=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tolerance": "a"}, "tolerance"),
        ({"tolerance": -1.0}, "positive"),
        ({"threads": 0}, "threads"),
        ({"opset": "18"}, "opset"),
        ({"target": ["cpu"]}, "unknown target"),
        ({"dynamic_ops": "Relu"}, "no dynamic int8 form"),
        ({"dynamic_ops": "Gemm"}, "MatMul too"),
    ],
)
def test_options_are_checked_before_any_work(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises((InputError, ExportError), match=says):
        export_onnx(Picky(RuntimeError("the model was run")), torch.zeros(1, 2), tmp_path / "m.onnx", **options)


def test_one_operator_to_quantize_may_be_named_by_itself(tmp_path: Path) -> None:
    report = export_onnx(
        nn.Linear(4, 4),
        torch.zeros(1, 4),
        tmp_path / "m.onnx",
        quantize="dynamic",
        dynamic_ops="MatMul",
        benchmark=False,
    )
    assert report.quantized_nodes == 1


def test_an_output_cannot_have_the_name_of_an_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="name of an input"):
        export_onnx(nn.Linear(4, 4), torch.zeros(1, 4), tmp_path / "m.onnx", output_names=["input"], benchmark=False)


@pytest.mark.parametrize("path", [None, 3, b"m.onnx", "a\0b.onnx", "a" * 300 + ".onnx", ""])
def test_what_is_no_path(path: Any) -> None:
    with pytest.raises(ExportError, match="not the path of a file"):
        export_onnx(nn.Linear(4, 4), torch.zeros(1, 4), path, benchmark=False)


def test_long_names_and_links_that_lead_nowhere(tmp_path: Path) -> None:
    long = tmp_path / f"{'a' * 245}.onnx"
    assert export_onnx(nn.Linear(4, 4), torch.zeros(1, 4), long, benchmark=False).path == long
    (tmp_path / "link.onnx").symlink_to("nowhere")
    with pytest.raises(ExportError, match="exists already"):
        export_onnx(nn.Linear(4, 4), torch.zeros(1, 4), tmp_path / "link.onnx", benchmark=False)


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A model of 33 kB where everything over 20 kB is too large for one file."""
    monkeypatch.setattr("torchtrim.export.graph.LARGE", 20_000)
    monkeypatch.setattr("torchtrim.export.saving.LARGE", 20_000)
    monkeypatch.setattr("torchtrim.export.onnx.LARGE", 20_000)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))


def test_weights_lie_beside_the_file_only_where_that_file_needs_it(large: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 64)
    plain = export_onnx(large, x, tmp_path / "a.onnx", benchmark=False)
    assert [file.name for file in plain.files] == ["a.onnx", "a.onnx.data"]
    for name, options in (("b.onnx", {"quantize": "dynamic"}), ("c.onnx", {"target": "cuda"})):
        report = export_onnx(large, x, tmp_path / name, benchmark=False, **options)
        assert [file.name for file in report.files] == [name]
        assert all(not tensor.external_data for tensor in onnx.load(report.path).graph.initializer)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.onnx", "a.onnx.data", "b.onnx", "c.onnx"]


def test_a_small_file_over_a_large_one_takes_its_weights_away(large: nn.Module, tmp_path: Path) -> None:
    x = torch.randn(2, 64)
    export_onnx(large, x, tmp_path / "m.onnx", benchmark=False)
    (tmp_path / "other.onnx").write_bytes(b"before")
    (tmp_path / "other.onnx.data").write_bytes(b"of something else")
    for name in ("m.onnx", "other.onnx"):
        export_onnx(large[0], x, tmp_path / name, overwrite=True, benchmark=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx", "other.onnx", "other.onnx.data"]
    assert (tmp_path / "other.onnx.data").read_bytes() == b"of something else"


def test_both_files_are_put_in_place_or_none(large: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, weights = tmp_path / "m.onnx", tmp_path / "m.onnx.data"
    path.write_bytes(b"before")
    weights.write_bytes(b"weights before")
    move = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == path:
            raise PermissionError(13, "denied")
        move(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", refuse)
        with pytest.raises(ExportError, match="cannot be put in place: denied"):
            export_onnx(large, torch.randn(2, 64), path, overwrite=True, benchmark=False)
    assert (path.read_bytes(), weights.read_bytes()) == (b"before", b"weights before")
    assert sorted(tmp_path.iterdir()) == [path, weights]
    weights.unlink()
    weights.mkdir()
    with pytest.raises(ExportError, match="a folder is in the way"):
        export_onnx(large, torch.randn(2, 64), path, overwrite=True, benchmark=False)
    assert path.read_bytes() == b"before"
