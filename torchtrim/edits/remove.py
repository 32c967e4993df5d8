"""`remove`: take modules out of the middle of a model, and join what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import nn

from torchtrim.edits.apply import run
from torchtrim.edits.edit import Edit
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.remove_adapters import EVERY, adapters_for
from torchtrim.edits.remove_check import Reference
from torchtrim.edits.remove_place import Taken, take_out, ways
from torchtrim.edits.remove_runs import Run, runs_of, wanted_from
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import CheckFailed, EditError, TorchTrimError, TraceError
from torchtrim.graph.copying import has_function_hooks, structural_copy, unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import Predicate, select

Paths = str | type[nn.Module] | Predicate | Sequence[str | type[nn.Module] | Predicate]
Adapter = str | nn.Module | Mapping[str, nn.Module] | None


@dataclass(frozen=True)
class Remove(Edit):
    """Take calls out of a model.

    Attributes:
        paths: What to take out: paths, globs, addresses of functions.
        adapter: How to repair shapes that do not agree: `"auto"`, `"pool"`, `"slice"`, `"project"`, or `None`: refuse.
        adapters: The modules that repair them, by the address of the first call of each run; `"*"` for every place.
        taken: How each call was taken out, once it was.
    """

    kind: ClassVar[str] = "remove"
    paths: tuple[str, ...] = ()
    adapter: str | None = "auto"
    adapters: dict[str, ModuleSpec] = field(default_factory=dict)
    taken: tuple[Taken, ...] = ()

    def perform(self, work: Work) -> Edit:
        """Do it on `work.model`; returns the record with what was decided."""
        if not self.paths:
            raise EditError("nothing to remove", path="paths", found=self.paths, expected="a path, or several")
        if self.taken and not work.check and not work.planning:
            take_out(work, self.taken, {address: work.module(spec) for address, spec in self.adapters.items()})
            return self
        wanted = wanted_from(work.model, self.paths)
        runs = runs_of(work, wanted)
        adapters = adapters_for(work, runs, self.adapter, self.adapters)
        taken = _that_works(work, runs, adapters, [self.taken] if self.taken else ways(work.model, runs, adapters))
        for each in runs:
            work.notes += [
                f"hooks on {call.key[0]!r} went with it"
                for call in each.calls
                if call.module is not None and has_function_hooks(call.module)
            ]
            work.joints.append(_joint(each, taken, adapters, max(work.inputs.batch, 2)))
        work.gone += [each.address for each in taken if ":" in each.address]
        take_out(work, taken, adapters)
        specs = {address: ModuleSpec.of(module).recorded() for address, module in adapters.items()}
        return replace(self, paths=tuple(wanted.addresses), adapters=specs, taken=tuple(taken))


def remove(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    paths: Paths = (),
    *,
    adapter: Adapter = "auto",
    data: Iterable[Any] | None = None,
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Take modules out of a model: what went into them goes where their output went.

    Calls of which each feeds only the next are one run with one joint: the input of the first goes in place of the
    output of the last. Where these have one shape the neighbours are joined: an element of an `nn.Sequential`,
    `ModuleList` or `ModuleDict` is no more (the others keep their keys), another module is replaced by one that hands
    on its input; where neither works, and for a function, the module that makes the call is opened (replaced by a
    `torch.fx.GraphModule` under the same path). What was removed last in the model needs no shape: the model then
    returns what went into it.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`.
        paths: What to take out: a path, a glob, a type, a predicate of (path, module), or a list of these. A path means
            all calls of its module, `"path#k"` one of them, counted in the order of execution; `"path:function"` is
            a function or method that the module at `path` calls, whose first tensor stands for its result.
        adapter: What to do where the shapes differ. `"auto"`: put in the smallest module that repairs it, in the place
            of the first module of the run. Places (height and width, tokens) are averaged by their ratio, cut or padded
            by a border, or repeated; channels that become more get zeros behind them (the shortcut "A" of He et al.
            2015), channels that become fewer go through a 1x1 convolution or linear layer that begins as the choice of
            the first ones. `"pool"`: the same without any weights. `"slice"`: without averaging either, by taking
            every second (third, ...) place. `"project"`: a 1x1 convolution or linear layer that begins as the
            identity does all it can. A module, or a dict of them by path: yours, put in whatever the shapes. `None`:
            refuse, and say both shapes.
        data: Calibration batches: tensors, `(inputs, targets)` pairs or dicts.
        copy: Copy the parameters. Without it the model itself is changed.
        check: Run the result, in both modes and at several sizes, against the original in which hooks put the input of
            what goes in place of its output, and compare outputs and gradients. Without it only shapes are looked at.

    Returns:
        The model without them.

    Raises:
        PathError: No such path, or it is never called.
        SelectionError: Nothing fits.
        EditError: It cannot go: what would have to stand for its output is not there, shapes differ and no adapter is
            allowed or known, or a module that has to be opened cannot be.
        CheckFailed: The result does not compute what it should.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> smaller = remove(net, torch.zeros(1, 4), ["2", "3"])
        >>> list(smaller.state_dict())
        ['0.weight', '0.bias', '4.weight', '4.bias']
        >>> remove(net, torch.zeros(1, 4), ["2", "3", "4"], adapter="pool")(torch.zeros(5, 4)).shape
        torch.Size([5, 8])
    """
    kind = adapter if isinstance(adapter, str) or adapter is None else "auto"
    given = {EVERY: adapter} if isinstance(adapter, nn.Module) else adapter
    given = given if isinstance(given, Mapping) else {}
    for address, module in given.items():
        if not isinstance(module, nn.Module):
            raise EditError("an adapter is a module", path=address, found=type(module).__name__)
    specs = {address: ModuleSpec.of(module) for address, module in given.items()}
    edit = Remove(_spelled(unwrap(model), paths), kind, specs)
    return run(model, example_inputs, [edit], copy=copy, check=check, data=data)


def _spelled(model: nn.Module, paths: Paths) -> tuple[str, ...]:
    """What a user gives as strings: a type or a predicate becomes the paths that it fits now."""
    if not isinstance(paths, Sequence) or isinstance(paths, str):
        paths = [paths]
    found: list[str] = []
    for each in paths:
        found += [each] if isinstance(each, str) else select(model, each)
    return tuple(dict.fromkeys(found))


def _that_works(
    work: Work, runs: list[Run], adapters: Mapping[str, nn.Module], choices: Iterable[Sequence[Taken]]
) -> Sequence[Taken]:
    """The first way of taking the calls out that works, tried on copies."""
    reference = Reference(work.model, work.inputs, runs, adapters)
    if work.check:
        reference.opened_alike()
    failed: TorchTrimError | None = None
    for taken in choices:
        trial = Work(structural_copy(work.model), work.inputs, check=False)
        try:
            take_out(trial, taken, adapters)
            reference.same_way(trial.model, taken)
            if work.check:
                work.checked += reference.compared(trial.model, taken)
            return taken
        except (EditError, CheckFailed, TraceError) as error:
            failed = failed or error
    if failed is None:
        raise EditError("there is no way to take it out", path=str(runs[0]))
    where = ", ".join(map(str, runs[:4])) + (", ..." if len(runs) > 4 else "")
    raise type(failed)(
        f"it cannot be taken out: {failed.message}",
        path=where,
        found=failed.found,
        expected=failed.expected,
        hint=failed.hint,
    ) from failed


def _joint(each: Run, taken: Sequence[Taken], adapters: Mapping[str, nn.Module], batch: int) -> Joint:
    """What `plan` shows of a run, its shapes at batch 1."""
    how = next(one.how for one in taken if one.address == each.address)
    adapter = adapters.get(each.address)
    told = {"gone": "joined", "passed": "handed on", "opened": "joined, the module around it opened"}[how]
    if adapter is not None:
        told = f"adapter: {' '.join(str(adapter).split())}"

    def single(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (shape[0] // batch, *shape[1:]) if shape and shape[0] % batch == 0 else shape

    return Joint(str(each), single(each.first.before), single(each.last.after), told)
