"""`Budget`: the limits that a smaller model has to stay within."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torchtrim.errors import EditError


@dataclass(frozen=True)
class Budget:
    """Limits of a model: as much as each of them, or less.

    Attributes:
        macs: Multiply-accumulates of one forward at batch 1, in eval mode; up to 1 a share of the original's.
        params: Parameters, shared ones once; up to 1 a share of the original's.
        size_mb: Parameters and buffers, in MB of a million bytes, as `tt.summary` counts them.
        latency_ms: The median time of one forward of the ONNX file in ONNX Runtime on this machine, in milliseconds.

    Raises:
        EditError: No limit at all, or one that is not a number above zero.

    Example:
        >>> print(Budget(macs=0.5, params=2_000_000))
        macs=0.5, params=2000000
    """

    macs: float | None = None
    params: float | None = None
    size_mb: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = self.to_dict()
        for name, limit in given.items():
            if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit < math.inf:
                raise EditError("a limit is a number above zero", path=f"budget.{name}", found=limit)
        if not given:
            raise EditError(
                "a budget without a limit", path="budget", expected=" or ".join(each.name for each in fields(self))
            )

    @property
    def computed(self) -> dict[str, float]:
        """The limits that shapes alone tell: all but the latency."""
        return {name: limit for name, limit in self.to_dict().items() if name != "latency_ms"}

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


_SHARES = ("macs", "params")


def _plain(limit: float) -> str:
    return str(int(limit)) if limit > 1 and float(limit).is_integer() else f"{limit:.6g}"
