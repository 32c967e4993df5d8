"""Whether a model runs with other modules in it, and by how much its output differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.edits.addresses import Address, places
from torchtrim.edits.joint import observe
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import CheckFailed, EditError, GuardError, InputError
from torchtrim.graph.check import Mismatch, Side, compare, differs, flatten, run, variants
from torchtrim.graph.copying import is_meta, structural_copy
from torchtrim.graph.execution import Execution, run_fake

Shape = tuple[int, ...]


def check_runs(work: Work, modules: Mapping[str, nn.Module]) -> None:
    """Run `work.model`, for its shapes alone, and with `work.check` in both modes; notes what was found in `work`.

    Args:
        work: The model with new modules in it, and the model before.
        modules: The new modules, by the address of the place that each took.

    Raises:
        EditError: It does not run.
    """
    inputs = work.inputs.with_batch(1)
    try:
        before = run_fake(work.before, inputs)
    except InputError:
        inputs = work.inputs
        before = run_fake(work.before, inputs)
    names = {module: path for path, module in work.model.named_modules()}
    try:
        after = run_fake(work.model, inputs)
    except InputError as error:
        raise _refused(work, modules, before, error) from error
    for address, module in modules.items():
        old = Address.of(work.before, address).path if ":" not in address else None
        if old is not None and "#" not in address and before.calls_of(old) and not after.calls_of(names[module]):
            raise EditError(
                "the new module is never called, though the old one was: the forward reaches it in a hidden way",
                path=address,
                hint="remove or replace the module around it",
            )
        if old is not None and not before.calls_of(old):
            work.notes.append(f"{address!r} is not called in eval mode for these inputs")
        shapes = None if old is None else _shape(before, old), _shape(after, names[module])
        work.joints.append(Joint(address, *shapes, f"replaced by: {type(module).__name__}"))
    ends = [[str(value) for value in each.calls_of("")[0].outputs] for each in (before, after)]
    if ends[0] != ends[1]:
        work.notes.append(f"the model returns {', '.join(ends[1])} where it returned {', '.join(ends[0])}")
    if work.check:
        work.checked += _runs(work, list(modules))


def refuse_unused(work: Work, modules: Mapping[str, nn.Module]) -> None:
    """Refuse a place where a module's value is not used, because it writes to what it is given, as the new does not.

    Args:
        work: The model before.
        modules: The new modules, by path.

    Raises:
        EditError: There is one.
    """
    paths = {path for path, new in modules.items() if _in_place(work.model.get_submodule(path)) and not _in_place(new)}
    twin = structural_copy(work.model) if paths else work.model
    for path in paths:
        twin.get_submodule(path).register_forward_pre_hook(_OnCopies(), with_kwargs=True)
    for training in (False, True) if paths else ():
        for seen in observe(twin, work.inputs, training, paths):
            if not seen.needed and not seen.returned:
                raise EditError(
                    "its value is not used: it works in place, on what it is given",
                    path=seen.key[0],
                    hint="a module with inplace=True",
                )


def _in_place(module: nn.Module) -> bool:
    return any(getattr(each, "inplace", False) is True for each in module.modules())


class _OnCopies:
    """A hook that lets a module write to copies. Not a function: copies of a model are run without those."""

    def __call__(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        return pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs))


def check_opening(work: Work, addresses: Sequence[str]) -> None:
    """Compare the model before with itself, with the modules opened that make some calls, and nothing changed.

    Raises:
        CheckFailed: They compute something else.
    """
    copy = Work(structural_copy(work.before), work.inputs)
    for address in addresses:
        for room in dict.fromkeys(room for room, _ in places(copy, address)):
            room.close(copy)
    try:
        compare(Side(work.before), Side(copy.model), work.inputs)
    except Mismatch as error:
        raise CheckFailed(f"a module cannot be opened here: {error.message}", path=", ".join(addresses)) from error


def _runs(work: Work, addresses: list[str]) -> list[str]:
    """Both models in every variant; the original need not run in each."""
    if is_meta(work.model):
        return ["not run: the model is on the meta device"]
    done: list[str] = []
    for variant in variants(work.inputs):
        try:
            expected = run(Side(work.before), variant)
        except Exception as error:
            if not done:
                raise InputError(f"the model does not run on the example inputs: {error}") from error
            done.append(f"{variant.name}: not checked, the original refuses it")
            continue
        try:
            found = run(Side(work.model), variant, gradients=expected.gradients is not None)
        except GuardError:
            done.append(f"{variant.name}: refused, the graph holds for the example's size")
            continue
        except Exception as error:
            if "size" in variant.name:
                done.append(f"{variant.name}: refused, the new modules hold for the example's size")
                continue
            raise EditError(
                f"the model does not run with it in {variant.name}: {type(error).__name__}: {error}",
                path=", ".join(addresses[:3]) + (", ..." if len(addresses) > 3 else ""),
            ) from error
        before, after = (_detached(flatten(outcome.outputs)) for outcome in (expected, found))
        same = differs(before, after) is None
        done.append(f"{variant.name}: {'equal' if same else 'runs'}{'' if same else _by(before, after)}")
    return done


def _detached(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def _by(expected: dict[str, Any], found: dict[str, Any]) -> str:
    """By how much outputs of one shape differ, as a share of the largest value."""
    pairs = list(zip(expected.values(), found.values(), strict=False))
    shares = [
        float((one.double() - other.double()).abs().max()) / max(float(one.double().abs().max()), 1e-12)
        for one, other in pairs
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        if one.shape == other.shape and one.numel() and one.is_floating_point()
    ]
    return (
        f", output differs by {max(shares):.2g} of the original's largest value"
        if len(shares) == len(pairs) and shares
        else ""
    )


def _refused(work: Work, modules: Mapping[str, nn.Module], before: Execution, error: InputError) -> EditError:
    """Whether a new module refuses what it is given, or what follows refuses what it makes."""
    where = str(error.path or "")
    for address, module in modules.items():
        path = Address.of(work.before, address).path
        is_new = any(
            each is module for name, each in work.model.named_modules() if f"{where}.".startswith(f"{name}.") and name
        )
        if is_new:
            return EditError(
                f"the new {type(module).__name__} does not take what is given there: {error.message}",
                path=address,
                expected=f"a module that makes {list(_shape(before, path) or ())} of it",
            )
    made = ", ".join(
        f"{address} {list(_shape(before, Address.of(work.before, address).path) or ())}"
        for address, module in list(modules.items())[:4]
    )
    return EditError(
        f"what follows does not take what the new modules return: {error.message}",
        path=where or None,
        expected=f"the shapes of the old ones: {made}",
    )


def _shape(execution: Execution, path: str) -> Shape | None:
    calls = execution.calls_of(path)
    return calls[0].outputs[0].shape if calls and calls[0].outputs else None
