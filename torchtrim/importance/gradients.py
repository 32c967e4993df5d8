"""The gradient of a loss by every parameter, frozen ones too, that leaves no trace in the model."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.errors import InputError, ModelError, TorchTrimError
from torchtrim.graph.batches import arguments_of
from torchtrim.graph.copying import kept_random_state, source_of, structural_copy
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.progress import progress

Loss: TypeAlias = Callable[[Any, Any], torch.Tensor]
_LABELS = ("labels", "label", "targets", "target", "y")
_MODEL = ("model", "net", "network", "module")


def gradients(
    model: nn.Module, data: Iterable[Any], loss: Loss | None, inputs: Inputs, kind: str
) -> dict[int, torch.Tensor]:
    """The mean gradient of a loss over some data by each parameter that it depends on.

    The model runs as a copy that shares its weights, in the mode that it is in: no `.grad`, buffer or flag of the
    user's changes, and frozen parameters get a gradient too. Time: a forward and a backward for each batch;
    `"squared"` needs a backward for each sample.

    Args:
        model: The model.
        data: Batches, gone through once.
        loss: `loss(output, target)` or `loss(model, batch)`; see `scores`.
        inputs: Example inputs: which part of a batch is for the forward.
        kind: Of what the mean is taken: `"signed"` gradients of batches, their `"absolute"` values (so that batches do
            not cancel out), or the `"squared"` gradients of samples (the empirical Fisher information).

    Returns:
        By the identity of the parameter.

    Raises:
        InputError: The data holds nothing, or does not fit the model; or the loss does not depend on the model.
        ModelError: The loss is not finite.

    Example:
        >>> net = nn.Linear(1, 1, bias=False).requires_grad_(False)
        >>> batches = [(torch.ones(2, 1), torch.tensor([[1.0], [-3.0]]))]
        >>> found = gradients(net, batches, lambda output, target: (output * target).mean(), Inputs(), "squared")
        >>> found[id(net.weight)], net.weight.grad
        (tensor([[5.]]), None)
    """
    twin, origin = trainable_twin(model)
    parameters = [held for held in twin.parameters() if id(held) in origin]
    sums: dict[int, torch.Tensor] = {}
    count = 0
    with kept_random_state(), torch.inference_mode(mode=False), torch.enable_grad():
        for number, batch in enumerate(watched(data, "gradients")):
            batch = on_device(batch, model)
            for value in losses_of(twin, batch, loss, inputs, number, by_sample=kind == "squared"):
                refuse_unfit(value, number)
                with naming(number):
                    found = torch.autograd.grad(value, parameters, retain_graph=kind == "squared", allow_unused=True)
                if all(each is None for each in found):
                    raise _independent(number)
                for held, each in zip(parameters, found, strict=True):
                    if each is not None:
                        term = _of_kind(each.to_dense() if each.is_sparse else each, kind)
                        key = origin[id(held)]
                        sums[key] = sums[key] + term if key in sums else term
                count += 1
    if not count:
        raise InputError("the data gave no batches", path="data", hint="a list or a DataLoader; an iterator is used up")
    return {key: total / count for key, total in sums.items()}


def _of_kind(gradient: torch.Tensor, kind: str) -> torch.Tensor:
    gradient = gradient.detach().float()
    return gradient if kind == "signed" else gradient.abs() if kind == "absolute" else gradient.square()


def runnable_copy(model: nn.Module) -> nn.Module:
    """A copy that shares the parameters, owns what a run writes to, and leaves out hooks that are plain functions."""
    return structural_copy(model, own_buffers=True, user_hooks=False)


def trainable_twin(model: nn.Module) -> tuple[nn.Module, dict[int, int]]:
    """A copy whose parameters share the values of the model's and all want gradients; and whose each one is."""
    twin = runnable_copy(model)
    memo: dict[int, Any] = {}
    origin: dict[int, int] = {}
    for held in twin.parameters():
        if type(held) is not nn.Parameter or not held.is_floating_point():
            memo[id(held)] = held
            continue
        if held.is_meta:
            raise ModelError("the model is on the meta device: it has no gradients")
        memo[id(held)] = new = nn.Parameter(held.detach(), requires_grad=True)
        origin[id(new)] = id(source_of(held))
    return copy.deepcopy(twin, memo), origin


def on_device(batch: Any, model: nn.Module) -> Any:
    """A batch on the model's device."""
    held = next((each for each in (*model.parameters(), *model.buffers())), None)
    if held is None:
        return batch
    return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.detach().to(held.device), batch)


def arguments_in(batch: Any, number: int, model: nn.Module, inputs: Inputs) -> Inputs:
    """What of a batch is for the forward, on the model's device.

    Raises:
        InputError: Nothing is, or it has no samples; says which batch it is.
    """
    try:
        given = arguments_of(on_device(batch, model), model, inputs)
    except InputError as error:
        raise InputError(
            "a batch holds nothing for the forward",
            path=f"data[{number}]",
            found=type(batch).__name__,
            expected="a tensor, an (inputs, targets) pair, or a dict of tensors",
            hint=error.hint,
        ) from error
    if not given.batch:
        raise InputError("a batch without samples", path=f"data[{number}]", found=given.describe())
    return given


@contextmanager
def naming(number: int) -> Iterator[None]:
    """Say which batch it was that something did not take."""
    try:
        yield
    except (TorchTrimError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model or a loss of the user's raises
        raise InputError(
            f"the model or the loss does not take the data: {type(error).__name__}: {str(error).rstrip('.')}",
            path=f"data[{number}]",
            hint="a loss is loss(output, target); or loss(model, batch), where its first argument is called model",
        ) from error


def losses_of(
    model: nn.Module, batch: Any, loss: Loss | None, inputs: Inputs, number: int, *, by_sample: bool
) -> Iterator[torch.Tensor]:
    """The loss of a batch; or of each sample in it."""
    if loss is not None and _takes_model(loss):
        rows = next(
            (len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim()), 1
        )
        for part in (_row(batch, row, rows) for row in range(rows)) if by_sample else [batch]:
            with naming(number):
                value = loss(model, part)
            yield value
        return
    given = arguments_in(batch, number, model, inputs)
    with naming(number):
        output = given.fresh().call(model)
    if by_sample and loss is None and own_loss(output) is not None:

        def own(model: nn.Module, batch: Any) -> Any:
            return own_loss(arguments_of(batch, model, inputs).fresh().call(model))

        yield from losses_of(model, batch, own, inputs, number, by_sample=True)
        return
    target = target_of(batch, given)
    for row in range(given.batch) if by_sample else [None]:
        with naming(number):
            parts = (output, target) if row is None else _row((output, target), row, given.batch)
            value = _default(parts[0], parts[1], number) if loss is None else loss(*parts)
        yield value


def _takes_model(loss: Loss) -> bool:
    try:
        names = list(inspect.signature(loss).parameters)
    except (TypeError, ValueError):
        return False
    return bool(names) and names[0] in _MODEL


def _row(value: Any, row: int, rows: int) -> Any:
    """One sample of everything that has as many rows."""

    def take(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[row : row + 1] if tensor.dim() and tensor.shape[0] == rows else tensor

    return pytree.tree_map_only(torch.Tensor, take, value)


def target_of(batch: Any, given: Inputs) -> Any:
    """What of a batch is not for the forward: the target; `None` where there is none.

    Example:
        >>> target_of((torch.zeros(2, 3), torch.tensor([1, 0])), Inputs((torch.zeros(2, 3),)))
        tensor([1, 0])
        >>> target_of({"pixels": torch.zeros(2, 3), "labels": torch.tensor([1, 0])}, Inputs())
        tensor([1, 0])
    """
    if isinstance(batch, Mapping):
        return next((batch[name] for name in _LABELS if name in batch), None)
    if not isinstance(batch, (tuple, list)):
        return None
    nested = bool(batch) and isinstance(batch[0], (Mapping, tuple, list))
    rest = batch[1:] if nested or not given.args else batch[len(given.args) :]
    return None if not rest else rest[0] if len(rest) == 1 else tuple(rest)


def _default(output: Any, target: Any, number: int) -> torch.Tensor:
    """The output's own loss, cross-entropy for classes, the mean squared error for values."""
    own = own_loss(output)
    if own is not None:
        return own
    if isinstance(target, tuple):
        raise InputError(
            "which of these are the labels?",
            path=f"data[{number}]",
            found=f"{len(target)} items besides the inputs",
            hint="loss=lambda model, batch: ..., which takes of a batch what it needs",
        )
    if not isinstance(target, torch.Tensor):
        raise InputError(
            "a loss is needed, and there are no labels to make one of",
            path=f"data[{number}]",
            expected="(inputs, targets) batches, or loss=",
            hint="loss=lambda output, target: ..., or a criterion that needs no labels",
        )
    found = next((leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)), None)
    if found is None:
        raise InputError("the model returns no tensor to make a loss of", found=type(output).__name__, hint="loss=")
    if target.is_floating_point():
        if found.shape != target.shape:
            raise InputError(
                "the targets do not fit the output",
                path=f"data[{number}]",
                found=list(target.shape),
                expected=list(found.shape),
            )
        return nn.functional.mse_loss(found, target.to(found.dtype))
    return nn.functional.cross_entropy(found, target.long())


def own_loss(output: Any) -> torch.Tensor | None:
    """The loss that a model works out by itself, where it is given labels (transformers)."""
    own = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return own if isinstance(own, torch.Tensor) else None


def refuse_unfit(value: Any, number: int, *, slopes: bool = True) -> None:
    """Refuse what is no loss: not one finite number; or, for gradients, one that does not depend on the model.

    Raises:
        InputError: It is none.
        ModelError: It is not finite.
    """
    if not isinstance(value, torch.Tensor) or value.numel() != 1:
        raise InputError(
            "a loss is one number",
            path=f"data[{number}]",
            found=list(value.shape) if isinstance(value, torch.Tensor) else type(value).__name__,
            expected="a tensor of one element",
            hint="a loss that takes the mean",
        )
    if not bool(torch.isfinite(value)):
        raise ModelError("the loss is not finite", path=f"data[{number}]", found=value.item())
    if slopes and not value.requires_grad:
        raise _independent(number)


def _independent(number: int) -> InputError:
    return InputError(
        "the loss does not depend on the parameters of the model that it is given",
        path=f"data[{number}]",
        hint="loss=lambda model, batch: ..., which calls that model and no other",
    )


def watched(data: Iterable[Any], doing: str) -> Iterator[Any]:
    """The batches, with a bar where a person is watching. A tensor or a dict by itself is one batch."""
    batches: Iterable[Any] = [data] if isinstance(data, (torch.Tensor, Mapping)) else data
    if not isinstance(batches, Iterable):
        raise InputError("data is an iterable of batches", found=type(data).__name__, expected="a list, a DataLoader")
    if isinstance(data, tuple) and len(data) == 2 and all(isinstance(each, torch.Tensor) for each in data):
        one, other = data
        if one.dim() != other.dim() and one.shape[:1] == other.shape[:1]:
            raise InputError(
                "data is an iterable of batches, and this is one batch", path="data", hint="data=[(inputs, targets)]"
            )
    total = len(batches) if isinstance(batches, Sized) else 0
    with progress(doing) as tell:
        for number, batch in enumerate(batches):
            tell(f"batch {number + 1}", number / total if total else 0.0)
            yield batch
