"""`save` and `load`: what comes back is what was saved, to the bit."""

from __future__ import annotations

import copy
import importlib.metadata
import resource
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from torch import nn

import torchtrim as tt
from torchtrim.checkpoint import container
from torchtrim.checkpoint.document import Document
from torchtrim.checkpoint.hollow import hollow
from torchtrim.checkpoint.load import load
from torchtrim.checkpoint.origin import remembered
from torchtrim.checkpoint.save import _version, save
from torchtrim.checkpoint.tensors import named_tensors
from torchtrim.errors import (
    CheckpointError,
    CheckpointMismatch,
    CheckpointUntrusted,
    TorchTrimError,
    TorchTrimWarning,
)
from torchtrim.models import load_model

HERE = "tests.test_checkpoint" if __name__.startswith("tests.") else __name__


class Net(nn.Module):
    """Tied and shared weights, a recurrent layer, buffers of both kinds, and a tensor that is a plain attribute."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.rnn = nn.LSTM(width, width, batch_first=True)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.5)
        self.layers = nn.ModuleList([nn.Linear(width, width) for _ in range(3)])
        self.out = nn.Linear(width, 11, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scale", torch.tensor(2.0))
        self.register_buffer("shift", torch.arange(width, dtype=torch.float32), persistent=False)
        self.loose = torch.full((width,), 0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.rnn(self.embed(ids))
        x = self.norm(x.mean(1)) * self.scale + self.shift * self.loose
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return self.out(self.drop(x))


IDS = torch.arange(20).reshape(2, 10) % 11


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 5, 3))


def shaken(net: nn.Module) -> nn.Module:
    """Other values in every tensor than any constructor gives."""
    generator = torch.Generator().manual_seed(7)
    for _, tensor, _ in named_tensors(net):
        if tensor.is_floating_point():
            tensor.data = torch.rand(tensor.shape, generator=generator).to(tensor.dtype)
    return net


def assert_same(net: nn.Module, again: nn.Module, x: Any = None) -> None:
    ours, theirs = ({name: tensor for name, tensor, _ in named_tensors(model)} for model in (net, again))
    assert list(ours) == list(theirs)
    assert list(net.state_dict()) == list(again.state_dict())
    for name, tensor in ours.items():
        other = theirs[name]
        assert tensor.dtype == other.dtype and tensor.shape == other.shape, name
        assert tensor.requires_grad == other.requires_grad, name
        assert tensor.stride() == other.stride(), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8)), name
    assert {n: m.training for n, m in net.named_modules()} == {n: m.training for n, m in again.named_modules()}
    assert tt.history(net) == tt.history(again)
    for training in (False, True) if x is not None else ():
        outputs = []
        for model in (net, again):
            model = copy.deepcopy(model).train(training)
            torch.manual_seed(3)
            outputs.append(model(x))
        assert torch.equal(*outputs)


@pytest.mark.parametrize(
    ("name", "after"), [("test_resnet", "layer3"), ("test_vit", "blocks.0"), ("test_efficientnet", "blocks.1")]
)
def test_a_model_of_timm_cut_and_given_a_head(name: str, after: str, tmp_path: Path) -> None:
    model, x = shaken(timm.create_model(name)).eval(), torch.randn(2, 3, 160, 160)
    net = tt.attach_head(tt.cut(model, x, after=after), x, num_classes=7)
    save(net, tmp_path / "net.trim", factory=f"timm:{name}")
    state = torch.get_rng_state()
    again = load(tmp_path / "net.trim")
    assert torch.equal(state, torch.get_rng_state())
    assert_same(net, again, x)
    tt.attach_head(again, num_classes=3)  # it can be edited further, and knows its input
    save(again, tmp_path / "again.trim")  # it knows what made it
    assert_same(net, load(tmp_path / "again.trim"))
    assert (tmp_path / "net.trim").read_bytes() == (tmp_path / "again.trim").read_bytes()


HEALING = [torch.randn(8, 3, 64, 64) for _ in range(2)]
EDITS = {
    "remove": lambda m, x: tt.remove(m, x, ["layer1.0.act1", "layer4"]),
    "remove and heal": lambda m, x: tt.remove(m, x, ["layer3"], heal="linear", data=HEALING),
    "insert": lambda m, x: tt.insert(m, x, nn.PReLU(), after="layer2.0.bn1"),
    "replace": lambda m, x: tt.replace(m, x, nn.BatchNorm2d, lambda old: nn.GroupNorm(1, old.num_features)),
    "fuse": lambda m, x: tt.fuse_batchnorm(m, x),
    "delete channels": lambda m, x: tt.delete_channels(m, x, "layer2.0.conv1", [0, 3]),
    "several": lambda m, x: tt.attach_head(
        tt.insert(tt.remove(tt.cut(m, x, after="layer3"), x, ["layer2"]), x, nn.PReLU(), after="layer1"), x, 3
    ),
}


@pytest.mark.parametrize("name", EDITS)
def test_every_kind_of_edit(name: str, tmp_path: Path) -> None:
    x = torch.randn(2, 3, 64, 64)
    net = EDITS[name](shaken(timm.create_model("test_resnet")).eval(), x)
    save(net, tmp_path / "net.trim", factory="timm:test_resnet")
    assert_same(net, load(tmp_path / "net.trim"), x)


def test_timm_s_own_name_is_found_and_verified(tmp_path: Path) -> None:
    x = torch.randn(1, 3, 160, 160)
    model = shaken(timm.create_model("test_resnet", num_classes=4, drop_rate=0.25))
    net = tt.attach_head(model, x, num_classes=3)
    save(net, tmp_path / "net.trim")
    again = load(tmp_path / "net.trim")
    assert_same(net, again, x)
    assert again.drop_rate == 0.25  # set by an argument that nothing knows of: a plain attribute


def test_a_model_of_torchvision_with_arguments(tmp_path: Path) -> None:
    import torchvision

    model, x = shaken(torchvision.models.resnet18(num_classes=5)), torch.randn(2, 3, 64, 64)
    net = tt.cut(model, x, after=["layer2", "layer3"])
    save(net, tmp_path / "net.trim", factory=("torchvision:resnet18", {"num_classes": 5, "weights": "DEFAULT"}))
    again = load(tmp_path / "net.trim")
    assert_same(net, again)
    assert all(torch.equal(a, b) for a, b in zip(net.eval()(x), again.eval()(x), strict=True))


def test_one_s_own_class_needs_trust(tmp_path: Path) -> None:
    net = shaken(Net(width=8))
    path = tmp_path / "net.trim"
    save(net, path, factory=(Net, {"width": 8}))
    with pytest.raises(CheckpointUntrusted, match="Net"):
        load(path)
    with pytest.raises(CheckpointUntrusted):
        load(path, trusted=["other:Net"])
    assert_same(net, load(path, trusted=[f"{HERE}:Net"]), IDS)
    assert_same(net, load(path, trusted={f"{HERE}:Net": Net}), IDS)
    assert_same(net, load(path, model=Net(8)), IDS)


def test_without_a_factory_the_model_is_given(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    net = tt.cut(shaken(small()), x, after="2")
    save(net, tmp_path / "net.trim")
    with pytest.raises(CheckpointError, match=r"model=\.\.\.\) with a torch.nn.modules.container:Sequential"):
        load(tmp_path / "net.trim")
    given = small()
    before = copy.deepcopy(given)
    assert_same(net, load(tmp_path / "net.trim", model=given), x)
    assert_same(before, given)
    with torch.device("meta"):
        empty = small()
    assert_same(net, load(tmp_path / "net.trim", model=empty), x)
    assert_same(net, load(tmp_path / "net.trim", model=net), x)  # after the edits is right, too


def test_a_model_that_is_another_is_refused_and_left_alone(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9)
    save(tt.cut(small(), x, after="2"), tmp_path / "net.trim")
    wide = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3))
    before = copy.deepcopy(wide)
    with pytest.raises(CheckpointMismatch, match=r"0.weight.*\[6, 3, 3, 3\].*\[4, 3, 3, 3\]"):
        load(tmp_path / "net.trim", model=wide)
    with pytest.raises(CheckpointMismatch, match="cannot be made again from Sequential"):
        load(tmp_path / "net.trim", model=nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(CheckpointMismatch, match="other edits"):
        load(tmp_path / "net.trim", model=tt.cut(small(), x, after="1"))
    assert_same(before, wide)


def test_plain_load_state_dict_between_models_with_one_history() -> None:
    x = torch.randn(2, 3, 9, 9)
    net, other = (tt.cut(shaken(small()), x, after="2"), tt.cut(small(), x, after="2"))
    other.load_state_dict(net.state_dict(), strict=True)
    assert_same(net, other, x)


DTYPES = [
    "float16 bfloat16 float32 float64 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e8m0fnu complex64 complex128",
    "bool uint8 int8 int16 int32 int64 uint16 uint32 uint64",
]


@pytest.mark.parametrize("name", " ".join(DTYPES).split())
def test_every_type_and_shape(name: str, tmp_path: Path) -> None:
    dtype = getattr(torch, name)

    def make() -> nn.Module:
        net = nn.Module()
        for key, shape in {"scalar": (), "empty": (0, 3), "matrix": (3, 5)}.items():
            raw = torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8)
            value = raw.view(dtype).reshape(shape)
            net.register_buffer(key, value)
            net.register_parameter(f"{key}_weight", nn.Parameter(value.clone(), requires_grad=False))
        return net

    net = make()
    save(net, tmp_path / "net.trim")
    assert_same(net, load(tmp_path / "net.trim", model=make()))


def test_tied_shared_and_permuted_tensors(tmp_path: Path) -> None:
    def make() -> nn.Module:
        net = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 3), "c": nn.Linear(4, 4)})
        net["again"] = net["a"]
        net["d"] = nn.Linear(4, 4)
        net["d"].weight = net["c"].weight
        return net

    net = make().to(memory_format=torch.channels_last)
    net["b"].weight.data = net["a"].weight.data
    save(net, tmp_path / "net.trim")
    again = load(tmp_path / "net.trim", model=make())
    assert_same(net, again)
    assert again["again"] is again["a"] and again["d"].weight is again["c"].weight
    assert again["b"].weight is not again["a"].weight
    assert again["b"].weight.data_ptr() == again["a"].weight.data_ptr()
    assert again["a"].weight.is_contiguous(memory_format=torch.channels_last)

    from safetensors import safe_open

    with safe_open(str(tmp_path / "net.trim"), "pt") as file:
        assert sorted(file.keys()) == [
            f"model.{name}" for name in ("a.bias", "a.weight", "b.bias", "c.bias", "c.weight", "d.bias")
        ]
        assert torch.equal(file.get_tensor("model.a.weight"), net["a"].weight)


def test_what_was_tied_and_is_apart_since_is_refused(tmp_path: Path) -> None:
    net = Net()
    net.out.weight = nn.Parameter(net.out.weight.detach().clone())
    save(net, tmp_path / "net.trim")
    with pytest.raises(CheckpointMismatch, match="apart in the file"):
        load(tmp_path / "net.trim", model=Net())


def test_a_path_that_is_none() -> None:
    for call in (lambda: save(small(), b"net.trim"), lambda: load(3)):
        with pytest.raises(CheckpointError, match="not the path of a file"):
            call()


def test_views_that_overlap_are_told(tmp_path: Path) -> None:
    net = nn.Module()
    memory = torch.arange(6.0)
    net.register_buffer("left", memory[:4])
    net.register_buffer("right", memory[2:])
    with pytest.warns(TorchTrimWarning, match="overlap"):
        save(net, tmp_path / "net.trim")
    net.right = memory[4:]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(net, tmp_path / "net.trim")


def test_flags_modes_types_and_attributes_set_by_hand(tmp_path: Path) -> None:
    net = Net().double()
    net.embed.weight.requires_grad_(False)
    net.layers[1].bias.requires_grad_(False)
    net.norm.eval()
    net.layers.eval()
    net.layers[2].train()
    net.drop.p = 0.125
    net.loose = net.loose * 3
    path = tmp_path / "net.trim"
    save(net, path, factory=Net)
    again = load(path, trusted=[f"{HERE}:Net"])
    assert_same(net, again)
    assert again.drop.p == 0.125 and torch.equal(again.loose, net.loose)
    x = IDS
    net.train(), again.train()
    for model in (net, again):
        torch.manual_seed(0)
        model(x).sum().backward()
    assert torch.equal(net.rnn.weight_ih_l0.grad, again.rnn.weight_ih_l0.grad)


class Sloped(nn.Module):
    """A number in the forward, which an edit that opens it writes into the graph."""

    def __init__(self, slope: float, act: type[nn.Module] = nn.LeakyReLU) -> None:
        super().__init__()
        self.slope = slope
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        self.act = act(slope) if act is nn.LeakyReLU else act()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act(self.b(torch.tanh(self.a(x) * self.slope)))


def test_numbers_of_a_model_without_a_factory_are_those_that_were_saved(tmp_path: Path) -> None:
    net, x = Sloped(0.25).eval(), torch.randn(2, 4)
    save(net, tmp_path / "net.trim")
    given = Sloped(0.01)
    again = load(tmp_path / "net.trim", model=given)
    assert again.slope == again.act.negative_slope == 0.25 and given.slope == 0.01
    assert_same(net, again, x)


def test_a_given_model_with_another_layer_is_refused(tmp_path: Path) -> None:
    save(Sloped(0.25), tmp_path / "net.trim")
    with pytest.raises(CheckpointMismatch, match=r"act: has another class.*found: GELU; expected: LeakyReLU"):
        load(tmp_path / "net.trim", model=Sloped(0.25, nn.GELU))


def test_a_given_model_whose_opened_forward_is_another_is_warned_of(tmp_path: Path) -> None:
    x = torch.randn(2, 4)
    net = tt.remove(Sloped(0.25).eval(), x, ":tanh")
    save(net, tmp_path / "net.trim")
    assert_same(net, load(tmp_path / "net.trim", model=Sloped(0.25)), x)
    with pytest.warns(TorchTrimWarning, match="other calls, or with other numbers.*the model itself"):
        load(tmp_path / "net.trim", model=Sloped(0.01))


@pytest.mark.parametrize("factory", [Net, False])
def test_what_is_frozen_stays_frozen_through_train(factory: Any, tmp_path: Path) -> None:
    net, given = Net(), Net()
    tt.freeze(net, "norm")
    tt.freeze(given)
    save(net, tmp_path / "net.trim", factory=factory)
    again = load(tmp_path / "net.trim", trusted=[f"{HERE}:Net"], model=None if factory else given)
    assert_same(net.train(), again.train())
    assert not again.norm.training and again.layers.training
    tt.unfreeze(again)
    assert again.train().norm.training and not given.train().norm.training and not net.train().norm.training


class Configured(nn.Module):
    """Attributes of every sort."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3)
        self.cfg = SimpleNamespace(scale=1.0, act=torch.relu)
        self.skip = {"a"}
        self.opt: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(x) * getattr(self, "extra", 1.0) + (0 if self.opt is None else self.opt)


@pytest.mark.parametrize("factory", [Configured, False])
def test_attributes_added_by_hand_are_kept(factory: Any, tmp_path: Path) -> None:
    net = Configured()
    net.extra, net.opt, net.fc.mark = 3.0, torch.tensor(2.0), torch.tensor(1)
    save(net, tmp_path / "net.trim", factory=factory)
    again = load(tmp_path / "net.trim", model=None if factory else Configured(), trusted=[f"{HERE}:Configured"])
    assert_same(net, again, torch.randn(2, 3))
    assert again.extra == 3.0 and torch.equal(again.fc.mark, net.fc.mark)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda net: setattr(net.cfg, "scale", 2.0), "cfg"),
        (lambda net: net.skip.add("b"), "skip"),
    ],
)
def test_attributes_that_a_file_cannot_hold_are_told(change: Any, name: str, tmp_path: Path) -> None:
    net = Configured()
    save(net, tmp_path / "net.trim", factory=Configured)
    change(net)
    with pytest.warns(TorchTrimWarning, match=f"not saved: {name}$"):
        save(net, tmp_path / "net.trim", factory=Configured)
    net.fc.forward = lambda x: x
    with pytest.raises(CheckpointMismatch, match="is set on the instance"):
        save(net, tmp_path / "net.trim", factory=Configured)


class Scale(nn.Module):
    """Nobody can tell its argument from it."""

    def __init__(self, by: float = 1.0) -> None:
        super().__init__()
        self.twice = by * 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.twice


def test_a_class_of_one_s_own_in_an_edit_must_be_trusted(tmp_path: Path) -> None:
    net, x = tt.insert(small().eval(), torch.randn(1, 3, 9, 9), Scale(5.0), after="0"), torch.randn(2, 3, 9, 9)
    save(net, tmp_path / "net.trim")
    with pytest.raises(CheckpointUntrusted, match="Scale"):
        load(tmp_path / "net.trim", model=small())
    assert_same(net, load(tmp_path / "net.trim", model=small(), trusted={f"{HERE}:Scale": Scale}), x)
    with pytest.raises(tt.EditError, match=r"the class alone does not make it.*a function"):
        tt.apply(small(), x, tt.history(net), trusted={f"{HERE}:Scale": Scale})
    made = {f"{HERE}:Scale": lambda: Scale(5.0)}
    assert torch.equal(tt.apply(net, x, tt.history(net), trusted=made)[1](x), x * 10)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: setattr(net.layers[0], "bias", None), "layers.0.bias"),
        (lambda net: setattr(net, "drop", nn.Dropout1d()), "drop has another class"),
        (lambda net: setattr(net.layers[0], "weight", nn.Parameter(torch.zeros(6, 7))), "layers.0.weight .*shape"),
        (lambda net: net.add_module("more", nn.ReLU()), "more is not there"),
        (lambda net: net.layers.__delitem__(2), "layers.2 is there"),
        (lambda net: net.register_buffer("extra", torch.zeros(1)), "extra"),
    ],
)
def test_a_model_changed_by_hand_is_refused_and_no_file_touched(change: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "net.trim"
    net = Net()
    save(net, path, factory=Net)
    old = path.read_bytes()
    change(net)
    with pytest.raises(CheckpointMismatch, match=message):
        save(net, path, factory=Net)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["net.trim"]
    save(net, path, factory=False)


def test_another_factory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="shape"):
        save(Net(), tmp_path / "net.trim", factory=(Net, {"width": 7}))
    with pytest.raises(TorchTrimError, match="no such model"):
        save(Net(), tmp_path / "net.trim", factory="timm:no_such")
    with pytest.raises(CheckpointError, match="not plain data"):
        save(Net(), tmp_path / "net.trim", factory=(Net, {"width": torch.tensor(3)}))
    with pytest.raises(CheckpointError, match="by its name"):
        save(Net(), tmp_path / "net.trim", factory=lambda: Net())
    with pytest.raises(CheckpointError, match="not the name of a factory"):
        save(Net(), tmp_path / "net.trim", factory="resnet18")
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_written_is_told(tmp_path: Path) -> None:
    path = tmp_path / "net.trim"
    with pytest.raises(CheckpointError, match="weight: a tensor on the meta device"):
        save(nn.Linear(2, 2, device="meta"), path)
    with pytest.raises(CheckpointError, match="lazy"):
        save(nn.LazyLinear(2), path)
    sparse = nn.Module()
    sparse.register_buffer("eye", torch.eye(3).to_sparse())
    with pytest.raises(CheckpointError, match="eye: a tensor of this layout"):
        save(sparse, path)

    class Odd(nn.Linear):
        def get_extra_state(self) -> Any:
            return object()

    with pytest.raises(CheckpointError, match="get_extra_state"):
        save(Odd(2, 2), path)
    with pytest.raises(CheckpointError, match="no such folder"):
        save(nn.Linear(2, 2), tmp_path / "none" / "net.trim")
    save(nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match="a file already"):
        save(nn.Linear(2, 2), path, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == ["net.trim"]


def test_hooks_are_told_of(tmp_path: Path) -> None:
    net = Net()
    net.layers[1].register_forward_hook(lambda module, args, output: None)
    with pytest.warns(TorchTrimWarning, match=r"layers\.1"):
        save(net, tmp_path / "net.trim", factory=Net)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        net(IDS).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_training_goes_on_as_if_it_had_not_stopped(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().train()
    heads = [*net.layers.parameters()]
    others = [p for p in net.parameters() if all(p is not held for held in heads)]
    options = {"momentum": 0.9} if kind is not torch.optim.AdamW else {"betas": (0.8, 0.99)}
    optimizer = kind([{"params": heads, "lr": 1e-2}, {"params": others}], lr=1e-3, **options)
    train(net, optimizer, 3)
    save(net, tmp_path / "net.trim", factory=Net, optimizer=optimizer)

    new = kind([nn.Parameter(torch.zeros(1))], lr=1.0)
    again = load(tmp_path / "net.trim", trusted=[f"{HERE}:Net"], optimizer=new)
    assert [group["lr"] for group in new.param_groups] == [1e-2, 1e-3]
    assert new.param_groups[0].get("betas") == optimizer.param_groups[0].get("betas")
    train(net, optimizer, 3)
    train(again, new, 3)
    assert_same(net, again, IDS)


def test_an_optimizer_that_does_not_belong(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(CheckpointError, match="not the model's"):
        save(net, tmp_path / "net.trim", optimizer=torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1))
    save(net, tmp_path / "net.trim")
    optimizer = torch.optim.SGD(net.parameters(), lr=1)
    with pytest.raises(CheckpointMismatch, match="holds no state of such an optimizer"):
        load(tmp_path / "net.trim", model=nn.Linear(2, 2), optimizer=optimizer)
    save(net, tmp_path / "net.trim", optimizer=torch.optim.Adam(net.parameters()))
    with pytest.raises(CheckpointMismatch, match=r"Adam.*SGD"):
        load(tmp_path / "net.trim", model=nn.Linear(2, 2), optimizer=optimizer)
    assert optimizer.param_groups[0]["params"][0] is net.weight


def test_hollow_models_take_no_memory_and_constructors_may_look_at_weights() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    net = hollow(lambda: nn.Sequential(*(nn.Linear(12000, 12000) for _ in range(8))))  # 4.6 GB
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB
    assert net[0].weight.shape == (12000, 12000) and net[0].weight.untyped_storage().nbytes() == 4

    class Looks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.size = int(self.weight.sum().item())
            self.held = [self.weight]

    looks = hollow(Looks)
    assert looks.size == 3 and looks.held[0] is looks.weight


def test_in_a_new_process(tmp_path: Path) -> None:
    model, x = shaken(timm.create_model("test_vit")).eval(), torch.randn(1, 3, 160, 160)
    net = tt.cut(model, x, after="blocks.0")
    save(net, tmp_path / "net.trim", factory="timm:test_vit")
    torch.save({"x": x, "y": net(x)}, tmp_path / "tensors.pt")
    code = f"""
import torch
from torchtrim.checkpoint.load import load
tensors = torch.load({str(tmp_path / "tensors.pt")!r})
assert torch.equal(load({str(tmp_path / "net.trim")!r})(tensors["x"]), tensors["y"])
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_models_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.trim"
    named = load_model("timm:test_resnet", arguments={"num_classes": 3})
    assert remembered(named.model).arguments == {"num_classes": 3}
    net = tt.cut(named.model, torch.randn(1, 3, 96, 96), after="layer2")
    save(net, path)
    again = load_model(str(path))
    assert again.input_shape == (3, 96, 96)
    assert_same(net, again.model)
    (tmp_path / "my_models.py").write_text("from torch import nn\ndef make(n=2): return nn.Linear(n, n)\n")
    monkeypatch.chdir(tmp_path)
    named = load_model("my_models:make", arguments={"n": 4})
    save(named.model, path)
    with pytest.raises(CheckpointUntrusted):
        load_model(str(path))
    assert_same(named.model, load_model(str(path), trusted=["my_models:make"]).model)
    with pytest.raises(TorchTrimError, match="its own weights"):
        load_model(str(path), pretrained=True)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"none\.trim: cannot be read: No such file"):
        load(tmp_path / "none.trim")
    with pytest.raises(CheckpointError, match="not a file"):
        load(tmp_path)
    save(nn.Linear(2, 2), tmp_path / "net.trim")
    with pytest.raises(CheckpointMismatch, match=r"net\.trim: weight"):
        load(tmp_path / "net.trim", model=nn.Linear(3, 2))
    with pytest.raises(CheckpointError, match="no such device"):
        load(tmp_path / "net.trim", model=nn.Linear(2, 2), device="abacus")


def test_saving_does_not_read_what_all_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def reading() -> Any:
        raise AssertionError("this takes longer than the rest of a save")

    monkeypatch.setattr(importlib.metadata, "packages_distributions", reading)
    _version.cache_clear()
    save(load_model("timm:test_resnet").model, tmp_path / "net.trim")
    versions = Document.of(tmp_path, container.read(tmp_path / "net.trim").text).versions
    assert versions == {name: importlib.metadata.version(name) for name in ("timm", "torch")}
