"""What a file without a factory says of a model's code: enough to notice that `load` was given another model."""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from torchtrim.errors import CheckpointMismatch, TorchTrimWarning
from torchtrim.graph.structure import map_leaves

_FORWARD = "forward "


def kinds_of(net: nn.Module) -> dict[str, str]:
    """The classes of `torch.nn` by path, those of modules without children, and a digest of each opened forward.

    A class of the user's own may have been renamed since, and has no entry.

    Example:
        >>> kinds_of(nn.Sequential(nn.Linear(1, 1), nn.ReLU()))
        {'0': 'Linear', '1': 'ReLU'}
    """
    found: dict[str, str] = {}
    for name, module in net.named_modules():
        if isinstance(module, fx.GraphModule):
            found[name] = _FORWARD + _digest(module)
        elif type(module).__module__.startswith("torch.nn.") and not module._modules:
            found[name] = type(module).__qualname__
    return found


def compare_kinds(net: nn.Module, saved: Mapping[str, str]) -> None:
    """Refuse a model that has another class of `torch.nn` somewhere than the one that was saved.

    An opened forward that is another is warned of: where the edits were made with inputs of several shapes, or with
    another version of torch, it may compute the same.

    Raises:
        CheckpointMismatch: Names the first such module.
    """
    found = kinds_of(net)
    paths = {name for name, _ in net.named_modules(remove_duplicate=False)}
    for name, kind in saved.items():
        if name not in paths:
            raise CheckpointMismatch("is not in the model that was given", path=name, expected=kind)
        if name in found and found[name] != kind and not (kind + found[name]).count(_FORWARD):
            raise CheckpointMismatch(
                "has another class than in the model that was saved", path=name, found=found[name], expected=kind
            )
    forwards = [name for name in saved if name in found and found[name] != saved[name]]
    if forwards:
        places = ", ".join(name or "the model itself" for name in forwards[:5])
        warnings.warn(
            TorchTrimWarning(
                f"the given model makes other calls, or with other numbers, than the one that was saved: in {places}"
            ),
            stacklevel=4,
        )


def _digest(module: fx.GraphModule) -> str:
    graphs = (module.graph, getattr(module, "train_graph", None))
    text = "\n\n".join(_text(graph) for graph in graphs if graph is not None)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _text(graph: fx.Graph) -> str:
    """The calls of a graph, without the names that fx gave them."""
    number = {node: position for position, node in enumerate(graph.nodes)}
    lines = []
    for node in graph.nodes:
        arguments: Any = map_leaves((node.args, node.kwargs), fx.Node, lambda other: f"%{number[other]}")
        lines.append(f"{node.op} {_target(node.target)} {re.sub(r' at 0x[0-9a-f]+', '', repr(arguments))}")
    return "\n".join(lines)


def _target(target: Any) -> str:
    if isinstance(target, str):
        return target
    return f"{getattr(target, '__module__', '')}:{getattr(target, '__qualname__', type(target).__qualname__)}"
