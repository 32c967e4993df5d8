"""Means over the rows of an epoch, over all processes."""

from __future__ import annotations

from typing import Any

import torch


class Meter:
    """Sums of what was measured on each batch, kept where it was measured, so that a GPU need not wait.

    Args:
        accelerator: accelerate's, to add up what other processes measured; `None` for this one alone.

    Example:
        >>> meter = Meter()
        >>> meter.add("loss", torch.tensor(1.0), rows=3)
        >>> meter.add("loss", torch.tensor(5.0), rows=1)
        >>> meter.means(), meter.rows
        ({'loss': 2.0}, 4)
    """

    def __init__(self, accelerator: Any = None) -> None:
        self._accelerator = accelerator
        self._sums: dict[str, torch.Tensor] = {}
        self._all: dict[str, float] | None = None
        self.rows = 0

    def add(self, name: str, mean: torch.Tensor | float, rows: int) -> None:
        """Count the mean of a batch; `rows` may be 0 where they are another process's."""
        value = torch.as_tensor(mean).detach().reshape(()).to(torch.float64 if _has_double(mean) else torch.float32)
        # A row that does not count may be anything, NaN too.
        pair = torch.stack([value * rows if rows else torch.zeros_like(value), torch.full_like(value, rows)])
        self._sums[name] = pair if name not in self._sums else self._sums[name] + pair
        if name == "loss":
            self.rows += rows

    def now(self, name: str) -> float:
        """The mean so far in this process; NaN before anything was counted."""
        if name not in self._sums:
            return float("nan")
        total, rows = self._sums[name].tolist()
        return float(total / rows) if rows else float("nan")

    def means(self) -> dict[str, float]:
        """The means over all processes, the same in each; all of them have to ask."""
        if self._all is None:
            if self._accelerator is not None and self._accelerator.num_processes > 1:
                for name in self._sums:
                    here = self._sums[name].to(self._accelerator.device)  # a metric may be a plain number
                    self._sums[name] = self._accelerator.reduce(here, reduction="sum")
            self._all = {name: self.now(name) for name in self._sums}
            self.rows = int(self._sums["loss"][1].item()) if "loss" in self._sums else 0
        return self._all


def _has_double(value: torch.Tensor | float) -> bool:
    return not isinstance(value, torch.Tensor) or value.device.type != "mps"
