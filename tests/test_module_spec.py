"""Modules as data: every class of torch.nn comes back to the bit, and nothing else is ever built from a file."""

from __future__ import annotations

import copy
import json
import random
import sys
from typing import Any

import pytest
import timm.layers
import torch
import torchvision
from pydantic import TypeAdapter
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm

from torchtrim.edits.edit import _plain
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.errors import EditError, TorchTrimError

ENCODER = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu", dropout=0.3)
SHARED = nn.Linear(3, 3)

MODULES: list[nn.Module] = [
    nn.Conv2d(3, 8, (3, 1), padding="same", bias=False, padding_mode="reflect"),
    nn.Conv1d(4, 8, 3, stride=2, padding=1, dilation=2, groups=2),
    nn.ConvTranspose2d(3, 4, 3, 2, output_padding=1),
    nn.Linear(2, 3, bias=False),
    nn.Bilinear(2, 3, 4),
    nn.Dropout(0.2, inplace=True),
    nn.BatchNorm2d(4, affine=False),
    nn.BatchNorm1d(4, momentum=None, track_running_stats=False),
    nn.SyncBatchNorm(3),
    nn.InstanceNorm2d(3, affine=True),
    nn.LayerNorm((4, 8), eps=1e-6, bias=False),
    nn.GroupNorm(2, 4),
    nn.RMSNorm(4),
    nn.LocalResponseNorm(2, alpha=1e-3),
    nn.MultiheadAttention(8, 2, kdim=4, vdim=6, add_bias_kv=True, batch_first=True),
    nn.MultiheadAttention(8, 2, bias=False, add_zero_attn=True),
    nn.LSTM(3, 4, 2, proj_size=2, bidirectional=True, dropout=0.1),
    nn.GRU(3, 4, bias=False, batch_first=True),
    nn.RNN(3, 4, nonlinearity="relu"),
    nn.GRUCell(3, 4),
    nn.RNNCell(2, 3, nonlinearity="relu"),
    ENCODER,
    nn.TransformerEncoder(ENCODER, 2, norm=nn.LayerNorm(8)),
    nn.TransformerDecoderLayer(8, 2, 16, norm_first=True),
    nn.Embedding(5, 3, padding_idx=0, max_norm=1.0),
    nn.EmbeddingBag(5, 3, mode="max"),
    nn.PReLU(3, init=0.1),
    nn.LeakyReLU(0.3),
    nn.Hardtanh(-2, 2),
    nn.GELU("tanh"),
    nn.Softmax(dim=-1),
    nn.AdaptiveAvgPool2d((None, 7)),
    nn.MaxPool2d(2, ceil_mode=True, return_indices=True),
    nn.AvgPool2d(3, stride=2, count_include_pad=False),
    nn.FractionalMaxPool2d(2, output_ratio=0.5),
    nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=True),
    nn.Flatten(2),
    nn.Unflatten(1, (2, 3)),
    nn.PixelShuffle(2),
    nn.ConstantPad1d(2, float("-inf")),
    nn.ZeroPad2d((1, 2, 3, 4)),
    nn.CrossEntropyLoss(torch.ones(3), label_smoothing=0.1),
    nn.AdaptiveLogSoftmaxWithLoss(8, 20, [5, 10], div_value=2.0),
    nn.ParameterList([nn.Parameter(torch.ones(2))]),
    nn.ModuleDict({"a": nn.ReLU(), "b": nn.Linear(1, 1)}),
    nn.ModuleList([nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU(), nn.Flatten())]),
    nn.Sequential(SHARED, nn.ReLU(), SHARED),
    timm.layers.DropPath(0.1, scale_by_keep=False),
    timm.layers.BatchNormAct2d(4, act_layer=nn.SiLU),
    timm.layers.Mlp(8, 16),
    timm.layers.PatchEmbed(32, 8, 3, 16),
    timm.layers.SqueezeExcite(16),
    timm.layers.ConvNormAct(3, 4),
    torchvision.ops.StochasticDepth(0.1, "row"),
    torchvision.ops.SqueezeExcitation(8, 2),
    torchvision.ops.Conv2dNormActivation(3, 4),
    torchvision.ops.FrozenBatchNorm2d(3),
    torchvision.models.resnet18().layer2[0],
]


def plain(spec: ModuleSpec, weights: bool = True) -> Any:
    return json.loads(json.dumps(_plain(spec, weights), allow_nan=False))


def read(data: Any) -> ModuleSpec:
    return TypeAdapter(ModuleSpec).validate_python(data)  # type: ignore[no-any-return]


def kinds(module: nn.Module) -> dict[str, type]:
    return {path: type(each) for path, each in module.named_modules(remove_duplicate=False)}


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_a_module_comes_back_from_json_to_the_bit(module: nn.Module) -> None:
    spec = ModuleSpec.of(module)
    again = read(plain(spec))
    assert spec.reason is None
    assert again == spec
    before = torch.get_rng_state()
    built = again.build()
    assert torch.equal(torch.get_rng_state(), before) or spec.weights is None
    assert repr(built) == repr(module)
    assert kinds(built) == kinds(module)
    state, expected = built.state_dict(), module.state_dict()
    assert list(state) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name
        assert state[name].dtype == tensor.dtype
        assert state[name].data_ptr() != tensor.data_ptr()


def test_what_is_built_computes_the_same() -> None:
    for module, given in (
        (nn.LSTM(3, 4, 2, bidirectional=True), torch.randn(5, 2, 3)),
        (nn.MultiheadAttention(8, 2), (torch.randn(3, 2, 8),) * 3),
        (copy.deepcopy(ENCODER), torch.randn(2, 4, 8)),
        (timm.layers.SqueezeExcite(16), torch.randn(2, 16, 4, 4)),
        (nn.Upsample(scale_factor=2), torch.randn(1, 2, 3, 3)),
    ):
        module.eval()
        built = ModuleSpec.of(module).build()
        arguments = given if isinstance(given, tuple) else (given,)
        left, right = (torch.utils._pytree.tree_leaves(each(*arguments)) for each in (module, built))
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_ties_flags_modes_and_types_of_values() -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7, bias=False), nn.BatchNorm1d(7)).half()
    net[1].weight = net[0].weight
    net[2].eval()
    net[2].bias.requires_grad_(False)
    built = read(plain(ModuleSpec.of(net))).build()
    assert built[1].weight is built[0].weight
    assert built[0].weight.dtype == torch.float16
    assert [each.training for each in built.modules()] == [each.training for each in net.modules()]
    assert [each.requires_grad for each in built.parameters()] == [True, True, False]


def test_a_child_that_was_exchanged_after_construction() -> None:
    layer = copy.deepcopy(ENCODER)
    layer.dropout1 = nn.Identity()
    spec = ModuleSpec.of(layer)
    assert list(spec.children) == ["dropout1"]
    assert isinstance(read(plain(spec)).build().dropout1, nn.Identity)


def test_the_live_module_is_not_in_the_record() -> None:
    module = nn.ReLU()
    spec = ModuleSpec.of(module)
    assert spec.live is module
    assert spec.recorded().live is None
    assert spec.recorded() == spec
    assert "live" not in plain(spec)
    with pytest.raises(Exception, match="live"):
        read(plain(spec) | {"live": None})


def test_by_hand_a_name_and_arguments_are_enough() -> None:
    assert repr(read({"type": "ReLU6"}).build()) == "ReLU6()"
    assert repr(read({"type": "torch.nn.Dropout", "arguments": {"p": 0.1}}).build()) == "Dropout(p=0.1, inplace=False)"
    nested = {
        "type": "Sequential",
        "children": {"a": {"type": "Linear", "arguments": {"in_features": 2, "out_features": 3}}},
    }
    assert read(nested).build()(torch.zeros(1, 2)).shape == (1, 3)
    assert (
        read({"type": "Linear", "arguments": {"in_features": 2, "out_features": 3}})
        .build(dtype=torch.float64)
        .weight.dtype
        == torch.float64
    )


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"type": "ReLu"}, "'ReLU'"),
        ({"type": "Linear", "arguments": {"in_features": 2}}, "out_features"),
        ({"type": "Linear", "arguments": {"in_features": "many", "out_features": 3}}, "Linear"),
        ({"type": "torch.nn.modules.linear:LazyLinear", "arguments": {"out_features": 3}}, "cannot be made"),
        ({"type": "Sequential", "children": {"a.b": {"type": "ReLU"}}}, "a.b"),
        ({"type": "ReLU", "switched": ["b"]}, "no such module"),
        ({"type": "ReLU", "arguments": None}, "not known"),
    ],
)
def test_a_spec_that_is_wrong_says_where(spec: Any, message: str) -> None:
    with pytest.raises(EditError, match=message):
        read(spec).build()


def test_weights_that_do_not_belong() -> None:
    data = plain(ModuleSpec.of(nn.Linear(2, 3)))
    with pytest.raises(EditError, match="not those"):
        read(
            data
            | {
                "type": "Bilinear",
                "arguments": {"in1_features": 2, "in2_features": 2, "out_features": 1, "bias": False},
            }
        ).build()
    with pytest.raises(EditError, match="another shape"):
        read(data | {"arguments": {"in_features": 10**9, "out_features": 10**9}}).build()
    with pytest.raises(EditError, match="not in the record"):
        read(plain(ModuleSpec.of(timm.layers.LayerScale(4)), weights=False)).build()


class Own(nn.Module):
    """A class of the user's."""

    made = 0

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        type(self).made += 1
        self.width = width
        self.layer = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def test_a_class_of_the_users_must_be_trusted() -> None:
    own = Own(6)
    spec = read(plain(ModuleSpec.of(nn.Sequential(own))))
    name = f"{__name__}:Own"
    made = Own.made
    for trusted in ((), {}, ("somewhere:Else",)):
        with pytest.raises(EditError, match="may not name"):
            spec.build(trusted=trusted)
    assert Own.made == made
    for given in ({name: Own}, (name,), {name: lambda width: Own(width)}, {name: Own(6)}):
        built = spec.build(trusted=given)
        assert torch.equal(built[0].layer.weight, own.layer.weight)
    with pytest.raises(EditError, match="makes no module"):
        spec.build(trusted={name: lambda width: width})


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "builtins:eval",
        "subprocess:Popen",
        "torch:load",
        "torch.hub:load",
        "torch.nn.modules.module:_global_forward_hooks",
        "torch.nn.modules.module:Module.__init__",
        "torch.nn.modules.activation:torch",
        "torch.nn.modules.activation:F",
        "torch.nn.modules..activation:ReLU",
        "torch.nn.modules.activation:ReLU\n",
        "torch.nn.modules.activation:__builtins__",
        "torch.nn.modulesx.activation:ReLU",
        "torch.nn.parallel.data_parallel:DataParallel",
        "torch.fx.graph_module:GraphModule",
        "torchtrim.graph.opened:OpenedModule",
        "torchtrim.__main__:nn",
        "torchtrim.cli:app",
        "torchtrim.edits.insert:nn",
        "timm.utils.model_ema:ModelEmaV3",
        "timm.models._hub:load_state_dict_from_hf",
        "timm:create_model",
        "torchvision.models.resnet:resnet18",
        "torchvision.ops.misc:Callable",
        "torch.nn.modules.linear:Linear.forward",
        "antigravity:x",
        "",
        ":",
        "nn.__init__",
    ],
)
def test_nothing_but_known_layers_is_built(name: str) -> None:
    before = set(sys.modules)
    for spec in ({"type": name}, {"type": "Sequential", "children": {"0": {"type": name}}}):
        with pytest.raises(EditError):
            read(spec).build()
    with pytest.raises(EditError):
        read({"type": "timm.layers.mlp:Mlp", "arguments": {"in_features": 4, "act_layer": {"type": name}}}).build()
    assert not {"antigravity", "torchtrim.__main__"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    "attributes",
    [
        {"forward": 3},
        {"__class__": 3},
        {"_modules": {}},
        {"training": 1},
        {"__dict__": {}},
        {"call": {"type": "os:system"}},
    ],
)
def test_a_state_sets_nothing_but_attributes(attributes: Any) -> None:
    state = {"attributes": attributes, "parameters": {}, "buffers": {}, "passing": [], "empty": []}
    with pytest.raises(EditError):
        read({"type": "ReLU", "arguments": None, "state": state}).build()


def test_specs_with_anything_in_them_raise_nothing_but_errors_of_ours() -> None:
    chance = random.Random(0)
    junk = [None, 0, -1, 2**70, "x", "forward", [], {}, [1], {"float": "inf"}, {"type": "ReLU"}, True, 1.5, {"list": 3}]
    sources = [plain(ModuleSpec.of(module)) for module in (MODULES[0], MODULES[16], MODULES[44], timm.layers.Mlp(4))]

    def places(data: Any) -> list[tuple[Any, Any]]:
        if isinstance(data, list):
            items = list(enumerate(data))
        else:  # what may be in the weights is the business of their own tests
            items = [item for item in data.items() if item[0] != "weights"] if isinstance(data, dict) else []
        return [place for key, item in items for place in [(data, key), *places(item)]]

    refused = 0
    for _ in range(300):
        data = copy.deepcopy(chance.choice(sources))
        for _ in range(chance.randint(1, 3)):
            owner, key = chance.choice(places(data))
            owner[key] = copy.deepcopy(chance.choice(junk))
        try:
            spec = read(data)
        except ValueError:  # pydantic's, which records turn into an EditError
            refused += 1
            continue
        try:
            spec.build()
        except TorchTrimError:
            refused += 1
    assert refused > 100


def test_what_a_record_cannot_hold_has_a_reason() -> None:
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    patched = nn.ReLU()
    patched.forward = lambda x: x  # type: ignore[method-assign]
    for module, reason in (
        (hooked, "hooks"),
        (parametrizations.weight_norm(nn.Linear(2, 2)), "parametrized"),
        (spectral_norm(nn.Linear(2, 2)), "hooks"),
        (patched, "forward"),
        (torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())), "code"),
        (nn.Sequential(nn.ReLU(), hooked), "hooks"),
    ):
        spec = ModuleSpec.of(module)
        assert spec.live is module
        with pytest.raises(EditError, match=reason):
            spec.recorded().build()


def test_what_has_no_values_is_refused() -> None:
    for module in (nn.LazyLinear(3), nn.Linear(2, 2, device="meta"), nn.ReLU, "ReLU"):
        with pytest.raises(EditError):
            ModuleSpec.of(module)  # type: ignore[arg-type]


def test_it_reads_well() -> None:
    spec = ModuleSpec.of(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Dropout(0.2)))
    assert str(spec) == "Sequential(Conv2d(in_channels=3, out_channels=8, kernel_size=(3, 3)), Dropout(p=0.2))"


def test_a_name_that_would_end_a_string_in_source_is_refused() -> None:
    with pytest.raises(EditError, match="Python source cannot hold"):
        ModuleSpec("Sequential", children={'a"b': ModuleSpec("ReLU")}).build()
