"""The order in which the autopilot takes blocks out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from torchtrim.edits.heal_norms import Judge
from torchtrim.edits.remove import remove
from torchtrim.errors import TorchTrimError
from torchtrim.graph.inputs import Inputs

_SEARCHED = 16  # blocks: with more of them, every run of the search would take too long
Say = Callable[[str, float], Any]


def searched(blocks: int) -> bool:
    """Whether the order is searched for by default: it costs blocks times steps short runs."""
    return blocks <= _SEARCHED


def search_order(
    model: nn.Module, inputs: Inputs, paths: Sequence[str], most: int, judge: Judge, say: Say
) -> list[str]:
    """Blocks in the order in which their loss is least, one after the other: each is tried, the best one goes.

    Time: a removal and a run on the rows held back for each block that is left, at each step.

    Args:
        model: The model.
        inputs: Example inputs.
        paths: The blocks.
        most: How many are to go at most.
        judge: Says how far a model's outputs are from the original's.
        say: Called with what is being done, and how far it is.
    """
    order: list[str] = []
    kept = model
    steps = sum(len(paths) - done for done in range(most))
    done = 0
    while len(order) < most:
        best: tuple[float, str, nn.Module] | None = None
        for path in (each for each in paths if each not in order):
            say(f"which block goes: {path}", done / max(steps, 1))
            done += 1
            try:
                net = remove(kept, inputs, [path], check=False)
                error = judge.error(net.eval())
            except TorchTrimError:
                continue  # what cannot go now may go later, when others are gone
            if best is None or error < best[0]:
                best = (error, path, net)
        if best is None:
            break
        order.append(best[1])
        kept = best[2]
    return order
