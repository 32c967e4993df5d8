"""The adapters of a removal: those that the user gives, and those that the shapes ask for."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import nn

from torchtrim.edits.adapter import KINDS, Shape, adapter_for, layout_of
from torchtrim.edits.calls import run_copy
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.placing import fit
from torchtrim.edits.remove_runs import Run, at_batch
from torchtrim.edits.work import Work
from torchtrim.errors import EditError
from torchtrim.graph.copying import full_copy
from torchtrim.graph.inputs import Inputs

EVERY = "*"  # the adapter of every joint


def adapters_for(
    work: Work, runs: list[Run], kind: str | None, given: Mapping[str, ModuleSpec]
) -> dict[str, nn.Module]:
    """The adapter of each run that needs one, by the run's address.

    Args:
        work: The model that is worked on.
        runs: What goes.
        kind: What to make where the shapes differ; `None`: refuse.
        given: Modules to put in, whatever the shapes.

    Raises:
        EditError: One is not allowed, not known, or does not fit.
    """
    if kind is not None and kind not in KINDS:
        raise EditError("no such adapter", path="adapter", found=kind, expected=f"None, a module, or one of {KINDS}")
    addresses = dict.fromkeys(run.address for run in runs)
    unknown = [address for address in given if address not in addresses and address != EVERY]
    if unknown:
        raise EditError("no run of what goes begins there", path=unknown[0], expected=list(addresses))
    found: dict[str, nn.Module] = {}
    shapes: dict[str, tuple[Shape, Shape] | None] = {}
    every = given.get(EVERY)
    module = None if every is None else _own(work, every)
    for run in runs:
        spec = given.get(run.address)
        wanted = None if run.fits and spec is None and every is None else (run.first.before, run.last.after)
        if run.address in shapes:
            if shapes[run.address] != wanted:
                raise EditError(
                    "its calls need different adapters",
                    path=run.address,
                    found=" and ".join(map(str, (shapes[run.address], wanted))),
                    hint=f"'{run.address}#0', to take out one call alone",
                )
            continue
        shapes[run.address] = wanted
        if spec is not None:
            found[run.address] = _fitting(work, run, _own(work, spec))
        elif module is not None:
            found[run.address] = _fitting(work, run, copy.deepcopy(module) if found else module)
        elif wanted is not None:
            found[run.address] = _made(work, run, kind)
    return found


def _own(work: Work, spec: ModuleSpec) -> nn.Module:
    module = work.module(spec)
    return full_copy(module) if work.planning and module is spec.live else module


def _made(work: Work, run: Run, kind: str | None) -> nn.Module:
    before, after = run.first.before, run.last.after
    if run.first.types[0] != run.last.types[1]:
        raise EditError(
            "its input cannot stand for its output: they are of different types",
            path=str(run),
            found=str(run.first.types[0]).removeprefix("torch."),
            expected=str(run.last.types[1]).removeprefix("torch."),
        )
    layout = layout_of(before, after, run.modules)
    try:
        adapter = adapter_for(before, after, layout=layout, kind=kind or "auto")
    except EditError as error:
        raise EditError(
            f"its input cannot stand for its output: {error.message}",
            path=str(run),
            found=list(at_batch(before, work.inputs)),
            expected=list(at_batch(after, work.inputs)),
            hint=error.hint,
        ) from error
    if kind is None:
        raise EditError(
            "its input has not the shape of its output, and no adapter is allowed",
            path=str(run),
            found=list(at_batch(before, work.inputs)),
            expected=list(at_batch(after, work.inputs)),
            hint=f"adapter='auto', which puts in {' '.join(str(adapter).split())}",
        )
    reference = next((held for held in work.model.parameters() if held.is_floating_point()), None)
    if reference is not None:
        adapter.to(device=reference.device, dtype=reference.dtype)
    return adapter.train(mode_of(work, run))


def mode_of(work: Work, run: Run) -> bool:
    """Whether a run is in train mode: what takes its place is too."""
    return run.modules[0].training if run.modules else work.model.training


def _fitting(work: Work, run: Run, module: nn.Module) -> nn.Module:
    """A user's adapter, which makes the right shape out of the shape it gets."""
    fit(module, work.model, mode_of(work, run))
    outputs: list[object] = []
    device = next((held.device for held in module.parameters()), torch.device("cpu"))
    value = torch.zeros(run.first.before, dtype=run.first.types[0], device=device)
    try:
        run_copy(module, Inputs.of(value), False, lambda twin: _keep_output(twin, outputs))
    except EditError as error:
        raise EditError(
            f"the adapter does not take its input: {error.message}", path=str(run), found=list(run.first.before)
        ) from error
    shape = tuple(output.shape) if isinstance(output := outputs[-1], torch.Tensor) else None
    if run.last.needed and shape != run.last.after:
        raise EditError(
            "the adapter does not give the shape that is needed",
            path=str(run),
            found=list(shape) if shape is not None else type(output).__name__,
            expected=list(run.last.after),
        )
    return module


def _keep_output(twin: nn.Module, outputs: list[object]) -> None:
    twin.register_forward_hook(lambda _module, _args, output: outputs.append(output))
