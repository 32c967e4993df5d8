"""What a step of distillation gives, and what it is made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from torchtrim.bench.table import Table


@dataclass(frozen=True, eq=False)
class Distilled:
    """The loss of a batch, and its parts.

    Attributes:
        loss: The sum of the parts times their weights: call `.backward()` on it.
        output: The student's output, as the loss takes it: logits, or values.
        parts: Each part's loss by name, not weighted; tensors with gradients, so `.item()` or `.detach()` them for a
            log.
        weights: What each part was multiplied by. Without targets there is no `"hard"`.

    Example:
        >>> result = Distilled(torch.tensor(0.75), torch.zeros(2, 3), {"soft": torch.tensor(1.5)}, {"soft": 0.5})
        >>> print(result)
        loss 0.7500
        part     loss   weight    share
        ───────────────────────────────
        soft   1.5000   0.5000   0.7500
    """

    loss: torch.Tensor
    output: torch.Tensor
    parts: dict[str, torch.Tensor]
    weights: dict[str, float | torch.Tensor]

    def to_dict(self) -> dict[str, Any]:
        """The loss, the parts and the weights as numbers."""
        parts = {name: float(part.detach()) for name, part in self.parts.items()}
        return {
            "loss": float(self.loss.detach()),
            "parts": parts,
            "weights": {name: float(weight) for name, weight in self.weights.items()},
        }

    def _table(self) -> Table:
        found = self.to_dict()
        rows = tuple(
            (name, f"{loss:.4f}", f"{found['weights'][name]:.4f}", f"{loss * found['weights'][name]:.4f}")
            for name, loss in found["parts"].items()
        )
        return Table(f"loss {found['loss']:.4f}", ("part", "loss", "weight", "share"), rows)

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()


def _flatten(result: Distilled) -> tuple[list[Any], None]:
    return [result.loss, result.output, result.parts, result.weights], None


def _unflatten(values: Any, _: None) -> Distilled:
    return Distilled(*values)


# So that DistributedDataParallel finds the tensors in it where it looks for unused parameters.
pytree.register_pytree_node(Distilled, _flatten, _unflatten, serialized_type_name="torchtrim.train.distilled.Distilled")


@dataclass(frozen=True)
class Term:
    """One part of the loss.

    Attributes:
        name: Its name.
        kind: What it is.
        weight: Its weight.
        student: Where in the student, with the shape there; empty for the outputs.
        teacher: Where in the teacher.
        projection: The layer between the two widths; empty where there is none.
    """

    name: str
    kind: str
    weight: float
    student: str = ""
    teacher: str = ""
    projection: str = ""


@dataclass(frozen=True)
class Terms:
    """The parts of a distillation's loss.

    Attributes:
        terms: The parts.
        notes: What else there is to know.
    """

    terms: tuple[Term, ...]
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"terms": [vars(term).copy() for term in self.terms], "notes": list(self.notes)}

    def _table(self) -> Table:
        rows = tuple(
            (term.name, term.kind, term.student, term.teacher, term.projection, f"{term.weight:g}")
            for term in self.terms
        )
        columns = ("loss", "kind", "student", "teacher", "projection", "weight")
        return Table("Distillation", columns, rows, self.notes, left=5)

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()
