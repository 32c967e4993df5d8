"""A bar on the terminal for long work, where there is a terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(name: str) -> Iterator[Callable[[str, float], Any]]:
    """Gives a function to be called with what is being done, and the share of the work that is behind.

    Args:
        name: What the whole work is called.
    """
    from rich.console import Console  # not above: whatever may work long would load it
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = TextColumn(name), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=1.0)
        yield lambda what, done: bar.update(task, description=what, completed=done)
