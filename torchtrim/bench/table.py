"""One table, written for a terminal, a notebook or Markdown."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True)
class Table:
    """Rows under columns, with a title and notes.

    Attributes:
        title: What the table shows.
        columns: The names of the columns.
        rows: One tuple of texts a row.
        notes: Lines under the table.
        left: How many columns, from the first, hold text; the others are set to the right.

    Example:
        >>> print(Table("", ("name", "ms"), (("a", "1.0"),)).markdown())
        | name | ms |
        | --- | ---: |
        | a | 1.0 |
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: Sequence[str] = ()
    left: int = 1

    def text(self) -> str:
        """The table in plain characters."""
        from rich import box
        from rich.console import Console
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(box=box.SIMPLE_HEAD, title=Text(self.title), title_justify="left", pad_edge=False)
        for position, column in enumerate(self.columns):
            table.add_column(Text(column), justify="left" if position < self.left else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*map(Text, row))
        stream = io.StringIO()
        console = Console(file=stream, width=400, color_system=None, force_terminal=False)
        console.print(table)
        lines = [line.rstrip() for line in stream.getvalue().splitlines()]
        return "\n".join([line for line in lines if line] + list(self.notes))

    def markdown(self) -> str:
        """The table in Markdown, with the title above it and the notes below."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines.append("| " + " | ".join(self.columns) + " |")
        lines.append("| " + " | ".join("---" if i < self.left else "---:" for i in range(len(self.columns))) + " |")
        lines += ["| " + " | ".join(row) + " |" for row in self.rows]
        return "\n".join(lines + [""] * bool(self.notes) + list(self.notes))

    def html(self) -> str:
        """The table for a notebook."""
        head = "".join(f"<th>{escape(column)}</th>" for column in self.columns)
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        notes = "".join(f"<div>{escape(note)}</div>" for note in self.notes)
        return f"<table><caption>{escape(self.title)}</caption><tr>{head}</tr>{body}</table>{notes}"
