"""`TrimReport`: what `trim` did to a model, as tables, as a page, as Markdown for a pull request and as JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torchtrim import __version__
from torchtrim.bench.machine import Machine
from torchtrim.bench.table import Table
from torchtrim.checkpoint.atomic import replacing
from torchtrim.errors import CheckpointError, InputError
from torchtrim.export.report import ExportReport
from torchtrim.importance.ranking import Ranking
from torchtrim.report.trim_words import (
    COSTS,
    NAMES,
    against_noise,
    amount,
    duration,
    headline,
    known,
    outcome,
    percent,
    score,
    signed,
    times,
)
from torchtrim.search.sensitivity import Sensitivity

FILES = ("report.html", "report.md", "report.json")


@dataclass(frozen=True)
class Limit:
    """One limit of the budget.

    Attributes:
        name: `macs`, `params`, `size_mb`, `latency_ms` or `max_drop`.
        limit: At most so much, as an absolute number.
        found: What the kept model has; None where it was not measured.
        met: Whether that is within the limit.
    """

    name: str
    limit: float
    found: float | None
    met: bool


@dataclass(frozen=True)
class Stage:
    """The model at one stage of the way; the first is the untouched one, the last what is given back.

    Attributes:
        name: What was done.
        score: What `evaluate` said; None where it was not asked.
        macs: MACs of one forward at batch 1.
        params: Parameters, shared ones once.
        size_mb: What it weighs, in MB of a million bytes.
        latency_ms: The median time of one forward, in milliseconds; None where it was not measured.
        seconds: How long the stage took.
        note: What else there is to know.
    """

    name: str
    score: float | None
    macs: int
    params: int
    size_mb: float
    latency_ms: float | None
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class EditRow:
    """One edit of the kept model.

    Attributes:
        kind: The kind of edit: `remove`, `prune_channels`, ...
        text: What it does.
        macs_before: MACs before it.
        macs_after: MACs after it.
        params_before: Parameters before it.
        params_after: Parameters after it.
        note: What else there is to know.
    """

    kind: str
    text: str
    macs_before: int
    macs_after: int
    params_before: int
    params_after: int
    note: str = ""


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer.

    Attributes:
        path: Its path.
        type: Its class.
        state: `kept`, `thinned`, `removed` or `added`.
        params_before: Its parameters in the untouched model; 0 where it was not there.
        params_after: Those in the kept model; 0 where it is gone.
        macs_before: Its MACs before.
        macs_after: Its MACs after.
        shape_before: The shape of its output before, in words.
        shape_after: The shape of its output after.
    """

    path: str
    type: str
    state: str
    params_before: int
    params_after: int
    macs_before: int
    macs_after: int
    shape_before: str
    shape_after: str


@dataclass(frozen=True)
class CandidateRow:
    """One plan that the search looked at.

    Attributes:
        number: Its number.
        text: What the plan does.
        proxy: What the cheap measure said of it; None without one.
        score: What `evaluate` said; None where it did not get that far.
        macs: MACs of one forward at batch 1.
        params: Parameters, shared ones once.
        size_mb: What it weighs, in MB of a million bytes.
        latency_ms: The median time of one forward, in milliseconds; None where it was not measured.
        state: `measured`, `proxy` (it went no further) or `failed`.
        on_front: Whether no other one is better in both score and cost.
        kept: Whether it is the one given back.
        why: Why it went no further, or failed.
    """

    number: int
    text: str
    proxy: float | None
    score: float | None
    macs: int
    params: int
    size_mb: float
    latency_ms: float | None
    state: str
    on_front: bool
    kept: bool
    why: str = ""


@dataclass(frozen=True)
class TrimReport:
    """What `trim` did. `str()` is a few tables, `html()` the page, `markdown()` a pull request's text.

    Attributes:
        model: The model's name.
        score: What the score is: `accuracy`, ... ; higher is better.
        baseline: The score of the untouched model.
        noise: How far that moves by itself.
        command: The command that does the same again.
        machine: What it was measured on.
        limits: The limits of the budget.
        stages: The model at each stage; the first is the untouched one, the last what is given back.
        edits: The edits of the kept model, in their order.
        layers: What became of each layer, in the order of execution.
        candidates: The plans that were looked at.
        front: The cost of the Pareto front: `macs`, `latency_ms`, `size_mb` or `params`.
        seconds: How long it all took.
        notes: What else there is to know.
        inputs: The example inputs, in words.
        data: The data, in words.
        ranking: The ranking of its blocks, where one was made.
        sensitivity: What each layer's change costs, where it was measured.
        export: The exported file and what was checked of it, where one was written.

    Example:
        >>> from torchtrim.bench.machine import machine
        >>> whole, small = Stage("original", 0.76, 4000, 200, 0.8, None, 0.0), Stage("pruned", 0.75, 2000, 100, 0.4, None, 9.0)
        >>> limits = (Limit("macs", 2000, 2000, True), Limit("max_drop", 0.005, 0.01, False))
        >>> report = TrimReport("Net", "accuracy", 0.76, 0.001, "torchtrim trim Net", machine(), limits, (whole, small), (), (), (), "macs", 9.0)
        >>> print(report.headline)
        4.00 k → 2.00 k MACs, 200 → 100 parameters, accuracy 0.7600 → 0.7500. 1 of 2 limits met; missed: drop of the score by 0.0050.
        >>> report.markdown().splitlines()[0]
        '## torchtrim: Net'
        >>> report.to_dict()["limits"][1]["met"]
        False
    """  # noqa: E501

    model: str
    score: str
    baseline: float
    noise: float
    command: str
    machine: Machine
    limits: tuple[Limit, ...]
    stages: tuple[Stage, ...]
    edits: tuple[EditRow, ...]
    layers: tuple[LayerRow, ...]
    candidates: tuple[CandidateRow, ...]
    front: str
    seconds: float
    notes: tuple[str, ...] = ()
    inputs: str = ""
    data: str = ""
    ranking: Ranking | None = None
    sensitivity: Sensitivity | None = None
    export: ExportReport | None = None

    def __post_init__(self) -> None:
        if self.front not in COSTS:
            raise InputError("the front has no such cost", path="front", found=self.front, expected=", ".join(COSTS))

    @property
    def before(self) -> Stage | None:
        """The untouched model; None without stages."""
        return self.stages[0] if self.stages else None

    @property
    def after(self) -> Stage | None:
        """The model that was given back; None without stages."""
        return self.stages[-1] if self.stages else None

    @property
    def headline(self) -> str:
        """What became of the model and which limits are met, in a sentence or two."""
        return headline(self)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON: a number that is none, or without end, is None."""
        parts = ("limits", "stages", "edits", "layers", "candidates")
        whole: dict[str, Any] = {"torchtrim": __version__, "headline": self.headline}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if name in parts:
                value = [asdict(each) for each in value]
            elif isinstance(value, (Machine, Ranking, Sensitivity, ExportReport)):
                value = value.to_dict()
            whole[name] = value
        return {name: _plain(value) for name, value in whole.items()}

    def tables(self) -> tuple[Table, ...]:
        """What it became, the limits, the stages, the edits, the front, the export; the empty ones are left out."""
        made = [
            self.became_table(),
            self.limits_table(),
            self.stages_table(),
            self.edits_table(),
            self.front_table(),
        ]
        return tuple(table for table in made if table.rows) + (() if self.export is None else self.export.tables())

    def became_table(self) -> Table:
        """Each cost and the score, before and after."""
        before, after = self.before, self.after
        rows: list[tuple[str, ...]] = []
        if before is not None and after is not None:
            for name in COSTS:
                one, two = getattr(before, name), getattr(after, name)
                if known(one) is not None or known(two) is not None:
                    rows.append((NAMES[name], amount(name, one), amount(name, two), times(one, two), percent(one, two)))
            drop = None if known(after.score) is None or after.score is None else after.score - self.baseline
            rows.append((self.score, score(self.baseline), score(after.score), "", signed(drop)))
        notes = [f"- the score moves by {score(self.noise)} by itself", f"- it took {duration(self.seconds)}"]
        counts = {state: sum(layer.state == state for layer in self.layers) for state in _STATES}
        if self.layers:
            notes.append("- layers: " + ", ".join(f"{count} {state}" for state, count in counts.items() if count))
        notes += [f"- {note}" for note in self.notes]
        return Table(f"{self.model}", ("", "before", "after", "ratio", "change"), tuple(rows), notes)

    def limits_table(self) -> Table:
        """The budget, and whether it is met."""
        rows = tuple(
            (
                NAMES.get(each.name, each.name),
                outcome(each),
                amount(each.name, each.limit),
                amount(each.name, each.found),
            )
            for each in self.limits
        )
        return Table("limits", ("limit", "outcome", "at most", "found"), rows, left=2)

    def stages_table(self) -> Table:
        """The model at each stage."""
        rows = tuple(
            (
                each.name,
                each.note,
                score(each.score),
                against_noise(self, each),
                *(amount(name, getattr(each, name)) for name in COSTS),
                duration(each.seconds),
            )
            for each in self.stages
        )
        return Table("stages", ("stage", "note", self.score, "change", *_COST_COLUMNS, "took"), rows, left=2)

    def edits_table(self) -> Table:
        """The edits, with what there was before and after."""
        rows = tuple(
            (
                each.kind,
                each.text,
                each.note,
                f"{amount('macs', each.macs_before)} → {amount('macs', each.macs_after)}",
                percent(each.macs_before, each.macs_after),
                f"{amount('params', each.params_before)} → {amount('params', each.params_after)}",
                percent(each.params_before, each.params_after),
            )
            for each in self.edits
        )
        return Table("edits", ("edit", "what", "note", "MACs", "change", "parameters", "change"), rows, left=3)

    def front_table(self) -> Table:
        """The candidates on the Pareto front, and the kept one, by their cost."""
        chosen = [each for each in self.candidates if each.on_front or each.kept]
        chosen.sort(key=lambda each: (known(getattr(each, self.front)) is None, getattr(each, self.front) or 0.0))
        rows = tuple(
            (
                str(each.number),
                each.text,
                score(each.score),
                *(amount(name, getattr(each, name)) for name in COSTS),
                "kept" if each.kept else "",
            )
            for each in chosen
        )
        counts = {
            state: sum(each.state == state for each in self.candidates) for state in ("measured", "proxy", "failed")
        }
        told = (
            f"{len(self.candidates)} candidates: {counts['measured']} measured, "
            f"{counts['proxy']} went no further than the proxy, {counts['failed']} failed"
        )
        columns = ("candidate", "plan", self.score, *_COST_COLUMNS, "")
        return Table(f"the front of {self.score} over {NAMES[self.front]}", columns, rows, [told], left=2)

    def __str__(self) -> str:
        return "\n\n".join([f"{self.model}: {self.headline}", *(table.text() for table in self.tables())])

    def _repr_html_(self) -> str:
        return "".join(table.html() for table in self.tables())

    def markdown(self) -> str:
        """The text for a pull request: what it became, the stages, the edits, the front, the export, the machine."""
        from torchtrim.report.trim_markdown import markdown

        return markdown(self)

    def html(self) -> str:
        """The page, in one file that asks nothing of the network."""
        from torchtrim.report.trim_page import page

        return page(self)

    def json(self) -> str:
        """`to_dict()` as JSON."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    def write(self, folder: str | os.PathLike[str]) -> dict[str, Path]:
        """Write `report.html`, `report.md` and `report.json`; each is there whole or not at all.

        Args:
            folder: Where; it is made where it is not there. Reports of before are replaced.

        Returns:
            The files by their endings: `html`, `md`, `json`.

        Raises:
            InputError: It cannot be written there.
        """
        place = Path(folder)
        texts = dict(zip(FILES, (self.html(), self.markdown(), self.json()), strict=True))
        try:
            place.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"not a folder to write to: {error.strerror or error}", path=place) from error
        taken = next((place / name for name in texts if (place / name).is_dir()), None)
        if taken is not None:
            raise InputError("there is a folder where the file is to be", path=taken)
        try:
            with ExitStack() as stack:  # all are written beside their places before the first one is moved
                for name, text in texts.items():
                    file = stack.enter_context(replacing(place / name))
                    file.write(text.encode("utf-8", "replace"))
                    file.flush()
        except CheckpointError as error:
            raise InputError(error.message, path=error.path) from error
        return {name.rpartition(".")[2]: place / name for name in texts}


_STATES = ("kept", "thinned", "removed", "added")
_COST_COLUMNS = tuple(NAMES[name] for name in COSTS)


def _plain(value: Any) -> Any:
    """Values that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(each) for each in value]
    if isinstance(value, float):  # NumPy's float64 too
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if hasattr(value, "item"):  # another number of NumPy's
        return _plain(value.item())
    return str(value)
