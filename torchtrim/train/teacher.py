"""The teacher while it teaches: in eval mode, without gradients, and as it was before afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import chain
from typing import Any

import torch
from torch import nn

from torchtrim.edits.addresses import Address
from torchtrim.errors import ModelError
from torchtrim.graph.copying import is_meta, kept_random_state, structural_copy, unwrap
from torchtrim.graph.inputs import Inputs
from torchtrim.train.capture import Capture, version_of

HALVES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class Teacher:
    """A model that is asked and never changed. It is no `nn.Module`: what holds it does not hold its parameters.

    Args:
        model: The model. With a `dtype` a copy of it in that type is asked instead.
        dtype: The type of the copy's weights; it shares those that have it already.

    Raises:
        ModelError: It cannot be copied, or has no weights here.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.5)).train()
        >>> output, _ = Teacher(net).answer(Inputs.of(torch.ones(1, 4)))
        >>> output.requires_grad, net.training
        (False, True)
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        model = unwrap(model)
        if dtype is not None and dtype not in HALVES:
            raise ModelError("not a type to compute in", path="teacher_dtype", found=dtype, expected=HALVES)
        if is_meta(model):
            raise ModelError("it has shapes and no values (meta device)", path="teacher", hint="load its weights")
        self.own_dtype = dtype
        self.model = model if dtype is None else _in_type(model, dtype)
        self._unread: torch.Tensor | None = None
        self._writes: bool | None = None  # to its inputs, which are the student's too; first seen when it is asked

    @property
    def device(self) -> torch.device | None:
        """Where its weights are; `None` where it has none."""
        return device_of(self.model)

    @property
    def dtype(self) -> torch.dtype | None:
        """The type of its first weight that is no whole number."""
        return dtype_of(self.model)

    def to(self, device: torch.device) -> None:
        """Move it."""
        if device.type != "meta" and self.device not in (None, device):
            self.model.to(device)

    def answer(
        self,
        inputs: Inputs,
        places: Sequence[Address] = (),
        copies: frozenset[str] = frozenset(),
        student_dtype: torch.dtype | None = None,
    ) -> tuple[Any, dict[str, torch.Tensor]]:
        """What it says to a batch, and what it computes at some places on the way.

        Args:
            inputs: The batch.
            places: Where to look.
            copies: Of which places to keep a copy.
            student_dtype: Inputs of this type are brought to the teacher's own.
        """
        inputs = self.in_own_type(inputs, student_dtype)
        device = self.device
        plain = self.own_dtype is not None and device is not None
        exact = torch.autocast(device.type, enabled=False) if plain and device is not None else nullcontext()
        with torch.no_grad(), kept_random_state(), _in_eval(self.model), exact:
            capture = Capture(self.model, places, copies)
            with capture:
                output = self._called(inputs)
            capture.refuse_overwritten()
        return output, capture.values

    def _called(self, inputs: Inputs) -> Any:
        given = inputs if self._writes is False else inputs.fresh()
        versions = [version_of(tensor) for tensor in given.tensors]
        output = given.call(self.model)
        wrote = versions != [version_of(tensor) for tensor in given.tensors]
        if wrote and self._writes is False:
            raise ModelError(
                "it writes to its inputs, which the student gets too, and did not do so before",
                path="teacher",
                hint="x = x.clone() in its forward",
            )
        if not any(tensor.is_inference() for tensor in given.tensors):
            self._writes = wrote or bool(self._writes)
        return output

    def in_own_type(self, inputs: Inputs, student_dtype: torch.dtype | None) -> Inputs:
        """Inputs of the student's type in the teacher's."""
        own = self.dtype
        if own is None or student_dtype is None or own == student_dtype:
            return inputs
        return inputs.map(lambda tensor: tensor.to(own) if tensor.dtype == student_dtype else tensor)

    def refuse_nan(self, logits: torch.Tensor) -> None:
        """Raise `ModelError` for logits that are not finite; on a GPU one call late, so that nothing waits for it."""
        finite = torch.isfinite(logits).all()
        read, self._unread = (finite, None) if logits.device.type == "cpu" else (self._unread, finite)
        if read is not None and not read:
            half = self.own_dtype == torch.float16
            raise ModelError(
                "it answers with NaN or infinite numbers",
                path="teacher",
                found="in this batch" if self._unread is None else "in the batch before this one",
                hint="teacher_dtype=torch.bfloat16" if half else "its weights, or the inputs, are not finite",
            )


def device_of(model: nn.Module) -> torch.device | None:
    """Where the first weight of a model is; `None` without weights."""
    # One after the other: this is asked in every step, and lists of all weights take longer than a loss does.
    return next((tensor.device for tensor in chain(model.parameters(), model.buffers())), None)


def dtype_of(model: nn.Module) -> torch.dtype | None:
    """The type of the first weight that is no whole number; `None` without."""
    return next((each.dtype for each in model.parameters() if each.is_floating_point()), None)


def refuse_same(student: nn.Module, teacher: nn.Module) -> None:
    """Raise `ModelError` for a student that is its own teacher, in whole or in part."""
    if unwrap(student) is unwrap(teacher):
        raise ModelError(
            "student and teacher are the same object, so there is nothing to learn",
            path="teacher",
            found=type(unwrap(teacher)).__name__,
            hint="the original: edits leave it alone unless copy=False; or copy.deepcopy(student)",
        )
    names = {_memory(parameter): name for name, parameter in teacher.named_parameters() if parameter.numel()}
    shared = [name for name, parameter in student.named_parameters() if _memory(parameter) in names]
    if shared:
        raise ModelError(
            "student and teacher share parameters: the teacher would change while it teaches",
            path=shared[0],
            found=f"{len(shared)} of them, such as {shared[:3]}",
            hint="copy.deepcopy(teacher)",
        )


def _memory(parameter: torch.Tensor) -> tuple[Any, int]:
    if parameter.is_meta or type(parameter) is not nn.Parameter:
        return (type(parameter), id(parameter))
    # Where in memory it lies: two parameters may be views of the same.
    return (parameter.device, parameter.untyped_storage().data_ptr())


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    # The flags themselves: an overridden `train` may do more, which could not be taken back.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _in_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    stand_ins: dict[int, torch.Tensor] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and (parameter.dtype != dtype or type(parameter) is nn.Parameter):
            # Also of those that share their memory: the copy may be moved to a device by itself.
            stand_ins[id(parameter)] = nn.Parameter(parameter.detach().to(dtype), requires_grad=False)
    for buffer in model.buffers():
        # Copies, so that the two do not write to each other's.
        kept = buffer.detach().to(dtype) if buffer.is_floating_point() else buffer.detach()
        stand_ins[id(buffer)] = kept.clone() if kept.data_ptr() == buffer.data_ptr() else kept
    return structural_copy(model, stand_ins=stand_ins)
