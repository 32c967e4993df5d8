"""Where a training stands after an epoch, as a file: enough to go on from to the same bits."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from torchtrim.checkpoint.atomic import replacing
from torchtrim.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch, CheckpointTooNew

FORMAT = 1
FILE = "state.pt"
_PARTS = {"settings", "model", "optimizer", "schedule", "scaler", "ema", "pruner", "distiller", "generators"} | {
    "epochs", "best", "since", "rows",
}  # fmt: skip


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Replace the state in a folder, in one step.

    Raises:
        CheckpointError: It cannot be written; the old one is still there.
    """
    with replacing(folder / FILE) as file:
        try:
            torch.save(_plain({"format": FORMAT, **state}), file)
        except (RuntimeError, pickle.PicklingError) as error:
            # torch turns what the disk says into an error of its own, and hides it behind that.
            raise CheckpointError(f"cannot be written: {error.__context__ or error}", path=folder / FILE) from error


def refuse_closed(parts: Mapping[str, Any]) -> None:
    """Said before a training, not after its end: what could not be read again.

    Args:
        parts: What will be in a state, by what it is the state of.

    Raises:
        CheckpointError: One holds objects that a file cannot give back (only plain data is read, never code).
    """
    for name, part in parts.items():
        buffer = io.BytesIO()
        try:
            torch.save(_plain(part), buffer)
            buffer.seek(0)
            torch.load(buffer, weights_only=True)
        except (pickle.PicklingError, pickle.UnpicklingError, AttributeError, TypeError, RuntimeError) as error:
            raise CheckpointError(
                "its state holds more than numbers, texts and tensors, and could not be read again",
                path=name,
                hint="folder=None, or a state_dict() of plain data",
            ) from error


def _plain(state: Any) -> Any:
    """NumPy's numbers as Python's, which are all that is read again."""
    return pytree.tree_map_only(np.generic, lambda number: number.item(), state)


def read_state(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """The state in a folder, checked to be one of this training.

    Args:
        folder: Where it is.
        settings: What decides the training, by name.
        tensors: The names and shapes of the model's parameters and buffers.

    Raises:
        CheckpointDamaged: The file is cut short, altered, or no such state.
        CheckpointTooNew: It is in a later form.
        CheckpointMismatch: It is of another training; says what differs.
    """
    place = folder / FILE
    try:
        file = place.open("rb")
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}", path=place) from error
    with file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, pickle.UnpicklingError, EOFError, ValueError, KeyError) as error:
            raise CheckpointDamaged(
                "the state of a training, cut short or altered", path=place, hint="resume=False, in another folder"
            ) from error
    if not isinstance(state, dict) or not isinstance(state.get("format"), int):
        raise CheckpointDamaged("not the state of a training", path=place, found=type(state).__name__)
    if state["format"] > FORMAT:
        raise CheckpointTooNew("a state in a later form", path=place, found=state["format"], expected=FORMAT)
    if missing := _PARTS - state.keys():
        raise CheckpointDamaged(
            "not the state of a training: parts of it are missing", path=place, found=sorted(missing)
        )
    before = state["settings"]
    for name in {**before, **settings}:
        if before.get(name) != settings.get(name):
            raise CheckpointMismatch(
                "the training in this folder was another one",
                path=f"{place}: {name}",
                found=before.get(name),
                expected=settings.get(name),
                hint="the settings that it was begun with, or another folder",
            )
    shapes = {name: tuple(held.shape) for name, held in state["model"].items()}
    for name in {**shapes, **tensors}:
        if shapes.get(name) != tensors.get(name):
            raise CheckpointMismatch(
                "the training in this folder was that of another model",
                path=f"{place}: {name}",
                found=shapes.get(name, "nothing"),
                expected=tensors.get(name, "nothing"),
            )
    return state


def named_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by its first name, those that a `state_dict` leaves out included."""
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@torch.no_grad()
def copied(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies of their values."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@torch.no_grad()
def put_back(tensors: Mapping[str, torch.Tensor], values: Mapping[str, torch.Tensor]) -> None:
    """Write values into tensors that stay the same objects."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


def generators_of(sources: Iterable[Any]) -> list[torch.Generator]:
    """The random generators that data loaders were given by their makers, which go on from epoch to epoch."""
    found: dict[int, torch.Generator] = {}
    for source in sources:
        if isinstance(source, DataLoader):
            parts = (source, source.sampler, source.batch_sampler, getattr(source.batch_sampler, "sampler", None))
            for generator in (getattr(part, "generator", None) for part in parts):
                if isinstance(generator, torch.Generator):
                    found[id(generator)] = generator
    return list(found.values())
