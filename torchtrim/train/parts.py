"""The part of a model that a selection names: modules with all below them, and parameters by themselves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from torchtrim.errors import SelectionError, nearest
from torchtrim.graph.copying import unwrap
from torchtrim.graph.paths import What, describe, find, is_glob, matches, unknown


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        paths: The modules and parameters that were named; `""` is the model itself.
        modules: Every module taken, those below a named one included, each once.
        parameters: Every parameter taken, each once.
    """

    paths: tuple[str, ...]
    modules: list[nn.Module]
    parameters: list[nn.Parameter]


def part_of(model: nn.Module, what: What) -> Part:
    """What a selection names, where parameters may be named too.

    A path is that of a module or of a parameter (`cls_token`, `head.bias`). A glob takes modules, and parameters where
    no module fits it (`**.bias`). Types and predicates take modules. A parameter that is named by itself does not
    bring the module that holds it.

    Raises:
        PathError: A path that is neither a module's nor a parameter's; the nearest of both are named.
        SelectionError: Nothing fits.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> part_of(net, ["1", "0.bias"]).paths, part_of(net, "*.weight").paths
        (('1', '0.bias'), ('0.weight', '1.weight'))
    """
    model = unwrap(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters(remove_duplicate=False))
    of_modules: list[Any] = []
    named: dict[nn.Parameter, str] = {}
    for item in what if isinstance(what, Sequence) and not isinstance(what, str) else [what]:
        if not isinstance(item, str) or item in modules:
            of_modules.append(item)
        elif item in parameters:
            named.setdefault(parameters[item], item)
        elif not is_glob(item):
            raise unknown(model, item, parameters=True)
        elif any(path and matches(path, item) for path in modules):
            of_modules.append(item)
        else:
            for name, parameter in parameters.items():
                if matches(name, item):
                    named.setdefault(parameter, name)
    paths = find(model, of_modules, expect=range(len(modules) + 1))
    if not paths and not named:
        raise SelectionError(
            f"nothing in {type(model).__name__} fits {describe(what)}",
            found="no module and no parameter",
            hint=nearest(what.replace("*", "").strip("."), filter(None, (*modules, *parameters)))
            if isinstance(what, str)
            else None,
        )
    return Part(
        (*paths, *named.values()),
        unique(module for path in paths for module in modules[path].modules()),
        unique([*(p for path in paths for p in modules[path].parameters()), *named]),
    )


def unique(items: Iterable[Any]) -> list[Any]:
    """The items in order, each object once.

    Example:
        >>> unique([1, 2, 1])
        [1, 2]
    """
    return list({id(item): item for item in items}.values())
