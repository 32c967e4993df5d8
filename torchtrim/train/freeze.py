"""Freeze and unfreeze parts of a model."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch import nn

from torchtrim.errors import PathError, SelectionError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import Execution, module_ticks, run_if_known
from torchtrim.graph.held import hold, is_held, let_go
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import What, resolve
from torchtrim.train.parts import Part, part_of, unique


@dataclass(frozen=True)
class Frozen:
    """What `freeze` or `unfreeze` did, and how the model stands after it.

    Attributes:
        action: `"froze"` or `"unfroze"`.
        paths: The modules, and the parameters of modules that were not taken whole.
        frozen: Parameters (numbers) of the model without gradients now.
        trainable: Those with gradients now.
        batchnorm: Norms whose running statistics are held now.
    """

    action: str
    paths: tuple[str, ...]
    frozen: int
    trainable: int
    batchnorm: int

    def __str__(self) -> str:
        shown = ", ".join(path or "the whole model" for path in self.paths[:8])
        more = f" and {len(self.paths) - 8} more" if len(self.paths) > 8 else ""
        return (
            f"{self.action} {shown}{more}: {self.frozen:,} of {self.frozen + self.trainable:,} parameters are frozen, "
            f"{self.trainable:,} train; {self.batchnorm} norms hold their running statistics"
        )

    def _repr_html_(self) -> str:
        return f"<p>{self}</p>"

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold."""
        return {**asdict(self), "paths": list(self.paths)}


def freeze(
    model: nn.Module,
    what: What | None = None,
    *,
    upto: str | None = None,
    example_inputs: ExampleInputs | None = None,
    batchnorm: Literal["freeze", "track"] = "freeze",
) -> Frozen:
    """Take the gradients off a part of a model, or off all of it.

    Parameters get `requires_grad=False`, and their gradients are dropped, so that an optimizer leaves them where they
    are. Norms with running statistics are a question of their own: with `batchnorm="freeze"` those in the part
    stay in eval mode (they use their statistics and do not move them) also after `model.train()`; with `"track"`
    they go on collecting, also where an earlier call held them. That survives copying and pickling, but not
    `nn.SyncBatchNorm.convert_sync_batchnorm`, which makes new norms: convert first, then freeze. A parameter that is
    shared is frozen wherever it is used; one that is named by itself leaves the statistics of its norm alone.

    Args:
        model: The model; it is changed in place.
        what: A path, a glob, a type, a predicate or a list of these; everything below is included. A path may be that
            of a parameter (`cls_token`, `head.bias`), and so may a glob that fits no module (`**.bias`). Left out
            without `upto`: the whole model.
        upto: Instead of `what`: all that runs up to the end of this module (its last call), in the order of execution
            where `example_inputs` are given or known, else in the order of registration.
        example_inputs: What the forward takes, for `upto`.
        batchnorm: `"freeze"` or `"track"`.

    Raises:
        PathError: A path that does not exist, or (`upto`) that is never called.
        SelectionError: Nothing fits, or both `what` and `upto` are given.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> print(freeze(net, upto="1"))
        froze 0, 1: 240 of 258 parameters are frozen, 18 train; 1 norms hold their running statistics
        >>> net.train()[1].training
        False
    """
    if batchnorm not in ("freeze", "track"):
        raise SelectionError("an unknown way with batch-norm statistics", found=batchnorm, expected="freeze or track")
    model = unwrap(model)
    part = _part(model, what, "upto", upto, example_inputs)
    for parameter in part.parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
    if batchnorm == "track":
        _release(model, part.modules)
    else:
        for module in part.modules:
            if has_statistics(module):
                hold(module)
    return _standing(model, "froze", part.paths)


def unfreeze(
    model: nn.Module,
    what: What | None = None,
    *,
    since: str | None = None,
    example_inputs: ExampleInputs | None = None,
) -> Frozen:
    """Give the gradients back to a part of a model, or to all of it, and let its norms follow `.train()` again.

    Args:
        model: The model; it is changed in place.
        what: A path, a glob, a type, a predicate or a list of these, as for `freeze`; everything below is included.
            Left out without `since`: the whole model.
        since: Instead of `what`: all that runs from the start of this module (its first call) on, in the order of
            execution where `example_inputs` are given or known, else in the order of registration. A shared
            parameter that is used before it stays frozen.
        example_inputs: What the forward takes, for `since`.

    Raises:
        PathError: A path that does not exist, or (`since`) that is never called.
        SelectionError: Nothing fits, or both `what` and `since` are given.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> freeze(net).trainable, unfreeze(net, "1").trainable
        (0, 10)
    """
    model = unwrap(model)
    part = _part(model, what, "since", since, example_inputs)
    for parameter in part.parameters:
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(True)
    _release(model, part.modules)
    return _standing(model, "unfroze", part.paths)


def has_statistics(module: nn.Module) -> bool:
    """Whether a module is a norm that moves running statistics in train mode.

    Example:
        >>> has_statistics(nn.BatchNorm1d(3)), has_statistics(nn.InstanceNorm1d(3)), has_statistics(nn.LayerNorm(3))
        (True, False, False)
    """
    statistics = any(module._buffers.get(name) is not None for name in ("running_mean", "running_var"))
    # A norm frozen by construction (torchvision's FrozenBatchNorm2d) has the buffers and no momentum.
    return statistics and hasattr(module, "momentum")


def _release(model: nn.Module, modules: list[nn.Module]) -> None:
    """Let held norms follow `.train()` again, from the mode of what holds them on."""
    parent_of = {child: parent for parent in model.modules() for child in parent.children()}
    for module in modules:
        if is_held(module):
            let_go(module)
            module.train(parent_of[module].training if module in parent_of else module.training)


def _part(
    model: nn.Module, what: What | None, word: str, edge: str | None, example_inputs: ExampleInputs | None
) -> Part:
    """The modules and parameters meant, and the paths that say so."""
    if edge is None:
        return part_of(model, "" if what is None else what)
    if what is not None:
        raise SelectionError(f"give what or {word}, not both", found=f"what={what!r}, {word}={edge!r}")
    target = resolve(model, edge)
    execution = run_if_known(model, example_inputs)
    if execution is None:
        modules, parameters = _by_registration(model, target, word)
    else:
        modules, parameters = _by_execution(model, target, edge, word, execution)
    return Part(_covering(model, parameters), modules, parameters)


def _by_registration(model: nn.Module, target: nn.Module, word: str) -> tuple[list[nn.Module], list[nn.Parameter]]:
    order = list(model.modules())
    if word == "since":
        modules = order[order.index(target) :]
    else:
        modules = order[: 1 + max(order.index(module) for module in target.modules())]
    return modules, unique(parameter for module in modules for parameter in module.parameters(recurse=False))


def _by_execution(
    model: nn.Module, target: nn.Module, edge: str, word: str, execution: Execution
) -> tuple[list[nn.Module], list[nn.Parameter]]:
    first_name = {module: path for path, module in model.named_modules()}
    within = {first_name[module] for module in target.modules()}
    calls = [call for call in execution.calls if call.path in within]
    reads = [tick for name, tick in execution.first_use.items() if name.rpartition(".")[0] in within]
    if not calls and not reads:
        raise PathError(
            "never called in a forward in eval mode", path=edge, hint="a module that is part of the forward"
        )
    ticks = module_ticks(model, execution)
    if word == "upto":
        last = max([call.end for call in calls] + reads)
        chosen = {name for name, tick in (ticks | execution.first_use).items() if tick <= last}
    else:
        first = min([call.start for call in calls] + reads)
        chosen = {name for name, tick in (ticks | execution.first_use).items() if tick >= first}
    return (
        [module for path, module in model.named_modules() if path in chosen],
        [parameter for name, parameter in model.named_parameters() if name in chosen],
    )


def _covering(model: nn.Module, parameters: list[nn.Parameter]) -> tuple[str, ...]:
    """The fewest paths that hold these parameters: whole modules first, then parameters by name."""
    chosen = {id(parameter) for parameter in parameters}
    covering: list[str] = []

    def visit(path: str, module: nn.Module) -> None:
        held = [id(parameter) in chosen for parameter in module.parameters()]
        if held and all(held):
            covering.append(path)
        elif any(held):
            dot = f"{path}." if path else ""
            covering.extend(dot + name for name, p in module.named_parameters(recurse=False) if id(p) in chosen)
            for name, child in module.named_children():
                visit(dot + name, child)

    visit("", model)
    return tuple(covering)


def _standing(model: nn.Module, action: str, paths: tuple[str, ...]) -> Frozen:
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    held = sum(is_held(module) for module in model.modules())
    return Frozen(action, paths, frozen, total - frozen, held)
