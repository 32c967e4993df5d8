"""A model while it is edited: a copy that shares the user's weights, so that nothing is lost when an edit fails."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrim.edits.module_spec import ModuleSpec, Trusted
from torchtrim.errors import PathError
from torchtrim.graph.inputs import Inputs


@dataclass(frozen=True)
class Joint:
    """A place where an edit put two ends together.

    Attributes:
        address: The call that was taken out, put in or changed.
        before: The shape of what flows in, at batch 1 where that could be told.
        after: The shape that is needed there.
        how: What was done, in words: `"joined"`, `"identity"`, `"adapter: ..."`.
    """

    address: str
    before: tuple[int, ...] | None
    after: tuple[int, ...] | None
    how: str

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        before, after = (None if shape is None else list(shape) for shape in (self.before, self.after))
        return {"address": self.address, "before": before, "after": after, "how": self.how}


@dataclass(eq=False)
class Work:
    """What an edit works on, and what it has to say.

    Attributes:
        model: A structural copy of the user's model. Modules may be rearranged at will; parameters and buffers are the
            user's own tensors, and are never written to: see `reshape`.
        inputs: The example inputs.
        check: Whether the edit is to run its result and compare it.
        data: Calibration batches, where the caller gave some.
        trusted: Which classes besides those of known packages may be built from a record.
        notes: What the user should know.
        checked: What was compared with the original, in words.
        joints: The places that were put together, for `plan`.
        gone: The addresses of functions and methods that were taken out (paths of modules are found without).
        before: The modules as they were before this edit, sharing the weights: the reference for a check.
        planning: Only the plan is wanted: what needs data is left as it is, without asking for any.
        given: The modules that the caller gave, which are used as they are.
        came_from: For each new parameter the one whose place it took.
    """

    model: nn.Module
    inputs: Inputs
    check: bool = True
    data: Iterable[Any] | None = None
    trusted: Trusted = ()
    notes: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    joints: list[Joint] = field(default_factory=list)
    gone: list[str] = field(default_factory=list)
    planning: bool = False
    given: list[nn.Module] = field(default_factory=list)
    came_from: dict[nn.Parameter, nn.Parameter] = field(default_factory=dict)
    before: nn.Module = field(init=False)

    def start(self, before: nn.Module) -> None:
        """Begin another edit."""
        self.before = before
        self.notes, self.checked, self.joints, self.gone = [], [], [], []

    def module(self, spec: ModuleSpec) -> nn.Module:
        """The module of a spec: the user's own object where there is one, else one built from the record.

        It goes to the model's device; one built without weights of its own gets the model's type of values too.

        Raises:
            EditError: It cannot be built.
        """
        if spec.live is not None:
            self.given.append(spec.live)
            return spec.live
        reference = next((held for held in self.model.parameters() if held.is_floating_point()), None)
        device = None if reference is None else reference.device
        dtype = None if reference is None or spec.weights else reference.dtype
        return spec.build(trusted=self.trusted, device=device, dtype=dtype)

    def put(self, path: str, module: nn.Module) -> None:
        """Put a module at a path, and wherever else the one that was there is referred to; `""` is the whole model.

        Raises:
            PathError: There is no module at that path.
        """
        if path == "":
            self.model = module
            return
        names: Mapping[str, nn.Module] = dict(self.model.named_modules(remove_duplicate=False))
        if path not in names:
            raise PathError("no such module", path=path)
        old = names[path]
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = module

    def reshape(self, owner: nn.Module, name: str, tensor: torch.Tensor) -> nn.Parameter:
        """Give a parameter other values or another shape: a new one takes its place, wherever it is referred to.

        Args:
            owner: The module that holds the parameter.
            name: Its name there, without dots.
            tensor: The values.
        """
        old = owner._parameters[name]
        if old is None:
            raise PathError("no such parameter", path=f"{type(owner).__name__}.{name}")
        new = nn.Parameter(tensor.detach(), requires_grad=old.requires_grad)
        self.came_from[new] = self.came_from.pop(old, old)
        for module in self.model.modules():
            for key in [key for key, held in module._parameters.items() if held is old]:
                setattr(module, key, new)  # not past `__setattr__`: recurrent layers keep a list of theirs
        return new
