"""`replace`: other modules in place of some, by path, glob, type or predicate."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import torch
from torch import fx, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from torchtrim.edits.addresses import Address, places
from torchtrim.edits.apply import run
from torchtrim.edits.edit import Edit
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.module_state import difference
from torchtrim.edits.module_types import name_of
from torchtrim.edits.placing import fit
from torchtrim.edits.replace_check import check_opening, check_runs, refuse_unused
from torchtrim.edits.rewire import Room, call_by_name
from torchtrim.edits.work import Work
from torchtrim.errors import EditError, SelectionError
from torchtrim.graph.copying import full_copy, unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.opened import has_output_hooks
from torchtrim.graph.paths import What, find

Change: TypeAlias = Callable[..., nn.Module | None]  # of the old module, or of its path and it


def replace(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    what: What,
    new: nn.Module | Change,
    *,
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Put other modules in place of some.

    The place keeps its path, and the model its class. A module that the model refers to by several names, or calls
    several times, is replaced by one module everywhere; `"path#k"` is one of its calls, and needs the module that makes
    the call to be opened, as does the address of a function.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`.
        what: A path, a glob, a module type, a predicate of (path, module), the address of a function
            (`"layer1.0:relu"`) or of one call (`"act#1"`), or a list of these. What lies inside a module that is
            replaced goes with it.
        new: A module, of which every place gets a copy of its own, weights too; or a function of the old module, or of
            (path, old module), that returns the new one, or `None` to leave the old one in its place. It gets a copy
            of the old one, and may change it or use it as part of the new one: weights that it does not write to are
            the old ones again. In a module, `Old()` stands for the old.
        copy: Copy the parameters. Without it the model itself is changed, as for `cut`.
        check: Run the result in both modes, at several batch sizes and another input size, with a backward; what is
            replaced may compute something else, so the history says by how much the output differs, and nothing is
            demanded of it. Where a module had to be opened, the opened one is compared with the original.

    The new modules take over the mode of the old ones, and are taken to the model's device, and to its type of values
    where they have the default one. A module that is put in place of a function is called with that function's tensors.

    Raises:
        PathError: No such path or address.
        SelectionError: Nothing fits `what`.
        EditError: The model does not run with the new modules (the shapes are in the message), or the place lies in a
            module that cannot be opened.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2), nn.ReLU())
        >>> replace(net, torch.zeros(1, 4), nn.ReLU, nn.ReLU6())[3]
        ReLU6()
        >>> halved = replace(net, torch.zeros(1, 4), "0", lambda old: nn.Linear(4, old.out_features, bias=False))
        >>> halved[0]
        Linear(in_features=4, out_features=8, bias=False)
    """
    model = unwrap(model)
    if isinstance(new, type) or not (isinstance(new, nn.Module) or callable(new)):
        name = new.__name__ if isinstance(new, type) else ""
        raise EditError(
            "what to put in is a module, or a function that makes one of the old one",
            found=repr(new),
            hint=f"{name}()" if name else None,
        )
    addresses, selected = _split(what)
    paths = tuple(find(model, selected)) if selected else ()
    if isinstance(new, nn.Module):
        edit = Replace((*paths, *addresses), module=ModuleSpec.of(new))
    else:
        edit = Replace((*paths, *addresses))
        edit.__dict__["_change"] = new
    return run(model, example_inputs, [edit], copy=copy, check=check)


@dataclass(frozen=True)
class Replace(Edit):
    """Other modules in place of some.

    Attributes:
        what: The places: paths, globs and addresses of calls.
        types: The classes that are replaced among these; any, where it is empty. Without `what`, in the whole model.
        module: What each place gets a copy of.
        modules: What each place got, by address; decided when it is done.
    """

    kind: ClassVar[str] = "replace"
    what: tuple[str, ...] = ()
    types: tuple[str, ...] = ()
    module: ModuleSpec | None = None
    modules: dict[str, ModuleSpec] = field(default_factory=dict)

    @property
    def change(self) -> Change | None:
        """The function that makes the new module of the old, as long as the edit was not recorded."""
        return self.__dict__.get("_change")

    def __str__(self) -> str:
        if self.modules:
            pairs = [f"{address}: {spec}" for address, spec in self.modules.items()]
        else:
            pairs = [f"{address}: {self.module or 'a function of the old'}" for address in self.what or self.types]
        more = f", and {len(pairs) - 2} more" if len(pairs) > 2 else ""
        return f"replace({', '.join(pairs[:2])}{more})"

    def perform(self, work: Work) -> Replace:
        """Replace them in `work.model`."""
        wanted = self._wanted(work)
        if not wanted:
            raise SelectionError("there is nothing to replace", found=", ".join(self.what) or "no place")
        calls = [place.where.text for place in wanted if place.is_call]
        calls += call_by_name(work, [place.where.path for place in wanted if not place.is_call])
        refuse_unused(work, {place.where.path: place.module for place in wanted if not place.is_call})
        for place in wanted:
            fit(place.module, work.model, place.module.training)
            if place.is_call:
                _call(work, place)
            else:
                _put(work, place)
        check_runs(work, {place.where.text: place.module for place in wanted})
        if work.check and calls:
            check_opening(work, calls)
        for place in wanted:
            fit(place.module, work.model, place.training)
        modules = {place.where.text: place.spec for place in wanted}
        return dataclasses.replace(self, module=None, modules=modules)

    def _wanted(self, work: Work) -> list[_Place]:
        """The places and what each gets, without those that lie inside others; calls of one name from the last on."""
        model = work.model
        found: list[_Place] = []
        for address in self.modules or self._addresses(model):
            where = Address.of(model, address)
            if where.function is None and where.path == "":
                raise EditError("that is the whole model", path="''", hint="the path of a module in it")
            if not any(where.path == each or where.path.startswith(f"{each}.") for each in _gone(found)):
                new = self._new(work, where)
                if new is not None:
                    training = model.get_submodule(where.path).training
                    found.append(_Place(where, *new, training))
        return sorted(found, key=lambda place: -(place.where.number or 0))

    def _addresses(self, model: nn.Module) -> list[str]:
        calls, selected = _split(self.what or ("**",))

        def fits(_path: str, module: nn.Module) -> bool:
            return not self.types or any(_is_named(kind, name) for kind in type(module).__mro__ for name in self.types)

        fits.__name__ = f"its type is {' or '.join(self.types)}"
        where = fits if self.types else None
        return [*(find(model, selected, where=where) if selected else ()), *calls]

    def _new(self, work: Work, where: Address) -> tuple[nn.Module, ModuleSpec] | None:
        """What a place gets, and the record of it."""
        old = None if where.function is not None else work.model.get_submodule(where.path)
        spec = self.modules.get(where.text, self.module)
        if spec is not None:
            new = full_copy(spec.live) if spec.live is not None else work.module(spec)
        elif self.change is None:
            raise EditError("nothing is said to be put there", path="module", expected="a module")
        elif old is None:
            raise EditError("at a function there is no old module to make a new one of", path=where.text)
        else:
            given = full_copy(old)  # so that a function that changes it changes no more than its own
            pairs = list(zip(_tensors(old), _tensors(given), strict=True))
            made = self.change(*((given,) if _takes_one(self.change) else (where.path, given)))
            modules = {*given.modules(), *(made.modules() if isinstance(made, nn.Module) else ())}
            same = _share_again(pairs, modules) and difference(old, given) is None
            if made is None or (made is given and same):
                return None
            if not isinstance(made, nn.Module):
                raise EditError(
                    "the function returned no module", path=where.text, found=repr(made), expected="a module"
                )
            new = _exchanged(made, lambda each: each is given, Old()) if same else made
        recorded = ModuleSpec.of(new).recorded()
        if old is None and any(isinstance(each, Old) for each in new.modules()):
            raise EditError("at a function there is no old module to put into the new one", path=where.text)
        return new if old is None else _exchanged(new, lambda each: isinstance(each, Old), old), recorded


class Old(nn.Module):
    """Stands for the module that is replaced, in the one that replaces it: in a record, and in what `replace` is given.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2))
        >>> replace(net, torch.zeros(1, 4), "0", nn.Sequential(nn.Dropout(0.1), Old()))[0]
        Sequential(
          (0): Dropout(p=0.1, inplace=False)
          (1): Linear(in_features=4, out_features=2, bias=True)
        )
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input: by itself it does nothing."""
        return x


@dataclass(frozen=True)
class _Place:
    """One place, what it gets, and the mode that it is in."""

    where: Address
    module: nn.Module
    spec: ModuleSpec
    training: bool

    @property
    def is_call(self) -> bool:
        """Whether one call is replaced, and not a module wherever it is called."""
        return self.where.function is not None or self.where.number is not None


def _share_again(pairs: list[tuple[torch.Tensor, torch.Tensor]], modules: Iterable[nn.Module]) -> bool:
    """Put a module's tensors in place of their copies, but for those written to; returns whether none was."""
    same = [(one, other) for one, other in pairs if _is_same(one, other)]
    own = {id(other): one for one, other in same}
    for module in modules:
        members: Any  # parameters, then buffers
        for members in (module._parameters, module._buffers):
            members.update({name: own.get(id(held), held) for name, held in members.items()})
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]
    return len(same) == len(pairs)


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.is_meta or is_lazy(one):
        return True
    kinds = [(each.dtype, each.device, each.requires_grad) for each in (one, other)]
    return kinds[0] == kinds[1] and torch.equal(one, other)


def _gone(found: list[_Place]) -> Iterator[str]:
    return (place.where.path for place in found if not place.is_call)


def _exchanged(module: nn.Module, meant: Callable[[nn.Module], bool], other: nn.Module) -> nn.Module:
    """A module with another in place of those inside it, or of itself, that are meant."""
    if meant(module):
        return other
    holders = [
        (each, name)
        for each in module.modules()
        for name, child in each._modules.items()
        if child is not None and meant(child)
    ]
    for holder, name in holders:
        holder._modules[name] = other
    return module


def _put(work: Work, place: _Place) -> None:
    path = place.where.path
    old = work.model.get_submodule(path)
    if has_output_hooks(old) or old._forward_pre_hooks:
        work.notes.append(f"hooks on {path!r} went with the old module")
    work.put(path, place.module)


def _call(work: Work, place: _Place) -> None:
    """Call a new child instead, in the opened module."""
    names: dict[Room, str] = {}
    for room, nodes in places(work, place.where.text):
        name = names.setdefault(room, room.free_name(type(place.module).__name__.lower()))
        for node in nodes:
            _replace_node(room, node, name, place.where)
    for room, name in names.items():
        room.close(work, {name: place.module})
    if place.where.function is not None:
        work.gone.append(place.where.text)


def _replace_node(room: Room, node: fx.Node, name: str, where: Address) -> None:
    if not node.users:
        raise EditError("its value is not used: it works in place, on what it is given", path=where.text)
    args, kwargs = node.args, node.kwargs
    if where.function is not None:
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, fx.Node)]
        args = tuple(leaf for leaf in given if isinstance(room.value(leaf)[0], torch.Tensor))
        kwargs = {}
    with node.graph.inserting_before(node):
        new = node.graph.call_module(name, args, kwargs)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _split(what: object) -> tuple[list[str], list[Any]]:
    """The addresses of calls in a selection, and the rest of it."""
    items = list(what) if isinstance(what, Sequence) and not isinstance(what, str) else [what]
    if not items:
        raise SelectionError("there is nothing to replace", found="an empty list")
    calls = [item for item in items if isinstance(item, str) and (":" in item or "#" in item)]
    return calls, [item for item in items if item not in calls]


def _is_named(kind: type, name: str) -> bool:
    return name_of(kind) == name if ":" in name else kind.__name__ == name.rpartition(".")[2]


def _takes_one(function: Callable[..., Any]) -> bool:
    """Whether a function takes the old module alone; else it takes the path too."""
    try:
        signature = inspect.signature(function)
    except ValueError:
        return True  # some builtins have none to read
    try:
        signature.bind(nn.Identity())
    except TypeError:
        try:
            signature.bind("", nn.Identity())
        except TypeError as error:
            raise EditError(
                f"a function that makes the new module takes the old one, or its path and the old one: {error}",
                found=getattr(function, "__name__", type(function).__name__) + str(signature),
                hint="lambda old: ...",
            ) from error
        return False
    return True
