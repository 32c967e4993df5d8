"""Solve the weights of layers that read pruned channels again, in closed form, from calibration data.

A layer that lost inputs can make up for them with those that are left, as far as these vary together. Its new weights
are the least squares solution for what the original's layer gives on the same data, as in channel pruning (He, Zhang
and Sun, ICCV 2017) and ThiNet (Luo, Wu and Lin, ICCV 2017). The layers are taken from input to output, each on what
the narrower model feeds it, so that errors of earlier layers are made up for too; where the result is added to
another value (a residual connection), what that lacks of the original's is part of what is fitted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrim.edits.heal_data import Calibration
from torchtrim.edits.heal_norms import Judge
from torchtrim.edits.reconstruct_fit import Fit, Patches
from torchtrim.edits.reconstruct_watch import Reader, Seen, readers, seen
from torchtrim.edits.weights import Weights
from torchtrim.edits.work import Work
from torchtrim.graph.copying import full_copy, kept_random_state, structural_copy
from torchtrim.graph.execution import no_fused_attention
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.progress import progress

Removed = Mapping[str, Sequence[int]]  # the indices that went, by dimension; "0,1" for a grouped layer's table

_PASSES = 32  # over the data, each halfway through both models; layers of one pass do not see one another's new weights


@dataclass(frozen=True)
class Reconstruction:
    """What was solved again.

    Attributes:
        weights: New values of parameters and buffers of the narrower model, by name; none where they do not help.
        notes: What was done, in words.
        before: The error on data held back before: the difference of the model's outputs from the original's, relative
            to the deviation of these.
        after: The error with the new weights.
    """

    weights: Weights = field(default_factory=Weights)
    notes: tuple[str, ...] = ()
    before: float = 0.0
    after: float = 0.0


def reconstruct(
    original: nn.Module,
    net: nn.Module,
    narrowed: Mapping[str, Removed],
    *,
    inputs: Inputs,
    data: Iterable[Any] | None,
) -> Reconstruction:
    """Find new weights for the linear layers and convolutions of a narrower model that read fewer channels.

    Each layer is fitted on four fifths of the data, drawn to the weights that it has by a ridge; how strongly, and
    whether it is changed at all, is judged by the rest. A bias takes part; where a layer has none and a batch norm
    follows, the norm's mean does. Both models run in eval mode, on copies.

    Memory: both models, a piece of 16 inputs, and for each layer of one pass two square matrices as wide as what it
    reads (for a convolution, times the size of its kernel). Time: at most 32 passes over the data, each halfway through
    both models on average.

    Args:
        original: The model before.
        net: The narrower model, with the weights that are left.
        narrowed: What each tensor lost, by its full name: the indices by dimension.
        inputs: Example inputs.
        data: Calibration batches: tensors, `(inputs, targets)` pairs or dicts; gone through several times.

    Raises:
        InputError: No data, too little, or such as can be gone through only once.
        EditError: The two models return different shapes.
    """
    calibration = Calibration.of(data, original, inputs, what="reconstruction")
    with kept_random_state(), torch.no_grad(), no_fused_attention(), progress("reconstruction") as told:
        teacher = structural_copy(original, own_buffers=True, user_hooks=False).eval()
        student = structural_copy(full_copy(net), user_hooks=False).eval()
        judge = Judge(teacher, calibration)
        found, left = readers(student, narrowed, next(iter(calibration.held_back())))
        if not found:
            return Reconstruction(notes=("reconstruction: no layer reads fewer channels in a way that can be solved",))
        before = judge.error(student)
        changed: dict[str, torch.Tensor] = {}
        chunks = list(_chunks(found))
        for number, chunk in enumerate(chunks):
            told(chunk[0].path, number / len(chunks))
            for reader, fit in zip(chunk, _fits(teacher, student, chunk, calibration), strict=True):
                changed |= _put(student, reader, fit)
        after = judge.error(student)
    skipped = f"; left as they are: {', '.join(left)}" if left else ""
    if not after < before:
        return Reconstruction(
            notes=(f"reconstruction: given up, it does not help on data held back ({before:.4f} -> {after:.4f})",),
            before=before,
            after=before,
        )
    note = f"reconstruction: {len(found)} layers (error on data held back {before:.4f} -> {after:.4f}){skipped}"
    return Reconstruction(Weights(changed), (note,), before, after)


def set_tensors(work: Work, values: Weights) -> None:
    """Put reconstructed values into a model that is edited."""
    for name, value in values.items():
        path, _, own = name.rpartition(".")
        owner = work.model.get_submodule(path)
        parameter = owner._parameters.get(own)
        if parameter is not None:
            work.reshape(owner, own, value.to(parameter.device, parameter.dtype))
            continue
        old = owner._buffers[own]
        new = value.to(old.device, old.dtype) if old is not None else value
        for module in work.model.modules():
            for key, held in module._buffers.items():
                if held is old:
                    module._buffers[key] = new.clone()


def _chunks(found: Sequence[Reader]) -> Iterator[list[Reader]]:
    """Readers that are fitted in one pass, in the order of execution."""
    size = -(-len(found) // _PASSES)
    for start in range(0, len(found), size):
        yield list(found[start : start + size])


def _fits(teacher: nn.Module, student: nn.Module, chunk: Sequence[Reader], calibration: Calibration) -> list[Fit]:
    """Run both models over the data, and sum up what each layer reads and what it should give."""
    patches = [Patches.of(student.get_submodule(reader.path)) for reader in chunk]
    fits = [Fit(centred=reader.bias is not None) for reader in chunk]
    with ExitStack() as stack:
        right = stack.enter_context(seen(teacher, chunk))
        now = stack.enter_context(seen(student, chunk))
        for held, piece in _pieces(calibration):
            right.run(piece)
            now.run(piece)
            for reader, each, fit in zip(chunk, patches, fits, strict=True):
                for x, y in _pairs(reader, right, now):
                    fit.add(*each.rows(x, y), held=held)
    return fits


def _pieces(calibration: Calibration) -> Iterator[tuple[bool, Inputs]]:
    yield from ((False, piece) for piece in calibration.to_fit())
    yield from ((True, piece) for piece in calibration.held_back())


def _pairs(reader: Reader, right: Seen, now: Seen) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """For each call of a layer what it is given, and what it should make of that."""
    for call, (given, _) in enumerate(now.calls[reader.path]):
        wanted = reader.kept(right.calls[reader.path][call][1])
        if reader.residual:
            other, here = right.others[reader.path][call], now.others[reader.path][call]
            wanted = wanted + reader.unscaled(reader.kept(other) - here)
        yield given, wanted


def _put(student: nn.Module, reader: Reader, fit: Fit) -> dict[str, torch.Tensor]:
    """Write a solution into the model; returns the tensors that changed, by name."""
    module: Any = student.get_submodule(reader.path)
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    solved = fit.solve(weight, bias)
    if solved is None:
        return {}
    module.weight.data = solved.weight.reshape(weight.shape).to(weight.dtype)
    changed = {f"{reader.path}.weight": module.weight.data}
    if bias is not None:
        module.bias.data = solved.bias.to(bias.dtype)
        changed[f"{reader.path}.bias"] = module.bias.data
    elif reader.norm is not None:
        norm: Any = student.get_submodule(reader.norm)
        norm.running_mean = (norm.running_mean - solved.bias).to(norm.running_mean.dtype)
        changed[f"{reader.norm}.running_mean"] = norm.running_mean
    return changed
