"""What a model loses without a unit of channels when the layers that read it are solved again without it.

A channel that others can stand in for may go, however large its weights are. For a layer with the weights `W` that
reads values of the covariance `C`, and whose output's errors `e` cost `e' G e`, a unit with the columns `J` costs
`tr(W_J' G W_J / inv(C)_JJ)` once the other columns are solved for it: the rule of optimal brain surgeon (Hassibi and
Stork 1992), for structures as in ZipLM (Kurtic et al. 2023). `G` is the mean square of gradients (Gauss-Newton; as one
factor of K-FAC, Martens and Grosse 2015), so that costs of all layers are of one kind: the squared error of the model's
outputs, relative to their variance. No labels play a part.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.channels import cost
from torchtrim.channels.groups import Dependencies, Group, Member
from torchtrim.channels.labels import varying
from torchtrim.channels.select import FloatArray
from torchtrim.channels.units import IntArray
from torchtrim.errors import InputError
from torchtrim.graph.batches import answer_to
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.execution import no_fused_attention
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.gradients import arguments_in, runnable_copy, watched

_ROUNDS = 64  # in which the units of a group are taken out, the cheapest first
_ROWS = 32768  # of what a layer reads in one batch: of more places some are taken
_LEAST = 1e-2  # how much larger variances are taken than measured, so that less is made of correlations
_TINY = 1e-6  # the variance of what does not vary, in units of the mean one
_LARGEST = 8192  # channels that a layer reads; what is kept of it grows with their square


def reconstruction(model: nn.Module, dependencies: Dependencies, data: Iterable[Any], inputs: Inputs) -> FloatArray:
    """How much the model's outputs lose with each unit, its readers solved again, for each MAC that it saves.

    The units of a group are taken out one after the other, the cheapest first: a score is what the unit cost when its
    turn came, or one before it, if that is more. Convolutions are looked at as if each place of their kernel read other
    values. Of little data (fewer places than channels) little is concluded: the covariance is drawn to one without
    correlations by the share of channels in places.

    The model runs in eval mode, forward and backward once for each batch. Memory: for each layer that reads a group two
    square matrices as wide as its channels.

    Returns:
        `(units,)`; higher = keep. NaN where no linear layer or convolution reads a group that was seen in the data.

    Raises:
        InputError: The data holds nothing, or does not fit the model.
    """
    readings = {group.name: _readings(model, dependencies, group) for group in dependencies.groups}
    by_path: dict[str, _Reading] = {}
    for several in readings.values():
        by_path |= {reading.path: reading for reading in several}
    _observe(model, by_path, data, inputs)
    found = np.full(dependencies.count, np.nan)
    for group in dependencies.groups:
        seen = [by_path[reading.path] for reading in readings[group.name] if by_path[reading.path].places]
        if seen:
            found[group.units] = _costs(group, [_Reader.of(each) for each in seen]) / _saved(dependencies, group)
    return found


@dataclass(eq=False)
class _Reading:
    """A layer that reads units: the unit of each of its input channels, and sums over what flows in and back.

    Attributes:
        path: Its path, or that of the weight.
        module: The layer; `None` where a function multiplies with the weight.
        weight: Its weight.
        groups: In how many groups the channels are read.
        units: For each channel of its input the number of its unit, or -1.
        places: How many rows were summed up.
        samples: How many inputs gave gradients.
        first: The sum of what it reads, `(in,)`.
        second: That of its products, `(in, in)`.
        back: That of the products of gradients, `(out, out)`.
    """

    path: str
    module: nn.Module | None
    weight: torch.Tensor
    groups: int
    units: IntArray
    places: int = 0
    samples: int = 0
    first: torch.Tensor | None = None
    second: torch.Tensor | None = None
    back: torch.Tensor | None = None

    def read(self, x: torch.Tensor) -> None:
        """Add what it is given."""
        rows = _rows(x.detach(), self.module).float()
        rows = rows[:: max(1, len(rows) // _ROWS)]
        first, second = rows.sum(0).double(), (rows.T @ rows).double()
        self.first = first if self.first is None else self.first + first
        self.second = second if self.second is None else self.second + second
        self.places += len(rows)

    def blamed(self, gradient: torch.Tensor, samples: int) -> None:
        """Add the gradient of its output, for so many inputs."""
        rows = _rows(gradient.detach(), self.module).float()
        back = (rows.T @ rows).double()
        self.back = back if self.back is None else self.back + back
        self.samples += samples


def _rows(value: torch.Tensor, module: nn.Module | None) -> torch.Tensor:
    """One row of channels for each place."""
    return value.movedim(1 if isinstance(module, _CONVS) else -1, -1).flatten(0, -2)


def _readings(model: nn.Module, dependencies: Dependencies, group: Group) -> list[_Reading]:
    found: dict[str, _Reading] = {}
    for member in (each for each in group.members if each.role == "reads"):
        path, _, name = member.path.rpartition(".")
        module = model.get_submodule(path)
        called = path in dependencies.flow.runs[0].calls
        layer = module if called and name == "weight" and isinstance(module, _LAYERS) else None
        weight = module._parameters.get(name)
        if weight is None or (layer is None and weight.dim() != 2):
            continue
        groups = int(getattr(layer, "groups", 1))
        units = _of_channels(member, weight, groups)
        if units is not None and units.size <= _LARGEST:
            key = path if layer is not None else member.path
            found.setdefault(key, _Reading(key, layer, weight, groups, units))
    return list(found.values())


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVS)


def _of_channels(member: Member, weight: torch.Tensor, groups: int) -> IntArray | None:
    """The unit of each channel that comes in; `None` where the weight is read in another way."""
    layer = member.units
    axes = varying(layer)
    if groups == 1 and axes == {1}:
        return layer.reshape(-1)
    if groups > 1 and axes <= {0, 1} and layer.shape[1] == weight.shape[1]:
        table = np.broadcast_to(layer.reshape(layer.shape[:2]), weight.shape[:2])
        return table.reshape(groups, -1, table.shape[1])[:, 0].reshape(-1)
    return None


def _observe(model: nn.Module, readings: Mapping[str, _Reading], data: Iterable[Any], inputs: Inputs) -> None:
    """Run the model over the data, forward and backward."""
    twin = _frozen(runnable_copy(model)).eval()
    starts: list[torch.Tensor] = []
    size = 1

    def watch(reading: _Reading) -> Any:
        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
            reading.read(args[0])
            if not output.requires_grad:  # it does not depend on inputs that have gradients
                starts.append(output.detach().requires_grad_())
                output = starts[-1].clone()  # what follows in place may not write to a leaf
            output.register_hook(lambda gradient: reading.blamed(gradient, size))
            return output

        return hook

    def with_gradient(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        starts.append(tensor.requires_grad_())
        return tensor.clone()

    for path, module in twin.named_modules():
        if path in readings:
            module.register_forward_hook(watch(readings[path]))
    products = _Products({_storage(each.weight): each for each in readings.values() if each.module is None})
    generator = torch.Generator().manual_seed(0)
    empty = True
    with kept_random_state(), no_fused_attention(), torch.inference_mode(mode=False), torch.enable_grad(), products:
        for number, batch in enumerate(watched(data, "gradients")):
            empty = False
            starts.clear()
            given = arguments_in(batch, number, model, inputs).fresh()
            size = products.size = given.batch
            products.back = False
            output = answer_to(given.map(with_gradient), twin, number)
            projected = _projected(output, generator)
            products.back = True
            if projected is not None and starts:
                torch.autograd.grad(projected, starts, allow_unused=True)
    if empty:
        raise InputError("the data gave no batches", path="data", hint="a list or a DataLoader; an iterator is used up")


class _Products(TorchDispatchMode):
    """Sees what is multiplied with a weight by a function (attention), and the gradients that come back through it."""

    def __init__(self, wanted: Mapping[int, _Reading]) -> None:
        TorchDispatchMode.__init__(self)
        self.wanted = wanted
        self.back = False
        self.size = 1

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        place = {"aten::mm": 1, "aten::addmm": 2}.get(func._schema.name)
        reading = None if place is None or not self.wanted else self.wanted.get(_storage(args[place]))
        if reading is not None and place is not None:
            value, width = args[place - 1], reading.weight.shape[0 if self.back else 1]
            if value.shape[-1] == width and self.back:
                reading.blamed(value, self.size)
            elif value.shape[-1] == width:
                reading.read(value)
        return func(*args, **(kwargs or {}))


def _storage(tensor: torch.Tensor) -> int:
    """What a weight and its views share."""
    return tensor.untyped_storage().data_ptr()


def _frozen(twin: nn.Module) -> nn.Module:
    """The modules with parameters that share their values and want no gradients."""
    plain = (held for held in twin.parameters() if type(held) is nn.Parameter)
    return copy.deepcopy(twin, {id(held): nn.Parameter(held.detach(), requires_grad=False) for held in plain})


def _projected(output: Any, generator: torch.Generator) -> torch.Tensor | None:
    """A random sum of the outputs: the products of its gradients are, in the mean, those of all outputs' gradients."""
    parts = []
    for value in pytree.tree_leaves(output):
        if isinstance(value, torch.Tensor) and value.requires_grad and value.numel() > 1:
            signs = torch.randint(0, 2, value.shape, generator=generator).to(value.device, value.dtype) * 2 - 1
            each = max(value.numel() // max(value.shape[0], 1), 1)
            parts.append((signs * value).sum() / (value.detach().std() * each**0.5 + 1e-12))
    return torch.stack(parts).sum() if parts else None


@dataclass(eq=False)
class _Reader:
    """A layer as it is solved again and again.

    Attributes:
        units: The unit of each column that is left.
        inverse: The inverse of the covariance of what is read.
        size: `W' G W`: what the columns are worth.
    """

    units: torch.Tensor
    inverse: torch.Tensor
    size: torch.Tensor

    @staticmethod
    def of(reading: _Reading) -> _Reader:
        if reading.first is None or reading.second is None:
            raise InputError("no values were seen", path=reading.path)
        for seen in (reading.first, reading.second, reading.back):
            if seen is not None and not bool(torch.isfinite(seen).all()):
                raise InputError(
                    "on this data the values here are not finite", path=reading.path, hint="data without NaN"
                )
        held = reading.weight.detach().double()
        weight = held.flatten(2) if held.dim() > 2 else held.unsqueeze(2)  # (out, in / groups, places of the kernel)
        groups = reading.groups
        mean = reading.first / reading.places
        covariance = reading.second / reading.places - torch.outer(mean, mean)
        count = len(mean)
        drawn = _LEAST + count / groups / reading.places
        out = weight.shape[0]
        back = torch.eye(out, dtype=torch.double, device=weight.device)
        if reading.back is not None and reading.samples:
            back = reading.back / reading.samples
        size = torch.zeros(count, count, dtype=torch.double, device=weight.device)
        within = torch.zeros_like(size, dtype=torch.bool)
        for number in range(groups):
            rows = slice(number * out // groups, (number + 1) * out // groups)
            columns = slice(number * count // groups, (number + 1) * count // groups)
            part = weight[rows]
            size[columns, columns] = torch.einsum("oit,op,pjt->ij", part, back[rows, rows], part)
            within[columns, columns] = True
        variance = covariance.diagonal().clamp_min(0)
        tiny = _TINY * variance.mean().clamp_min(1e-30)
        inverse = torch.linalg.inv(torch.where(within, covariance, 0.0) + torch.diag(drawn * variance + tiny))
        return _Reader(torch.as_tensor(reading.units), inverse, size)

    def costs(self, units: int) -> torch.Tensor:
        """What each unit would cost now, `(units,)`; correlations within a unit count where all are as wide."""
        found = torch.zeros(units, dtype=torch.double)
        columns = torch.nonzero(self.units >= 0).flatten()
        owners = self.units[columns]
        order = torch.argsort(owners, stable=True)
        present, counts = torch.unique(owners, return_counts=True)
        if not len(present):
            return found
        if int(counts.max()) == int(counts.min()) > 1:
            blocks = columns[order].reshape(len(present), -1)
            inverse = self.inverse[blocks[:, :, None], blocks[:, None, :]]
            size = self.size[blocks[:, :, None], blocks[:, None, :]]
            each = torch.linalg.solve(inverse, size).diagonal(dim1=-2, dim2=-1).sum(-1)
            return found.index_add(0, present, each.cpu())
        each = self.size.diagonal()[columns] / self.inverse.diagonal()[columns]
        return found.index_add(0, owners, each.cpu())

    def without(self, units: torch.Tensor) -> None:
        """Solve for the rest."""
        goes = torch.isin(self.units, units)
        if not bool(goes.any()):
            return
        stays = ~goes
        gone = self.inverse[goes]
        change = torch.linalg.solve(gone[:, goes], gone)
        weighed = self.size[:, goes] @ change
        size = self.size - weighed - weighed.T + change.T @ self.size[goes][:, goes] @ change
        inverse = self.inverse - self.inverse[:, goes] @ change
        self.size, self.inverse, self.units = size[stays][:, stays], inverse[stays][:, stays], self.units[stays]


def _costs(group: Group, readers: list[_Reader]) -> FloatArray:
    """What each unit costs when its turn comes."""
    place = {int(unit): index for index, unit in enumerate(group.units)}
    for reader in readers:
        reader.units = torch.tensor([place.get(int(unit), -1) for unit in reader.units])
    count = len(group.units)
    found = np.zeros(count)
    left = torch.arange(count)
    highest = 0.0
    while len(left):
        costs = torch.stack([reader.costs(count) for reader in readers]).sum(0)[left]
        at_once = max(1, count // _ROUNDS)
        values, chosen = costs.clamp_min(0).topk(min(at_once, len(left)), largest=False)
        for value, index in zip(values.tolist(), left[chosen].tolist(), strict=True):
            highest = max(highest, value)
            found[index] = highest
        for reader in readers:
            reader.without(left[chosen])
        stays = torch.ones(len(left), dtype=torch.bool)
        stays[chosen] = False
        left = left[stays]
    return found


def _saved(dependencies: Dependencies, group: Group) -> float:
    """MACs that one unit saves, on average."""
    some = np.zeros(dependencies.count, dtype=bool)
    whole = cost.macs(dependencies.flow, dependencies.gone(some))
    some[group.units[1:]] = True
    saved = whole - cost.macs(dependencies.flow, dependencies.gone(some))
    return max(saved / max(len(group.units) - 1, 1), 1.0)
