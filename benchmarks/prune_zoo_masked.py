"""The original with its removed channels at zero: what a pruned network has to compute, worked out from the record.

Nothing here asks torchtrim which channels read which. All that the record says was taken out of a parameter is set to
zero in the original. A channel that is zero wherever it is written and wherever it is read is not there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.graph.check import flatten

Removed = Mapping[str, Mapping[str, Any]]  # the path of a tensor: {its dimension, as text: the indices that went}

_LARGE = 150_000_000  # parameters, from which single precision has to do
_SCALES = (1.0, 1 / 16, 1 / 256)  # products of activations grow without norms, layer by layer, until they overflow
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 2e-4}  # of the largest value
aten = torch.ops.aten


def compare(model: nn.Module, net: nn.Module, removed: Removed, x: torch.Tensor) -> dict[str, Any]:
    """How far a pruned network is from the masked original, in both modes; as they are, and without their norms.

    A norm over channels sees fewer of them once some are gone, so the two cannot be equal. Then both are run with
    norms that scale and shift and do not normalise, and means that are sums: these must be equal.

    Both models are changed: the original is masked. Random layers are switched off; a mode that is random still is
    left out.
    """
    dtype = torch.float32 if sum(each.numel() for each in model.parameters()) > _LARGE else torch.float64
    _mask(model, removed)
    for each in (model, net):
        _never_random(each)
        each.to(dtype)
    found: dict[str, Any] = {"precision": str(dtype).removeprefix("torch.")}
    try:
        for training in (False, True):
            mode = "train" if training else "eval"
            model.train(training)
            net.train(training)
            inputs = x.to(dtype)
            found[mode] = _distance(model, net, inputs, dtype)
            if isinstance(found[mode], float) and found[mode] > _TOLERANCE[dtype]:
                for scale in _SCALES:
                    with NeutralNorms(scale):
                        found[f"{mode} without norms"] = _distance(model, net, inputs, dtype)
                    if found[f"{mode} without norms"] != "not finite":
                        break
    finally:
        net.float()
    told = [value for mode in ("eval", "train") if isinstance(value := found.get(mode), float)]
    plain = [value for mode in ("eval", "train") if isinstance(value := found.get(f"{mode} without norms"), float)]
    limit = _TOLERANCE[dtype]
    if told and max(told) <= limit:
        found["verdict"] = "equal"
    elif told and plain and max(plain) <= limit:
        found["verdict"] = "equal without norms"
    else:
        found["verdict"] = "differs" if told else "not compared"
    return found


def check_slices(model: nn.Module, net: nn.Module, removed: Removed) -> str | None:
    """In words, which tensor of the pruned network is not what the record says of the original's; `None`: none."""
    held = dict((*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)))
    for name, tensor in (*net.named_parameters(), *net.named_buffers()):
        if name not in held:
            return f"{name} is new"
        expected = take(held[name].detach(), removed.get(name, {}))
        if expected.shape != tensor.shape:
            return f"{name} is {list(tensor.shape)}, and by the record {list(expected.shape)}"
        if name in dict(net.named_parameters()) and not torch.equal(expected, tensor.detach()):
            return f"{name} has other values than the original's that stay"
    return None


def take(tensor: torch.Tensor, removed: Mapping[str, Any]) -> torch.Tensor:
    """A tensor without what the record says went from it."""
    table = None
    for key, gone in removed.items():
        if key == "0,1":
            table = torch.ones(tensor.shape[:2].numel(), dtype=torch.bool)
            table[list(gone)] = False
            table = table.reshape(tensor.shape[:2])
    for key, gone in removed.items():
        if key == "0,1":
            continue
        axis = int(key)
        kept = [index for index in range(tensor.shape[axis]) if index not in set(gone)]
        tensor = tensor.index_select(axis, torch.tensor(kept))
        if table is not None and axis < 2:
            table = table.index_select(axis, torch.tensor(kept))
    if table is not None:
        table = table[table.any(dim=1)]
        columns = torch.stack([row.nonzero().reshape(-1) for row in table])
        rows = torch.stack([tensor[row, of] for row, of in enumerate(columns)])
        tensor = rows
    return tensor


def _mask(model: nn.Module, removed: Removed) -> None:
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name, axes in removed.items():
        if name not in parameters:
            continue
        values = parameters[name].data
        for key, gone in axes.items():
            if key == "0,1":
                values.reshape(values.shape[:2].numel(), -1)[list(gone)] = 0
            else:
                values.index_fill_(int(key), torch.tensor(list(gone), dtype=torch.int64), 0)


def _never_random(model: nn.Module) -> None:
    for module in model.modules():
        if "drop" in type(module).__name__.lower() or "stochastic" in type(module).__name__.lower():
            for name in ("p", "drop_prob"):
                if isinstance(module.__dict__.get(name), float):
                    module.__dict__[name] = 0.0


def _distance(model: nn.Module, net: nn.Module, x: torch.Tensor, dtype: torch.dtype) -> float | str:
    """The largest difference of the outputs, as a share of the largest value; or why there is none."""
    with _kept_buffers(model), _kept_buffers(net), torch.no_grad():
        torch.manual_seed(1)
        expected = _floats(model(x.clone()))
        if model.training:
            torch.manual_seed(2)
            if any(not torch.equal(one, other) for one, other in zip(expected, _floats(model(x.clone())), strict=True)):
                return "random"
        torch.manual_seed(1)
        found = _floats(net(x.clone()))
    if [each.shape for each in expected] != [each.shape for each in found]:
        return float("inf")
    largest = max(float(each.abs().max()) for each in expected)
    if not largest < float("inf"):
        return "not finite"
    apart = max(float((one - other).abs().max()) for one, other in zip(expected, found, strict=True))
    return apart / max(largest, 1e-30) if apart == apart else float("inf")


def _floats(outputs: Any) -> list[torch.Tensor]:
    return [each for each in flatten(outputs).values() if isinstance(each, torch.Tensor) and each.is_floating_point()]


@contextmanager
def _kept_buffers(model: nn.Module) -> Iterator[None]:
    kept = {id(buffer): (buffer, buffer.clone()) for buffer in model.buffers()}
    try:
        yield
    finally:
        for buffer, values in kept.values():
            buffer.copy_(values)


class NeutralNorms(TorchDispatchMode):
    """Norms that scale and shift only, and means that are sums: what is zero adds nothing to any of them.

    Args:
        scale: What a norm multiplies with besides its own weights.
    """

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self._scale = scale

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        out = func(*args, **(kwargs or {}))
        if name == "native_layer_norm":
            return (self._scaled(args[0], args[2], args[3]), *out[1:])
        if name == "_fused_rms_norm":
            return (self._scaled(args[0], args[2], None), *out[1:])
        if name == "native_group_norm":
            return (self._scaled(args[0], *(_column(each, args[0].dim()) for each in args[1:3])), *out[1:])
        if name.endswith("batch_norm") or name.startswith("_native_batch_norm"):
            no_statistics = "no_stats" in str(func) or (len(args) > 3 and args[3] is None)
            if no_statistics:  # a weight that is standardised
                return (self._scaled(args[0], *(_column(each, args[0].dim()) for each in args[1:3])), *out[1:])
        if name == "mean" and len(args) > 1 and args[1] is not None:
            return out * (args[0].numel() / max(out.numel(), 1) / 64)
        if name in ("var_mean", "std_mean"):
            return tuple(value(each) for value, each in zip((torch.ones_like, torch.zeros_like), out, strict=True))
        if name in ("var", "std"):
            return torch.ones_like(out)
        return out

    def _scaled(self, x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
        y = x * self._scale if weight is None else x * weight * self._scale
        return y if bias is None else y + bias


def _column(vector: torch.Tensor | None, ndim: int) -> torch.Tensor | None:
    return None if vector is None else vector.reshape(1, -1, *(1,) * (ndim - 2))
