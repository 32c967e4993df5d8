"""What a metric of blocks works on, and what it finds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError, ModelError
from torchtrim.graph.batches import answer_to
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.execution import no_fused_attention
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.gradients import Loss, arguments_in, runnable_copy, watched
from torchtrim.importance.spans import Span


@dataclass
class Asked:
    """What is to be ranked, and on what.

    Attributes:
        model: The model; it is left as it was.
        spans: What is ranked.
        data: The batches.
        inputs: Example inputs.
        loss: The user's loss.
        measure: What counts where a block is bypassed.
        rows: How many rows of data were read.
        forwards: How many rows went forward through the model.
        backwards: How many came back.
    """

    model: nn.Module
    spans: list[Span]
    data: Iterable[Any]
    inputs: Inputs
    loss: Loss | None = None
    measure: str | None = None
    rows: int = 0
    forwards: int = 0
    backwards: int = 0

    def twin(self) -> nn.Module:
        """A copy to run, in eval mode; it shares the weights."""
        return runnable_copy(self.model).eval()

    def batches(self, doing: str = "ranking") -> Iterator[tuple[int, Any, Inputs]]:
        """The batches with their numbers, and what of each is for the forward.

        Raises:
            InputError: There are none, or one holds nothing for the forward.
        """
        empty = True
        for number, batch in enumerate(watched(self.data, doing)):
            empty = False
            given = arguments_in(batch, number, self.model, self.inputs)
            self.rows += given.batch
            yield number, batch, given
        if empty:
            raise InputError(
                "the data gave no batches", path="data", hint="a list or a DataLoader; an iterator is used up"
            )

    def answered(self, twin: nn.Module, given: Inputs, number: int) -> Any:
        """What the copy says to some rows, which are counted."""
        self.forwards += given.batch
        return answer_to(given.fresh(), twin, number)


@dataclass(frozen=True)
class Found:
    """What a metric found.

    Attributes:
        scores: One for each span; higher = keep.
        unit: What a score is, in words.
        notes: What else is to be told.
    """

    scores: list[float]
    unit: str
    notes: tuple[str, ...] = field(default_factory=tuple)


@contextmanager
def calm(*, slopes: bool = False) -> Iterator[None]:
    """Run without traces: the random state is kept, and there are gradients only where they are asked for."""
    with ExitStack() as stack:
        stack.enter_context(kept_random_state())
        stack.enter_context(torch.inference_mode(mode=False))
        stack.enter_context(torch.enable_grad() if slopes else torch.no_grad())
        stack.enter_context(no_fused_attention())
        yield


def refuse_infinite(span: Span, value: torch.Tensor, result: torch.Tensor) -> None:
    """Refuse values that nothing can be ranked by.

    Raises:
        ModelError: They are not finite.
    """
    if bool(torch.isfinite(result).all()):
        return
    if not bool(torch.isfinite(value).all()):
        raise ModelError(
            "on this data what goes into it is not finite", path=span.blocks[0].path, hint="data without NaN"
        )
    raise ModelError("on this data what comes out of it is not finite", path=span.blocks[-1].path)
