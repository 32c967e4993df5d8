"""A check never writes to the user's weights, whatever the model under test does to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import torchtrim as tt


class Token(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.token = nn.Parameter(torch.linspace(-1, 1, 4).reshape(1, 1, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("edit", ["replace", "insert"])
def test_an_in_place_layer_on_a_parameter_leaves_it_alone(edit: str, frozen: bool) -> None:
    model, x = Token().eval(), torch.randn(2, 3, 4)
    model.token.requires_grad_(not frozen)
    before = model.token.detach().clone()
    layer = nn.ReLU(inplace=True)
    try:
        net = (
            tt.replace(model, x, ":expand", layer) if edit == "replace" else tt.insert(model, x, layer, after=":expand")
        )
        net(x)
    except (tt.TorchTrimError, RuntimeError):
        pass
    assert torch.equal(model.token, before)
