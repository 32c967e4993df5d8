"""Which layers of a narrower model read fewer channels, what flows through them, and what it is added to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from torchtrim.edits.norms import affine, behind, is_norm
from torchtrim.edits.reconstruct_fit import Patches
from torchtrim.graph.inputs import Inputs

_LARGEST = 6144  # inputs of one output; the sums grow with their square
_ADDS = ("add", "add_", "__add__", "__radd__", "__iadd__")


@dataclass(frozen=True)
class Reader:
    """A layer that reads fewer channels than it did.

    Attributes:
        path: Its path.
        stays: The rows of the original's layer that are left; `None` where all are.
        dim: The dimension of its output that the channels are in.
        bias: What takes its bias: its own path, that of the batch norm behind it, or `None`.
        norm: The batch norm behind it.
        residual: Whether the result (normed, where there is a norm) is added to another value of its shape.
        calls: How often it is called in a forward.
        scale: What the norm multiplies each channel by.
    """

    path: str
    stays: torch.Tensor | None
    dim: int
    bias: str | None = None
    norm: str | None = None
    residual: bool = False
    calls: int = 1
    scale: torch.Tensor | None = None

    def kept(self, value: torch.Tensor) -> torch.Tensor:
        """What is left of the original's output."""
        if self.stays is None:
            return value
        return value.index_select(self.dim % value.dim(), self.stays.to(value.device))

    def unscaled(self, value: torch.Tensor) -> torch.Tensor:
        """A difference behind the norm as one before it; where the norm multiplies by nothing, there is none."""
        if self.scale is None:
            return value
        inverse = torch.where(self.scale.abs() > 1e-3 * self.scale.abs().max(), 1 / self.scale, 0.0)
        shape = [1] * value.dim()
        shape[self.dim % value.dim()] = -1
        return value * inverse.to(value.dtype).reshape(shape)


def readers(
    net: nn.Module, narrowed: Mapping[str, Mapping[str, Sequence[int]]], piece: Inputs
) -> tuple[list[Reader], list[str]]:
    """The layers to be solved again, in the order of execution, and the paths of those that cannot be.

    Args:
        net: The narrower model, in eval mode.
        narrowed: What each tensor lost, by its full name.
        piece: Inputs to run it on.
    """
    named = dict(net.named_modules())
    asked = [
        name.rpartition(".")[0]
        for name, removed in narrowed.items()
        if name.endswith("weight") and {"1", "0,1"} & removed.keys()
    ]
    plain = [path for path in asked if path in named and _solvable(net, named[path])]
    first = [Reader(path, _stays(narrowed[f"{path}.weight"], named[path]), _dim(named[path])) for path in plain]
    found: list[Reader] = []
    with seen(net, first, whole=True) as run:
        run.run(piece)
        for path in run.calls:
            reader = next(each for each in first if each.path == path)
            if all(Patches.of(named[path]).gives(*call) for call in run.calls[path]):
                found.append(_placed(reader, named, run))
    done = {reader.path for reader in found}
    return found, sorted({path for path in asked if path not in done and path in named})


def _solvable(net: nn.Module, module: nn.Module) -> bool:
    if not isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)) or "weight" not in module._parameters:
        return False
    shared = sum(held is module.weight for each in net.modules() for held in each._parameters.values())
    return shared == 1 and module.weight[0].numel() <= _LARGEST and module.weight.is_floating_point()


def _stays(removed: Mapping[str, Sequence[int]], module: Any) -> torch.Tensor | None:
    gone = set(removed.get("0", ()))
    total = module.weight.shape[0] + len(gone)
    return torch.tensor([row for row in range(total) if row not in gone]) if gone else None


def _dim(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _placed(reader: Reader, named: Mapping[str, nn.Module], run: Seen) -> Reader:
    """With what stands behind it: a norm that takes its bias, a sum."""
    module: Any = named[reader.path]
    calls, norms = len(run.calls[reader.path]), run.norms.get(reader.path, [])
    if len(norms) == calls and len(set(norms)) == 1 and run.uses[norms[0]] == calls:
        norm = named[norms[0]]
        last = isinstance(behind(norm, tuple(run.calls[reader.path][0][1].shape)), nn.Identity)
        reader = replace(reader, norm=norms[0], scale=affine(norm)[0] if last else None)
    bias = reader.path if module.bias is not None else reader.norm
    residual = len(run.others.get(reader.path, [])) == calls and (reader.norm is None or reader.scale is not None)
    return replace(reader, bias=bias, residual=residual, calls=calls)


class Seen:
    """What flowed in the run made last.

    Args:
        model: The model, which is watched from `seen` on.
        expect: How many calls of each layer there are, and whether their results are added to something: the run stops
            when all were seen. None: it goes to the end.

    Attributes:
        calls: What each layer was given and gave, for each of its calls.
        norms: For each layer the batch norms that were given what it gave.
        uses: How often each batch norm was called.
        others: What the results were added to.
    """

    def __init__(self, model: nn.Module, expect: Mapping[str, tuple[int, bool]] | None = None) -> None:
        self.model = model
        self.expect = expect
        self.calls: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.norms: dict[str, list[str]] = {}
        self.uses: dict[str, int] = {}
        self.others: dict[str, list[torch.Tensor]] = {}
        self._came_from: dict[int, tuple[torch.Tensor, str]] = {}  # the tensor too, so that no other gets its identity

    def run(self, piece: Inputs) -> None:
        """Run the model."""
        for held in (self.calls, self.norms, self.uses, self.others, self._came_from):
            held.clear()
        try:
            with _Sums(self):
                piece.fresh().call(self.model)
        except _Complete:
            pass  # all that was wanted was seen
        self._came_from.clear()

    def gave(self, path: str, given: torch.Tensor, output: torch.Tensor) -> None:
        """A layer was called."""
        self.calls.setdefault(path, []).append((given, output.detach().clone()))
        self._came_from[id(output)] = output, path
        self._stop_if_complete()

    def normed(self, norm: str, given: torch.Tensor, output: torch.Tensor) -> None:
        """A batch norm was called."""
        self.uses[norm] = self.uses.get(norm, 0) + 1
        path = self.source(given)
        if path is not None:
            self.norms.setdefault(path, []).append(norm)
            self._came_from[id(output)] = output, path

    def added(self, one: torch.Tensor, other: torch.Tensor) -> None:
        """Two values are about to be added."""
        for result, beside in ((one, other), (other, one)):
            path = self.source(result)
            if path is not None and result.shape == beside.shape and self.source(beside) is None:
                self.others.setdefault(path, []).append(beside.detach().clone())

    def source(self, value: torch.Tensor) -> str | None:
        """The layer that a value comes from, directly or through a norm."""
        found = self._came_from.get(id(value))
        return None if found is None else found[1]

    def _stop_if_complete(self) -> None:
        for path, (calls, residual) in (self.expect or {}).items():
            if len(self.calls.get(path, ())) < calls or (residual and len(self.others.get(path, ())) < calls):
                return
        if self.expect is not None:
            raise _Complete


class _Complete(BaseException):
    """All was seen. Not an `Exception`, which a forward might catch."""


class _Sums(TorchFunctionMode):
    """Sees what is added to what."""

    def __init__(self, seen: Seen) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = [each for each in args[:2] if isinstance(each, torch.Tensor)]
        added = getattr(func, "__name__", "") in _ADDS and len(operands) == 2 and "alpha" not in (kwargs or {})
        if added:
            self.seen.added(*operands)
        result = func(*args, **(kwargs or {}))
        if added:
            self.seen._stop_if_complete()
        return result


@contextmanager
def seen(model: nn.Module, watched: Sequence[Reader], *, whole: bool = False) -> Iterator[Seen]:
    """Watch some layers of a model, and the batch norms and sums behind them.

    Args:
        model: The model.
        watched: The layers.
        whole: Let runs go to their end.
    """
    found = Seen(model, None if whole else {reader.path: (reader.calls, reader.residual) for reader in watched})
    wanted = {reader.path for reader in watched}
    handles = []

    def give(path: str, norm: bool) -> tuple[Any, Any]:
        given: list[torch.Tensor] = []

        def before(_module: nn.Module, args: Any) -> None:
            # A layer's input is kept as it is, for something in place may follow; a norm's is only looked at.
            given.append(args[0] if norm else args[0].detach().clone())

        def after(_module: nn.Module, _args: Any, output: torch.Tensor) -> None:
            (found.normed if norm else found.gave)(path, given.pop(), output)

        return before, after

    for path, module in model.named_modules():
        if path in wanted or is_norm(module):
            before, after = give(path, path not in wanted)
            handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
