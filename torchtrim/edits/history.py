"""The edit log: what was done to a model, as small frozen records that travel with it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

from torch import nn

from torchtrim.bench.table import Table
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import known_inputs, spec_of
from torchtrim.graph.inputs import Inputs

_ATTRIBUTE = "_torchtrim_history"
_INPUTS = "_torchtrim_inputs"


@dataclass(frozen=True)
class Edit:
    """One change to a model, complete: what was asked and what was decided from the model.

    Attributes:
        kind: The name of the edit, in records and recipes.
        version: The version of the record's form.
    """

    kind: ClassVar[str] = "edit"
    version: ClassVar[int] = 1

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        values = {item.name: _plain(getattr(self, item.name)) for item in fields(self)}
        return {"kind": self.kind, "version": self.version, **values}

    def __str__(self) -> str:
        given = (f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default)
        return f"{self.kind}({', '.join(given)})"


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class Applied:
    """An edit that was done.

    Attributes:
        edit: The record.
        params_before: How many parameters the model had.
        params_after: How many it has since.
        notes: What the user should know of it.
        checked: What was compared with the original, in words.
    """

    edit: Edit
    params_before: int
    params_after: int
    notes: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "edit": self.edit.to_dict(),
            "params_before": self.params_before,
            "params_after": self.params_after,
            "notes": list(self.notes),
            "checked": list(self.checked),
        }


@dataclass(frozen=True)
class History:
    """All edits of a model, oldest first.

    Attributes:
        origin: The class of the model that the first edit was done on, as `module:name`.
        inputs: The shapes of the example inputs, as plain data; `None` for a model that was never edited.
        entries: The edits.
    """

    origin: str
    inputs: dict[str, Any] | None = None
    entries: tuple[Applied, ...] = field(default=())

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The records alone."""
        return tuple(entry.edit for entry in self.entries)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {"origin": self.origin, "inputs": self.inputs, "entries": [entry.to_dict() for entry in self.entries]}

    def _table(self) -> Table:
        rows = tuple(
            (str(entry.edit), f"{entry.params_before:,} -> {entry.params_after:,}", "; ".join(entry.checked))
            for entry in self.entries
        )
        notes = [note for entry in self.entries for note in entry.notes]
        return Table(f"History of {self.origin}", ("edit", "parameters", "checked"), rows, notes, left=3)

    def __str__(self) -> str:
        return self._table().text() if self.entries else f"{self.origin}: no edits"

    def _repr_html_(self) -> str:
        return self._table().html()


def history(model: nn.Module) -> History:
    """What was done to a model; without entries for one that was not edited.

    Example:
        >>> print(history(nn.Linear(2, 2)))
        torch.nn.modules.linear:Linear: no edits
    """
    model = unwrap(model)
    found = model.__dict__.get(_ATTRIBUTE)
    if isinstance(found, History):
        return found
    return History(f"{type(model).__module__}:{type(model).__qualname__}")


def recorded_inputs(model: nn.Module) -> Inputs | None:
    """Example inputs of the shapes that a model's history knows; `None` where it knows none."""
    return known_inputs(unwrap(model))


def record(before: nn.Module, after: nn.Module, inputs: Inputs, applied: Applied) -> None:
    """Write an edit into the history of the model that came out of it."""
    past = history(before)
    shapes = spec_of(inputs)
    after.__dict__[_ATTRIBUTE] = replace(past, inputs=shapes, entries=(*past.entries, applied))
    after.__dict__[_INPUTS] = shapes


def count_params(model: nn.Module) -> int:
    """How many parameters a model has, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
