"""When weights are pruned while a model is trained, and how many are zero by then."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torchtrim.edits.budget import plain_number
from torchtrim.edits.sparsify import fraction
from torchtrim.errors import EditError

_NEEDED = -1  # of an argument behind others that may be left out


@runtime_checkable
class SparsitySchedule(Protocol):
    """What `MagnitudePruner` takes: how sparse a model is at a step, and whether weights are pruned then.

    Steps are those of the optimizer, counted from 0: the first call of `step()` is step 0.
    """

    @property
    def final(self) -> float:
        """The sparsity that is reached in the end."""

    def at(self, step: int) -> float:
        """The sparsity that belongs to a step."""

    def due(self, step: int) -> bool:
        """Whether weights are pruned at a step."""


@dataclass(frozen=True)
class PolynomialDecay:
    """From one sparsity to another, fast at first and ever more slowly: while there are many weights that can go.

    At step `t` from `begin` to `end` it is `final + (initial - final) * (1 - (t - begin) / (end - begin)) ** power`,
    with a power of 3 the schedule of Zhu and Gupta (*To prune, or not to prune*, 2017). Weights are pruned at `begin`,
    every `every` steps after it, and at `end`, whether or not `every` divides the range.

    Args:
        initial: The sparsity at `begin`.
        final: The sparsity at `end`, and from then on.
        begin: The first step at which weights are pruned.
        end: The last; it has to be given.
        every: How many steps lie between.
        power: How much faster it is at first; 1 for a straight line.

    Raises:
        EditError: It ends before it begins, gets less sparse, or a number is out of range.

    Example:
        >>> schedule = PolynomialDecay(0.5, 0.9, begin=0, end=250, every=100)
        >>> [step for step in range(300) if schedule.due(step)], schedule.at(0), schedule.at(250)
        ([0, 100, 200, 250], 0.5, 0.9)
    """

    initial: float
    final: float
    begin: int = 0
    end: int = _NEEDED
    every: int = 100
    power: float = 3.0

    def __post_init__(self) -> None:
        initial, final = fraction(self.initial, "initial"), fraction(self.final, "final")
        if final < initial:
            raise EditError(
                "what is pruned does not come back", path="final", found=final, expected=f"{initial} or more"
            )
        if self.end == _NEEDED:
            raise EditError("when is the final sparsity to be reached?", path="end", hint="end=, a number of steps")
        _check_range(self.begin, self.end, self.every)
        if self.end == self.begin:
            raise EditError("it ends where it begins", path="end", found=self.end, hint="tt.OneShotSparsity")
        power = plain_number(self.power)
        if power is None or not 0 < power < float("inf"):
            raise EditError("a power is a number above 0", path="power", found=repr(self.power))
        for name, value in (("initial", initial), ("final", final), ("power", float(power))):
            object.__setattr__(self, name, value)

    def at(self, step: int) -> float:
        """The sparsity that belongs to a step: 0 before it begins."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        left = 1 - (step - self.begin) / (self.end - self.begin)
        return float(self.final + (self.initial - self.final) * left**self.power)

    def due(self, step: int) -> bool:
        """Whether weights are pruned at a step."""
        return self.begin <= step <= self.end and ((step - self.begin) % self.every == 0 or step == self.end)


@dataclass(frozen=True)
class ConstantSparsity:
    """One sparsity from a step on.

    Args:
        target: The sparsity.
        begin: The first step at which weights are pruned.
        end: The last at which they are chosen anew (which matters where they may come back); `None` for no last one.
        every: How many steps lie between.

    Raises:
        EditError: It ends before it begins, or a number is out of range.

    Example:
        >>> schedule = ConstantSparsity(0.5, begin=10)
        >>> schedule.at(9), schedule.at(10), schedule.due(10)
        (0.0, 0.5, True)
    """

    target: float
    begin: int = 0
    end: int | None = None
    every: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", fraction(self.target, "target"))
        _check_range(self.begin, self.begin if self.end is None else self.end, self.every)

    @property
    def final(self) -> float:
        """The sparsity that is reached in the end."""
        return self.target

    def at(self, step: int) -> float:
        """The sparsity that belongs to a step: 0 before it begins."""
        return 0.0 if step < self.begin else self.target

    def due(self, step: int) -> bool:
        """Whether weights are pruned at a step."""
        over = self.end is not None and step > self.end
        return step >= self.begin and not over and ((step - self.begin) % self.every == 0 or step == self.end)


@dataclass(frozen=True)
class OneShotSparsity:
    """All at one step, and training goes on with what is left (Han et al. 2015).

    Args:
        target: The sparsity.
        step: When.

    Raises:
        EditError: A number is out of range.

    Example:
        >>> schedule = OneShotSparsity(0.5, step=3)
        >>> [step for step in range(10) if schedule.due(step)], schedule.at(2), schedule.at(3)
        ([3], 0.0, 0.5)
    """

    target: float
    step: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "target", fraction(self.target, "target"))
        _count(self.step, "step", 0)

    @property
    def final(self) -> float:
        """The sparsity that is reached in the end."""
        return self.target

    @property
    def end(self) -> int:
        """The last step at which weights are pruned."""
        return self.step

    def at(self, step: int) -> float:
        """The sparsity that belongs to a step: 0 before it."""
        return 0.0 if step < self.step else self.target

    def due(self, step: int) -> bool:
        """Whether weights are pruned at a step."""
        return step == self.step


def checked_schedule(schedule: object) -> SparsitySchedule:
    """The schedule that was given.

    Raises:
        EditError: It is none.
    """
    if isinstance(schedule, type) or not isinstance(schedule, SparsitySchedule):
        raise EditError(
            "not a schedule",
            path="schedule",
            found=repr(schedule),
            expected="something with final, at(step) and due(step)",
            hint="tt.PolynomialDecay(0.5, 0.9, end=2000) or tt.ConstantSparsity(0.5)",
        )
    fraction(schedule.final, "schedule.final")
    return schedule


def _check_range(begin: object, end: object, every: object) -> None:
    first, last = _count(begin, "begin", 0), _count(end, "end", 0)
    if last < first:
        raise EditError("it ends before it begins", path="end", found=last, expected=f"{first} or later")
    _count(every, "every", 1)


def _count(given: object, path: str, least: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < least:
        raise EditError("a number of steps", path=path, found=repr(given), expected=f"a whole number, {least} or more")
    return given
