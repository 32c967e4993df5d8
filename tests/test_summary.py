import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
from torch import nn

from torchtrim.errors import InputError, ModelError, PathError
from torchtrim.graph.execution import inputs_from_spec, run_fake, spec_of
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.summary import Summary, summary


class Sequences(nn.Module):
    """Two inputs, one optional; shared weights, a module of two names, one never called, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.alias = self.attention
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.embed.weight
        self.unused = nn.Linear(3, 3)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, object]:
        hidden = self.embed(ids) if scale is None else self.embed(ids) * scale
        hidden, _ = self.attention(hidden, hidden, hidden)
        return {"logits": self.head(hidden), "hidden": [hidden, hidden]}


@dataclass
class Result:
    logits: torch.Tensor
    name: str


class ToDataclass(nn.Module):
    def forward(self, x: torch.Tensor) -> Result:
        return Result(x.sum(dim=-1), "sum")


def macs(model: nn.Module, *args: torch.Tensor) -> int:
    return run_fake(model, Inputs.of(args)).macs.get("", 0)


def attention_macs(tokens: int, width: int) -> int:
    projections = tokens * width * 4 * width
    return projections + 2 * tokens * tokens * width


x = torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("model", "inputs", "by_hand"),
    [
        (nn.Conv2d(4, 8, 3, groups=2), (torch.zeros(3, 4, 6, 6),), 16 * 8 * 9 * 2),
        (nn.ConvTranspose2d(3, 8, 3, stride=2), (torch.zeros(1, 3, 4, 4),), 16 * 3 * 8 * 9),
        (nn.Linear(8, 3), (x,), 5 * 8 * 3),
        (nn.Bilinear(8, 8, 3), (x[:, 0], x[:, 0]), 8 * 8 * 3),
        (nn.LSTM(8, 4, 2, bidirectional=True, batch_first=True), (x,), 5 * 2 * 2 * (16 * 8 + 16 * 4)),
        (nn.GRU(8, 4, 2, batch_first=True), (x,), 5 * (12 * 8 + 3 * 12 * 4)),
        (nn.RNN(8, 4, batch_first=True), (x,), 5 * (4 * 8 + 4 * 4)),
        (nn.LSTMCell(8, 4), (x[:, 0],), 16 * 8 + 16 * 4),
        (nn.MultiheadAttention(8, 2, batch_first=True), (x, x, x), attention_macs(5, 8)),
        (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), (x,), attention_macs(5, 8) + 2 * 5 * 8 * 16),
        (nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), (x,), 5 * 8 * 4),
        (torchvision.ops.DeformConv2d(3, 8, 3), (torch.zeros(1, 3, 6, 6), torch.zeros(1, 18, 4, 4)), 16 * 8 * 3 * 9),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_macs_equal_those_counted_by_hand(model: nn.Module, inputs: tuple[torch.Tensor, ...], by_hand: int) -> None:
    assert macs(model, *inputs) == by_hand


def test_macs_equal_the_published_ones() -> None:
    with torch.device("meta"):
        resnet, vit = torchvision.models.resnet50(), torchvision.models.vit_b_16()
    image = torch.zeros(2, 3, 224, 224)
    assert macs(resnet, image) == 4_089_184_256
    assert summary(vit, image).macs == pytest.approx(17.56e9, rel=1e-3)


def test_rows_tell_shapes_sharing_and_what_is_never_called() -> None:
    read = summary(Sequences(), {"ids": torch.zeros(2, 5, dtype=torch.int64), "scale": torch.ones(2, 1, 1)})
    assert read.params == 80 + 288 + 12
    assert read["head"].params == 80 and read["head"].shapes == ((2, 5, 10),)
    assert read[""].shapes == ((2, 5, 10), (2, 5, 8), (2, 5, 8))
    assert read["alias"].alias_of == "attention"
    assert (read["unused"].calls, read["unused"].used) == (0, False)
    assert (read["attention.out_proj"].calls, read["attention.out_proj"].used) == (0, True)
    assert read["attention"].macs + read["head"].macs == read.macs
    assert "never" in str(read)


def test_the_table_the_html_and_the_data_agree() -> None:
    read = summary(timm.create_model("test_efficientnet"), torch.zeros(2, 3, 64, 64), depth=1)
    assert {row.path.count(".") for row in read.rows} == {0}
    assert read["blocks"].shapes[0][0] == 2
    text = str(read)
    assert "└─ classifier" in text and f"{read.params / 1e3:.2f} k" in text and "MACs at batch 1" in text
    assert read._repr_html_().count("<tr") == len(read.rows) + 2
    data = json.loads(json.dumps(read.to_dict()))
    assert data["macs"] == read.macs and data["rows"][0]["params"] == read.params
    assert data["size_mb"] == pytest.approx(sum(t.numel() * t.element_size() for t in _tensors(read)) / 1e6)


def _tensors(_: Summary) -> list[torch.Tensor]:
    model = timm.create_model("test_efficientnet")
    return [*model.parameters(), *model.buffers()]


def test_a_row_that_is_not_there_names_the_nearest() -> None:
    read = summary(timm.create_model("test_resnet"), torch.zeros(1, 3, 64, 64), depth=1)
    with pytest.raises(PathError, match=r"^layer: the summary has no row.*'layer4'"):
        read["layer"]


def test_hooks_with_state_are_run_and_those_of_the_user_are_not() -> None:
    class Doubled:
        def __call__(self, module: nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
            return torch.cat([output, output], dim=-1)

    model, seen = nn.Linear(3, 4), []
    model.register_forward_pre_hook(lambda module, args: seen.append(args))
    model.register_forward_hook(lambda module, args, kwargs, output: seen.append(output), with_kwargs=True)
    model.register_forward_hook(Doubled())
    assert summary(nn.Sequential(model), torch.zeros(2, 3))[""].shapes == ((2, 8),)
    assert not seen and len(model._forward_hooks) == 2 and len(model._forward_pre_hooks) == 1


def test_the_model_is_left_as_it_was() -> None:
    model = timm.create_model("test_resnet").train()
    seen: list[object] = []
    model.layer1.register_forward_hook(lambda module, args, output: seen.append(output))
    model.layer2.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    first, second = summary(model, torch.zeros(2, 3, 64, 64)), summary(model, torch.zeros(2, 3, 64, 64))
    assert first == second
    assert not seen and len(model.layer1._forward_hooks) == 1 and not model._forward_pre_hooks
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled() and torch.is_grad_enabled()


def test_buffers_written_by_the_forward_stay_as_they_were() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))
            self.plain = torch.zeros(1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen += 1
            self.plain.add_(1)
            return x + self.seen

    model = Counting()
    summary(model, torch.zeros(2, 3))
    assert model.seen.item() == 0 and model.plain.item() == 0


def test_a_forward_that_depends_on_values_is_run() -> None:
    detector = torchvision.models.detection.ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None)
    read = summary(detector, ([torch.rand(3, 320, 320)],), depth=1)
    assert read.ran == "real" and read["backbone"].macs > 0 and read["head"].calls == 1


def test_macs_are_for_one_whatever_the_batch() -> None:
    model = timm.create_model("test_vit")
    assert macs(model, torch.zeros(1, 3, 160, 160)) == macs(model, torch.zeros(3, 3, 160, 160)) > 0

    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x.view(4, 6))

    assert macs(Fixed(), torch.zeros(4, 2, 3)) == 12
    assert macs(nn.Linear(6, 2), torch.zeros(6)) == 12, "a vector without a batch"


def test_dataclass_outputs_and_half_precision() -> None:
    assert summary(ToDataclass(), torch.zeros(2, 3)).rows[0].shapes == ((2,),)
    assert summary(nn.Linear(3, 2).half(), torch.zeros(2, 3).half()).rows[0].dtypes == ("float16",)


@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize(
    ("image", "path"),
    [
        (torch.zeros(1, 1, 64, 64), "conv1.0"),
        (torch.zeros(1, 3, 64, 64).double(), "conv1.0"),
        (torch.zeros(8), "conv1.0"),
    ],
    ids=["channels", "type", "dimensions"],
)
def test_a_wrong_input_names_the_module_that_refused(meta: bool, image: torch.Tensor, path: str) -> None:
    with torch.device("meta" if meta else "cpu"):
        model = timm.create_model("test_resnet")
    with pytest.raises(InputError, match="expected: 3 channels, float32, weight") as caught:
        summary(model, image)
    assert caught.value.path == path and str(list(image.shape)) in str(caught.value)


def test_a_wrong_type_is_refused_by_linear_layers_too() -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(InputError, match=r"^0: Linear refuses.*float64\[2, 3\]"):
            summary(nn.Sequential(nn.Linear(3, 4, device=device)), torch.zeros(2, 3).double())


def test_missing_inputs_and_unreadable_models() -> None:
    with pytest.raises(InputError, match="example inputs are needed"):
        summary(nn.Linear(2, 2))
    with pytest.raises(InputError, match="too many positional"):
        summary(nn.Linear(2, 2), (torch.zeros(1, 2), torch.zeros(1, 2)))
    lazy = nn.LazyLinear(3)
    with pytest.raises(ModelError, match="lazy"):
        summary(lazy, torch.zeros(1, 2))
    assert isinstance(lazy, nn.LazyLinear)


def test_recorded_inputs_are_used_and_survive_json() -> None:
    inputs = Inputs(
        (torch.zeros(1, 3, dtype=torch.int64), [torch.zeros(2), None], (1, 2.5)), {"mask": torch.ones(1).bool()}
    )
    spec = json.loads(json.dumps(spec_of(inputs)))
    assert inputs_from_spec(spec).describe() == inputs.describe()
    with pytest.raises(InputError):
        inputs_from_spec({"args": [{"shape": [1], "dtype": "float33"}], "kwargs": {}})
    model = nn.Linear(4, 2)
    model.__dict__["_torchtrim_inputs"] = spec_of(Inputs.of(torch.zeros(1, 4)))
    state = torch.get_rng_state()
    assert summary(model).macs == 8
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_a_billion_parameters_take_under_a_gigabyte() -> None:
    code = """
import re, resource, sys, torch
from pathlib import Path
from torch import nn
from torchtrim.graph.summary import summary
torch.set_num_threads(1)
with torch.device("meta"):
    layer = nn.TransformerEncoderLayer(2048, 16, 8192, batch_first=True)
    model = nn.TransformerEncoder(layer, 20)
read = summary(model, torch.zeros(1, 128, 2048))
status = Path("/proc/self/status")  # ru_maxrss is inherited from the process that started this one
if status.exists():
    peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) * 1024
else:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
print(read.params, peak)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    params, peak = map(int, done.stdout.split())
    assert params > 1_000_000_000 and peak < 1_000_000_000
