"""Layers that read pruned channels are solved again, so that what is left makes up for what went."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import dependencies
from torchtrim.edits.reconstruct import Reconstruction, reconstruct, set_tensors
from torchtrim.edits.work import Work
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.channels import scores


class Residual(nn.Module):
    """Two blocks with a residual connection, each a wide convolution between two norms."""

    def __init__(self, kernel: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        for name in ("one", "two"):
            block = nn.Sequential(
                nn.Conv2d(8, 24, 1, bias=False),
                nn.BatchNorm2d(24),
                nn.ReLU(inplace=True),
                nn.Conv2d(24, 8, kernel, padding=kernel // 2, groups=groups, bias=False),
                nn.BatchNorm2d(8),
            )
            setattr(self, name, block)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = x + self.one(x)
        x = self.two(x) + x
        return self.fc(x.mean((2, 3)))


def _trained_norms(model: nn.Module, x: torch.Tensor) -> nn.Module:
    """Statistics that fit the weights, as in a trained model."""
    tt.recalibrate_batchnorm(model, [x])
    return model.eval()


def _twins(weight: torch.Tensor, first: int, second: int) -> None:
    with torch.no_grad():
        weight[second] = weight[first]


def _reconstructed(model: nn.Module, net: nn.Module, x: torch.Tensor) -> tuple[nn.Module, Reconstruction]:
    narrowed = tt.history(net).edits[-1].narrowed
    found = reconstruct(model, net, narrowed, inputs=Inputs.of(x[:1]), data=[x])
    work = Work(net, Inputs.of(x[:1]))
    set_tensors(work, found.weights)
    return work.model, found


def _error(net: nn.Module, model: nn.Module, x: torch.Tensor) -> float:
    right = model(x)
    return float((net(x) - right).square().mean().sqrt() / right.std())


@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_what_a_twin_can_make_up_for_is_made_up_for(kernel: int) -> None:
    """A channel that equals another goes without a loss: the other's weights take its part."""
    model, x = Residual(kernel), torch.randn(60, 3, 8, 8)
    _twins(model.one[0].weight, 0, 1)
    _twins(model.one[0].weight, 5, 9)
    model = _trained_norms(model, x)
    net = tt.delete_channels(model, x[:1], {"one.0": [1, 9]})
    assert _error(net, model, x) > 0.05
    net, found = _reconstructed(model, net, x)
    assert _error(net, model, torch.randn(16, 3, 8, 8)) < 0.01
    assert set(found.weights) == {"one.3.weight", "one.4.running_mean"}


@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_on_other_data_it_is_nearer_to_the_original(kernel: int) -> None:
    model, x = Residual(kernel), torch.randn(80, 3, 8, 8)
    model = _trained_norms(model, x)
    net = tt.delete_channels(model, x[:1], {"one.0": range(0, 24, 3), "two.0": range(0, 24, 2)})
    other = torch.randn(40, 3, 8, 8)
    before = _error(net, model, other)
    net, found = _reconstructed(model, net, x)
    assert _error(net, model, other) < 0.6 * before
    assert found.after < found.before


@torch.no_grad()
def test_a_sum_behind_makes_up_for_what_an_earlier_layer_left_open() -> None:
    """The second block is fitted to what the first one's error leaves to be done, though it lost little itself."""
    model, x = Residual(), torch.randn(80, 3, 8, 8)
    model = _trained_norms(model, x)
    net = tt.delete_channels(model, x[:1], {"one.0": range(0, 24, 2), "two.0": [0]})
    net, found = _reconstructed(model, net, x)
    assert {"one.3.weight", "two.3.weight"} <= set(found.weights)
    assert found.after < 0.5 * found.before


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str, list[int]]] = {
    "linear": (lambda: nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 4)), (6,), "0", [0, 5, 6]),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 20), nn.GELU(), nn.Linear(20, 4)), (7, 6), "0", [0, 5, 6]),
    "conv1d": (
        lambda: nn.Sequential(nn.Conv1d(3, 16, 1), nn.ReLU(), nn.Conv1d(16, 4, 3, dilation=2)),
        (3, 9),
        "0",
        [1],
    ),
    "strided": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 4, 3, stride=2, padding=1, padding_mode="reflect")
        ),
        (3, 9, 9),
        "0",
        [1, 7],
    ),
    "conv3d": (lambda: nn.Sequential(nn.Conv3d(2, 12, 1), nn.ReLU(), nn.Conv3d(12, 3, 2)), (2, 4, 4, 4), "0", [0, 3]),
    "grouped": (
        lambda: nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3, groups=4), nn.Flatten(2)),
        (3, 8, 8),
        "0",
        [0, 5, 9, 14],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers_of_all_kinds(name: str) -> None:
    make, shape, path, channels = LAYERS[name]
    model, x = make().eval(), torch.randn(300, *shape)
    net = tt.delete_channels(model, x[:1], path, channels)
    other = torch.randn(100, *shape)
    before = _error(net, model, other)
    net, found = _reconstructed(model, net, x)
    assert _error(net, model, other) < 0.9 * before, found.notes


class Doubling(nn.Conv2d):
    """A convolution whose class does something to its weight."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.weight * 2, self.bias)


@torch.no_grad()
def test_a_class_that_computes_something_else_is_left_alone_and_said_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), Doubling(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    x = torch.randn(60, 3, 4, 4)
    net = tt.delete_channels(model, x[:1], {"0": [1, 2], "2": [0]})
    _, found = _reconstructed(model, net, x)
    assert "2.weight" not in found.weights and "4.weight" in found.weights
    assert "left as they are: 2" in found.notes[0]


@torch.no_grad()
def test_a_solution_that_does_not_help_is_not_taken() -> None:
    """On data from which nothing can be learned of the rest, the weights stay."""
    model = nn.Sequential(nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 4)).eval()
    x = torch.randn(10, 40)
    net = tt.delete_channels(model, x[:1], "0", [0])
    with torch.no_grad():
        model[2].weight[:, 0] = 0  # the deleted channel was read by nobody
    _, found = _reconstructed(model, tt.delete_channels(model, x[:1], "0", [0]), x)
    assert not found.weights and found.after == found.before
    assert net[0].out_features == 39


def test_models_are_left_as_they_were() -> None:
    model, x = Residual().train(), torch.randn(40, 3, 8, 8)
    net = tt.delete_channels(model, x[:1], "one.0", [0, 1, 2])
    before = [each.clone() for held in (model, net) for each in held.state_dict().values()]
    seed = torch.random.get_rng_state()
    reconstruct(model, net, tt.history(net).edits[-1].narrowed, inputs=Inputs.of(x[:1]), data=[x])
    after = [each for held in (model, net) for each in held.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert model.training and net.training and torch.equal(seed, torch.random.get_rng_state())
    assert not any(module._forward_hooks for held in (model, net) for module in held.modules())


def test_without_data_it_says_what_it_needs() -> None:
    model, x = Residual(), torch.randn(4, 3, 8, 8)
    net = tt.delete_channels(model, x[:1], "one.0", [0], check=False)
    with pytest.raises(tt.InputError, match="reconstruction looks at what flows"):
        reconstruct(model, net, tt.history(net).edits[-1].narrowed, inputs=Inputs.of(x[:1]), data=None)


def _scores(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    found = dependencies(net, follow(net, Inputs.of(x[:1])))
    values = scores(net, found, "reconstruction", data=x.split(max(20, len(x) // 4)), inputs=x[:1])
    return {group.name: torch.as_tensor(values[group.units]) for group in found.groups}


@torch.no_grad()
def test_a_channel_that_another_can_stand_in_for_is_worth_little() -> None:
    """One of two twins may go, though their weights are the largest; then the other one counts in full."""
    net, x = nn.Sequential(nn.Linear(40, 10), nn.ReLU(), nn.Linear(10, 4)).eval(), torch.randn(4000, 40)
    net[0].weight[7] = net[0].weight[2] = 2 * net[0].weight[2]
    net[0].bias[7] = net[0].bias[2]
    found = _scores(net, x)["0"]
    low, high = sorted((float(found[2]), float(found[7])))
    assert low == float(found.min()) and low < 0.2 * float(found.median()) and high > float(found.median())


@torch.no_grad()
def test_the_score_is_what_the_outputs_lose() -> None:
    """For one linear layer the cost is exact: the squared error of the best that is left, by the outputs' variance."""
    net, x = nn.Sequential(nn.Linear(40, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(4000, 40)
    found = _scores(net, x)["0"]
    cheapest = int(found.argmin())
    hidden, right = net[:2](x), net(x)
    others = [each for each in range(8) if each != cheapest]
    given = torch.cat([hidden[:, others], torch.ones(len(x), 1)], 1)
    left = right - given @ torch.linalg.lstsq(given, right).solution
    saved = 40 + 3
    expected = float((left.square().sum(1).mean() / right.var()) / 3) / saved
    assert float(found[cheapest]) == pytest.approx(expected, rel=0.3)


def test_it_leaves_a_model_as_it_was_and_needs_data() -> None:
    net, x = Residual().train(), torch.randn(40, 3, 8, 8)
    net.fc.weight.requires_grad_(False)
    before = {name: each.clone() for name, each in net.state_dict().items()}
    seed = torch.random.get_rng_state()
    found = _scores(net, x)
    assert set(found) >= {"stem", "one.0", "two.0"} and all(bool(each.isfinite().all()) for each in found.values())
    assert all(torch.equal(net.state_dict()[name], each) for name, each in before.items())
    assert net.training and not net.fc.weight.requires_grad and all(p.grad is None for p in net.parameters())
    assert torch.equal(seed, torch.random.get_rng_state())
    with pytest.raises(tt.InputError, match="needs data"):
        tt.prune_channels(net, x[:1], 0.5, importance="reconstruction")


@torch.no_grad()
def test_pruned_and_reconstructed_in_one_call_and_done_again_without_data(tmp_path: Path) -> None:
    model, x = Residual(), torch.randn(80, 3, 8, 8)
    model = _trained_norms(model, x)
    nets = {
        reconstruct: tt.prune_channels(
            model,
            x[:1],
            0.3,
            importance="reconstruction",
            scope="global",
            round_to=1,
            data=[x],
            reconstruct=reconstruct,
        )
        for reconstruct in (False, True)
    }
    other = torch.randn(40, 3, 8, 8)
    assert _error(nets[True], model, other) < 0.8 * _error(nets[False], model, other)
    assert any("reconstruction: " in note for note in tt.history(nets[True]).entries[-1].notes)
    again = tt.apply(model, None, tt.history(nets[True]))
    tt.save(nets[True], tmp_path / "net.trim")
    loaded = tt.load(tmp_path / "net.trim", model=Residual())
    assert torch.equal(again(other), nets[True](other)) and torch.equal(loaded(other), nets[True](other))


@torch.no_grad()
def test_what_functions_read_has_scores_too() -> None:
    """Attention multiplies with weights that no module is called for; a head whose values are zero is worth nothing."""
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    net, x = nn.Sequential(nn.Linear(6, 16), layer, nn.Linear(16, 3)).eval(), torch.randn(60, 5, 6)
    layer.self_attn.in_proj_weight[32 + 4 : 32 + 8] = 0
    layer.self_attn.in_proj_bias[32 + 4 : 32 + 8] = 0
    heads = _scores(net, x)["1.self_attn"]
    assert len(heads) == 4 and int(heads.argmin()) == 1 and float(heads[1]) < 1e-3 * float(heads.max())
