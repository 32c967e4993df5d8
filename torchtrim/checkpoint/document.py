"""The text in a file's header: everything about the model that is not a tensor, as checked JSON."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from torchtrim import __version__
from torchtrim.checkpoint.container import parsed
from torchtrim.edits.history import History
from torchtrim.edits.weights import Weights
from torchtrim.errors import CheckpointDamaged, CheckpointTooNew, EditError, EditTooNew


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class FactoryPart(_Part):
    """What makes the model: a name, and arguments in the form of `plain`."""

    name: str
    arguments: Any


class WeightsPart(_Part):
    """Tensors of an edit: the place in the history that they belong to, and their names there.

    They are the file's tensors `edits.NUMBER.NAME`.
    """

    at: list[str | int]
    names: list[str]


class OptimizerPart(_Part):
    """An optimizer: its class, its groups (with the parameters' names), its state by parameter; see `optimizer`."""

    type: str
    groups: list[Any]
    state: dict[str, Any]


class Document(_Part):
    """Everything about a model that is not a tensor.

    Attributes:
        torchtrim: The version of torchtrim that wrote it.
        versions: The versions of torch, and of the package that the factory is in.
        factory: What makes the model as it was before the edits; `None` where that is not known.
        history: As `History.to_dict`, without tensors.
        weights: Where in the history the tensors belong.
        parameters: Which tensors of the model are parameters.
        tied: Further names of one tensor.
        shared: Names of parameters and buffers in the memory of another.
        strides: Of tensors that do not lie row by row.
        flags: Parameters without a gradient, and buffers with.
        training: Training flags by path, each for all below it that is not named.
        settings: Plain attributes that the factory does not set so (without a factory: all), by path, in the form of
            `plain`.
        held: Modules that stay in eval mode through `.train()`, by path.
        kinds: Without a factory: classes and forwards by path, see `kinds`.
        follow: Entries of the history whose records lack bits that the model's tensors say too, see `follow`.
        loose: Tensors that are plain attributes: the file's tensors `loose.NAME`.
        optimizer: An optimizer's state; `None` without one.
    """

    torchtrim: str
    versions: dict[str, str]
    factory: FactoryPart | None
    history: dict[str, Any]
    weights: list[WeightsPart]
    parameters: list[str]
    tied: dict[str, str]
    shared: dict[str, str]
    strides: dict[str, list[int]]
    flags: list[str]
    training: dict[str, bool]
    settings: dict[str, dict[str, Any]]
    loose: list[str]
    optimizer: OptimizerPart | None
    held: list[str] = []
    kinds: dict[str, str] = {}
    follow: list[int] = []

    def text(self) -> str:
        """As JSON; without `follow` where nothing does, as format 1 has it."""
        plain = self.model_dump(exclude=None if self.follow else {"follow"})
        return json.dumps(plain, ensure_ascii=False, separators=(",", ":"))

    @staticmethod
    def of(path: Path, text: str) -> Document:
        """The document in a file's text.

        Raises:
            CheckpointDamaged: It is none; says where.
            CheckpointTooNew: A later version wrote it, with what this one does not know.
        """
        try:
            data = parsed(text)
            return Document.model_validate(data)
        except ValidationError as error:
            refuse_later(path, data.get("torchtrim") if isinstance(data, dict) else None)
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            message = f"its description is not one that torchtrim writes: {where}: {first['msg']}"
            raise CheckpointDamaged(message, path=path, found=str(first["input"])[:60]) from error
        except ValueError as error:
            raise CheckpointDamaged(f"its description is not JSON: {error}", path=path) from error


def weights_in(past: History) -> list[tuple[list[str | int], Weights]]:
    """Every set of tensors in a history's records, with the place where `History.to_dict` has it."""
    return [
        (["entries", number, "edit", *at], weights)
        for number, edit in enumerate(past.edits)
        for at, weights in _weights(edit, [])
    ]


def _weights(value: Any, at: list[str | int]) -> Iterator[tuple[list[str | int], Weights]]:
    inner: Iterator[tuple[str | int, Any]]
    if isinstance(value, Weights):
        yield at, value
        return
    if is_dataclass(value) and not isinstance(value, type):
        inner = ((item.name, getattr(value, item.name)) for item in fields(value) if item.compare)
    elif isinstance(value, Mapping):
        inner = ((str(key), item) for key, item in value.items())
    elif isinstance(value, (tuple, list)):
        inner = iter(enumerate(value))
    else:
        return
    for key, item in inner:
        yield from _weights(item, [*at, key])


def refuse_later(path: Path, wrote: Any, error: Exception | None = None) -> None:
    """Say so, where what cannot be read is of a later version.

    Args:
        path: The file.
        wrote: The version of torchtrim that wrote it.
        error: What cannot be read.

    Raises:
        CheckpointTooNew: It is of a later version.
    """
    if isinstance(error, EditTooNew) or _numbers(wrote) > _numbers(__version__):
        raise CheckpointTooNew(
            "written by a later version",
            path=path,
            found=str(wrote)[:20],
            expected=__version__,
            hint="a newer torchtrim",
        ) from error


def _numbers(version: Any) -> list[int]:
    """The numbers of a version, up to the first part that is none: `[1, 2]` of `1.2.dev3`."""
    found = re.match(r"\d{1,9}(\.\d{1,9})*", version, re.ASCII) if isinstance(version, str) else None
    return [int(part) for part in found[0].split(".")] if found else []


def history_with(path: Path, document: Document, weights: list[tuple[list[str | int], Weights]]) -> History:
    """The history in a document, its tensors back in their places.

    Raises:
        CheckpointDamaged: A record is wrong, or a place is not there.
        CheckpointTooNew: A record is of a later version.
    """
    data = document.history
    for at, held in weights:
        inner: Any = data
        try:
            for key in at[:-1]:
                inner = inner[key]
            if inner[at[-1]] is not None:
                raise KeyError(at[-1])
            inner[at[-1]] = held
        except (LookupError, TypeError) as error:
            where = ".".join(map(str, at))
            raise CheckpointDamaged("tensors of an edit have no place in its record", path=path, found=where) from error
    try:
        return History.from_dict(data)
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        raise CheckpointDamaged(f"its history cannot be read: {error!r}", path=path) from error
    except EditError as error:
        refuse_later(path, document.torchtrim, error)
        message = f"its history cannot be read: {error.path}: {error.message}"
        raise CheckpointDamaged(
            message, path=path, found=error.found, expected=error.expected, hint=error.hint
        ) from error
