"""`Ranking`: what each block matters, beside what it costs; as a table, a picture or plain data."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from torchtrim.bench.figure import figure, written
from torchtrim.bench.table import Table
from torchtrim.errors import InputError, PathError, nearest
from torchtrim.graph.summary import short

_BAR = 24  # letters, of the highest score


@dataclass(frozen=True)
class Ranked:
    """One block (or run of blocks) of a ranking.

    Attributes:
        path: Its path; of a run `"first .. last"`.
        paths: The paths of all of its blocks.
        score: How much it matters; higher = keep.
        macs: Its MACs at batch 1.
        params: Its parameters.
    """

    path: str
    paths: tuple[str, ...]
    score: float
    macs: int
    params: int


@dataclass(frozen=True)
class Ranking:
    """How much each block of a model matters. `str()` is a table, `plot()` a picture, `to_dict()` plain data.

    Attributes:
        model: The model's class.
        metric: What it was ranked by.
        unit: What a score is, in words.
        blocks: The blocks, in the order of execution.
        macs: The MACs of the whole model at batch 1.
        params: Its parameters.
        rows: How many rows of data were looked at.
        forwards: Forward passes over the data that it took.
        backwards: Backward passes over the data.
        seconds: How long it took.
        notes: What else is to be told.

    Example:
        >>> ranked = [Ranked("a", ("a",), 0.5, 10, 4), Ranked("b", ("b",), 0.1, 10, 4), Ranked("c", ("c",), 0.9, 5, 2)]
        >>> ranking = Ranking("Net", "influence", "1 - cosine", tuple(ranked), 40, 12, 64, 1.0, 0.0, 0.2)
        >>> ranking.order, ranking.least(2), ranking["c"].score
        (('b', 'a', 'c'), ['b', 'a'], 0.9)
        >>> ranking.spearman({"a": 2.0, "b": 1.0, "c": 3.0})
        1.0
    """

    model: str
    metric: str
    unit: str
    blocks: tuple[Ranked, ...]
    macs: int
    params: int
    rows: int
    forwards: float
    backwards: float
    seconds: float
    notes: tuple[str, ...] = ()

    @property
    def order(self) -> tuple[str, ...]:
        """The paths, the least important first; of equals the one that runs first."""
        return tuple(each.path for each in sorted(self.blocks, key=lambda each: each.score))

    def least(self, count: int = 1) -> list[str]:
        """The paths of the least important blocks, for `tt.remove`; of runs, such as do not overlap.

        Raises:
            InputError: There are not so many.
        """
        chosen: list[str] = []
        taken = 0
        for name in self.order:
            if taken < count and not set(self[name].paths) & set(chosen):
                chosen += self[name].paths
                taken += 1
        if taken < count or count < 0:
            raise InputError(
                "the ranking has not so many blocks", path="count", found=count, expected=f"0 to {max(taken, 0)}"
            )
        return chosen

    def spearman(self, other: Ranking | Mapping[str, float]) -> float:
        """The rank correlation of Spearman with another ranking of the same blocks: 1 for the same order; NaN where
        one of the two has all scores alike.

        Args:
            other: A ranking, or scores by path. What only one of the two has is left out.

        Raises:
            InputError: They have less than two blocks in common.
        """
        theirs = {each.path: each.score for each in other.blocks} if isinstance(other, Ranking) else dict(other)
        common = [each for each in self.blocks if each.path in theirs]
        if len(common) < 2:
            raise InputError(
                "two rankings are compared by the blocks that are in both",
                found=f"{len(common)} in both",
                expected="2 or more",
            )
        one = _ranks(np.array([each.score for each in common]))
        two = _ranks(np.array([theirs[each.path] for each in common]))
        if not one.std() or not two.std():
            return float("nan")
        return float(np.round(np.corrcoef(one, two)[0, 1], 12))

    def __getitem__(self, path: str) -> Ranked:
        for each in self.blocks:
            if each.path == path:
                return each
        names = [each.path for each in self.blocks]
        raise PathError("the ranking has no such block", path=path, hint=nearest(str(path), names))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold, with the order."""
        return {**asdict(self), "order": list(self.order)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Ranking:
        """The ranking that `to_dict` wrote.

        Example:
            >>> ranking = Ranking("Net", "norm", "", (Ranked("a", ("a",), 0.5, 10, 4),), 40, 12, 64, 1.0, 0.0, 0.2)
            >>> Ranking.from_dict(ranking.to_dict()) == ranking
            True
        """
        held = {name: value for name, value in data.items() if name != "order"}
        blocks = tuple(Ranked(**{**each, "paths": tuple(each["paths"])}) for each in data["blocks"])
        return Ranking(**{**held, "blocks": blocks, "notes": tuple(data["notes"])})

    def table(self) -> Table:
        """A row for each block, in the order of execution."""
        place = {path: number for number, path in enumerate(self.order, start=1)}
        most = max((each.score for each in self.blocks), default=0.0)
        rows = tuple(
            (
                each.path,
                _bar(each.score / most if most > 0 else 0.0),
                f"{each.score:.4g}",
                str(place[each.path]),
                short(each.macs),
                f"{each.macs / self.macs:.1%}" if self.macs else "",
                short(each.params),
                f"{each.params / self.params:.1%}" if self.params else "",
            )
            for each in self.blocks
        )
        columns = ("block", "matters", "score", "place", "MACs", "share", "params", "share")
        passes = f"{self.forwards:.3g} forward" + (f" and {self.backwards:.3g} backward" if self.backwards else "")
        notes = [
            f"- {self.metric}: {self.unit}; place 1 matters least",
            f"- {self.rows} rows, {passes} passes over them, {self.seconds:.1f} s",
            *(f"- {note}" for note in self.notes),
        ]
        return Table(f"Blocks of {self.model}", columns, rows, notes, left=2)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw scores and costs by depth; the file's ending says in which form (`.png`, `.svg`, `.pdf`).

        Raises:
            MissingDependency: matplotlib is not installed.
            InputError: It cannot be written there, or in this form.
        """
        names = [each.path for each in self.blocks]
        drawn = figure(8, 1.6 + 0.24 * len(names))
        scores, costs = drawn.subplots(1, 2, sharey=True, width_ratios=[3, 2])
        places = np.arange(len(names))
        least = set(self.order[: max(len(names) // 3, 1)])
        colours = ["#cc6677" if name in least else "#4477aa" for name in names]
        scores.barh(places, [each.score for each in self.blocks], color=colours)
        scores.set_yticks(places, names)
        scores.invert_yaxis()
        scores.set(title=f"{self.metric} (red: the least third)", xlabel=self.unit)
        for shift, label, whole, colour in ((-0.2, "MACs", self.macs, "#228833"), (0.2, "params", self.params, "#bbb")):
            shares = [100 * getattr(each, label.lower()) / max(whole, 1) for each in self.blocks]
            costs.barh(places + shift, shares, height=0.4, label=label, color=colour)
        costs.set(title="cost", xlabel="percent of the model")
        costs.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
        return written(drawn, path)


def _bar(share: float) -> str:
    eighths = round(8 * _BAR * min(max(share, 0.0), 1.0))
    return ("█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8]).rstrip()


def _ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The place of each value; equal ones share the mean of theirs."""
    below = (values[:, None] > values[None, :]).sum(1)
    same = (values[:, None] == values[None, :]).sum(1)
    ranks: npt.NDArray[np.float64] = below + (same - 1) / 2
    return ranks
