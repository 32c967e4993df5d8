"""The report of a trim as Markdown, for a pull request."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from torchtrim.bench.table import Table
from torchtrim.report.trim_words import amount, asked, headline, outcome

if TYPE_CHECKING:
    from torchtrim.report.trim_report import TrimReport

_SPECIAL = re.compile(r"[\\`*\[\]|~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")

_MANY = 16  # rows of a table that is not folded


def markdown(report: TrimReport) -> str:
    """The whole report; what is long is folded.

    Args:
        report: What was done.
    """
    parts = [f"## torchtrim: {escaped(report.model)}", escaped(headline(report))]
    if report.limits:
        marks = {True: "✅ met", False: "❌"}
        parts.append(
            "\n".join(
                f"- {marks[each.met]}{'' if each.met else ' ' + outcome(each)}: {escaped(asked(each))}"
                for each in report.limits
            )
        )
    parts.append(_table(report.became_table()))
    if report.stages:
        parts += ["### Stages", _table(report.stages_table())]
    if report.edits:
        count = len(report.edits)
        parts.append(_folded(f"{count} edit{'s' * (count != 1)}", [_table(report.edits_table())]))
    if report.candidates:
        front = report.front_table()
        parts.append(f"### {escaped(front.title[0].upper() + front.title[1:])}")
        count = len(front.rows)
        parts.append(_table(front) if count <= _MANY else _folded(f"{count} candidates", [_table(front)]))
    if report.export is not None:
        checked = report.export.verification
        within = "every output is" if checked.passed else "not every output is"
        parts += [
            "### Export",
            f"{escaped(report.export.path.name)}, {amount('size_mb', report.export.size_mb)}, run beside the PyTorch "
            f"model on {checked.rows} rows on {escaped(checked.provider)}: {within} within the tolerance.",
            _folded("What was checked", [_table(table, titled=True) for table in report.export.tables()]),
        ]
    about = [
        *([f"- inputs: {escaped(report.inputs)}"] if report.inputs else []),
        *([f"- data: {escaped(report.data)}"] if report.data else []),
        *(f"- {escaped(line)}" for line in str(report.machine).splitlines()),
    ]
    parts += ["### Machine", "\n".join(about)]
    if report.command:
        parts += ["### The command that repeats it", _fenced(report.command)]
    return "\n\n".join(part for part in parts if part) + "\n"


def escaped(text: str) -> str:
    """A text of others, on one line, that is read as it stands.

    Example:
        >>> print(escaped("layer3.* | <b>\\n__init__ a_b"))
        layer3.\\* \\| &lt;b&gt; \\_\\_init\\_\\_ a_b
    """
    line = " ".join(text.split())
    for letter, name in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        line = line.replace(letter, name)
    return _SPECIAL.sub(lambda found: "\\" + found[0], line)


def _table(table: Table, titled: bool = False) -> str:
    """A table whose cells cannot break it; columns without any text are left out."""
    used = [
        place
        for place, name in enumerate(table.columns)
        if place == 0 or name or any(row[place].strip() for row in table.rows)
    ]
    used = [place for place in used if table.columns[place] != "note" or any(row[place] for row in table.rows)]
    safe = replace(
        table,
        title=escaped(table.title) if titled else "",
        columns=tuple(escaped(table.columns[place]) for place in used),
        rows=tuple(tuple(escaped(row[place]) for place in used) for row in table.rows),
        notes=[_listed(note) for note in table.notes],
        left=sum(place < table.left for place in used),
    )
    return safe.markdown() if table.rows else "\n".join(safe.notes)


def _listed(note: str) -> str:
    """A note as a point of a list."""
    return f"- {escaped(note.removeprefix('- '))}"


def _folded(summary: str, parts: list[str]) -> str:
    return "\n\n".join([f"<details><summary>{escaped(summary)}</summary>", *parts, "</details>"])


def _fenced(text: str) -> str:
    """A text as it stands; the fence is longer than any in it."""
    longest = max((len(found) for found in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}sh\n{text.strip()}\n{fence}"
