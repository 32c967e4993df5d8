"""All hints of a distillation: found in both models by one forward of each, and watched in every batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError, ModelError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import known_inputs
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.train.capture import Capture
from torchtrim.train.distil_batch import Signatures, wide
from torchtrim.train.hint_auto import auto_hints
from torchtrim.train.hint_joint import Joint, joint_of
from torchtrim.train.hint_probe import probe
from torchtrim.train.hints import Hint, address_in, named
from torchtrim.train.teacher import Teacher, device_of, dtype_of


def asked_hints(
    student: nn.Module, teacher: nn.Module, hints: Any, example_inputs: ExampleInputs | None
) -> dict[str, Hint]:
    """Hints by name, in whatever form they were asked for.

    Raises:
        InputError: It is none of the forms.
        SelectionError: `"auto"`, and the two have nothing in common.
    """
    if isinstance(hints, str) and hints == "auto":
        return auto_hints(student, teacher, _examples(student, teacher, example_inputs))
    return named(hints)


class HintSet:
    """Hints that were found in a student and a teacher.

    Args:
        student: The student, as it is trained.
        teacher: The teacher.
        hints: The hints by name.
        example_inputs: What the forward takes; not needed without hints.

    Raises:
        PathError: A place does not exist, or is not called.
        InputError: No example inputs, or values that do not fit together.
        ModelError: The student is compiled.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: Teacher,
        hints: Mapping[str, Hint],
        example_inputs: ExampleInputs | None,
    ) -> None:
        self.copies: tuple[frozenset[str], frozenset[str]] = (frozenset(), frozenset())
        self._calls: dict[str, int] = {}
        self.joints = self._found(student, teacher, hints, example_inputs) if hints else ()
        self.places = tuple(joint.student.place for joint in self.joints)
        self.teacher_places = tuple(joint.teacher.place for joint in self.joints)

    def _found(
        self, student: nn.Module, teacher: Teacher, hints: Mapping[str, Hint], example_inputs: ExampleInputs | None
    ) -> tuple[Joint, ...]:
        _refuse_compiled(student)
        student = unwrap(student)
        ours = {name: address_in(student, hint.student, "student") for name, hint in hints.items()}
        theirs = {name: address_in(teacher.model, hint.teacher, "teacher") for name, hint in hints.items()}
        inputs = _examples(student, teacher.model, example_inputs)
        signatures = Signatures(student, teacher.model)
        taught = teacher.in_own_type(signatures.for_teacher(inputs), dtype_of(student))
        seen = (
            probe(student, signatures.for_student(inputs), list(ours.values()), "student"),
            probe(teacher.model, taught, list(theirs.values()), "teacher"),
        )
        self._calls = {place.text: seen[0][place.text].calls for place in ours.values() if place.function is not None}
        written = [frozenset(text for text, found in side.items() if found.overwritten) for side in seen]
        self.copies = written[0], written[1]
        return tuple(
            joint_of(
                name,
                hint,
                (ours[name], theirs[name]),
                (seen[0][ours[name].text], seen[1][theirs[name].text]),
                inputs.batch,
            )
            for name, hint in hints.items()
        )

    def watching(self, student: nn.Module) -> Capture:
        """What watches the student for one forward."""
        return Capture(unwrap(student), self.places, self.copies[0])

    def _refuse_other_calls(self, capture: Capture) -> None:
        """Functions are told apart by their number only: where train mode calls others too, it is another one's."""
        for text, calls in self._calls.items():
            if capture.calls[text] != calls:
                raise ModelError(
                    "the student calls this function more or less often than in eval mode, where it was looked up",
                    path=text,
                    found=f"{capture.calls[text]} calls",
                    expected=calls,
                    hint="the path of a module",
                )

    def pairs(
        self, capture: Capture, theirs: Mapping[str, torch.Tensor], layers: Layers
    ) -> list[tuple[Joint, torch.Tensor, torch.Tensor]]:
        """The two values of each hint, ready for its loss. Projections run in the network's precision."""
        if self.joints:
            capture.refuse_overwritten()
            capture.refuse_cut_off()
            self._refuse_other_calls(capture)
        found = []
        for joint in self.joints:
            values = capture.values[joint.student.place.text], theirs[joint.teacher.place.text]
            student, teacher = joint.pair(*values, layers.projection(joint.name))
            found.append((joint, wide(student), wide(teacher)))
        return found


class Layers:
    """The layers that are trained besides the student: projections, and losses that have weights.

    Args:
        joints: The hints.
        losses: Other losses, by name.
    """

    def __init__(self, joints: Sequence[Joint], losses: Mapping[str, object]) -> None:
        self.modules = nn.ModuleDict()
        self._keys = _keys([*(joint.name for joint in joints), *losses])
        for joint in joints:
            if joint.projects:
                self.modules[self._keys[joint.name]] = joint.projection()
        for name, loss in {**{joint.name: joint.hint.loss for joint in joints}, **losses}.items():
            if isinstance(loss, nn.Module) and loss.state_dict():
                self.modules[f"{self._keys[name]}_loss"] = loss

    def projection(self, name: str) -> nn.Module | None:
        """The projection of a hint; `None` where its widths agree."""
        return self.modules._modules.get(self._keys[name])

    def like(self, student: nn.Module) -> nn.ModuleDict:
        """The layers, on the student's device and in its type.

        Raises:
            ModelError: The student is wrapped for several processes: its wrapper would not train them along.
        """
        if unwrap(student) is not student and any(True for _ in self.modules.parameters()):
            raise ModelError(
                "the projections would not be trained along with a wrapped student",
                path="student",
                found=type(student).__name__,
                hint="the model itself, and the wrapper around the distiller",
            )
        return self.modules.to(device=device_of(student), dtype=dtype_of(student))


def _refuse_compiled(student: nn.Module) -> None:
    if any(type(each).__name__ == "OptimizedModule" for each in student.modules()):
        raise ModelError(
            "a compiled student does not show what is inside it",
            path="student",
            hint="the model itself; or no hints",
        )


def _examples(student: nn.Module, teacher: nn.Module, example_inputs: ExampleInputs | None) -> Inputs:
    inputs = Inputs.of(example_inputs) if example_inputs is not None else known_inputs(student)
    inputs = inputs or known_inputs(teacher)
    if inputs is None:
        raise InputError(
            "hints need one forward to find widths, and the input shapes of these models are not known",
            path="example_inputs",
            found=None,
            hint="example_inputs=torch.zeros(1, 3, 224, 224), or what the forward takes",
        )
    device = device_of(student)
    return inputs if device is None else inputs.map(lambda tensor: tensor.to(device))


def _keys(names: Sequence[str]) -> dict[str, str]:
    """Names as a `ModuleDict` takes them: without dots, and none of its own attributes."""
    found: dict[str, str] = {}
    for name in names:
        key = "".join(letter if letter.isalnum() else "_" for letter in name)
        while hasattr(nn.ModuleDict(), key) or key in found.values():
            key += "_"
        found[name] = key
    return found
