"""`top_down`: take blocks off, one after the other, while the accuracy holds."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from torchtrim.edits.remove import remove
from torchtrim.errors import InputError, TorchTrimError, nearest
from torchtrim.graph.copying import full_copy, kept_random_state, unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import What
from torchtrim.graph.progress import progress
from torchtrim.graph.reader import inputs_for
from torchtrim.graph.summary import summary
from torchtrim.importance.blocks import Block, blocks_of
from torchtrim.importance.rank_blocks import rank_blocks
from torchtrim.importance.ranking import Ranking
from torchtrim.search.evaluation import Evaluate, baseline_of, evaluated
from torchtrim.search.removal_curve import Removal, TopDown, TopDownStopped

ORDERS = ("last", "ranked", "search")
Recover = Callable[[nn.Module], "nn.Module | None"]


def top_down(
    model: nn.Module,
    evaluate: Evaluate,
    example_inputs: ExampleInputs | None = None,
    *,
    step: int = 1,
    tolerance: float = 0.01,
    order: str = "last",
    recover: Recover | None = None,
    data: Iterable[Any] | None = None,
    metric: str = "influence",
    ranking: Ranking | None = None,
    heal: str | None = None,
    blocks: What | None = None,
    max_steps: int | None = None,
) -> TopDown:
    """Take blocks off a model while its score holds, and give back the smallest that is good enough, with the curve.

    Each step takes `step` blocks off the best model so far, joins what is left (healed on `data`, where asked), and
    evaluates it; where the drop is past the tolerance and `recover` is given, the model is recovered and evaluated
    again. It ends when the drop passes the tolerance, or nothing is left to remove. The score is compared with the
    untouched model's, which is evaluated twice: how far it moves by itself is told, and a drop within that does not
    end the search.

    One evaluation a step; with `order="search"` one for each candidate, a number that falls with each step.

    Args:
        model: The model; left as it was.
        evaluate: Gives a model's score, higher is better: `lambda net: accuracy(net, loader)`. The model is in eval
            mode, gradients are off.
        example_inputs: As for `cut`.
        step: How many blocks go at once.
        tolerance: The drop that is allowed, in the score's own unit (0.01 is a point of accuracy).
        order: `"last"`: from the end of the model. `"ranked"`: the least important first, by `ranking` or as
            `rank_blocks(model, data, metric)` has it. `"search"`: every run of `step` neighbouring blocks is tried, and
            the one with the best score goes.
        recover: A function that trains a model, in place or giving another back: `lambda net: tt.finetune(net, ...)`
            and the like. What it gives back and is no module (a report) is not used.
        data: Batches, for `"ranked"` and for healing.
        metric: What blocks are ranked by, see `rank_blocks`.
        ranking: A ranking of this model's blocks, in place of `metric`.
        heal: As for `remove`.
        blocks: The modules to choose from; all removable ones by default.
        max_steps: Stop after this many steps.

    Raises:
        EditError: There is no removable block.
        InputError: A bad option; `evaluate` or `recover` fails (a `TopDownStopped` whose `partial` holds what was
            reached, where that was on the way), or gives no number for the untouched model.

    Example:
        >>> import torch
        >>> class Unit(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.conv = nn.Conv2d(4, 4, 1)
        ...     def forward(self, x):
        ...         return x + self.conv(x)
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 1), Unit(), Unit(), Unit())
        >>> x = torch.zeros(1, 3, 8, 8)
        >>> found = top_down(net, lambda each: float(len(each)), x, tolerance=2)
        >>> found.removed, len(found.model)
        (('3', '2'), 2)
    """
    _check(step, tolerance, order, max_steps, data, ranking, heal)
    began = time.perf_counter()
    inner = unwrap(model)
    inputs = inputs_for(inner, example_inputs)
    found = blocks_of(inner, inputs, blocks)
    whole = summary(inner, inputs)
    baseline, noise = baseline_of(evaluate, inner)
    kept = full_copy(inner)
    steps: list[Removal] = []
    why = "no block is left"

    def result() -> TopDown:
        return TopDown(
            model=kept,
            baseline=baseline,
            noise=noise,
            tolerance=tolerance,
            order=order,
            steps=tuple(steps),
            macs=whole.macs,
            params=whole.params,
            why=why,
            seconds=time.perf_counter() - began,
        )

    def scored(paths: Sequence[str], gone: Sequence[str]) -> tuple[nn.Module, float]:
        with kept_random_state():
            net = remove(kept, inputs, list(paths), heal=heal, data=data if heal else None)
        return net, evaluated(evaluate, net, f"the model without {', '.join((*gone, *paths))}")

    gone: list[str] = []
    orderly = _order(inner, inputs, found, order, data, metric, ranking, blocks)
    with progress("top-down") as tell:
        while max_steps is None or len(steps) < max_steps:
            started = time.perf_counter()
            tell(f"{len(gone)} of {len(found)} blocks gone", len(gone) / len(found))
            try:
                best = _best(_choices(orderly, found, gone, step, order), gone, scored)
            except InputError as error:
                raise _stopped(error, result()) from error
            if best is None:
                break
            paths, net, score, note = best
            before = None
            limit = max(tolerance, noise)
            if recover is not None and not baseline - score <= limit:
                before = score
                try:
                    net = _recovered(recover, net)
                    score = evaluated(evaluate, net, f"the recovered model without {', '.join((*gone, *paths))}")
                except InputError as error:
                    raise _stopped(error, result()) from error
            gone += paths
            left = summary(net, inputs)
            within = baseline - score <= limit  # false for NaN
            steps.append(
                Removal(
                    paths=tuple(paths),
                    removed=tuple(gone),
                    score=score,
                    before_recovery=before,
                    drop=baseline - score,
                    macs=left.macs,
                    params=left.params,
                    within=within,
                    seconds=time.perf_counter() - started,
                    note="evaluate gave NaN" if math.isnan(score) else note,
                )
            )
            if not within:
                why = f"a drop of {baseline - score:.4g} is past what is allowed"
                break
            kept = net
        else:
            why = f"stopped after {max_steps} steps"
    return result()


_Best = tuple[Sequence[str], nn.Module, float, str]


def _best(
    choices: Iterator[Sequence[str]],
    gone: Sequence[str],
    scored: Callable[[Sequence[str], Sequence[str]], tuple[nn.Module, float]],
) -> _Best | None:
    """The choice with the best score; what cannot be removed is passed over, and told."""
    best: _Best | None = None
    refused: list[str] = []
    for paths in choices:
        try:
            net, score = scored(paths, gone)
        except InputError:
            raise
        except TorchTrimError as error:
            refused.append(f"{', '.join(paths)} stays: {error.message}")
            continue
        if best is None or math.isnan(best[2]) or score > best[2]:
            best = (paths, net, score, "")
    return None if best is None else (*best[:3], "; ".join(refused[:3]))


def _choices(
    orderly: Sequence[str], found: Sequence[Block], gone: Sequence[str], step: int, order: str
) -> Iterator[Sequence[str]]:
    """What may go next: one choice, or for a search every run of neighbours."""
    left = [path for path in orderly if path not in gone]
    if not left:
        return
    if order != "search":
        yield left[:step]
        return
    size = min(step, len(left))
    for start in range(len(left) - size + 1):
        yield left[start : start + size]


def _order(
    model: nn.Module,
    inputs: Any,
    found: Sequence[Block],
    order: str,
    data: Iterable[Any] | None,
    metric: str,
    ranking: Ranking | None,
    blocks: What | None,
) -> list[str]:
    paths = [block.path for block in found]
    if order == "last":
        return paths[::-1]
    if order == "search":
        return paths
    ranked = ranking or rank_blocks(model, data if data is not None else (), metric, inputs, blocks=blocks)
    known = [path for path in ranked.order if path in paths]
    if not known:
        raise InputError(
            "the ranking is of another model's blocks", path="ranking", found=list(ranked.order[:3]), expected=paths[:3]
        )
    return known


def _recovered(recover: Recover, net: nn.Module) -> nn.Module:
    try:
        given = recover(net)
    except Exception as error:  # the user's function raises what it likes
        raise InputError(
            f"recover failed: {type(error).__name__}: {error}", path="recover", found=type(error).__name__
        ) from error
    return given if isinstance(given, nn.Module) else net


def _stopped(error: InputError, partial: TopDown) -> TopDownStopped:
    stopped = TopDownStopped(
        error.message,
        path=error.path,
        found=error.found,
        expected=error.expected,
        hint="error.partial, which holds what was reached",
    )
    stopped.partial = partial
    return stopped


def _check(
    step: object,
    tolerance: object,
    order: object,
    max_steps: object,
    data: object,
    ranking: Ranking | None,
    heal: str | None,
) -> None:
    for name, number in (("step", step), ("max_steps", max_steps)):
        if number is None and name == "max_steps":
            continue
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InputError(f"{name} is a positive whole number", path=name, found=number)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < math.inf:
        raise InputError(
            "the tolerance is a drop of the score, in its own unit",
            path="tolerance",
            found=tolerance,
            expected="0 or more",
        )
    if order not in ORDERS:
        raise InputError(
            "an unknown order",
            path="order",
            found=order,
            expected=", ".join(ORDERS),
            hint=nearest(str(order), ORDERS),
        )
    if order == "ranked" and ranking is None and data is None:
        raise InputError("a ranking needs data", path="data", found=None, hint='data=, ranking=, or order="last"')
    if heal is not None and data is None:
        raise InputError("healing needs data", path="data", found=None, hint="data=, or heal=None")
