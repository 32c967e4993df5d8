"""The models of the zoo: every torchvision classification, segmentation, video and detection model, and the smallest
model of each timm family, with random weights and an input as small as the model takes."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from pathlib import Path

import timm
import torch
import torchvision
from torch import nn

FAMILIES = Path(__file__).parent / "timm_families.json"
PICTURES = [(3, 128, 128), (3, 224, 224), (3, 299, 299)]
VIDEOS = [(3, 8, 112, 112), (3, 16, 112, 112), (3, 16, 224, 224)]


def names() -> list[str]:
    """All of them: `torchvision:NAME`, `detection:NAME`, `timm:NAME`."""
    models = torchvision.models
    kinds = [("torchvision", models), ("torchvision", models.segmentation), ("torchvision", models.video)]
    kinds.append(("detection", models.detection))
    found = [f"{kind}:{name}" for kind, module in kinds for name in models.list_models(module=module)]
    return found + [f"timm:{name}" for name in timm_families().values()]


def timm_families() -> dict[str, str]:
    """The smallest model of each of timm's modules, by parameters; counted once for a version of timm (minutes)."""
    if FAMILIES.is_file():
        kept = json.loads(FAMILIES.read_text("utf-8"))
        if kept["timm"] == timm.__version__:
            return dict(kept["smallest"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        smallest = {family: min(timm.list_models(module=family), key=_params) for family in timm.list_modules()}
    FAMILIES.write_text(json.dumps({"timm": timm.__version__, "smallest": smallest}, indent=1) + "\n", "utf-8")
    return smallest


def _params(name: str) -> int:
    try:
        with torch.device("meta"):
            model = timm.create_model(name)
    except (RuntimeError, NotImplementedError):  # some need real numbers to be built
        model = timm.create_model(name)
    return sum(parameter.numel() for parameter in model.parameters())


def build(name: str, *, headed: bool = False) -> tuple[nn.Module, torch.Tensor]:
    """A model in eval mode with random weights, and an input of batch 1 that it takes in both modes.

    Args:
        name: Such as `"timm:test_vit"`.
        headed: Give timm's feature extractors, which come without a classifier, one of ten classes.
    """
    torch.manual_seed(0)
    zoo, _, short = name.partition(":")
    if zoo == "timm":
        model: nn.Module = timm.create_model(short)
        if headed and getattr(model, "num_classes", None) == 0:
            model = timm.create_model(short, num_classes=10)
        sizes = list(_timm_sizes(model))
    elif zoo == "detection":
        model = torchvision.models.get_model(short, weights=None, weights_backbone=None).backbone
        sizes = PICTURES
    else:
        video = short in torchvision.models.list_models(module=torchvision.models.video)
        without = {"weights": None}
        if short in torchvision.models.list_models(module=torchvision.models.segmentation):
            without["weights_backbone"] = None
        if short in ("inception_v3", "googlenet"):
            without["init_weights"] = True
        model = torchvision.models.get_model(short, **without)
        sizes = VIDEOS if video else PICTURES
    model.eval()
    refused = []
    for size in sizes:
        try:
            _forward_in_both_modes(model, torch.randn(2, *size))
        except (RuntimeError, ValueError, AssertionError, IndexError) as error:
            refused.append(f"{size}: {error}")
        else:
            return model, torch.randn(1, *size)
    raise RuntimeError(f"{name} takes none of the sizes: {refused}")


@torch.no_grad()
def stir(model: nn.Module) -> None:
    """Put noise on what holds (nearly) one value throughout: a fresh model's outputs hardly depend on its layers else.

    Heads start at zero (hiera) or close to it, scales of residual branches at 1e-6 (convnext), batch norms at ones and
    zeros: whatever is done to such a model looks right. The noise is the same each time.
    """
    generator = torch.Generator().manual_seed(0)
    norms = [each for each in model.modules() if isinstance(each, nn.modules.batchnorm._BatchNorm)]
    for tensor in (*model.parameters(), *(buffer for norm in norms for buffer in norm.buffers())):
        if tensor.is_floating_point() and tensor.numel() > 1 and float(tensor.std()) < 1e-3:
            tensor.add_(torch.rand(tensor.shape, generator=generator), alpha=0.2)  # variances stay above zero


def _timm_sizes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """128 or half of the size it was made for (a multiple of 32), the lesser first; then that size."""
    channels, *made_for = model.pretrained_cfg["input_size"]
    if not model.pretrained_cfg.get("fixed_input_size"):
        half = [-(-length // 64) * 32 for length in made_for]
        for least in (128, 126):  # 126 is for patches of 14 pixels
            yield channels, *(min(length, least) for length in half)
        yield channels, *half
    yield channels, *made_for


def _forward_in_both_modes(model: nn.Module, x: torch.Tensor) -> None:
    tried = copy.deepcopy(model)  # a forward may leave something behind
    with torch.no_grad():
        tried(x[:1])
        tried.train()(x)
