"""`insert`: put a module in, behind a call or before one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import torch
from torch import fx, nn

from torchtrim.edits.addresses import Address, places
from torchtrim.edits.apply import run
from torchtrim.edits.calls import Runs, callers, run_copy
from torchtrim.edits.edit import Edit, decided
from torchtrim.edits.insert_check import check_insertion
from torchtrim.edits.kept_module import kept_if_it_fails
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.placing import fit, put_before, put_behind, put_behind_whole
from torchtrim.edits.rewire import Room, open_room
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import EditError, InputError, PathError
from torchtrim.graph.copying import full_copy, unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import resolve
from torchtrim.graph.reader import join
from torchtrim.graph.writable import is_writable


def insert(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    module: nn.Module,
    *,
    after: str | None = None,
    before: str | None = None,
    name: str | None = None,
    index: int = 0,
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Put a module in: the value of a call, or what a call is given, goes through it.

    Beside an element of an `nn.Sequential` it becomes another element, and the keys of the others stay. Elsewhere the
    module whose forward makes the call is opened (replaced by a `torch.fx.GraphModule` under the same path, with the
    same children, hooks and `state_dict` keys), and calls it.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`.
        module: The module to put in, of one tensor. It is this object that the new model holds, taken to the model's
            device and mode, and to its type of values where it has the default one.
        after: The address of a call, as for `cut`: everything that used its value gets what the module makes of it. The
            path of a module that is called several times means all of its calls, `"path#k"` one of them.
        before: The address of a call, likewise: it alone gets what the module makes of its argument.
        name: The name of the new child, an identifier; by default the class's in lower case, with a number where it is
            taken.
        index: Which tensor, counted from 0, where the value is a tuple, list or dict (`after`) or the call has several
            arguments (`before`).
        copy: Copy the parameters of the model. Without it the model itself is changed, as for `cut`.
        check: Run the result against the original with hooks that do the same, in both modes, at several batch sizes
            and another input size, and compare outputs, buffers and gradients; at a function against the opened
            original with that function wrapped.

    Raises:
        PathError: No such address, or it is never called.
        EditError: The module does not take the value there, or what follows does not take what it returns (both shapes
            are in the message); the model does not run with it in train mode, or backward, as it did; the place lies in
            a module that cannot be opened; the module is part of the model.
        CheckFailed: The result does not compute what it should.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> list(insert(net, torch.zeros(1, 4), nn.Dropout(0.2), after="1")._modules)
        ['0', '1', 'dropout', '2']
    """
    for which, address in (("after", after), ("before", before)):
        if address is not None and not isinstance(address, str):
            raise EditError("one address is needed", path=which, found=address, expected="a path")
    model = unwrap(model)
    _refuse_own(module, model)
    edit = Insert(ModuleSpec.of(module), after, before, name, index)
    return run(model, example_inputs, [edit], copy=copy, check=check)


@dataclass(frozen=True)
class Place:
    """Where a module was put.

    Attributes:
        owner: The module that calls it.
        key: The element it is beside, where the owner is an `nn.Sequential`.
        call: Which of the owner's calls of what the address names it is at, elsewhere.
        whole: Whether the whole value of that call goes through it, not one of several tensors.
    """

    owner: str = ""
    key: str | None = None
    call: int = 0
    whole: bool = False


@dataclass(frozen=True)
class Insert(Edit):
    """A module put in.

    Attributes:
        module: The module.
        after: The address of the call whose value goes through it; or
        before: the address of the call that is given what it returns.
        name: Its name beside what it was put next to; by default its class's.
        index: Which tensor, where there are several: of the value, or of the arguments.
        path: The path it has in the model; decided when it is done.
        placed: Where it was put; decided when it is done.
    """

    kind: ClassVar[str] = "insert"
    module: ModuleSpec | None = None
    after: str | None = None
    before: str | None = None
    name: str | None = None
    index: int = 0
    path: str | None = decided()
    placed: tuple[Place, ...] = decided(())

    def __post_init__(self) -> None:
        if self.module is None:
            raise EditError("no module to put in", path="module", expected="a module: its type and arguments")
        if (self.after is None) == (self.before is None):
            raise EditError(
                "a module is put in at one place",
                found="no place" if self.after is None else f"after={self.after!r} and before={self.before!r}",
                expected="after=, or before=",
            )
        name = self.name
        if name is not None and not (isinstance(name, str) and name.isidentifier() and is_writable(name)):
            raise EditError("not a name for a module", path="name", found=self.name, expected="an identifier")
        if type(self.index) is not int or self.index < 0:
            raise EditError("not a number of a tensor", path="index", found=self.index, expected="0, 1, ...")

    def perform(self, work: Work) -> Insert:
        """Put it into `work.model`."""
        where = Address.of(work.model, str(self.before if self.after is None else self.after))
        spec = self.module or ModuleSpec()
        module = work.module(spec)
        if work.planning and module is spec.live:
            module = full_copy(module)
        _refuse_own(module, work.model)
        with kept_if_it_fails(module):
            return self._performed(work, where, module, spec.recorded())

    def _performed(self, work: Work, where: Address, module: nn.Module, recorded: ModuleSpec) -> Insert:
        fit(module, work.model, module.training)
        if self.placed and not work.check and not work.planning:
            fit(module, work.model, self._again(work, where, module)[0].training)
            return replace(self, module=recorded)
        elements = _elements(work, where)
        value = _passing(work, where, self.after is None) if elements else None
        if elements and isinstance(value, torch.Tensor) and self.index == 0:
            shape = tuple(value.shape)
            paths = {owner: name for name, owner in work.model.named_modules()}
            placed = [Place(paths[owner], key) for owner, key in elements]
            owners: list[nn.Module] = [*self._beside(elements, module)]
        else:
            shape, owners, placed = self._between(work, where, module)
        path = next(name for name, each in work.model.named_modules() if each is module)
        self._run(work, module, shape, path)
        if work.check:
            work.checked += check_insertion(work, where, path, before=self.after is None, index=self.index)
        fit(module, work.model, owners[0].training)
        return replace(self, module=recorded, path=path, placed=tuple(placed))

    def _again(self, work: Work, where: Address, module: nn.Module) -> list[nn.Module]:
        """Put it where it was put before, without running the model to find out where that is."""
        elements: list[tuple[nn.Sequential, str]] = []
        rooms: dict[str, tuple[Room, str]] = {}
        runs = Runs(work.model, work.inputs)
        for place in self.placed:
            owner = resolve(work.model, place.owner)
            if place.key is not None:
                if not isinstance(owner, nn.Sequential) or place.key not in owner._modules:
                    raise EditError("no such element any more", path=join(place.owner, place.key))
                elements.append((owner, place.key))
                continue
            if place.owner not in rooms:
                room = open_room(work, place.owner, runs)
                rooms[place.owner] = (room, self._free(room.free_name, module))
            room, name = rooms[place.owner]
            calls = _calls(room, work, where)
            if place.call >= len(calls):
                raise PathError("no such call", path=where.text, found=f"{len(calls)} calls")
            for node in calls[place.call]:
                if place.whole:
                    put_behind_whole(node, name)
                else:
                    (put_before if self.after is None else put_behind)(room, node, self.index, name)
        return [
            *self._beside(elements, module),
            *(room.close(work, {name: module}) for room, name in rooms.values()),
        ]

    def _beside(self, elements: list[tuple[nn.Sequential, str]], module: nn.Module) -> list[nn.Module]:
        """New elements of the `Sequential`s; returns these."""
        for owner, key in elements:
            name = self._free(partial(_free_key, owner), module)
            order = list(owner._modules)
            order.insert(order.index(key) + (self.after is not None), name)
            owner.add_module(name, module)
            members = dict(owner._modules)
            owner._modules.clear()
            owner._modules.update({each: members[each] for each in order})
        return [owner for owner, _ in elements]

    def _between(
        self, work: Work, where: Address, module: nn.Module
    ) -> tuple[tuple[int, ...], list[nn.Module], list[Place]]:
        """New calls in opened modules; returns the shape of what goes through, these modules, and where that is."""
        found = places(work, where.text)
        placed = []
        for room, nodes in found:
            whole = self.after is not None and all(isinstance(room.value(node)[0], torch.Tensor) for node in nodes)
            call = _calls(room, work, where).index(nodes)
            placed.append(Place(room.path, None, call, whole and self.index == 0))
        names: dict[Room, str] = {}
        shapes: list[tuple[int, ...]] = []
        for room, nodes in found:
            if room not in names:
                names[room] = self._free(room.free_name, module)
            for node in nodes:
                if self.after is None and not node.users:
                    raise EditError("its value is not used: it works in place, on what it is given", path=where.text)
                put = put_before if self.after is None else put_behind
                try:
                    shapes.append(put(room, node, self.index, names[room]))
                except EditError as error:
                    raise EditError(
                        error.message, path=where.text, found=error.found, expected=error.expected, hint=error.hint
                    ) from error
        if len(found) > 1:
            work.notes.append(f"{where.text!r} is called {len(found)} times: the module was put in at each")
        return shapes[0], [room.close(work, {name: module}) for room, name in names.items()], placed

    def _free(self, free: Callable[[str], str], module: nn.Module) -> str:
        wanted = self.name or type(module).__name__.lower()
        name = free(wanted)
        if self.name is not None and name != wanted:
            raise EditError("the name is taken", path="name", found=wanted, hint=repr(name))
        return name

    def _run(self, work: Work, module: nn.Module, shape: tuple[int, ...], path: str) -> None:
        """Whether it runs, for the shapes alone; notes the shapes."""
        address = str(self.before if self.after is None else self.after)
        kind = type(module).__name__
        train = False
        try:
            execution = run_fake(work.model, work.inputs)
            if not execution.calls_of(path):
                train = True
                execution = run_fake(work.model, work.inputs.with_batch(max(work.inputs.batch, 2)), train=True)
        except InputError as error:
            try:
                run_fake(work.before, work.inputs, train=train)
            except InputError:
                raise error from None  # it did not run before either
            made = _made(module, shape)
            raise EditError(
                f"what follows does not take what the {kind} returns: at {error.path!r}: {error.message}"
                if made is not None
                else f"the {kind} does not take the value there: {error.message}",
                path=address,
                found=list(shape if made is None else made),
                expected=None if made is None else list(shape),
            ) from error
        outputs = execution.calls_of(path)[0].outputs
        batch = max(work.inputs.batch, 1)
        after = (
            None
            if not outputs
            else tuple(
                1 if dim == 0 and size in (batch, max(batch, 2)) else size for dim, size in enumerate(outputs[0].shape)
            )
        )
        work.joints.append(Joint(address, shape, after, f"inserted: {kind} at {path!r}"))


def _calls(room: Room, work: Work, where: Address) -> list[tuple[fx.Node, ...]]:
    """The calls in a module's forward that an address without a number names."""
    if where.function is not None:
        return room.functions(where.function)
    return room.modules(work.model.get_submodule(where.path))


def _elements(work: Work, where: Address) -> list[tuple[nn.Sequential, str]]:
    """The elements of `Sequential`s that make all of the calls an address names; none where something else does."""
    if where.function is not None or where.path == "":
        return []
    in_eval, in_train = (callers(work.model, work.inputs, where.path, training) for training in (False, True))
    calls = [*in_eval, *in_train]
    if where.number is not None:
        counted = in_eval or in_train
        if where.number >= len(counted) or any(call.run for call in counted):
            return []
        calls = [counted[where.number]]
    child = work.model.get_submodule(where.path)
    found: list[tuple[nn.Sequential, str]] = []
    for call in calls:
        owner = work.model.get_submodule(call.owner)
        keys = [key for key, each in owner._modules.items() if each is child]
        if not isinstance(owner, nn.Sequential) or type(owner).forward is not nn.Sequential.forward:
            return []
        found.append((owner, keys[call.position]))
    return list(dict.fromkeys(found))


def _passing(work: Work, where: Address, before: bool) -> Any:
    """What a module returns, or is given, as fake tensors; at batch 1 where it runs there."""
    found: list[Any] = []

    def watch(twin: nn.Module) -> None:
        child = twin.get_submodule(where.path)
        found.clear()
        child.register_forward_hook(lambda _module, args, output: found.append(args[0] if before else output))

    for inputs, training in _ways(work.inputs):
        try:
            run_copy(work.model, inputs, training, watch)
        except EditError:
            continue
        if found:
            return found[0]
    return None


def _ways(inputs: Inputs) -> list[tuple[Inputs, bool]]:
    return [(inputs.with_batch(1), False), (inputs, False), (inputs.with_batch(max(inputs.batch, 2)), True)]


def _free_key(owner: nn.Module, wanted: str) -> str:
    number, name = 1, wanted
    while hasattr(owner, name):
        number += 1
        name = f"{wanted}_{number}"
    return name


def _made(module: nn.Module, shape: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that a module makes of one; `None` where it does not take it."""
    held = next((each for each in module.parameters() if each.is_floating_point()), torch.zeros(()))
    given = Inputs((torch.zeros(shape, dtype=held.dtype, device=held.device),))
    try:
        outputs = run_fake(module, given).calls_of("")[0].outputs
    except InputError:
        return None
    return outputs[0].shape if outputs else None


def _refuse_own(module: object, model: nn.Module) -> None:
    if not isinstance(module, nn.Module):
        return
    held = {id(each) for each in (*model.modules(), *model.parameters())}
    if any(id(each) in held for each in (*module.modules(), *module.parameters())):
        raise EditError(
            "the module to put in is part of the model, or shares weights with it",
            found=type(module).__name__,
            hint="copy.deepcopy(module)",
        )
