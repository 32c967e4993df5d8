"""A sample of the pruned zoo: every step of `benchmarks/prune_zoo.py` on small models, each of another kind."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SAMPLE = {
    "timm:test_resnet": "residual sums, squeeze and excitation",
    "timm:test_efficientnet": "norm and activation in one module, depthwise convolutions",
    "timm:test_vit": "tokens, attention heads",
    "timm:test_convnext": "layer norms, layer scale, a head of several modules",
    "timm:test_byobnet": "branches by configuration",
    "timm:test_nfnet": "standardised weights of grouped convolutions",
    "timm:test_mambaout": "gates that are split",
    "torchvision:squeezenet1_1": "a convolution for a head, concatenations",
    "torchvision:shufflenet_v2_x0_5": "halves, and shuffled channels",
}
SMALL_ENOUGH = 0.45
EXPORTED = ("timm:test_efficientnet",)  # only this: an export takes longer than all other steps together


@pytest.fixture(scope="module")
def steps() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("prune_zoo_steps")
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.mark.parametrize("name", SAMPLE)
def test_every_step(steps: Any, name: str) -> None:
    found: dict[str, Any] = {}
    threads = torch.get_num_threads()
    left_out = () if name in EXPORTED else ("onnx",)
    steps.try_all(name, found.__setitem__, "torchtrim", 0.5, 8, left_out)
    torch.set_num_threads(threads)
    assert {step: reported["error"] for step, reported in found.items() if "error" in reported} == {}
    expected = [step for step in steps.ENGINES["torchtrim"] if step not in left_out]
    assert [step for step in expected if step in found or step != "timm"] == list(found)
    assert found["macs"]["share"] <= SMALL_ENOUGH
    assert found["equal"]["verdict"] in ("equal", "equal without norms")
    if name in EXPORTED:
        assert 0 < found["onnx"]["relative"] < 1e-3


def test_the_masked_original_tells_a_wrong_network(steps: Any) -> None:
    masked = importlib.import_module("prune_zoo_masked")
    removed = {"0.weight": {"0": (1, 2)}, "0.bias": {"0": (1, 2)}, "2.weight": {"1": (1, 2)}}

    def pair() -> tuple[nn.Sequential, nn.Sequential]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.GELU(), nn.Linear(6, 3))
        net = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Linear(4, 3))
        held = {name: masked.take(value, removed.get(name, {})) for name, value in model.state_dict().items()}
        net.load_state_dict(held)
        return model, net

    x = torch.randn(2, 4)
    model, net = pair()
    assert masked.check_slices(model, net, removed) is None
    assert masked.compare(model, net, removed, x)["verdict"] == "equal"
    model, net = pair()
    with torch.no_grad():
        net[2].weight[:, [0, 1]] = net[2].weight[:, [1, 0]]  # the right channels in the wrong order
    assert "other values" in str(masked.check_slices(model, net, removed))
    assert masked.compare(model, net, removed, x)["verdict"] == "differs"


def test_a_norm_over_channels_is_taken_out_of_the_comparison(steps: Any) -> None:
    masked = importlib.import_module("prune_zoo_masked")
    removed = {
        "0.weight": {"0": (0,)},
        "0.bias": {"0": (0,)},
        "1.weight": {"0": (0,)},
        "1.bias": {"0": (0,)},
        "2.weight": {"1": (0,)},
    }
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3))
    net = nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Linear(5, 3))
    net.load_state_dict({name: masked.take(value, removed.get(name, {})) for name, value in model.state_dict().items()})
    assert masked.compare(model, net, removed, torch.randn(2, 4))["verdict"] == "equal without norms"


class Squared(nn.Module):
    """Adds the square of what its norm gives: without the norm it overflows after a dozen layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.norm(x) * self.norm(x)


def test_products_that_overflow_without_norms_are_scaled_down(steps: Any) -> None:
    masked = importlib.import_module("prune_zoo_masked")
    depth = 16
    removed = {"0.weight": {"0": (0,)}, "0.bias": {"0": (0,)}, f"{depth + 1}.weight": {"1": (0,)}}
    removed |= {f"{place}.norm.{name}": {"0": (0,)} for place in range(1, depth + 1) for name in ("weight", "bias")}

    def pair() -> tuple[nn.Sequential, nn.Sequential]:
        torch.manual_seed(0)
        model, net = (
            nn.Sequential(nn.Linear(4, width), *(Squared(width) for _ in range(depth)), nn.Linear(width, 3))
            for width in (6, 5)
        )
        held = {name: masked.take(value, removed.get(name, {})) for name, value in model.state_dict().items()}
        net.load_state_dict(held)
        return model, net

    x = 3 * torch.randn(2, 4)
    found = masked.compare(*pair(), removed, x)
    assert found["verdict"] == "equal without norms" and 0 <= found["eval without norms"] < 1e-7
    model, net = pair()
    with torch.no_grad():
        net[-1].weight[:, [0, 1]] = net[-1].weight[:, [1, 0]]
    assert masked.compare(model, net, removed, x)["verdict"] == "differs"
    model = pair()[0].double()
    with masked.NeutralNorms(), torch.no_grad():
        assert not model(x.double()).isfinite().all()  # the first scale is not enough


def test_stirred_models_hold_no_value_throughout(steps: Any) -> None:
    stir = importlib.import_module("zoo_models").stir

    def stirred() -> nn.Module:
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 4))
        nn.init.zeros_(model[2].weight)
        stir(model)
        return model

    model = stirred()
    floats = [each for each in model.state_dict().values() if each.is_floating_point()]
    assert all(float(each.std()) > 1e-3 for each in floats)
    assert float(model[1].running_var.min()) > 0
    assert torch.equal(model[2].weight, stirred()[2].weight)
