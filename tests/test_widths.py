"""What a model costs without some channels, where widths come from, and what they become."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import torchtrim as tt
from torchtrim.channels import cost
from torchtrim.channels.follow import Flow, follow
from torchtrim.channels.labels import Mask
from torchtrim.graph.inputs import Inputs


def without(net: nn.Module, x: torch.Tensor, channels: dict[str, list[int]]) -> tuple[Flow, Mask]:
    """The channels of a model, and those that go with some rows of some weights."""
    flow = follow(net, Inputs.of(x))
    wanted = np.zeros(flow.channels.count, dtype=bool)
    for path, numbers in channels.items():
        rows = flow.tensors[id(net.get_submodule(path).weight)].layers[0]
        wanted[rows.ravel()[numbers]] = True
    return flow, flow.channels.closure(wanted)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", {"layer1.0.conv1": [0, 5], "conv1": [3]}),
        ("mobilenet_v3_small", {"features.1.block.0.0": [1, 2], "features.5.block.0.0": [4]}),
        ("resnext50_32x4d", {"layer1.0.conv1": [0, 1, 2, 3]}),
    ],
)
def test_cost_is_foretold(name: str, channels: dict[str, list[int]]) -> None:
    net, x = torchvision.models.get_model(name, num_classes=5), torch.randn(1, 3, 64, 64)
    flow, gone = without(net, x, channels)
    for mask, model in ((np.zeros_like(gone), net), (gone, tt.delete_channels(net, x, channels, check=False))):
        summary = tt.summary(model, x)
        assert cost.macs(flow, mask) == summary.macs
        assert cost.params(net, flow, mask) == summary.params
        assert cost.size_mb(net, flow, mask) == pytest.approx(summary.size_mb)
        assert sum(step.macs_after(mask) for step in flow.runs[0].steps) == summary.macs * flow.runs[0].batch
