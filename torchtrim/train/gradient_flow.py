"""`GradientFlow`: how large the gradients of each layer are while a model is trained, by one line in the loop."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from torchtrim.bench.figure import figure, written
from torchtrim.bench.table import Table
from torchtrim.errors import InputError, ModelError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.paths import What, covered

_LOW = 0.01  # of the median of all layers: so much less is told


class GradientFlow:
    """Records the length of each layer's gradient, step by step.

    ```python
    flow = tt.GradientFlow(model)
    for x, y in loader:
        loss_fn(model(x), y).backward()
        flow.step()
        optimizer.step()
        optimizer.zero_grad()
    flow.plot("gradients.png")
    ```

    With a gradient scaler call it after `scaler.unscale_(optimizer)`. It puts no hooks on the model, and does not wait
    for the device before something is read.

    Args:
        model: The model that is trained.
        layers: Which modules to look at, with all in them: paths, globs, types, predicates, or a list of these. By
            default every module that has a weight of two dimensions or more of its own.
        every: Record one step in so many.
        writer: A `SummaryWriter` of TensorBoard: each layer becomes a curve `gradients/PATH`.

    Attributes:
        paths: The layers, in the order of registration.
        steps: How many steps there were.

    Raises:
        PathError: A path does not exist.
        SelectionError: Nothing fits.
        ModelError: The model has no weights to look at.
        InputError: `every` is not a number of steps.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, bias=False))
        >>> flow = GradientFlow(net)
        >>> with torch.no_grad():
        ...     _ = net[0].weight.fill_(1.0), net[1].weight.fill_(2.0)
        >>> net(torch.tensor([[3.0, 4.0]])).sum().backward()
        >>> flow.step()
        >>> flow.lengths.tolist()  # 2 * (3, 4), and 3 + 4
        [[10.0, 7.0]]
    """

    def __init__(
        self, model: nn.Module, layers: What | Iterable[What] | None = None, *, every: int = 1, writer: Any = None
    ) -> None:
        model = unwrap(model)
        if isinstance(every, bool) or not isinstance(every, int) or every < 1:
            raise InputError("one step in so many is recorded", path="every", found=every, expected="1 or more")
        wanted = None if layers is None else set(covered(model, layers))
        self._layers: dict[str, list[nn.Parameter]] = {}
        seen: set[int] = set()
        for path, module in model.named_modules():
            own = [held for held in module.parameters(recurse=False) if id(held) not in seen]
            if own and (any(held.dim() > 1 for held in own) if wanted is None else path in wanted):
                self._layers[path] = own
                seen |= {id(held) for held in own}
        if not self._layers:
            raise ModelError("it has no weights to look at", found=type(model).__name__)
        self.paths = tuple(self._layers)
        self.steps = 0
        self._every, self._writer = every, writer
        self._recorded: list[torch.Tensor] = []
        self._numbers: list[int] = []

    def step(self) -> None:
        """Record the gradients as they are now: call it after the backward pass, before they are set to zero."""
        number = self.steps
        self.steps += 1
        if number % self._every:
            return
        with torch.no_grad():
            lengths = [_length([held.grad for held in own if held.grad is not None]) for own in self._layers.values()]
            device = next((each.device for each in lengths if each.device.type != "cpu"), torch.device("cpu"))
            self._recorded.append(torch.stack([each.to(device) for each in lengths]))
        self._numbers.append(number)
        if self._writer is not None:
            for path, length in zip(self.paths, self._recorded[-1].tolist(), strict=True):
                if not np.isnan(length):
                    self._writer.add_scalar(f"gradients/{path}", length, number)

    @property
    def lengths(self) -> npt.NDArray[np.float64]:
        """The lengths, `(steps recorded, layers)`; NaN where a layer had no gradient."""
        if not self._recorded:
            return np.empty((0, len(self.paths)))
        self._recorded = [each.cpu() for each in self._recorded]
        found: npt.NDArray[np.float64] = torch.stack(self._recorded).double().numpy()
        return found

    def least(self, count: int = 1) -> list[str]:
        """The layers with the smallest gradients on average, relative to the length of their weights.

        Raises:
            InputError: There are not so many with gradients, or nothing was recorded.
        """
        means = _means(self._told()) / np.array([max(_size(own), 1e-12) for own in self._layers.values()])
        known = int(np.isfinite(means).sum())
        if not 0 <= count <= known:
            raise InputError("there are not so many layers with gradients", path="count", found=count, expected=known)
        return [self.paths[place] for place in np.argsort(means, kind="stable")[:count]]

    def table(self) -> Table:
        """A row for each layer.

        Raises:
            InputError: Nothing was recorded.
        """
        lengths = self._told()
        means = _means(lengths)
        finite = means[np.isfinite(means)]
        middle = float(np.median(finite)) if finite.size else 0.0
        rows: list[tuple[str, ...]] = []
        for place, path in enumerate(self.paths):
            own = lengths[:, place]
            own = own[~np.isnan(own)]
            if not own.size:
                rows.append((path, "", "", "", "", "never had a gradient"))
                continue
            told = "not finite" if not np.isfinite(own).all() else "low" if means[place] < _LOW * middle else ""
            numbers = (means[place], own.min(), own.max(), own[-1])
            rows.append((path, *(f"{number:.3g}" for number in numbers), told))
        notes = [f"- {len(lengths)} of {self.steps} steps; low: less than {_LOW:.0%} of the median layer's mean"]
        return Table("Length of the gradients", ("layer", "mean", "least", "most", "last", ""), tuple(rows), notes)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data that JSON can hold; `null` where a layer had no gradient."""
        values = [[value if np.isfinite(value) else None for value in row] for row in self.lengths.tolist()]
        return {"paths": list(self.paths), "steps": list(self._numbers), "lengths": values}

    def plot(self, path: str | os.PathLike[str]) -> Path:
        """Draw the lengths by depth over the steps; the file's ending says in which form (`.png`, `.svg`, `.pdf`).

        Raises:
            InputError: Nothing was recorded, or it cannot be written there.
            MissingDependency: matplotlib is not installed.
        """
        lengths = self._told()
        drawn = figure(8, 2.0 + 0.18 * len(self.paths))
        axis = drawn.subplots()
        with np.errstate(divide="ignore"):
            logs = np.log10(np.where(lengths > 0, lengths, np.nan)).T
        last = self._numbers[-1]
        image = axis.imshow(
            np.ma.masked_invalid(logs), aspect="auto", interpolation="nearest", extent=(0, last + 1, len(logs), 0)
        )
        axis.set_yticks(np.arange(len(self.paths)) + 0.5, self.paths, fontsize=7)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set(title="length of the gradient by depth (white: none)", xlabel="step")
        drawn.colorbar(image, ax=axis, label="log10")
        return written(drawn, path)

    def _told(self) -> npt.NDArray[np.float64]:
        if not self._recorded:
            raise InputError("nothing was recorded", hint="flow.step() after loss.backward(), in the training loop")
        return self.lengths

    def __str__(self) -> str:
        return self.table().text()

    def _repr_html_(self) -> str:
        return self.table().html()


def _length(gradients: list[torch.Tensor]) -> torch.Tensor:
    if not gradients:
        return torch.tensor(torch.nan)
    dense = [each.coalesce().values() if each.is_sparse else each for each in gradients]
    length: torch.Tensor = torch.stack([torch.linalg.vector_norm(each.float()) for each in dense]).norm()
    return length


def _size(own: list[nn.Parameter]) -> float:
    with torch.no_grad():
        return float(torch.stack([torch.linalg.vector_norm(held.float()) for held in own]).norm())


def _means(lengths: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The mean of each column over what is there; NaN where nothing is."""
    there = ~np.isnan(lengths)
    counts = there.sum(0)
    means: npt.NDArray[np.float64] = np.where(
        counts > 0, np.where(there, lengths, 0.0).sum(0) / np.maximum(counts, 1), np.nan
    )
    return means
