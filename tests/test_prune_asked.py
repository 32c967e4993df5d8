"""`tt.prune_channels` as people call it: in their loops, with what is wrong and what is nearly right."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from torch import nn
from torch.nn.utils import prune as torch_prune

import torchtrim as tt
from torchtrim.errors import EditError, InputError, PathError, SelectionError, TorchTrimError, TorchTrimWarning

X = torch.zeros(2, 3, 8, 8)


def net_of(width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
        *(nn.Conv2d(width, 2 * width, 3, padding=1), nn.BatchNorm2d(2 * width), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    ).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loop_that_still_holds_the_last_loss(dtype: torch.dtype) -> None:
    net = net_of(32).train().to(dtype)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    parameters = [id(held) for held in net.parameters()]
    for _ in range(3):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 8, 8, dtype=dtype)), torch.randint(0, 10, (4,)))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        tt.prune_channels(net, X.to(dtype), 0.25, copy=False)
        tt.sync_optimizer(optimizer, net)
    assert net[0].out_channels == 16 and [id(held) for held in net.parameters()] == parameters
    assert all(held.dtype == dtype for held in net.parameters())


def test_inputs_of_another_type_than_the_model() -> None:
    with pytest.raises(EditError, match="cannot be followed in eval mode"):
        tt.prune_channels(net_of().double(), X, 0.5)


def test_an_error_of_following_can_be_copied() -> None:
    with pytest.raises(EditError) as caught:
        tt.prune_channels(net_of(), torch.zeros(2, 5, 8, 8), 0.5)
    for error in (copy.copy(caught.value), pickle.loads(pickle.dumps(caught.value))):
        assert type(error) is type(caught.value) and str(error) == str(caught.value)


class Stages(nn.Module):
    """Two stages and a head whose weight is used without a call of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Linear(3, 32), nn.ReLU(), nn.Linear(32, 32))
        self.two = nn.ModuleList([nn.Linear(32, 32), nn.Linear(32, 32)])
        self.last = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.one(x.mean((2, 3))))
        for layer in self.two:
            x = torch.relu(nn.functional.linear(x, layer.weight, layer.bias))
        found: torch.Tensor = self.last(x)
        return found


def widths(net: nn.Module) -> list[int]:
    return [len(held) for name, held in net.named_parameters() if name.endswith("weight") and held.dim() > 1][:-1]


@pytest.mark.parametrize(
    ("what", "found"),
    [
        ("one", [16, 16, 32, 32]),
        ("one.*", [16, 16, 32, 32]),
        ("**", [16, 16, 16, 16]),
        (nn.ModuleList, [32, 32, 16, 16]),
        ((nn.ModuleList, "one.0"), [16, 32, 16, 16]),
        (lambda path, module: path.endswith(".0"), [16, 32, 16, 32]),
    ],
)
def test_layers_are_selected_as_everywhere(what: Any, found: list[int]) -> None:
    by_ratio = tt.prune_channels(Stages(), X, {what: 0.5})
    assert widths(by_ratio) == found
    assert widths(tt.prune_channels(Stages(), X, thresholds={what: 1e9}, max_ratio=0.5)) == found
    rest = tt.prune_channels(Stages(), X, 0.5, protect=what)
    assert widths(rest) == [48 - width for width in found]
    again = tt.Edit.from_dict(tt.history(by_ratio).edits[0].to_dict())
    assert widths(tt.apply(Stages(), X, again)) == found
    assert widths(tt.apply(Stages(), X, replace(again, pruned=None))) == found  # it says what was asked, too


def test_the_first_that_fits_counts() -> None:
    assert widths(tt.prune_channels(Stages(), X, {"one.0": 0.25, "one": 0.5, nn.Linear: 0.75})) == [24, 16, 8, 8]


@pytest.mark.parametrize(
    ("settings", "error", "told"),
    [
        ({"ratio": 0.5, "protect": "one.4"}, PathError, "one.0"),
        ({"ratio": 0.5, "protect": ["one", "z*"]}, SelectionError, r"'z\*'"),
        ({"ratio": 0.5, "protect": nn.Conv1d}, SelectionError, "type Conv1d"),
        ({"ratio": 0.5, "protect": None}, SelectionError, "this selects nothing"),
        ({"ratio": 0.5, "protect": [3]}, SelectionError, "this selects nothing"),
        ({"ratio": 0.5, "protect": lambda module: True}, SelectionError, "a path and a module"),
        ({"ratio": {"ones": 0.5}}, PathError, "'one'"),
        ({"ratio": {"o?s*": 0.5}}, SelectionError, "fits 'o"),
        ({"ratio": {nn.ReLU: 0.5}}, SelectionError, "type ReLU: no layer whose channels can go"),
        ({"ratio": {"last": 0.5}}, EditError, "output has its width"),
        ({"ratio": {0: 0.5}}, SelectionError, "this selects nothing"),
        ({"ratio": {"one": None}}, EditError, "fraction"),
        ({"ratio": {"one": "a"}}, EditError, "fraction"),
        ({"ratio": "0.5"}, EditError, "fraction"),
        ({"ratio": [0.5]}, EditError, "fraction"),
        ({"ratio": float("nan")}, EditError, "fraction"),
        ({"ratio": 0.5, "max_ratio": "a"}, EditError, "max_ratio"),
        ({"ratio": 0.5, "max_ratio": None}, EditError, "max_ratio"),
        ({"ratio": 0.5, "round_to": None}, EditError, "round_to: .*whole number"),
        ({"ratio": 0.5, "round_to": 2.5}, EditError, "round_to: .*whole number"),
        ({"ratio": 0.5, "round_to": True}, EditError, "round_to: .*whole number"),
        ({"ratio": 0.5, "min_channels": {"one": 4}}, EditError, "min_channels: .*whole number"),
        ({"ratio": 0.5, "reconstruct": "foo", "data": [X]}, EditError, "reconstruct: yes or no"),
        ({"ratio": 0.5, "reconstruct": 5, "data": [X]}, EditError, "reconstruct: yes or no"),
        ({"thresholds": 0.5}, EditError, "scores by layer"),
        ({"thresholds": {0: 0.5}}, SelectionError, "this selects nothing"),
        ({"thresholds": {"one": float("inf")}}, EditError, "a threshold is a number"),
        ({"thresholds": {"one": "a"}}, EditError, "a threshold is a number"),
        ({"budget": 0.5}, EditError, "tt.Budget"),
        ({"budget": {"mac": 0.5}}, EditError, "'macs'"),
        ({"budget": {"macs": "0.5"}}, EditError, "a limit is a number"),
    ],
)
def test_what_is_refused_in_words(settings: dict[str, Any], error: type[Exception], told: str) -> None:
    net = Stages()
    with pytest.raises(error, match=told):
        tt.prune_channels(net, X, **settings)
    assert widths(net) == [32] * 4


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5)])
def test_numbers_of_numpy_and_torch(number: Any, tmp_path: Path) -> None:
    settings: list[dict[str, Any]] = [{"ratio": number}, {"ratio": {"0": number}}, {"thresholds": {"0": number}}]
    for each in settings:
        net = tt.prune_channels(net_of(), X, check=False, **each)
        tt.save(net, tmp_path / "net.trim", overwrite=True)
        assert tt.history(tt.load(tmp_path / "net.trim", model=net_of())).edits == tt.history(net).edits
    assert tt.Budget(macs=number) == tt.Budget(macs=0.5) and type(tt.Budget(macs=number).macs) is float
    assert tt.Budget(params=np.int64(1000)).params == 1000


def test_a_budget_by_the_names_of_its_limits() -> None:
    net = tt.prune_channels(net_of(32), X, budget={"macs": 0.5})
    assert tt.history(net).edits[0].budget == tt.Budget(macs=0.5)


LABELS = torch.zeros(4, dtype=torch.long)
IMAGES = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("importance", ["taylor", "hessian", "apoz", "activation", "reconstruction"])
@pytest.mark.parametrize(
    ("data", "told"),
    [
        ([(IMAGES * torch.nan, LABELS)], "not finite"),
        ([(IMAGES, LABELS), (IMAGES / 0, LABELS)], "not finite"),
        ([(IMAGES, LABELS), (IMAGES[:0], LABELS[:0])], r"data\[1\]: a batch without samples"),
        ([], "no batches"),
        ((IMAGES, LABELS), r"data=\[\(inputs, targets\)\]"),
        ([(IMAGES.numpy(), LABELS.numpy())], r"data\[0\]: a batch holds nothing"),
        ([None], r"data\[0\]: a batch holds nothing"),
        ("abc", r"data\[0\]: a batch holds nothing"),
        (3, "iterable of batches"),
    ],
)
def test_data_that_ranks_nothing_is_refused(importance: str, data: Any, told: str) -> None:
    with pytest.raises(TorchTrimError, match=told):
        tt.prune_channels(net_of(), X, 0.5, importance=importance, data=data, check=False)


def test_three_items_of_a_batch() -> None:
    batch = (IMAGES, LABELS, LABELS)
    with pytest.raises(InputError, match="which of these are the labels"):
        tt.prune_channels(net_of(), X, 0.5, importance="taylor", data=[batch])
    net = tt.prune_channels(
        *(net_of(), X, 0.5),
        importance="taylor",
        data=[batch],
        loss=lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[2]),
    )
    assert net[0].out_channels == 8


@pytest.mark.parametrize(
    ("importance", "told"),
    [
        (lambda group: 1 / 0, "^0: the criterion '<lambda>' raised ZeroDivisionError"),
        (lambda group, other: 0, "^0: the criterion '<lambda>' raised TypeError"),
        (lambda group: None, "returned None"),
        (lambda group: torch.zeros(group.units, dtype=torch.complex64), "complex"),
        (lambda group: torch.full((group.units,), torch.nan), "finite number"),
        (tp.importance.MagnitudeImportance, r"a class .*MagnitudeImportance\(\)"),
        (None, "no such importance"),
    ],
)
def test_a_criterion_that_is_none(importance: Any, told: str) -> None:
    with pytest.raises(EditError, match=told):
        tt.prune_channels(net_of(), X, 0.5, importance=importance)


def test_a_function_may_have_nothing_to_say_of_some() -> None:
    net = tt.prune_channels(net_of(), X, 0.5, importance=lambda group: range(16) if group.name == "0" else None)
    assert (net[0].out_channels, net[3].out_channels) == (8, 32)


def test_example_inputs_without_a_sample() -> None:
    with pytest.raises(InputError, match="no sample"):
        tt.prune_channels(net_of(), X[:0], 0.5)


def test_why_a_budget_is_missed() -> None:
    def told(**settings: Any) -> str:
        with pytest.warns(TorchTrimWarning, match="macs missed") as caught:
            net = tt.prune_channels(net_of(), X, budget=tt.Budget(macs=1e-6), **settings)
        message = str(caught[0].message)
        assert message in tt.history(net).entries[0].notes
        return message

    assert "round_to=8 (without it macs " in told() and "max_ratio" not in told()
    assert "max_ratio=0.5 (without it macs " in told(round_to=1, max_ratio=0.5)
    assert "min_channels=12 (without it macs " in told(round_to=1, min_channels=12)
    assert "what is left alone (layers: 2)" in told(protect="0")


def twice(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    loss = nn.functional.cross_entropy(output, target)
    loss.backward()  # type: ignore[no-untyped-call]
    return loss


@pytest.mark.parametrize("loss", [lambda output, target: 1 / 0, twice])
def test_a_loss_that_fails_is_told_of_with_the_batch(loss: Any) -> None:
    with pytest.raises(InputError, match=r"data\[0\]: the model or the loss does not take the data"):
        tt.prune_channels(net_of(), X, 0.5, importance="taylor", data=[(IMAGES, LABELS)], loss=loss)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("row", [0, 4])
def test_reconstruction_refuses_data_that_is_not_finite(value: float, row: int) -> None:
    images = torch.randn(16, 3, 8, 8)
    images[row] = value
    with pytest.raises(InputError, match="not finite"):
        tt.prune_channels(net_of(), X, 0.5, reconstruct=True, data=[images])


def test_a_record_names_its_criterion() -> None:
    with pytest.raises(EditError, match="importance: a record holds the name"):
        tt.PruneChannels(ratio=0.5, importance=lambda group: group.units)  # type: ignore[arg-type]
    assert tt.PruneChannels(budget={"macs": 0.5}) == tt.PruneChannels(budget=tt.Budget(macs=0.5))  # type: ignore[arg-type]


def test_masks_of_torch_go_with_their_weight() -> None:
    net = net_of()
    torch_prune.l1_unstructured(net[3], "weight", 0.5)
    narrow = tt.prune_channels(net, X, 0.5)
    assert narrow[3].weight_orig.shape == narrow[3].weight_mask.shape == (16, 8, 3, 3)
    narrow(IMAGES).sum().backward()
    assert (narrow[3].weight == 0).sum() >= (narrow[3].weight_mask == 0).sum() > 0
