"""`tt.prune_channels`: a narrower model equals the original with zeros at what went; records, modes, parameters."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import torchtrim as tt
from torchtrim.edits.apply import apply
from torchtrim.edits.edit import Edit, from_json, to_json
from torchtrim.edits.prune import PruneChannels
from torchtrim.errors import EditError, InputError, PathError, TorchTrimWarning


def unlike_new(net: nn.Module) -> nn.Module:
    """With norms that do something."""
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.5, 1.5)
    return net


def masked(net: nn.Module, narrowed: dict[str, dict[str, tuple[int, ...]]]) -> nn.Module:
    """The original with zeros in every parameter at the indices that went: made without the library's own masks."""
    twin = copy.deepcopy(net)
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    for path, axes in narrowed.items():
        if path in parameters:
            values = parameters[path].data
            for axis, indices in axes.items():
                if axis == "0,1":
                    values.flatten(0, 1)[list(indices)] = 0
                else:
                    values.index_fill_(int(axis), torch.tensor(indices), 0)
    return twin


def outputs(net: nn.Module, x: Any, training: bool) -> list[torch.Tensor]:
    twin = copy.deepcopy(net).train(training)
    for module in twin.modules():
        if isinstance(module, (nn.Dropout, torchvision.ops.StochasticDepth)):
            module.p = 0.0
    with torch.no_grad():
        found = twin(x)
    return list(torch.utils._pytree.tree_leaves(tuple(found) if isinstance(found, tuple) else found))


def pruned_of(net: nn.Module) -> PruneChannels:
    edit = tt.history(net).entries[-1].edit
    assert isinstance(edit, PruneChannels)
    return edit


def assert_equals_masked(net: nn.Module, narrow: nn.Module, x: Any, modes: tuple[bool, ...] = (False, True)) -> None:
    reference = masked(net, pruned_of(narrow).narrowed)
    for training in modes:
        for one, other in zip(outputs(reference, x, training), outputs(narrow, x, training), strict=True):
            assert one.shape == other.shape
            assert torch.allclose(one, other, rtol=0, atol=1e-4 * max(1.0, float(one.abs().max())))


def widths(net: nn.Module) -> dict[str, int]:
    return {path: module.out_channels for path, module in net.named_modules() if isinstance(module, nn.Conv2d)}


class Small(nn.Module):
    """Convolutions with a residual connection, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.two = nn.Conv2d(32, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.two(torch.relu(self.norm(self.one(x))))
        return self.head(x.mean((2, 3)))


X = torch.randn(2, 3, 8, 8)


def test_a_ratio() -> None:
    net = unlike_new(Small())
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    narrow = tt.prune_channels(net, X, 0.5)
    assert (narrow.stem.out_channels, narrow.one.out_channels, narrow.norm.num_features) == (8, 16, 16)
    assert (narrow.two.in_channels, narrow.two.out_channels, narrow.head.in_features) == (16, 8, 8)
    assert_equals_masked(net, narrow, X)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert list(before) == list(narrow.state_dict())
    notes = tt.history(narrow).entries[0].notes
    assert "channels 48 -> 24" in notes[0]
    assert any("head: the model's output has its width" in note for note in notes)


def test_the_smallest_weights_go() -> None:
    net = Small()
    with torch.no_grad():
        net.one.weight[::2] *= 0.01
        net.norm.weight[::2] *= 0.01
        net.two.weight[:, ::2] *= 0.01
    narrow = tt.prune_channels(net, X, {"one": 0.5})
    assert pruned_of(narrow).narrowed["norm.bias"] == {"0": tuple(range(0, 32, 2))}
    assert torch.equal(narrow.one.weight, net.one.weight[1::2])
    assert narrow.stem.out_channels == 16


@pytest.mark.parametrize(
    ("name", "size", "settings"),
    [
        ("resnet18", 64, {}),
        ("mobilenet_v3_small", 64, {}),
        ("squeezenet1_1", 64, {}),
        ("vgg11", 64, {}),
        ("densenet121", 64, {}),
        ("googlenet", 96, {"init_weights": False}),
        ("mnasnet0_5", 64, {}),
        ("resnext50_32x4d", 64, {}),
        ("regnet_y_400mf", 64, {}),
    ],
)
def test_models_of_torchvision(name: str, size: int, settings: dict[str, Any]) -> None:
    net = unlike_new(torchvision.models.get_model(name, weights=None, **settings))
    x = torch.randn(2, 3, size, size)
    narrow = tt.prune_channels(net, x, 0.5, check=False)
    entry = tt.history(narrow).entries[0]
    assert entry.params_after < 0.5 * entry.params_before
    assert all("has its width" in reason for reason in pruned_of(narrow).pruned.left_alone.values())
    assert_equals_masked(net, narrow, x)


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet", "test_byobnet"])
def test_models_of_timm(name: str) -> None:
    net = unlike_new(timm.create_model(name))
    x = torch.randn(2, 3, 64, 64)
    narrow = tt.prune_channels(net, x, 0.5, check=False)
    assert_equals_masked(net, narrow, x)
    assert narrow.reset_classifier(7) is None
    assert narrow(x).shape == (2, 7)


def test_attention_that_is_pruned_inside_equals_the_masked_original() -> None:
    net = timm.create_model("test_vit")
    x = torch.randn(2, 3, 160, 160)
    narrow = tt.prune_channels(net, x, {"blocks.*.attn.qkv": 0.5, "blocks.*.mlp.fc1": 0.5}, check=False)
    assert [block.attn.num_heads for block in narrow.blocks] == [1] * len(net.blocks)
    assert_equals_masked(net, narrow, x)


def test_recurrent_layers() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 16)
            self.lstm = nn.LSTM(16, 32, batch_first=True, bidirectional=True)
            self.gru = nn.GRU(64, 16, batch_first=True)
            self.head = nn.Linear(16, 3)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.gru(self.lstm(self.embed(tokens))[0])[0][:, -1])

    net, tokens = Net(), torch.randint(0, 20, (2, 5))
    narrow = tt.prune_channels(net, tokens, 0.5)
    assert (narrow.embed.embedding_dim, narrow.lstm.hidden_size, narrow.gru.hidden_size) == (8, 16, 8)
    assert_equals_masked(net, narrow, tokens)


def test_shared_weights_stay_shared() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 32)
            self.a = nn.Linear(32, 32)
            self.b = nn.Linear(32, 32)
            self.b.weight = self.a.weight
            self.head = nn.Linear(32, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.relu(self.b(torch.relu(self.a(torch.relu(self.stem(x)))))))

    net, x = Net(), torch.randn(2, 6)
    narrow = tt.prune_channels(net, x, 0.5)
    assert narrow.a.weight is narrow.b.weight
    assert narrow.a.weight.shape == (16, 16)
    assert_equals_masked(net, narrow, x)


def test_scopes() -> None:
    net = Small()
    with torch.no_grad():
        net.one.weight *= 0.01
        net.two.weight *= 0.01
    for scope in ("uniform", "global", "isomorphic"):
        narrow = tt.prune_channels(net, X, 0.5, scope=scope, importance="lamp", round_to=1)
        left = narrow.stem.out_channels + narrow.one.out_channels
        assert 20 <= left <= 28
        assert_equals_masked(net, narrow, X)


def test_budgets() -> None:
    net = Small()
    narrow = tt.prune_channels(net, X, budget=tt.Budget(macs=0.5))
    entry = tt.history(narrow).entries[0]
    assert any("asked for macs=0.5" in note for note in entry.notes)
    before, after = (tt.summary(each, X).macs for each in (net, narrow))
    assert 0.25 * before < after <= 0.5 * before
    assert_equals_masked(net, narrow, X)
    with pytest.warns(TorchTrimWarning, match=r"macs=0\.001"):
        tt.prune_channels(net, X, budget=tt.Budget(macs=0.001))


def test_protected_layers() -> None:
    narrow = tt.prune_channels(Small(), X, 0.5, protect="one")
    assert (narrow.stem.out_channels, narrow.one.out_channels) == (8, 32)


# -- records


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_byobnet"])
def test_a_record_does_it_again(name: str) -> None:
    net, x = timm.create_model(name), torch.randn(2, 3, 96, 96) if "vit" not in name else torch.randn(2, 3, 160, 160)
    narrow = tt.prune_channels(net, x, 0.5, importance="random:3", check=False)
    text = to_json(tt.history(narrow).edits)
    again = apply(net, x, from_json(text))
    assert same(narrow, again)
    assert torch.equal(narrow.eval()(x), again.eval()(x))
    assert tt.history(again).entries[0].notes == tt.history(narrow).entries[0].notes
    assert all("runs" in each or "refuses" in each for each in tt.history(again).entries[0].checked)
    assert to_json(tt.history(again).edits) == text


def test_files(tmp_path: Path) -> None:
    net = timm.create_model("test_resnet", num_classes=5)
    x = torch.randn(2, 3, 64, 64)
    narrow = tt.prune_channels(net, x, 0.5, check=False)
    tt.save(narrow, tmp_path / "net.trim")
    loaded = tt.load(tmp_path / "net.trim", model=timm.create_model("test_resnet", num_classes=5))
    assert same(narrow, loaded)
    assert torch.equal(narrow.eval()(x), loaded.eval()(x))


def test_a_record_on_another_model_is_refused() -> None:
    edit = pruned_of(tt.prune_channels(Small(), X, 0.5))
    other = Small()
    other.two = nn.Conv2d(32, 12, 1)
    other.stem = nn.Conv2d(3, 12, 3, padding=1)
    other.one = nn.Conv2d(12, 32, 3, padding=1)
    other.head = nn.Linear(12, 4)
    with pytest.raises(EditError, match="another shape") as caught:
        apply(other, X, edit)
    assert caught.value.path == "stem.weight"
    narrow = apply(Small(), X, edit)
    with pytest.raises(EditError, match="gone already"):
        apply(narrow, X, edit)
    with pytest.raises(EditError, match="no such parameter"):
        apply(nn.Sequential(nn.Linear(3, 3)), torch.zeros(1, 3), edit)


def test_a_record_written_by_hand() -> None:
    edit = Edit.from_dict({"kind": "prune_channels", "ratio": {"one": 0.5}, "round_to": 4})
    assert str(edit) == "prune_channels(ratio={'one': 0.5}, round_to=4)"
    assert widths(apply(Small(), X, edit)) == {"stem": 16, "one": 16, "two": 16}
    json.dumps(edit.to_dict())


def test_a_plan() -> None:
    net = Small()
    planned = tt.plan(net, X, PruneChannels(ratio=0.5))
    assert {(joint.address, joint.before, joint.after) for joint in planned.steps[0].joints} == {
        ("stem", (16,), (8,)),
        ("one", (32,), (16,)),
    }
    assert "with two, norm" in str(planned) or "with norm, two" in str(planned)
    planned = tt.plan(net, X, PruneChannels(ratio=0.5, importance="taylor"))
    assert any("planned by magnitude" in note for note in planned.steps[0].notes)
    assert widths(net) == {"stem": 16, "one": 32, "two": 16}


# -- in a training loop


def test_in_place_parameters_stay_the_same_objects() -> None:
    net = unlike_new(Small())
    reference = copy.deepcopy(net)
    parameters = dict(net.named_parameters())
    narrow = tt.prune_channels(net, X, 0.5, copy=False)
    assert narrow is net
    assert all(parameter is parameters[name] for name, parameter in net.named_parameters())
    assert net.stem.weight.shape == (8, 3, 3, 3)
    assert_equals_masked(reference, net, X)
    net(X).sum().backward()
    torch.optim.SGD(net.parameters(), 0.1).step()


def test_frozen_layers_and_modes_stay() -> None:
    net = Small()
    net.stem.requires_grad_(False)
    net.norm.eval()
    narrow = tt.prune_channels(net, X, 0.5)
    assert {name: held.requires_grad for name, held in narrow.named_parameters()} == {
        name: held.requires_grad for name, held in net.named_parameters()
    }
    assert narrow.training
    assert not narrow.norm.training
    frozen = tt.prune_channels(Small().requires_grad_(False).eval(), X, 0.5)
    assert not any(held.requires_grad for held in frozen.parameters())
    assert widths(frozen) == {"stem": 8, "one": 16, "two": 8}


def test_after_a_cut_and_before_one() -> None:
    net = torchvision.models.resnet18(weights=None)
    x = torch.randn(2, 3, 64, 64)
    backbone = tt.cut(net, x, after="layer3", check=False)
    narrow = tt.prune_channels(backbone, x, 0.5, check=False)
    assert_equals_masked(backbone, narrow, x)
    assert narrow(x).shape == (2, 256, 4, 4)  # what it returns keeps its width
    assert narrow.layer3[0].conv1.out_channels == 128
    again = tt.cut(tt.prune_channels(net, x, 0.5, check=False), x, after="layer3", check=False)
    assert again(x).shape == (2, 128, 4, 4)


def test_after_a_block_is_removed() -> None:
    net = torchvision.models.resnet18(weights=None)
    x = torch.randn(2, 3, 64, 64)
    shallow = tt.remove(net, x, "layer2.1", check=False)
    narrow = tt.prune_channels(shallow, x, 0.5, check=False)
    assert_equals_masked(shallow, narrow, x)
    assert [type(edit).__name__ for edit in tt.history(narrow).edits] == ["Remove", "PruneChannels"]


def test_twice() -> None:
    net = Small()
    once = tt.prune_channels(net, X, 0.5)
    twice = tt.prune_channels(once, X, 0.5)
    assert widths(twice) == {"stem": 4, "one": 8, "two": 4}
    assert same(twice, apply(net, X, tt.history(twice)))


# -- what cannot be done


def test_what_is_left_alone_is_told() -> None:
    class Written(nn.Module):
        """A width is written into its forward."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 32), nn.Linear(32, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.relu(self.b(self.a(x).reshape(-1, 16))))

    narrow = tt.prune_channels(Written(), torch.randn(2, 6), 0.5)
    assert (narrow.a.out_features, narrow.b.out_features) == (16, 16)
    assert set(pruned_of(narrow).pruned.left_alone) == {"a", "c"}
    assert any(note.startswith("left alone: a:") for note in tt.history(narrow).entries[0].notes)


def test_what_is_asked_for_wrongly() -> None:
    net = Small()
    with pytest.raises(EditError, match="how many"):
        tt.prune_channels(net, X)
    with pytest.raises(EditError, match="how many"):
        tt.prune_channels(net, X, 0.5, budget=tt.Budget(macs=0.5))
    with pytest.raises(EditError, match="fraction"):
        tt.prune_channels(net, X, 1.0)
    with pytest.raises(EditError, match="round_to"):
        tt.prune_channels(net, X, 0.5, round_to=0)
    with pytest.raises(PathError, match="no module of this name") as caught:
        tt.prune_channels(net, X, {"ones": 0.5})
    assert "'one'" in str(caught.value)
    with pytest.raises(EditError, match="output has its width"):
        tt.prune_channels(net, X, {"head": 0.5})
    with pytest.raises(InputError, match="data"):
        tt.prune_channels(net, X, 0.5, importance="taylor")
    with pytest.raises(EditError, match="scope"):
        tt.prune_channels(net, X, 0.5, scope="locally")  # type: ignore[arg-type]
    assert widths(net) == {"stem": 16, "one": 32, "two": 16}


def test_a_criterion_that_says_nothing_of_a_layer() -> None:
    narrow = tt.prune_channels(Small(), X, 0.5, importance="bn_scale")
    assert widths(narrow) == {"stem": 16, "one": 16, "two": 16}
    assert "no batch norm" in pruned_of(narrow).pruned.left_alone["stem"]


def test_a_function_ranks() -> None:
    narrow = tt.prune_channels(Small(), X, 0.5, importance=lambda group: torch.arange(group.units).float())
    assert pruned_of(narrow).narrowed["norm.weight"] == {"0": tuple(range(16))}
    assert pruned_of(narrow).importance == "<lambda>"


@dataclass
class Answer:
    value: Any


class Numbering(nn.Module):
    """What is made of the largest of the second layer's channels."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.first, self.second = kind, nn.Linear(6, 32), nn.Linear(32, 16)
        self.names = nn.Embedding(16, 3)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.second(self.first(x).relu())
        if self.kind == "argmax":
            return y.argmax(1)
        values, numbers = y.max(1, keepdim=True)
        return {
            "values": lambda: values,
            "returned": lambda: (values, numbers),
            "in a dataclass": lambda: Answer({"number": numbers}),
            "looked up": lambda: self.names(numbers),
            "compared": lambda: values * (numbers < 8),
            "of a view": lambda: y.unflatten(1, (4, 4)).argmin(2).float() @ x.new_ones(4, 1),
            "of all": lambda: (y - y.argmax()).mean(1),
        }[self.kind]()


@pytest.mark.parametrize(
    "kind", ["argmax", "returned", "in a dataclass", "looked up", "compared", "of a view", "of all"]
)
def test_channels_that_are_told_by_their_numbers_stay(kind: str) -> None:
    torch.manual_seed(0)
    narrow = tt.prune_channels(Numbering(kind).eval(), torch.randn(4, 6), 0.5)
    assert (narrow.first.out_features, narrow.second.out_features) == (16, 16)
    assert "their numbers" in " ".join(tt.history(narrow).entries[-1].notes)
    with pytest.raises(EditError):
        tt.delete_channels(Numbering(kind).eval(), torch.randn(4, 6), "second", [0])


def test_the_largest_of_the_channels_without_its_number_is_no_reason_to_stay() -> None:
    narrow = tt.prune_channels(Numbering("values").eval(), torch.randn(4, 6), 0.5)
    assert narrow.second.out_features == 8


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_norm_that_leaves_the_last_weight_behind_is_pruned_twice(norm: Any) -> None:
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 32, 3), norm(nn.Conv2d(32, 16, 3)), nn.Conv2d(16, 4, 3)).eval(),
        torch.randn(2, 3, 9, 9),
    )
    once = tt.prune_channels(net, x, 0.5)
    twice = tt.prune_channels(once, x, 0.5, round_to=4)
    assert [(layer.in_channels, layer.out_channels) for layer in once] == [(3, 16), (16, 8), (8, 4)]
    assert [(layer.in_channels, layer.out_channels) for layer in twice] == [(3, 8), (8, 4), (4, 4)]
    assert tuple(twice(x).shape) == (2, 4, 3, 3)
