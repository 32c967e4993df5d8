"""Hints: pairs of places inside the student and the teacher, as users give them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from torchtrim.edits.addresses import Address
from torchtrim.edits.apply import lies_in
from torchtrim.edits.budget import plain_number
from torchtrim.edits.history import history
from torchtrim.errors import InputError, PathError, SelectionError, nearest

HintLoss: TypeAlias = str | Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
KINDS = ("features", "attention", "relational", "distance", "angle")
Hints: TypeAlias = "str | Hint | Mapping[str, str | Hint] | Sequence[str | Hint]"


@dataclass(frozen=True)
class Hint:
    """One pair of places, and what is asked of the student there.

    Attributes:
        student: An address in the student, as `tt.cut` takes it: `"layer3"`, `"layer3.0.relu#1"`, `"layer3.0:add"`. Of
            a call that returns several tensors the first is taken.
        teacher: An address in the teacher; left out, the same.
        loss: `"features"` (the student's value, projected where widths differ, is to be the teacher's: FitNets, Romero
            et al. 2015), `"attention"` (it is to look at the same places: Zagoruyko and Komodakis 2017),
            `"relational"`, `"distance"` or `"angle"` (samples are to lie to each other alike: Park et al. 2019), or a
            function of the two values, student first, that returns a scalar. A function that is an `nn.Module` with
            parameters is trained along: it is among `distiller.projections`.
        normalize: For `"features"`: bring each sample's values to mean 0 and variance 1 first.
        weight: What the loss is multiplied by.
        project: Whether the student's value goes through a projection (a convolution over one place, or a linear
            layer). By default for `"features"`, where widths differ.
        channel_axis: Which dimension is the channels', 1 or -1; by default found from the layers before it.
        resize: Where both are token sequences of different lengths: interpolate the longer one along the sequence.
            Refused by default, since tokens need not have an order that can be interpolated.

    Example:
        >>> Hint("layer3", loss="attention").teacher
        'layer3'
    """

    student: str
    teacher: str = ""
    loss: HintLoss = "features"
    normalize: bool = False
    weight: float = 1.0
    project: bool | None = None
    channel_axis: int | None = None
    resize: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.student, str) or not isinstance(self.teacher, str) or not self.student:
            raise InputError(
                "a hint is between two addresses",
                path="hints",
                found=(self.student, self.teacher),
                expected="two strings",
            )
        if not self.teacher:
            object.__setattr__(self, "teacher", self.student)
        if isinstance(self.loss, str) and self.loss not in KINDS:
            raise InputError(
                "no such loss for a hint",
                path=self.student,
                found=self.loss,
                expected=f"{', '.join(KINDS)}, or a function",
                hint=nearest(self.loss, KINDS),
            )
        if not callable(self.loss) and not isinstance(self.loss, str):
            raise InputError("not a loss for a hint", path=self.student, found=repr(self.loss)[:60], expected=KINDS)
        if self.channel_axis not in (None, 1, -1):
            raise InputError("channels are dimension 1 or -1", path=self.student, found=self.channel_axis)
        checked_weight(self.student, self.weight)

    @property
    def kind(self) -> str:
        """The name of its loss."""
        return self.loss if isinstance(self.loss, str) else getattr(self.loss, "__name__", type(self.loss).__name__)


def checked_weight(name: str, weight: object) -> float:
    """A weight as a number.

    Raises:
        InputError: Not a number from 0 up.
    """
    number = plain_number(weight)
    if number is None or not 0 <= number < float("inf"):
        raise InputError("a weight is a number from 0 up", path=f"weights[{name!r}]", found=repr(weight))
    return float(number)


def named(given: Any) -> dict[str, Hint]:
    """Hints by name, in whatever form they are given.

    A mapping from the student's address to the teacher's (or from a name to a `Hint`), a list of addresses that both
    have (or of `Hint`s), or one of them. A hint without a name goes by the student's address, and by its loss too where
    that is taken.

    Raises:
        InputError: It is none of these, or two have one name.

    Example:
        >>> list(named({"layer3": "layer4"})), list(named(["layer1", Hint("layer1", loss="attention")]))
        (['layer3'], ['layer1', 'layer1 attention'])
    """
    if given is None:
        return {}
    if isinstance(given, (str, Hint)):
        given = [given]
    found: dict[str, Hint] = {}
    if isinstance(given, Mapping):
        for name, value in given.items():
            if not isinstance(name, str) or not isinstance(value, (str, Hint)):
                raise InputError(
                    "hints go from an address in the student to one in the teacher",
                    path="hints",
                    found=f"{name!r}: {value!r}"[:80],
                    hint='{"layer3": "layer3"}, or {"name": tt.Hint("layer3", loss="attention")}',
                )
            found[name] = value if isinstance(value, Hint) else Hint(name, value)
        return found
    if not isinstance(given, Sequence) or not all(isinstance(each, (str, Hint)) for each in given):
        raise InputError(
            "hints are a mapping, a list, or 'auto'",
            path="hints",
            found=repr(given)[:80],
            hint='{"layer3": "layer3"}, from the student to the teacher',
        )
    for each in given:
        hint = each if isinstance(each, Hint) else Hint(each)
        name = hint.student if hint.student not in found else f"{hint.student} {hint.kind}"
        if name in found:
            raise InputError("two hints have one name", path=name, hint="a mapping, with a name for each")
        found[name] = hint
    return found


def address_in(model: nn.Module, text: str, whose: str) -> Address:
    """An address in a student or a teacher.

    Raises:
        PathError: There is none; where an edit took it away, says which.
    """
    try:
        place = Address.of(model, text)
    except PathError as error:
        gone = taken_away(model, text)
        message = f"the {whose} has no such place: {error.message}"
        if gone is None:
            raise PathError(message, path=text, found=error.found, expected=error.expected, hint=error.hint) from error
        raise PathError(
            f"the {whose} has no such place any more: it went away with {gone}",
            path=text,
            hint="another place, or hints='auto', which takes those that both have",
        ) from error
    if not place.path and place.function is None:
        raise PathError(f"that is the whole {whose}", path=repr(text), hint="the soft targets, or losses=")
    return place


def taken_away(model: nn.Module, text: str) -> str | None:
    """Which edit of its history took a place out of a model, in words; `None` where none did.

    Example:
        >>> import torchtrim as tt
        >>> net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        >>> taken_away(tt.cut(net, torch.zeros(1, 4), after="1"), "2")
        "edit 1, cut(after='1')"
    """
    entries = history(model).entries
    for number, entry in reversed(list(enumerate(entries, 1))):
        if any(lies_in(text, gone) for gone in entry.removed):
            return f"edit {number}, {entry.edit}"
    return None


def merged_weights(
    defaults: Mapping[str, float], given: Mapping[str, float] | None, others: Sequence[str] = ()
) -> dict[str, float]:
    """Weights by name, those given in place of the defaults; terms that weigh nothing are left out.

    Raises:
        SelectionError: A weight for a term that there is not, or nothing that weighs.
        InputError: A weight that is no number from 0 up.

    Example:
        >>> merged_weights({"hard": 0.5, "soft": 0.5}, {"hard": 0})
        {'soft': 0.5}
    """
    if given is not None and not isinstance(given, Mapping):
        raise InputError("weights go by name", path="weights", found=repr(given)[:60], hint='{"soft": 0.9}')
    for name in given or {}:
        if name not in defaults:
            raise SelectionError(
                "a weight for a loss that there is not",
                found=repr(name),
                expected=", ".join(map(repr, [*defaults, *others])),
                hint=nearest(str(name), defaults),
            )
    found = {name: checked_weight(name, weight) for name, weight in {**defaults, **(given or {})}.items()}
    if not any(found.values()):
        raise SelectionError("no loss has a weight above 0, so there is nothing to learn", found=found)
    return {name: weight for name, weight in found.items() if weight}
