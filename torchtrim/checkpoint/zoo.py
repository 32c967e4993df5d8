"""Models of timm and torchvision by name: which names there are, and with which arguments they are made.

A file may name these two without being trusted: they are called with plain data only, and never with an argument that
would read or download weights.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Hashable, Mapping
from typing import Any

from torch import nn

from torchtrim.errors import MissingDependency, ModelError, nearest

ZOOS = ("timm", "torchvision")
# Arguments that say where initial weights come from: they change nothing in a model whose weights are in the file.
WEIGHT_ARGUMENTS = {
    "timm": {
        "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_strict", "checkpoint_path", "cache_dir",
    },
    "torchvision": {"weights", "weights_backbone", "pretrained", "pretrained_backbone", "progress"},
}  # fmt: skip


def from_zoo(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Make `timm:NAME` or `torchvision:NAME`.

    Raises:
        ModelError: There is no such model, or it cannot be made with these arguments.
        MissingDependency: The package is not installed.
    """
    source, _, short = name.partition(":")
    options = dict(arguments)
    check_name(name)
    if source == "timm":
        make = zoo("timm").create_model
    else:
        models = zoo("torchvision.models")
        make = models.get_model
        if "weights" not in options and "weights_backbone" in _parameters(models, short):
            options["weights_backbone"] = None  # else the backbone's weights are downloaded
        if short in {"googlenet", "inception_v3"}:  # they warn unless told whether to spend seconds on initial weights
            options.setdefault("init_weights", False)
    try:
        model = make(short, **options)
    except Exception as error:  # foreign code: a refused download, a wrong argument
        hint = "leave --pretrained out, or give --weights FILE" if _wants_weights(source, arguments) else None
        raise ModelError(f"could not be built: {type(error).__name__}: {error}", path=name, hint=hint) from error
    if not isinstance(model, nn.Module):
        raise ModelError("did not give a PyTorch model", path=name, found=type(model).__name__)
    return model


def check_name(name: str) -> None:
    """Raise where a zoo has no model of that name (timm's names of other places, `hf-hub:...`, are left to timm).

    Raises:
        ModelError: There is none; its hint has the nearest.
        MissingDependency: The package is not installed.
    """
    source, _, short = name.partition(":")
    package = zoo("timm" if source == "timm" else "torchvision.models")
    elsewhere = source == "timm" and short.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    known = elsewhere or (package.is_model(short) if source == "timm" else short in package.list_models())
    if not known:
        raise ModelError(f"{source} has no such model", path=name, hint=nearest(short, package.list_models()))


def settled(name: str) -> Hashable | None:
    """What besides its arguments decides on the model that a zoo makes: the function, and the zoo's own switches.

    `None` where there is no such model, or the function is not the zoo's own: users may register theirs.
    """
    source, _, short = name.partition(":")
    if source not in ZOOS or importlib.util.find_spec(source) is None:
        return None
    if source == "timm":
        package = zoo("timm")
        function = package.model_entrypoint(short.partition(".")[0]) if package.is_model(short) else None
        switches = vars(zoo("timm.layers.config"))
    else:
        models = zoo("torchvision.models")
        function = models.get_model_builder(short) if short in models.list_models() else None
        switches = {}
    if function is None or not str(function.__module__).startswith(f"{source}."):
        return None
    return function, tuple(sorted((key, value) for key, value in switches.items() if type(value) in (bool, int)))


def pretrained_arguments(name: str) -> dict[str, Any]:
    """What asking for pretrained weights changes in the model itself, as arguments that make the same without them."""
    source, _, short = name.partition(":")
    if source != "torchvision":
        return {}
    if short == "googlenet":
        return {"aux_logits": False, "transform_input": True}
    if short == "inception_v3":
        return {"transform_input": True}
    return {"aux_loss": True} if "aux_loss" in _parameters(zoo("torchvision.models"), short) else {}


def guesses(model: nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Names and arguments that may have made a model, by its own configuration; each has to be tried."""
    # What the model said of itself before its forward was opened, where it was.
    told: Mapping[str, Any] = model.__dict__.get("_torchtrim_config") or vars(model)
    config: Any = told.get("pretrained_cfg")
    name = config.get("architecture") if isinstance(config, Mapping) else getattr(config, "architecture", None)
    if not isinstance(name, str) or importlib.util.find_spec("timm") is None or not zoo("timm").is_model(name):
        return []
    counts = [told.get("num_classes"), 0]
    options: list[dict[str, Any]] = [{}, *({"num_classes": count} for count in counts if type(count) is int)]
    return [(f"timm:{name}", arguments) for arguments in options]


def zoo(module: str) -> Any:
    """A zoo's package, imported when it is needed.

    Raises:
        MissingDependency: It is not installed.
    """
    package = module.partition(".")[0]
    if importlib.util.find_spec(package) is None:
        raise MissingDependency(f"{package} is not installed", hint='pip install "torchtrim[zoo]"')
    return importlib.import_module(module)


def _parameters(models: Any, name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(models.get_model_builder(name)).parameters


def _wants_weights(source: str, arguments: Mapping[str, Any]) -> bool:
    return any(bool(arguments.get(name)) for name in WEIGHT_ARGUMENTS[source])
