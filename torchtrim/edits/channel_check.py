"""Check a model that lost channels: every shape is as foretold, and the rest computes what it did.

The reference is the original whose layers ignore the deleted channels: the weights that read them are zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.channels.follow import Flow, Run, Step, rerun, shape_after
from torchtrim.channels.labels import Label, Layer, Mask, kept_indices, varying
from torchtrim.edits.work import Work
from torchtrim.errors import CheckFailed, EditError, GuardError
from torchtrim.graph.check import Side, Variant, differs, run, variants
from torchtrim.graph.copying import full_copy, is_meta, structural_copy
from torchtrim.graph.stale import forget_computed


def check_shapes(work: Work, flow: Flow, gone: Mask, *, cut: bool) -> None:
    """Run the narrowed model on fake tensors, and compare every shape with what the labels say it is.

    Args:
        work: The narrowed model, and its inputs.
        flow: The channels, from before.
        gone: The channels that went.
        cut: Whether operators were taken out too: then the modules' outputs are compared.

    Raises:
        NotFollowed: The forward does not follow: a width is written into it. Says which channels are at fault.
    """
    runs = rerun(work.model, work.inputs, flow.runs)
    for before in flow.runs:
        try:
            after = next(runs)
        except EditError as error:
            cause = error.__cause__ or error
            raise NotFollowed(
                f"it does not run without these channels: {str(cause).rstrip('.')}",
                path=error.path,
                hint=_FOLLOW,
                layers=_stopped(before, getattr(error, "run", None), gone),
            ) from error
        steps, others = _told(before), _told(after)
        # Operators were taken out; or the same forward takes others (a product of one row).
        if cut or [step.name for step in steps] != [step.name for step in others]:
            _compare_calls(before, after, gone)
        else:
            _compare_steps(steps, others, gone)


class NotFollowed(EditError):
    """A forward that does not follow where channels go.

    Attributes:
        layers: The channels of the values at which it does not.
    """

    def __init__(self, message: str, *, layers: Sequence[Layer] = (), **told: Any) -> None:
        super().__init__(message, **told)
        self.layers = tuple(layers)


def _stopped(before: Run, after: Run | None, gone: Mask) -> tuple[Layer, ...]:
    """What goes into the operator at which a forward stopped, and comes of it: the channels that lose some."""
    steps = _told(before)
    number = 0 if after is None else len(_told(after))
    # A shape that is wrong may be seen later than it is made: what was not as foretold comes first.
    found = [] if after is None else _told(after)
    for step, other in zip(steps, found, strict=False):
        for place, ((_, label), (now, _)) in enumerate(zip(step.outputs, other.outputs, strict=False)):
            if step.name == other.name and not label.aside and _broad(_foretold(step, place, now, gone)) != _broad(now):
                return label.layers
    values = [value for each in steps[number : number + 1] for value in (*each.given, *each.outputs)]
    return tuple(layer for _, label in values for layer in label.layers if bool(gone[layer].any()))


_FOLLOW = "a layer whose channels are not taken apart by fixed numbers in a module's own forward"
_LAYOUT = ("clone", "contiguous", "_to_copy", "as_strided", "as_strided_", "alias", "detach")
_VIEWS = ("_unsafe_view", "reshape", "_reshape_alias")


def _told(run: Run) -> list[Step]:
    """The operators, without those that depend on how values lie in memory."""
    named = [replace(step, name="view") if step.name in _VIEWS else step for step in run.steps]
    return [step for step in named if step.name not in _LAYOUT]


def _compare_steps(before: list[Step], after: list[Step], gone: Mask) -> None:
    for step, found in zip(before, after, strict=True):
        for number, ((shape, label), (other, _)) in enumerate(zip(step.outputs, found.outputs, strict=False)):
            if not label.aside and not _empty(shape, other):
                _expect(_foretold(step, number, other, gone), other, step.where, label)
        start, other_start = _start_after(step, gone), None if found.start is None else found.start[1:]
        if start != other_start:
            raise _does_not_follow(start, other_start, step.where, step.source)


def _foretold(step: Step, number: int, found: tuple[int, ...], gone: Mask) -> tuple[int, ...] | None:
    """The shape of an output when channels are gone; what is repeated as often as need be is taken as it was found."""
    expected = shape_after(*step.outputs[number], gone)
    free = step.free[number] if step.free else frozenset()
    if expected is None or not free or len(expected) != len(found):
        return expected
    return tuple(
        other if axis in free else size for axis, (size, other) in enumerate(zip(expected, found, strict=True))
    )


def _start_after(step: Step, gone: Mask) -> tuple[int, ...] | None:
    """Where a slice has to begin: what it takes may be as wide as foretold, and be the wrong channels."""
    if step.start is None or step.source is None:
        return None
    axis, first = step.start
    for layer in step.source.layers:
        kept = (kept_indices(layer, gone) or {}).get(axis)
        if kept is not None:
            return (int(kept[:first].sum()),)
    return (first,)


def _compare_calls(before: Run, after: Run, gone: Mask) -> None:
    for path, calls in after.calls.items():
        for call, found in zip(before.calls.get(path, []), calls, strict=False):
            for (shape, label), (other, _) in zip(call.outputs, found.outputs, strict=False):
                if not _empty(shape, other):
                    _expect(shape_after(shape, label, gone), other, repr(path), label)


def _empty(shape: tuple[int, ...], other: tuple[int, ...]) -> bool:
    """Whether a value holds nothing before and after: then its labels cannot tell how wide it is along other axes."""
    return 0 in shape and 0 in other


def _expect(expected: tuple[int, ...] | None, found: tuple[int, ...] | None, where: str, label: Label | None) -> None:
    if _broad(expected) != _broad(found):
        raise _does_not_follow(expected, found, where, label)


def _does_not_follow(
    expected: tuple[int, ...] | None, found: tuple[int, ...] | None, where: str, label: Label | None
) -> NotFollowed:
    return NotFollowed(
        f"the forward does not follow at {where}: a width is written there, or channels are taken apart",
        found=found,
        expected=expected or "channels that leave no gaps (the same ones of each part)",
        hint=_FOLLOW,
        layers=() if label is None else label.layers,
    )


def _broad(shape: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """A shape without its dimensions of size 1: `einsum` puts those elsewhere, and one head may be left."""
    return None if shape is None else tuple(size for size in shape if size != 1)


def check_values(work: Work, flow: Flow, gone: Mask) -> list[str]:
    """Compare what the narrowed model computes with the original that ignores the deleted channels.

    Returns:
        What was checked, in words.

    Raises:
        CheckFailed: It computes something else, or does not run.
    """
    if is_meta(work.model):
        return ["shapes of every operator, in both modes", "not run: the model is on the meta device"]
    told = ["shapes of every operator, in both modes"]
    mixed = any(bool(gone[layer].any()) for layer in flow.channels.mixed)
    reference = _ignoring(work.before, flow, gone)
    for variant in variants(work.inputs):
        before = flow.runs[variant.training]
        exact = not mixed and not before.unclear and not (variant.training and before.random)
        try:
            expected = run(Side(reference), variant, gradients=False).outputs
        except Exception as error:  # noqa: BLE001 -- whatever the user's model raises: it does not take these inputs
            told.append(f"{variant.name}: not checked, the original refuses it ({type(error).__name__})")
            continue
        found = _result(work, variant)
        if found is None:
            told.append(f"{variant.name}: refused, the graph holds for the example's size")
        elif not exact:
            why = "a norm or sum over the deleted channels" if mixed else "random numbers"
            told.append(f"{variant.name}: runs ({why}: equality cannot be expected)")
        else:
            difference = differs(_narrowed(expected, before, gone), found)
            if difference is not None and not _alike_in_double(reference, work.model, variant, before, gone):
                raise CheckFailed(f"it does not compute what the original does in {variant.name}: {difference}")
            told.append(f"{variant.name}: equal to the original that ignores these channels")
    return told


def _alike_in_double(reference: nn.Module, net: nn.Module, variant: Variant, before: Run, gone: Mask) -> bool:
    """Whether they agree where rounding plays no part: a norm over two values makes much of it in single precision."""
    inputs = variant.inputs.map(lambda tensor: tensor.double() if tensor.is_floating_point() else tensor)
    wide = replace(variant, inputs=inputs)
    try:
        expected, found = (
            run(Side(full_copy(each).double()), wide, gradients=False).outputs for each in (reference, net)
        )
    except Exception:  # noqa: BLE001 -- whatever a forward raises that is written for one type of numbers
        return False  # then the first answer holds
    return differs(_narrowed(expected, before, gone), found) is None


def _result(work: Work, variant: Variant) -> Any:
    try:
        return run(Side(work.model), variant).outputs
    except GuardError as error:
        if "size" not in variant.name:
            raise CheckFailed(f"it does not run in {variant.name}: {error}") from error
        return None
    except Exception as error:
        raise CheckFailed(f"it does not run in {variant.name}: {type(error).__name__}: {error}") from error


def _narrowed(outputs: Any, before: Run, gone: Mask) -> Any:
    """The reference's outputs without the channels that went from the model's own outputs."""
    labels = iter([label for _, label in before.calls[""][0].outputs])

    def narrow(tensor: torch.Tensor) -> torch.Tensor:
        for layer in next(labels).layers:
            for axis, mask in (kept_indices(layer, gone) or {}).items():
                if not mask.all():
                    tensor = tensor.index_select(axis, torch.as_tensor(np.flatnonzero(mask), device=tensor.device))
        return tensor

    return pytree.tree_map_only(torch.Tensor, narrow, outputs)


def _ignoring(model: nn.Module, flow: Flow, gone: Mask) -> nn.Module:
    """The original with zeros where a weight reads a channel that went; a branch that was taken out gives zeros."""
    twin = structural_copy(model)
    reads = np.zeros(flow.channels.count, dtype=bool)
    for layer in flow.channels.consumed:
        reads[layer] = True
    reads &= gone
    new: dict[int, torch.Tensor] = {}
    for module in twin.modules():
        held: list[dict[str, Any]] = [module._parameters, module._buffers]
        for tensors, name, tensor in [(each, name, tensor) for each in held for name, tensor in each.items()]:
            label = None if tensor is None else flow.tensors.get(id(tensor))
            if tensor is None or label is None or not any(bool(reads[layer].any()) for layer in label.layers):
                continue
            if id(tensor) not in new:
                values = tensor.detach().clone()
                for layer in label.layers:
                    values[torch.as_tensor(np.broadcast_to(reads[layer], values.shape).copy())] = 0
                is_parameter = isinstance(tensor, nn.Parameter)
                new[id(tensor)] = nn.Parameter(values, requires_grad=tensor.requires_grad) if is_parameter else values
            tensors[name] = new[id(tensor)]
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    forget_computed(twin, new.values())
    modules = dict(twin.named_modules())
    for path in {path: None for each in flow.runs for path in each.calls if any(dead_calls(each, path))}:
        modules[path].register_forward_hook(_Silent(*(dead_calls(each, path) for each in flow.runs)))
    return twin


def dead_calls(forward: Run, path: str) -> list[bool]:
    """For each call of a module, whether all that it returns goes."""
    return [bool(call.outputs) and all(label.dead for _, label in call.outputs) for call in forward.calls.get(path, [])]


class _Silent:
    """A hook that gives zeros at some calls. Not a function: copies are run without those, and with a copy of this."""

    def __init__(self, in_eval: list[bool], in_train: list[bool]) -> None:
        self.calls = {False: in_eval, True: in_train}
        self.count = 0

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        calls = self.calls[module.training]
        silent = self.count < len(calls) and calls[self.count]
        self.count += 1
        return pytree.tree_map_only(torch.Tensor, torch.zeros_like, output) if silent else output


def refuse_uneven(flow: Flow, gone: Mask) -> None:
    """Raise where what stays of a value would have gaps, or groups would keep different numbers of channels.

    Raises:
        EditError: It would; says where.
    """
    steps = [step for each in flow.runs for step in each.steps]
    tables = [(layer, step.where) for step in steps for _, label in step.outputs for layer in label.layers]
    for layer, where in (*flow.channels.tables, *tables):
        if len(varying(layer)) > 1 and kept_indices(layer, gone) is None:
            raise EditError(
                f"the parts into which {where} takes channels apart would lose different ones",
                found=f"parts by {[size for size in layer.shape if size > 1]}",
                expected="the same channels of each part, or whole parts",
                hint="delete more: every channel at the same place of the other parts",
            )
    for part in flow.channels.parts:
        left = (~gone[part.channels]).sum(axis=1)
        counts = set(left.tolist())
        if len(counts - {0} if part.whole else counts) > 1:
            raise EditError(
                f"the groups of {part.where} would keep different numbers of channels",
                found=left.tolist(),
                expected=f"as many in each of the {len(left)} groups",
                hint="as many channels of every group" + (", or whole groups" if part.whole else ""),
            )
