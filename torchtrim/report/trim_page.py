"""The page of a trim's report: one HTML file with its pictures, its style and its script in it."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from torchtrim import __version__
from torchtrim.report import trim_words
from torchtrim.report.trim_charts import Scale, curve_charts, drops, front_chart
from torchtrim.report.trim_words import COSTS, NAMES, known, ratio

if TYPE_CHECKING:
    from torchtrim.importance.ranking import Ranking
    from torchtrim.report.trim_report import LayerRow, TrimReport
    from torchtrim.search.sensitivity import Sensitivity

_CROWD = 24  # layers of a part of the map above which it is told apart further down
_PARTS = 48  # and so many parts at most
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # what a page must not hold


@dataclass(frozen=True)
class Cell:
    """One layer of the map: its row, what is left of it (0 to 1), and all of it in words."""

    row: LayerRow
    left: float
    text: str


@dataclass(frozen=True)
class Part:
    """A run of layers under one name.

    Attributes:
        name: What their paths begin with.
        cells: The layers.
        macs_before: Their MACs in the untouched model.
        macs_after: Those in the kept one.
    """

    name: str
    cells: tuple[Cell, ...]
    macs_before: int
    macs_after: int


@dataclass(frozen=True)
class Bar:
    """A bar from `start` on, `length` wide, both in percent; `below` for what is less than zero."""

    start: float
    length: float
    below: bool = False


def page(report: TrimReport) -> str:
    """The whole page.

    Args:
        report: What was done.
    """
    environment = _environment()
    style, script = (environment.get_template(name).render() for name in ("trim.css", "trim.js"))
    said = {name: getattr(trim_words, name) for name in _SAID}
    return environment.get_template("trim.html.jinja").render(
        report=report,
        **said,
        costs=[name for name in COSTS if any(known(getattr(stage, name)) is not None for stage in report.stages)],
        names=NAMES,
        version=__version__,
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        parts=parts(report.layers),
        counts={state: sum(row.state == state for row in report.layers) for state in _STATES},
        left=_left,
        bar=_share,
        front=front_chart(report),
        front_rows=sorted((each for each in report.candidates if each.on_front or each.kept), key=_by(report.front)),
        stage_dots=_stage_dots(report),
        ranking=None if report.ranking is None else _ranked(report.ranking),
        curves=[] if report.sensitivity is None else curve_charts(report.sensitivity, report.score),
        drops=[] if report.sensitivity is None else _drops(report.sensitivity),
        sensitivity=None if report.sensitivity is None else report.sensitivity.table(),
        exported=() if report.export is None else report.export.tables(),
    )


_STATES = ("kept", "thinned", "removed", "added")
_SAID = ("against_noise", "amount", "asked", "duration", "outcome", "percent", "ratio", "score", "times", "verdict")


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("torchtrim", "report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _clean(value: Any) -> Any:
    """A text without the letters that a page must not hold."""
    return _CONTROL.sub("�", value) if type(value) is str else value


def parts(layers: Sequence[LayerRow]) -> list[Part]:
    """The layers in runs by what their paths begin with: as deep as it takes to have runs that are not too long.

    Args:
        layers: The layers, in their order.
    """
    runs = _runs(layers, 1)
    while True:
        place, (depth, run) = max(enumerate(runs), key=lambda each: len(each[1][1]), default=(0, (0, [])))
        if len(run) <= _CROWD:
            break
        finer = _runs(run, depth + 1)
        if len(finer) == 1 and depth < 12:
            runs[place] = (depth + 1, run)
            continue
        if len(finer) == 1 or len(runs) + len(finer) - 1 > _PARTS:
            break
        runs[place : place + 1] = finer
    return [
        Part(
            _shared([row.path for row in run]),
            tuple(_cell(row) for row in run),
            sum(row.macs_before for row in run),
            sum(row.macs_after for row in run),
        )
        for _, run in runs
    ]


def _runs(layers: Sequence[LayerRow], depth: int) -> list[tuple[int, list[LayerRow]]]:
    """Neighbours that agree in the first names of their paths."""
    runs: list[tuple[int, list[LayerRow]]] = []
    last = None
    for row in layers:
        names = row.path.split(".")
        begin = names[: min(depth, max(len(names) - 1, 1))] if depth > 1 else names[:1]
        if begin == last:
            runs[-1][1].append(row)
        else:
            runs.append((depth, [row]))
        last = begin
    return runs


def _shared(paths: Sequence[str]) -> str:
    """What they all begin with; of one path all of it."""
    first, last = min(paths).split("."), max(paths).split(".")
    same = 0
    while same < min(len(first), len(last)) and first[same] == last[same]:
        same += 1
    return ".".join(first[:same]) or f"{paths[0]} …"


def _cell(row: LayerRow) -> Cell:
    told = f"{row.path} ({row.type}): {row.state}"
    if row.state == "thinned":
        told += f", {_left(row):.0%} left"
    if row.shape_before != row.shape_after and row.shape_before and row.shape_after:
        told += f", {row.shape_before} → {row.shape_after}"
    return Cell(row, _left(row), told)


def _left(row: LayerRow) -> float:
    """What is left of a layer: of its parameters; where it has none, of its MACs, or of the numbers it gives."""
    if row.state in ("kept", "added"):
        return 1.0
    if row.state == "removed":
        return 0.0
    share = ratio(row.params_before, row.params_after)
    share = ratio(row.macs_before, row.macs_after) if share is None else share
    if share is None:
        shapes = [[int(size) for size in re.findall(r"[0-9]+", shape)] for shape in (row.shape_before, row.shape_after)]
        share = ratio(*map(math.prod, shapes)) if len(shapes[0]) == len(shapes[1]) else None
    return 1.0 if share is None else min(max(share, 0.0), 1.0)


def _share(value: float | None, whole: float | None) -> Bar:
    """A bar for a part of a whole; no longer than that."""
    share = ratio(whole, value)
    return Bar(0.0, 0.0 if share is None else round(min(max(share, 0.0), 1.0) * 100, 1))


def _around_zero(values: Sequence[float | None]) -> list[Bar]:
    """Bars from zero, which lies where the least value needs it."""
    real = [value for value in map(known, values) if value is not None]
    scale = Scale.around([0.0, *real], 0.0, 0.0)
    zero = scale.place(0.0) if any(real) else 0.0
    bars = []
    for value in map(known, values):
        place = zero if not value else scale.place(value)
        bars.append(Bar(round(min(zero, place), 2), round(abs(place - zero), 2), place < zero))
    return bars


def _stage_dots(report: TrimReport) -> tuple[float | None, list[float | None]]:
    """Where the baseline and each stage's score stand on a line that holds them all, in percent."""
    scores = [known(stage.score) for stage in report.stages]
    baseline = known(report.baseline)
    real = [value for value in (*scores, baseline) if value is not None]
    scale = Scale.around(real, 0.08, 0.08)
    places = [None if value is None else scale.place(value) for value in scores]
    return (None if baseline is None else scale.place(baseline)), places


def _ranked(ranking: Ranking) -> list[tuple[Any, Bar, int]]:
    """Each block with its bar and its place, 1 for what matters least."""
    bars = _around_zero([each.score for each in ranking.blocks])
    order = {path: number for number, path in enumerate(ranking.order, start=1)}
    return [(each, bar, order[each.path]) for each, bar in zip(ranking.blocks, bars, strict=True)]


def _drops(found: Sensitivity) -> list[tuple[str, list[tuple[str, str, Bar]]]]:
    """For each kind without curves, each layer with its drop and its bar."""
    return [
        (
            kind,
            [
                (path, text, bar)
                for (path, _, text), bar in zip(rows, _around_zero([-drop for _, drop, _ in rows]), strict=True)
            ],
        )
        for kind, rows in drops(found)
    ]


def _by(cost: str) -> Any:
    """Sorts by a cost; what is not known comes last."""
    return lambda each: (known(getattr(each, cost)) is None, known(getattr(each, cost)) or 0.0)
