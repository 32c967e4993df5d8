"""Inserting modules: in a `Sequential`, in a block, at functions, at one use of a shared layer; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import torchtrim as tt
from torchtrim.edits.edit import Edit
from torchtrim.edits.insert import Insert, insert
from torchtrim.graph.check import differs

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
SMALL = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Shared(nn.Module):
    """One activation and one convolution, each called twice; a branch in train mode; functions of several values."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.act = nn.ReLU()
        self.norm = nn.BatchNorm2d(3)
        self.fc = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.conv(x))
        y = self.act(self.conv(x))
        both = torch.cat([x, y], 1)
        if self.training:
            both = torch.tanh(both)
        left, right = both.chunk(2, dim=1)
        left = self.norm(left)
        left += right
        return self.fc(left.mean((2, 3)))  # type: ignore[no-any-return]


def outputs(model: nn.Module, x: Any, training: bool = False) -> Any:
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(3)
    return twin(x)


def hooked(
    model: nn.Module, path: str, module: nn.Module, *, before: bool = False, call: int | None = None
) -> nn.Module:
    """The same insertion by hooks."""
    twin, count = copy.deepcopy(model), iter(range(100))
    target = twin.get_submodule(path)
    if before:
        target.register_forward_pre_hook(
            lambda _, args: (module(args[0]), *args[1:]) if next(count) == call or call is None else None
        )
    else:
        target.register_forward_hook(lambda _m, _a, out: module(out) if next(count) == call or call is None else None)
    return twin


def replayed(model: nn.Module, net: nn.Module, x: Any, **options: Any) -> nn.Module:
    """The last edit of a model, done again on another from its JSON."""
    return tt.apply(model, x, [Edit.from_dict(tt.history(net).edits[-1].to_dict())], **options)


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("path", ["conv1", "layer2", "layer1.0", "layer3.0.conv2", "fc"])
def test_it_does_what_a_hook_does(path: str, before: bool) -> None:
    model = timm.create_model("test_resnet")
    given: list[torch.Tensor] = []
    model.get_submodule(path).register_forward_pre_hook(lambda _m, args: given.append(args[0]))
    model.get_submodule(path).register_forward_hook(lambda _m, _a, out: given.append(out))
    model.eval()(X)
    channels = given[0 if before else 1].shape[1]
    for hooks in (model.get_submodule(path)._forward_pre_hooks, model.get_submodule(path)._forward_hooks):
        hooks.clear()
    module: nn.Module = (
        nn.BatchNorm1d(channels) if given[0].dim() == 2 and path == "fc" else nn.Conv2d(channels, channels, 1)
    )
    place = {"before": path} if before else {"after": path}
    keys = list(model.state_dict())
    net = insert(model, X, module, **place)
    module.eval()
    assert torch.allclose(outputs(net, X), hooked(model, path, module, before=before).eval()(X), atol=1e-5)
    assert [key for key in net.state_dict() if key in keys] == keys
    assert differs(outputs(replayed(model, net, X), X), outputs(net, X)) is None
    assert list(model.state_dict()) == keys


def test_an_element_of_a_sequential_leaves_the_other_keys() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    changed = insert(net, torch.zeros(1, 4), nn.Dropout(0.2), after="1")
    changed = insert(changed, None, nn.Dropout(0.5), before="2")
    changed = insert(changed, None, nn.BatchNorm1d(8), after="0", name="norm")
    assert list(changed._modules) == ["0", "norm", "1", "dropout", "dropout_2", "2"]
    assert type(changed) is nn.Sequential
    assert list(net._modules) == ["0", "1", "2"]
    assert tt.history(changed).edits[1].path == "dropout_2"


def test_every_use_of_a_shared_layer_or_one_of_them() -> None:
    model, module = Shared(), nn.Conv2d(3, 3, 1)
    for place, call in (("act", None), ("act#0", 0), ("act#1", 1)):
        net = insert(model, SMALL, copy.deepcopy(module), after=place)
        expected = hooked(model, "act", module, call=call).eval()(SMALL)
        assert torch.allclose(outputs(net, SMALL), expected, atol=1e-6)
    net = insert(model, SMALL, copy.deepcopy(module), before="conv#1")
    assert torch.allclose(
        outputs(net, SMALL), hooked(model, "conv", module, before=True, call=1).eval()(SMALL), atol=1e-6
    )
    assert "called 2 times" in tt.history(insert(model, SMALL, module, after="act")).entries[0].notes[0]


def test_a_shared_element_of_a_sequential() -> None:
    act = nn.ReLU()
    model = nn.Sequential(nn.Linear(3, 3), act, nn.Linear(3, 3), act)
    assert list(insert(model, torch.zeros(1, 3), nn.Dropout(), after="1#1")._modules) == ["0", "1", "2", "3", "dropout"]
    both = insert(model, torch.zeros(1, 3), nn.Dropout(), after="1")
    assert list(both._modules) == ["0", "1", "dropout", "2", "3", "dropout_2"]
    assert both.dropout is both.dropout_2


@pytest.mark.parametrize(
    ("place", "index", "width"),
    [
        ({"after": ":cat"}, 0, 6),
        ({"before": ":cat"}, 0, 3),
        ({"before": ":cat"}, 1, 3),
        ({"after": ":chunk"}, 0, 3),
        ({"after": ":chunk"}, 1, 3),
        ({"before": ":chunk"}, 0, 6),
        ({"after": ":tanh"}, 0, 6),
        ({"after": ":add"}, 0, 3),
        ({"before": ":add"}, 1, 3),
    ],
)
def test_at_functions(place: dict[str, str], index: int, width: int) -> None:
    model = Shared()
    scale = nn.Conv2d(width, width, 1, groups=width, bias=False)
    net = insert(model, SMALL, scale, index=index, **place)
    same = copy.deepcopy(net)
    for parameter in same.get_submodule(tt.history(net).edits[0].path).parameters():
        nn.init.ones_(parameter)
    for training in (False, True):
        assert torch.allclose(outputs(same, SMALL, training), outputs(model, SMALL, training), atol=1e-5)
    trained = place == {"after": ":tanh"}
    assert torch.allclose(outputs(net, SMALL), outputs(model, SMALL)) == trained
    assert not torch.allclose(outputs(net, SMALL, True), outputs(model, SMALL, True))
    assert differs(outputs(replayed(model, net, SMALL), SMALL), outputs(net, SMALL)) is None


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        value, (hidden, cell) = self.lstm(x)
        return {"out": self.out(value) + hidden[-1].sum(), "cell": cell}


def test_one_of_the_tensors_of_a_nested_value() -> None:
    model, x = Recurrent(), torch.randn(5, 2, 3)
    for index, key in ((0, "out"), (1, "out"), (2, "cell")):
        net = insert(model, x, nn.Linear(4, 4), after="lstm", index=index)
        before, after = outputs(model, x), outputs(net, x)
        assert [name for name in before if not torch.equal(before[name], after[name])] == [key]
    wrapped = nn.Sequential(nn.LSTM(3, 4))
    assert [type(each) for each in outputs(insert(wrapped, x, nn.Linear(4, 4), after="0"), x)] == [torch.Tensor, tuple]


def test_the_mode_and_the_type_of_values_follow_the_model() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU()).double().eval()
    module = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))
    net = insert(model, torch.zeros(1, 3, dtype=torch.float64), module, after="0")
    assert not any(each.training for each in net.modules())
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}
    assert net[1] is module
    train = insert(model.train(), torch.zeros(1, 3, dtype=torch.float64), nn.Dropout(), after="0")
    assert all(each.training for each in train.modules())


@pytest.mark.parametrize("place", ["layer1.0", "layer1.0.conv1"])
def test_in_place_the_parameters_stay_the_same_objects(place: str) -> None:
    model = torchvision.models.resnet18()
    parameters, expected = dict(model.named_parameters()), model.eval()(X)
    net = insert(model, X, nn.Identity(), after=place, copy=False)
    assert net is model
    after = dict(net.named_parameters())
    assert all(after[name] is held for name, held in parameters.items())
    assert torch.allclose(net(X), expected)


def test_hooks_stay() -> None:
    model, seen = Shared(), []
    model.conv.register_forward_hook(lambda *_: seen.append("conv"))
    model.register_forward_hook(lambda *_: seen.append("model"))
    net = insert(model, SMALL, nn.Dropout(), after="norm")
    assert seen == []
    net.eval()(SMALL)
    assert seen == ["conv", "conv", "model"]


def test_a_model_zoo_of_places() -> None:
    vit = timm.create_model("test_vit").eval()
    picture = torch.randn(1, 3, 160, 160)
    for place in ("blocks.0", "blocks.0.attn", "norm"):
        width = vit.embed_dim
        net = insert(vit, picture, nn.LayerNorm(width), after=place)
        assert torch.allclose(outputs(net, picture), hooked(vit, place, nn.LayerNorm(width)).eval()(picture), atol=1e-4)
    mobile = timm.create_model("test_efficientnet").eval()
    net = insert(mobile, X, nn.Dropout2d(0.1), after="blocks.1.0.bn1")
    assert type(net) is type(mobile)
    assert torch.allclose(outputs(net, X), outputs(mobile, X), atol=1e-5)


@pytest.mark.parametrize(
    ("module", "place", "message"),
    [
        (nn.Conv2d(3, 8, 1), {"after": "conv"}, r"what follows.*'norm'|what follows.*'conv'"),
        (nn.Conv2d(8, 8, 1), {"after": "norm"}, r"does not take the value there"),
        (nn.ReLU(), {"after": "convs"}, "'conv'"),
        (nn.ReLU(), {"after": "act#2"}, "2 calls"),
        (nn.ReLU(), {"after": ":sub"}, "no such call"),
        (nn.ReLU(), {"after": ""}, "whole model"),
        (nn.ReLU(), {"after": ":chunk", "index": 2}, "0 to 1"),
        (nn.ReLU(), {"before": ":chunk", "index": 1}, "0 to 0"),
        (nn.ReLU(), {}, "one place"),
        (nn.ReLU(), {"after": "act", "before": "act"}, "one place"),
        (nn.ReLU(), {"after": "act", "name": "norm"}, "taken"),
        (nn.ReLU(), {"after": "act", "name": "a.b"}, "identifier"),
        (nn.ReLU(), {"after": "act", "index": -1}, "number of a tensor"),
        (nn.ReLU, {"after": "act"}, r"ReLU\(\)"),
        (nn.Linear(2, 2, device="meta"), {"after": "act"}, "meta"),
    ],
)
def test_what_cannot_be_done_says_why_and_changes_nothing(module: Any, place: dict[str, Any], message: str) -> None:
    model = Shared()
    expected, state = outputs(model, SMALL), copy.deepcopy(model.state_dict())
    with pytest.raises(tt.TorchTrimError, match=message):
        insert(model, SMALL, module, **place, copy=False)
    assert torch.equal(outputs(model, SMALL), expected)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert type(model) is Shared
    assert tt.history(model).entries == ()


def test_a_part_of_the_model_is_not_put_in_again() -> None:
    model = Shared()
    tied = nn.Conv2d(3, 3, 3, padding=1)
    tied.weight = model.conv.weight
    for module in (model.act, nn.Sequential(model.norm), tied):
        with pytest.raises(tt.EditError, match="deepcopy"):
            insert(model, SMALL, module, after="act")


def test_a_shape_error_gives_both_shapes() -> None:
    with pytest.raises(tt.EditError) as caught:
        insert(Shared(), SMALL, nn.Conv2d(3, 8, 3), after="norm")
    assert (caught.value.found, caught.value.expected, caught.value.path) == ([1, 8, 6, 6], [1, 3, 8, 8], "norm")


def test_a_plan_changes_nothing_and_tells_the_shapes() -> None:
    module = nn.Conv2d(3, 3, 3, stride=2)
    spec = tt.history(insert(nn.Sequential(nn.ReLU()), SMALL, module, after="0")).edits[0].module
    planned = tt.plan(nn.Sequential(nn.ReLU(), nn.Flatten()), SMALL, Insert(spec, after="0"))
    joint = planned.steps[0].joints[0]
    assert (joint.before, joint.after, joint.how) == ((1, 3, 8, 8), (1, 3, 3, 3), "inserted: Conv2d at 'conv2d'")
    assert module.training


def test_a_record_by_hand() -> None:
    net = tt.apply(
        Shared(), SMALL, {"kind": "insert", "after": "act#0", "module": {"type": "Dropout", "arguments": {"p": 0.1}}}
    )
    assert net.dropout.p == 0.1
    for wrong in ({"after": "act"}, {"after": "act", "module": {"type": "Dropuot"}}, {"module": {"type": "ReLU"}}):
        with pytest.raises(tt.EditError):
            tt.apply(Shared(), SMALL, {"kind": "insert", **wrong})


def test_an_own_class_is_used_and_replayed_where_it_is_trusted() -> None:
    class Own(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2

    model = Shared()
    net = insert(model, SMALL, Own(), after="act")
    assert isinstance(net.own, Own)
    with pytest.raises(tt.EditError, match="may not name"):
        replayed(model, net, SMALL)
    name = tt.history(net).edits[0].module.type
    again = replayed(model, net, SMALL, trusted={name: Own})
    assert torch.equal(outputs(again, SMALL), outputs(net, SMALL))


@settings(max_examples=8, deadline=None)
@given(st.data())
def test_any_insertion_of_the_identity_changes_no_output(data: st.DataObject) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(Shared(), nn.Linear(2, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 3)))
    net = model
    for _ in range(data.draw(st.integers(1, 2))):
        place = data.draw(
            st.sampled_from(
                ["0.conv#0", "0.act#1", "0:cat", "0:chunk", "0:add", "0.norm", "0.fc", "1", "2", "2.0", "2.1"]
            )
        )
        net = insert(
            net,
            SMALL,
            nn.Identity(),
            **{data.draw(st.sampled_from(["after", "before"])): place},
            check=data.draw(st.booleans()),
        )
    for training in (False, True):
        assert torch.equal(outputs(net, SMALL, training), outputs(model, SMALL, training))
    again = tt.apply(model, SMALL, tt.history(net), check=False)
    assert list(again.state_dict()) == list(net.state_dict())


def test_the_module_is_as_it_was_where_it_does_not_fit() -> None:
    module = nn.Linear(7, 7).train()
    weight = module.weight.detach().clone()
    with pytest.raises(tt.EditError, match="does not take"):
        tt.insert(nn.Sequential(nn.Linear(4, 3)).half().eval(), torch.randn(2, 4).half(), module, after="0")
    assert torch.equal(module.weight, weight) and module.weight.dtype == torch.float32
    assert module.training


@pytest.mark.parametrize("name", ["class", "1a", ""])
def test_a_name_is_one_that_source_can_hold(name: str) -> None:
    with pytest.raises(tt.EditError, match="not a name"):
        tt.insert(nn.Sequential(nn.Linear(4, 3)), torch.randn(2, 4), nn.ReLU(), after="0", name=name)


def test_one_object_cannot_be_put_in_twice() -> None:
    module, model = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    edits = [Insert(tt.ModuleSpec.of(module), after=after) for after in ("0", "1")]
    for check in (True, False):
        with pytest.raises(tt.EditError, match="part of the model"):
            tt.apply(model, torch.randn(2, 4), edits, check=check)


class Unbound(nn.Module):
    """One row of the values is taken by a function that gives views, which nobody may write to."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.fc(x).unbind(1)
        return first * second


def test_a_module_with_which_the_model_no_longer_trains_is_refused() -> None:
    tokens = torch.randint(0, 10, (2, 5))
    embedding = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2))
    with pytest.raises(tt.EditError, match="could not be trained any more: result type"):
        insert(embedding, tokens, nn.Dropout(0.2), before="0", copy=False)
    assert [type(each) for each in embedding] == [nn.Embedding, nn.Linear]
    x = torch.randn(3, 2, 4)
    with pytest.raises(tt.EditError, match=r"could not be trained any more in eval mode: .* is a view"):
        insert(Unbound(), x, nn.ReLU(inplace=True), after=":getitem#0")
    assert insert(Unbound(), x, nn.ReLU(), after=":getitem#0")(x).requires_grad
