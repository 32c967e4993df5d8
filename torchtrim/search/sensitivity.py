"""`sensitivity`: what a model's score loses when one layer is pruned, made sparse, taken out, or rounded to int8."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from torchtrim.bench.figure import figure, written
from torchtrim.bench.table import Table
from torchtrim.edits.remove import remove
from torchtrim.edits.sparsify import sparsify
from torchtrim.errors import InputError, TorchTrimError, nearest
from torchtrim.graph.copying import kept_random_state, unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import What, select
from torchtrim.graph.progress import progress
from torchtrim.graph.reader import inputs_for
from torchtrim.importance.blocks import blocks_of
from torchtrim.search.evaluation import Evaluate, baseline_of, evaluated
from torchtrim.search.measured import Measured, content_of, content_of_batch, key_of
from torchtrim.search.prune import prune_channels
from torchtrim.search.rounded import rounded_to_int8
from torchtrim.train.recalibrate import recalibrate_batchnorm

KINDS = ("prune", "sparsify", "remove", "int8")
RATIOS = (0.25, 0.5, 0.75)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        kind: `prune`, `sparsify`, `remove` or `int8`.
        path: The layer or the block.
        ratio: The fraction that went; 1 for `remove` and `int8`.
        score: What `evaluate` said; None where it could not be done, or another process is at it.
        drop: By how much the score is below that of the untouched model.
        why: Why there is no score.
    """

    kind: str
    path: str
    ratio: float
    score: float | None
    drop: float | None
    why: str = ""


@dataclass(frozen=True)
class Sensitivity:
    """What each layer's change costs.

    Attributes:
        baseline: The score of the untouched model.
        noise: How far that moved between two calls.
        points: The measurements.
        fresh: How many were made now; the others were found.
        seconds: How long it took.
    """

    baseline: float
    noise: float
    points: tuple[Point, ...]
    fresh: int
    seconds: float

    def curve(self, path: str, kind: str = "prune") -> list[tuple[float, float]]:
        """The scores of one layer over the fraction that went, from the untouched model on.

        Raises:
            InputError: Nothing was measured of that layer.
        """
        found = [(p.ratio, p.score) for p in self.points if p.path == path and p.kind == kind and p.score is not None]
        if not found:
            known = [point.path for point in self.points if point.kind == kind]
            raise InputError("nothing was measured of it", path=path, found=kind, hint=nearest(path, known))
        return [(0.0, self.baseline), *sorted(found)]

    def most(self, kind: str, drop: float) -> dict[str, float]:
        """For each layer the largest fraction whose drop is at most so much: what `prune_channels(ratio=)` takes."""
        allowed: dict[str, float] = {}
        for point in sorted(self.points, key=lambda point: point.ratio):
            if point.kind == kind:
                before = allowed.setdefault(point.path, 0.0)
                if point.drop is not None and point.drop <= drop and point.ratio > before:
                    allowed[point.path] = point.ratio
        return allowed

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {**asdict(self), "points": [asdict(point) for point in self.points]}

    def table(self) -> Table:
        """One row for each layer and kind, one column for each fraction."""
        ratios = sorted({point.ratio for point in self.points})
        rows: dict[tuple[str, str], dict[float, str]] = {}
        notes = []
        for point in self.points:
            text = f"{point.drop:+.4f}" if point.drop is not None else "-"
            rows.setdefault((point.path, point.kind), {})[point.ratio] = text
            if point.why:
                notes.append(f"{point.path}, {point.kind} {point.ratio:g}: {point.why}")
        listed = tuple((*key, *(found.get(ratio, "") for ratio in ratios)) for key, found in rows.items())
        told = f"drop of the score, {self.baseline:.4f} untouched (it moves by {self.noise:.2g} by itself)"
        columns = ("layer", "what", *(f"{ratio:.0%}" for ratio in ratios))
        return Table("sensitivity", columns, listed, [told, *notes[:20]], left=2)

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the curves, one picture for each kind; the file's ending says in which form.

        Raises:
            MissingDependency: matplotlib is not installed.
            InputError: It cannot be written there, or in this form.
        """
        kinds = [kind for kind in KINDS if any(point.kind == kind for point in self.points)]
        layers = list(dict.fromkeys(point.path for point in self.points))
        drawn = figure(5 * len(kinds), max(3.5, 0.22 * len(layers)))
        axes = drawn.subplots(1, len(kinds), squeeze=False)[0]
        for axis, kind in zip(axes, kinds, strict=True):
            own = list(dict.fromkeys(p.path for p in self.points if p.kind == kind and p.score is not None))
            if kind in ("remove", "int8"):
                drops = [self.baseline - self.curve(layer, kind)[-1][1] for layer in own]
                axis.barh(range(len(own)), drops, color="#4477aa")
                axis.set_yticks(range(len(own)), own)
                axis.invert_yaxis()
                axis.set(title=kind, xlabel="drop of the score")
                continue
            for layer in own:
                ratios, scores = zip(*self.curve(layer, kind), strict=True)
                axis.plot(ratios, scores, marker=".", linewidth=1, label=layer)
            axis.set(title=kind, xlabel="fraction that went", ylabel="score")
            if 0 < len(own) <= 12:
                axis.legend(frameon=False, fontsize=7)
        return written(drawn, path)


def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    evaluate: Evaluate,
    example_inputs: ExampleInputs | None = None,
    *,
    kinds: Sequence[str] = ("prune",),
    ratios: Sequence[float] = RATIOS,
    layers: What | None = None,
    importance: str = "magnitude",
    heal: str | None = None,
    recalibrate: bool = False,
    cache: str | os.PathLike[str] | None = None,
    name: str = "",
) -> Sensitivity:
    """Measure what the score loses when one layer at a time is changed.

    One evaluation for each layer, kind and fraction, and two of the untouched model. With a `cache`, what was measured
    is found again by its content (model, first batch, change, `name`): a run that was stopped goes on, another model or
    other data are measured anew, and several processes that run the same call share the work. A point that another
    process is at has no score; call it once more when that one has ended.

    Args:
        model: The model; left as it was.
        data: Batches: for recalibration, healing, int8 and criteria that look at activations.
        evaluate: Gives a model's score, higher is better. Its own settings are not in the cache's key: give it another
            `name` where they change.
        example_inputs: As for `cut`.
        kinds: `"prune"`: the layer loses channels. `"sparsify"`: weights become zero. `"remove"`: a block is taken out.
            `"int8"`: weights (a scale for each output channel) and inputs (one range, from data) are rounded to 8 bits.
        ratios: The fractions, for `prune` and `sparsify`.
        layers: Convolutions, linear layers and blocks to look at: paths, globs, types, predicates. All by default.
        importance: What channels are ranked by, see `prune_channels`.
        heal: How a removed block's joint is healed, see `remove`.
        recalibrate: Measure batch-norm statistics anew on `data` after pruning, by agreement with the original.
        cache: A folder.
        name: What the evaluation is called in the cache.

    Raises:
        InputError: An unknown kind, a fraction that is none, no data; `evaluate` fails or gives no number for the
            untouched model.
        SelectionError: A glob or type that no layer fits.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Conv2d(32, 4, 1))
        >>> x = torch.randn(2, 3, 8, 8)
        >>> whole = net(x).detach()
        >>> found = sensitivity(net, [x], lambda each: -float((each(x) - whole).norm()), x, ratios=(0.5,))
        >>> [(point.path, point.ratio) for point in found.points]
        [('0', 0.5), ('2', 0.5), ('4', 0.5)]
    """
    _check(kinds, ratios)
    began = time.perf_counter()
    inner = unwrap(model)
    inputs = inputs_for(inner, example_inputs)
    batches = [*data]
    if not batches:
        raise InputError("there is no data", path="data", found="no batches")
    kept = Measured(cache)
    whole = key_of(content_of(inner), content_of_batch(batches[0]), len(batches), name)
    baseline, noise = kept.of(key_of(whole, "untouched"), {}, lambda: baseline_of(evaluate, inner)) or baseline_of(
        evaluate, inner
    )
    wanted = _wanted(inner, inputs, kinds, ratios, layers)
    how = {"importance": importance, "heal": heal, "recalibrate": recalibrate}
    points, fresh = [], 0
    with progress("sensitivity") as tell:
        for number, (kind, path, ratio) in enumerate(wanted):
            tell(f"{kind} {path} {ratio:g}", number / len(wanted))
            key = key_of(whole, kind, path, ratio, how)
            known = kept.find(key) is not None

            def measure(kind: str = kind, path: str = path, ratio: float = ratio) -> dict[str, Any]:
                try:
                    with kept_random_state():
                        net = _changed(inner, inputs, batches, kind, path, ratio, importance, heal, recalibrate)
                except TorchTrimError as error:
                    return {"score": None, "why": error.message}
                score = evaluated(evaluate, net, f"the model with {path} changed ({kind} {ratio:g})")
                return {"score": None, "why": "evaluate gave NaN"} if math.isnan(score) else {"score": score, "why": ""}

            about = {"kind": kind, "path": path, "ratio": ratio, "name": name, **how}
            found = kept.of(key, about, measure)
            fresh += found is not None and not known
            if found is None:
                found = {"score": None, "why": "another process is at it"}
            drop = None if found["score"] is None else baseline - found["score"]
            points.append(Point(kind, path, ratio, found["score"], drop, found["why"]))
    return Sensitivity(baseline, noise, tuple(points), fresh, time.perf_counter() - began)


def _changed(
    model: nn.Module,
    inputs: Inputs,
    batches: list[Any],
    kind: str,
    path: str,
    ratio: float,
    importance: str,
    heal: str | None,
    recalibrate: bool,
) -> nn.Module:
    """The model with one layer changed."""
    if kind == "int8":
        return rounded_to_int8(model, path, inputs, batches)
    if kind == "remove":
        return remove(model, inputs, [path], heal=heal, data=batches if heal else None, check=False)
    if kind == "sparsify":
        return sparsify(model, inputs, {path: ratio}, include=[path], check=False)
    net = prune_channels(model, inputs, {path: ratio}, importance=importance, data=batches, check=False)
    if recalibrate:
        recalibrate_batchnorm(net, batches, inputs, original=model)
    return net


def _wanted(
    model: nn.Module, inputs: Inputs, kinds: Sequence[str], ratios: Sequence[float], layers: What | None
) -> list[tuple[str, str, float]]:
    """What is to be measured: kind, path and fraction."""
    named = {path: module for path, module in model.named_modules() if path}
    asked = None if layers is None else set(select(model, layers))
    simple = [
        path for path, module in named.items() if isinstance(module, _LAYERS) and (asked is None or path in asked)
    ]
    wanted: list[tuple[str, str, float]] = []
    for kind in kinds:
        if kind == "remove":
            blocks = [block.path for block in blocks_of(model, inputs)]
            wanted += [(kind, path, 1.0) for path in blocks if asked is None or path in asked]
        elif kind == "int8":
            wanted += [(kind, path, 1.0) for path in simple]
        else:
            wanted += [(kind, path, float(ratio)) for path in simple for ratio in ratios]
    if not wanted:
        raise InputError(
            "there is no layer to look at",
            path="layers",
            found=layers,
            expected="convolutions, linear layers or blocks",
        )
    return wanted


def _check(kinds: Sequence[str], ratios: Sequence[float]) -> None:
    unknown = [kind for kind in ((kinds,) if isinstance(kinds, str) else kinds) if kind not in KINDS]
    if unknown or not kinds or isinstance(kinds, str):
        raise InputError(
            "kinds is a list of what may be done to a layer", path="kinds", found=kinds, expected=", ".join(KINDS)
        )
    for ratio in ratios:
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1:
            raise InputError("a ratio is a fraction between 0 and 1", path="ratios", found=ratio)
