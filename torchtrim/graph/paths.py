"""Find modules: by path, glob, type or predicate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from types import UnionType
from typing import TypeAlias, cast

from torch import nn

from torchtrim.errors import PathError, SelectionError, nearest
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import module_ticks, run_if_known
from torchtrim.graph.inputs import ExampleInputs

Predicate: TypeAlias = Callable[[str, nn.Module], bool]
What: TypeAlias = "str | type[nn.Module] | Predicate | Sequence[str | type[nn.Module] | Predicate]"


def find(
    model: nn.Module,
    what: What = "**",
    *,
    type: type[nn.Module] | tuple[type[nn.Module], ...] | None = None,
    where: Predicate | None = None,
    expect: int | range | None = None,
    example_inputs: ExampleInputs | None = None,
) -> list[str]:
    """The paths of the modules that fit, each module once.

    A glob is matched component by component: `*`, `?` and `[...]` within one component, `**` across any number of
    them, none included (`layer3.**` is `layer3` and all below it). The model itself is never among them. A module
    with several names is given by the first that matches.

    The order is that of execution where `example_inputs` are given or the model's history knows them, with what is
    never called at the end; otherwise the order of registration.

    Args:
        model: Any module.
        what: A path, a glob, a module type, a predicate of (path, module), or a list of these (any may fit).
        type: Keep only modules of this type, or of one of these.
        where: Keep only modules for which this predicate of (path, module) holds.
        expect: How many there must be: a number, or a `range`.
        example_inputs: What the forward takes; only used for the order.

    Raises:
        PathError: An exact path does not exist; the nearest are named.
        SelectionError: Nothing fits (unless `expect` allows 0), or not as many as expected; lists what was found. Also
            for a selection that is none of these, and a predicate that does not take (path, module).
        InputError: The model refuses the inputs.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
        >>> find(net, "**", type=nn.Linear, expect=2)
        ['0', '2.0']
        >>> find(net, lambda path, module: path.startswith("2."))
        ['2.0', '2.1']
    """
    model = unwrap(model)
    _check_filters(type, where, expect)
    paths = _matching(model, what)
    kept = _filtered(model, paths, type, where)
    allowed = range(expect, expect + 1) if isinstance(expect, int) else expect
    if not kept and (allowed is None or 0 not in allowed):
        error = SelectionError(
            f"nothing in {model.__class__.__name__} fits {describe(what)}{_filters(type, where)}",
            found=f"{len(paths)} before the filters: {_some(paths)}" if paths else "no module",
            expected=_count(allowed) if allowed is not None else None,
            hint=nearest(what.replace("*", "").strip("."), _names(model)) if isinstance(what, str) else None,
        )
        error.what, error.select = what, lambda other: _fitting(other, what, type, where)
        raise error
    if allowed is not None and len(kept) not in allowed:
        raise SelectionError(
            f"{describe(what)}{_filters(type, where)} fits {len(kept)} modules",
            found=_some(kept),
            expected=_count(allowed),
            hint="a narrower selection" if len(kept) > max(allowed, default=0) else "a wider selection",
        )
    return _in_order(model, kept, example_inputs)


def select(model: nn.Module, what: What, *, example_inputs: ExampleInputs | None = None) -> list[str]:
    """`find` without filters: the paths that `what` names, at least one.

    Raises:
        PathError: An exact path does not exist.
        SelectionError: Nothing fits.

    Example:
        >>> select(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), [nn.ReLU, "0"])
        ['0', '1']
    """
    return find(model, what, example_inputs=example_inputs)


def covered(model: nn.Module, what: What | Iterable[What]) -> list[str]:
    """The modules that a selection names, and all within them, each by its first name; in the order of registration.

    Of a list each item has to fit something, so that a slip in one is not hidden by the others. An empty list is none.

    Raises:
        PathError: An exact path does not exist.
        SelectionError: An item fits nothing, or is no selection.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.ReLU())
        >>> covered(net, "1"), covered(net, [nn.Linear]), covered(net, [])
        (['1', '1.0', '1.1'], ['0', '1.0'], [])
    """
    model = unwrap(model)
    inner = {
        module for item in several(what) for path in find(model, item) for module in resolve(model, path).modules()
    }
    return [path for path, module in model.named_modules() if module in inner]


def spelled(model: nn.Module, what: What | Iterable[What]) -> tuple[str, ...]:
    """A selection as strings, for records: paths and globs as they are, the paths of what a type or predicate fits.

    Raises:
        SelectionError: A type or predicate fits nothing, or an item is no selection.

    Example:
        >>> spelled(nn.Sequential(nn.Linear(2, 2), nn.ReLU()), ["1*", nn.Linear])
        ('1*', '0')
    """
    items = several(what)
    paths = (path for item in items for path in ([item] if isinstance(item, str) else find(model, item)))
    return tuple(dict.fromkeys(paths))


def several(what: What | Iterable[What]) -> tuple[What, ...]:
    """A selection, or a list of them, as a list.

    Example:
        >>> several("layer3.*"), several(["fc", nn.ReLU])
        (('layer3.*',), ('fc', <class 'torch.nn.modules.activation.ReLU'>))
    """
    if isinstance(what, Iterable) and not isinstance(what, (str, type, nn.Module, Mapping)):
        return tuple(what)
    return (cast("What", what),)


def resolve(model: nn.Module, path: str) -> nn.Module:
    """The module at a path; `""` is the model itself.

    Raises:
        PathError: There is none; the nearest are named.

    Example:
        >>> resolve(nn.Sequential(nn.Linear(2, 3)), "0")
        Linear(in_features=2, out_features=3, bias=True)
    """
    model = unwrap(model)
    if not isinstance(path, str):
        raise PathError("a path is a string", found=repr(path), expected="a module's dotted name, like 'layer3.2'")
    names: dict[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))
    if path in names:
        return names[path]
    raise unknown(model, path)


def unknown(model: nn.Module, path: str, *, parameters: bool = False) -> PathError:
    """The error for a path that does not exist, with what there is nearby.

    Args:
        model: The model, out of its wrapper.
        path: The path.
        parameters: Whether the name of a parameter would have done too.

    Example:
        >>> print(unknown(nn.Sequential(nn.Linear(2, 3)), "0.wait", parameters=True))
        0.wait: Sequential has no module or parameter of this name (expected: under '0': weight, bias)...
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    names = [*modules, *(name for name, _ in model.named_parameters(remove_duplicate=False) if parameters)]
    parent = path.rpartition(".")[0]
    while parent not in modules:
        parent = parent.rpartition(".")[0]
    below = [name for name, _ in modules[parent].named_children()]
    below += [name for name, _ in modules[parent].named_parameters(recurse=False) if parameters]
    return PathError(
        f"{type(model).__name__} has no {'module or parameter' if parameters else 'module'} of this name",
        path=path,
        expected=(f"under {parent!r}: " if parent else "") + _some(below),
        hint=nearest(path, filter(None, names)),
    )


def matches(path: str, pattern: str) -> bool:
    """Whether a dotted name fits a glob, component by component.

    Example:
        >>> matches("layer3.2.conv1", "layer3.*.conv?"), matches("layer3.2.conv1", "layer3.*"), matches("fc", "**.fc")
        (True, False, True)
    """
    return _fits(path.split("."), pattern.split("."))


def may_lie_in(pattern: str, path: str) -> bool:
    """Whether what a glob is for is a module, or lies in it; not known (`False`) for one that begins with `**`.

    Example:
        >>> may_lie_in("layer3.*", "layer3.2"), may_lie_in("layer3.*.conv?", "layer3"), may_lie_in("**.fc", "layer3")
        (True, True, False)
    """
    parts, gone = pattern.split("."), path.split(".")
    return len(parts) >= len(gone) and "**" not in parts[: len(gone)] and _fits(gone, parts[: len(gone)])


def is_glob(text: str) -> bool:
    """Whether a string is a glob rather than a path."""
    return any(mark in text for mark in "*?[")


def describe(what: What) -> str:
    """A selection in words, for messages.

    Example:
        >>> describe(["layer3.*", nn.ReLU])
        "'layer3.*' or type ReLU"
    """
    if isinstance(what, str):
        return repr(what)
    if isinstance(what, type):
        return f"type {what.__name__}"
    if isinstance(what, Sequence):
        return " or ".join(describe(item) for item in what) if what else "an empty list"
    return f"predicate {getattr(what, '__name__', repr(what))}"


def _fitting(
    model: nn.Module, what: What, type: type[nn.Module] | tuple[type[nn.Module], ...] | None, where: Predicate | None
) -> list[str]:
    """`find`, without its errors."""
    try:
        return _filtered(model, _matching(model, what), type, where)
    except PathError:
        return []


def _filtered(
    model: nn.Module,
    paths: list[str],
    type: type[nn.Module] | tuple[type[nn.Module], ...] | None,
    where: Predicate | None,
) -> list[str]:
    return [
        path
        for path in paths
        if (type is None or isinstance(model.get_submodule(path), type))
        and (where is None or where(path, model.get_submodule(path)))
    ]


def _matching(model: nn.Module, what: What) -> list[str]:
    """Paths in registration order, each module once."""
    everything = dict(model.named_modules(remove_duplicate=False))
    found: dict[nn.Module, str] = {}

    def take(item: object) -> None:
        if isinstance(item, str) and (item in everything or not is_glob(item)):
            found.setdefault(resolve(model, item), item)
            return
        for path, module in everything.items():
            if path and _is(item, path, module):
                found.setdefault(module, path)

    items = what if isinstance(what, Sequence) and not isinstance(what, str) else [what]
    for item in items:
        _check_item(item)
        take(item)
    rank = {path: index for index, path in enumerate(everything)}
    return sorted(found.values(), key=lambda path: rank[path])


def _is(item: object, path: str, module: nn.Module) -> bool:
    if isinstance(item, str):
        return matches(path, item)
    if isinstance(item, type):
        return isinstance(module, item)
    return callable(item) and bool(item(path, module))


def check_selection(item: object) -> None:
    """Refuse what is no path, glob, type, predicate, or list of these.

    Raises:
        SelectionError: It is none.
    """
    for each in item if isinstance(item, Sequence) and not isinstance(item, str) else [item]:
        _check_item(each)


def _check_item(item: object) -> None:
    if isinstance(item, (str, type)):
        return
    if isinstance(item, nn.Module) or not callable(item):
        raise SelectionError(
            "this selects nothing",
            found=type(item).__name__,
            expected="a path, a glob, a module type, a predicate of (path, module), or a list of these",
        )
    _check_predicate(item)


def _check_predicate(predicate: Callable[..., object]) -> None:
    try:
        signature = inspect.signature(predicate)
    except ValueError:
        return  # some builtins have none to read; they are called as they are
    try:
        signature.bind("", nn.Identity())
    except TypeError as error:
        raise SelectionError(
            f"a predicate is called with a path and a module: {error}",
            found=getattr(predicate, "__name__", type(predicate).__name__) + str(signature),
            hint="lambda path, module: ...",
        ) from error


def _check_filters(kinds: object, where: object, expect: object) -> None:
    for kind in kinds if isinstance(kinds, tuple) else (kinds,):
        if kind is not None and not isinstance(kind, (type, UnionType)):
            raise SelectionError("not a module type", path="type", found=repr(kind), expected="like nn.Linear")
    if where is not None and (isinstance(where, nn.Module) or not callable(where)):
        raise SelectionError("not a predicate", path="where", found=repr(where), hint="lambda path, module: ...")
    if where is not None:
        _check_predicate(where)
    if expect is not None and not isinstance(expect, (int, range)):
        raise SelectionError("not a count", path="expect", found=repr(expect), expected="a number or a range")


def _fits(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_fits(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _fits(parts[1:], pattern[1:])


def _in_order(model: nn.Module, paths: list[str], example_inputs: ExampleInputs | None) -> list[str]:
    if len(paths) < 2 or (execution := run_if_known(model, example_inputs)) is None:
        return paths
    ticks = module_ticks(model, execution)
    first_name = {module: path for path, module in model.named_modules()}
    never = max(ticks.values(), default=0) + 1
    return sorted(paths, key=lambda path: ticks.get(first_name[model.get_submodule(path)], never))


def _names(model: nn.Module) -> list[str]:
    return [path for path, _ in model.named_modules(remove_duplicate=False) if path]


def _filters(type: object, where: Predicate | None) -> str:
    kinds = type if isinstance(type, tuple) else (type,)
    names = [getattr(kind, "__name__", str(kind)) for kind in kinds]
    text = f" of type {' or '.join(names)}" if type is not None else ""
    return text + (f" where {getattr(where, '__name__', repr(where))}" if where is not None else "")


def _count(allowed: range) -> str:
    return f"{allowed[0]} modules" if len(allowed) == 1 else f"a number of modules in {allowed}"


def _some(paths: Sequence[str], limit: int = 12) -> str:
    more = f", and {len(paths) - limit} more" if len(paths) > limit else ""
    return ", ".join(paths[:limit]) + more if paths else "none"
