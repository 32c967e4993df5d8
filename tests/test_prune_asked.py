"""`tt.prune_channels` as people call it: in their loops, with what is wrong and what is nearly right."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.errors import EditError

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
