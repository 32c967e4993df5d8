"""`remove`: modules, runs, functions and branches out of the middle of models, with their neighbours joined."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from torch import nn

from torchtrim import CheckFailed, EditError, PathError, SelectionError, history
from torchtrim.edits.adapter_layers import PassOn
from torchtrim.edits.apply import apply
from torchtrim.edits.edit import Edit, from_yaml, to_yaml
from torchtrim.edits.plan import plan
from torchtrim.edits.remove import Remove, remove
from torchtrim.edits.remove_place import Taken
from torchtrim.edits.weights import Weights

PICTURE = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet").eval()


@pytest.fixture(scope="module")
def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64).eval()


def record_of(net: nn.Module) -> Remove:
    record = history(net).edits[-1]
    assert isinstance(record, Remove)
    return record


def with_identity(model: nn.Module, *paths: str) -> nn.Module:
    """The reference for modules whose parents call them with one tensor."""
    twin = copy.deepcopy(model)
    for path in paths:
        twin.set_submodule(path, nn.Identity())
    return twin


@pytest.mark.parametrize(
    ("path", "how"),
    [("layer1.0", "gone"), ("layer1.0.conv1", "passed"), ("layer1.0.bn2", "passed"), ("bn1", "passed")],
)
def test_a_module_whose_shapes_agree(resnet: nn.Module, path: str, how: str) -> None:
    state = {name: value.clone() for name, value in resnet.state_dict().items()}
    net = remove(resnet, PICTURE, path)
    assert torch.equal(net(PICTURE), with_identity(resnet, path)(PICTURE))
    assert [name for name in state if not name.startswith(f"{path}.")] == list(net.state_dict())
    assert record_of(net).taken[0].how == how
    assert type(net) is type(resnet)
    assert all(torch.equal(value, state[name]) for name, value in resnet.state_dict().items())
    assert history(net).entries[0].checked[:3] == (
        "eval, batch 2: equal",
        "train, batch 2: equal",
        "eval, batch 1: equal",
    )


def test_the_other_elements_keep_their_keys(vit: nn.Module) -> None:
    net = remove(vit, PICTURE, "blocks.[12]")
    assert list(net.get_submodule("blocks")._modules) == ["0", "3", "4", "5"][: len(vit.blocks) - 2]
    assert torch.equal(net(PICTURE), with_identity(vit, "blocks.1", "blocks.2")(PICTURE))
    assert not remove(vit, PICTURE, "blocks").get_submodule("blocks")._modules  # a container is its elements


def test_the_result_trains(resnet: nn.Module) -> None:
    net = remove(resnet, PICTURE, ["layer1.0", "layer3.0"]).train()
    net(PICTURE).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    assert all(parameter.grad is None for parameter in resnet.parameters())


def test_a_run_has_one_joint() -> None:
    net = nn.Sequential(nn.Linear(4, 9), nn.ReLU(), nn.Linear(9, 4), nn.Linear(4, 2))
    x = torch.randn(3, 4)
    trimmed = remove(net, x, ["0", "1", "2"], adapter=None)
    assert list(trimmed._modules) == ["3"]
    assert torch.equal(trimmed(x), net[3](x))


def test_dropout_of_no_effect_does_not_break_a_run(vit: nn.Module) -> None:
    paths = [f"blocks.0.mlp.{name}" for name in ("fc1", "act", "drop1", "norm", "fc2")]
    assert remove(vit, PICTURE, paths, adapter=None)(PICTURE).shape == (2, 1000)


def test_a_value_that_others_need_keeps_its_shape() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.last = nn.Linear(4, 9), nn.Linear(9, 4), nn.Linear(13, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.first(x)
            return self.last(torch.cat([y, self.second(y)], 1))

    with pytest.raises(EditError) as caught:
        remove(Both(), torch.randn(3, 4), ["first", "second"], adapter=None)
    assert (caught.value.path, caught.value.found, caught.value.expected) == ("first", [3, 4], [3, 9])
    net = remove(Both(), torch.randn(3, 4), ["first", "second"], adapter="pool")
    assert sorted(record_of(net).adapters) == ["first", "second"]


def test_the_last_layer_needs_no_shape(resnet: nn.Module) -> None:
    net = remove(resnet, PICTURE, ["global_pool", "fc"], adapter=None)
    assert torch.equal(net(PICTURE), resnet.forward_features(PICTURE))


def test_an_in_place_layer_behind_gets_a_copy() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act = nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.conv(x)) + x

    block = Block()
    net = remove(nn.Sequential(nn.Identity(), block), PICTURE, "1.conv")
    assert torch.equal(net(PICTURE.clone()), PICTURE.relu() + PICTURE)
    assert isinstance(net.get_submodule("1.conv"), PassOn)


def test_functions(resnet: nn.Module) -> None:
    net = remove(resnet, PICTURE, "layer1.0:add")
    reference = copy.deepcopy(resnet)
    reference.layer1[0].bn2.register_forward_hook(lambda module, args, output: output.requires_grad_(False))

    def without_shortcut(module: nn.Module, args: Any) -> torch.Tensor:
        out = module.conv2(module.act1(module.bn1(module.conv1(args[0]))))
        return module.act2(module.bn2(out))

    reference.layer1[0].forward = lambda x: without_shortcut(resnet.layer1[0], (x,))
    with torch.no_grad():
        assert torch.equal(net(PICTURE), reference(PICTURE))
    assert history(net).entries[0].removed == ("layer1.0:add",)
    assert list(net.state_dict()) == list(resnet.state_dict())


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()
        self.between = nn.Sequential(nn.Linear(4, 4))
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(self.between(self.inner(x)))


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.linear(x)) + nn.functional.dropout(x, 0.5, self.training)


def test_one_of_several_calls() -> None:
    net, x = Twice().eval(), torch.randn(3, 4)
    inner, between = net.inner, net.between
    assert torch.equal(remove(net, x, "inner")(x), between(x))
    assert torch.equal(remove(net, x, "inner#0")(x), inner(between(x)))
    assert torch.equal(remove(net, x, "inner#1")(x), between(inner(x)))
    assert torch.equal(remove(net, x, "inner:relu")(x), (lambda f: f(between(f(x))))(lambda y: inner.linear(y) + y))
    assert "unused.weight" in remove(net, x, "inner#0").state_dict()
    with pytest.raises(EditError, match="runs several times"):
        remove(net, x, "inner:relu#1")
    with pytest.raises(PathError, match="no such call"):
        remove(net, x, "inner#2")
    assert record_of(remove(net, x, "between#0")).paths == ("between",)


def test_an_element_that_stands_twice_in_a_sequential() -> None:
    act = nn.ReLU()
    net = nn.Sequential(nn.Linear(4, 4), act, nn.Linear(4, 4), act)
    x = torch.randn(3, 4)
    assert list(remove(net, x, "3")._modules) == ["0", "2"]
    assert list(remove(net, x, "1#1")._modules) == ["0", "1", "2"]
    assert list(remove(net, x, "1#0")._modules) == ["0", "2", "3"]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None = None, *, scale: int = 1) -> tuple[Any, ...]:
        return self.linear(hidden) * scale, mask, None


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.layers = Layer(), nn.ModuleList(Layer() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(x[:, :1])
        x, mask, _ = self.first(x, mask)
        for number, layer in enumerate(self.layers):
            x, mask, _ = layer(hidden=x, mask=mask, scale=number + 1)
        return x * mask


def test_layers_that_take_and_return_several_values() -> None:
    net, x = Layers(), torch.randn(3, 4)
    trimmed = remove(net, x, "first")
    assert isinstance(trimmed.first, PassOn)
    assert trimmed.first.outputs == ("value", "=1", "none")
    with torch.no_grad():
        expected = x
        for number in (0, 2):  # the numbers in the loop must not shift: the element cannot just go
            expected = net.layers[number].linear(expected) * (number + 1)
        first = net.first.linear(x)
        trimmed = remove(net, x, "layers.1")
        by_hand = net.layers[2].linear(net.layers[0].linear(first)) * 3
        assert torch.allclose(trimmed(x), by_hand)
    assert record_of(trimmed).taken[0].how == "passed"
    assert list(remove(net, x, "layers.2").layers._modules) == ["0", "1"]


def test_layers_of_the_train_mode_alone() -> None:
    class Aux(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.aux, self.head = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> Any:
            x = self.body(x)
            return (self.head(x), self.aux(x)) if self.training else self.head(x)

    net, x = Aux(), torch.randn(3, 4)
    trimmed = remove(net, x, "aux", adapter=None).train()
    assert torch.equal(trimmed(x)[1], net.body(x))


def test_a_parent_that_asks_the_module_for_something_is_opened(vit: nn.Module) -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.width = 7

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * self.conv.out_channels

    net = remove(nn.Sequential(Asks()), PICTURE, "0.conv")
    assert torch.equal(net(PICTURE), PICTURE * 3)
    assert record_of(net).taken[0].how == "opened"
    assert net[0].width == 7


def test_branches(resnet: nn.Module, vit: nn.Module) -> None:
    net = remove(resnet, PICTURE, "layer1.0.conv2", branch=True)
    with torch.no_grad():
        x = resnet.maxpool(resnet.act1(resnet.bn1(resnet.conv1(PICTURE))))
        x = resnet.layer4(resnet.layer3(resnet.layer2(x)))
        assert torch.allclose(net(PICTURE), resnet.forward_head(x), atol=1e-6)
    assert not [name for name in net.state_dict() if name.startswith("layer1")]
    net = remove(vit, PICTURE, "blocks.0.mlp.fc1", branch=True)
    assert not [name for name in net.state_dict() if name.startswith("blocks.0.mlp")]
    with pytest.raises(EditError, match="no branch"):
        remove(resnet, PICTURE, "fc", branch=True)
    with pytest.raises(EditError, match="no joint"):
        remove(resnet, PICTURE, "layer1.0.conv2", branch=True, adapter=nn.Identity())


def test_a_branch_of_a_concatenation() -> None:
    class Cat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (
                nn.Conv2d(3, 4, 1),
                nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU()),
                nn.Conv2d(9, 2, 1),
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.cat([self.a(x), self.b(x)], 1))

    net = Cat()
    trimmed = remove(net, PICTURE, "b.0", branch=True)
    assert sorted(trimmed.state_dict()) == ["a.bias", "a.weight", "c.bias", "c.weight"]
    expected = nn.functional.conv2d(net.a(PICTURE), net.c.weight[:, :4], net.c.bias)
    assert torch.allclose(trimmed(PICTURE), expected, atol=1e-5)


def test_what_cannot_go(resnet: nn.Module) -> None:
    x = torch.zeros(2, 3, dtype=torch.long)
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4))
    cases: list[tuple[nn.Module, Any, Any, type[Exception], str]] = [
        (net, x, "0", EditError, "can stand for"),
        (net, x, "", PathError, "whole model"),
        (net, x, "7", PathError, "no module"),
        (net, x, "7.*", SelectionError, "nothing in"),
        (net, x, [], EditError, "nothing to remove"),
        (Twice(), torch.randn(2, 4), "unused", PathError, "never called"),
        (resnet, PICTURE, "layer2:add", PathError, "no such call"),
    ]
    for model, given, paths, kind, message in cases:
        with pytest.raises(kind, match=message):
            remove(model, given, paths)


def test_hooks_that_go_are_told() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    seen: list[int] = []
    net[0].register_forward_hook(lambda module, args, output: seen.append(0))
    net[1].register_forward_hook(lambda module, args, output: seen.append(1))
    trimmed = remove(net, torch.zeros(1, 4), "0")
    assert not seen
    trimmed(torch.zeros(1, 4))
    assert seen == [1]
    assert history(trimmed).entries[0].notes == ("hooks on '0' went with it",)


def test_in_place_keeps_modules_and_parameters() -> None:
    net = timm.create_model("test_resnet")
    before = dict(net.named_parameters())
    trimmed = remove(net, PICTURE, "layer1.0", copy=False)
    assert trimmed is net
    assert all(before[name] is parameter for name, parameter in net.named_parameters())
    with pytest.raises(PathError, match="went away with edit 1, remove"):
        remove(net, PICTURE, "layer1.0.conv1")


def test_the_record_does_it_again(resnet: nn.Module) -> None:
    request = Remove(("layer1.0.conv?", "layer3.0", "layer2.0:add"))
    net = apply(resnet, PICTURE, request)
    (record,) = history(net).edits
    again = from_yaml(to_yaml([record]))
    assert again == [record]
    assert Edit.from_dict(record.to_dict()) == record
    for check in (False, True):
        twin = apply(resnet, PICTURE, again, check=check)
        assert list(twin.state_dict()) == list(net.state_dict())
        assert torch.equal(twin(PICTURE), net(PICTURE))


def test_the_plan_tells_the_joints(resnet: nn.Module) -> None:
    planned = plan(resnet, PICTURE, Remove(("layer1.0", "layer2.0")))
    (joint,) = planned.steps[0].joints
    assert (joint.address, joint.before, joint.after) == ("layer1.0 .. layer2.0", (1, 32, 16, 16), (1, 48, 8, 8))
    assert joint.how.startswith("adapter: Sequential( (pool): AvgPool2d")


def test_other_inputs_than_pictures() -> None:
    class Ids(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(7, 8)
            self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3))

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            x = self.embed(ids)
            for layer in self.layers:
                x = layer(x, src_key_padding_mask=mask)
            return x.mean(1)

    given = {"ids": torch.randint(0, 7, (2, 5)), "mask": torch.zeros(2, 5, dtype=torch.bool)}
    net = remove(Ids().eval(), given, "layers.1")
    assert list(net.layers._modules) == ["0", "2"]
    assert net(**given).shape == (2, 8)


def test_a_wrong_result_is_thrown_away() -> None:
    class Counts(nn.Module):
        """Depends on how many elements there are: whatever is done, the check must not be fooled."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x * len(self.layers)

    net, x = Counts(), torch.randn(3, 4)
    trimmed = remove(net, x, "layers.1")
    assert torch.equal(trimmed(x), net.layers[2](net.layers[0](x)) * 3)
    assert record_of(trimmed).taken[0].how == "passed"
    with pytest.raises((EditError, CheckFailed)):
        apply(net, x, Remove(("layers.1",), taken=(type(record_of(trimmed).taken[0])("layers.1", "gone"),)))


def test_an_adapter_for_a_module_that_is_called_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.mid, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.tanh(self.mid(torch.tanh(self.mid(self.first(x))))))  # type: ignore[no-any-return]

    model, x = Twice(), torch.randn(3, 4)
    adapter = nn.Linear(6, 6)
    net = remove(model, x, "mid", adapter=adapter)
    hidden = torch.tanh(adapter(torch.tanh(adapter(model.first(x)))))
    torch.testing.assert_close(net(x), model.last(hidden))


@pytest.mark.parametrize("adapter", [3, True, nn.Identity])
def test_what_is_no_adapter(adapter: Any) -> None:
    with pytest.raises(EditError, match="an adapter is a module"):
        remove(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), "0", adapter=adapter)


def test_data_without_healing() -> None:
    with pytest.raises(EditError, match="data is for healing"):
        remove(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4), "0", data=[torch.randn(8, 4)])


def test_the_branch_of_a_scaled_block() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 1)
            self.scale = nn.Parameter(torch.full((8, 1, 1), 0.1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale * self.conv(x)

    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Scaled())
    assert torch.equal(remove(model, x, "1.conv", branch=True)(x), model[0](x))


def test_an_adapter_takes_over_mode_and_type() -> None:
    x = torch.randn(2, 4, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8)).double().eval()
    adapter = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.9))
    net = remove(model, x, "1", adapter=adapter)
    assert torch.equal(net(x), net(x))
    assert (adapter.training and adapter[0].weight.dtype == torch.float32) or net[1] is adapter
    wrong = nn.Linear(5, 8)
    with pytest.raises(EditError, match="adapter does not take"):
        remove(model, x, "1", adapter=wrong)
    assert wrong.training and wrong.weight.dtype == torch.float32


def test_a_record_with_healed_values_for_another_model() -> None:
    def made(width: int) -> nn.Module:
        return nn.Sequential(nn.Linear(4, width), nn.LayerNorm(width), nn.Tanh(), nn.Linear(width, 2))

    record = Remove(("2",), taken=(Taken("2", "gone"),), healed=Weights({"1.weight": torch.ones(6)}))
    assert apply(made(6), torch.randn(2, 4), [record], check=False)(torch.randn(2, 4)).shape == (2, 2)
    with pytest.raises(EditError, match="of another model"):
        apply(made(8), torch.randn(2, 4), [record], check=False)
    with pytest.raises(PathError, match="went away with edit 1"):
        apply(made(6), torch.randn(2, 4), [Remove(("1",)), record], check=False)


def test_a_path_that_goes_with_another_is_refused() -> None:
    """Without the sum the right side has no use; an adapter for what was on it has no place."""

    class TwoWays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.right = nn.Sequential(nn.Linear(4, 8), nn.ReLU())
            self.end = nn.Linear(8, 2)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.end(self.left(a) + self.right(b))

    model = TwoWays()
    inputs = (torch.randn(2, 6), torch.randn(2, 4))
    with pytest.raises(EditError, match="nothing needs it any more") as caught:
        remove(model, inputs, [":add", "right.0"], copy=False)
    assert caught.value.path == "right.0"
    assert isinstance(model.right[0], nn.Linear)
