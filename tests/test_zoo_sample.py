"""A sample of the zoo: every step of `benchmarks/zoo.py` on a dozen small models, each of another kind."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SAMPLE = {
    "torchvision:resnet18": "the plain residual network",
    "torchvision:mobilenet_v3_small": "squeeze and excitation",
    "torchvision:squeezenet1_1": "a convolution for a head",
    "torchvision:shufflenet_v2_x0_5": "chunk, concat and shuffled channels",
    "timm:test_efficientnet": "norm and activation in one module",
    "timm:test_vit": "tokens, attention",
    "timm:test_convnext": "layer norm on channels, a head of several modules",
    "timm:test_byobnet": "branches by configuration",
    "timm:ghostnet_050": "functional dropout in the model's own forward",
    "timm:levit_128s": "a cache in attributes, two distilled heads",
}
SLOW = ("timm:ghostnet_050", "timm:levit_128s", "torchvision:shufflenet_v2_x0_5")


@pytest.fixture(scope="module")
def steps() -> Any:
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module("zoo_steps")
    finally:
        sys.path.remove(str(BENCHMARKS))


def tried(try_all: Callable[..., None], name: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    try_all(name, found.__setitem__)
    return found


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SAMPLE]
)
def test_every_step(steps: Any, name: str) -> None:
    found = tried(steps.try_all, name)
    assert {step: reported["error"] for step, reported in found.items() if "error" in reported} == {}
    assert tuple(found) == steps.STEPS


@pytest.mark.slow
def test_a_detector_backbone_is_cut_by_path(steps: Any) -> None:
    found = tried(steps.try_all, "detection:fasterrcnn_mobilenet_v3_large_320_fpn")
    assert {step: reported["error"] for step, reported in found.items() if "error" in reported} == {}
    assert [found[step]["after"].partition(".")[0] for step in steps.PLACES] == ["body"] * 3


def test_a_wrong_cut_is_told(steps: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    work = steps._Work("timm:test_resnet")
    work.build()
    work.trace()
    cut = steps.tt.cut

    def skewed(*args: Any, **kwargs: Any) -> torch.nn.Module:
        net: torch.nn.Module = cut(*args, **kwargs)
        net.register_forward_hook(lambda _module, _args, output: output * 1.001)
        return net

    monkeypatch.setattr(steps.tt, "cut", skewed)
    with pytest.raises(steps.Wrong, match="differs"):
        work.cut("cut 1/2")
