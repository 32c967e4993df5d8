"""How the numbers of a trim are said: with their unit, beside what they were, against their limit."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from torchtrim.graph.summary import short

if TYPE_CHECKING:
    from torchtrim.report.trim_report import Limit, Stage, TrimReport

NAMES = {
    "macs": "MACs",
    "params": "parameters",
    "size_mb": "size",
    "latency_ms": "latency",
    "max_drop": "drop of the score",
}
COSTS = ("macs", "params", "size_mb", "latency_ms")
NOTHING = "\N{EN DASH}"
MINUS, TIMES = "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"


def known(value: float | None) -> float | None:
    """The number; None for one that is no number, or without end.

    Example:
        >>> known(float("nan")), known(2)
        (None, 2)
    """
    return value if value is not None and math.isfinite(value) else None


def amount(name: str, value: float | None) -> str:
    """A cost, or a score, with its unit.

    Example:
        >>> amount("macs", 1.2e9), amount("latency_ms", 8.126), amount("size_mb", 0.031), amount("score", 0.75)
        ('1.20 G', '8.13 ms', '0.031 MB', '0.7500')
    """
    if known(value) is None or value is None:
        return NOTHING
    if name in ("macs", "params"):
        return short(value)
    if name == "size_mb":
        return f"{_places(value)} MB"
    if name == "latency_ms":
        return f"{_places(value)} ms"
    return score(value)


def score(value: float | None) -> str:
    """A score, or a drop, which may be of any size.

    Example:
        >>> score(0.7512), score(-134.2), score(None), score(0.00001)
        ('0.7512', '-134.2', '–', '1e-05')
    """
    if known(value) is None or value is None:
        return NOTHING
    if 0 < abs(value) < 0.001:
        return f"{value:.2g}"
    return f"{value:.4g}" if abs(value) >= 10 else f"{value:.4f}"


def signed(value: float | None) -> str:
    """A difference of scores.

    Example:
        >>> signed(-0.01), signed(0.0)
        ('−0.0100', '±0')
    """
    if known(value) is None or value is None:
        return NOTHING
    return "±0" if value == 0 else ("+" if value > 0 else MINUS) + score(abs(value))


def ratio(before: float | None, after: float | None) -> float | None:
    """What is left of it, as a share; None where one of the two is not known, or there was nothing."""
    one, two = known(before), known(after)
    return None if not one or two is None else two / one


def times(before: float | None, after: float | None) -> str:
    """What is left of it, in words.

    Example:
        >>> times(200, 50), times(0, 5), times(100, 100)
        ('0.25×', '–', '1.00×')
    """
    left = ratio(before, after)
    return NOTHING if left is None else f"{left:.2f}{TIMES}"


def percent(before: float | None, after: float | None) -> str:
    """How much less, or more, it became.

    Example:
        >>> percent(200, 50), percent(50, 100), percent(7, 7)
        ('−75 %', '+100 %', '±0 %')
    """
    left = ratio(before, after)
    if left is None:
        return NOTHING
    change = round((left - 1) * 100, 1 if abs(left - 1) < 0.1 else None)
    return "±0 %" if not change else f"{'+' if change > 0 else MINUS}{abs(change):g} %"


def duration(seconds: float) -> str:
    """A time that was taken.

    Example:
        >>> duration(0.21), duration(75), duration(7300)
        ('0.2 s', '1 min 15 s', '2 h 1 min')
    """
    if known(seconds) is None:
        return NOTHING
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def asked(limit: Limit) -> str:
    """What a limit asks for.

    Example:
        >>> from torchtrim.report.trim_report import Limit
        >>> asked(Limit("latency_ms", 8.0, 9.0, False))
        'latency at most 8.00 ms'
    """
    return f"{NAMES.get(limit.name, limit.name)} at most {amount(limit.name, limit.limit)}"


def outcome(limit: Limit) -> str:
    """Whether it is met, and by how much it is missed.

    Example:
        >>> from torchtrim.report.trim_report import Limit
        >>> outcome(Limit("latency_ms", 8.0, 9.0, False)), outcome(Limit("max_drop", 0.01, 0.014, False))
        ('missed by 12.5 %', 'missed by 0.0040')
        >>> outcome(Limit("macs", 1e9, None, False)), outcome(Limit("macs", 1e9, 5e8, True))
        ('not measured', 'met')
    """
    if limit.met:
        return "met"
    found = known(limit.found)
    if found is None:
        return "not measured"
    if limit.name in COSTS and limit.limit > 0:
        return f"missed by {(found / limit.limit - 1) * 100:.3g} %"
    return f"missed by {score(found - limit.limit)}"


def headline(report: TrimReport) -> str:
    """What became of the model, in a sentence or two."""
    before, after = report.before, report.after
    said = []
    if before is not None and after is not None:
        said.append(f"{amount('macs', before.macs)} → {amount('macs', after.macs)} MACs")
        said.append(f"{amount('params', before.params)} → {amount('params', after.params)} parameters")
        if known(before.latency_ms) is not None and known(after.latency_ms) is not None:
            said.append(f"{amount('latency_ms', before.latency_ms)} → {amount('latency_ms', after.latency_ms)}")
        said.append(f"{report.score} {score(report.baseline)} → {score(after.score)}")
    sentence = ", ".join(said)
    return f"{sentence}. {verdict(report)}" if sentence else verdict(report)


def verdict(report: TrimReport) -> str:
    """Which limits are met and which are not, in a sentence."""
    if not report.limits:
        return "No limit was set."
    missed = [limit for limit in report.limits if not limit.met]
    total = len(report.limits)
    if not missed:
        return "The limit is met." if total == 1 else f"All {total} limits are met."
    told = []
    for each in missed:
        name, how = NAMES.get(each.name, each.name), outcome(each)
        told.append(f"{name} ({how})" if how == "not measured" else f"{name} {how.removeprefix('missed ')}")
    return f"{total - len(missed)} of {total} limits met; missed: {', '.join(told)}."


def against_noise(report: TrimReport, stage: Stage) -> str:
    """By how much a stage's score is off the untouched model's, and whether that says anything."""
    found, baseline = known(stage.score), known(report.baseline)
    if found is None or baseline is None:
        return ""
    within = " (within noise)" if known(report.noise) and 0 < abs(found - baseline) <= report.noise else ""
    return signed(found - baseline) + within


def _places(value: float) -> str:
    """Two digits behind the point, more for what is small."""
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}" if abs(value) >= 1 else f"{value:.3f}"
