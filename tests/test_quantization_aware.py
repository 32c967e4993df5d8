"""Quantization-aware training: what it rounds, what it leaves alone, and that the file computes the same."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper
from sklearn.datasets import load_digits
from torch import nn

import torchtrim as tt
from torchtrim.bench.session import OnnxSession
from torchtrim.errors import EditError, InputError, ModelError

loss = nn.functional.cross_entropy


class Net(nn.Module):
    """Convolutions with norms, a residual add, a depthwise one, hard swish, and a head."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False), nn.BatchNorm2d(width))
        self.c = nn.Sequential(nn.Conv2d(width, 24, 1), nn.Hardswish(), nn.MaxPool2d(2))
        self.hidden = nn.Linear(96, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.max_pool2d(self.stem(x), 2)
        x = self.c((self.b(self.a(x)) + x).relu())
        return self.head(self.hidden(x.flatten(1)).relu())


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16
    return x[order], torch.tensor(found.target)[order]


def train(net: nn.Module, x: torch.Tensor, y: torch.Tensor, *, epochs: int, lr: float, **more: Any) -> None:
    optimizer = torch.optim.Adam([*net.parameters(), *more.get("extra", ())], lr=lr)
    net.train()
    for epoch in range(epochs):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for rows in order.split(64):
            optimizer.zero_grad()
            loss(net(x[rows]), y[rows]).backward()
            for before in more.get("before", ()):
                before()
            optimizer.step()
            for after in more.get("after", ()):
                after()
    net.eval()


@torch.no_grad()
def said(net: nn.Module, x: torch.Tensor) -> NDArray[Any]:
    return net(x).numpy()


def run(path: Path, x: torch.Tensor) -> NDArray[Any]:
    session = OnnxSession(path)
    return session.run({"x": x.numpy()}, ["output"])[0]


def cosine(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def accuracy(said: NDArray[Any], y: torch.Tensor) -> float:
    return float((said.argmax(1) == y.numpy()).mean())


def export(net: nn.Module, x: torch.Tensor, path: Path, **more: Any) -> NDArray[Any]:
    data = [x[:128], x[128:256]]
    tt.export_onnx(net, x[:2], path, quantize="static", data=data, benchmark=False, tolerance=LOOSE, **more)
    return run(path, x)


LOOSE = tt.Tolerance(relative=None, cosine=0.1)


@pytest.fixture(scope="module")
def trained() -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    net, (x, y) = Net(), digits()
    train(net, x[:1200], y[:1200], epochs=5, lr=5e-3)
    assert accuracy(said(net, x[1200:]), y[1200:]) > 0.9
    return net, x, y


@pytest.fixture(scope="module")
def aware(trained: tuple[nn.Module, torch.Tensor, torch.Tensor]) -> tuple[nn.Module, tt.QuantizationAware]:
    """The net, trained on for weights of 2 bits (-1, 0, 1 by channel); still attached."""
    net, x, y = copy.deepcopy(trained[0]), *trained[1:]
    q = tt.QuantizationAware(net, x[:256], weight_bits=2, freeze_after=60)
    train(net, x[:1200], y[:1200], epochs=5, lr=2e-3)
    return net, q


def test_accuracy_comes_back_and_the_file_has_it(trained: Any, aware: Any, tmp_path: Path) -> None:
    plain, x, y = trained
    net, q = aware
    further = copy.deepcopy(plain)  # as many epochs in float, rounded afterwards
    train(further, x[:1200], y[:1200], epochs=5, lr=2e-3)
    after = tt.QuantizationAware(further, x[:256], weight_bits=2)
    rounded = export(further, x, tmp_path / "rounded.onnx", ranges=after)
    file, here = export(net, x, tmp_path / "aware.onnx", ranges=q), said(net, x)
    assert accuracy(rounded[1200:], y[1200:]) < 0.6
    assert accuracy(file[1200:], y[1200:]) > 0.85
    assert cosine(here, file) > 0.999
    assert (here.argmax(1) == file.argmax(1)).mean() > 0.99


def test_the_file_has_the_trained_scales(trained: Any, aware: Any, tmp_path: Path) -> None:
    net, q = aware
    export(net, trained[1], tmp_path / "a.onnx", ranges=q)
    graph = onnx.load(tmp_path / "a.onnx").graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    scales = {node.input[0]: constants[node.input[1]] for node in graph.node if node.op_type == "QuantizeLinear"}
    ranges = q.ranges()
    low, high = ranges.activations["stem.0"]
    assert scales["x"] == pytest.approx((high - low) / 255, rel=1e-6)
    found = sorted(float(scale) for scale in scales.values())
    for low, high in (*ranges.activations.values(), *ranges.outputs.values()):
        assert min(abs(scale / ((high - low) / 255) - 1) for scale in found) < 1e-5
    kept = {name: value for name, value in constants.items() if name.endswith("weight_quantized")}
    assert len(kept) == 6
    for value in kept.values():
        assert value.dtype == np.int8
        assert np.abs(value).max() == 1


def test_eight_bits_agree_and_nothing_is_left(trained: Any, tmp_path: Path) -> None:
    net, x, y = copy.deepcopy(trained[0]), *trained[1:]
    keys, parameters = list(net.state_dict()), list(net.parameters())
    q = tt.QuantizationAware(net, [(x[:128], y[:128]), (x[128:256], y[128:256])])
    train(net, x[:300], y[:300], epochs=1, lr=1e-3)
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(parameters, net.parameters(), strict=True))
    net.train()
    q.freeze()
    assert not any(module.training for module in net.modules() if isinstance(module, nn.BatchNorm2d))
    net.eval()
    here = said(net, x)
    report = q.finish()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())
    assert all("weight" not in module.__dict__ for module in net.modules())
    assert net.train().b[1].training and not net.eval().b[1].training
    file = export(net, x, tmp_path / "a.onnx", ranges=report)
    assert cosine(here, file) > 0.9998
    assert (here.argmax(1) == file.argmax(1)).mean() > 0.995
    assert not np.array_equal(here, said(net, x))
    assert "stem.0" in str(report)
    again = tt.TrainedRanges.from_dict(report.to_dict())
    assert again == report == q.ranges()


def test_zeros_and_clusters_stay(trained: Any, tmp_path: Path) -> None:
    net, x, y = copy.deepcopy(trained[0]), *trained[1:]
    p = tt.MagnitudePruner(net, tt.ConstantSparsity(0.6), include=["a", "hidden"])
    p.step()
    p.finish()
    zeros = {name: net.get_parameter(name) == 0 for name in ("a.0.weight", "hidden.weight")}
    clusters = tt.WeightClustering(net, clusters=8, include=["a", "hidden"])
    q = tt.QuantizationAware(net, x[:256])
    values = net.hidden.weight.unique().detach().clone()
    train(net, x[:300], y[:300], epochs=1, lr=1e-3, before=[clusters.share_gradients], after=[clusters.step])
    here = said(net, x)
    assert not torch.equal(values, net.hidden.weight.unique())  # the shared values were trained
    export(net, x, tmp_path / "a.onnx", ranges=q)
    file = run(tmp_path / "a.onnx", x)
    assert (here.argmax(1) == file.argmax(1)).mean() > 0.99
    q.finish()
    clusters.finish()
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "a.onnx").graph.initializer}
    for name, zero in zeros.items():
        weight = net.get_parameter(name)
        assert torch.equal(weight == 0, zero)
        assert len(weight.unique()) <= 8
        whole = stored[f"{name}_quantized"]
        assert (whole[zero.numpy()] == 0).all()
        assert all(len(np.unique(channel)) <= 8 for channel in whole)


def test_learned_steps(trained: Any) -> None:
    net, x, y = copy.deepcopy(trained[0]), *trained[1:]
    q = tt.QuantizationAware(net, x[:256], learn=True)
    before = q.ranges()
    assert len(q.parameters()) == len(before.activations) + len(before.outputs)
    train(net, x[:300], y[:300], epochs=1, lr=1e-2, extra=q.parameters())
    after = q.ranges()
    assert all(before.activations[path] != after.activations[path] for path in before.activations)
    q.freeze()
    train(net, x[:300], y[:300], epochs=1, lr=1e-2, extra=q.parameters())
    assert q.ranges().activations == after.activations


def test_going_on_from_a_state(trained: Any) -> None:
    net, x, y = copy.deepcopy(trained[0]), *trained[1:]
    q = tt.QuantizationAware(net, x[:256], freeze_after=3)
    train(net, x[:300], y[:300], epochs=1, lr=1e-3)
    assert q.frozen and "frozen" in repr(q)
    other = copy.deepcopy(trained[0])
    other.load_state_dict(net.state_dict())
    again = tt.QuantizationAware(other, x[:32])
    again.load_state_dict(q.state_dict())
    assert again.frozen and again.ranges() == q.ranges()
    assert np.array_equal(said(net, x), said(other, x))
    with pytest.raises(EditError, match="another model"):
        tt.QuantizationAware(nn.Sequential(nn.Linear(2, 2)), torch.randn(4, 2)).load_state_dict(q.state_dict())
    with pytest.raises(EditError, match="not the state"):
        again.load_state_dict({})


def test_products_of_three_dimensions_and_tensorrt(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    net = nn.Sequential(nn.Linear(8, 16), layer, nn.Linear(16, 5)).eval()
    x = torch.randn(64, 6, 8)
    q = tt.QuantizationAware(net, x, target="tensorrt")
    assert "1.self_attn.out_proj" in q.ranges().left_out  # its weight is used without calling it
    assert sorted(q.ranges().activations) == ["0", "1.linear1", "1.linear2", "2"]
    here = said(net, x)
    report = tt.export_onnx(
        net, x[:2], tmp_path / "a.onnx", target="tensorrt", quantize="static", data=[x], ranges=q,
        benchmark=False, tolerance=LOOSE, input_names=["x"], output_names=["output"],
    )  # fmt: skip
    assert not any("no tensor" in note for note in report.notes)
    # As it is written: the 8-bit sums of this processor's kernels may saturate.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx", options, providers=["CPUExecutionProvider"])
    assert cosine(here, session.run(["output"], {"x": x.numpy()})[0]) > 0.999
    low, high = q.ranges().activations["0"]
    assert low == -high


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std(), self.bias)


class Padded(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(nn.functional.pad(x, (0, 1, 0, 1)), self.weight, self.bias)


def test_what_is_left_out() -> None:
    weighted = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 4, 1))
    net = nn.Sequential(Standardised(1, 4, 3), Padded(4, 4, 2), weighted, nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    net.unused = nn.Linear(2, 2)
    net.forward = lambda x: nn.Sequential(*list(net)[:5])(x)  # type: ignore[method-assign]
    found = tt.QuantizationAware(net, torch.randn(4, 1, 6, 6), exclude="4").ranges()
    assert list(found.activations) == ["1", "3"]
    assert set(found.left_out) == {"0", "2", "4", "unused"}


def test_a_forward_that_fails_leaves_the_weight(trained: Any) -> None:
    net, x = copy.deepcopy(trained[0]), trained[1]
    tt.QuantizationAware(net, x[:32])
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 3, 8, 8))
    assert all("weight" not in module.__dict__ for module in net.modules())


def test_through_finetune(trained: Any) -> None:
    net, x, y = copy.deepcopy(trained[0]), *trained[1:]
    q = tt.QuantizationAware(net, x[:256], freeze_after=6)
    done = tt.finetune(net, [(x[:64], y[:64])] * 4, [(x[64:128], y[64:128])], epochs=2, lr=1e-3)
    assert len(done.epochs) == 2
    assert q.ranges().batches == 8 and q.frozen
    q.finish()


def test_bad_input(trained: Any, tmp_path: Path) -> None:
    net, x = copy.deepcopy(trained[0]), trained[1]
    with pytest.raises(ModelError, match="no layer to quantize"):
        tt.QuantizationAware(nn.Sequential(nn.ReLU()), x[:8])
    for wrong in (None, [], 3):
        with pytest.raises(InputError, match="taken from data"):
            tt.QuantizationAware(net, wrong)
    with pytest.raises(InputError, match="does not take the data"):
        tt.QuantizationAware(net, torch.randn(4, 3, 8, 8))
    with pytest.raises(InputError, match="NaN"):
        tt.QuantizationAware(net, x[:8] * float("nan"))
    for setting in ({"weight_bits": 1}, {"momentum": 0}, {"freeze_after": -1}, {"target": "tpu"}):
        with pytest.raises(InputError):
            tt.QuantizationAware(net, x[:8], **setting)
    assert not any(module._forward_pre_hooks for module in net.modules())
    q = tt.QuantizationAware(net, x[:64])
    with pytest.raises(ModelError, match="already"):
        tt.QuantizationAware(net, x[:64])
    data = {"data": [x[:64]], "benchmark": False}
    other = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    for model, more in (
        (other, {"quantize": "static", "ranges": q}),
        (net, {"quantize": "dynamic", "ranges": q}),
        (net, {"quantize": "static", "ranges": {"x": (0, 1)}}),
        (net, {"quantize": "static", "ranges": q, "per_channel": False}),
        (net, {"quantize": "static", "ranges": q, "target": "tensorrt"}),
    ):
        with pytest.raises(InputError):
            tt.export_onnx(model, x[:2], tmp_path / "a.onnx", **data, **more)
    assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="not trained ranges"):
        tt.TrainedRanges.from_dict({})


def test_the_code_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "qat.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "qat.md", "exec"), names)
    assert Path("digits.onnx").is_file()
