"""The demo's picture: how it learnt, and what each stage costs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torchtrim.demo.stages import Stage
from torchtrim.demo.training import Epoch

_INK, _QUIET, _GRID = "#1f2933", "#7b8794", "#e4e7eb"
_LOSS, _ACCURACY, _SHADE = "#d64545", "#2186eb", "#f5f7fa"
_TORCH, _ONNX = "#9fb3c8", "#0f609b"


def draw(stages: Sequence[Stage], curve: Sequence[Epoch], title: str, path: Path) -> None:
    """Write a PNG: the training curve on the left; size, latency and accuracy of every stage on the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, wspace=0.04)
    figure = Figure(figsize=(13, 5.6), dpi=110, facecolor="white", layout=layout)
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13.5, color=_INK, fontweight="bold", x=0.012, ha="left")
    learning, *costs = figure.subplots(1, 4, width_ratios=[1.75, 1, 1, 1])
    _draw_curve(learning, curve)
    columns: list[tuple[str, str, list[float | None]]] = [
        ("Size, MB", "{:.1f}", [stage.size_mb for stage in stages]),
        ("Latency of one picture, ms", "{:.2f}", [stage.latency_ms for stage in stages]),
        ("Held-out accuracy, %", "{:.1f}", [stage.accuracy and 100 * stage.accuracy for stage in stages]),
    ]
    for axis, (heading, form, values) in zip(costs, columns, strict=True):
        _draw_bars(axis, heading, form, values, stages)
    costs[0].set_yticks(range(len(stages)), [f"{stage.name}\n{stage.runs_in}" for stage in stages], color=_INK)
    figure.savefig(path)


def _draw_curve(axis: Any, curve: Sequence[Epoch]) -> None:
    epochs = range(1, len(curve) + 1)
    axis.set_title("Training", fontsize=11, color=_INK, loc="left")
    phases = [epoch.phase for epoch in curve]
    start = 0
    for phase in dict.fromkeys(phases):
        end = start + phases.count(phase)
        axis.axvspan(start + 0.5, end + 0.5, color=_SHADE if start == 0 else "white", zorder=0)
        axis.text((start + end + 1) / 2, 1.02, phase, ha="center", color=_QUIET, fontsize=9.5)
        start = end
    axis.plot(epochs, [epoch.accuracy for epoch in curve], "o-", color=_ACCURACY, lw=2, ms=5)
    axis.set_xlim(0.5, len(curve) + 0.5)
    axis.set_ylim(0, 1.08)
    axis.set_xticks(list(epochs))
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axis.set_xlabel("epoch", color=_QUIET)
    axis.set_ylabel("held-out accuracy, %", color=_ACCURACY)
    axis.grid(axis="y", color=_GRID)
    _plain(axis)
    right = axis.twinx()
    right.plot(epochs, [epoch.loss for epoch in curve], "o-", color=_LOSS, lw=2, ms=5, clip_on=False, zorder=3)
    right.set_ylim(0, 1.08 * max(epoch.loss for epoch in curve))
    right.set_ylabel("training loss", color=_LOSS)
    _plain(right)


def _draw_bars(axis: Any, heading: str, form: str, values: list[float | None], stages: Sequence[Stage]) -> None:
    axis.set_title(heading, fontsize=11, color=_INK, loc="left")
    colours = [_TORCH if stage.runs_in == "PyTorch" else _ONNX for stage in stages]
    axis.barh(range(len(values)), [value or 0 for value in values], color=colours, height=0.6)
    for row, value in enumerate(values):
        label = "another task" if value is None else form.format(value)
        axis.annotate(
            label,
            (value or 0, row),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=_QUIET if value is None else _INK,
        )
    axis.set_xlim(0, 1.32 * max(value or 0 for value in values))
    axis.set_ylim(len(values) - 0.4, -0.6)
    axis.set_xticks([])
    axis.set_yticks([])
    _plain(axis)


def _plain(axis: Any) -> None:
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0, labelcolor=_QUIET, labelsize=9.5)
