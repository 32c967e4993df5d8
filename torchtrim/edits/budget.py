"""`Budget`: the limits that a smaller model has to stay within."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch

from torchtrim.errors import EditError, nearest


@dataclass(frozen=True)
class Budget:
    """Limits of a model: as much as each of them, or less.

    Attributes:
        macs: Multiply-accumulates of one forward at batch 1, in eval mode; up to 1 a share of the original's.
        params: Parameters, shared ones once; up to 1 a share of the original's.
        size_mb: Parameters and buffers, in MB of a million bytes, as `tt.summary` counts them.
        latency_ms: The median time of one forward of the ONNX file in ONNX Runtime on this machine, in milliseconds.
        max_drop: How much of the score may be lost, in its own unit: 0.01 is a point of accuracy. `tt.trim` alone takes
            it, since it alone measures a score.

    Raises:
        EditError: No limit at all, or one that is not a number above zero (a drop may be zero).

    Example:
        >>> print(Budget(macs=0.5, params=2_000_000))
        macs=0.5, params=2000000
    """

    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency_ms: float | None = None
    max_drop: float | None = None

    def __post_init__(self) -> None:
        given = self.to_dict()
        for name, limit in given.items():
            plain = plain_number(limit)
            if name == "max_drop" and plain == 0:
                plain = 0.0
            elif plain is None or not 0 < plain < math.inf:
                raise EditError("a limit is a number above zero", path=f"budget.{name}", found=repr(limit))
            object.__setattr__(self, name, plain)
        if not given:
            raise EditError(
                "a budget without a limit", path="budget", expected=" or ".join(each.name for each in fields(self))
            )

    @staticmethod
    def of(given: Any) -> Budget:
        """A budget, or one by the names of its limits.

        Raises:
            EditError: It is neither.

        Example:
            >>> Budget.of({"macs": 0.5}) == Budget.of(Budget(macs=0.5))
            True
        """
        if isinstance(given, Budget):
            return given
        names = [each.name for each in fields(Budget)]
        if not isinstance(given, Mapping):
            raise EditError(
                "not a budget", path="budget", found=repr(given), expected="a Budget", hint="tt.Budget(macs=0.5)"
            )
        for name in given:
            if name not in names:
                raise EditError(
                    "no such limit",
                    path=f"budget.{name}",
                    expected=", ".join(names),
                    hint=nearest(name, names) if isinstance(name, str) else None,
                )
        return Budget(**given)

    @property
    def computed(self) -> dict[str, float]:
        """The limits that shapes alone tell: all but the latency and the drop of the score."""
        return {name: limit for name, limit in self.to_dict().items() if name not in ("latency_ms", "max_drop")}

    def limits(self, original: Mapping[str, float]) -> dict[str, float]:
        """The computed limits as absolute numbers.

        Args:
            original: What the original has of each.

        Example:
            >>> Budget(macs=0.5, params=900).limits({"macs": 400, "params": 1000})
            {'macs': 200.0, 'params': 900}
        """
        return {
            name: limit * original[name] if name in _SHARES and limit <= 1 else limit
            for name, limit in self.computed.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The limits that are set, as plain data."""
        return {each.name: value for each in fields(self) if (value := getattr(self, each.name)) is not None}

    def __str__(self) -> str:
        return ", ".join(f"{name}={_plain(limit)}" for name, limit in self.to_dict().items())


def plain_number(given: object) -> int | float | None:
    """A number of Python, numpy or torch as one of Python, which a record can hold; `None` if it is none.

    Example:
        >>> plain_number(torch.tensor(0.5)), plain_number(np.int64(3)), plain_number("3"), plain_number(True)
        (0.5, 3, None, None)
    """
    if isinstance(given, (np.generic, np.ndarray, torch.Tensor)) and given.ndim == 0:
        given = given.item()
    return given if isinstance(given, (int, float)) and not isinstance(given, bool) else None


_SHARES = ("macs", "params")


def _plain(limit: float) -> str:
    return str(int(limit)) if limit > 1 and float(limit).is_integer() else f"{limit:.6g}"
