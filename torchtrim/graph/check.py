"""Compare two models that should compute the same, in both modes, at several batch sizes and at another input size."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import nn

from torchtrim.errors import CheckFailed, GuardError, InputError
from torchtrim.graph.copying import has_function_hooks, is_meta, kept_random_state, source_of, structural_copy
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.reading import UNKNOWABLE

_TOLERANCE = 1e-4  # of the largest value: what the order of additions may change, and no more
_SIZE_STEP = 32


@dataclass(frozen=True)
class Side:
    """One of the two: how to call it, and the module whose modes and buffers are looked at.

    Hooks that are plain functions are the user's, and are not run, unless `user_hooks` says that they must be.
    """

    module: nn.Module
    call: Callable[[nn.Module, Inputs], Any] = lambda module, inputs: inputs.call(module)
    user_hooks: bool = False


@dataclass(frozen=True)
class Variant:
    """One way of running both: a mode and inputs."""

    name: str
    training: bool
    inputs: Inputs


class Mismatch(CheckFailed):
    """What differed, in which variant."""

    variant: Variant


def variants(inputs: Inputs) -> list[Variant]:
    """Eval and train mode, batches 1, 2 and 3 or more, and another size of picture."""
    batch = inputs.batch
    several = max(batch, 2)
    found = [
        Variant(f"eval, batch {batch}", False, inputs),
        Variant(f"train, batch {several}", True, inputs.with_batch(several)),
        Variant(f"eval, batch {3 if batch == 1 else 1}", False, inputs.with_batch(3 if batch == 1 else 1)),
    ]
    resized = inputs.with_batch(1).map(_resized)
    if any(a.shape != b.shape for a, b in zip(resized.tensors, inputs.with_batch(1).tensors, strict=True)):
        size = "x".join(str(length) for length in resized.tensors[0].shape[2:])
        found.append(Variant(f"eval, size {size}", False, resized))
    return found


def compare(reference: Side, candidate: Side, inputs: Inputs, *, gradients: bool = True) -> tuple[str, ...]:
    """Run both in every variant; returns what was checked and what could not be, in words.

    Outputs and buffers are compared, in train mode the gradients of the parameters too. Neither module is changed:
    copies are run that share their parameters and own their buffers. Time: four forwards and a backward of each
    (no backward without `gradients`).

    Raises:
        InputError: The reference refuses the example inputs.
        Mismatch: The candidate computes something else.
    """
    if is_meta(reference.module) or any(tensor.is_meta for tensor in inputs.tensors):
        return ("not run: the model is on the meta device",)
    done: list[str] = []
    for position, variant in enumerate(variants(inputs)):
        try:
            expected = run(reference, variant, gradients=None if gradients else False)
        except Exception as error:
            if position == 0:
                if not reference.user_hooks and has_function_hooks(reference.module):
                    # One of them may change a shape: then nothing runs without it.
                    sides = replace(reference, user_hooks=True), replace(candidate, user_hooks=True)
                    return compare(*sides, inputs, gradients=gradients)
                run_fake(reference.module, inputs)  # says which layer refuses them
                raise InputError(
                    f"the model does not run on the example inputs: {error}", found=inputs.describe()
                ) from error
            done.append(f"{variant.name}: not checked, the original refuses it")
            continue
        try:
            found = run(candidate, variant, gradients=expected.gradients is not None)
        except GuardError as error:
            if "size" not in variant.name:
                raise _mismatch(variant, str(error)) from error
            done.append(f"{variant.name}: refused, the graph holds for the example's size")
            continue
        except Exception as error:
            raise _mismatch(variant, f"it raises {type(error).__name__}: {error}") from error
        difference = _difference(expected, found)
        if difference is not None:
            raise _mismatch(variant, difference)
        unclear = ", where it is a number" if _holds_nan(expected.outputs) else ""
        done.append(f"{variant.name}: equal{unclear}")
    return tuple(done)


def _holds_nan(outputs: Any) -> bool:
    tensors = [value for value in flatten(outputs).values() if isinstance(value, torch.Tensor)]
    return any(bool(tensor.isnan().any()) for tensor in tensors if tensor.is_floating_point() and not tensor.is_nested)


@dataclass(frozen=True)
class Outcome:
    """What a run gave, and what it left in the buffers; the parameters' gradients where they were asked for."""

    outputs: Any
    buffers: dict[str, torch.Tensor]
    gradients: dict[int, tuple[str, torch.Tensor | None]] | None


def _difference(expected: Outcome, found: Outcome) -> str | None:
    difference = differs(expected.outputs, found.outputs)
    if difference is not None:
        return difference
    for name, buffer in found.buffers.items():
        if name in expected.buffers and differs(expected.buffers[name], buffer) is not None:
            return f"buffer {name!r} ends with other values"
    for key, (name, gradient) in (found.gradients or {}).items():
        _, right = (expected.gradients or {}).get(key, (name, None))
        if (right is None) != (gradient is None):
            return f"parameter {name!r} gets {'a' if right is None else 'no'} gradient"
        if right is not None and gradient is not None and differs(right, gradient) is not None:
            return f"parameter {name!r} gets another gradient"
    return None


def run(side: Side, variant: Variant, gradients: bool | None = None) -> Outcome:
    """Run a copy, with random numbers that depend on the place alone.

    Args:
        side: What to run.
        variant: The mode and the inputs.
        gradients: Whether to run backward; by default in train mode, where the model can.
    """
    if gradients is None:
        try:
            return run(side, variant, gradients=variant.training)
        except RuntimeError:
            if not variant.training:
                raise
            return run(side, variant, gradients=False)  # a model that is not made for a backward
    module = structural_copy(side.module, own_buffers=True, user_hooks=side.user_hooks)
    module.train(variant.training)
    with kept_random_state(), torch.set_grad_enabled(gradients), _seeded(module):
        _seed(0)
        outputs = side.call(module, variant.inputs.fresh())
        found = _gradients(module, outputs) if gradients else None
    return Outcome(outputs, dict(module.named_buffers(remove_duplicate=False)), found)


def untrainable(model: nn.Module, inputs: Inputs, training: bool) -> str | None:
    """Why a forward with gradients on, or the backward, raises; `None` where neither does.

    A graph that holds for the example's batch size alone is no reason.

    Copies are run, whose hooks that are plain functions are left out; no `.grad` is written. A forward and a backward.
    """
    if is_meta(model) or any(tensor.is_meta for tensor in inputs.tensors):
        return None
    batch = inputs.with_batch(max(inputs.batch, 2))
    module = structural_copy(model, own_buffers=True, user_hooks=False).train(training)
    with kept_random_state(), torch.enable_grad():
        try:
            outputs = batch.fresh().call(module)
        except GuardError:
            return None
        except UNKNOWABLE as error:
            return str(error)
        try:
            _gradients(module, outputs)
        except RuntimeError as error:
            return str(error)
    return None


def _gradients(module: nn.Module, outputs: Any) -> dict[int, tuple[str, torch.Tensor | None]]:
    """The gradients of one number that depends on all of the outputs; nothing is added to any `.grad`.

    By the identity of the parameter, which both sides share; a shared one may go by another name on each.
    """
    results = [value for value in flatten(outputs).values() if isinstance(value, torch.Tensor) and value.requires_grad]
    # A hook on a parameter is the user's, and would run.
    parameters = {
        name: held for name, held in module.named_parameters() if held.requires_grad and not held._backward_hooks
    }
    if not results or not parameters:
        return {id(source_of(held)): (name, None) for name, held in parameters.items()}
    weights = [torch.arange(value.numel(), device=value.device).cos().reshape(value.shape) for value in results]
    total = torch.stack([(value * weight).sum().abs() for value, weight in zip(results, weights, strict=True)]).sum()
    found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return {
        id(source_of(held)): (name, gradient.to_dense() if gradient is not None and gradient.is_sparse else gradient)
        for (name, held), gradient in zip(parameters.items(), found, strict=True)
    }


@contextmanager
def _seeded(module: nn.Module) -> Iterator[None]:
    """Seed by path before every module call: what a branch draws does not depend on which other branches ran."""
    counts: dict[str, int] = {}

    def hook(path: str) -> Callable[..., None]:
        def seed(_module: nn.Module, _args: Any) -> None:
            counts[path] = counts.get(path, 0) + 1
            _seed(zlib.crc32(f"{path}#{counts[path]}".encode()))

        return seed

    handles = [child.register_forward_pre_hook(hook(path), prepend=True) for path, child in module.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _seed(number: int) -> None:
    """`torch.manual_seed` without its bookkeeping, which formats the call stack each time."""
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        for generator in torch.cuda.default_generators:
            generator.manual_seed(number)


def differs(expected: Any, found: Any) -> str | None:
    """In words, how two outputs differ; `None` where they agree."""
    left, right = flatten(expected), flatten(found)
    if list(left) != list(right):
        return f"outputs {sorted(right)} instead of {sorted(left)}"
    for name, one in left.items():
        other = right[name]
        if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
            if type(one) is not type(other) or one != other:
                return f"output {name} is {other!r} instead of {one!r}"
        elif one.is_nested or other.is_nested:
            if one.is_nested != other.is_nested or differs(list(one.unbind()), list(other.unbind())):
                return f"output {name}, a nested tensor, differs"
        elif one.shape != other.shape or one.dtype != other.dtype:
            return f"output {name} is {other.dtype}{list(other.shape)} instead of {one.dtype}{list(one.shape)}"
        elif not _close(one, other):
            return f"output {name} differs by {_distance(one, other):.3g} (largest value {_largest(one):.3g})"
    return None


def _close(one: torch.Tensor, other: torch.Tensor) -> bool:
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    tolerance = _TOLERANCE if one.dtype in (torch.float32, torch.float64) else 0.02
    return bool(
        torch.allclose(
            one.double(), other.double(), rtol=0.0, atol=tolerance * max(_largest(one), 1e-6), equal_nan=True
        )
    )


def _largest(tensor: torch.Tensor) -> float:
    finite = tensor.detach().double().nan_to_num(0.0, 0.0, 0.0)
    return float(finite.abs().max()) if finite.numel() else 0.0


def _distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return _largest(one.double() - other.double())


def flatten(value: Any, name: str = "output") -> dict[str, Any]:
    """The tensors (and other leaves) of a forward's result, by name: tuples, dicts and dataclasses are looked into."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        items = list(zip(value._fields, value, strict=True))
    elif isinstance(value, (tuple, list)):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        items = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif _is_holder(value):
        if name.count(".") > _DEEPEST:
            return {}
        items = list(vars(value).items())
    else:
        return {name: value}
    found: dict[str, Any] = {}
    for key, item in items:
        found |= flatten(item, f"{name}.{key}")
    return found


_DEEPEST = 10  # objects may refer to each other in a circle


def _is_holder(value: Any) -> bool:
    """Whether a value is an object that may hold tensors (a cache of keys and values), and does not compare itself."""
    comparable = getattr(type(value), "__eq__", None) is not getattr(object, "__eq__", None)
    return hasattr(value, "__dict__") and not callable(value) and not comparable


def _resized(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.dim() != 4 or not tensor.is_floating_point():
        return tensor
    height, width = tensor.shape[2] + _SIZE_STEP, tensor.shape[3] + _SIZE_STEP
    return nn.functional.interpolate(tensor.float(), size=(height, width)).to(tensor.dtype)


def _mismatch(variant: Variant, difference: str) -> Mismatch:
    error = Mismatch(f"it does not compute what the original does in {variant.name}: {difference}")
    error.variant = variant
    return error


def first_difference(reference: nn.Module, candidate: nn.Module, variant: Variant, suspects: set[str]) -> str:
    """The suspect (a module path) that is the first to return something else, all that it called being right."""
    expected = dict(_watched(reference, variant))
    stack: list[str] = []
    try:
        found = _watched(candidate, variant)
    except _Unfinished as error:
        found, stack = error.exits, error.stack
    for path, digest in found:
        if differs(expected.get(path), digest) is not None:
            return _nearest_suspect(path[0], suspects)
    return _nearest_suspect(stack[-1] if stack else "", suspects)


class _Unfinished(Exception):
    """A forward that raised: the calls that had returned, and those that had not."""

    def __init__(self, exits: list[tuple[tuple[str, int], Any]], stack: list[str]) -> None:
        super().__init__()
        self.exits = exits
        self.stack = stack


def _nearest_suspect(path: str, suspects: set[str]) -> str:
    while path and path not in suspects:
        path = path.rpartition(".")[0]
    return path


def _watched(module: nn.Module, variant: Variant) -> list[tuple[tuple[str, int], Any]]:
    """A digest of each module call's outputs in the order of return."""
    twin = structural_copy(module, own_buffers=True, user_hooks=False)
    twin.train(variant.training)
    exits: list[tuple[tuple[str, int], Any]] = []
    counts: dict[str, int] = {}
    stack: list[str] = []

    def enter(path: str) -> Callable[..., None]:
        return lambda _module, _args: stack.append(path)

    def leave(path: str) -> Callable[..., None]:
        def note(_module: nn.Module, _args: Any, output: Any) -> None:
            stack.pop()
            counts[path] = counts.get(path, 0) + 1
            exits.append(((path, counts[path]), {name: _digest(value) for name, value in flatten(output).items()}))

        return note

    for path, child in twin.named_modules():
        child.register_forward_pre_hook(enter(path))
        child.register_forward_hook(leave(path))
    with kept_random_state(), torch.no_grad(), _seeded(twin):
        _seed(0)
        try:
            variant.inputs.fresh().call(twin)
        except Exception as error:
            raise _Unfinished(exits, stack) from error
    return exits


def _digest(value: Any) -> Any:
    if not isinstance(value, torch.Tensor) or not value.numel():
        return str(value)
    number = value.double() if not value.is_complex() else value.abs().double()
    return torch.stack([number.sum(), number.abs().sum(), number.square().sum()])
