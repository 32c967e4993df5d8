"""Runs of blocks, and what goes in and comes out of each while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from torchtrim.errors import EditError
from torchtrim.graph.handing_on import Form, in_form, main_value, result_of, with_result
from torchtrim.importance.blocks import Block


@dataclass(frozen=True)
class Span:
    """Blocks of which each feeds the next: one, or a run of several.

    Attributes:
        blocks: They, in order.
    """

    blocks: tuple[Block, ...]

    @property
    def name(self) -> str:
        """The path of the first, and of the last.

        Example:
            >>> from torchtrim.graph.handing_on import Form
            >>> Span((Block("layers.3", Form(), 1, 0, 0, 2, False), Block("layers.4", Form(), 1, 0, 0, 2, True))).name
            'layers.3 .. layers.4'
        """
        first, last = self.blocks[0].path, self.blocks[-1].path
        return first if len(self.blocks) == 1 else f"{first} .. {last}"

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths of all."""
        return tuple(block.path for block in self.blocks)

    @property
    def channels(self) -> int:
        """The axis of the channels, in what goes in and comes out."""
        return self.blocks[0].channels


Looking: TypeAlias = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None]


def spans_of(blocks: Sequence[Block], runs: int) -> list[Span]:
    """Every run of so many blocks.

    Raises:
        EditError: There is none.
    """
    found = [
        Span(tuple(blocks[start : start + runs]))
        for start in range(len(blocks) - runs + 1)
        if all(block.follows for block in blocks[start + 1 : start + runs])
        and (runs == 1 or all(block.calls == 1 for block in blocks[start : start + runs]))
    ]
    if not found:
        raise EditError(
            "no blocks follow one another so many times",
            path="runs",
            found=runs,
            expected=f"at most {_longest(blocks)}",
        )
    return found


def _longest(blocks: Sequence[Block]) -> int:
    longest = current = 0
    for block in blocks:
        current = current + 1 if block.follows else 1
        longest = max(longest, current)
    return longest


@contextmanager
def looked_at(twin: nn.Module, spans: Sequence[Span], look: Looking, *, slopes: bool = False) -> Iterator[None]:
    """Call `look(number, value, result)` wherever a span ends: with what went into it and what came out.

    What `look` returns goes on in place of the result; `None` leaves it.

    Args:
        twin: The copy that runs.
        spans: The spans.
        look: The function.
        slopes: Whether what went in keeps its part in the graph of gradients; else it is a plain value.
    """
    given: list[list[torch.Tensor]] = [[] for _ in spans]
    handles = []

    def enter(number: int, form: Form) -> Any:
        def hook(_module: nn.Module, args: Any, kwargs: Any) -> None:
            value = main_value(form, args, kwargs)
            given[number].append((value if slopes else value.detach()).clone())  # the block may write to it

        return hook

    def leave(number: int, form: Form) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
            new = look(number, given[number].pop(), result_of(form, output))
            return None if new is None else with_result(form, output, new)

        return hook

    try:
        for number, span in enumerate(spans):
            first, last = span.blocks[0], span.blocks[-1]
            entered = twin.get_submodule(first.path).register_forward_pre_hook(
                enter(number, first.form), with_kwargs=True
            )
            handles += [entered, twin.get_submodule(last.path).register_forward_hook(leave(number, last.form))]
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def bypassed(twin: nn.Module, span: Span) -> Iterator[None]:
    """Let the blocks of a span hand on what they are given, without running.

    Args:
        twin: A copy made to be run: its modules' forwards are covered meanwhile.
        span: The span.
    """

    def handing_on(form: Form) -> Callable[..., Any]:
        return lambda *args, **kwargs: in_form(form, main_value(form, args, kwargs), args, kwargs)

    modules = [twin.get_submodule(block.path) for block in span.blocks]
    covered = [module.__dict__.get("forward") for module in modules]
    try:
        for module, block in zip(modules, span.blocks, strict=True):
            module.__dict__["forward"] = handing_on(block.form)
        yield
    finally:
        for module, before in zip(modules, covered, strict=True):
            if before is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = before
