"""One hint at work: the two values brought to one shape, and their loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from torchtrim.edits.addresses import Address
from torchtrim.errors import InputError
from torchtrim.train import hint_losses
from torchtrim.train.hint_probe import Probed
from torchtrim.train.hints import Hint

_CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
_POOLS: dict[int, Any] = {1: F.adaptive_avg_pool1d, 2: F.adaptive_avg_pool2d, 3: F.adaptive_avg_pool3d}
_RELATIONS = {
    "relational": hint_losses.relational_loss,
    "distance": hint_losses.distance_loss,
    "angle": hint_losses.angle_loss,
}


@dataclass(frozen=True)
class Side:
    """A place in one of the two models.

    Attributes:
        place: Where.
        shape: The value's shape for the example inputs.
        axis: Its channels' dimension, counted from the front: 1, or the last.
    """

    place: Address
    shape: tuple[int, ...]
    axis: int

    @property
    def width(self) -> int:
        """How many channels it has."""
        return self.shape[self.axis]

    @property
    def form(self) -> str:
        """`"flat"` (N, C), `"tokens"` (N, L, C), or `"map"`: channels over places."""
        if len(self.shape) == 2:
            return "flat"
        return "tokens" if len(self.shape) == 3 and self.axis == 2 else "map"


@dataclass(frozen=True)
class Joint:
    """A hint, found in both models.

    Attributes:
        name: The name of its loss.
        hint: The hint.
        student: Its place there.
        teacher: Its place there.
    """

    name: str
    hint: Hint
    student: Side
    teacher: Side

    @property
    def projects(self) -> bool:
        """Whether the student's value is projected to the teacher's width."""
        if self.hint.project is not None:
            return self.hint.project
        return self.hint.loss == "features" and self.student.width != self.teacher.width

    @property
    def aligns(self) -> bool:
        """Whether the two values have to be of one form and size; otherwise the loss is given them as they are."""
        return self.hint.loss in ("features", "attention") or self.projects

    def projection(self) -> nn.Module:
        """A new projection: a convolution over one place for maps, a linear layer for tokens and flat values."""
        widths = self.student.width, self.teacher.width
        if self.student.form != "map":
            return nn.Linear(*widths)
        return _CONVOLUTIONS[len(self.student.shape)](*widths, kernel_size=1)

    def pair(
        self, student: torch.Tensor, teacher: torch.Tensor, projection: nn.Module | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The two values in one form, and where the loss asks for it in one size and width."""
        if not self.aligns:
            return student, teacher
        student, teacher = (
            value.movedim(side.axis, 1) if side.form == "map" and side.axis != 1 else value
            for value, side in ((student, self.student), (teacher, self.teacher))
        )
        student, teacher = self._same_places(student, teacher)
        return student if projection is None else projection(student), teacher

    def loss(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """The loss of what `pair` gave.

        Raises:
            InputError: A user's loss gives no scalar.
        """
        kind = self.hint.loss
        if kind == "features":
            return hint_losses.features_loss(student, teacher, normalize=self.hint.normalize)
        if kind == "attention":
            axis = -1 if self.student.form == "tokens" else 1
            return hint_losses.attention_loss(student, teacher, axis=axis)
        if isinstance(kind, str):
            return _RELATIONS[kind](student, teacher)
        return scalar(kind(student, teacher), self.name)

    def _same_places(self, student: torch.Tensor, teacher: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.student.form == "map":
            size = [min(pair) for pair in zip(student.shape[2:], teacher.shape[2:], strict=True)]
            return _pooled(student, size), _pooled(teacher, size)
        if self.student.form == "tokens" and student.shape[1] != teacher.shape[1]:
            if not self.hint.resize:
                raise _other_length(self, student.shape[1], teacher.shape[1])
            length = min(student.shape[1], teacher.shape[1])
            return _shortened(student, length), _shortened(teacher, length)
        return student, teacher


def joint_of(
    name: str, hint: Hint, places: tuple[Address, Address], probed: tuple[Probed, Probed], batch: int
) -> Joint:
    """Check that a hint can be asked for, on what one forward of each model showed, of so many samples.

    Raises:
        InputError: The two values do not fit, or it cannot be told where their channels are.
    """
    sides = []
    for place, found in zip(places, probed, strict=True):
        _check_samples(hint, place, found.shape, batch)
        axis = found.axis if hint.channel_axis is None else hint.channel_axis
        if hint.loss in ("features", "attention") or hint.project:
            if not 2 <= len(found.shape) <= 5:
                raise InputError(
                    "a value of this shape has no channels",
                    path=place.text,
                    found=list(found.shape),
                    expected="2 to 5 dimensions",
                    hint="loss='relational', or a function",
                )
            if axis is None:
                raise InputError(
                    "it cannot be told which dimension of this value is the channels'",
                    path=place.text,
                    found=list(found.shape),
                    hint=f"tt.Hint({hint.student!r}, {hint.teacher!r}, channel_axis=1), or -1",
                )
        dims = max(len(found.shape), 1)
        sides.append(Side(place, found.shape, 1 % dims if axis in (None, 1) else dims - 1))
    joint = Joint(name, hint, *sides)
    _check_fit(joint)
    return joint


def _check_samples(hint: Hint, place: Address, shape: tuple[int, ...], batch: int) -> None:
    """Refuse to take the rows of a value for samples where they are something else, such as the places of (L, N, C)."""
    first = shape[0] if shape else 0
    # Windows of a picture are rows too: each has a map and a mean of its own, but relations are between samples.
    by_row = hint.loss == "attention" or (hint.loss == "features" and hint.normalize)
    if first != batch and (hint.loss in _RELATIONS or (by_row and batch in shape[1:2])):
        raise InputError(
            "the first dimension of this value is not that of the samples",
            path=place.text,
            found=list(shape),
            expected=f"{batch} samples first",
            hint="another place, or a function of the two values that turns them first",
        )


def _check_fit(joint: Joint) -> None:
    hint, student, teacher = joint.hint, joint.student, joint.teacher
    if not joint.aligns:
        return
    if (student.form, len(student.shape)) != (teacher.form, len(teacher.shape)):
        raise InputError(
            "the two values are not of one form",
            path=joint.name,
            found=f"{student.form} {list(student.shape)} in the student, {teacher.form} {list(teacher.shape)} in the "
            "teacher",
            hint="loss='relational', which needs no common form; a function of the two; or channel_axis=",
        )
    if hint.loss == "attention" and student.form == "flat":
        raise InputError(
            "a value without places has no attention map",
            path=joint.name,
            found=list(student.shape),
            hint="an earlier place, or loss='features'",
        )
    if hint.loss == "features" and student.width != teacher.width and not joint.projects:
        raise InputError(
            "the two are not of one width, and project=False",
            path=joint.name,
            found=student.width,
            expected=teacher.width,
        )
    if student.form == "tokens" and student.shape[1] != teacher.shape[1] and not hint.resize:
        raise _other_length(joint, student.shape[1], teacher.shape[1])


def _other_length(joint: Joint, ours: int, theirs: int) -> InputError:
    return InputError(
        "the two sequences differ in length, and it is not known which tokens belong together (class tokens, "
        "patches of another size)",
        path=joint.name,
        found=f"{ours} tokens in the student, {theirs} in the teacher",
        hint="tt.Hint(..., resize=True), which interpolates the longer one along the sequence; or loss='relational'",
    )


def scalar(value: object, name: str) -> torch.Tensor:
    """What a user's loss returned, if it is a loss.

    Raises:
        InputError: Not a tensor with one number.
    """
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        found = list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__
        raise InputError(
            "a loss is one number", path=name, found=found, expected="a tensor with one number", hint=".mean()"
        )
    return value.reshape(())


def _pooled(value: torch.Tensor, size: list[int]) -> torch.Tensor:
    if list(value.shape[2:]) == size:
        return value
    pool: Callable[[torch.Tensor, list[int]], torch.Tensor] = _POOLS[len(size)]
    return pool(value, size)


def _shortened(value: torch.Tensor, length: int) -> torch.Tensor:
    if value.shape[1] == length:
        return value
    return F.interpolate(value.transpose(1, 2), size=length, mode="linear").transpose(1, 2)
