"""Whether an insertion computes what it should: the original, with the same put in by other means."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, TypeAlias

from torch import fx, nn

from torchtrim.edits.addresses import Address, places
from torchtrim.edits.placing import passed_through
from torchtrim.edits.work import Work
from torchtrim.errors import CheckFailed
from torchtrim.graph.check import Mismatch, Side, compare
from torchtrim.graph.copying import structural_copy
from torchtrim.graph.inputs import Inputs

_Wrapper: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]


def check_insertion(work: Work, where: Address, path: str, *, before: bool, index: int) -> tuple[str, ...]:
    """Compare `work.model` with `work.before`, where the inserted module is called by hooks.

    Args:
        work: The model with the module in it, at `path`, and the model before.
        where: The call it was put next to.
        path: The module's path.
        before: Whether it was put before the call.
        index: Which of the tensors goes through it.

    Returns:
        What was compared, in words.

    Raises:
        CheckFailed: They compute something else.
    """
    reference = structural_copy(work.before)
    holder: list[Any] = []

    def through(value: Any) -> Any:
        return passed_through(value, index, holder[-1])

    if where.function is not None:
        reference = _opened(work, where, None)
        try:
            compare(Side(work.before), Side(reference), work.inputs)
        except Mismatch as error:
            raise CheckFailed(f"the module cannot be opened here: {error.message}", path=where.text) from error
        reference = _opened(work, where, _wrapper(through, before))

    def call(module: nn.Module, inputs: Inputs) -> Any:
        # It has its path while random numbers are seeded and gradients taken, and is in nobody's way while they run.
        inserted = module._modules.pop(path)
        holder.append(inserted)
        handles = [] if where.function is not None else [_hook(module, where, through, before)]
        try:
            return inputs.call(module)
        finally:
            for handle in handles:
                handle.remove()
            module._modules[path] = inserted

    reference._modules[path] = work.model.get_submodule(path)
    try:
        return compare(Side(reference, call), Side(work.model), work.inputs)
    except Mismatch as error:
        raise CheckFailed(error.message, path=where.text) from error


def _hook(module: nn.Module, where: Address, through: Callable[[Any], Any], before: bool) -> Any:
    target = module.get_submodule(where.path)
    count = itertools.count()

    def is_meant() -> bool:
        return next(count) == where.number or where.number is None

    if before:
        return target.register_forward_pre_hook(
            lambda _module, args, kwargs: through((args, kwargs)) if is_meant() else None, with_kwargs=True
        )
    return target.register_forward_hook(lambda _module, _args, output: through(output) if is_meant() else None)


def _wrapper(through: Callable[[Any], Any], before: bool) -> _Wrapper:
    def wrapped(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if before:
                args, kwargs = through((args, kwargs))
            output = function(*args, **kwargs)
            return output if before else through(output)

        return call

    return wrapped


def _opened(work: Work, where: Address, wrapper: _Wrapper | None) -> nn.Module:
    """The model before, with the module that calls a function opened, and the function wrapped."""
    copy = Work(structural_copy(work.before), work.inputs)
    for room, nodes in places(copy, where.text):
        if wrapper is not None:
            for node in nodes:
                node.target = wrapper(_function(node))
                node.op = "call_function"
        room.close(copy)
    return copy.model


def _function(node: fx.Node) -> Callable[..., Any]:
    target: Any = node.target
    if node.op == "call_method":
        return lambda value, *args, **kwargs: getattr(value, target)(*args, **kwargs)
    function: Callable[..., Any] = target
    return function
