"""`quantize="auto"` and `"mixed"`: what they choose is right, and the list of what was tried says why."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.errors import ExportError, ExportMismatch, InputError
from torchtrim.export.auto import _Candidate, settle
from torchtrim.export.calibration_data import CalibrationData
from torchtrim.export.compare import Tolerance
from torchtrim.export.judge import Agreement, Judge
from torchtrim.export.kinds import kinds_of
from torchtrim.export.mixed import DYNAMIC, STATIC, Mixture, _build, _nearest
from torchtrim.export.selection import Selection
from torchtrim.export.targets import TARGETS
from torchtrim.export.workbench import Workbench

X = torch.zeros(1, 3, 32, 32)


class Mixer(nn.Module):
    """Products that widen and narrow, with norms between."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(depth))
        self.wide = nn.ModuleList(nn.Linear(32, 64) for _ in range(depth))
        self.narrow = nn.ModuleList(nn.Linear(64, 32) for _ in range(depth))
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        for norm, wide, narrow in zip(self.norms, self.wide, self.narrow, strict=True):
            x = x + narrow(nn.functional.gelu(wide(norm(x))))
        return self.head(x.mean(1))


@pytest.fixture(scope="module")
def convnet() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.ReLU(), nn.Conv2d(16, 32, 1), nn.SiLU()),
        *(nn.Conv2d(32, 32, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)),
    ).eval()


@pytest.fixture(scope="module")
def transformer() -> nn.Module:
    torch.manual_seed(0)
    return Mixer().eval()


def pictures(count: int = 6, rows: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(rows, 3, 32, 32, generator=generator) for _ in range(count)]


def ops(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def export(model: nn.Module, path: Path, **asked: object) -> tt.ExportReport:
    return tt.export_onnx(model, X, path, benchmark=False, threads=1, **asked)  # type: ignore[arg-type]


def test_auto_lists_what_it_tried_and_keeps_what_agrees(convnet: nn.Module, tmp_path: Path) -> None:
    report = export(convnet, tmp_path / "net.onnx", quantize="auto", data=pictures())
    chosen = report.selection
    assert isinstance(chosen, Selection)
    assert [one.name for one in chosen.tried] == ["float", "dynamic", "static", "mixed", "weight_only"]
    assert [one.kept for one in chosen.tried].count(True) == 1
    assert all(one.why for one in chosen.tried)
    assert report.quantize == chosen.kept.scheme
    assert chosen.kept.agreement is not None and chosen.kept.agreement.cosine >= 0.99
    assert report.verification.passed
    assert "what was tried" in str(report) and report.to_dict()["selection"]["kept"] == chosen.kept.name
    if chosen.kept.name != "float":  # nothing is kept that is not faster than the float file, beyond the noise
        assert chosen.kept.ratio_high is not None and chosen.kept.ratio_high < 1


def test_without_data_nothing_is_calibrated(transformer: nn.Module, tmp_path: Path) -> None:
    chosen = export(transformer, tmp_path / "net.onnx", quantize="auto").selection
    assert chosen is not None
    assert [one.name for one in chosen.tried] == ["float", "dynamic", "weight_only"]
    assert any("without data" in note for note in chosen.notes)


def test_mixed_chooses_by_kind(transformer: nn.Module, tmp_path: Path) -> None:
    report = export(transformer, tmp_path / "net.onnx", quantize="mixed", data=pictures())
    assert report.quantize == "mixed"
    assert any(note.startswith("mixed: ") for note in report.notes)
    assert report.quantized_nodes > 0
    assert report.verification.cosine >= 0.99


def test_mixed_leaves_in_float_what_costs_the_outputs(transformer: nn.Module, tmp_path: Path) -> None:
    path = tt.export_onnx(transformer, X, tmp_path / "a.onnx", benchmark=False).path
    data = CalibrationData.spool(pictures(), transformer, path, tmp_path / "data")
    bench = Workbench(path, tmp_path, target=TARGETS["cpu"], data=data, threads=1)
    kinds = kinds_of(bench.graph, {})
    choice = {kind.name: DYNAMIC if kind.product else STATIC for kind in kinds}
    feed = {"x": X.numpy()}

    def nearest(cosine: float) -> Mixture:
        judge = Judge(path, data, cosine=cosine, max_drop=1, threads=1)
        return _nearest(bench, judge, kinds, choice, _build(bench, kinds, choice), feed)

    loose = nearest(0.5)
    assert loose.kept_float == () and loose.built.nodes == 8
    strict = nearest(1 - (1 - loose.agreement.cosine) / 3)
    assert strict.kept_float and strict.built.nodes < 8
    assert strict.agreement.cosine > loose.agreement.cosine
    assert any("stay float for accuracy" in note for note in strict.notes)


@pytest.mark.slow
def test_classes_are_what_accuracy_is_told_by(convnet: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        labelled = [(batch, convnet(batch).argmax(1)) for batch in pictures()]
    report = export(convnet, tmp_path / "net.onnx", quantize="auto", data=labelled, max_drop=0.2)
    assert report.selection is not None
    plain = report.selection.tried[0].agreement
    assert plain is not None and plain.accuracy == plain.reference_accuracy == 1.0
    assert report.verification.outputs[0].reference_accuracy == 1.0


def test_a_generator_is_read_once(convnet: nn.Module, tmp_path: Path) -> None:
    served = []

    def data() -> Iterator[torch.Tensor]:
        for batch in pictures():
            served.append(len(batch))
            yield batch

    report = export(convnet, tmp_path / "net.onnx", quantize="static", data=data(), tolerance=Tolerance(None))
    assert sum(served) == 48
    assert "QuantizeLinear" in ops(report.path)
    # Half of the rows were not calibrated on; these are compared, the first ones at other batch sizes too.
    assert report.verification.rows >= 24


@pytest.mark.parametrize("method", ["minmax", "entropy", "percentile", "mse"])
def test_static_with_every_way_to_choose_ranges(convnet: nn.Module, tmp_path: Path, method: str) -> None:
    report = export(
        convnet,
        tmp_path / "net.onnx",
        quantize="static",
        data=pictures(),
        calibration=method,
        tolerance=Tolerance(None),
    )
    assert report.quantize == "static" and report.quantized_nodes >= 5
    assert report.verification.cosine > 0.97


def test_a_candidate_that_was_chosen_and_fails_gives_way_to_float(transformer: nn.Module, tmp_path: Path) -> None:
    # What is asked of the outputs beside PyTorch is more than any int8 file gives.
    report = export(transformer, tmp_path / "net.onnx", quantize="auto", tolerance=Tolerance(1e-4))
    assert report.quantize == "float32"
    assert report.verification.passed


def test_static_past_the_tolerance_writes_nothing(convnet: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(ExportMismatch):
        export(convnet, tmp_path / "net.onnx", quantize="static", data=pictures(), tolerance=1e-5)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("target", ["cuda", "tensorrt"])
def test_gpu_files_are_not_timed_where_there_is_no_gpu(convnet: nn.Module, tmp_path: Path, target: str) -> None:
    report = export(convnet, tmp_path / "net.onnx", quantize="auto", target=target, data=pictures())
    chosen = report.selection
    assert chosen is not None and report.provider == "CPUExecutionProvider"
    assert all(one.ratio is None for one in chosen.tried)
    assert chosen.kept.name == "fp16"
    assert any("CPUExecutionProvider" in note for note in report.notes)


def test_tensorrt_gets_symmetric_scales(convnet: nn.Module, tmp_path: Path) -> None:
    report = export(
        convnet, tmp_path / "net.onnx", quantize="static", target="tensorrt", data=pictures(), tolerance=Tolerance(None)
    )
    graph = onnx.load(report.path).graph
    zeros = {node.input[2] for node in graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2}
    held = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    assert zeros and all(not held[name].any() for name in zeros)


def test_openvino_runs_what_is_exported_for_it(convnet: nn.Module, tmp_path: Path) -> None:
    report = export(convnet, tmp_path / "net.onnx", target="openvino", quantize="static", data=pictures())
    assert report.provider == "OpenVINO" and report.quantize == "static"


def test_bad_options_are_refused_before_the_work(convnet: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    for asked, error, told in (
        ({"quantize": "static"}, InputError, "there is none"),
        ({"quantize": "static", "data": []}, InputError, "no data to calibrate on"),
        ({"quantize": "static", "data": [torch.zeros(2, 3, 32)]}, InputError, "does not take"),
        ({"quantize": "static", "data": [torch.full((2, 3, 32, 32), float("nan"))]}, InputError, "NaN"),
        ({"calibration": "best"}, InputError, "minmax, entropy, percentile, mse"),
        ({"bits": 3}, InputError, "8 bits or 4"),
        ({"block": 48}, InputError, "power of two"),
        ({"quantize": "weight_only", "block": 512}, InputError, "16 to 256"),
        ({"max_drop": 2}, InputError, "0.01 is a point"),
        ({"quantize": "mixed", "target": "cuda"}, ExportError, "mixed"),
        ({"quantize": "int8"}, ExportError, "unknown quantization"),
    ):
        with pytest.raises(error, match=told):
            export(convnet, path, **asked)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_half_precision_weights_are_no_start_for_int8(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"starts from float32 .*model.float\(\)"):
        tt.export_onnx(
            nn.Linear(4, 4).half(),
            torch.zeros(2, 4).half(),
            tmp_path / "a.onnx",
            quantize="weight_only",
            benchmark=False,
        )


def timed(name: str, ratio: float, low: float, high: float) -> _Candidate:
    from torchtrim.bench.timing import Timing

    fields = dict.fromkeys(Timing.__dataclass_fields__, 0)
    made = Timing(**{**fields, "name": name, "ratio": ratio, "ratio_low": low, "ratio_high": high})  # type: ignore[arg-type]
    return _Candidate(name, name, timing=made)


def test_the_fastest_is_kept_and_float_where_it_is_not_clear() -> None:
    plain, a, b = timed("float", 1, 1, 1), timed("a", 0.6, 0.5, 0.7), timed("b", 0.5, 0.4, 0.6)
    assert settle(plain, [a, b]) is b
    assert (plain.why, a.why, b.why) == ("b is faster", "slower than b", "kept")
    unclear = timed("c", 0.98, 0.9, 1.05)
    assert settle(plain, [unclear]) is plain
    assert unclear.why == "no faster than float beyond the noise"
    assert settle(plain, []) is plain


def test_what_is_too_far(tmp_path: Path) -> None:
    path = tt.export_onnx(nn.Linear(4, 3), torch.zeros(2, 4), tmp_path / "a.onnx", benchmark=False).path
    judge = Judge(path, [{"input": torch.randn(20, 4).numpy()}], max_drop=0.01)
    assert judge.against(judge.of(path)) is None
    assert judge.of(path).cosine == pytest.approx(1)
    assert "cosine" in str(judge.against(Agreement(20, 0.98)))
    assert "2.0 points" in str(judge.against(Agreement(20, 1.0, accuracy=0.7, reference_accuracy=0.72)))
    assert judge.against(Agreement(20, 1.0, accuracy=0.7, reference_accuracy=0.71)) is None
    assert judge.against(Agreement(20, 1.0, wrong="NaN from the file")) == "NaN from the file"


def test_kinds_of_layers(tmp_path: Path) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 16, 3)
            self.deep = nn.Conv2d(16, 16, 3, groups=16)
            self.point = nn.Conv2d(16, 32, 1)
            self.squeeze = nn.Conv2d(32, 32, 1)
            self.fc = nn.Linear(32, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.point(self.deep(self.first(x).relu()))
            x = x * self.squeeze(x.mean((2, 3), keepdim=True)).sigmoid()
            return self.fc(x.mean((2, 3)))

    path = tt.export_onnx(Net(), torch.zeros(1, 3, 16, 16), tmp_path / "a.onnx", benchmark=False).path
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    first = next(node for node in graph.node if node.op_type == "Conv")
    relu = next(node for node in graph.node if node.op_type == "Relu")
    kinds = {kind.name: kind for kind in kinds_of(graph, {f"{relu.output[0]}_nchwc": 3.0, "elsewhere": 1.0})}
    names = {"the first convolution", "depthwise convolutions", "1 x 1 convolutions", "squeeze-and-excite"}
    assert names | {"products that narrow"} == set(kinds)
    assert kinds["the first convolution"].nodes == (first.name,)
    assert kinds["the first convolution"].share == 0.75  # the activation's time is that of the layer it is part of
    assert kinds["products that narrow"].product and not kinds["squeeze-and-excite"].product


def test_the_code_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "deploy.md", "exec"), names)
    assert len(blocks) == 4
    assert (tmp_path / "served" / "predict.py").is_file()
    assert getattr(names["checked"], "passed") is True  # noqa: B009


def test_a_gemm_is_dynamic_where_it_is_named(transformer: nn.Module, tmp_path: Path) -> None:
    from torchtrim.export.prepare import prepare
    from torchtrim.export.quantize import quantize_dynamic

    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 8))
    path = tt.export_onnx(model, torch.zeros(2, 16), tmp_path / "a.onnx", benchmark=False).path
    prepare(path, tmp_path / "p.onnx")
    gemms = [node.name for node in onnx.load(tmp_path / "p.onnx").graph.node if node.op_type == "Gemm"]
    assert len(gemms) == 2
    assert quantize_dynamic(tmp_path / "p.onnx", tmp_path / "q.onnx", nodes=gemms[:1]) == 1


def test_a_cosine_alone_is_all_that_is_asked(transformer: nn.Module, tmp_path: Path) -> None:
    assert Tolerance(cosine=0.9).relative is None
    report = export(transformer, tmp_path / "a.onnx", quantize="dynamic", tolerance=Tolerance(cosine=0.9))
    assert report.quantize == "dynamic"


def test_the_selection_says_what_was_kept_in_the_end(transformer: nn.Module, tmp_path: Path) -> None:
    report = export(transformer, tmp_path / "a.onnx", quantize="auto", data=pictures(), tolerance=Tolerance(1e-4))
    assert report.selection is not None
    assert report.quantize == report.selection.kept.scheme == "float32"
    assert [one.kept for one in report.selection.tried].count(True) == 1


def test_labels_belong_to_the_output_that_knows_them(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.body, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            features = self.body(x).relu()
            return {"features": features, "logits": self.head(features)}

    model = Two().eval()
    batches = [torch.randn(16, 8, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    with torch.no_grad():
        data = [(batch, model(batch)["logits"].argmax(1)) for batch in batches]
    report = tt.export_onnx(
        model, batches[0], tmp_path / "a.onnx", quantize="auto", data=data, benchmark=False, threads=1
    )
    assert report.selection is not None
    plain = report.selection.tried[0].agreement
    assert plain is not None and plain.reference_accuracy == 1.0
    assert report.verification.reference_accuracy == 1.0


@pytest.mark.slow
def test_labels_of_other_rows_are_noticed(convnet: nn.Module, tmp_path: Path) -> None:
    with torch.no_grad():
        wrong = [(batch, (convnet(batch).argmax(1) + 1) % 10) for batch in pictures()]
    report = export(convnet, tmp_path / "a.onnx", quantize="auto", data=wrong, tolerance=Tolerance(cosine=0.5))
    assert report.selection is not None
    assert any("are the labels those of its classes" in note for note in report.selection.notes)


def test_what_is_common_to_all_classes_does_not_hide_the_error(tmp_path: Path) -> None:
    class Shifted(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 100

    path = tt.export_onnx(Shifted(), torch.zeros(2, 5), tmp_path / "a.onnx", benchmark=False).path
    feeds = [{"x": torch.randn(64, 5, generator=torch.Generator().manual_seed(0)).numpy()}]
    judge = Judge(path, feeds)

    class Noisy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.flip(1) + 100

    other = tt.export_onnx(Noisy(), torch.zeros(2, 5), tmp_path / "b.onnx", benchmark=False).path
    found = judge.of(other)
    assert found.cosine < 0.5 and judge.against(found) is not None
    assert found.expected_drop is not None and found.expected_drop > 0.2
    assert judge.of(path).expected_drop == 0


def test_a_double_model_is_quantized_as_a_single_one(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10)).double().eval()
    data = [torch.randn(8, 3, 8, 8).double() for _ in range(4)]
    for scheme in ("dynamic", "static"):
        report = tt.export_onnx(
            model, data[0][:1], tmp_path / f"{scheme}.onnx", quantize=scheme, data=data, benchmark=False
        )
        assert report.quantize == scheme and report.quantized_nodes > 0 and report.verification.cosine > 0.98
        assert any("float64" in note for note in report.notes)
    assert next(model.parameters()).dtype is torch.float64


def test_no_more_than_512_rows_are_read(convnet: nn.Module, tmp_path: Path) -> None:
    served = []

    def endless() -> Iterator[torch.Tensor]:
        while True:
            served.append(64)
            yield torch.randn(64, 3, 32, 32)

    for scheme in (None, "dynamic"):
        served.clear()
        export(convnet, tmp_path / f"{scheme}.onnx", quantize=scheme, data=endless())
        assert sum(served) == 512
