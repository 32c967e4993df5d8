"""How much channels matter: against torch-pruning's own results, and against sums done by hand."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn import functional

from torchtrim.channels.asked import makers
from torchtrim.channels.follow import follow
from torchtrim.channels.groups import Dependencies, dependencies
from torchtrim.errors import EditError, InputError, ModelError, PathError
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.channels import scores, silent
from torchtrim.importance.matrices import ChannelGroup
from torchtrim.importance.thresholds import ratios_below

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.tensor([0, 3, 1, 2])


class Plain(nn.Module):
    """Convolutions one behind the other, a residual sum, and a flattened picture: torch-pruning's graph is right."""

    def __init__(self, size: int = 2) -> None:
        super().__init__()
        self.size = size
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 8, 1)
        self.fc1 = nn.Linear(8 * size**2, 16)
        self.fc2 = nn.Linear(16, 5)
        for norm in (self.bn1, self.bn2):
            nn.init.uniform_(norm.weight, 0.2, 2.0)
            nn.init.uniform_(norm.bias, 0.0, 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(self.bn1(self.conv1(x)))
        y = functional.relu(self.bn2(self.conv2(x)))
        x = functional.relu(x + self.conv3(y))
        x = functional.adaptive_avg_pool2d(x, self.size).flatten(1)
        return self.fc2(functional.relu(self.fc1(x)))


def found(model: nn.Module, x: Any = X) -> Dependencies:
    return dependencies(model, follow(model, Inputs.of(x)))


def by_group(model: nn.Module, importance: Any, **given: Any) -> dict[str, np.ndarray]:
    units = found(model)
    result = scores(model, units, importance, inputs=X, **given)
    assert result.shape == (units.count,) and result.dtype == np.float64
    return {group.name: result[group.units] for group in units.groups}


def torch_prunings(model: nn.Module, criterion: Any) -> dict[str, np.ndarray]:
    """What torch-pruning says of the same layers with its own graph."""
    graph = tp.DependencyGraph().build_dependency(model, example_inputs=(X,))
    told = {}
    for path, function in (
        ("conv1", tp.prune_conv_out_channels),
        ("conv2", tp.prune_conv_out_channels),
        ("fc1", tp.prune_linear_out_channels),
    ):
        layer = model.get_submodule(path)
        group = graph.get_pruning_group(layer, function, list(range(layer.weight.shape[0])))
        told[path] = criterion(group).double().numpy()
    return told


def group_norm(**given: Any) -> Any:
    return tp.importance.GroupMagnitudeImportance(**given)


# Where torch-pruning sums up over the places that a channel has behind `flatten`, and where it does other things.
SUMS = [
    ("magnitude", group_norm()),
    ("l2", group_norm(p=2)),
    ("l1", group_norm(p=1)),
    ("lamp", tp.importance.LAMPImportance()),
    ("taylor", tp.importance.GroupTaylorImportance()),
    (None, tp.importance.GroupTaylorImportance(bias=True)),
    (None, group_norm(bias=True)),
    (None, group_norm(p=1, group_reduction="first", normalizer=None)),
    (None, group_norm(p=1, target_types=[nn.Conv2d, nn.Linear])),
]
OTHERS = [
    (None, tp.importance.FPGMImportance()),
    (None, tp.importance.GroupTaylorImportance(multivariable=True)),
    (None, group_norm(group_reduction="max", normalizer="gaussian")),
    (None, group_norm(group_reduction="prod", normalizer="max")),
]


@pytest.mark.parametrize(
    ("ours", "theirs", "size"), [*((*each, 2) for each in SUMS), *((*each, 1) for each in SUMS + OTHERS)]
)
def test_the_same_as_torch_pruning_where_its_graph_is_right(ours: str | None, theirs: Any, size: int) -> None:
    net = Plain(size).eval()
    mine = by_group(net, ours or theirs, data=[(X, Y)])
    twin = copy.deepcopy(net)
    functional.cross_entropy(twin(X), Y).backward()
    told = torch_prunings(twin, theirs)
    assert set(mine) == set(told) == {"conv1", "conv2", "fc1"}
    for path, expected in told.items():
        np.testing.assert_allclose(mine[path], expected, rtol=2e-4, atol=1e-6, err_msg=path)


def test_batch_norm_scales_are_torch_prunings_and_other_groups_have_none() -> None:
    net = Plain().eval()
    mine = by_group(net, "bn_scale")
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=(X,))
    for path in ("conv1", "conv2"):
        layer = net.get_submodule(path)
        group = graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels)))
        np.testing.assert_allclose(mine[path], tp.importance.BNScaleImportance()(group).numpy(), rtol=1e-5)
    scale = net.bn2.weight.detach().abs()
    np.testing.assert_allclose(mine["conv2"], (scale / scale.mean()).numpy(), rtol=1e-5)
    assert np.isnan(mine["fc1"]).all()
    assert "batch norm" in silent("bn_scale")


def test_magnitudes_by_hand() -> None:
    net = Plain().eval()
    reads = net.fc1.weight.detach().abs().reshape(16, 8, 4).sum((0, 2))
    writes = sum(layer.weight.detach().abs().flatten(1).sum(1) for layer in (net.conv1, net.conv3))
    total = writes + net.bn1.weight.detach().abs() + net.conv2.weight.detach().abs().sum((0, 2, 3)) + reads
    np.testing.assert_allclose(by_group(net, "l1")["conv1"], (total / total.mean()).numpy(), rtol=1e-5)


def test_lamp_by_hand() -> None:
    net = nn.Sequential(nn.Linear(1, 3, bias=False), nn.Linear(3, 2, bias=False))
    net[0].weight.data = torch.tensor([[3.0], [1.0], [2.0]])
    net[1].weight.data.zero_()
    units = found(net, torch.zeros(2, 1))
    # Half of 9, 1 and 4 (the second layer is zero), over the sum of those that are no smaller.
    np.testing.assert_allclose(scores(net, units, "lamp"), [9 / 9, 1 / 14, 4 / 13], rtol=1e-5)


def test_distances_are_those_of_the_paper() -> None:
    net = Plain().eval()
    rows = [net.conv2.weight.detach().flatten(1), net.conv3.weight.detach().flatten(1).T]
    total = sum(torch.linalg.norm(each[:, None] - each[None], dim=2).sum(1) for each in rows)
    np.testing.assert_allclose(by_group(net, "fpgm")["conv2"], (total / total.mean()).numpy(), rtol=1e-3)


def test_taylor_averages_sizes_over_batches() -> None:
    net = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 1, bias=False))
    x = torch.randn(2, 2)
    data = [(x[:1], torch.ones(1, 1)), (x[1:], -torch.ones(1, 1))]

    def linear(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return (output * target).sum()

    units = found(net, x)
    first, second = net[0].weight.detach(), net[1].weight.detach()
    expected = torch.zeros(2)
    for inputs, target in data:
        hidden = inputs @ first.T
        expected += (first * (target * second).T * inputs).abs().sum(1) + (second * target * hidden).abs()[0]
    result = scores(net, units, "taylor", data=data, loss=linear)
    np.testing.assert_allclose(result, (expected / expected.mean()).numpy(), rtol=1e-4)


def test_hessian_averages_the_squared_gradients_of_samples() -> None:
    net = Plain().eval()
    mine = by_group(net, "hessian", data=[(X[:3], Y[:3]), (X[3:], Y[3:])])
    twin = copy.deepcopy(net)
    squares = {name: torch.zeros_like(held) for name, held in twin.named_parameters()}
    for row in range(4):
        twin.zero_grad()
        functional.cross_entropy(twin(X[row : row + 1]), Y[row : row + 1]).backward()
        for name, held in twin.named_parameters():
            squares[name] += held.grad.square() / 4
    for name, held in twin.named_parameters():
        held.grad = squares[name]  # torch-pruning's own accumulation keeps the last sample alone
    for path, expected in torch_prunings(twin, tp.importance.GroupHessianImportance()).items():
        np.testing.assert_allclose(mine[path], expected, rtol=1e-3, atol=1e-6, err_msg=path)
    weights = net.fc1.weight.detach().square() * squares["fc1.weight"]
    reads = net.fc2.weight.detach().square() * squares["fc2.weight"]
    total = weights.sum(1) + reads.sum(0)
    np.testing.assert_allclose(mine["fc1"], (total / total.mean()).numpy(), rtol=1e-3, atol=1e-6)


def test_a_loss_may_take_the_model_and_the_batch() -> None:
    net = Plain().eval()

    def whole(model: nn.Module, batch: Any) -> torch.Tensor:
        return functional.cross_entropy(model(batch["x"]), batch["y"])

    for name in ("taylor", "hessian"):
        pairs = by_group(net, name, data=[(X, Y)], loss=nn.CrossEntropyLoss())
        dicts = by_group(net, name, data=[{"x": X, "y": Y}], loss=whole)
        for path in pairs:
            np.testing.assert_allclose(pairs[path], dicts[path], rtol=1e-4, atol=1e-6)


class OwnLoss(nn.Module):
    """As models of transformers do: with labels the output is a dict that has the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        logits = self.other(self.one(x).relu())
        return {"logits": logits} | ({} if labels is None else {"loss": functional.cross_entropy(logits, labels)})


@pytest.mark.parametrize("importance", ["taylor", "hessian"])
def test_a_model_may_work_out_its_own_loss(importance: str) -> None:
    net, x, labels = OwnLoss(), torch.randn(5, 4), torch.tensor([0, 1, 2, 1, 0])
    units = found(net, x)
    own = scores(net, units, importance, data=[{"x": x, "labels": labels}], inputs={"x": x})
    pairs = scores(net, units, importance, data=[(x, labels)], inputs=x)
    np.testing.assert_allclose(own, pairs, rtol=1e-4)


def test_activations_are_looked_at_where_they_are_read() -> None:
    net = Plain().eval()
    seen: dict[str, torch.Tensor] = {}
    for path in ("conv2", "conv3", "fc1", "fc2"):
        net.get_submodule(path).register_forward_hook(lambda _m, args, _o, path=path: seen.update({path: args[0]}))
    with torch.no_grad():
        net(X)
    nonzero = by_group(net, "apoz", data=[X])
    np.testing.assert_allclose(nonzero["conv2"], (seen["conv3"] != 0).float().mean((0, 2, 3)).numpy(), rtol=1e-5)
    np.testing.assert_allclose(nonzero["fc1"], (seen["fc2"] != 0).float().mean(0).numpy(), rtol=1e-5)
    both = (seen["conv2"] != 0).float().mean((0, 2, 3)) + (seen["fc1"] != 0).float().reshape(4, 8, 4).mean((0, 2))
    np.testing.assert_allclose(nonzero["conv1"], (both / 2).numpy(), rtol=1e-5)
    assert 0 < nonzero["conv2"].min() < 1
    size = by_group(net, "activation", data=[X[:2], X[2:]])
    expected = seen["conv3"].abs().mean((0, 2, 3))
    np.testing.assert_allclose(size["conv2"], (expected / expected.mean()).numpy(), rtol=1e-4)


def test_mean_activation_is_torch_prunings() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    units = found(net)
    mine = scores(net, units, tp.importance.ActivationImportance(), data=[X], inputs=X)
    criterion = tp.importance.ActivationImportance()
    with criterion.compute_importance(net), torch.no_grad():
        net(X)
    graph = tp.DependencyGraph().build_dependency(net, example_inputs=(X,))
    for layer, group in zip((net[0], net[2]), units.groups, strict=True):
        theirs = criterion(graph.get_pruning_group(layer, tp.prune_conv_out_channels, list(range(layer.out_channels))))
        np.testing.assert_allclose(mine[group.units], theirs.numpy(), rtol=1e-4)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(self.one(x).relu(), self.other.weight, self.other.bias)


def test_activations_are_seen_where_a_function_reads_them() -> None:
    net, x = Functional(), torch.randn(5, 3, 4)
    units = found(net, x)
    nonzero = scores(net, units, "apoz", data=[x], inputs=x)
    np.testing.assert_allclose(nonzero, (net.one(x) > 0).float().mean((0, 1)).numpy(), rtol=1e-5)
    attention = nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 2)).eval()
    x = torch.randn(2, 5, 8)
    units = found(attention, x)
    assert units.count and np.isfinite(scores(attention, units, "activation", data=[x], inputs=x)).all()


def test_random_has_a_seed_and_draws_nothing_of_the_users() -> None:
    net = Plain()
    units = found(net)
    state = torch.get_rng_state()
    assert (scores(net, units, "random") == scores(net, units, "random:0")).all()
    assert (scores(net, units, "random:7") != scores(net, units, "random")).any()
    scores(net, units, tp.importance.RandomImportance())
    assert torch.equal(state, torch.get_rng_state())


class Concatenated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 6, 1, bias=False)
        self.spatial = nn.Conv2d(10, 10, 3, padding=1, groups=10, bias=False)
        self.last = nn.Conv2d(10, 2, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.spatial(torch.cat([self.one(x), self.other(x)], 1)))


def test_behind_a_concatenation_each_group_counts_its_own_columns() -> None:
    net = Concatenated()
    units = found(net)
    result = scores(net, units, "l1")
    depthwise, read = net.spatial.weight.detach().abs().sum((1, 2, 3)), net.last.weight.detach().abs().sum((0, 2, 3))
    for group, columns in zip(units.groups, (slice(0, 4), slice(4, 10)), strict=True):
        written = net.get_submodule(group.name).weight.detach().abs().sum((1, 2, 3))
        total = written + depthwise[columns] + read[columns]
        np.testing.assert_allclose(result[group.units], (total / total.mean()).numpy(), rtol=1e-5)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(8, 48, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, tokens, _ = x.shape
        q, k, v = self.qkv(x).reshape(rows, tokens, 3, 4, 4).permute(2, 0, 3, 1, 4)
        x = functional.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).reshape(rows, tokens, 16))


def test_a_whole_head_is_one_unit() -> None:
    net = Heads()
    units = found(net, torch.randn(2, 5, 8))
    (group,) = [each for each in units.groups if each.name == "qkv"]
    assert len(group.units) == 4
    written = net.qkv.weight.detach().abs().reshape(3, 4, -1).sum((0, 2))
    total = written + net.proj.weight.detach().abs().reshape(8, 4, 4).sum((0, 2))
    result = scores(net, units, "l1")[group.units]
    ratio = (total / total.mean()).numpy()
    np.testing.assert_allclose(np.argsort(result), np.argsort(ratio))
    looked_at = scores(net, units, "activation", data=[torch.randn(2, 5, 8)], inputs=torch.randn(2, 5, 8))
    assert np.isfinite(looked_at[group.units]).all()


def test_a_function_is_given_matrices() -> None:
    net = Plain()
    groups: list[ChannelGroup] = []

    def largest(group: ChannelGroup) -> list[float]:
        groups.append(group)
        first = group.tensors[0]
        return first.values.abs().amax(1).tolist()

    result = by_group(net, largest)
    np.testing.assert_allclose(result["conv2"], net.conv2.weight.detach().abs().amax((1, 2, 3)).numpy(), rtol=1e-6)
    first = groups[0]
    assert (first.name, first.units, first.tensors[0].path, first.tensors[0].role) == (
        "conv1",
        8,
        "conv1.weight",
        "writes",
    )
    read = next(each for each in first.tensors if each.path == "fc1.weight")
    assert read.role == "reads" and read.values.shape == (8, 4 * 16) and read.owner is net.fc1
    assert {each.role for each in first.tensors if each.path.startswith("bn1.")} == {"holds"}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("importance", ["taylor", "hessian", "apoz", "activation", "magnitude"])
def test_the_model_is_left_as_it_was(importance: str, training: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Conv2d(6, 4, 3), nn.Flatten())
    net.append(nn.LazyLinear(5)).train(training)
    net(X)
    net[0].weight.requires_grad_(False)
    net[3].weight.grad = torch.ones_like(net[3].weight)
    net[1].eval()
    calls: list[int] = []
    net[3].register_forward_hook(lambda *_: calls.append(1))
    state = {name: held.clone() for name, held in net.state_dict().items()}
    units, random = found(net), torch.get_rng_state()
    values = scores(net, units, importance, data=[(X, Y)], inputs=X)
    assert np.isfinite(values).all() and values.any()
    assert torch.equal(random, torch.get_rng_state()) and not calls
    assert all(torch.equal(held, state[name]) for name, held in net.state_dict().items())
    assert net[3].weight.grad.eq(1).all() and net[0].weight.grad is None
    assert not net[0].weight.requires_grad and net[3].weight.requires_grad
    assert [each.training for each in net] == [training, False, *[training] * 4]


def test_a_group_of_zeros_has_scores_of_zero() -> None:
    net = Plain()
    for layer in (net.conv2, net.bn2, net.conv3):
        layer.weight.data.zero_()
    for name in ("magnitude", "lamp", "fpgm"):
        assert (by_group(net, name)["conv2"] == 0).all()


class Auxiliary(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.aux = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))

    def forward(self, x: torch.Tensor) -> Any:
        x = functional.relu(self.stem(x))
        return (self.head(x), self.aux(x)) if self.training else self.head(x)


@pytest.mark.parametrize("importance", ["taylor", "hessian", "apoz", "activation"])
def test_what_the_data_does_not_reach_has_no_score(importance: str) -> None:
    net, x = Auxiliary().eval(), torch.randn(6, 4)
    units = found(net, x)
    result = scores(net, units, importance, data=[(x, torch.tensor([0, 1] * 3))], inputs=x)
    reached = {group.name: np.isfinite(result[group.units]).all() for group in units.groups}
    assert reached == {"stem": True, "aux.0": False}
    assert silent(importance)


def test_types_of_half_precision_are_ranked_too() -> None:
    net = Plain().eval()
    units = found(net)
    wide = scores(net, units, "magnitude")
    np.testing.assert_allclose(scores(net.bfloat16(), units, "magnitude"), wide, rtol=0.02)


@pytest.mark.parametrize(
    ("importance", "given", "error", "match"),
    [
        ("magnitud", {}, EditError, "magnitude"),
        ("random:x", {}, EditError, "no such importance"),
        (3, {}, EditError, "no such importance"),
        ("taylor", {}, InputError, "needs data"),
        (tp.importance.GroupHessianImportance(), {}, InputError, "needs data"),
        ("taylor", {"data": []}, InputError, "no batches"),
        (tp.importance.OBDCImportance(), {}, EditError, "OBDCImportance.*asks for more"),
        (tp.importance.GroupMagnitudeImportance(group_reduction=None), {}, EditError, "as many scores"),
        ("apoz", {"data": iter(())}, InputError, "no batches"),
        ("apoz", {"data": [torch.zeros(2, 7, 8, 8)]}, InputError, r"data\[0\]"),
        ("taylor", {"data": [X]}, InputError, "no labels"),
        ("taylor", {"data": [(X, Y.float())]}, InputError, "targets do not fit"),
        ("taylor", {"data": [(X, Y)], "loss": lambda output, target: output}, InputError, "one number"),
        ("taylor", {"data": [(X, Y)], "loss": lambda output, target: torch.ones(())}, InputError, "does not depend"),
        ("taylor", {"data": [(X, Y + 10)]}, InputError, r"data\[0\]"),
        ("taylor", {"data": [(X * float("nan"), Y)]}, ModelError, "not finite"),
        (lambda group: [1.0], {}, EditError, "as many scores as units"),
        (lambda group: "high", {}, EditError, "no scores"),
        (lambda group: [float("nan")] * group.units, {}, EditError, "finite"),
    ],
)
def test_what_does_not_fit_is_refused(importance: Any, given: Any, error: Any, match: str) -> None:
    with pytest.raises(error, match=match):
        by_group(Plain().eval(), importance, **given)


def test_weights_that_are_no_numbers_are_refused() -> None:
    net = Plain()
    net.conv2.weight.data[3, 0, 0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"conv2\.weight"):
        by_group(net, "magnitude")
    with torch.device("meta"):
        away = Plain()
    with pytest.raises(ModelError):
        by_group(away, "magnitude")


def test_a_depthwise_convolution_makes_no_channels() -> None:
    units = found(Concatenated())
    assert [makers(units, group) for group in units.groups] == [["one"], ["other"]]


def test_thresholds_go_by_name() -> None:
    net = Plain()
    units = found(net)
    values = np.arange(units.count, dtype=float)
    for group in units.groups:
        values[group.units] = np.linspace(0, 1, len(group.units), endpoint=False)
    assert makers(units, units.groups[0]) == ["conv1", "conv3"]
    assert [group.name for group in units.groups] == ["conv1", "conv2", "fc1"]
    assert ratios_below(net, units, values, {"conv2": 0.5, "*": 0.25}).tolist() == [0.25, 0.5, 0.25]
    assert ratios_below(net, units, values, {"conv3": 0.5}).tolist() == [0.5, 0.0, 0.0]  # it is added to conv1
    assert ratios_below(net, units, values, {nn.Linear: 0.25, "**": 0.5}).tolist() == [0.5, 0.5, 0.25]
    values[:] = np.nan
    assert ratios_below(net, units, values, {"*": 0.5}).tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(PathError, match="conv9"):
        ratios_below(net, units, values, {"conv9": 0.5})
