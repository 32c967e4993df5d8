"""Where the marks of a chart stand: axes, ticks, dots and curves as plain numbers, which the page's template draws.

All places are percent of the drawing, so that it is as wide as its page while its letters keep their size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torchtrim.report.trim_words import MINUS, NAMES, amount, known, score, signed
from torchtrim.search.sensitivity import KINDS

if TYPE_CHECKING:
    from torchtrim.report.trim_report import CandidateRow, TrimReport
    from torchtrim.search.sensitivity import Sensitivity

_TOP, _BOTTOM, _LEFT, _RIGHT = 0.06, 0.06, 0.1, 0.04  # free around the marks, as a share; labels are on the left
_HIGHLIGHTED = 4  # curves that have a colour of their own
_WIDE, _TALL = 280.0, 240.0  # pixels that a phone has for a chart: what fits there fits everywhere
_LETTER, _LINE = 7.0, 14.0  # pixels of a letter of a label, and of its height


@dataclass(frozen=True)
class Tick:
    """A place on an axis, in percent, and what stands there."""

    place: float
    text: str


@dataclass(frozen=True)
class Dot:
    """A mark.

    Attributes:
        x: Its place from the left, in percent.
        y: Its place from the top.
        kind: `measured`, `front`, `kept` or `original`.
        text: All of it, in words.
        number: The candidate's number; None for what is none.
        label: What stands beside it.
        anchor: Which end of the label is at the mark: `start`, `middle` or `end`.
        dx: How far from the mark that is, in pixels to the right.
        dy: How far, in pixels down.
    """

    x: float
    y: float
    kind: str
    text: str
    number: int | None = None
    label: str = ""
    anchor: str = "start"
    dx: int = 0
    dy: int = 0


@dataclass(frozen=True)
class Rule:
    """A line across the chart, at `x` or at `y`, with its name.

    Attributes:
        text: The name.
        kind: `limit` or `reference`.
        x: Where an upright one is; its name is above the chart.
        y: Where a level one is; its name is above it, at the left end.
    """

    text: str
    kind: str
    x: float | None = None
    y: float | None = None


@dataclass(frozen=True)
class Curve:
    """A line through points: `"x,y x,y"` in percent; `kind` 0 is not highlighted, 1 to 4 are."""

    points: str
    text: str
    kind: int = 0
    ends: tuple[tuple[float, float], ...] = ()


@dataclass(frozen=True)
class Chart:
    """What is drawn.

    Attributes:
        name: What its parts are called in the page.
        title: What it shows.
        description: What there is to see, for who does not see it.
        across: What the horizontal axis is.
        up: What the vertical axis is.
        x: The ticks of the horizontal axis.
        y: The ticks of the vertical one.
        rules: Lines across.
        curves: Lines through points.
        dots: Marks.
    """

    name: str
    title: str
    description: str
    across: str
    up: str
    x: tuple[Tick, ...]
    y: tuple[Tick, ...]
    rules: tuple[Rule, ...] = ()
    curves: tuple[Curve, ...] = ()
    dots: tuple[Dot, ...] = ()


@dataclass(frozen=True)
class Scale:
    """From values to percent.

    Attributes:
        low: The value at 0 %.
        high: The value at 100 %.

    Example:
        >>> Scale.around([10.0, 20.0], 0.0, 0.0).place(15.0)
        50.0
        >>> Scale.around([3.0], 0.0, 0.0).place(3.0)
        50.0
    """

    low: float
    high: float

    @staticmethod
    def around(values: Iterable[float], below: float, above: float) -> Scale:
        """One that holds all of them, with a share of free space at both ends."""
        listed = list(values) or [0.0]
        low, high = min(listed), max(listed)
        span = high - low
        if not span:
            span = abs(high) * 0.1 or 1.0
            low, high = low - span / 2, high + span / 2
        return Scale(low - span * below, high + span * above)

    def place(self, value: float) -> float:
        """Where a value stands, in percent from the low end."""
        return round((value - self.low) / (self.high - self.low) * 100, 2)

    def ticks(self, count: int = 5) -> list[float]:
        """Round values in it, at most so many.

        Example:
            >>> Scale(0.0, 1.0).ticks(), Scale(0.712, 0.768).ticks(4)
            ([0.0, 0.25, 0.5, 0.75, 1.0], [0.72, 0.74, 0.76])
        """
        rough = (self.high - self.low) / count
        power = 10.0 ** math.floor(math.log10(rough))
        for factor in (1, 2, 2.5, 5, 10, 20):
            step = factor * power
            first, last = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
            if last - first < count:
                break
        return [round(number * step, 12) for number in range(first, last + 1)]


def front_chart(report: TrimReport) -> Chart | None:
    """Score over cost of what was measured, the front as a line, the limits; None where nothing was measured."""
    cost = report.front
    found = [
        (each, x, y)
        for each in report.candidates
        if (x := _cost(each, cost)) is not None and (y := known(each.score)) is not None
    ]
    if not found:
        return None
    original = None if report.before is None else known(getattr(report.before, cost))
    baseline = known(report.baseline)
    limits = {each.name: each.limit for each in report.limits if known(each.limit) is not None}
    xs = [x for _, x, _ in found] + [value for value in (original, limits.get(cost)) if value is not None]
    least = None if baseline is None or "max_drop" not in limits else baseline - limits["max_drop"]
    ys = [y for *_, y in found] + [value for value in (baseline, least) if value is not None]
    across, up = Scale.around(xs, _LEFT, _RIGHT), Scale.around(ys, _BOTTOM, _TOP)

    dots = []
    for each, x, y in sorted(found, key=lambda one: (one[0].kept, one[0].on_front)):
        kind = "kept" if each.kept else "front" if each.on_front else "measured"
        text = f"{each.number}: {each.text} · {report.score} {score(y)} · {amount(cost, x)}"
        dots.append(_dot(across.place(x), 100 - up.place(y), kind, text, each.number))
    if original is not None and baseline is not None:
        text = f"untouched · {report.score} {score(baseline)} · {amount(cost, original)}"
        dots.append(_dot(across.place(original), 100 - up.place(baseline), "original", text))
    line = sorted({(x, y) for each, x, y in found if each.on_front})
    points = [(across.place(x), round(100 - up.place(y), 2)) for x, y in line]
    rules = []
    if cost in limits:
        place = across.place(limits[cost])
        rules.append(Rule(f"at most {amount(cost, limits[cost])}", "limit", x=place))
    if least is not None:
        rules.append(Rule(f"at least {score(least)}", "limit", y=round(100 - up.place(least), 2)))
    kept = next((f"The kept one is {text}." for dot in dots if dot.kind == "kept" for text in [dot.text]), "")
    return Chart(
        "front",
        f"{report.score} over {NAMES[cost]}",
        f"{len(found)} measured candidates, {len(line)} of them on the front. {kept} The table below has the values.",
        NAMES[cost],
        report.score,
        tuple(Tick(across.place(value), _tick(cost, value)) for value in across.ticks(4)),
        tuple(Tick(100 - up.place(value), _tick("score", value)) for value in up.ticks(5)),
        tuple(rules),
        (Curve(_points(points), "the front"),) if len(points) > 1 else (),
        _labelled(dots, rules),
    )


def curve_charts(found: Sensitivity, name: str) -> list[Chart]:
    """One for each kind of change that has more than one fraction; the layers that lose most have a colour."""
    charts = []
    for kind in KINDS:
        curves = {path: found.curve(path, kind) for path in _measured(found, kind)}
        curves = {path: [(x, y) for x, y in curve if known(y) is not None] for path, curve in curves.items()}
        if kind in ("remove", "int8") or not curves:
            continue
        up = Scale.around([y for curve in curves.values() for _, y in curve], _BOTTOM, _TOP)
        across = Scale(0.0, max(x for curve in curves.values() for x, _ in curve) or 1.0)
        ratios = sorted({x for curve in curves.values() for x, _ in curve})
        marked = ratios if len(ratios) <= 6 else across.ticks(5)
        worst = sorted(curves, key=lambda path: min((y for _, y in curves[path]), default=math.inf))[:_HIGHLIGHTED]
        lines = []
        for path, curve in curves.items():
            points = [(across.place(x), round(100 - up.place(y), 2)) for x, y in curve]
            last = curve[-1] if curve else (0.0, found.baseline)
            text = f"{path}: {signed(last[1] - found.baseline)} at {last[0] * 100:g} %"
            place = worst.index(path) + 1 if path in worst else 0
            lines.append(Curve(_points(points), text, place, tuple(points[1:]) if place else ()))
        lines.sort(key=lambda line: (line.kind > 0, -line.kind))  # what is highlighted is drawn last
        charts.append(
            Chart(
                f"curve-{kind}",
                f"{name} against the fraction that went: {kind}",
                f"{len(curves)} layers. Most is lost by {', '.join(worst[:3])}. The table below has the values.",
                "fraction that went",
                name,
                tuple(Tick(across.place(value), f"{value * 100:g} %") for value in marked),
                tuple(Tick(100 - up.place(value), _tick("score", value)) for value in up.ticks(5)),
                (Rule("untouched", "reference", y=round(100 - up.place(found.baseline), 2)),),
                tuple(lines),
            )
        )
    return charts


def drops(found: Sensitivity) -> list[tuple[str, list[tuple[str, float, str]]]]:
    """For each kind that has no curve, each layer with its drop, as a number and in words."""
    listed = []
    for kind in ("remove", "int8"):
        rows = [
            (point.path, drop, signed(-drop))
            for point in found.points
            if point.kind == kind and (drop := known(point.drop)) is not None
        ]
        if rows:
            listed.append((kind, rows))
    return listed


def _measured(found: Sensitivity, kind: str) -> list[str]:
    return list(dict.fromkeys(p.path for p in found.points if p.kind == kind and known(p.score) is not None))


def _cost(candidate: CandidateRow, name: str) -> float | None:
    value: float | None = getattr(candidate, name)
    return known(value)


def _dot(x: float, y: float, kind: str, text: str, number: int | None = None) -> Dot:
    return Dot(x, round(y, 2), kind, text, number)


def _labelled(dots: Sequence[Dot], rules: Sequence[Rule]) -> tuple[Dot, ...]:
    """The dots with labels where there is room, on a phone too: the kept one and the untouched one first.

    A label stands above its dot on the left: what would be there, better and cheaper, would be on the front instead.
    """
    order = ("kept", "original", "front")
    named = sorted(
        (place for place, dot in enumerate(dots) if dot.kind in order), key=lambda n: order.index(dots[n].kind)
    )
    taken = [
        (0.0, rule.y / 100 * _TALL - 1.3 * _LINE, _LETTER * len(rule.text), _LINE * 1.3)
        for rule in rules
        if rule.y is not None
    ]
    taken += [(dot.x / 100 * _WIDE - 6, dot.y / 100 * _TALL - 6, 12.0, 12.0) for dot in dots]
    done = list(dots)
    for place in named:
        dot = dots[place]
        label = {"kept": f"kept ({dot.number})", "original": "untouched"}.get(dot.kind, str(dot.number))
        wide = _LETTER * len(label)
        x, y = dot.x / 100 * _WIDE, dot.y / 100 * _TALL
        for anchor, dx, dy in (
            ("end", -8, -7),
            ("middle", 0, -16),
            ("start", 11, 12),
            ("end", -11, 14),
            ("middle", 0, 18),
        ):
            begin = x + dx - {"start": 0.0, "middle": wide / 2, "end": wide}[anchor]
            box = (begin, y + dy - _LINE / 2, wide, _LINE)
            if begin > 0 and begin + wide < _WIDE + 6 and not any(_over(box, other) for other in taken):
                taken.append(box)
                done[place] = replace(dot, label=label, anchor=anchor, dx=dx, dy=dy)
                break
    return tuple(done)


def _over(one: tuple[float, float, float, float], two: tuple[float, float, float, float]) -> bool:
    """Whether two boxes, each left, top, width and height, overlap."""
    return (
        one[0] < two[0] + two[2] and two[0] < one[0] + one[2] and one[1] < two[1] + two[3] and two[1] < one[1] + one[3]
    )


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:g},{y:g}" for x, y in points)


def _tick(name: str, value: float) -> str:
    """A tick's value: no more digits than it needs."""
    if name in ("macs", "params"):
        for size, unit in ((1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
            if abs(value) >= size:
                return f"{value / size:g}{unit}"
        return f"{value:g}"
    unit = {"latency_ms": " ms", "size_mb": " MB"}.get(name, "")
    return f"{value:g}{unit}".replace("-", MINUS)
