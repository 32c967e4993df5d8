"""`trace`: a read-only picture of a model, as a list of the calls that it makes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from torchtrim.errors import PathError, TraceError, nearest
from torchtrim.graph.check import Mismatch, Side, compare, first_difference
from torchtrim.graph.copying import structural_copy, unwrap
from torchtrim.graph.execution import Execution, run_fake
from torchtrim.graph.head import head_sites
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.opened import OpenedModule, opened
from torchtrim.graph.paths import resolve
from torchtrim.graph.reader import Frame, Reader, Site, addresses, ancestors, has_rooms, inputs_for
from torchtrim.graph.structure import map_leaves
from torchtrim.graph.values import SiteValues


def trace(model: nn.Module, example_inputs: ExampleInputs | None = None, *, check: bool = True) -> ModuleGraph:
    """Read a model: every call in the order of execution, with its neighbours, shapes and cost.

    The model is read by `torch.fx` in eval and in train mode, one module at a time, so that a module that cannot be
    followed (its control flow depends on data, it keeps state, its graph differs between the modes) stays closed as a
    leaf while all others are open. The user's model is neither run nor changed: a copy that shares the weights is.

    Args:
        model: Any `nn.Module`; a compiled or `DistributedDataParallel` model is unwrapped.
        example_inputs: A tensor, a tuple of positional or a dict of keyword arguments. Arguments left out are held at
            their defaults. May be left out where the model's history knows the shapes.
        check: Run the graph against the original, in both modes, at several batch sizes and another input size. A
            module whose graph disagrees is closed. Costs about eight forwards and two backwards, and the memory of one
            training step; without it nothing is computed.

    Returns:
        The graph. Time and memory grow with the number of calls.

    Raises:
        TraceError: The model's own forward cannot be read; the reason is in the message.
        InputError: The model does not accept the example inputs.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))
        >>> graph = trace(net, torch.zeros(1, 3, 8, 8))
        >>> [node.address for node in graph]
        [':input', '0', '1', '2', '3']
        >>> graph.node("0").output_shape, graph.node("0").macs, graph.heads
        ((1, 8, 6, 6), 7776, ['3'])
        >>> graph.node("2").inputs, graph.node("2").users
        (('1',), ('3',))
    """
    model = unwrap(model)
    inputs = inputs_for(model, example_inputs)
    unheld: list[str] = []
    reader = Reader(model, inputs, wanted=has_rooms, lenient=unheld).read()
    checked: tuple[str, ...] = ("not checked",)
    while check:
        # Not the reader's copy: what ran on it may have left its traces there.
        candidate = open_all(reader, structural_copy(model))
        try:
            checked = compare(Side(model), Side(candidate), inputs, gradients=not unheld)
            break
        except Mismatch as error:
            suspects = {path for path in reader.frames if path}
            culprit = first_difference(model, candidate, error.variant, suspects)
            if not culprit:
                raise TraceError(error.message, path="the model") from error
            reader.closed[culprit] = f"its graph was wrong: {error.message}"
            reader.read()
    return ModuleGraph(reader, (*checked, *(f"not held by the graph: {reason}" for reason in dict.fromkeys(unheld))))


def open_all(reader: Reader, model: nn.Module) -> OpenedModule:
    """`model` with every module that was read replaced by its graph; parameters and leaves are shared with it."""
    inside: dict[Frame, dict[str, Frame]] = {}
    for site in reader.sites:
        if site.inside is not None:
            inside.setdefault(site.owner, {})[str(site.node.target)] = site.inside
    built: dict[str, OpenedModule] = {}

    def build(frame: Frame) -> OpenedModule:
        if frame.path not in built:
            children = {target: build(child) for target, child in inside.get(frame, {}).items()}
            graphs = (_copied(frame.eval.graph), _copied(frame.train.graph))
            built[frame.path] = opened(model.get_submodule(frame.path), *graphs, replacements=children)
        return built[frame.path]

    return build(reader.frames[""][0])


def _copied(graph: torch.fx.Graph) -> torch.fx.Graph:
    twin = torch.fx.Graph()
    twin.output(twin.graph_copy(graph, {}))
    return twin


@dataclass(frozen=True, eq=False)
class Node:
    """One call in a model, or one of its inputs, parameters or buffers.

    Attributes:
        address: The name that `cut` and others take. A module's call has its path; a function or method called by the
            module at `path` has `"path:name"` (`":flatten"` in the model's own forward). Where several have that name,
            `#0`, `#1`, ... behind it count them in the order of execution.
        path: The module that is called; of a function, the module whose forward calls it.
        op: `"input"`, `"module"`, `"function"`, `"method"` or `"attribute"` (a parameter or buffer).
        type: The class of the module, or the name of the function.
        modes: `"both"`, or `"eval"` or `"train"` where the call is made in that mode only.
        inputs: The addresses of the nodes whose values it takes.
        users: The addresses of the nodes that take its value.
    """

    address: str
    path: str
    op: str
    type: str
    modes: str
    inputs: tuple[str, ...]
    users: tuple[str, ...]
    params: int
    _values: SiteValues = field(repr=False)
    _site: Site = field(repr=False)

    @property
    def output_shape(self) -> Any:
        """The shape of the output: a list of them where it returns several tensors; `None` where it is no tensor, or
        depends on the values of the input.
        """
        return _described(self._values.outputs.get(self._site), lambda tensor: tuple(tensor.shape))

    @property
    def output_dtype(self) -> Any:
        """The type of the output's values, as in `output_shape`."""
        return _described(self._values.outputs.get(self._site), lambda t: str(t.dtype).removeprefix("torch."))

    @property
    def macs(self) -> int:
        """Multiply-accumulates of this call, at batch 1."""
        return self._values.macs.get(self._site, 0)


def _described(value: Any, describe: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return describe(value)
    if isinstance(value, dict):
        return {key: _described(item, describe) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        found = [_described(item, describe) for item in value]
        return found if any(item is not None for item in found) else None
    return None


class ModuleGraph:
    """A read-only picture of a model. Iterate over it for the nodes in the order of execution.

    Attributes:
        leaves: Why each module that has children, and was not looked into, stayed closed; by path.
        checked: What was compared with the original, in words.
    """

    def __init__(self, reader: Reader, checked: tuple[str, ...]) -> None:
        self._reader = reader
        self.checked = checked
        self.leaves: dict[str, str] = dict(reader.closed)

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """The nodes by address, in the order of execution."""
        sites = [site for site in self._reader.sites if site.inside is None]
        found = addresses(self._reader.sites)
        found = {address: site for address, site in found.items() if site.inside is None}
        address_of = {site: address for address, site in found.items()}
        merged = _merged(sites, address_of)
        train_only = _names_of(sites, "train") - _names_of(sites, "eval") if _names_of(sites, "train") else set()
        eval_only = _names_of(sites, "eval") - _names_of(sites, "train") if _names_of(sites, "train") else set()
        users: dict[str, list[str]] = {}
        for site in sites:
            for source in site.inputs:
                line = users.setdefault(merged[source], [])
                if merged[site] not in line:
                    line.append(merged[site])
        values = SiteValues(self._reader)
        counted: set[int] = set()
        nodes = {}
        for address, site in found.items():
            path = site.name.partition(":")[0] if ":" in site.name else site.name
            kind = type(site.target).__name__ if site.op in ("module", "attribute") else site.name.rpartition(":")[2]
            modes = {"eval": site.name in eval_only, "train": site.name in train_only}
            mode = next((mode for mode, only in modes.items() if only and site.op != "input"), "both")
            inputs = tuple(merged[source] for source in site.inputs)
            nodes[address] = Node(
                address,
                path,
                site.op,
                kind,
                mode,
                inputs,
                tuple(users.get(address, ())),
                _params(site, counted),
                values,
                site,
            )
        return nodes

    def node(self, address: str) -> Node:
        """The node with an address.

        Raises:
            PathError: There is none, or the module is never called, or was opened, or is called several times.
        """
        if address in self.nodes:
            return self.nodes[address]
        several = [name for name in self.nodes if name.partition("#")[0] == address]
        if several:
            raise PathError("it names several calls", path=address, found=len(several), hint=f"one of {several}")
        if address in self._reader.frames:
            inner = [name for name in self.nodes if name.startswith((f"{address}.", f"{address}:"))]
            raise PathError("it was opened: its calls are nodes of their own", path=address, hint=f"one of {inner[:3]}")
        for outer in ancestors(address.partition(":")[0]):
            if outer in self.leaves:
                raise PathError(f"it lies in {outer!r}, a leaf: {self.leaves[outer]}", path=address, hint=repr(outer))
        if address in dict(self._reader.root.named_modules()):
            raise PathError("it is never called for these inputs", path=address)
        raise PathError("no such node", path=address, hint=nearest(address, self.nodes))

    def calls(self, path: str) -> int:
        """How many times the module at `path` is called in one forward of eval mode; 0 for never.

        Raises:
            PathError: There is no such module.
        """
        target = resolve(self._reader.root, path)
        first = next(name for name, module in self._reader.root.named_modules() if module is target)
        return len(self._execution.calls_of(first))

    @cached_property
    def _execution(self) -> Execution:
        return run_fake(self._reader.model, self._reader.inputs)

    @cached_property
    def heads(self) -> list[str]:
        """The paths of the head's layers: the last ones with weights on the way to the outputs, in either mode."""
        return [site.name for site in head_sites(self._reader)]

    @property
    def outputs(self) -> Any:
        """The model's output in eval mode, with the address of a node where a tensor would be."""
        return self._addressed(self._reader.outputs["eval"])

    def _addressed(self, value: Any) -> Any:
        address_of = {site: address for address, site in addresses(self._reader.sites).items()}
        return map_leaves(value, Site, address_of.__getitem__)

    def __str__(self) -> str:
        lines = [f"{len(self)} nodes; head: {', '.join(self.heads) or 'none'}"]
        width = max((len(node.address) for node in self), default=0)
        lines += [
            f"{node.address:<{width}}  {node.type}  {node.output_shape}  <- {', '.join(node.inputs)}" for node in self
        ]
        lines += [f"closed: {path}: {reason}" for path, reason in self.leaves.items()]
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "nodes": [
                {
                    "address": node.address,
                    "path": node.path,
                    "op": node.op,
                    "type": node.type,
                    "modes": node.modes,
                    "inputs": list(node.inputs),
                    "users": list(node.users),
                    "output_shape": node.output_shape,
                    "output_dtype": node.output_dtype,
                    "params": node.params,
                    "macs": node.macs,
                }
                for node in self
            ],
            "heads": self.heads,
            "leaves": self.leaves,
            "checked": list(self.checked),
        }


def _merged(sites: list[Site], address_of: dict[Site, str]) -> dict[Site, str]:
    """Every site's address; a site of the train graph has that of the same call in the eval graph."""
    seen: dict[tuple[str, str], int] = {}
    by_place: dict[tuple[str, int], str] = {}
    merged: dict[Site, str] = {}
    for site in sites:
        index = seen.get((site.mode, site.name), 0)
        seen[site.mode, site.name] = index + 1
        address = address_of.get(site) or by_place.get((site.name, index), site.name)
        by_place.setdefault((site.name, index), address)
        merged[site] = address
    return merged


def _names_of(sites: list[Site], mode: str) -> set[str]:
    return {site.name for site in sites if site.mode == mode}


def _params(site: Site, counted: set[int]) -> int:
    """How many parameters a call brings in; shared ones count where they are met first."""
    if site.op == "module":
        held = list(site.target.parameters())
    else:
        held = [site.target] if isinstance(site.target, nn.Parameter) else []
    new = [parameter for parameter in held if id(parameter) not in counted]
    counted.update(id(parameter) for parameter in new)
    return sum(parameter.numel() for parameter in new)
