"""Open the one module whose forward makes a call, change its graphs, and put it back.

Only that module is read, as it is called in the model: what is around it need not be readable.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchtrim.edits.calls import Runs, called_past_name, callers, held_plainly, modules_in
from torchtrim.edits.work import Work
from torchtrim.errors import EditError, PathError, TraceError
from torchtrim.graph.copying import kept_random_state, paused_collection, structural_copy
from torchtrim.graph.guards import GUARDS, expect, expect_argument, expect_given
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.opened import opened
from torchtrim.graph.opening import read_forward
from torchtrim.graph.reader import Frame, pair_nodes
from torchtrim.graph.reading import RESERVED, Evaluation, Reading, Value, function_name, same_graph


def open_room(work: Work, path: str, runs: Runs | None = None) -> Room:
    """Read the forward of one module of `work.model`, in both modes; `""` is the model itself.

    Args:
        work: The model that is worked on.
        path: The module.
        runs: What runs of the model as it is now showed.

    Raises:
        EditError: It cannot be read, or is called several times, each time in another way.
        PathError: It is never called.
    """
    reader = _RoomReader(work.model, work.inputs, path, runs or Runs(work.model, work.inputs))
    with kept_random_state(), torch.enable_grad(), paused_collection():
        readings = {training: reader.readings(training) for training in (False, True)}
    first = {training: found[0] for training, found in readings.items() if found}
    if not first:
        raise PathError("it is never called for these inputs", path=path, hint="a path that tt.trace lists")
    in_eval, in_train = first.get(False, first.get(True)), first.get(True, first.get(False))
    if in_eval is None or in_train is None:
        raise PathError("it is never called for these inputs", path=path)
    frame = Frame(path, in_eval.module, in_eval, in_train, not same_graph(in_eval.graph, in_train.graph))
    return Room(path, work.model.get_submodule(path), frame, max(map(len, readings.values())))


def call_by_name(work: Work, paths: Iterable[str]) -> list[str]:
    """See that modules are called by the names that the model has for them, so that others can take their places.

    A forward may also reach one through a list, a tuple, a dict or an object that it keeps besides: it would go on
    calling the old one. The module that does is opened, and calls it by name then. A `TransformerEncoderLayer` loses
    its fast path, which reads the weights of its layers instead of calling them.

    Args:
        work: The model that is worked on.
        paths: The modules that are about to be replaced.

    Returns:
        Those that were not.

    Raises:
        EditError: One of these cannot be.
    """
    by_name: list[str] = []
    held = held_plainly(work.model)
    for path in paths:
        _without_fused_kernels(work.model, path)
        child = work.model.get_submodule(path)
        if path == "" or child not in held:
            continue
        calls = [callers(work.model, work.inputs, path, training) for training in (False, True)]
        if not any(calls):
            raise _hidden(path, "it is never called by its name for these inputs")
        if not called_past_name(work.model, work.inputs, path):
            continue
        for owner in dict.fromkeys(call.owner for each in calls for call in each):
            try:
                open_room(work, owner).close(work)
            except EditError as error:
                raise _hidden(path, f"{owner or 'the model'!r} cannot be opened: {error.message}") from error
            attributes = work.model.get_submodule(owner).__dict__
            for name in [name for name, value in attributes.items() if child in modules_in(name, value)]:
                del attributes[name]
        if calls != [callers(work.model, work.inputs, path, training) for training in (False, True)]:
            raise _hidden(path, "the forward that does calls its methods")
        by_name.append(path)
    return by_name


def _without_fused_kernels(model: nn.Module, path: str) -> None:
    """torch's encoder may hand the weights of what is in it to one kernel, and call nothing of it: that is off then."""
    child = model.get_submodule(path)
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and child is not module and child in set(module.modules()):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and child is not module and child in set(module.modules()):
            module.use_nested_tensor = False


def _hidden(path: str, reason: str) -> EditError:
    return EditError(
        "a list, a dict or an object that is no nn.Module refers to it, and would go on calling it when another "
        f"has its place: {reason}",
        path=path,
        hint="an nn.ModuleList or nn.ModuleDict there",
    )


@dataclass(eq=False)
class Room:
    """The forward of one module as graphs, which may be changed.

    Attributes:
        path: The module's path.
        module: The module, in the model that is worked on.
        frame: Its forward as it was read.
        calls: How many times one forward of the model calls it: a change holds for all of them.
        graphs: What will run: one graph, or that of eval mode and that of train mode where they differ. Copies of the
            frame's; change these.
    """

    path: str
    module: nn.Module
    frame: Frame
    calls: int
    graphs: tuple[fx.Graph, ...] = field(init=False)

    def __post_init__(self) -> None:
        sources = (self.frame.eval.graph, self.frame.train.graph)[: 2 if self.frame.differs else 1]
        self._twins: list[dict[fx.Node, fx.Node]] = [{} for _ in sources]
        self.graphs = tuple(
            _copy_of(source, twins, self.path) for source, twins in zip(sources, self._twins, strict=True)
        )
        self._used = _used(self.graphs)
        self._taken: set[str] = set()

    def on(self, work: Work) -> Room:
        """The same module opened in another copy of the model, without reading it again."""
        return Room(self.path, work.model.get_submodule(self.path), self.frame, self.calls)

    def modules(self, child: nn.Module) -> list[tuple[fx.Node, ...]]:
        """The calls of a child: for each its node in every graph that makes it, eval first."""
        return self._calls(
            lambda node: node.op == "call_module" and self.module.get_submodule(str(node.target)) is child
        )

    def functions(self, name: str) -> list[tuple[fx.Node, ...]]:
        """The calls of functions or methods of this name, likewise."""
        return self._calls(lambda node: node.op in ("call_function", "call_method") and _is_named(node, name))

    def function_names(self) -> list[str]:
        """The names of all functions and methods that the forward calls, in order."""
        nodes = (node for graph in self.graphs for node in graph.nodes if node.op in ("call_function", "call_method"))
        return [function_name(node.target) for node in nodes if node.target not in GUARDS]

    def value(self, node: fx.Node) -> tuple[Any, Any]:
        """The fake values of a node that was read, at two batch sizes.

        Raises:
            EditError: The shapes cannot be told without data.
        """
        for reading, twins in zip((self.frame.eval, self.frame.train), self._twins, strict=False):
            source = next((one for one, twin in twins.items() if twin is node), None)
            if source is not None:
                try:
                    return reading.evaluate(source)
                except Exception as error:
                    raise EditError(f"its shape cannot be told: {error}", path=f"{self.path}:{node.name}") from error
        raise EditError("it was put in after the forward was read", path=f"{self.path}:{node.name}")

    def free_name(self, wanted: str) -> str:
        """A name for a new child: `wanted`, with a number behind it where that is taken."""
        number, name = 1, wanted
        while name in self._taken or name in RESERVED or hasattr(self.module, name):
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name

    def close(self, work: Work, new: Mapping[str, nn.Module] | None = None) -> nn.Module:
        """Put the module with the changed forward in place of the old one, wherever that is referred to.

        What the changed graphs have no use for any more is left out; what was never used stays.

        Args:
            work: The model that is worked on.
            new: The modules that new nodes call, by their name in this module.
        """
        for graph in self.graphs:
            graph.lint()
        call_by_name(work, [self.path])
        source = work.model.get_submodule(self.path)
        module = opened(source, *self.graphs, replacements=dict(new or {}))
        _keep_unused(source, module, "", self._used)
        _keep_attributes(source, module)
        work.put(self.path, module)
        return module

    def _calls(self, wanted: Any) -> list[tuple[fx.Node, ...]]:
        pairs = pair_nodes(self.frame) if self.frame.differs else {}
        found: list[tuple[fx.Node, ...]] = []
        for source, twin in self._twins[0].items():
            if wanted(twin):
                pair = pairs.get(source)
                found.append((twin,) if pair is None else (twin, self._twins[1][pair]))
        if self.frame.differs:
            # Calls that train mode alone makes come behind the others, as `tt.trace` counts them.
            paired = {pairs[source] for source in self._twins[0] if source in pairs}
            found += [(twin,) for source, twin in self._twins[1].items() if wanted(twin) and source not in paired]
        return found


def _is_named(node: fx.Node, name: str) -> bool:
    return node.target not in GUARDS and function_name(node.target) == name


def _copy_of(source: fx.Graph, twins: dict[fx.Node, fx.Node], path: str) -> fx.Graph:
    """A copy whose guards name the module's place in the model, not in the reading."""
    graph = fx.Graph()
    for node in source.nodes:
        twins[node] = graph.node_copy(node, twins.__getitem__)
        position = {expect: 3, expect_argument: 2, expect_given: 1}.get(node.target)
        if position is not None:
            twins[node].update_arg(position, path)
    return graph


def _used(graphs: tuple[fx.Graph, ...]) -> set[str]:
    return {str(node.target) for graph in graphs for node in graph.nodes if node.op in ("call_module", "get_attr")}


def _keep_unused(source: nn.Module, target: nn.Module, prefix: str, used: set[str]) -> None:
    """Give `target` the members that the forward did not use before either, in the order of `source`."""

    def was_used(path: str) -> bool:
        return any(each == path or each.startswith(f"{path}.") for each in used)

    for kind in ("_parameters", "_buffers", "_modules"):
        held, kept = source.__dict__[kind], target.__dict__[kind]
        new = {name: kept[name] for name in kept if name not in held}
        both = {
            name: kept.get(name, value)
            for name, value in held.items()
            if name in kept or (value is not None and not was_used(f"{prefix}{name}"))
        }
        target.__dict__[kind] = both | new
    names = target._buffers
    target._non_persistent_buffers_set = source._non_persistent_buffers_set & set(names)
    for name, child in source._modules.items():
        twin = target._modules.get(name)
        if child is not None and twin is not None and twin is not child and f"{prefix}{name}" not in used:
            _keep_unused(child, twin, f"{prefix}{name}.", used)


def _keep_attributes(source: nn.Module, target: nn.Module) -> None:
    """Give `target` the plain attributes of `source`: counts and settings that other code may ask for."""
    members = set(target.modules())
    for name, value in source.__dict__.items():
        plain = not name.startswith("_") and not callable(value) and not isinstance(value, (fx.Graph, fx.Node))
        if plain and name not in RESERVED and name not in target.__dict__ and modules_in(name, value) <= members:
            target.__dict__[name] = value


class _RoomReader:
    """Reads one module of a model as it is called there, on copies."""

    def __init__(self, model: nn.Module, inputs: Inputs, path: str, runs: Runs) -> None:
        self.model = model
        self.inputs = inputs
        self.path = path
        self.runs = runs
        self.user_hooks = False

    def readings(self, training: bool) -> list[Reading]:
        """One reading for every call in one mode; all are the same graph."""
        batch = max(self.inputs.batch, 2)
        runs = {batch: self._captured(training, batch)}
        found: list[Reading] = []
        for number, call in enumerate(runs[batch]):

            def value_of(index: int, number: int = number) -> Value:
                def one(size: int) -> Any:
                    if size not in runs:
                        runs[size] = self._captured(training, size)
                    return pytree.tree_leaves(runs[size][number])[index]

                return Value(lambda: (one(batch), one(batch + 1)))

            reading = self._read(call, value_of, training)
            if found and not same_graph(found[0].graph, reading.graph):
                raise EditError("it is called several times, each time in another way", path=self.path or "the model")
            found.append(reading)
        return found

    def _read(self, call: Any, value_of: Any, training: bool) -> Reading:
        flat, form = pytree.tree_flatten(call)
        failed: TraceError | None = None
        # A number that is passed on (a height) may be another for another input; it is a constant where it must be one.
        for kinds in ((torch.Tensor, int), (torch.Tensor,)):
            values = [
                value_of(index) if isinstance(leaf, kinds) and not isinstance(leaf, bool) else leaf
                for index, leaf in enumerate(flat)
            ]
            args, kwargs = pytree.tree_unflatten(values, form)
            owner = structural_copy(self.model.get_submodule(self.path), own_buffers=True)
            try:
                return read_forward(
                    owner,
                    args,
                    kwargs,
                    wanted=lambda path, module: False,
                    closed={},
                    evaluation=Evaluation(owner, training, self.runs.fake, self.user_hooks),
                )
            except TraceError as error:
                failed = failed or error
        reason = "it cannot be read" if failed is None else failed.message
        raise EditError(
            f"it cannot be opened: {reason}", path=self.path or "the model", hint="a module inside it, or around it"
        ) from failed

    def _captured(self, training: bool, batch: int) -> list[Any]:
        """What the module is given at each of its calls, as fake tensors."""
        if not self.path:
            inputs = self.inputs.with_batch(batch)
            return [self.runs.faked((inputs.args, inputs.kwargs))]
        found = self.runs.given(self.path, training, batch)
        self.user_hooks = self.runs.took_user_hooks(training, batch)
        return found
