"""The plain training loop: it learns, it repeats, and it leaves everything else as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from torchtrim.errors import InputError, ModelError, PathError, TorchTrimError
from torchtrim.train.freeze import freeze
from torchtrim.train.plain_loop import train_plain


def net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.1), nn.Linear(4 * 4, 3)
    )


def batches(count: int = 4, rows: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures whose class is the row that is bright."""
    found = []
    for number in range(count):
        labels = torch.randint(3, (rows,), generator=torch.Generator().manual_seed(number))
        pictures = 0.1 * torch.randn(rows, 1, 4, 4, generator=torch.Generator().manual_seed(number))
        for row, label in enumerate(labels.tolist()):
            pictures[row, :, label] += 2
        found.append((pictures, labels))
    return found


def same(one: nn.Module, other: nn.Module) -> bool:
    state = other.state_dict()
    return all(torch.equal(tensor, state[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_it_learns(optimizer: str) -> None:
    model = net()
    training = train_plain(
        model, batches(), epochs=20, lr=0.02, optimizer=optimizer, validation=batches(2), layer_decay=0.9
    )
    assert training.epochs[-1].validation_accuracy == 1.0
    assert training.epochs[-1].loss < 0.5 * training.epochs[0].loss
    assert (training.rows, training.frozen) == (32, 0)
    assert len(training.to_dict()["epochs"]) == 20
    assert "validation accuracy" in str(training)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    models = [net() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    for model, seed in zip(models, (1, 1, 2), strict=True):
        torch.randn(3)  # whatever was drawn before does not matter
        train_plain(model, batches(), epochs=2, seed=seed)
    assert same(models[0], models[1])
    assert not same(models[0], models[2])


def test_what_is_frozen_stays_and_is_free_afterwards() -> None:
    model = net().eval()
    model[5].bias.requires_grad_(False)
    before = copy.deepcopy(model)
    random = torch.get_rng_state()
    training = train_plain(model, batches(), epochs=1, freeze_upto="1", example_inputs=batches()[0][0])
    assert torch.equal(random, torch.get_rng_state())
    assert same(model[0], before[0])
    assert same(model[1], before[1])  # its statistics too
    assert torch.equal(model[5].bias, before[5].bias)
    assert not torch.equal(model[5].weight, before[5].weight)
    assert training.trained == model[5].weight.numel()
    assert not model.training
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert model.train()[1].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_was_frozen_before_stays_frozen() -> None:
    model = net()
    freeze(model, "1")
    train_plain(model, batches(1), epochs=1)
    assert not model.train()[1].training
    assert not model[1].weight.requires_grad


def test_targets_that_are_numbers_are_fitted_by_their_squares() -> None:
    model = nn.Linear(3, 2)
    x = torch.randn(16, 3)
    training = train_plain(model, [(x, x @ torch.ones(3, 2))], epochs=60, lr=0.1, weight_decay=0.0)
    assert training.epochs[-1].loss < 0.01
    assert training.epochs[-1].train_accuracy is None


def test_the_first_of_several_outputs_is_trained_and_inputs_may_be_named() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> Any:
            return {"logits": self.a(x), "other": self.b(x)}

    model = Two()
    b = model.b.weight.detach().clone()
    train_plain(model, [({"x": torch.randn(4, 3)}, torch.tensor([0, 1, 0, 1]))], epochs=2)
    assert torch.equal(model.b.weight, b)


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"epochs": 0}, InputError, "epochs"),
        ({"optimizer": "adam"}, InputError, "adamw"),
        ({"lr": -1.0}, TorchTrimError, "lr"),
        ({"freeze_upto": "9"}, PathError, "9"),
        ({"data": []}, InputError, "no batches"),
        ({"data": iter(batches(1)), "epochs": 2}, InputError, "gone through once"),
        ({"data": [torch.zeros(2, 1, 4, 4)]}, InputError, "labels"),
        ({"data": [(torch.zeros(2, 1, 4, 4), torch.tensor([0, 3]))]}, InputError, "0 to 2"),
        ({"data": [(torch.zeros(2, 1, 4, 4), torch.tensor([[0], [1]]))]}, InputError, "[2]"),
        ({"data": [(torch.zeros(2, 1, 4, 4), torch.zeros(2))]}, InputError, "[2, 3]"),
        ({"data": [*batches(1), (torch.full((2, 1, 4, 4), torch.inf), torch.tensor([0, 1]))]}, ModelError, "smaller"),
    ],
)
def test_an_error_leaves_the_weights(options: dict[str, Any], error: type[Exception], says: str) -> None:
    model = net()
    before = copy.deepcopy(model)
    data = options.pop("data", batches(1))
    with pytest.raises(error) as caught:
        train_plain(model, data, **options)
    assert says in str(caught.value)
    assert same(model, before)
    assert model.training
