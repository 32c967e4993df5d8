"""Run a model on tensors without values, in both modes, and follow the channels of every value through it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.channels.demands import Watching
from torchtrim.channels.labels import Channels, Label
from torchtrim.channels.rulebook import rule_for
from torchtrim.channels.rules import OpCall, extent_of, shape_of, tensors_in
from torchtrim.channels.run import Flow, ModuleCall, Run, Step, Values, cost_of, shape_after
from torchtrim.channels.stage import Stage, plain_recurrence
from torchtrim.channels.widths import Attribute, Demands, mark
from torchtrim.errors import EditError, TorchTrimError
from torchtrim.graph.copying import has_function_hooks, kept_random_state, paused_collection
from torchtrim.graph.execution import no_fused_attention
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.operators import bound, draws

__all__ = ["Flow", "ModuleCall", "Run", "Step", "follow", "rerun", "shape_after"]


class NotFollowable(EditError):
    """A forward that does not run on shapes alone.

    Attributes:
        run: What it did until then.
    """

    run: Run | None = None


def follow(model: nn.Module, inputs: Inputs, *, dead: frozenset[str] = frozenset()) -> Flow:
    """Follow the channels of a model through its forward in both modes.

    Nothing is computed but shapes. Parameters and buffers have channels along each of their dimensions; the model's
    inputs have none, for they cannot be narrowed.

    Args:
        model: The model. It is left as it was.
        inputs: Example inputs.
        dead: Paths of modules whose output is to be taken out, with all that only comes of it.

    Raises:
        EditError: The forward cannot be followed on shapes alone, or cannot do without a dead branch.
    """
    channels = Channels()
    tensors = {id(tensor): label for tensor, label in _labelled(model, channels)}
    flow = Flow(channels, tensors, [])
    stages = [Stage(model, blank=blank) for blank in (True, False)]
    with paused_collection():
        for training in (False, True):
            run, follower = _run(model, inputs, training, stages, channels, tensors, dead)
            flow.runs.append(run)
            flow.demands += follower.demands.demands
            flow.ties += follower.demands.ties.values()
            flow.equal_parts += follower.demands.equal_parts
            flow.numbers |= follower.numbers
    return flow


def rerun(model: nn.Module, inputs: Inputs, like: Sequence[Run]) -> Iterator[Run]:
    """The forwards of a changed model, for their shapes alone, in the modes and in the ways of earlier ones.

    Raises:
        NotFollowable: One does not run.
    """
    stages = {blank: Stage(model, blank=blank) for blank in (True, False)}
    for run in like:
        with paused_collection():
            yield _run(model, inputs.with_batch(run.batch), run.training, [stages[run.blank]], None, {}, frozenset())[0]


def _labelled(model: nn.Module, channels: Channels) -> Iterator[tuple[torch.Tensor, Label]]:
    """Every parameter and buffer with its label. In a grouped layer each group has input channels of its own."""
    seen: set[int] = set()
    for module in model.modules():
        grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
        for part in module.modules() if grouped else (module,):
            for tensor in (*part._parameters.values(), *part._buffers.values()):
                if tensor is None or id(tensor) in seen:
                    continue
                seen.add(id(tensor))
                label = channels.leaf(shape_of(tensor))
                if grouped and tensor.dim() > 2 and tensor.shape[1] > 1:
                    label = _grouped(tensor, int(module.groups), channels)  # type: ignore[arg-type]
                yield tensor, label


def _grouped(weight: torch.Tensor, groups: int, channels: Channels) -> Label:
    rows, columns = shape_of(weight)[:2]
    ones = (1,) * (weight.dim() - 2)
    table = channels.new((groups, columns)).repeat(rows // groups, axis=0)
    label = channels.leaf((rows, 1, *shape_of(weight)[2:]))
    return Label((*label.layers, table.reshape(rows, columns, *ones)), static=True)


_NONE = Label(static=True)
_RELABELS = ("bmm", "baddbmm")  # what these are given may turn out to have as many matrices as something else


class _Follower(TorchDispatchMode):
    """Sees every operator; keeps the label of every tensor."""

    def __init__(self, run: Run, stage: Stage, channels: Channels | None, dead: frozenset[str]) -> None:
        TorchDispatchMode.__init__(self)
        self.run = run
        self.compute = stage.caller()
        self.channels = channels
        self.dead = dead
        self.known: dict[int, tuple[torch.Tensor, Label]] = {}
        self.stack: list[tuple[str, nn.Module]] = []
        self.returned: set[int] = set()
        self.demands = Demands()
        self.repeating = 0
        self.numbers: dict[Attribute, int] = {}

    def where(self, name: str) -> str:
        """A call that is made now, in words."""
        path = self.stack[-1][0] if self.stack else ""
        return f"`{name}` in {path!r}" if path else f"`{name}` in the model's forward"

    def label(self, tensor: torch.Tensor) -> Label:
        """The label of a tensor: a constant has channels of its own."""
        found = self.known.get(id(tensor))
        if found is None:
            if self.channels is None:
                return _NONE
            label = self.channels.leaf(shape_of(tensor))
            self.give(tensor, label)
            return label
        return found[1]

    def give(self, tensor: torch.Tensor, label: Label) -> None:
        """Remember a tensor's label, and the tensor, so that no other gets its identity."""
        self.known[id(tensor)] = (tensor, label)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled():
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        out = _batch_normed(args) if func is torch.ops.aten.native_batch_norm.default else None
        out = self.compute(func, args, kwargs) if out is None else out
        results = tensors_in(out)
        if not results:
            return out
        path, module = self.stack[-1] if self.stack else ("", None)
        name = _name(func)
        where = self.where(name)
        self.run.random |= draws(func, args, kwargs)
        macs, cost = 0, None
        read: Values = ()
        if self.channels is not None:
            read = self.values((args, kwargs))
            self._label(func, name, args, kwargs, out, results, where, module)
            macs, cost = cost_of(func, args, kwargs, out)
            read = self.values((args, kwargs)) if name in _RELABELS else read
        step = Step(name, where, path, self.values(results), read, macs, cost=cost)
        if self.channels is not None and any(0 in each.stride() for each in results if each.layout is torch.strided):
            step = replace(step, free=tuple(map(_free, results, [label for _, label in step.outputs])))
        if name == "slice":
            sliced = bound(func, args, kwargs)
            axis = sliced["dim"] % sliced["self"].dim()
            first, _, _ = slice(sliced["start"], sliced["end"]).indices(sliced["self"].shape[axis])
            step = replace(step, start=(axis, first), source=self.label(sliced["self"]))
        self.run.steps.append(step)
        return out

    def values(self, held: Any) -> Values:
        """The shape and label of each tensor in arguments or results."""
        return tuple([(shape_of(each), self.label(each)) for each in tensors_in(held)])

    def _label(
        self, func: Any, name: str, args: Any, kwargs: Any, out: Any, results: Any, where: str, module: Any
    ) -> None:
        channels = self.channels
        given = tensors_in((args, kwargs))
        labels = [self.label(tensor) for tensor in given]
        if not given or channels is None:
            return
        for label in labels:
            channels.pin_numbered(label, f"{where}, to which their numbers are given")
        static = all(label.static for label in labels)
        arguments = bound(func, args, kwargs)
        call = OpCall(name.removesuffix("_"), arguments, out, channels, self, where, module, static, self.repeating > 0)
        if any(label.dead for label in labels):
            self._without_dead(call, func, given, labels, results)
        else:
            rule_for(func)(call)

    def _without_dead(self, call: OpCall, func: Any, given: Any, labels: list[Label], results: Any) -> None:
        """An operator that gets a value of a branch that is taken out."""
        alive = [
            (tensor, label)
            for tensor, label in zip(given, labels, strict=True)
            if not label.dead and not (label.static and tensor.dim() == 0)
        ]
        channels = call.channels
        if not [label for _, label in alive if not label.static]:
            for result in results:
                self.give(result, Label(static=False, dead=True))
        elif call.name == "cat":
            for tensor, label in zip(given, labels, strict=True):
                if label.dead:
                    axis = call["dim"] % tensor.dim()
                    layer = channels.new([size if each == axis else 1 for each, size in enumerate(tensor.shape)])
                    channels.doomed.append(layer)
                    self.give(tensor, Label((layer,) if layer.size > 1 else ()))
            rule_for(func)(call)
            for tensor, label in zip(given, labels, strict=True):
                self.give(tensor, label)
            self.run.joints[self.stack[-1][0]] = None
        elif call.name == "add" and len(alive) == 1 and alive[0][0].shape == results[0].shape:
            if call.arguments.get("alpha", 1) != 1 and call["self"] is not alive[0][0]:
                raise EditError(f"the other summand is scaled by {call.where}: it cannot stand alone")
            for result in results:
                self.give(result, alive[0][1])
            self.run.joints[self.stack[-1][0]] = None
            self.run.unclear |= any(
                label.dead and id(tensor) not in self.returned for tensor, label in zip(given, labels, strict=True)
            )
        else:
            raise EditError(
                f"every channel of a branch would go, and {call.where} cannot do without it",
                expected="a branch that is concatenated, or added",
                hint="tt.remove, or leave a channel",
            )


def _free(tensor: torch.Tensor, label: Label) -> frozenset[int]:
    """The dimensions along which the same values are repeated and no channels are told apart."""
    extent = extent_of(tensor, label.layers)
    return frozenset(axis for axis, size in enumerate(shape_of(tensor)) if extent[axis] < size)


def _batch_normed(args: tuple[Any, ...]) -> tuple[torch.Tensor, ...] | None:
    """What a batch norm gives, where nothing is wrong with what it is given: torch takes many small steps to say so."""
    source, *held, training, _, _ = args
    if source.dim() < 2 or any(each is not None and shape_of(each) != (source.shape[1],) for each in held):
        return None
    saved = source.new_empty(source.shape[1] if training else 0)
    return torch.empty_like(source), saved, torch.empty_like(saved)


@cache
def _name(func: Any) -> str:
    """An operator's name: `"view"`."""
    name: str = func._schema.name.partition("::")[2]
    return name


def _run(
    model: nn.Module,
    inputs: Inputs,
    training: bool,
    stages: Sequence[Stage],
    channels: Channels | None,
    tensors: dict[int, Label],
    dead: frozenset[str],
) -> tuple[Run, _Follower]:
    batches = dict.fromkeys((inputs.batch,) if channels is None else (max(inputs.batch, 2), inputs.batch))
    hooks = (False, True)[: 1 + has_function_hooks(model)]
    failed: list[tuple[Stage, Exception, _Follower]] = []
    for with_hooks, batch, stage in itertools.product(hooks, batches, stages):
        follower = _Follower(Run(training, batch, stage.blank), stage, channels, dead)
        try:
            with nullcontext() if channels is None else channels.kept_unless_done():
                return _run_once(stage, inputs.with_batch(batch), follower, tensors, with_hooks), follower
        except TorchTrimError:
            raise
        except Exception as error:  # noqa: BLE001 -- whatever a forward raises: another way may do
            failed.append((stage, error, follower))
    # What fake tensors say comes first: others refuse what only they cannot do.
    _, cause, follower = min(failed, key=lambda each: each[0].blank)
    refused = NotFollowable(
        f"the model's forward cannot be followed in {'train' if training else 'eval'} mode: {cause}",
        path=(follower.stack[-1][0] if follower.stack else "") or None,
        found=inputs.describe(),
        hint="example inputs of the size that the model is trained on" if training else None,
    )
    refused.run = follower.run
    raise refused from cause


def _run_once(stage: Stage, inputs: Inputs, follower: _Follower, tensors: dict[int, Label], hooks: bool) -> Run:
    run = follower.run
    with ExitStack() as stack:
        stack.enter_context(kept_random_state())
        stack.enter_context(torch.no_grad())
        stack.enter_context(no_fused_attention())
        stack.enter_context(plain_recurrence())
        twin = stage.twin(follower, tensors, hooks=hooks)
        twin.train(run.training)  # which need not return self
        stack.enter_context(stage.entered())
        given = stage.given(inputs)
        for tensor in given.tensors:
            follower.give(tensor, Label())
        _watch(twin, follower)
        stack.enter_context(follower)
        if follower.channels is not None:
            follower.numbers = mark(twin)
            stack.enter_context(Watching(follower, follower.demands))
        outputs = given.call(twin)
    if follower.channels is not None:
        for label in map(follower.label, tensors_in(outputs)):
            follower.channels.pin_numbered(label, "the model's output, which holds their numbers")
            if label.dead:
                raise EditError("every channel of the model's output would go", hint="leave a channel")
    return run


def _watch(twin: nn.Module, follower: _Follower) -> None:
    def enter(path: str) -> Callable[..., None]:
        return lambda module, _args: follower.stack.append((path, module))

    def leave(path: str) -> Callable[..., None]:
        def note(module: nn.Module, args: Any, output: Any) -> None:
            with torch._C.DisableTorchFunction():
                record(module, args, output)

        def record(module: nn.Module, args: Any, output: Any) -> None:
            while follower.stack.pop()[1] is not module:
                continue
            found = tensors_in(output)
            if path in follower.dead:
                for tensor in found:
                    follower.give(tensor, Label(dead=True))
            follower.returned.update(map(id, found))
            follower.run.calls.setdefault(path, []).append(ModuleCall(follower.values(args), follower.values(output)))

        return note

    for path, module in twin.named_modules():
        module.register_forward_pre_hook(enter(path), prepend=True)
        module.register_forward_hook(leave(path))
