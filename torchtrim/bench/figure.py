"""Figures: matplotlib's, without a window."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torchtrim.errors import InputError, MissingDependency


def figure(width: float, height: float) -> Any:
    """An empty `matplotlib.figure.Figure` of a size in inches, which lays its parts out by itself.

    Raises:
        MissingDependency: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependency("matplotlib is not installed", hint='pip install "torchtrim[plot]"') from error
    return Figure(figsize=(width, height), layout="constrained")


def written(drawn: Any, path: str | os.PathLike[str]) -> Path:
    """Write a figure; the file's ending says in which form (`.png`, `.svg`, `.pdf`).

    Raises:
        InputError: It cannot be written there, or in this form.
    """
    place = Path(path)
    for axis in drawn.axes:
        axis.spines[["top", "right"]].set_visible(False)
    try:
        drawn.savefig(place, dpi=144)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the picture cannot be written: {error}", path=place, hint="a name like training.png"
        ) from error
    return place
