"""Models by name: `timm:NAME`, `torchvision:NAME`, `package.module:function`, or a `.trim` file.

What the command line knows of a model zoo besides how to make its models (which input they take) is in this file.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.checkpoint.load import load
from torchtrim.checkpoint.origin import Factory, remember
from torchtrim.checkpoint.plain import is_plain
from torchtrim.checkpoint.zoo import ZOOS, check_name, from_zoo, pretrained_arguments, zoo
from torchtrim.edits.history import recorded_inputs
from torchtrim.edits.module_spec import Trusted
from torchtrim.errors import ModelError, nearest
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


def load_model(
    name: str,
    *,
    pretrained: bool = False,
    weights: str | Path | None = None,
    seed: int = 0,
    arguments: Mapping[str, Any] | None = None,
    trusted: Trusted = (),
) -> NamedModel:
    """Build, or load, the model of that name, in eval mode.

    What made it is written on the model, so that `torchtrim.save` knows it.

    Args:
        name: `timm:NAME`, `torchvision:NAME`, or `package.module:function`, where the function is called without
            arguments (or with `pretrained=True`) and may be found in the current directory; it may also be a class, or
            a model. Or a file that `torchtrim.save` wrote, by its name ending in `.trim`.
        pretrained: Load the weights its authors trained. They are downloaded when they are not in the cache.
        weights: A file with a `state_dict` to load into it, read without pickle.
        seed: The seed of the initial weights, so that the same name gives the same model again.
        arguments: Keyword arguments for what makes it: `{"num_classes": 10}`.
        trusted: Functions and classes that a `.trim` file may call, as for `torchtrim.load`.

    Raises:
        ModelError: No model has that name, it cannot be built, or the weights do not fit.
        CheckpointError: A `.trim` file cannot be loaded; see `torchtrim.load`.
        MissingDependency: The name is timm's or torchvision's, and that is not installed.

    Example:
        >>> named = load_model("timm:test_resnet")
        >>> named.input_shape
        (3, 160, 160)
    """
    source, colon, rest = name.partition(":")
    with kept_random_state():
        torch.manual_seed(seed)
        if name.endswith(".trim"):
            if pretrained or arguments:
                raise ModelError(
                    "a file holds its own weights, and knows how its model is made",
                    path=name,
                    found="pretrained" if pretrained else sorted(arguments or {}),
                )
            model, shape = _from_file(name, trusted)
        elif not colon or not source or not rest:
            raise ModelError(
                "not the name of a model",
                path=name,
                expected="timm:NAME, torchvision:NAME, package.module:function or a .trim file",
                hint=f"timm:{name}" if name.isidentifier() else None,
            )
        else:
            build = _from_zoo if source in ZOOS else _from_module
            model, shape = build(name, pretrained, dict(arguments or {}))
    if weights is not None:
        _load_weights(model, Path(weights))
    return NamedModel(name, model.eval(), shape)


_Built = tuple[nn.Module, "tuple[int, ...] | None"]


def _from_file(name: str, trusted: Trusted) -> _Built:
    with _current_directory():
        model = load(name, trusted=trusted)
    recorded = recorded_inputs(model)
    if recorded is not None and len(recorded.tensors) == 1:
        return model, tuple(recorded.tensors[0].shape[1:])
    return model, _configured_shape(model)


def _from_zoo(name: str, pretrained: bool, arguments: dict[str, Any]) -> _Built:
    source, _, short = name.partition(":")
    if source == "timm":
        model = from_zoo(name, {"pretrained": pretrained, **arguments})
        shape = _configured_shape(model)
    else:
        check_name(name)
        weights = zoo("torchvision.models").get_model_weights(short).DEFAULT
        model = from_zoo(name, {**({"weights": weights} if pretrained else {}), **arguments})
        shape = _torchvision_shape(weights)
    if is_plain(arguments) and ":" not in short:
        remember(model, Factory.of((name, {**(pretrained_arguments(name) if pretrained else {}), **arguments})))
    return model, shape


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


def _from_module(name: str, pretrained: bool, arguments: dict[str, Any]) -> _Built:
    source, _, attribute = name.partition(":")
    with _current_directory():
        module = _call("could not be imported", source, importlib.import_module, source)
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
    options = {**({"pretrained": True} if pretrained else {}), **arguments}
    model = _call("could not be built", name, target, **options)
    if not isinstance(model, nn.Module):
        raise ModelError("did not give a PyTorch model", path=name, found=type(model).__name__, expected="nn.Module")
    if is_plain(arguments):
        remember(model, Factory.of((name, arguments)))
    return model, _configured_shape(model)


@contextmanager
def _current_directory() -> Iterator[None]:
    """With the current directory among the places that modules are imported from."""
    here = str(Path.cwd())
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


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
