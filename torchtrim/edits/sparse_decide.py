"""Which weights go: what was asked for, put to the weights that a model has now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from torchtrim.edits.sparse_weights import Weight, by_weight
from torchtrim.errors import EditError
from torchtrim.importance.weights import (
    Units,
    blocks,
    lowest_share,
    lowest_together,
    pattern_groups,
    single,
    weight_scores,
)

if TYPE_CHECKING:
    from torchtrim.edits.sparsify import Sparsify

Masks = dict[str, torch.Tensor]  # by the name of a weight, true where it goes


def decide(
    asked: Sparsify,
    weights: Sequence[Weight],
    numbers: Mapping[str, float] | None,
    gone: Mapping[str, torch.Tensor] | None = None,
    *,
    sparsity: float = 0.0,
    share: float = 1.0,
) -> tuple[Masks, dict[str, float | None]]:
    """The masks of the weights, and the score below which each lost weights.

    Args:
        asked: What is asked for.
        weights: The weights.
        numbers: What is asked of each by itself: its sparsity, or its threshold; see `numbers_of`.
        gone: What has gone already, and stays gone.
        sparsity: How much is to be zero, where `asked` says it for all weights in one number.
        share: How far to go: of what is asked of single weights, and of an N:M pattern.

    Raises:
        ModelError: A weight is not finite.
        EditError: More is asked for than may go.
    """
    masks: Masks = {}
    edges: dict[str, float | None] = {}
    if asked.pattern is not None:  # a weight may have been narrowed since
        odd = [weight for weight in weights if weight.inputs % asked.groups[1]]
        masks |= {weight.name: gone[weight.name] for weight in odd if gone is not None and weight.name in gone}
        weights = [weight for weight in weights if weight not in odd]
    told = asked.importance == "magnitude" and asked.pattern is None
    with torch.no_grad():
        if asked.scope == "global":
            found = [_units(asked, weight, gone) for weight in weights]
            part = share if asked.pattern is not None else sparsity
            chosen, edge = lowest_together(found, part, 1.0 if asked.pattern is not None else asked.max_sparsity)
            for weight, units, each in zip(weights, found, chosen, strict=True):
                masks[weight.name] = _and_before(units.spread(each), weight, gone)
                edges[weight.name] = edge if told and edge is not None and edge >= 0 and bool(each.any()) else None
            return masks, edges
        for weight in weights:
            units = _units(asked, weight, gone)
            edge = None
            if asked.thresholds is not None and numbers is not None:
                edge = numbers[weight.name] * share
                each = (units.scores < edge) | units.done
            elif numbers is not None:
                each, edge = lowest_share(units, numbers[weight.name] * share)
            else:
                each, edge = lowest_share(units, share if asked.pattern is not None else sparsity)
            masks[weight.name] = _and_before(units.spread(each), weight, gone)
            edges[weight.name] = edge if told and edge is not None and edge >= 0 else None
    return masks, edges


def numbers_of(
    asked: Sparsify, model: nn.Module, weights: Sequence[Weight]
) -> tuple[list[Weight], dict[str, float] | None, dict[str, str]]:
    """Which of some weights take part, what is asked of each of them, and why the others do not.

    Raises:
        PathError: A path that does not exist.
        SelectionError: A key that fits none of the weights.
        EditError: None takes part; or one that was named by its path cannot.
    """
    left_out: dict[str, str] = {}
    if asked.pattern is not None:
        of = asked.groups[1]
        for weight in weights:
            if weight.inputs % of:
                left_out[weight.name] = f"{weight.inputs} inputs, no multiple of {of}"
                if asked.include is not None and {weight.name, weight.name.rpartition(".")[0]} & set(asked.include):
                    raise EditError(
                        f"the pattern {asked.pattern} does not divide its inputs",
                        path=weight.name,
                        found=weight.inputs,
                        expected=f"a multiple of {of}",
                    )
    numbers = by_weight(model, weights, asked.by_path) if asked.by_path else None
    if numbers is not None:
        what = "threshold" if asked.thresholds is not None else "sparsity"
        left_out |= {weight.name: f"no {what} is given for it" for weight in weights if weight.name not in numbers}
    taking = [weight for weight in weights if weight.name not in left_out]
    if not taking:
        name, why = next(iter(left_out.items()))
        raise EditError("none of the weights can be pruned so", path=name, found=why)
    return taking, numbers, left_out


def _units(asked: Sparsify, weight: Weight, gone: Mapping[str, torch.Tensor] | None) -> Units:
    before = None if gone is None else gone.get(weight.name)
    scores = weight_scores(weight.name, weight.parameter, asked.importance, before)
    if asked.pattern is not None:
        kept, of = asked.groups
        return pattern_groups(scores, kept, of, weight.axis)
    if asked.block is None:
        return single(scores)
    if weight.axis != 0:
        return blocks(scores, asked.block, asked.pool)
    units = blocks(scores.transpose(0, 1), asked.block, asked.pool)  # blocks are of outputs and inputs
    return replace(units, spread=lambda chosen: units.spread(chosen).transpose(0, 1).contiguous())


def _and_before(mask: torch.Tensor, weight: Weight, gone: Mapping[str, torch.Tensor] | None) -> torch.Tensor:
    before = None if gone is None else gone.get(weight.name)
    return mask if before is None else mask | before
