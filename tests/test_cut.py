"""Cutting models: at modules, inside blocks, at functions, at several places; in both modes; and what is refused."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torchvision.models.resnet import BasicBlock

import torchtrim as tt
from torchtrim.graph.check import differs

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.resnet18()


def value_at(model: nn.Module, path: str, x: torch.Tensor, training: bool, call: int = 0) -> Any:
    """The output of a module's call in the original, caught by a hook."""
    twin = copy.deepcopy(model).train(training)
    caught: list[Any] = []
    twin.get_submodule(path).register_forward_hook(
        lambda _m, _a, out: caught.append(torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, out))
    )
    torch.manual_seed(5)
    twin(x.clone())
    return caught[call]


def run(model: nn.Module, x: torch.Tensor, training: bool) -> Any:
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(5)
    return twin(x.clone())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("path", ["conv1", "layer1", "layer2.0", "layer3.1.conv1", "layer2.0.downsample.0", "fc"])
def test_the_output_is_that_of_the_layer(resnet: nn.Module, path: str, training: bool) -> None:
    net = tt.cut(resnet, X, after=path)
    assert differs(value_at(resnet, path, X, training), run(net, X, training)) is None


def test_what_is_kept_is_still_the_users_model(resnet: nn.Module) -> None:
    net = tt.cut(resnet, X, after="layer3.1.conv1")
    loaded = net.load_state_dict(resnet.state_dict(), strict=False)
    assert loaded.missing_keys == []
    assert all(key in resnet.state_dict() for key in net.state_dict())
    assert isinstance(net.layer1[0], BasicBlock)
    assert type(net.layer3) is nn.Sequential
    assert isinstance(net.layer3[1], fx.GraphModule)
    assert not hasattr(net, "layer4")
    assert not hasattr(net, "fc")
    assert not hasattr(net.layer3[1], "bn1")
    assert type(net).__name__ != "ResNet"


def test_dropped_parts_are_gone_from_memory() -> None:
    model = torchvision.models.resnet18()
    dropped, kept = weakref.ref(model.layer4[0].conv1.weight), weakref.ref(model.conv1.weight)
    net = tt.cut(model, X, after="layer3", copy=False)
    assert net.conv1 is model.conv1
    del model
    gc.collect()
    assert dropped() is None
    assert kept() is not None


def test_the_original_shares_nothing_with_a_copy(resnet: nn.Module) -> None:
    before = copy.deepcopy(resnet.state_dict())
    net = tt.cut(resnet, X, after="layer2")
    originals = {parameter.data_ptr() for parameter in resnet.parameters()}
    assert not originals & {parameter.data_ptr() for parameter in net.parameters()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert differs(before, resnet.state_dict()) is None


def test_parameters_keep_their_identity_in_place() -> None:
    model = torchvision.models.resnet18()
    originals = dict(model.named_parameters())
    net = tt.cut(model, X, after="layer3.1:add", copy=False)
    assert all(originals[name] is parameter for name, parameter in net.named_parameters())


def test_functions_are_named_by_their_position(resnet: nn.Module) -> None:
    flat = tt.cut(resnet, X, after=":flatten")
    assert torch.equal(run(flat, X, False), value_at(resnet, "avgpool", X, False).flatten(1))
    add = tt.cut(resnet, X, after="layer3.1:add")
    assert torch.equal(run(add, X, False).relu(), value_at(resnet, "layer3", X, False))


def test_a_module_called_twice_needs_the_number_of_the_call(resnet: nn.Module) -> None:
    with pytest.raises(tt.PathError, match=r"'layer3.1.relu#0', 'layer3.1.relu#1'"):
        tt.cut(resnet, X, after="layer3.1.relu")
    for call in (0, 1):
        net = tt.cut(resnet, X, after=f"layer3.1.relu#{call}")
        assert torch.equal(run(net, X, False), value_at(resnet, "layer3.1.relu", X, False, call))
    with pytest.raises(tt.PathError, match="no such call"):
        tt.cut(resnet, X, after="layer3.1.relu#2")


@pytest.mark.parametrize("training", [False, True])
def test_several_outputs(resnet: nn.Module, training: bool) -> None:
    places = ["layer2", "layer3.0.bn1", "layer3"]
    expected = tuple(value_at(resnet, path, X, training) for path in places)
    found = run(tt.cut(resnet, X, after=places), X, training)
    assert isinstance(found, tuple)
    # bn1's output is overwritten by the in-place ReLU behind it: what is returned must be a copy from before
    assert differs(expected, found) is None
    named = run(tt.cut(resnet, X, after=dict(zip(places, "abc", strict=True))), X, training)
    assert differs(dict(zip("abc", expected, strict=True)), named) is None


def test_a_layer_and_one_inside_it(resnet: nn.Module) -> None:
    found = run(tt.cut(resnet, X, after=["layer3.1.conv2", "layer3", "layer3.0"]), X, False)
    expected = tuple(value_at(resnet, path, X, False) for path in ("layer3.1.conv2", "layer3", "layer3.0"))
    assert differs(expected, found) is None


def test_a_value_that_fed_several_calls_is_noted(resnet: nn.Module) -> None:
    net = tt.cut(resnet, X, after="layer2.0:add")
    assert tt.history(net).entries[0].notes == ()
    vit = timm.create_model("test_vit")
    net = tt.cut(vit, torch.zeros(1, 3, 160, 160), after="blocks.2:add#0")
    (note,) = tt.history(net).entries[0].notes
    assert "fed 2 calls" in note
    assert "blocks.2.norm2" in note


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("test_vit", "blocks.3.mlp.fc1"),
        ("test_efficientnet", "blocks.2.0.bn1"),
        ("test_convnext", "stages.2.blocks.0"),
        ("test_byobnet", "stages.1"),
        ("test_mambaout", "stages.1"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_timm_models(name: str, path: str, training: bool) -> None:
    model = timm.create_model(name, drop_path_rate=0.2) if name != "test_mambaout" else timm.create_model(name)
    x = torch.randn(2, *model.pretrained_cfg["input_size"])
    net = tt.cut(model, x, after=path)
    assert differs(value_at(model, path, x, training), run(net, x, training)) is None
    assert not set(net.state_dict()) - set(model.state_dict())


@pytest.mark.parametrize("training", [False, True])
def test_models_whose_two_modes_differ(training: bool) -> None:
    inception = torchvision.models.inception_v3(init_weights=False)
    x = torch.randn(2, 3, 299, 299)
    net = tt.cut(inception, x, after="Mixed_6b", check=False)
    assert differs(value_at(inception, "Mixed_6b", x, training), run(net, x, training)) is None
    assert not hasattr(net, "AuxLogits")

    class Ghost(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.a(x)
            x = torch.dropout(x, 0.5, self.training) if self.training else x * 1.5
            return self.head(self.b(x))

    ghost, y = Ghost(), torch.randn(3, 4)
    net = tt.cut(ghost, y, after="b")
    assert differs(value_at(ghost, "b", y, training), run(net, y, training)) is None


class InPlaceBranch(nn.Module):
    """The in-place ReLU of a branch that a cut drops changes what the kept branch reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        left = self.left(self.relu(x))
        x[:, 0] = 0.0
        x.mul_(2)
        return left + self.right(x)


def test_effects_of_dropped_branches_stay() -> None:
    model, x = InPlaceBranch(), torch.randn(3, 4)
    net = tt.cut(model, x, after="right")
    assert torch.equal(run(net, x, False), value_at(model, "right", x, False))
    assert not hasattr(net, "left")


class Siamese(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
        self.head = nn.Linear(6, 2)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return self.head(torch.cat([self.encoder(a), self.encoder(b)], 1))


def test_a_shared_encoder() -> None:
    model, pair = Siamese(), (torch.randn(2, 4), torch.randn(2, 4))
    both = tt.cut(model, pair, after=["encoder.0#0", "encoder.0#1"])
    assert torch.equal(both(*pair)[1], model.encoder[0](pair[1]))
    one = tt.cut(model, pair, after="encoder.1#1")
    assert torch.equal(one(*pair), model.encoder[:2](pair[1]))
    with pytest.raises(tt.EditError, match="at one call and not at another"):
        tt.cut(model, pair, after=["encoder.0#1", ":cat"])


def test_aliases_keep_their_keys() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)
            self.second = self.first
            self.out = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.second(x))

    net = tt.cut(Tied(), torch.randn(2, 4), after="second")
    assert sorted(net.state_dict()) == ["first.bias", "first.weight", "second.bias", "second.weight"]
    assert net.first is net.second


def test_hooks_of_kept_modules_run() -> None:
    model = torchvision.models.resnet18()
    model.layer1[0].conv1.register_forward_hook(lambda _m, _a, out: out * 0.5)
    model.layer3[1].register_forward_pre_hook(lambda _m, args: (args[0] + 1,))
    net = tt.cut(model, X, after="layer3.1.conv1")
    assert torch.equal(run(net, X, False), value_at(model, "layer3.1.conv1", X, False))


def test_gradients_reach_every_parameter(resnet: nn.Module) -> None:
    net = tt.cut(resnet, X, after="layer2.1.conv1").train()
    net(X).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_copies_pickles_and_second_cuts(resnet: nn.Module) -> None:
    net = tt.cut(resnet, X, after=["layer3.1.bn1", "layer3"]).eval()
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert list(twin.state_dict()) == list(net.state_dict())
        assert differs(net(X), twin(X)) is None
        assert type(twin.layer1) is nn.Sequential
    again = tt.cut(net, after="layer2.0.bn2")
    assert torch.equal(run(again, X, False), value_at(resnet, "layer2.0.bn2", X, False))
    assert [edit.kind for edit in tt.history(again).edits] == ["cut", "cut"]


def test_history_is_complete(resnet: nn.Module) -> None:
    net = tt.cut(resnet, X, after={"layer2": "c3"})
    record = tt.history(net)
    assert record.origin == "torchvision.models.resnet:ResNet"
    assert record.entries[0].edit == tt.Cut(("layer2",), ("c3",), single=False, clone=False)
    assert record.entries[0].params_before == 11689512
    assert record.entries[0].params_after == sum(parameter.numel() for parameter in net.parameters())
    assert "eval, batch 2: equal" in record.entries[0].checked
    assert record.to_dict()["inputs"] == {"args": [{"shape": [2, 3, 64, 64], "dtype": "float32"}], "kwargs": {}}
    assert "cut(after='layer2'" in str(record)
    assert tt.history(resnet).entries == ()


def test_meta_models_are_cut_unchecked() -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet18()
    net = tt.cut(model, torch.zeros(1, 3, 64, 64, device="meta"), after="layer2.0.conv1")
    assert net.conv1.weight.is_meta
    assert tt.history(net).entries[0].checked == ("not run: the model is on the meta device",)


def test_models_in_half_precision_and_with_nan_weights(resnet: nn.Module) -> None:
    half = copy.deepcopy(resnet).half()
    assert tt.cut(half, X.half(), after="layer1")(X.half()).dtype == torch.float16
    with pytest.raises(tt.InputError, match="float16"):
        tt.cut(half, X, after="layer1")
    broken = copy.deepcopy(resnet)
    with torch.no_grad():
        broken.layer1[0].conv1.weight[0] = float("nan")
    assert tt.cut(broken, X, after="layer1").eval()(X).isnan().any()


def test_wrapped_models(resnet: nn.Module) -> None:
    expected = sorted(tt.cut(resnet, X, after="layer1", check=False).state_dict())
    for wrapper in (nn.DataParallel, torch.compile):
        assert sorted(tt.cut(wrapper(resnet), X, after="layer1", check=False).state_dict()) == expected


@pytest.mark.parametrize(
    ("after", "error", "message"),
    [
        ("layr3", tt.PathError, "'layer3'"),
        ("layer3.9", tt.PathError, "no such module"),
        ("", tt.PathError, "whole model"),
        ([], tt.EditError, "nothing to cut after"),
        ({}, tt.EditError, "nothing to cut after"),
        ({"layer1": "a", "layer2": "a"}, tt.EditError, "one name"),
        ([1], tt.EditError, "strings"),
        (":softmax", tt.PathError, ":flatten"),
        ("layer1:add", tt.PathError, "calls modules only"),
        (":x", tt.EditError, "input of the model"),
    ],
)
def test_bad_places(resnet: nn.Module, after: Any, error: type[Exception], message: str) -> None:
    before = copy.deepcopy(resnet.state_dict())
    with pytest.raises(error, match=message):
        tt.cut(resnet, X, after=after)
    assert differs(before, resnet.state_dict()) is None


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead, self.never = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.used(x)
        self.dead(x)
        return self.attention(x, x, x, need_weights=False)[0]


@pytest.mark.parametrize(
    ("after", "error", "message"),
    [
        ("dead", tt.EditError, "feeds nothing"),
        ("never", tt.PathError, "never called"),
        ("attention.out_proj", (tt.EditError, tt.PathError), "cannot be opened|never called"),
    ],
)
def test_places_without_a_value(after: str, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        tt.cut(Odd(), torch.randn(2, 3, 4), after=after)


def test_wrong_inputs(resnet: nn.Module) -> None:
    with pytest.raises(tt.InputError, match="conv1"):
        tt.cut(resnet, torch.zeros(1, 4, 64, 64), after="layer1")
    with pytest.raises(tt.InputError, match="pass example inputs"):
        tt.cut(resnet, after="layer1")


class Random(nn.Module):
    """A chain with skips, built from a plan that hypothesis draws."""

    def __init__(self, plan: list[tuple[int, int]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in plan)
        self.plan = plan

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        values = [x]
        for layer, (source, skip) in zip(self.layers, self.plan, strict=True):
            values.append(torch.relu(layer(values[source % len(values)])) + values[skip % len(values)])
        return torch.stack(values).sum(0)


@settings(max_examples=25, deadline=None)
@given(plan=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=7), data=st.data())
def test_any_graph_cut_at_any_node(plan: list[tuple[int, int]], data: st.DataObject) -> None:
    model, x = Random(plan), torch.randn(2, 4)
    number = data.draw(st.integers(0, len(plan) - 1))
    net = tt.cut(model, x, after=f"layers.{number}")
    assert torch.equal(run(net, x, False), value_at(model, f"layers.{number}", x, False))
    needed, stack = set(), [number + 1]
    while stack:
        value = stack.pop()
        if value > 0 and value - 1 not in needed:
            needed.add(value - 1)
            sources = plan[value - 1][:1] if value == number + 1 else plan[value - 1]
            stack += [source % value for source in sources]
    assert {int(key.split(".")[1]) for key in net.state_dict()} == needed


class Exchange(nn.Module):
    """Two branches that exchange; a block takes a list of both, and a memory that it may not need."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, xs: list[torch.Tensor], memory: torch.Tensor) -> list[torch.Tensor]:
            left, right = self.left(xs[0]), self.right(xs[1])
            return [left + right, right * memory]

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.memory = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.block, self.head = Exchange.Block(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left, right = self.block([self.a(x), self.b(x)], self.memory(x))
        return self.head(left + right)


def test_what_only_fed_dropped_parts_of_an_opened_module_is_dropped_too() -> None:
    model, x = Exchange(), torch.randn(3, 4)
    net = tt.cut(model, x, after="block.left")
    assert torch.equal(net(x), model.block.left(model.a(x)))
    assert sorted({key.rpartition(".")[0] for key in net.state_dict()}) == ["a", "block.left"]
    both = tt.cut(model, x, after=["block.left", "block"])
    assert hasattr(both, "memory")

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Exchange.Block()

        def forward(self, xs: list[torch.Tensor], memory: torch.Tensor) -> torch.Tensor:
            left, right = self.inner(xs, memory)
            return left + right

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.memory, self.stage, self.head = nn.Linear(4, 4), nn.Linear(4, 4), Stage(), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.stage([self.a(x), x], self.memory(x)))

    deep = tt.cut(Outer(), x, after="stage.inner.left")
    assert sorted({key.rpartition(".")[0] for key in deep.state_dict()}) == ["a", "stage.inner.left"]


def test_modules_shared_between_blocks_go_by_their_first_name() -> None:
    class Block(nn.Module):
        def __init__(self, shared: nn.Module) -> None:
            super().__init__()
            self.position, self.own = shared, nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.own(x) + self.position(x)

    shared = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    model, x = nn.Sequential(Block(shared), Block(shared), nn.Linear(4, 2)), torch.randn(3, 4)
    assert tt.trace(model, x).node("0.position.0#1").inputs == ("0:add",)
    with pytest.raises(tt.PathError, match=r"'0.position.0#0', '0.position.0#1'"):
        tt.cut(model, x, after="1.position.0")
    net = tt.cut(model, x, after="1.position.0#1")
    assert torch.equal(net(x), shared[0](model[0](x)))
    assert not set(net.state_dict()) - set(model.state_dict())
