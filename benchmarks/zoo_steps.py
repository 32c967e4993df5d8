"""What is tried on one model: trace, summary, three cuts, a head in place of its own, and a head after a cut.

Nothing here relies on torchtrim's own checks: the values come from hooks on the original model.
"""

from __future__ import annotations

import resource
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from zoo_models import build

import torchtrim as tt
from torchtrim.graph.check import flatten

STEPS = ("build", "trace", "summary", "cut 1/3", "cut 1/2", "cut 5/6", "head", "cut + head")
PLACES = {"cut 1/3": 1 / 3, "cut 1/2": 1 / 2, "cut 5/6": 5 / 6}
CLASSES = 7
_TOLERANCE = 1e-5  # of the largest value


class Wrong(Exception):
    """A step gave something that is not right."""


def try_all(name: str, report: Callable[[str, dict[str, Any]], None], upto: str = STEPS[-1]) -> None:
    """Run the steps on one model, and report each: seconds, the process's peak memory, what was found, any error."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", DeprecationWarning)
    work = _Work(name)
    actions: dict[str, Callable[[], dict[str, Any]]] = {
        "build": work.build,
        "trace": work.trace,
        "summary": work.summary,
        **{step: lambda step=step: work.cut(step) for step in PLACES},
        "head": work.head,
        "cut + head": work.cut_and_head,
    }
    if name.startswith("detection:"):
        del actions["head"]  # a detector's backbone has none
    for step, action in actions.items():
        began = time.perf_counter()
        found: dict[str, Any] = {}
        try:
            found = action()
        except Exception as error:  # noqa: BLE001 (whatever is raised is the result)
            found["error"] = f"{type(error).__name__}: {error}"
            if not isinstance(error, (Wrong, tt.TorchTrimError)):
                found["traceback"] = traceback.format_exc().splitlines()[-12:]
        found["seconds"] = round(time.perf_counter() - began, 2)
        found["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        report(step, found)
        if step == upto or ("error" in found and step in ("build", "trace")):
            return


class _Work:
    model: nn.Module
    x: torch.Tensor
    graph: tt.ModuleGraph

    def __init__(self, name: str) -> None:
        self.name = name
        self.places: dict[str, str] = {}
        self.values: dict[tuple[str, bool], torch.Tensor] = {}

    def build(self) -> dict[str, Any]:
        self.model, self.x = build(self.name)
        self.fresh = torch.randn(2, *self.x.shape[1:])
        return {"input": list(self.x.shape), "params": _count(self.model)}

    def trace(self) -> dict[str, Any]:
        before = _state(self.model)
        self.graph = graph = tt.trace(self.model, self.x)
        _same_state(before, _state(self.model))
        found = {"nodes": len(graph), "closed": graph.leaves, "checked": list(graph.checked), "heads": graph.heads}
        if not graph.heads and not self.name.startswith("detection:"):
            raise Wrong("no head found")
        accounted = {id(parameter) for parameter in self._accounted()}
        left = {name for name, parameter in self.model.named_parameters() if id(parameter) not in accounted}
        if left - set(_without_gradient(self.model, self.fresh) if left else ()):
            raise Wrong(f"parameters that the model uses are in no node: {listed(sorted(left))}")
        self.unused = left
        self._choose()
        return found

    def _accounted(self) -> Iterator[nn.Parameter]:
        for node in self.graph:
            path = node.address.partition("#")[0]
            if node.op == "module":
                yield from self.model.get_submodule(node.path).parameters()
            elif node.op == "attribute":
                held: Any = self.model
                for part in path.split("."):
                    held = getattr(held, part)
                if isinstance(held, nn.Parameter):
                    yield held

    def _choose(self) -> None:
        """Where to cut: the modules at a third, half and five sixths of those that give one float tensor."""
        fed: set[str] = (
            set()
        )  # what depends on the input; some attention has weights that go through layers of their own
        for node in self.graph:
            if node.op == "input" or not fed.isdisjoint(node.inputs):
                fed.add(node.address)
        able = [node for node in self.graph if node.op == "module" and node.modes == "both" and node.users]
        able = [node for node in able if node.address in fed]
        able = [n for n in able if isinstance(n.output_shape, tuple) and str(n.output_dtype).startswith("float")]
        self.places = {step: able[int(len(able) * share)].address for step, share in PLACES.items()}
        # A head needs features with a row for each input; inside some attention the batch is folded into others.
        self.features = [node.address for node in able[len(able) // 2 :] if node.output_shape[0] == len(self.x)]
        for training in (False, True):
            self._record(training)

    def _record(self, training: bool) -> None:
        """The original's values at the places, from one forward with hooks; its buffers are put back."""
        handles = []
        for address in set(self.places.values()):
            path, _, number = address.partition("#")
            keep = _keeper(self, address, number, training)
            handles.append(self.model.get_submodule(path).register_forward_hook(keep))
        try:
            with kept_buffers(self.model):
                _run(self.model, self.fresh, training)
                self.buffers_after = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        finally:
            for handle in handles:
                handle.remove()
            self.model.eval()

    def summary(self) -> dict[str, Any]:
        before = _state(self.model)
        summary = tt.summary(self.model, self.x)
        _same_state(before, _state(self.model))
        if summary.params != _count(self.model):
            raise Wrong(f"{summary.params} parameters instead of {_count(self.model)}")
        if not summary.macs or len(str(summary).splitlines()) < 5:
            raise Wrong("an empty summary")
        total = sum(node.macs for node in self.graph if node.modes != "train")
        if total != summary.macs:
            raise Wrong(f"{summary.macs} MACs, but {total} in the nodes of the graph")
        return {"macs": summary.macs, "ran": summary.ran}

    def cut(self, step: str) -> dict[str, Any]:
        address = self.places[step]
        before = _state(self.model)
        net = tt.cut(self.model, self.x, after=address)
        _same_state(before, _state(self.model))
        found: dict[str, Any] = {"after": address, "params": _count(net)}
        self._kept(net, address.partition("#")[0])
        for training in (False, True):
            value = _run(net, self.fresh, training)
            _close(self.values[address, training], value, f"{address}, {'train' if training else 'eval'} mode")
            if training:
                for name, buffer in net.named_buffers():
                    _close(self.buffers_after[name], buffer, f"buffer {name} after a forward in train mode")
        idle = set(_without_gradient(net, self.fresh)) - self.unused
        used = {name for name, _ in net.named_parameters()} - idle
        partly = {name for name in idle if _lies_in_a_used_module(name, used, address)}
        # What a module takes is kept with it, also where only the part of it that does not need that is used.
        if idle and not partly:
            raise Wrong(f"{address}: kept, and not used for the output: {listed(sorted(idle))}")
        found["idle_with_used_modules"] = len(idle)
        return found

    def _kept(self, net: nn.Module, path: str) -> None:
        """Classes, keys and values are the original's, and no memory is shared with it."""
        missing = net.load_state_dict(self.model.state_dict(), strict=False).missing_keys
        if missing:
            raise Wrong(f"{listed(missing)} are keys that the original does not have")
        modules = dict(self.model.named_modules(remove_duplicate=False))
        names = [name for name, module in modules.items() if module is modules[path]]
        for name, module in net.named_modules(remove_duplicate=False):
            opened = isinstance(module, torch.fx.GraphModule) and (
                not name or any(alias.startswith(f"{name}.") for alias in names)
            )
            if not opened and type(module) is not type(modules.get(name)):
                raise Wrong(f"{name} is a {type(module).__name__} instead of a {type(modules.get(name)).__name__}")
        shared = {p.data_ptr() for p in self.model.parameters()} & {p.data_ptr() for p in net.parameters()}
        if shared - {0}:
            raise Wrong("parameters are shared with the original")

    def head(self) -> dict[str, Any]:
        before = _state(self.model)
        net = tt.attach_head(self.model, self.x, num_classes=CLASSES)
        torch.set_rng_state(before[2])  # the weights of a new head are drawn
        _same_state(before, _state(self.model))
        if type(net) is not type(self.model):
            raise Wrong(f"the class is {type(net).__name__} instead of {type(self.model).__name__}")
        found = _with_classes(net, self.fresh)
        if self.name.startswith("timm:"):
            if net.num_classes != CLASSES:
                raise Wrong(f"num_classes is {net.num_classes}")
            heads = net.get_classifier()
            for head in heads if isinstance(heads, (tuple, list)) else [heads]:
                widths = {
                    module.weight.shape[0] for module in head.modules() if isinstance(module, (nn.Linear, nn.Conv2d))
                }
                if CLASSES not in widths:
                    raise Wrong(f"get_classifier() gives {head}")
        return found

    def cut_and_head(self) -> dict[str, Any]:
        refused = {}
        for address in self.features[:8]:
            backbone = tt.cut(self.model, self.x, after=address)
            try:
                net = tt.attach_head(backbone, self.x, num_classes=CLASSES)
            except tt.HeadError as error:  # it cannot tell the channels inside an attention: it is right to say so
                refused[address] = str(error)
                continue
            found = _with_classes(net, self.fresh)
            if found["output"] != [2, CLASSES]:
                raise Wrong(f"{address}: the output is {found['output']} instead of {[2, CLASSES]}")
            return {"after": address, "refused": refused, **found}
        raise Wrong(f"no place takes a head: {refused}")


def listed(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _keeper(work: _Work, address: str, number: str, training: bool) -> Callable[..., None]:
    calls = []

    def keep(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
        if len(calls) == int(number or 0):
            work.values[address, training] = output.detach().clone()
        calls.append(1)

    return keep


def _run(net: nn.Module, x: torch.Tensor, training: bool) -> Any:
    torch.manual_seed(1)
    with torch.no_grad():
        return net.train(training)(x.clone())


def _with_classes(net: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Outputs have the classes, in both modes, and a backward pass reaches every new weight."""
    shapes = {}
    for training in (False, True):
        outputs = flatten(net.train(training)(x.clone()))
        shapes[training] = [list(value.shape) for value in outputs.values() if isinstance(value, torch.Tensor)]
        for shape in shapes[training]:
            if CLASSES not in shape[1:]:
                raise Wrong(f"an output is {shape} with {CLASSES} classes, in {'train' if training else 'eval'} mode")
    sum(value.float().sum() for value in outputs.values() if isinstance(value, torch.Tensor)).backward()
    new = [p for p in net.parameters() if p.dim() > 1 and p.shape[0] == CLASSES]
    if not new or any(p.grad is None for p in new):
        raise Wrong("the new head gets no gradient")
    return {"output": shapes[False][0], "heads": len(new)}


@contextmanager
def kept_buffers(model: nn.Module) -> Iterator[None]:
    """Leave the buffers as they were; a forward may write to them, or put others in their place."""
    kept = [
        (module._buffers, dict(module._buffers), {k: v.clone() for k, v in module._buffers.items() if v is not None})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffers, before, values in kept:
                buffers.update(before)
                for name, value in values.items():
                    before[name].copy_(value)


def _without_gradient(model: nn.Module, x: torch.Tensor) -> list[str]:
    """The parameters that the outputs do not depend on, in neither mode."""
    parameters = dict(model.named_parameters())
    idle = set(parameters)
    for training in (False, True):
        with kept_buffers(model):
            outputs = flatten(model.train(training)(x.clone())).values()
            total = sum(value.float().sum() for value in outputs if isinstance(value, torch.Tensor))
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
        idle -= {name for name, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    model.eval()
    return [name for name in parameters if name in idle]


def _lies_in_a_used_module(name: str, used: set[str], address: str) -> bool:
    """Whether a parameter lies in a module that was kept closed, and is kept for another part of what it returns."""
    parts = name.split(".")
    above = [".".join(parts[:length]) + "." for length in range(1, len(parts))]
    closed = [path for path in above if not f"{address}.".startswith(path)]
    return any(other.startswith(path) for path in closed for other in used)


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _state(model: nn.Module) -> Any:
    """What must be left as it was."""
    flags = [(name, module.training, len(module._forward_hooks)) for name, module in model.named_modules()]
    tensors = [
        (name, t.requires_grad, t.data_ptr(), t._version) for name, t in model.state_dict(keep_vars=True).items()
    ]
    return flags, tensors, torch.get_rng_state(), torch.is_grad_enabled()


def _same_state(before: Any, after: Any) -> None:
    for what, one, other in zip(("modes", "weights", "random numbers", "grad mode"), before, after, strict=True):
        if not (torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other):
            raise Wrong(f"the user's model or state was changed: {what}")


def _close(expected: torch.Tensor, found: Any, what: str) -> None:
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        raise Wrong(f"{what}: {getattr(found, 'shape', type(found))} instead of {expected.shape}")
    if torch.equal(found, expected):
        return
    distance = float((found.double() - expected.double()).abs().max())
    if not found.is_floating_point() or not distance <= _TOLERANCE * max(float(expected.abs().max()), 1e-6):
        raise Wrong(f"{what}: differs by {distance:.3g}")
