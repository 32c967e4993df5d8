"""Which part of a model learns from which epoch on: the head first, then more and more of what lies before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from torch import nn

from torchtrim.edits.head import AttachHead
from torchtrim.edits.head_in_place import own_heads
from torchtrim.edits.history import history
from torchtrim.errors import HeadError, InputError
from torchtrim.graph.held import hold, is_held, let_go
from torchtrim.graph.inputs import Inputs
from torchtrim.train.freeze import has_statistics
from torchtrim.train.groups import depths
from torchtrim.train.parts import part_of

Unfreeze: TypeAlias = Literal["all", "head", "gradual"] | Mapping[int, Any] | None

_HEAD_SHARE = 0.25  # of the epochs, for the head alone


class Stages:
    """The parts of a model that learn, by epoch.

    What was frozen before stays frozen throughout. Norms of a part that does not learn yet hold their statistics.

    Args:
        model: The model.
        unfreeze: `None` or `"all"`: everything from the start. `"head"`: the head alone. `"gradual"`: the head
            for a quarter of the epochs, then more layers with every epoch, the last ones first, until all learn
            (Howard and Ruder, *Universal Language Model Fine-tuning*, 2018). Or a dict: from each epoch (the first is
            0) on, what learns too: `"head"`, `"all"`, a path, a glob, a type, a predicate or a list of these.
        epochs: How many there are.
        inputs: Example inputs, to find the head and the order of layers; `None` where they are not known.

    Raises:
        InputError: No such way, an epoch that does not come, or too few epochs for it.
        HeadError: There is no head.
        PathError: A path that does not exist.
        SelectionError: Nothing fits.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        >>> stages = Stages(net, {0: "2", 1: "all"}, epochs=2)
        >>> stages.enter(0), net[0].weight.requires_grad, net.train()[1].training
        (True, False, False)
        >>> stages.enter(1), net[0].weight.requires_grad, net.train()[1].training
        (True, True, True)
        >>> stages.leave()
    """

    def __init__(self, model: nn.Module, unfreeze: Unfreeze, epochs: int, inputs: Inputs | None = None) -> None:
        self._model = model
        self._flags = {parameter: parameter.requires_grad for parameter in model.parameters()}
        self._held = {module for module in model.modules() if is_held(module)}
        self._entered: frozenset[nn.Parameter] | None = None
        self._from: dict[int, set[nn.Parameter]] = self._read(unfreeze, epochs, inputs)

    @property
    def epochs(self) -> tuple[int, ...]:
        """The epochs with which more begins to learn."""
        return tuple(sorted(self._from))

    def enter(self, epoch: int) -> bool:
        """Freeze and unfreeze what an epoch asks for; returns whether anything changed."""
        now = frozenset().union(*(chosen for start, chosen in self._from.items() if start <= epoch))
        if now == self._entered:
            return False
        self._entered = now
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag and parameter in now)
            if not parameter.requires_grad:
                parameter.grad = None
        self._hold_norms(now)
        return True

    def leave(self) -> None:
        """Everything learns again that did before the first stage."""
        for parameter, flag in self._flags.items():
            parameter.requires_grad_(flag)
        self._hold_norms(frozenset(self._flags))

    def _hold_norms(self, learning: frozenset[nn.Parameter]) -> None:
        def learns(module: nn.Module) -> bool:
            return any(parameter in learning for parameter in module.parameters())

        def visit(module: nn.Module, around: bool) -> None:
            own = list(module.parameters())
            inside = learns(module) if own else around  # a norm without parameters goes with what it is in
            if has_statistics(module) and module not in self._held:
                if not inside:
                    hold(module)
                elif is_held(module):
                    let_go(module)
                    module.train(self._model.training)
            for child in module.children():
                visit(child, inside)

        visit(self._model, learns(self._model))

    def _read(self, unfreeze: Unfreeze, epochs: int, inputs: Inputs | None) -> dict[int, set[nn.Parameter]]:
        if unfreeze is None or unfreeze == "all":
            return {0: set(self._flags)}
        if unfreeze == "head":
            return {0: self._head(inputs)}
        if unfreeze == "gradual":
            return self._gradual(epochs, inputs)
        if not isinstance(unfreeze, Mapping) or not unfreeze:
            expected = "'all', 'head', 'gradual', or {epoch: what learns from it on}"
            raise InputError("no such way to unfreeze", path="unfreeze", found=repr(unfreeze), expected=expected)
        found: dict[int, set[nn.Parameter]] = {}
        for epoch, what in unfreeze.items():
            if isinstance(epoch, bool) or not isinstance(epoch, int) or not 0 <= epoch < epochs:
                raise InputError(
                    "not an epoch of this training", path="unfreeze", found=repr(epoch), expected=f"0 to {epochs - 1}"
                )
            found[epoch] = self._chosen(what, inputs)
        if 0 not in found:
            raise InputError(
                "nothing learns in the first epochs",
                path="unfreeze",
                found=list(found),
                expected="what learns from 0 on",
            )
        return found

    def _chosen(self, what: Any, inputs: Inputs | None) -> set[nn.Parameter]:
        if isinstance(what, str) and what == "all":
            return set(self._flags)
        if isinstance(what, str) and what == "head" and "head" not in dict(self._model.named_modules()):
            return self._head(inputs)
        return set(part_of(self._model, what).parameters)

    def _gradual(self, epochs: int, inputs: Inputs | None) -> dict[int, set[nn.Parameter]]:
        if epochs < 2:
            raise InputError("unfreezing by and by takes epochs", path="epochs", found=epochs, expected="2 or more")
        found = {0: self._head(inputs)}
        layer_of = depths(self._model, inputs)
        order = sorted(set(layer_of.values()), reverse=True)
        first = max(round(epochs * _HEAD_SHARE), 1)
        steps = min(epochs - first, len(order))
        names = dict(self._model.named_parameters())
        for step in range(steps):
            # As many layers with each step as are needed for all to learn in the last.
            chosen = set(order[: -(-len(order) * (step + 1) // steps)])
            found[first + step] = {names[name] for name, layer in layer_of.items() if layer in chosen}
        return found

    def _head(self, inputs: Inputs | None) -> set[nn.Parameter]:
        paths = head_paths(self._model, inputs)
        found = {parameter for path in paths for parameter in self._model.get_submodule(path).parameters()}
        if len(found) == len(self._flags):
            raise HeadError("all of the model is its head", path=", ".join(paths), hint='unfreeze="all"')
        return found


def head_paths(model: nn.Module, inputs: Inputs | None) -> list[str]:
    """Where the head is: the one that was attached last, else the last layers with weights before the outputs.

    Raises:
        HeadError: There is none that is a layer, or neither history nor inputs tell where.
    """
    modules = dict(model.named_modules())
    for edit in reversed(history(model).edits):
        if isinstance(edit, AttachHead) and all(path in modules for path in edit.paths):
            return list(edit.paths)
    if inputs is None:
        raise HeadError("where the head is takes an input to tell", hint="example_inputs=")
    paths = [site.name for site in own_heads(model, inputs)]
    if not paths:
        raise HeadError("the model has no head that is a layer", found=type(model).__name__, hint="tt.attach_head")
    return paths
