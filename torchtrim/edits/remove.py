"""`remove`: take modules out of the middle of a model, and join what is left."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import nn

from torchtrim.edits.apply import run
from torchtrim.edits.edit import Edit
from torchtrim.edits.heal import composed, fit, seams_of
from torchtrim.edits.kept_module import kept_if_it_fails
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.remove_adapters import EVERY, adapters_for, mode_of
from torchtrim.edits.remove_branch import take_branches_out
from torchtrim.edits.remove_check import Reference, assign
from torchtrim.edits.remove_place import Taken, take_out, ways
from torchtrim.edits.remove_runs import Run, at_batch, runs_of, wanted_from
from torchtrim.edits.rewire import Room
from torchtrim.edits.weights import Weights
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import CheckFailed, EditError, TorchTrimError, TraceError
from torchtrim.graph.copying import has_function_hooks, structural_copy, unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import Predicate, resolve, select

Paths = str | type[nn.Module] | Predicate | Sequence[str | type[nn.Module] | Predicate]
Adapter = str | nn.Module | Mapping[str, nn.Module] | None


@dataclass(frozen=True)
class Remove(Edit):
    """Take calls out of a model.

    Attributes:
        paths: What to take out: paths, globs, addresses of functions.
        adapter: How to repair shapes that do not agree: `"auto"`, `"pool"`, `"slice"`, `"project"`, or `None`: refuse.
        adapters: The modules that repair them, by the address of the first call of each run; `"*"` for every place.
        branch: Whether the whole branch goes that each of them lies in.
        heal: How to fit the joints to data: `"auto"`, `"linear"`, `"scale"`, `"norm"`, or `None`: not at all.
        taken: How each call was taken out, once it was.
        healed: The parameters that healing gave other values, by their name in the trimmed model.
    """

    kind: ClassVar[str] = "remove"
    paths: tuple[str, ...] = ()
    adapter: str | None = "auto"
    adapters: dict[str, ModuleSpec] = field(default_factory=dict)
    branch: bool = False
    heal: str | None = None
    taken: tuple[Taken, ...] = ()
    healed: Weights | None = None

    def perform(self, work: Work) -> Edit:
        """Do it on `work.model`; returns the record with what was decided."""
        with ExitStack() as kept:
            for spec in self.adapters.values():
                if spec.live is not None:
                    kept.enter_context(kept_if_it_fails(spec.live))
            return self._performed(work)

    def _performed(self, work: Work) -> Edit:
        if not self.paths:
            raise EditError("nothing to remove", path="paths", found=self.paths, expected="a path, or several")
        if self.branch and (self.heal is not None or self.adapters):
            raise EditError("a branch leaves no joint to put an adapter in or to heal", path="branch", found=True)
        if self.branch:
            branches = wanted_from(work.model, self.paths).addresses
            return replace(self, paths=tuple(branches), taken=take_branches_out(work, branches, self.taken))
        if self.taken and not work.check and not work.planning:
            adapters = {address: work.module(spec) for address, spec in self.adapters.items()}
            _finish(work, self.taken, adapters, self.healed or {}, {})
            return self
        wanted = wanted_from(work.model, self.paths)
        rooms: dict[str, Room] = {}  # what was read of forwards, which is the same for all copies
        runs = runs_of(work, wanted, rooms)
        adapters = adapters_for(work, runs, self.adapter, self.adapters)
        weights: Mapping[str, torch.Tensor] = self.healed or {}
        choices = [self.taken] if self.taken else ways(work.model, runs, adapters, work.check)
        taken = _that_works(work, runs, adapters, choices, weights, rooms)
        if self.heal is not None and not self.taken:
            adapters, weights = _healed(work, runs, adapters, taken, self.heal, rooms)
        for each in runs:
            modules = [(call.key[0], call.module) for call in each.calls if call.module is not None]
            work.notes += [f"hooks on {path!r} went with it" for path, module in modules if has_function_hooks(module)]
            work.joints.append(_joint(each, taken, adapters, work.inputs))
        work.gone += [each.address for each in taken if ":" in each.address]
        _finish(work, taken, adapters, weights, rooms)
        return replace(
            self,
            paths=tuple(wanted.addresses),
            adapters={address: ModuleSpec.of(module).recorded() for address, module in adapters.items()},
            taken=tuple(taken),
            healed=Weights(weights) if weights else None,
        )

    def __str__(self) -> str:
        asked = [", ".join(self.paths) if len(self.paths) < 5 else f"{self.paths[0]}, ... ({len(self.paths)} paths)"]
        asked += [f"adapter={self.adapter!r}"] if self.adapter != "auto" else []
        asked += ["branch=True"] if self.branch else []
        asked += [f"heal={self.heal!r}"] if self.heal is not None else []
        return f"{self.kind}({', '.join(asked)})"


def remove(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    paths: Paths = (),
    *,
    adapter: Adapter = "auto",
    heal: str | None = None,
    data: Iterable[Any] | None = None,
    branch: bool = False,
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
        heal: Fit the joints to `data`, without labels and without training in the usual sense: `"linear"` (least
            squares of what the run gave on what it got), `"scale"` (mean and deviation of each channel), `"norm"` (the
            scales and biases of the norm layers), or `"auto"`, which chooses at each joint what agrees best with the
            original on a part of the data that is held back, or nothing.
        data: For healing: an iterable of batches, which are tensors, `(inputs, targets)` pairs or dicts.
        branch: Take out the whole branch that each path lies in: every call between the fork and the merge that feeds
            only that merge. `x + f(x)` becomes `x`, and so does `x * f(x)`; `cat([a, f(x)])` becomes `a`, and what
            reads it loses its weights for the channels that are no more.
        copy: Copy the parameters. Without it the model itself is changed.
        check: Run the result, in both modes and at several sizes, against the original in which hooks put the input of
            what goes in place of its output, and compare outputs and gradients. Without it only shapes are looked at,
            and an `nn.Identity` stays in a `ModuleList` or `ModuleDict`, whose elements other code may count.

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
    modules = dict(given) if given or kind is None or isinstance(adapter, (str, Mapping)) else {"adapter": adapter}
    for address, module in modules.items():
        if not isinstance(module, nn.Module):
            name = module.__name__ if isinstance(module, type) else ""
            hint = f"{name}()" if name else None
            raise EditError("an adapter is a module, a name, or None", path=address, found=repr(module), hint=hint)
    if data is not None and heal is None:
        raise EditError("data is for healing, and none is asked for", path="data", hint="heal='auto'")
    specs = {address: ModuleSpec.of(module) for address, module in given.items()}
    edit = Remove(_spelled(unwrap(model), paths), kind, specs, branch, heal)
    return run(model, example_inputs, [edit], copy=copy, check=check, data=data)


def _spelled(model: nn.Module, paths: Paths) -> tuple[str, ...]:
    """What a user gives as strings: a type or a predicate becomes the paths that it fits now."""
    if not isinstance(paths, Sequence) or isinstance(paths, str):
        paths = [paths]
    found: list[str] = []
    for each in paths:
        found += [each] if isinstance(each, str) else select(model, each)
    return tuple(dict.fromkeys(found))


def _finish(
    work: Work,
    taken: Sequence[Taken],
    adapters: Mapping[str, nn.Module],
    weights: Mapping[str, torch.Tensor],
    rooms: dict[str, Room],
) -> None:
    take_out(work, taken, adapters, rooms)
    for name, tensor in weights.items():
        owner, _, key = name.rpartition(".")
        module = resolve(work.model, owner)
        old = module._parameters.get(key)
        if old is None or old.shape != tensor.shape:
            raise EditError(
                "the healed values are those of another model",
                path=name,
                found="no parameter" if old is None else list(old.shape),
                expected=list(tensor.shape),
            )
        work.reshape(module, key, tensor.to(device=old.device))


def _that_works(
    work: Work,
    runs: list[Run],
    adapters: Mapping[str, nn.Module],
    choices: Iterable[Sequence[Taken]],
    weights: Mapping[str, torch.Tensor],
    rooms: dict[str, Room],
) -> Sequence[Taken]:
    """The first way of taking the calls out that works, tried on copies."""
    held = dict(work.model.named_parameters(remove_duplicate=False))
    new = {name: nn.Parameter(tensor.to(held[name].device)) for name, tensor in weights.items() if name in held}
    reference = Reference(work.model, work.inputs, runs, adapters, new, rooms)
    if work.check:
        reference.opened_alike()
    failed: TorchTrimError | None = None
    for taken in choices:
        trial = Work(structural_copy(work.model), work.inputs, check=False)
        try:
            take_out(trial, taken, adapters, rooms)
            assign(trial.model, new)
            reference.same_way(trial.model, taken)
            if work.check:
                work.checked = list(reference.compared(trial.model, taken))
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


def _healed(
    work: Work,
    runs: list[Run],
    adapters: dict[str, nn.Module],
    taken: Sequence[Taken],
    method: str,
    rooms: dict[str, Room],
) -> tuple[dict[str, nn.Module], Mapping[str, torch.Tensor]]:
    """Fit the joints to the data; the adapters, and the parameters that have other values since."""
    if work.planning:
        work.notes.append(f"heal={method!r} fits the joints to data when it is done")
        return adapters, {}

    def build(fitted: Mapping[str, nn.Module]) -> nn.Module:
        trial = Work(structural_copy(work.model), work.inputs, check=False)
        take_out(trial, taken, composed(adapters, fitted), rooms)
        return trial.model

    original, seams = structural_copy(work.model), seams_of(runs)
    healing = fit(original, build, seams, data=work.data, inputs=work.inputs, method=method)
    work.notes += healing.notes
    adapters = composed(adapters, healing.adapters)
    for each in runs:
        if each.address in healing.adapters:
            adapters[each.address].train(mode_of(work, each))
    _that_works(work, runs, adapters, [taken], healing.weights, rooms)
    return adapters, healing.weights


def _joint(each: Run, taken: Sequence[Taken], adapters: Mapping[str, nn.Module], inputs: Inputs) -> Joint:
    """What `plan` shows of a run, its shapes at batch 1."""
    how = next(one.how for one in taken if one.address == each.address)
    adapter = adapters.get(each.address)
    told = {"gone": "joined", "passed": "handed on", "opened": "joined, the module around it opened"}[how]
    if adapter is not None:
        told = f"adapter: {' '.join(str(adapter).split())}"

    before, after = (at_batch(shape, inputs, batch=1) for shape in (each.first.before, each.last.after))
    return Joint(str(each), before, after, told)
