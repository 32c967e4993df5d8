"""`apply`: do recorded edits on a model, whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from torchtrim.edits.edit import Edit, from_list
from torchtrim.edits.history import Applied, History, count_params, history, record, recorded_inputs
from torchtrim.edits.kept_module import kept_if_it_fails
from torchtrim.edits.module_spec import ModuleSpec, Trusted
from torchtrim.edits.work import Work
from torchtrim.errors import EditError, PathError, SelectionError, TorchTrimError
from torchtrim.graph.check import untrainable
from torchtrim.graph.copying import full_copy, structural_copy, unwrap
from torchtrim.graph.execution import inputs_from_spec
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import may_lie_in
from torchtrim.graph.reader import inputs_for

Edits = Edit | History | Mapping[str, Any] | Sequence[Edit | Mapping[str, Any]]


def apply(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    edits: Edits,
    *,
    copy: bool = True,
    check: bool = True,
    data: Iterable[Any] | None = None,
    trusted: Trusted = (),
) -> nn.Module:
    """Do edits, one after the other: records written by hand, read from a file, or taken from another model's history.

    A record from a history holds what was decided when it was done, weights too: on a model like the one it was done
    on it gives the same model again, to the bit, and needs no data.

    Args:
        model: Any `nn.Module`. It is left as it was, also when an edit in the middle fails.
        example_inputs: As for `cut`.
        edits: A record, a list of them, plain data for them (as `Edit.from_dict` takes it), or a `History`.
        copy: Copy the parameters. Without it the model itself is changed, its surviving parameters staying the same
            objects; where its own forward has to be opened, what is returned is a new object made of its parts, and
            the old one should no longer be used.
        check: Run each step and compare it, as the edits' own functions do.
        data: Calibration batches, for edits that ask for them.
        trusted: Classes of modules that may be built from a record though they are not of torch, torchtrim, timm or
            torchvision: a dict `{"package.module:Class": callable}`, or names.

    Raises:
        EditError: A record is wrong, or cannot be done on this model; says which, and which earlier edit took its
            place away. Others as the edits' own functions raise them.

    Example:
        >>> import torchtrim as tt
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> trimmed = tt.cut(net, torch.zeros(1, 4), after="1")
        >>> again = apply(net, None, tt.history(trimmed))
        >>> x = torch.randn(5, 4)
        >>> bool((again(x) == trimmed(x)).all())
        True
    """
    example_inputs, records = records_of(edits, example_inputs)
    return run(model, example_inputs, records, copy=copy, check=check, data=data, trusted=trusted)


def records_of(edits: Edits, example_inputs: ExampleInputs | None) -> tuple[ExampleInputs | None, list[Edit]]:
    """The records in what a user gives; a history brings the shapes of the example inputs too.

    Raises:
        EditError: One of them is wrong; says which.
    """
    if not isinstance(edits, History):
        return example_inputs, from_list([edits] if isinstance(edits, (Edit, Mapping)) else edits)
    if example_inputs is None and edits.inputs is not None:
        example_inputs = inputs_from_spec(edits.inputs)
    return example_inputs, list(edits.edits)


def run(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    edits: Sequence[Edit],
    *,
    copy: bool = True,
    check: bool = True,
    data: Iterable[Any] | None = None,
    trusted: Trusted = (),
) -> nn.Module:
    """Do records on a model: what `apply` and each edit's own function come down to."""
    with ExitStack() as kept:
        kept.enter_context(torch.inference_mode(False))  # what is made in that mode can never be trained
        for module in _live(edits):
            kept.enter_context(kept_if_it_fails(module))
        return _run(unwrap(model), example_inputs, edits, copy, check, data, trusted)


def _run(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    edits: Sequence[Edit],
    copy: bool,
    check: bool,
    data: Iterable[Any] | None,
    trusted: Trusted,
) -> nn.Module:
    known = example_inputs is not None or recorded_inputs(model) is not None
    needed = known or not edits or any(edit.needs_inputs for edit in edits)
    inputs = inputs_for(model, example_inputs) if needed else Inputs()
    twin = structural_copy(model)
    originals = dict(zip(map(id, twin.modules()), model.modules(), strict=True))
    keep_alive = list(twin.modules())  # their ids must not be given to others
    work = Work(twin, inputs, check=check, data=data, trusted=trusted)
    for step in performed(work, edits):
        record(step.before, work.model, inputs, step.applied)
    if copy:
        return full_copy(work.model, but=work.given)
    net = _committed(work, originals)
    del keep_alive
    return net


def _live(edits: Sequence[Edit]) -> list[nn.Module]:
    """The user's own modules in edits: a later edit may have changed one before it failed."""
    values = [value for edit in edits for value in vars(edit).values()]
    specs = [each for value in values for each in (value.values() if isinstance(value, Mapping) else [value])]
    return [spec.live for spec in specs if isinstance(spec, ModuleSpec) and spec.live is not None]


class Step:
    """One edit that was done: the model before it (its modules, sharing the weights), and the entry for the history."""

    def __init__(self, before: nn.Module, applied: Applied) -> None:
        self.before = before
        self.applied = applied


def performed(work: Work, edits: Sequence[Edit]) -> Iterator[Step]:
    """Do the edits on `work.model`, yielding after each.

    Raises:
        TorchTrimError: What the edit raises; a place that an earlier edit took away is told so.
    """
    past = [Past(entry) for entry in history(work.model).entries]
    for number, edit in enumerate(edits, 1):
        before = structural_copy(work.model)
        work.start(before)
        try:
            resolved = edit.perform(work)
            if work.check and edit.joins:
                _check_backward(before, work, edit)
        except TorchTrimError as error:
            raise _explained(error, edit, number, len(edits), past) from error
        removed = tuple(_outermost(_names(before) - _names(work.model))) + tuple(work.gone)
        checked = tuple(work.checked) or ("not checked",)
        counts = count_params(before), count_params(work.model)
        applied = Applied(resolved, *counts, tuple(work.notes), checked, removed)
        past.append(Past(applied, before))
        yield Step(before, applied)


def _check_backward(before: nn.Module, work: Work, edit: Edit) -> None:
    """A model that could be trained still can: a layer that writes in place may overwrite what a gradient needs.

    Comparisons do not tell: a reference with the same in it fails alike, and so nothing is compared.
    """
    for training in (False, True):
        reason = untrainable(work.model, work.inputs, training)
        if reason is not None and untrainable(before, work.inputs, training) is None:
            raise EditError(
                f"it could not be trained any more{' in eval mode' * (not training)}: {reason.partition(' Hint:')[0]}",
                path=str(edit),
                hint="a layer without inplace=True behind this place" if "inplace" in reason else None,
            )


def _names(model: nn.Module) -> set[str]:
    return {name for name, _ in model.named_modules(remove_duplicate=False)}


def _outermost(names: set[str]) -> list[str]:
    return sorted(name for name in names if name.rpartition(".")[0] not in names)


@dataclass(frozen=True)
class Past:
    """An edit that was done; with the model before it, where it was done now."""

    applied: Applied
    before: nn.Module | None = None


def _explained(error: TorchTrimError, edit: Edit, number: int, count: int, past: list[Past]) -> TorchTrimError:
    """The error, with the number of the edit where there are several, and with what took its place away."""
    message, hint = error.message, error.hint
    position = _taken_by(error, past)
    if position is not None:
        message = f"{message}: it went away with edit {position}, {past[position - 1].applied.edit}"
        hint = "leave one of the two out, or do this one first"
    if count > 1:
        message = f"edit {number} of {count}, {edit.kind}: {message}"
    told = type(error)(message, path=error.path, found=error.found, expected=error.expected, hint=hint)
    told.__dict__.update({name: value for name, value in error.__dict__.items() if name not in told.__dict__})
    return told


def _taken_by(error: TorchTrimError, past: list[Past]) -> int | None:
    """The number of the last edit that took away what an error misses."""
    if isinstance(error, PathError) and isinstance(error.path, str):
        wanted: list[object] = [error.path]
    elif isinstance(error, SelectionError) and error.select is not None:
        wanted = list(error.what) if isinstance(error.what, (list, tuple)) else [error.what]
    else:
        return None
    for position, each in reversed(list(enumerate(past, 1))):
        if isinstance(error, SelectionError) and error.select is not None and each.before is not None:
            if error.select(each.before):  # the last one that still had it
                return position
        elif any(lies_in(name, gone) for name in wanted if isinstance(name, str) for gone in each.applied.removed):
            return position
    return None


def lies_in(address: str, gone: str) -> bool:
    """Whether an address, or what a glob is for, is at a place that is gone, or was within it.

    Example:
        >>> lies_in("layer3.2:add", "layer3.2"), lies_in("layer3.20", "layer3.2")
        (True, False)
    """
    return may_lie_in(address, gone) or address.startswith((f"{gone}:", f"{gone}#"))


_PLAIN = (type(None), bool, int, float, str, bytes, torch.Size, torch.dtype, torch.device)
_TENSORS = (nn.Module, torch.Tensor)
_MODULE_DICTS = ("_modules", "_parameters", "_buffers")


def _committed(work: Work, originals: dict[int, nn.Module]) -> nn.Module:
    """The edited copy, put back into the user's own module objects and parameters.

    Nothing in here can fail half way: all that could was done on the copy.
    """
    hooks = {
        id(value): original.__dict__[name]
        for twin in work.model.modules()
        if (original := originals.get(id(twin))) is not None
        for name, value in twin.__dict__.items()
        if name.endswith(("_hooks", "_hooks_with_kwargs", "_always_called"))
    }
    for new, old in work.came_from.items():
        _take_over(old, new)
    own = {id(module): originals.get(id(module), module) for module in work.model.modules()}
    for module in list(work.model.modules()):
        if module in work.given:
            continue
        target = own[id(module)]
        children = {name: None if child is None else own[id(child)] for name, child in module._modules.items()}
        held = {
            name: work.came_from.get(each, each) if each is not None else None
            for name, each in module._parameters.items()
        }
        buffers = dict(module._buffers)
        if target is not module:
            _bring_up_to_date(target.__dict__, module.__dict__)
        else:
            for name, value in module.__dict__.items():
                if id(value) in hooks:
                    module.__dict__[name] = hooks[id(value)]
        for name, members in zip(_MODULE_DICTS, (children, held, buffers), strict=True):
            kept = target.__dict__[name]
            kept.clear()
            kept.update(members)
    net = own[id(work.model)]
    for name, value in work.model.__dict__.items():
        if name.startswith("_torchtrim_"):
            net.__dict__[name] = value
    return net


def _take_over(old: nn.Parameter, new: nn.Parameter) -> None:
    """Give a parameter the values, the shape and the gradient of another."""
    old.grad = None
    if old.shape != new.shape:
        # The node that gathers its gradient remembers the old shape, and lives as long as some graph does: that of a
        # loss the caller still holds. Autograd lets go of it only where the type of the values changes.
        other = torch.float32 if old.dtype == torch.float16 else torch.float16
        old.data = torch.empty(0, dtype=other, device=old.device)
    old.data, old.grad = new.data, new.grad


def _bring_up_to_date(target: dict[str, Any], source: dict[str, Any], deep: bool = True) -> None:
    """Copy plain values that differ: a module's own, and those of objects that it holds (a configuration)."""
    for name, value in source.items():
        other = target.get(name)
        if value is other or name in _MODULE_DICTS or name.startswith("_torchtrim_"):
            continue
        if _is_plain(value):
            if _differs(value, other):
                target[name] = value
        elif deep and type(value) is type(other) and hasattr(value, "__dict__") and not isinstance(value, _TENSORS):
            _bring_up_to_date(other.__dict__, value.__dict__, deep=False)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list, set)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(_is_plain(item) for item in value.values())
    return isinstance(value, _PLAIN)


def _differs(value: Any, other: Any) -> bool:
    return type(value) is not type(other) or bool(value != other)
