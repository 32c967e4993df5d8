"""Models by name: `timm:NAME`, `torchvision:NAME` or `package.module:function`.

What the command line knows of a model zoo (how to build a model, which input it takes) is in this file; nothing below
asks where a model came from.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.errors import MissingDependency, ModelError, nearest
from torchtrim.graph.copying import kept_random_state


@dataclass(frozen=True)
class NamedModel:
    """A model, and what its name says of it.

    Attributes:
        name: The name it was asked for by.
        model: The model, in eval mode.
        input_shape: The shape of one input without the batch, where it is known: `(3, 224, 224)`.
    """

    name: str
    model: nn.Module
    input_shape: tuple[int, ...] | None


def load_model(name: str, *, pretrained: bool = False, weights: str | Path | None = None, seed: int = 0) -> NamedModel:
    """Build the model of that name, in eval mode.

    Args:
        name: `timm:NAME`, `torchvision:NAME`, or `package.module:function`, where the function is called without
            arguments (or with `pretrained=True`) and may be found in the current directory; it may also be a class, or
            a model.
        pretrained: Load the weights its authors trained. They are downloaded when they are not in the cache.
        weights: A file with a `state_dict` to load into it, read without pickle.
        seed: The seed of the initial weights, so that the same name gives the same model again.

    Raises:
        ModelError: No model has that name, it cannot be built, or the weights do not fit.
        MissingDependency: The name is timm's or torchvision's, and that is not installed.

    Example:
        >>> named = load_model("timm:test_resnet")
        >>> named.input_shape
        (3, 160, 160)
    """
    source, colon, rest = name.partition(":")
    if name.endswith(".trim"):
        raise ModelError("reading .trim files is not in this version", path=name, hint="timm:NAME, torchvision:NAME")
    if not colon or not source or not rest:
        raise ModelError(
            "not the name of a model",
            path=name,
            expected="timm:NAME, torchvision:NAME or package.module:function",
            hint=f"timm:{name}" if name.isidentifier() else None,
        )
    build = {"timm": _from_timm, "torchvision": _from_torchvision}.get(source, _from_module)
    with kept_random_state():
        torch.manual_seed(seed)
        model, shape = build(source, rest, pretrained)
    if not isinstance(model, nn.Module):
        raise ModelError("did not give a PyTorch model", path=name, found=type(model).__name__, expected="nn.Module")
    if weights is not None:
        _load_weights(model, Path(weights))
    return NamedModel(name, model.eval(), shape)


_Built = tuple[object, "tuple[int, ...] | None"]


def _from_timm(source: str, name: str, pretrained: bool) -> _Built:
    timm = _zoo("timm")
    if not name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) and not timm.is_model(name):
        raise ModelError("timm has no such model", path=f"timm:{name}", hint=nearest(name, timm.list_models()))
    model = _call("could not be built", f"timm:{name}", timm.create_model, name, pretrained=pretrained)
    return model, _configured_shape(model)


def _from_torchvision(source: str, name: str, pretrained: bool) -> _Built:
    zoo = _zoo("torchvision.models")
    if name not in zoo.list_models():
        raise ModelError(
            "torchvision has no such model", path=f"torchvision:{name}", hint=nearest(name, zoo.list_models())
        )
    weights = zoo.get_model_weights(name).DEFAULT
    # googlenet and inception_v3 warn unless told whether to spend seconds on initial weights.
    options: dict[str, Any] = {"init_weights": False} if name in {"googlenet", "inception_v3"} else {}
    if pretrained:
        options = {"weights": weights}
    elif "weights_backbone" in inspect.signature(zoo.get_model_builder(name)).parameters:
        options = {"weights_backbone": None}  # else the backbone's weights are downloaded
    model = _call("could not be built", f"torchvision:{name}", zoo.get_model, name, **options)
    return model, _torchvision_shape(weights)


def _torchvision_shape(weights: Any) -> tuple[int, ...] | None:
    """The shape its weights were trained for: an image, or a clip of `min_temporal_size` (or 16) frames."""
    transforms = weights.transforms()
    size = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    if size is None:
        return None  # detection and optical flow: lists of images, and pairs
    height, width = (int(size[0]), int(size[-1])) if isinstance(size, (list, tuple)) else (int(size), int(size))
    if "Video" in type(transforms).__name__:
        return (3, max(16, int(weights.meta.get("min_temporal_size", 16))), height, width)
    return (3, height, width)


def _from_module(source: str, attribute: str, pretrained: bool) -> _Built:
    name = f"{source}:{attribute}"
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        module = _call("could not be imported", source, importlib.import_module, source)
    finally:
        sys.path.remove(here)
    target = getattr(module, attribute, None)
    if target is None:
        public = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ModelError(f"{source} has no {attribute!r}", path=name, hint=nearest(attribute, public))
    if isinstance(target, nn.Module):
        return target, _configured_shape(target)
    if not callable(target):
        raise ModelError("is not a function, a class or a model", path=name, found=type(target).__name__)
    if pretrained and "pretrained" not in inspect.signature(target).parameters:
        raise ModelError("takes no pretrained argument", path=name, hint="--weights FILE, or leave --pretrained out")
    model = _call("could not be built", name, target, **({"pretrained": True} if pretrained else {}))
    return model, _configured_shape(model)


def _call(what: str, path: str, function: Callable[..., object], *args: object, **options: object) -> Any:
    """Call foreign code; whatever it raises (a refused download, a bad argument) is told as ours."""
    try:
        return function(*args, **options)
    except Exception as error:
        hint = "leave --pretrained out, or give --weights FILE" if options.get("pretrained") else None
        raise ModelError(f"{what}: {type(error).__name__}: {error}", path=path, hint=hint) from error


def _configured_shape(model: object) -> tuple[int, ...] | None:
    """The input size in the model's own configuration, by timm's convention, which other packages follow."""
    config: Any = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else getattr(config, "input_size", None)
    return tuple(int(length) for length in size) if size else None


def _zoo(module: str) -> Any:
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(f"{package} is not installed", hint='pip install "torchtrim[zoo]"')
    return importlib.import_module(module)


def _load_weights(model: nn.Module, path: Path) -> None:
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except OSError as error:
        raise ModelError(f"cannot be read: {error.strerror}", path=path) from error
    except Exception as error:
        raise ModelError(
            f"does not hold weights of this model: {error}", path=path, expected="a state_dict saved with torch.save"
        ) from error
