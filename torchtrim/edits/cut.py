"""`cut`: keep what leads to a node, drop the rest."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx, nn

from torchtrim.edits.apply import run
from torchtrim.edits.edit import Edit, decided
from torchtrim.edits.truncate import Tap, truncated
from torchtrim.edits.work import Work
from torchtrim.errors import CheckFailed, EditError, PathError, nearest
from torchtrim.graph.check import Mismatch, Side, compare
from torchtrim.graph.guards import GUARDS
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.opened import has_output_hooks
from torchtrim.graph.reader import Reader, Site, addresses, ancestors
from torchtrim.graph.reading import function_name


@dataclass(frozen=True)
class Cut(Edit):
    """Keep what leads to some nodes.

    Attributes:
        after: The addresses of the nodes whose values the model returns.
        names: Their names, where the outputs are a dict.
        single: Whether it returns the value itself, not a tuple of one; by default where there is one, without a name.
        clone: Whether values that are used further are returned as copies; decided when it is done.
    """

    kind: ClassVar[str] = "cut"
    joins: ClassVar[bool] = False
    after: tuple[str, ...] = ()
    names: tuple[str, ...] | None = None
    single: bool | None = decided()
    clone: bool | None = decided()

    def __post_init__(self) -> None:
        if not self.after:
            raise EditError("nothing to cut after", found=self.after, expected="a path, or several")
        if self.names is not None and len(self.names) != len(self.after):
            raise EditError("as many names as outputs", path="names", found=self.names, expected=len(self.after))
        if self.single is None:
            object.__setattr__(self, "single", len(self.after) == 1 and self.names is None)
        if self.single and (self.names is not None or len(self.after) > 1):
            raise EditError("a single output has one address and no name", found=self, hint="single=False")

    def perform(self, work: Work) -> Cut:
        """Cut `work.model`."""
        model, inputs = work.model, work.inputs
        reader = _read(model, inputs, self.after)
        taps = [_tap(model, reader, address) for address in self.after]
        work.notes += [note for tap in taps for note in _notes(tap, reader, model)]

        def build(clone: bool, whole: bool = False) -> nn.Module:
            return truncated(model, reader, taps, names=self.names, single=bool(self.single), clone=clone, whole=whole)

        # A value that is returned and used further may be written to by an in-place layer: then a copy is returned.
        clone = not work.check if self.clone is None else self.clone
        net = build(clone)
        if work.check:
            reference = _reference(model, reader, taps, self, inputs, build)
            try:
                work.checked += compare(reference, Side(net), inputs)
            except Mismatch:
                clone = True
                net = build(clone)
                work.checked += compare(reference, Side(net), inputs)
        work.model = net
        return replace(self, clone=clone)


def cut(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    *,
    after: str | Sequence[str] | Mapping[str, str],
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Cut a model after a layer: a model that computes that layer's output, and holds no more than it needs for it.

    What is kept keeps its class, its hooks and its `state_dict` keys. Only modules that the cut goes through are opened
    (replaced by a `torch.fx.GraphModule` under the same path); an `nn.Sequential` is shortened. It is right in train
    and in eval mode, also where the two run different branches.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: A tensor, or a tuple or dict of them, as the model takes them.
        after: Where to cut, by address. A module's address is its path (`"layer3"`, `"layer3.0.conv1"`); a function or
            method that the module at `path` calls is `"path:name"`, such as `"layer3.0:add"`, or `":flatten"` in the
            model's own forward. Where several calls have that name, `#0`, `#1`, ... behind it count them in the order
            of execution: `"layer3.0.relu#1"`. `trace` lists them all. A list gives a model that returns a tuple, a dict
            `{address: name}` one that returns a dict by name.
        copy: Copy the parameters. Without it the new model is made of the original's own modules and parameters (for
            big models, or inside a training loop), and the original should no longer be used.
        check: Run the result against the original, in both modes, at several batch sizes and another input size, and
            compare the gradients: about eight forwards and two backwards, in the memory of one training step. Twice
            that at a function.

    Returns:
        The cut model. Its output has the shape that the node has in `trace`.

    Raises:
        PathError: No such path, it is never called, or it is called several times (the message lists the addresses).
        EditError: The path feeds nothing, or lies in a module that cannot be opened.
        CheckFailed: The result does not compute what the original computes there.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> backbone = cut(net, torch.zeros(1, 3, 8, 8), after="1")
        >>> backbone(torch.zeros(2, 3, 8, 8)).shape, sorted(backbone.state_dict())
        (torch.Size([2, 8, 6, 6]), ['0.bias', '0.weight'])
    """
    return run(model, example_inputs, [_edit(after)], copy=copy, check=check)


def _edit(after: str | Sequence[str] | Mapping[str, str]) -> Cut:
    if isinstance(after, str):
        return Cut((after,))
    if not isinstance(after, (Mapping, Sequence)):
        raise EditError("a place to cut is given by its address", found=after, expected="a string, or several")
    if isinstance(after, Mapping):
        names: tuple[str, ...] | None = tuple(after.values())
        if len(set(names or ())) != len(after):
            raise EditError("two outputs have one name", found=list(after.values()), expected="a name for each")
    else:
        names = None
    addresses_ = tuple(after)
    if not all(isinstance(address, str) for address in (*addresses_, *(names or ()))):
        raise EditError("places and the names of outputs are strings", found=after, expected="strings")
    return Cut(addresses_, names, single=False)


def _read(model: nn.Module, inputs: Inputs, wanted: tuple[str, ...]) -> Reader:
    """Read the model, opening what the addresses lie in and nothing else."""
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in reversed(modules.items())}
    through: set[str] = set()
    for address in wanted:
        path, colon, _ = address.partition("#")[0].partition(":")
        if path not in modules:
            raise PathError("no such module", path=path, hint=nearest(path, modules))
        if path == "" and not colon:
            raise PathError(
                "that is the whole model: nothing would be cut", path="''", hint="the path of a module in it"
            )
        # All ways that lead to a shared module are looked at: its calls are counted over all of them.
        for name in (name for name, module in modules.items() if module is modules[path]):
            for inner in [*ancestors(name), *([name] if colon else [])]:
                through |= {inner, first[id(modules[inner])]}

    def enough(graph: fx.Graph) -> bool:
        return all(_reaches(graph, _canonical(model, address)) for address in wanted)

    # What comes after the cut need not be readable.
    reader = Reader(model, inputs, wanted=lambda path, module: path in through, both_modes=True, enough=enough)
    return reader.read()


def _reaches(graph: fx.Graph, address: str) -> bool:
    """Whether the graph of the model's own forward gets as far as an address."""
    name, _, number = address.partition("#")
    path, colon, function = name.partition(":")
    if colon and not path:
        count = sum(function_name(node.target) == function for node in graph.nodes)
    else:
        calls = [str(node.target) for node in graph.nodes if node.op == "call_module"]
        count = sum(path == target or path.startswith(f"{target}.") for target in calls)
    return bool(count > (int(number) if number.isdigit() else 0))


def _tap(model: nn.Module, reader: Reader, address: str) -> Tap:
    """Where an address lies in the graphs that were read."""
    found = addresses(reader.sites)
    path, colon, _ = address.partition("#")[0].partition(":")
    wanted = _canonical(model, address)
    canonical, _, number = wanted.partition("#")
    if wanted in found:
        return _described(reader, address, found[wanted])
    several = [each for each in found if each.partition("#")[0] == canonical]
    if len(several) == 1 and number in ("", "0"):
        return _described(reader, address, found[several[0]])
    if several:
        raise PathError(
            "it is called several times, and has a value for each" if not number else "no such call",
            path=address,
            found=f"{len(several)} calls",
            hint="one of " + ", ".join(repr(each) for each in several),
        )
    for inner in (*ancestors(path), *([path] if colon else [])):
        if inner in reader.closed:
            raise EditError(
                f"it lies in {inner!r}, which cannot be opened: {reader.closed[inner]}",
                path=address,
                hint=f"after={inner!r}",
            )
    if colon:
        inside = [each for each in found if each.startswith(f"{path}:")]
        raise PathError(
            "no such call in this module's forward",
            path=address,
            hint=nearest(canonical, inside)
            or (f"one of {inside[:8]}" if inside else f"after={path!r}, which calls modules only"),
        )
    raise PathError(
        "it is never called for these inputs, so it has no value to cut after",
        path=address,
        hint="a path that tt.trace lists",
    )


def _canonical(model: nn.Module, address: str) -> str:
    """An address with the first of its module's names, where it has several."""
    path = re.split("[:#]", address, maxsplit=1)[0]
    return _first_name(model, path) + address[len(path) :]


def _first_name(model: nn.Module, path: str) -> str:
    target = model.get_submodule(path)
    return str(next(name for name, module in model.named_modules() if module is target))


def _described(reader: Reader, address: str, site: Site) -> Tap:
    if site.mode == "train":
        raise EditError(
            "it is computed in train mode only, so the cut model would have no output in eval mode", path=address
        )
    if site.op == "input":
        raise EditError("that is an input of the model: nothing leads to it", path=address)
    if site.owner.eval.broken is None and all(user.target in GUARDS for user in site.node.users):
        raise EditError(
            "its output feeds nothing in the model: nothing depends on it",
            path=address,
            hint="the path of a layer whose output is used",
        )
    return Tap(reader, site)


def _notes(tap: Tap, reader: Reader, model: nn.Module) -> list[str]:
    """What else used the value, where more than one call did; and the hooks that have nothing to look at any more."""
    cut_through = [frame.path for frame in reader.frames[""]] + [step.name for step in tap.steps[:-1]]
    hooks = [
        f"hooks on the output of {path or 'the model'!r} were dropped: that output is no longer computed"
        for path in cut_through
        if has_output_hooks(model.get_submodule(path))
    ]
    users = [
        str(other.name)
        for other in reader.sites
        if other.mode == "eval" and other.owner is tap.site.owner and tap.site.node in other.node.all_input_nodes
    ]
    if len(users) < 2:
        return hooks
    return [*hooks, f"the value of {tap.site.name!r} fed {len(users)} calls: {', '.join(users)}"]


def _reference(model: nn.Module, reader: Reader, taps: list[Tap], edit: Cut, inputs: Inputs, build: Any) -> Side:
    """How to get the same values from the original: hooks on modules; for functions, the whole opened model."""
    if all(tap.site.op == "module" for tap in taps):
        return Side(model, lambda module, given: _structured(edit, _captured(module, given, taps)))
    broken = reader.frames[""][0].eval.broken
    if broken is not None:
        raise EditError(
            f"the result could not be checked: the model's forward cannot be followed to its end: {broken}",
            path=edit.after[0],
            hint="cut after a module, or check=False",
        )
    whole = build(clone=True, whole=True)
    try:
        compare(Side(model), Side(whole, lambda module, given: given.call(module)[0]), inputs)
    except Mismatch as error:
        raise CheckFailed(f"the model cannot be opened here: {error.message}", path=edit.after[0]) from error
    return Side(whole, lambda module, given: given.call(module)[1])


class _Captured(BaseException):
    """All values are there: the rest of the original need not run. No user's `except Exception` may catch it."""


def _captured(module: nn.Module, inputs: Inputs, taps: list[Tap]) -> list[Any]:
    values: dict[int, Any] = {}
    calls: dict[str, int] = {}
    paths = {tap.site.name for tap in taps}

    def hook(path: str) -> Any:
        def keep(_module: nn.Module, _args: Any, output: Any) -> None:
            count = calls[path] = calls.get(path, -1) + 1
            for index, tap in enumerate(taps):
                if tap.site.name == path and tap.call == count:
                    values[index] = torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, output)
            if len(values) == len(taps):
                raise _Captured

        return keep

    handles = [module.get_submodule(path).register_forward_hook(hook(path)) for path in paths]
    try:
        inputs.call(module)
    except _Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [values[index] for index in range(len(taps))]


def _structured(edit: Cut, values: list[Any]) -> Any:
    if edit.names is not None:
        return dict(zip(edit.names, values, strict=True))
    return values[0] if edit.single else tuple(values)
