"""The constructor's arguments of a module, worked out from what it keeps, as plain JSON data."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from torchtrim.edits.module_types import Trusted, choice_of, class_of, name_of
from torchtrim.errors import EditError

_ACTIVATIONS = (
    *("celu", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "logsigmoid", "mish"),
    *("relu", "relu6", "selu", "sigmoid", "silu", "softplus", "softsign", "tanh"),
)


class NotPlainError(Exception):
    """A value that plain data cannot hold, in words."""


def constructor_arguments(module: nn.Module) -> dict[str, Any]:
    """The arguments that should make such a module, as plain JSON data: the attributes of the constructor's names.

    Whether they do is for the caller to see.

    Raises:
        NotPlainError: One that is needed is not kept, or plain data cannot hold it.

    Example:
        >>> constructor_arguments(nn.Dropout(0.2))
        {'p': 0.2}
    """
    known = next((rule(module) for kind in type(module).__mro__ if (rule := _RULES.get(kind)) is not None), {})
    parameters = list(inspect.signature(type(module).__init__).parameters.values())[1:]
    named = [item for item in parameters if item.kind not in (item.VAR_POSITIONAL, item.VAR_KEYWORD)]
    if not named:
        return {name: encoded(value) for name, value in known.items()}
    found: dict[str, Any] = {}
    # The defaults of torch.nn stay, and an older version may not know an argument; in other packages they change.
    settled = type(module).__module__.startswith("torch.nn.")
    for item in named:
        if item.name in known:
            found[item.name] = encoded(known[item.name])
        elif item.name in module._parameters or item.name in module._buffers:
            found[item.name] = getattr(module, item.name) is not None
        elif item.name in vars(module) or isinstance(getattr(type(module), item.name, None), property):
            found[item.name] = encoded(getattr(module, item.name))
        elif item.default is item.empty:
            raise NotPlainError(f"its constructor needs {item.name!r}, which it does not keep")
        if settled and item.name in found and _is_default(found[item.name], item.default):
            del found[item.name]
    return found


def _is_default(value: Any, default: Any) -> bool:
    """Whether plain data is a default; a number stands for a tuple of it, as in `stride=1`."""
    if isinstance(value, list) and type(default) is int:
        return all(item == default for item in value)
    try:
        return bool(value == encoded(default))
    except NotPlainError:
        return False


def encoded(value: Any) -> Any:
    """A value as plain JSON data. A tuple becomes a list; what JSON has no form for, an object with one telling key.

    Raises:
        NotPlainError: It has no such form.

    Example:
        >>> encoded((1, [2.5], float("inf"), torch.float16, nn.GELU))[2:]
        [{'float': 'inf'}, {'dtype': 'float16'}, {'type': 'torch.nn.modules.activation:GELU'}]
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in (tuple, torch.Size):
        return [encoded(item) for item in value]
    if type(value) is list:
        return {"list": [encoded(item) for item in value]}
    if isinstance(value, Mapping) and type(value).__name__ in ("dict", "OrderedDict", "mappingproxy"):
        if not all(type(key) is str for key in value):
            raise NotPlainError("a dict whose keys are not strings")
        return {"dict": {key: encoded(item) for key, item in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, type) and issubclass(value, nn.Module):
        return {"type": name_of(value)}
    if isinstance(value, functools.partial) and isinstance(value.func, type) and not value.args:
        return {"type": name_of(value.func), "given": {key: encoded(item) for key, item in value.keywords.items()}}
    if isinstance(value, Enum) and type(value.value) in (str, int):
        return {"choice": name_of(type(value)), "value": value.value}
    name = getattr(value, "__name__", None)
    if name in _ACTIVATIONS and value in (getattr(functional, name, None), getattr(torch, name, None)):
        return {"function": name}
    raise NotPlainError(f"a {type(value).__name__}")


def decoded(value: Any, trusted: Trusted = ()) -> Any:
    """What `encoded` wrote. A list becomes a tuple.

    Raises:
        EditError: It is not such data, or names a class that may not be named.

    Example:
        >>> decoded([1, {"list": [2.5]}, {"float": "inf"}])
        (1, [2.5], inf)
    """
    if isinstance(value, (list, tuple)):
        return tuple(decoded(item, trusted) for item in value)
    if isinstance(value, Mapping):
        return _decoded_object(value, trusted)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise EditError("the arguments of a module are plain data", found=type(value).__name__)


def _decoded_object(value: Mapping[str, Any], trusted: Trusted) -> Any:
    keys = set(value)
    content = next(iter(value.values()), None)
    if keys == {"float"} and content in ("inf", "-inf", "nan"):
        return float(content)
    if keys == {"list"} and isinstance(content, (list, tuple)):
        return [decoded(item, trusted) for item in content]
    if keys == {"dict"} and isinstance(content, Mapping):
        return {str(key): decoded(item, trusted) for key, item in content.items()}
    if keys == {"dtype"} and isinstance(dtype := getattr(torch, str(content), None), torch.dtype):
        return dtype
    if keys == {"function"} and content in _ACTIVATIONS:
        return getattr(functional, str(content))
    if keys == {"choice", "value"} and isinstance(value["choice"], str):
        return choice_of(value["choice"], value["value"])
    if "type" in keys and keys <= {"type", "given"} and isinstance(value["type"], str):
        kind = class_of(value["type"], trusted)
        given = value.get("given", {})
        if isinstance(kind, nn.Module) or not isinstance(given, Mapping):
            raise EditError("an argument names something that is no class", path=value["type"], found=repr(given))
        return (
            functools.partial(kind, **{str(key): decoded(item, trusted) for key, item in given.items()})
            if given
            else kind
        )
    if keys & {"float", "list", "dict", "dtype", "function", "type"} and len(keys) == 1:
        raise EditError("an argument in a form that is not known", found=dict(value))
    return {str(key): decoded(item, trusted) for key, item in value.items()}


def _attention(module: Any) -> dict[str, Any]:
    return {
        "bias": module.in_proj_bias is not None,
        "add_bias_kv": module.bias_k is not None,
        "kdim": None if module.kdim == module.embed_dim else module.kdim,
        "vdim": None if module.vdim == module.embed_dim else module.vdim,
    }


def _recurrent(module: Any) -> dict[str, Any]:
    names = ["input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional"]
    extra = {"proj_size": module.proj_size} if module.mode == "LSTM" else {}
    if module.mode in ("RNN_TANH", "RNN_RELU"):
        extra = {"nonlinearity": module.mode.removeprefix("RNN_").lower()}
    return {name: getattr(module, name) for name in names} | extra


def _transformer_layer(module: Any) -> dict[str, Any]:
    return {
        "d_model": module.self_attn.embed_dim,
        "nhead": module.self_attn.num_heads,
        "dim_feedforward": module.linear1.out_features,
        "dropout": module.dropout.p,
        "layer_norm_eps": module.norm1.eps,
        "batch_first": module.self_attn.batch_first,
        "bias": module.linear1.bias is not None,
    }


_RULES: dict[type, Callable[[Any], dict[str, Any]]] = {
    nn.MultiheadAttention: _attention,
    nn.RNNBase: _recurrent,
    nn.TransformerEncoderLayer: _transformer_layer,
    nn.TransformerDecoderLayer: _transformer_layer,
}
