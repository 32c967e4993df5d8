"""Healing the joints of a removal: what is fitted, what is chosen, and that it replays without data."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

import torchtrim as tt
from torchtrim.edits.heal import Seam, fit, seams_of
from torchtrim.edits.heal_data import Calibration
from torchtrim.edits.heal_fold import folded
from torchtrim.edits.heal_maps import Map, ScaleChannels, Sums
from torchtrim.edits.heal_norms import norm_parameters
from torchtrim.graph.batches import arguments_of
from torchtrim.graph.inputs import Inputs


class Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.3 * functional.relu(self.norm(self.conv(x)))


def cnn() -> nn.Module:
    torch.manual_seed(0)
    body = nn.Sequential(Residual(8), Residual(8), Residual(8))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))
    net.train()
    for _ in range(3):
        net(torch.randn(16, 3, 10, 10))
    return net.eval()


def mlp(middle: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 6), middle, nn.Linear(6, 6), nn.Tanh()).eval()


def batches(*shape: int, count: int = 5, size: int = 16) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(size, *shape, generator=generator) for _ in range(count)]


def distance(net: nn.Module, other: nn.Module, data: list[torch.Tensor]) -> float:
    with torch.no_grad():
        return float(sum((net(x) - other(x)).square().mean() for x in data))


@pytest.mark.parametrize("method", ["auto", "linear", "scale", "norm"])
def test_agrees_more_with_the_original(method: str) -> None:
    net, data, other = cnn(), batches(3, 10, 10), batches(3, 10, 10, count=9)[5:]
    plain = tt.remove(net, data[0], "1.1")
    healed = tt.remove(net, data[0], "1.1", heal=method, data=data)
    assert distance(net, healed, other) < distance(net, plain, other)


@pytest.mark.parametrize("method", ["auto", "linear", "scale", "norm"])
def test_replays_to_the_bit_without_data(method: str) -> None:
    net, data = cnn(), batches(3, 10, 10)
    healed = tt.remove(net, data[0], "1.1", heal=method, data=data)
    record = tt.Edit.from_dict(tt.history(healed).edits[0].to_dict())
    again = tt.apply(net, data[0], [record])
    assert list(again.state_dict()) == list(healed.state_dict())
    assert all(
        bool((a == b).all()) for a, b in zip(again.state_dict().values(), healed.state_dict().values(), strict=True)
    )
    assert bool((again(data[1]) == healed(data[1])).all())


def test_the_users_model_is_left_as_it_was() -> None:
    net, data = cnn(), batches(3, 10, 10)
    net[1][2].train()
    net[0].weight.requires_grad_(False)
    net[0].register_forward_hook(lambda *_: pytest.fail("the user's hook was run"))
    state = {name: value.clone() for name, value in net.state_dict().items()}
    flags = [module.training for module in net.modules()], [held.requires_grad for held in net.parameters()]
    random = torch.get_rng_state()
    healed = tt.remove(net, data[0], "1.1", heal="auto", data=data)
    assert all(bool((value == state[name]).all()) for name, value in net.state_dict().items())
    assert flags == ([module.training for module in net.modules()], [held.requires_grad for held in net.parameters()])
    assert bool((torch.get_rng_state() == random).all())
    assert all(held.grad is None for held in (*net.parameters(), *healed.parameters()))
    assert not healed[0].weight.requires_grad and healed.get_submodule("1.2").training and torch.is_grad_enabled()


def test_in_place_the_parameters_stay_the_same_objects() -> None:
    net, data = cnn(), batches(3, 10, 10)
    scale = net[1][2].norm.weight
    before = scale.detach().clone()
    healed = tt.remove(net, data[0], "1.1", heal="norm", data=data, copy=False)
    assert healed.get_parameter("1.2.norm.weight") is scale
    assert not bool((scale == before).all())


def test_a_layer_that_is_linear_is_repaired_for_nothing() -> None:
    """What went is a linear layer between two others: the map that replaces it is folded away."""
    net, data = mlp(nn.Linear(6, 6)), batches(4, size=64)
    with torch.no_grad():
        net[3].weight.mul_(0.5).add_(0.5 * torch.eye(6))
    plain = tt.remove(net, data[0], "3")
    healed = tt.remove(net, data[0], "3", heal="linear", data=data)
    assert list(healed.state_dict()) == list(plain.state_dict())
    assert distance(net, healed, data) < 0.02 * distance(net, plain, data)
    assert any("folded into" in note for note in tt.history(healed).entries[0].notes)


def test_an_adapter_stays_where_no_neighbour_takes_the_map() -> None:
    net, data = mlp(nn.Sequential(nn.Linear(6, 6), nn.Tanh())), batches(4, size=64)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), net[3], nn.Tanh(), nn.Linear(6, 2)).eval()
    healed = tt.remove(net, data[0], "2", heal="linear", data=data)
    assert isinstance(healed[2], nn.Linear)
    assert distance(net, healed, data) < distance(net, tt.remove(net, data[0], "2"), data)


def test_transformer_layers() -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_vit", num_classes=7, img_size=64).eval()
    data = batches(3, 64, 64, count=2, size=10)
    plain = tt.remove(net, data[0][:1], "blocks.2")
    healed = tt.remove(net, data[0][:1], "blocks.2", heal="auto", data=data)
    assert distance(net, healed, data) <= distance(net, plain, data)


def test_a_repaired_shape_can_be_healed_too() -> None:
    net, data = cnn(), batches(3, 10, 10)
    net = nn.Sequential(net[0], nn.Sequential(nn.Conv2d(8, 12, 1), nn.ReLU()), nn.Conv2d(12, 4, 1), nn.Flatten()).eval()
    plain = tt.remove(net, data[0], "1")
    healed = tt.remove(net, data[0], "1", heal="linear", data=data)
    assert distance(net, healed, data) < 0.5 * distance(net, plain, data)


def test_pairs_and_dicts_are_data() -> None:
    net, data = cnn(), batches(3, 10, 10)
    pairs = [(x, torch.zeros(len(x))) for x in data]
    dicts = [{"input": x, "label": torch.zeros(len(x))} for x in data]
    healed = [tt.remove(net, data[0], "1.1", heal="scale", data=each) for each in (data, pairs, dicts, torch.cat(data))]
    first = healed[0].state_dict()
    for each in healed[1:3]:
        assert all(bool((value == first[name]).all()) for name, value in each.state_dict().items())
    for name, value in healed[3].state_dict().items():
        torch.testing.assert_close(value, first[name], rtol=1e-4, atol=1e-5)


def test_without_data_it_says_what_is_missing() -> None:
    net = cnn()
    with pytest.raises(tt.InputError, match="data="):
        tt.remove(net, torch.zeros(1, 3, 10, 10), "1.1", heal="auto")


def test_data_that_can_be_gone_through_once_is_refused() -> None:
    def once() -> Iterator[torch.Tensor]:
        yield from batches(3, 10, 10)

    with pytest.raises(tt.InputError, match="several times"):
        tt.remove(cnn(), torch.zeros(1, 3, 10, 10), "1.1", heal="scale", data=once())


def test_too_little_data_is_refused() -> None:
    with pytest.raises(tt.InputError, match="too little data"):
        tt.remove(cnn(), torch.zeros(1, 3, 10, 10), "1.1", heal="scale", data=[torch.zeros(3, 3, 10, 10)])


def test_an_unknown_way_is_refused() -> None:
    with pytest.raises(tt.EditError, match="'linear'"):
        tt.remove(cnn(), torch.zeros(1, 3, 10, 10), "1.1", heal="magic", data=batches(3, 10, 10))


def test_planning_needs_no_data() -> None:
    plan = tt.plan(cnn(), torch.zeros(1, 3, 10, 10), tt.Remove(("1.1",), heal="auto"))
    assert "1.1" in str(plan)


def test_nothing_is_changed_where_nothing_helps() -> None:
    """The block does nothing, so there is nothing to heal."""
    net, data = cnn(), batches(3, 10, 10)
    with torch.no_grad():
        net[1][1].norm.weight.zero_()
        net[1][1].norm.bias.zero_()
    healed = tt.remove(net, data[0], "1.1", heal="auto", data=data)
    assert all(bool((value == net.state_dict()[name]).all()) for name, value in healed.state_dict().items())


def test_sums_are_those_of_all_data_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 5, generator=generator) + 1000  # a large offset must not cost the precision
    y = x @ torch.randn(5, 5, generator=generator) + torch.randn(300, 5, generator=generator)
    parts = Sums(dim=1)
    for one, other in zip(x.split(37), y.split(37), strict=True):
        parts.add(one, other)
    found = parts.linear(0.0)
    ones = torch.cat([x, torch.ones(300, 1)], 1).double()
    right = torch.linalg.lstsq(ones - torch.cat([x.mean(0), torch.zeros(1)]), y.double()).solution
    torch.testing.assert_close(found.weight, right[:-1], rtol=1e-5, atol=1e-5)
    matched = parts.matched()
    scaled = x.double() * matched.weight + matched.bias
    torch.testing.assert_close(scaled.mean(0), y.double().mean(0), rtol=1e-5, atol=1e-3)


def test_a_stronger_ridge_is_nearer_to_the_identity() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    sums = Sums(dim=1)
    sums.add(x, x.flip(1) + 1)
    far = [float((sums.linear(strength).weight - torch.eye(4)).norm()) for strength in (0.1, 1.0, 10.0, 1e6)]
    assert far == sorted(far, reverse=True) and far[-1] < 1e-4
    assert float(sums.linear(1e6).bias.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("before", "behind", "diagonal", "where"),
    [
        (nn.Linear(3, 4), nn.ReLU(), False, "0"),
        (nn.Linear(3, 4), nn.ReLU(), True, "0"),
        (nn.BatchNorm1d(4), nn.ReLU(), True, "0"),
        (nn.LayerNorm(4), nn.ReLU(), True, "0"),
        (nn.LayerNorm(4), nn.Linear(4, 2), False, "2"),
        (nn.Tanh(), nn.Linear(4, 2), False, "2"),
        (nn.LayerNorm(4), nn.ReLU(), False, None),
        (nn.Tanh(), nn.Linear(4, 2, bias=False), False, None),
    ],
)
def test_folded_maps_are_exact(before: nn.Module, behind: nn.Module, diagonal: bool, where: str | None) -> None:
    torch.manual_seed(0)

    class Place(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    mapping = Map(torch.rand(4) if diagonal else torch.randn(4, 4), torch.randn(4), 0.1)
    x = torch.randn(5, 3 if isinstance(before, nn.Linear) else 4)
    net = nn.Sequential(before, Place(), behind).eval()
    values = folded(net, "1", Map(mapping.weight.double(), mapping.bias.double(), 0.1), Inputs.of(x))
    if where is None:
        assert values is None
        return
    assert values is not None and {name.partition(".")[0] for name in values} == {where}
    expected = nn.Sequential(before, mapping.module(2, 1, x), behind)(x).detach()
    for name, value in values.items():
        net.get_parameter(name).data = value
    torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("padding", "folds"), [(0, True), (1, False)])
def test_a_map_goes_into_a_convolution_behind_only_without_padding(padding: int, folds: bool) -> None:
    torch.manual_seed(0)

    class Place(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    net = nn.Sequential(nn.ReLU(), Place(), nn.Conv2d(4, 2, 3, padding=padding)).eval()
    mapping, x = Map(torch.randn(4, 4).double(), torch.randn(4).double(), 0.1), torch.randn(2, 4, 6, 6)
    values = folded(net, "1", mapping, Inputs.of(x))
    assert (values is not None) == folds
    if values is not None:
        expected = net[2](mapping.module(4, 1, x)(net[0](x)))
        for name, value in values.items():
            net.get_parameter(name).data = value
        torch.testing.assert_close(net(x), expected, rtol=1e-4, atol=1e-5)


def test_a_layer_that_is_used_twice_is_not_folded_into() -> None:
    shared = nn.Linear(4, 4)

    class Place(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

    net = nn.Sequential(shared, nn.Tanh(), shared, Place(), nn.Tanh()).eval()
    mapping = Map(torch.rand(4).double(), torch.randn(4).double())
    assert folded(net, "3", mapping, Inputs.of(torch.zeros(2, 4))) is None


def test_norm_layers_by_class_and_by_name() -> None:
    class MyNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    net = nn.Sequential(nn.GroupNorm(1, 3), MyNorm(), nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
    assert sorted(norm_parameters(net)) == ["0.bias", "0.weight", "1.weight"]


def test_rows_are_held_back_across_batches() -> None:
    data = [torch.full((1, 2), float(i)) for i in range(25)]
    found = Calibration.of(data, nn.Linear(2, 2), Inputs.of(torch.zeros(1, 2)))
    held = [float(piece.args[0][0, 0]) for piece in found.held_back()]
    fitted = [float(piece.args[0][0, 0]) for piece in found.to_fit()]
    assert held == [4.0, 9.0, 14.0, 19.0, 24.0]
    assert sorted(held + fitted) == list(map(float, range(25)))


def test_arguments_of_a_model_with_two_inputs() -> None:
    one, other = torch.zeros(4, 2), torch.ones(4, 2)
    example = Inputs.of((one, other))
    net = nn.Bilinear(2, 2, 1)
    assert len(arguments_of((one, other), net, example).args) == 2
    assert len(arguments_of((one, other, torch.zeros(4)), net, example).args) == 2
    assert len(arguments_of(((one, other), torch.zeros(4)), net, example).args) == 2
    assert set(arguments_of({"input1": one, "input2": other, "y": one}, net, example).kwargs) == {"input1", "input2"}


def test_a_joint_without_a_module_at_its_end_gets_no_map() -> None:
    net, data = cnn(), batches(3, 10, 10)

    def build(adapters: object) -> nn.Module:
        return tt.remove(net, data[0], "1.1", check=False)

    healing = fit(net, build, [Seam("1.1")], data=data, inputs=Inputs.of(data[0]), method="auto")
    assert healing.choices[0].what == "no map fits there"
    assert not healing.adapters and seams_of([]) == []


def test_scale_channels_exports() -> None:
    layer = ScaleChannels(3, dim=2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    assert layer(torch.ones(1, 2, 3)).tolist() == [[[1.0, 2.0, 3.0]] * 2]
    assert tt.ModuleSpec.of(layer).recorded().build()(torch.ones(1, 1, 3)).tolist() == [[[1.0, 2.0, 3.0]]]


def test_what_cannot_be_healed_towards() -> None:
    net = cnn()
    last = [name for name, module in net.named_modules() if isinstance(module, nn.Linear)][-1]
    with pytest.raises(tt.EditError, match="nothing to heal towards"):
        tt.remove(net, batches(3, 10, 10)[0], last, heal="linear", data=batches(3, 10, 10))


def test_data_that_the_model_refuses() -> None:
    net, data = cnn(), batches(3, 10, 10)
    for wrong in ([torch.cat([one, one], 1) for one in data], [one.double() for one in data]):
        with pytest.raises(tt.InputError, match="does not take the data"):
            tt.remove(net, data[0], "1.1", heal="linear", data=wrong)
    late = [*data, torch.randn(16, 5, 10, 10)]
    with pytest.raises(tt.InputError, match="does not take the data") as refused:
        tt.remove(net, data[0], "1.1", heal="linear", data=late)
    assert refused.value.path == "data[5]"
    for nothing in ([{"image": one} for one in data], [data[0], "a"], [3]):
        with pytest.raises(tt.InputError, match="none of the forward's arguments"):
            tt.remove(net, data[0], "1.1", heal="linear", data=nothing)
