"""accelerate, for the length of one training: the device, the precision, and the other processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch

from torchtrim.errors import InputError, MissingDependency

PRECISIONS = ("bf16", "fp16")


def refuse_without_accelerate() -> None:
    """Said before any work that a training comes after.

    Raises:
        MissingDependency: accelerate is not installed.
    """
    if find_spec("accelerate") is None:
        raise MissingDependency("accelerate is not installed", hint='pip install "torchtrim[train]"')


@contextmanager
def accelerating(given: Any = None, precision: str | None = None) -> Iterator[Any]:
    """An `accelerate.Accelerator`: the one that was given, or a new one; all else of accelerate's stays as it was.

    Args:
        given: An accelerator of the user's.
        precision: `"bf16"`, `"fp16"` or `None`, for a new one.

    Raises:
        MissingDependency: accelerate is not installed.
        InputError: No such precision, one beside an accelerator that has its own, or one the device does not have.

    Example:
        >>> with accelerating() as fabric:
        ...     fabric.num_processes
        1
    """
    refuse_without_accelerate()
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if precision not in (None, *PRECISIONS):
        raise InputError("no such precision", path="precision", found=precision, expected=PRECISIONS)
    if given is not None:
        if not isinstance(given, Accelerator):
            raise InputError("not accelerate's", path="accelerator", found=type(given).__name__)
        if precision is not None:
            raise InputError("an accelerator has its precision already", path="precision", found=precision)
        if given.gradient_accumulation_steps != 1:
            raise InputError(
                "the accelerator accumulates gradients by itself",
                path="accelerator",
                found=given.gradient_accumulation_steps,
                hint="finetune(..., accumulate=)",
            )
        _refuse_sharded(given)
        optimizers, syncs = list(given._optimizers), given.sync_gradients
        given.gradient_state._set_sync_gradients(True)  # without it no optimizer makes a step
        try:
            yield given
        finally:
            given._optimizers[:] = optimizers
            given.gradient_state._set_sync_gradients(syncs)
        return
    processor = not (torch.cuda.is_available() or torch.backends.mps.is_available())
    if precision == "fp16" and processor:
        raise InputError("a processor trains in bf16, not in fp16", path="precision", hint='precision="bf16"')
    # accelerate keeps one state a process, which a new accelerator changes: this one is for a single training.
    known, known_partly = bool(AcceleratorState._shared_state), bool(PartialState._shared_state)
    gradients = dict(GradientState._shared_state)
    try:
        fabric = Accelerator(cpu=processor, mixed_precision=precision or "no")
        _refuse_sharded(fabric)
        fabric.gradient_state._set_sync_gradients(True)
        yield fabric
    except ValueError as error:
        if not known or "AcceleratorState" not in str(error):
            raise
        raise InputError(
            "an Accelerator of this program has other settings", path="precision", hint="accelerator=, that one"
        ) from error
    finally:
        if not known:
            # With the processes of a group the group stays, which no second one can be beside.
            alone = not known_partly and not torch.distributed.is_initialized()
            AcceleratorState._reset_state(reset_partial_state=alone)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(gradients)


def _refuse_sharded(fabric: Any) -> None:
    kind = str(fabric.distributed_type.value)
    if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
        raise InputError(
            "only whole models are trained here, each process having one",
            path="accelerator",
            found=kind,
            expected="accelerate launch --multi_gpu, or torchrun",
        )
