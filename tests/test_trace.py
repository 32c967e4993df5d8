"""Reading models: what `trace` lists, that it is right in both modes, and that the user's model stays as it was."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

import torchtrim as tt
from torchtrim.graph.check import differs, variants
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.trace import open_all

PICTURE = torch.zeros(1, 3, 32, 32)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.relu(self.relu(self.conv(x)) + x)


def test_nodes_come_in_the_order_of_execution_with_their_neighbours() -> None:
    graph = tt.trace(nn.Sequential(Residual(), nn.Flatten()), torch.zeros(1, 4, 5, 5))
    assert [node.address for node in graph] == [":input", "0.conv", "0.relu#0", "0:add", "0.relu#1", "1"]
    add = graph.node("0:add")
    assert add.inputs == ("0.relu#0", ":input")
    assert add.users == ("0.relu#1",)
    assert (add.op, add.type, add.path, add.modes) == ("function", "add", "0", "both")
    assert graph.node(":input").users == ("0.conv", "0:add")
    assert graph.node("1").output_shape == (1, 100)
    assert graph.node("1").output_dtype == "float32"


def test_cost_of_nodes_is_that_of_the_model() -> None:
    model = torchvision.models.resnet18()
    graph = tt.trace(model, torch.zeros(2, 3, 64, 64), check=False)
    assert sum(node.params for node in graph) == sum(p.numel() for p in model.parameters())
    assert sum(node.macs for node in graph) == tt.summary(model, torch.zeros(1, 3, 64, 64)).macs
    assert graph.node("conv1").macs == 32 * 32 * 64 * 3 * 7 * 7
    assert graph.node("conv1").output_shape == (2, 64, 32, 32)


def test_attention_in_one_module_costs_what_it_costs() -> None:
    model = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2))
    x = torch.zeros(1, 5, 8)
    assert sum(node.macs for node in tt.trace(model, x, check=False)) == tt.summary(model, x).macs


def test_calls_are_counted() -> None:
    graph = tt.trace(Residual(), torch.zeros(1, 4, 5, 5))
    assert (graph.calls("conv"), graph.calls("relu"), graph.calls("unused")) == (1, 2, 0)
    with pytest.raises(tt.PathError, match="never called"):
        graph.node("unused")
    with pytest.raises(tt.PathError, match="several calls"):
        graph.node("relu")
    with pytest.raises(tt.PathError, match="'conv'"):
        graph.node("conb")


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("test_resnet", ["fc"]),
        ("test_vit", ["head"]),
        ("test_convnext", ["head.fc"]),
        ("test_efficientnet", ["classifier"]),
        ("deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
    ],
)
def test_heads_of_timm_models(name: str, heads: list[str]) -> None:
    model = timm.create_model(name)
    size = model.pretrained_cfg["input_size"]
    assert tt.trace(model, torch.zeros(1, *size), check=False).heads == heads


@pytest.mark.parametrize(
    ("name", "size", "heads"),
    [
        ("squeezenet1_1", 64, ["classifier.1"]),
        ("inception_v3", 299, ["fc", "AuxLogits.fc"]),
        ("googlenet", 64, ["fc", "aux2.fc2", "aux1.fc2"]),
        ("vgg11", 64, ["classifier.6"]),
        ("lraspp_mobilenet_v3_large", 64, ["classifier.low_classifier", "classifier.high_classifier"]),
    ],
)
def test_heads_of_torchvision_models(name: str, size: int, heads: list[str]) -> None:
    options: dict[str, Any] = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    if name.startswith("lraspp"):
        options = {"weights": None, "weights_backbone": None}
    model = torchvision.models.get_model(name, **options)
    assert sorted(tt.trace(model, torch.zeros(1, 3, size, size), check=False).heads) == sorted(heads)


def test_an_identity_in_place_of_a_head_is_the_head() -> None:
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    assert tt.trace(model, torch.zeros(1, 3, 32, 32), check=False).heads == ["fc"]
    assert tt.trace(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), PICTURE).heads == []


# Silent traps: each of these is wrong, without a word, in a plain symbolic trace.


class InPlace(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.add_(1)
        return y


class Noise(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.rand(x.shape[-1]) + torch.zeros(1, device=x.device)


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.count.add_(1)
        return x + self.count


class ModeInFunction(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, 0.5, training=self.training)


class ModeInBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.a(x) if self.training else self.b(x)


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))
        self.cache: dict[str, torch.Tensor] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if "w" not in self.cache:
            self.cache["w"] = self.weight * 2
        return x * self.cache["w"]


class OnData(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


class Wrapped(nn.Module):
    """Puts a module below the root, with a child of its own so that it is opened."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        inner.add_module("spare", nn.Identity())
        self.inner = inner
        self.last = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.inner(x))


def same_in_every_variant(model: nn.Module, x: torch.Tensor) -> None:
    """The opened model equals the original, run by hand (not by the library's own check)."""
    opened = open_all(tt.trace(model, x)._reader, model)
    for variant in variants(Inputs.of(x)):
        results = []
        for module in (copy.deepcopy(model), copy.deepcopy(opened)):
            module.train(variant.training)
            torch.manual_seed(1)
            results.append((variant.inputs.fresh().call(module), dict(module.named_buffers())))
        assert differs(results[0], results[1]) is None, variant.name


@pytest.mark.parametrize("inner", [InPlace, Noise, Counter, ModeInFunction, ModeInBranch, Cache, OnData])
def test_silent_traps(inner: type[nn.Module]) -> None:
    model = Wrapped(inner())
    before = copy.deepcopy(model.state_dict())
    same_in_every_variant(model, torch.randn(2, 4))
    assert differs(before, dict(model.state_dict())) is None
    if inner is Cache:
        assert model.inner.cache == {}


def test_random_numbers_are_drawn_anew_by_an_opened_model() -> None:
    opened = open_all(tt.trace(Noise(), torch.randn(2, 4))._reader, Noise())
    x = torch.zeros(2, 4)
    assert not torch.equal(opened(x), opened(x))
    assert list(opened.state_dict()) == []


@pytest.mark.parametrize(
    ("inner", "reason"),
    [
        (ModeInBranch, "differs between train and eval"),
        (Cache, "keeps state in the attribute 'cache'"),
        (OnData, "branches on the values of its data"),
    ],
)
def test_what_stays_closed_says_why(inner: type[nn.Module], reason: str) -> None:
    graph = tt.trace(Wrapped(inner()), torch.randn(2, 4))
    assert reason in graph.leaves["inner"]
    assert graph.node("inner").users == ("last",)


def test_a_root_that_depends_on_data_is_refused() -> None:
    with pytest.raises(tt.TraceError, match="branches on the values of its data"):
        tt.trace(OnData(), torch.randn(2, 4))


class OnBatch(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.shape[0] > 2 else -x


class OnSize(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pad = 4 - x.shape[-1] % 4
        return F.pad(x, (0, pad)) if x.shape[-1] % 4 else x


def test_control_flow_on_the_batch_is_refused_and_on_the_size_is_guarded() -> None:
    with pytest.raises(tt.TraceError, match="batch size"):
        tt.trace(OnBatch(), torch.randn(2, 4))
    graph = tt.trace(OnSize(), torch.randn(2, 3, 32, 32))
    assert any("size 64x64: equal" in line for line in graph.checked)
    opened = open_all(graph._reader, OnSize())
    assert opened(torch.zeros(5, 3, 8, 8)).shape == (5, 3, 8, 8)
    with pytest.raises(tt.GuardError, match=r"x\.shape\[-1\]"):
        opened(torch.zeros(5, 3, 8, 9))


@dataclass
class Answer:
    score: torch.Tensor
    extra: Any = None


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 3)

    def forward(
        self, a: torch.Tensor, b: dict[str, torch.Tensor], scale: float = 2.0, *, mask: torch.Tensor | None = None
    ) -> Answer:
        y = self.lin(a + b["x"] * scale)
        return Answer(score=y if mask is None else y * mask, extra=(y, {"twice": 2 * y}))


def test_several_inputs_dicts_optional_arguments_and_dataclasses() -> None:
    inputs = (torch.randn(2, 4), {"x": torch.randn(2, 4)})
    graph = tt.trace(Several(), inputs)
    assert "eval, batch 1: equal" in graph.checked
    opened = open_all(graph._reader, Several())
    assert isinstance(opened(*inputs), Answer)
    with pytest.raises(tt.GuardError, match="'scale' was fixed"):
        opened(*inputs, scale=3.0)
    with pytest.raises(tt.GuardError, match="'mask' was fixed"):
        opened(*inputs, mask=torch.ones(2, 3))
    named = {"a": inputs[0], "b": inputs[1], "mask": torch.ones(2, 3)}
    assert ":mask" in tt.trace(Several(), named).nodes


def test_the_model_is_left_as_it_was() -> None:
    model = timm.create_model("test_resnet")
    model.train()
    model.layer1.eval()
    model.fc.weight.requires_grad_(False)
    calls: list[int] = []
    model.layer1.register_forward_hook(lambda *_: calls.append(1))
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    with torch.enable_grad():
        tt.trace(model, x)
        assert torch.is_grad_enabled()
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert not model.fc.weight.requires_grad
    assert model.fc.bias.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_that_a_plain_trace_breaks_are_usable_afterwards() -> None:
    model = timm.create_model("levit_128s").eval()
    x = torch.randn(1, 3, 224, 224)
    before = model(x)
    graph = tt.trace(model, x, check=False)
    assert any("attention_bias_cache" in reason for reason in graph.leaves.values())
    assert torch.equal(model(x), before)


def test_train_only_calls_are_listed() -> None:
    graph = tt.trace(torchvision.models.inception_v3(init_weights=False), torch.zeros(1, 3, 299, 299), check=False)
    assert graph.node("AuxLogits.fc").modes == "train"
    assert graph.node("Mixed_5b.branch1x1.conv").modes == "both"


def test_shared_modules_and_aliases() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
            self.b = self.a

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    graph = tt.trace(Shared(), torch.randn(2, 4))
    assert [node.address for node in graph][1:] == ["a.0#0", "a.1#0", "a.0#1", "a.1#1"]
    assert sum(node.params for node in graph) == 20


def test_wrappers_are_taken_off() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    assert tt.trace(nn.DataParallel(model), torch.zeros(1, 4)).heads == ["0"]
    assert tt.trace(torch.compile(model), torch.zeros(1, 4)).heads == ["0"]
    with pytest.raises(tt.ModelError, match="TorchScript"):
        tt.trace(torch.jit.trace(model, torch.zeros(1, 4)), torch.zeros(1, 4))


def test_meta_and_half_models() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    graph = tt.trace(model, torch.zeros(1, 3, 64, 64, device="meta"))
    assert graph.checked == ("not run: the model is on the meta device",)
    assert graph.node("fc").output_shape == (1, 1000)
    half = nn.Sequential(nn.Linear(4, 4)).half()
    assert tt.trace(half, torch.zeros(1, 4).half()).node("0").output_dtype == "float16"
    with pytest.raises(tt.InputError, match=r"float16|Half"):
        tt.trace(half, torch.zeros(1, 4))


def test_bad_inputs() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(tt.InputError, match="shape"):
        tt.trace(model, torch.zeros(1, 5))
    with pytest.raises(tt.InputError, match=r"do not fit Sequential\.forward"):
        tt.trace(model, (torch.zeros(1, 4), torch.zeros(1, 4)))
    with pytest.raises(tt.InputError, match="no tensor"):
        tt.trace(model, ())
    with pytest.raises(tt.InputError, match="pass example inputs"):
        tt.trace(model)
    with pytest.raises(tt.ModelError, match="not a PyTorch model"):
        tt.trace("resnet18", torch.zeros(1, 4))  # type: ignore[arg-type]


def test_the_picture_is_plain_data_too() -> None:
    import json

    graph = tt.trace(nn.Sequential(nn.Linear(4, 2)), torch.zeros(1, 4))
    assert json.loads(json.dumps(graph.to_dict()))["nodes"][1]["macs"] == 8
    assert "0" in str(graph)
    assert graph.outputs == "0"
