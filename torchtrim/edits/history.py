"""The edit log: what was done to a model, as small frozen records that travel with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from torchtrim.bench.table import Table
from torchtrim.edits.edit import Edit, to_json, to_yaml
from torchtrim.errors import EditError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import known_inputs, spec_of
from torchtrim.graph.inputs import Inputs

_ATTRIBUTE = "_torchtrim_history"
_INPUTS = "_torchtrim_inputs"
_CONFIG = "_torchtrim_config"
_FACTORY = "_torchtrim_factory"  # how the model was made, where that is known: goes with it through its edits


@dataclass(frozen=True)
class Applied:
    """An edit that was done.

    Attributes:
        edit: The record.
        params_before: How many parameters the model had.
        params_after: How many it has since.
        notes: What the user should know of it.
        checked: What was compared with the original, in words.
        removed: The paths and addresses that are gone since, the outermost of each.
    """

    edit: Edit
    params_before: int
    params_after: int
    notes: tuple[str, ...] = ()
    checked: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()

    def to_dict(self, *, weights: bool = True) -> dict[str, Any]:
        """Plain data, for JSON; `weights` as for `Edit.to_dict`."""
        return {
            "edit": self.edit.to_dict(weights=weights),
            "params_before": self.params_before,
            "params_after": self.params_after,
            "notes": list(self.notes),
            "checked": list(self.checked),
            "removed": list(self.removed),
        }

    @staticmethod
    def from_dict(data: Any) -> Applied:
        """The entry that `to_dict` wrote.

        Raises:
            EditError: It is not such data.
        """
        try:
            texts = {name: tuple(map(str, data[name])) for name in ("notes", "checked", "removed")}
            before, after = (int(data[name]) for name in ("params_before", "params_after"))
            return Applied(Edit.from_dict(data["edit"]), before, after, **texts)
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"not an entry of a history: {error!r}", found=type(data).__name__) from error


@dataclass(frozen=True)
class History:
    """All edits of a model, oldest first.

    Attributes:
        origin: The class of the model that the first edit was done on, as `module:name`.
        inputs: The shapes of the example inputs, as plain data; `None` for a model that was never edited, or only in
            ways that need none.
        entries: The edits.
    """

    origin: str
    inputs: dict[str, Any] | None = None
    entries: tuple[Applied, ...] = field(default=())

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The records alone."""
        return tuple(entry.edit for entry in self.entries)

    def to_dict(self, *, weights: bool = True) -> dict[str, Any]:
        """Plain data, for JSON; `weights` as for `Edit.to_dict`."""
        entries = [entry.to_dict(weights=weights) for entry in self.entries]
        return {"origin": self.origin, "inputs": self.inputs, "entries": entries}

    @staticmethod
    def from_dict(data: Any) -> History:
        """The history that `to_dict` wrote.

        Raises:
            EditError: It is not such data; says which entry.
        """
        if not isinstance(data, Mapping) or not isinstance(data.get("entries"), list):
            raise EditError("not a history", found=type(data).__name__, expected="origin, inputs and entries")
        inputs = data.get("inputs")
        if inputs is not None and not isinstance(inputs, Mapping):
            raise EditError("not the shapes of inputs", path="inputs", found=type(inputs).__name__)
        entries = []
        for index, item in enumerate(data["entries"]):
            try:
                entries.append(Applied.from_dict(item))
            except EditError as error:
                where = f"entries[{index}].{error.path or 'edit'}"
                raise type(error)(
                    error.message, path=where, found=error.found, expected=error.expected, hint=error.hint
                ) from error
        return History(str(data.get("origin")), None if inputs is None else dict(inputs), tuple(entries))

    def to_json(self, *, weights: bool = True) -> str:
        """The whole history as JSON text."""
        return json.dumps(self.to_dict(weights=weights), indent=2)

    def edits_as(self, form: str, *, weights: bool = True) -> str:
        """The records alone as text in `"json"` or `"yaml"`, for `apply` on a fresh model.

        Raises:
            EditError: Another form.
        """
        if form not in ("json", "yaml"):
            raise EditError("no such form", found=form, expected="json or yaml")
        return (to_json if form == "json" else to_yaml)(self.edits, weights=weights)

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
    """Write an edit into the history of the model that came out of it; inputs without tensors are none."""
    past = history(before)
    shapes = spec_of(inputs) if inputs.tensors else past.inputs
    after.__dict__[_ATTRIBUTE] = replace(past, inputs=shapes, entries=(*past.entries, applied))
    after.__dict__[_INPUTS] = shapes
    if _FACTORY in before.__dict__:
        after.__dict__[_FACTORY] = before.__dict__[_FACTORY]
    # What a model says of its own making, which an opened one has no attributes for.
    said = {name: before.__dict__[name] for name in ("pretrained_cfg", "num_classes") if name in before.__dict__}
    config = before.__dict__.get(_CONFIG) or said
    if config:
        after.__dict__[_CONFIG] = config


def count_params(model: nn.Module) -> int:
    """How many parameters a model has, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
