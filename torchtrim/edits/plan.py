"""`plan`: what edits would do, before they do it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from torchtrim.bench.table import Table
from torchtrim.edits.apply import Edits, performed, records_of
from torchtrim.edits.edit import Edit
from torchtrim.edits.history import count_params, record
from torchtrim.edits.module_spec import Trusted
from torchtrim.edits.work import Joint, Work
from torchtrim.graph.copying import kept_random_state, structural_copy, unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.reader import inputs_for


def plan(model: nn.Module, example_inputs: ExampleInputs | None, edits: Edits, *, trusted: Trusted = ()) -> Plan:
    """What edits would do to a model: what goes, what stays, the shapes where ends are put together, and the cost.

    The edits are tried on a copy that shares the weights; nothing is computed but shapes, so it is quick at any size.
    What an edit would fit to data is left as it is.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`.
        edits: As for `apply`.
        trusted: As for `apply`.

    Raises:
        EditError: An edit cannot be done; as for `apply`.

    Example:
        >>> import torch
        >>> from torchtrim import Cut
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> planned = plan(net, torch.zeros(1, 4), Cut(("1",)))
        >>> planned.removed, planned.params, planned.macs
        (('2',), (23, 15), (18, 12))
    """
    model = unwrap(model)
    example_inputs, records = records_of(edits, example_inputs)
    inputs = inputs_for(model, example_inputs)
    work = Work(structural_copy(model), inputs, check=False, trusted=trusted, planning=True)
    steps: list[PlannedStep] = []
    params, (macs, output) = count_params(model), _cost(model, inputs)
    first = (params, macs, output)
    with kept_random_state():
        for done in performed(work, records):
            record(done.before, work.model, inputs, done.applied)
            before = params, macs
            params, (macs, output) = count_params(work.model), _cost(work.model, inputs)
            steps.append(
                PlannedStep(
                    done.applied.edit,
                    done.applied.removed,
                    tuple(work.joints),
                    (before[0], params),
                    (before[1], macs),
                    output,
                    done.applied.notes,
                )
            )
    kept = tuple(name for name, child in work.model.named_children())
    return Plan(model._get_name(), tuple(steps), kept, (first[0], params), (first[1], macs), (first[2], output))


def _cost(model: nn.Module, inputs: Inputs) -> tuple[int, tuple[str, ...]]:
    """MACs at batch 1, and the outputs."""
    execution = run_fake(model, inputs)
    return execution.macs.get("", 0), tuple(str(value) for value in execution.calls_of("")[0].outputs)


@dataclass(frozen=True)
class PlannedStep:
    """One edit of a plan.

    Attributes:
        edit: The record, with what was decided.
        removed: The paths and addresses that would go, the outermost of each.
        joints: The places where ends are put together, with their shapes.
        params: How many parameters the model has before and after.
        macs: Multiply-accumulates of one forward at batch 1, before and after.
        outputs: The model's outputs after it.
        notes: What the user should know.
    """

    edit: Edit
    removed: tuple[str, ...]
    joints: tuple[Joint, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    outputs: tuple[str, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "edit": self.edit.to_dict(weights=False),
            "removed": list(self.removed),
            "joints": [joint.to_dict() for joint in self.joints],
            "params": list(self.params),
            "macs": list(self.macs),
            "outputs": list(self.outputs),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Plan:
    """What edits would do. `print` shows it.

    Attributes:
        model: The class of the model.
        steps: The edits, in order.
        kept: The names of the children that the model has afterwards.
        params: How many parameters it has before the first and after the last.
        macs: Multiply-accumulates of one forward at batch 1, before and after.
        outputs: The outputs, before and after.
    """

    model: str
    steps: tuple[PlannedStep, ...]
    kept: tuple[str, ...]
    params: tuple[int, int]
    macs: tuple[int, int]
    outputs: tuple[tuple[str, ...], tuple[str, ...]]

    @property
    def edits(self) -> tuple[Edit, ...]:
        """The records, with what was decided."""
        return tuple(step.edit for step in self.steps)

    @property
    def removed(self) -> tuple[str, ...]:
        """All paths and addresses that would go."""
        return tuple(dict.fromkeys(path for step in self.steps for path in step.removed))

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "model": self.model,
            "steps": [step.to_dict() for step in self.steps],
            "kept": list(self.kept),
            "params": list(self.params),
            "macs": list(self.macs),
            "outputs": [list(each) for each in self.outputs],
        }

    def _table(self) -> Table:
        rows = [
            (
                str(step.edit),
                _some(step.removed),
                _some(tuple(map(_joint, step.joints)), limit=3, between="; "),
                f"{step.params[0]:,} -> {step.params[1]:,}",
                f"{step.macs[0]:,} -> {step.macs[1]:,}",
            )
            for step in self.steps
        ]
        total = ("all", "", "", *(f"{before:,} -> {after:,}" for before, after in (self.params, self.macs)))
        notes = [note for step in self.steps for note in step.notes]
        notes.append(f"outputs: {', '.join(self.outputs[0])} -> {', '.join(self.outputs[1])}")
        notes.append(f"stays: {_some(self.kept)}")
        return Table(
            f"Plan for {self.model}", ("edit", "goes", "joints", "parameters", "MACs"), (*rows, total), notes, left=3
        )

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()


def _joint(joint: Joint) -> str:
    shapes = "" if joint.before is None else f" {joint.before}"
    shapes += "" if joint.after is None or joint.after == joint.before else f" -> {joint.after}"
    return f"{joint.address}:{shapes} {joint.how}"


def _some(names: tuple[str, ...], limit: int = 8, between: str = ", ") -> str:
    more = f"{between}and {len(names) - limit} more" if len(names) > limit else ""
    return between.join(names[:limit]) + more if names else "none"
