"""Read a whole model: open its modules one inside the other, and list every call in the order of execution."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn.utils.parametrize import is_parametrized

from torchtrim.errors import InputError, TraceError
from torchtrim.graph.copying import has_function_hooks, kept_random_state, paused_collection, structural_copy, unwrap
from torchtrim.graph.execution import known_inputs, refuse_lazy
from torchtrim.graph.fakes import Fakes
from torchtrim.graph.guards import GUARDS
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.opening import read_forward
from torchtrim.graph.reading import Evaluation, Reading, Value, function_name, same_graph
from torchtrim.graph.structure import leaves, map_leaves


def inputs_for(model: nn.Module, example_inputs: ExampleInputs | None) -> Inputs:
    """The example inputs given, on the model's device; or such as the model's history knows the shapes of.

    Raises:
        InputError: Neither.
    """
    inputs = Inputs.of(example_inputs) if example_inputs is not None else known_inputs(model)
    if inputs is None:
        raise InputError(
            f"the input shapes of this {type(model).__name__} are not known yet",
            expected="example_inputs: a tensor, or a tuple or dict of them",
            hint="pass example inputs as the second argument, such as torch.zeros(1, 3, 224, 224)",
        )
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), None)
    return inputs if device is None else inputs.map(lambda tensor: tensor.to(device))


@dataclass(eq=False)
class Frame:
    """One call of one opened module: its graph in each mode.

    Attributes:
        path: The module's path; `""` is the model itself.
        module: The module, in the reader's own copy of the model.
        eval: Its graph in eval mode.
        train: Its graph in train mode.
        differs: Whether the two graphs are different.
    """

    path: str
    module: nn.Module
    eval: Reading
    train: Reading
    differs: bool


@dataclass(eq=False)
class Site:
    """One call (of a module, a function or a method), one input, or one attribute, where it stands in its frame.

    Attributes:
        name: The path of a module or attribute; `"path:function"` for a function called by the module at `path`.
        op: `"input"`, `"module"`, `"function"`, `"method"` or `"attribute"`.
        owner: The frame whose forward makes the call.
        node: Its node in the owner's eval graph (in the train graph, where `mode` is `"train"`).
        mode: `"eval"` or `"train"`: the graph that `node` belongs to.
        target: The module, the function, the method's name, the value of an attribute, or which input tensor it is.
        args: Positional arguments; a `Site` stands for what it computes.
        kwargs: Keyword arguments, likewise.
        inside: The frame of the call itself, where its module was opened.
    """

    name: str
    op: str
    owner: Frame
    node: fx.Node
    mode: str
    target: Any
    args: Any = ()
    kwargs: Any = field(default_factory=dict)
    inside: Frame | None = None

    @property
    def inputs(self) -> list[Site]:
        """The sites whose values this one takes, each once, in order."""
        return list(dict.fromkeys(leaves((self.args, self.kwargs), Site)))


@dataclass(eq=False)
class Reader:
    """Reads a model, on a copy of its own that shares the weights.

    Attributes:
        wanted: Which modules to open, by path and module.
        enough: Whether the graph of the model's own forward, which could not be followed any further, will do.
        lenient: Where to note what the graph of the model's own forward cannot hold (a stretch without gradients);
            such a graph may be looked at, and not be run. `None`: refuse it.
        both_modes: Open modules whose graphs differ between train and eval mode too.
        root: That copy.
        closed: The modules that were to be opened and could not be, with the reason.
    """

    model: nn.Module
    inputs: Inputs
    wanted: Callable[[str, nn.Module], bool]
    both_modes: bool = False
    enough: Callable[[fx.Graph], bool] | None = None
    lenient: list[str] | None = None
    root: nn.Module = field(init=False)
    closed: dict[str, str] = field(default_factory=dict)
    frames: dict[str, list[Frame]] = field(init=False)
    sites: list[Site] = field(init=False)
    outputs: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        refuse_lazy(unwrap(self.model))
        self.root = structural_copy(unwrap(self.model), own_buffers=True)
        self.inputs.bind(self.root)
        self._fake = Fakes()
        self._names = {module: path for path, module in self.root.named_modules()}  # a shared one by its first name
        self._pairs: dict[Frame, dict[fx.Node, fx.Node]] = {}
        self._user_hooks = False
        self._split = False  # whether this part of the model is being walked once for each mode

    def read(self) -> Reader:
        """Read the model once. Called again after something was added to `closed`, it reads anew.

        Raises:
            TraceError: The model's own forward cannot be read.
        """
        with kept_random_state(), torch.enable_grad(), paused_collection():
            while True:
                self.frames, self.sites, self.outputs = {}, [], {}
                try:
                    self._read_root()
                except TraceError:
                    if self._user_hooks or not has_function_hooks(self.root):
                        raise
                    self._user_hooks = True  # one of them may change a shape
                    continue
                # A module that could not be opened at one of its calls is open at another: close it and read again.
                if not any(path in self.frames for path in self.closed):
                    return self

    def _read_root(self) -> None:
        tensors = self.inputs.tensors
        values = self._input_values()
        positions = {id(values[id(tensor)]): index for index, tensor in enumerate(tensors)}
        mapped = self.inputs.map(lambda tensor: values[id(tensor)])
        args, kwargs = mapped.args, mapped.kwargs
        in_eval, in_train = (
            read_forward(
                self.root,
                args,
                kwargs,
                wanted=self.wanted,
                closed=self.closed,
                enough=self.enough,
                lenient=self.lenient,
                evaluation=Evaluation(unwrap(self.model), training, self._fake, self._user_hooks),
            )
            for training in (False, True)
        )
        frame = Frame("", self.root, in_eval, in_train, not same_graph(in_eval.graph, in_train.graph))
        names = list(self.inputs.bind(self.root))
        sites: dict[int, Site] = {}

        def site_of(name: str, mode: str, value: Value) -> Site:
            if id(value) not in sites:
                node = next(iter(getattr(frame, mode).graph.nodes))
                sites[id(value)] = Site(f":{name}", "input", frame, node, mode, positions[id(value)])
                self.sites.append(sites[id(value)])
            return sites[id(value)]

        bound = Inputs(args, kwargs).bind(self.root)
        for mode in ("eval", "train") if frame.differs else ("eval",):
            self._split = frame.differs
            environment = {
                name: map_leaves(bound[name], Value, functools.partial(site_of, name, mode)) for name in names
            }
            self.outputs[mode] = self._walk(frame, mode, environment)
        self.outputs.setdefault("train", self.outputs["eval"])

    def _input_values(self) -> dict[int, Value]:
        batch = max(self.inputs.batch, 2)
        fakes = [
            self.inputs.with_batch(size).map(lambda tensor: self._fake.from_tensor(tensor.detach())).tensors
            for size in (batch, batch + 1)
        ]
        return {
            id(tensor): Value(functools.partial(tuple, pair))
            for tensor, pair in zip(self.inputs.tensors, zip(*fakes, strict=True), strict=True)
        }

    def _opened(self, frame: Frame, mode: str, node: fx.Node, path: str) -> Frame | None:
        """The frame of a child's call, where the child was opened in every mode that makes the call."""
        if path in self.closed:
            return None
        pairs = self._pairs[frame] = self._pairs.get(frame) or pair_nodes(frame)
        calls: tuple[fx.Node | None, fx.Node | None]
        if mode == "eval":
            calls = (node, pairs.get(node))
        else:
            calls = (next((left for left, right in pairs.items() if right is node), None), node)
        readings = [
            reading.children.get(each)
            for reading, each in zip((frame.eval, frame.train), calls, strict=True)
            if each is not None
        ]
        first, last = readings[0], readings[-1]
        if first is None or last is None:
            return None
        child = Frame(path, first.module, first, last, differs=not same_graph(first.graph, last.graph))
        if child.differs and not self.both_modes:
            self.closed[path] = "its graph differs between train and eval mode"
            return None
        if any(not same_graph(child.eval.graph, other.eval.graph) for other in self.frames.get(path, [])):
            self.closed[path] = "it is called several times, each time in another way"
            return None
        return child

    def _walk(self, frame: Frame, mode: str, bound: dict[str, Any]) -> Any:
        """List the sites of one frame; returns the structure of sites that it returns."""
        self.frames.setdefault(frame.path, []).append(frame)
        reading: Reading = getattr(frame, mode)
        results: dict[fx.Node, Any] = {}

        for node in reading.graph.nodes:
            args, kwargs = map_leaves((node.args, node.kwargs), fx.Node, results.__getitem__)
            if node.op == "output":
                return args[0]
            if node.op == "placeholder":
                name = str(node.target).strip("*")
                results[node] = bound.get(name, node.args[0] if node.args else None)
                continue
            if node.target in GUARDS:
                continue
            results[node] = self._visit(frame, mode, node, args, kwargs)
        raise TraceError("its graph has no output", path=frame.path)

    def _visit(self, frame: Frame, mode: str, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.op == "call_module":
            module = frame.module.get_submodule(str(node.target))
            path = self._names[module]
            site = Site(path, "module", frame, node, mode, module, args, kwargs)
            self.sites.append(site)
            site.inside = self._opened(frame, mode, node, path)
            if site.inside is None:
                return site
            bound = Inputs(args, kwargs).bind(module)
            if self._split or not site.inside.differs:
                return self._walk(site.inside, mode, bound)
            self._split = True
            result = self._walk(site.inside, "eval", bound)
            self._walk(site.inside, "train", bound)
            self._split = False
            return result
        if node.op == "get_attr":
            site = Site(join(frame.path, str(node.target)), "attribute", frame, node, mode, _attribute(frame, node))
        elif node.op == "call_method":
            site = Site(f"{frame.path}:{node.target}", "method", frame, node, mode, node.target, args, kwargs)
        else:
            picked = _pick(node.target, args)
            if picked is not _NOTHING:
                return picked
            site = Site(
                f"{frame.path}:{function_name(node.target)}", "function", frame, node, mode, node.target, args, kwargs
            )
        self.sites.append(site)
        return site


def addresses(sites: list[Site]) -> dict[str, Site]:
    """Every site by its address: its name, with `#k` behind it where several have that name.

    Sites of the train graph that the eval graph has too are left out.
    """
    counts: dict[tuple[str, str], int] = {}
    for site in sites:
        counts[site.mode, site.name] = counts.get((site.mode, site.name), 0) + 1
    seen: dict[tuple[str, str], int] = {}
    found: dict[str, Site] = {}
    for site in sorted(sites, key=lambda site: site.mode):  # "eval" comes before "train"
        key = (site.mode, site.name)
        several = max(counts.get(("eval", site.name), 0), counts.get(("train", site.name), 0)) > 1
        address = f"{site.name}#{seen.get(key, 0)}" if several else site.name
        seen[key] = seen.get(key, 0) + 1
        found.setdefault(address, site)
    return found


def pair_nodes(frame: Frame) -> dict[fx.Node, fx.Node]:
    """For each node of a frame's eval graph the one of its train graph that makes the same call, where there is one."""
    if not frame.differs:
        return dict(zip(frame.eval.graph.nodes, frame.train.graph.nodes, strict=True))
    counted: dict[tuple[Any, ...], list[fx.Node]] = {}
    for node in frame.train.graph.nodes:
        counted.setdefault((node.op, node.target), []).append(node)
    pairs = {}
    for node in frame.eval.graph.nodes:
        rest = counted.get((node.op, node.target))
        if rest:
            pairs[node] = rest.pop(0)
    return pairs


def has_rooms(path: str, module: nn.Module) -> bool:
    """Whether a module is worth opening: it has children, and they are not the parametrisations of its own weights."""
    return bool(module._modules) and not is_parametrized(module)


def join(parent: str, child: str) -> str:
    """The path of a module's child."""
    return f"{parent}.{child}" if parent else child


def ancestors(path: str) -> Iterator[str]:
    """The paths of the modules that a module lies in, outermost first; the model itself is `""`.

    Example:
        >>> list(ancestors("layer1.0.conv1"))
        ['', 'layer1', 'layer1.0']
    """
    yield ""
    parts = path.split(".")
    for length in range(1, len(parts)):
        yield ".".join(parts[:length])


_NOTHING = object()


def _pick(function: Any, args: Any) -> Any:
    """An item or attribute of a structure that is known, instead of a call that looks it up."""
    if function not in (operator.getitem, getattr) or len(args) < 2 or isinstance(args[0], str):
        return _NOTHING
    holder, key = args[0], args[1]
    if isinstance(holder, Site) and is_dataclass(holder.target) and isinstance(holder.target, type):
        # An output of transformers, made further up: by name, or by its place among those that are not None.
        values = [value for value in holder.kwargs.values() if value is not None]
        if isinstance(key, int) and function is operator.getitem and key < len(values):
            return values[key]
        return holder.kwargs.get(key, _NOTHING) if isinstance(key, str) else _NOTHING
    if isinstance(holder, Site):
        return _NOTHING
    if isinstance(key, Site) or not isinstance(holder, (tuple, list, dict)):
        return _NOTHING
    try:
        return function(holder, key)
    except (LookupError, AttributeError, TypeError):
        return _NOTHING  # a holder with ways of its own: the lookup stays a call


def _attribute(frame: Frame, node: fx.Node) -> Any:
    value: Any = frame.module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value
