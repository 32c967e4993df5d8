"""`rank_blocks`: how much each block of a model matters, from data."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from torchtrim.errors import EditError, ModelError, nearest
from torchtrim.graph.copying import is_meta, unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import What
from torchtrim.importance.block_ablation import MEASURES, ablation, sampled
from torchtrim.importance.block_attribution import conductance, relevance
from torchtrim.importance.block_flow import angular, influence, relative_norm
from torchtrim.importance.block_metrics import Asked, Found
from torchtrim.importance.block_slopes import fisher, gradient, taylor
from torchtrim.importance.blocks import blocks_of
from torchtrim.importance.example import example_of
from torchtrim.importance.gradients import Loss
from torchtrim.importance.ranking import Ranked, Ranking
from torchtrim.importance.spans import Span, spans_of

METRICS: dict[str, Callable[[Asked], Found]] = {
    "influence": influence,
    "angular": angular,
    "norm": relative_norm,
    "sampled": sampled,
    "fisher": fisher,
    "taylor": taylor,
    "gradient": gradient,
    "ablation": ablation,
    "attribution": conductance,
    "attribution:lrp": relevance,
}
_WITH_MEASURE = ("ablation", "sampled", "fisher")


def rank_blocks(
    model: nn.Module,
    data: Iterable[Any],
    metric: str = "influence",
    example_inputs: ExampleInputs | None = None,
    *,
    loss: Loss | None = None,
    blocks: What | None = None,
    runs: int = 1,
    measure: str | None = None,
) -> Ranking:
    """Rank the blocks of a model: which of them can go?

    A block is a module that hands its input on with something added (a residual unit, a transformer layer), so that it
    can be taken out by itself with `tt.remove`.

    | metric | what a block's score is | passes over the data | labels |
    | --- | --- | --- | --- |
    | `influence` | 1 - cosine of its input and output, mean over places [1] | 1 forward | no |
    | `angular` | angle between them / pi, for runs of layers [2] | 1 forward | no |
    | `norm` | length of what it adds / length of its input | 1 forward | no |
    | `sampled` | as `ablation`, each block on a few rows, all in one batch | 1 forward | no |
    | `fisher` | second-order change of the answer without it | 1 forward, 1 backward | no |
    | `taylor` | size of first-order change of the loss without it [3] | 1 forward, 1 backward | yes, or `loss` |
    | `gradient` | length of the loss's gradient by its weights | 1 forward, 1 backward | yes, or `loss` |
    | `ablation` | what is lost without it: the reference | 1 forward, and 1 a block | see `measure` |
    | `attribution` | captum's conductance of its output [4]; `attribution:lrp` | 16 a block | no |

    [1] ShortGPT, Men et al. 2024, https://arxiv.org/abs/2403.03853 [2] Gromov et al. 2024,
    https://arxiv.org/abs/2403.17887 [3] Molchanov et al. 2019, https://arxiv.org/abs/1906.10771 [4] Dhamdhere et al.
    2018, https://arxiv.org/abs/1805.12233

    How far a block turns its input (`influence`, `angular`, `norm`) is a poor proxy on some models: the first blocks of
    convolutional networks turn it far, and what counts is whether the answer depends on it. On the nine residual blocks
    of EfficientNet-Lite0 the rank correlation with the loss after removal, on other pictures, was -0.1 to 0 for these
    three, 0.6 for `fisher` and `taylor`, 0.9 for `gradient`, and 0.7 for `ablation` itself, since 250 pictures tell no
    more (-0.7 for `attribution`, on 10 of them; `benchmarks/rank_lite0.py`). `sampled` takes 20 of them: 0.8 there,
    but 0.55 to 0.8 with other rows.

    The model runs in eval mode as a copy that shares its weights: gradients, modes, buffers, hooks, `requires_grad` and
    the random state stay as they are. No activations are kept, but for the backward pass of one batch.

    Args:
        model: Any `nn.Module`.
        data: Batches: tensors, `(inputs, targets)` pairs or dicts. Gone through once. Some hundred rows will do.
        metric: A name of the table.
        example_inputs: As for `cut`; where it is left out and the history does not know it, the first batch.
        loss: For `taylor`, `gradient` and `ablation`: `loss(output, target)`, or `loss(model, batch)` where its first
            argument is called `model` or `net`. By default the output's own `loss` where it has one, cross-entropy for
            whole-number targets, the mean squared error for others.
        blocks: What to rank in place of the blocks that are found: a path, a glob, a type, a predicate of (path,
            module), or a list of these. What goes in and comes out of each has to have one shape.
        runs: Rank every run of so many blocks that feed one another, in place of single ones.
        measure: What `ablation` looks at: `"loss"` (its rise), `"accuracy"` (its fall), `"kl"` (how far the classes
            move, in nats) or `"output"` (how far the output does, relative to it). By default the loss where there are
            labels, `"kl"` where the output is rows of numbers or called `logits`, else `"output"`. `sampled` and
            `fisher` take the last two. For embeddings, say `"output"`.

    Returns:
        The blocks in the order of execution with their scores; higher = keep.

    Raises:
        EditError: No such metric; the model has no blocks, or not so many that follow one another; one that was named
            does not hand its input on in one shape; or captum cannot attribute to one.
        PathError: A path does not exist, or is never called.
        InputError: The data holds nothing or does not fit the model; or there are no labels for a loss.
        ModelError: What flows through it is not finite, or it has no values (the meta device).
        MissingDependency: captum is not installed.

    Example:
        >>> import torch
        >>> class Unit(nn.Linear):
        ...     def forward(self, x):
        ...         return x + super().forward(x)
        >>> net = nn.Sequential(*(Unit(8, 8) for _ in range(3)), nn.Linear(8, 2))
        >>> for held in net[1].parameters():
        ...     _ = nn.init.zeros_(held)
        >>> ranking = rank_blocks(net, [torch.randn(32, 8)])
        >>> ranking.least(), ranking["1"].score
        (['1'], 0.0)
    """
    model = unwrap(model)
    _refuse(metric, measure, runs)
    if is_meta(model):
        raise ModelError("the model is on the meta device: there are no values to rank by")
    inputs, data = example_of(model, data, example_inputs)
    spans = spans_of(blocks_of(model, inputs, blocks), runs)
    asked = Asked(model, spans, data, inputs, loss, measure)
    started = time.perf_counter()
    found = METRICS[metric](asked)
    seconds = time.perf_counter() - started
    for span, score in zip(spans, found.scores, strict=True):
        if not math.isfinite(score):
            raise ModelError("its score is not finite", path=span.name, found=score)
    return Ranking(
        model=type(model).__name__,
        metric=metric,
        unit=found.unit,
        blocks=tuple(_ranked(span, score) for span, score in zip(spans, found.scores, strict=True)),
        macs=run_fake(model, inputs).macs.get("", 0),
        params=sum(parameter.numel() for parameter in model.parameters()),
        rows=asked.rows,
        forwards=asked.forwards / asked.rows,
        backwards=asked.backwards / asked.rows,
        seconds=seconds,
        notes=found.notes,
    )


def _ranked(span: Span, score: float) -> Ranked:
    macs, params = sum(block.macs for block in span.blocks), sum(block.params for block in span.blocks)
    return Ranked(span.name, span.paths, score, macs, params)


def _refuse(metric: str, measure: str | None, runs: int) -> None:
    if metric not in METRICS:
        raise EditError(
            "no such metric",
            path="metric",
            found=metric,
            expected=", ".join(METRICS),
            hint=nearest(str(metric), METRICS),
        )
    allowed = MEASURES if metric == "ablation" else ("kl", "output")
    if measure is not None and (metric not in _WITH_MEASURE or measure not in allowed):
        expected = ", ".join(allowed) if metric in _WITH_MEASURE else f"a metric of {', '.join(_WITH_MEASURE)}"
        raise EditError("no such measure", path="measure", found=measure, expected=expected)
    if isinstance(runs, bool) or not isinstance(runs, int) or runs < 1:
        raise EditError("a run is a number of blocks", path="runs", found=runs, expected="1 or more")
    if runs > 1 and metric.startswith("attribution"):
        raise EditError("attribution is of single blocks", path="runs", found=runs, expected="1")
