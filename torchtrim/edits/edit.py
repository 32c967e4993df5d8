"""The `Edit` base: one change to a model as a small frozen record, and its forms as JSON and YAML."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from torchtrim.edits.weights import Weights
from torchtrim.errors import EditError, EditTooNew, nearest

if TYPE_CHECKING:
    from torchtrim.edits.work import Work

EditT = TypeVar("EditT", bound="Edit")

_KINDS: dict[str, type[Edit]] = {}
# Where each kind is defined: imported when a record of it is read.
_HOMES = {
    "attach_head": "head", "cluster_weights": "cluster", "cut": "cut", "delete_channels": "channels",
    "fuse_batchnorm": "fuse", "insert": "insert", "prune_channels": "prune", "remove": "remove", "replace": "replace",
    "sparsify": "sparsify",
}  # fmt: skip


@dataclass(frozen=True)
class Edit:
    """One change to a model, complete: what was asked, and what was decided from the model and from data.

    A record can be written by hand, with what is asked alone; the record in a model's history holds the rest too, and
    does the same again, to the bit, on a fresh model and without data.

    Attributes:
        kind: The name of the edit, in records and recipes.
        version: The version of the record's form.
        joins: Whether it puts ends together that were apart, so that gradients have to be looked at again.
        needs_inputs: Whether it can only be done with example inputs.
    """

    kind: ClassVar[str] = "edit"
    version: ClassVar[int] = 1
    joins: ClassVar[bool] = True
    needs_inputs: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _KINDS[cls.kind] = cls

    def perform(self, work: Work) -> Edit:
        """Do it on `work.model`; returns the record with what was decided.

        Raises:
            TorchTrimError: It cannot be done. The user's model has not changed.
        """
        raise EditError("a bare Edit says nothing of what to do", found=type(self).__name__, expected=", ".join(_KINDS))

    def to_dict(self, *, weights: bool = True) -> dict[str, Any]:
        """Plain data, for JSON.

        Args:
            weights: Include tensors, as base64. A record without them needs them from elsewhere to be done again.
        """
        return {"kind": self.kind, "version": self.version, **_plain(self, weights)}

    @staticmethod
    def from_dict(data: Any) -> Edit:
        """The record that `to_dict` wrote, or one written by hand.

        Raises:
            EditError: No such kind, or a key or value that does not belong; says where.
            EditTooNew: A version from the future.

        Example:
            >>> Edit.from_dict({"kind": "cut", "after": ["layer3"]})
            Cut(after=('layer3',), names=None, single=True, clone=None)
        """
        if not isinstance(data, Mapping):
            raise EditError("an edit is an object of keys and values", found=type(data).__name__)
        values = dict(data)
        kind, version = values.pop("kind", None), values.pop("version", 1)
        edit_type = _kind(kind) if isinstance(kind, str) else None
        if edit_type is None:
            names = sorted(kinds())
            hint = nearest(str(kind), names)
            short = sorted(set(values) & set(names))
            if kind is None and short:
                kind, hint = list(values), f'{{"kind": "{short[0]}", ...}}: only recipes take the name as a key'
            raise EditError("no such kind of edit", path="kind", found=kind, expected=names, hint=hint)
        if type(version) is not int or not 1 <= version <= edit_type.version:
            newer = type(version) is int and version > edit_type.version
            raise (EditTooNew if newer else EditError)(
                f"a record of {kind!r} in a form that this version does not know",
                path="version",
                found=version,
                expected=f"1 to {edit_type.version}" if edit_type.version > 1 else "1",
                hint="a newer torchtrim" if newer else None,
            )
        return _validated(edit_type, values, kind)

    def __str__(self) -> str:
        given = (f"{f.name}={_short(getattr(self, f.name))}" for f in fields(self) if _told(self, f))
        return f"{self.kind}({', '.join(given)})"


def kinds() -> dict[str, type[Edit]]:
    """Every kind of edit, in the order of their names in records."""
    for kind in _HOMES:
        _kind(kind)
    return dict(sorted(_KINDS.items()))


def _kind(name: str) -> type[Edit] | None:
    """The kind of edit of that name; `None` where there is none."""
    if name in _HOMES and name not in _KINDS:
        importlib.import_module(f"torchtrim.edits.{_HOMES[name]}")
    return _KINDS.get(name)


def to_json(edits: Sequence[Edit], *, weights: bool = True) -> str:
    """Records as JSON text.

    Example:
        >>> from torchtrim import Cut
        >>> from_json(to_json([Cut(("layer3",))]))
        [Cut(after=('layer3',), names=None, single=True, clone=None)]
    """
    return json.dumps([edit.to_dict(weights=weights) for edit in edits], indent=2)


def to_yaml(edits: Sequence[Edit], *, weights: bool = True) -> str:
    """Records as YAML text.

    Example:
        >>> from torchtrim import Cut
        >>> print(to_yaml([Cut(("layer3",))]))
        - kind: cut
          version: 1
          after:
          - layer3
          names: null
          single: true
          clone: null
    """
    import yaml

    return str(yaml.safe_dump([edit.to_dict(weights=weights) for edit in edits], sort_keys=False)).rstrip()


def from_json(text: str) -> list[Edit]:
    """The records in a JSON text.

    Raises:
        EditError: It is not JSON, or a record is wrong; says which.
    """
    try:
        return from_list(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise EditError(f"not JSON: {error}", expected="a list of edits") from error


def from_yaml(text: str) -> list[Edit]:
    """The records in a YAML text.

    Raises:
        EditError: It is not YAML, or a record is wrong; says which.
    """
    import yaml

    try:
        return from_list(yaml.safe_load(text))
    except (yaml.YAMLError, RecursionError) as error:
        raise EditError(f"not YAML: {error}", expected="a list of edits") from error


def from_list(items: Any) -> list[Edit]:
    """The records in plain data: a list of objects, or of records.

    Raises:
        EditError: One of them is wrong; says which.
    """
    if isinstance(items, (str, bytes, Mapping)) or not isinstance(items, Sequence):
        raise EditError("edits come as a list", found=type(items).__name__, expected="a list of records")
    found: list[Edit] = []
    for index, item in enumerate(items):
        try:
            found.append(item if isinstance(item, Edit) else Edit.from_dict(item))
        except EditError as error:
            where = f"edits[{index}]" + (f".{error.path}" if error.path is not None else "")
            raise type(error)(
                error.message, path=where, found=error.found, expected=error.expected, hint=error.hint
            ) from error
    return found


def json_schema() -> dict[str, Any]:
    """A JSON Schema of a list of edits, for editors and for checking by other programs.

    Example:
        >>> [choice["properties"]["kind"]["const"] for choice in json_schema()["items"]["oneOf"]][:3]
        ['attach_head', 'cluster_weights', 'cut']
    """
    definitions: dict[str, Any] = {}
    choices = []
    for kind, edit_type in kinds().items():
        schema = _adapter(kind).json_schema(ref_template="#/$defs/{model}")
        definitions |= schema.pop("$defs", {})
        head = {"kind": {"const": kind}, "version": {"type": "integer", "minimum": 1, "maximum": edit_type.version}}
        schema["properties"] = head | schema.get("properties", {})
        schema["required"] = ["kind", *schema.get("required", [])]
        choices.append(schema)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "torchtrim edits",
        "type": "array",
        "items": {"oneOf": choices},
        "$defs": definitions,
    }


def _plain(value: Any, weights: bool) -> Any:
    if isinstance(value, Weights):
        return value.to_dict() if weights else None
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), weights) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item, weights) for item in value]
    if isinstance(value, Mapping):
        return {key: _plain(item, weights) for key, item in value.items()}
    return value


def _told(edit: Edit, field: Any) -> bool:
    if field.metadata.get("decided"):
        return False
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return bool(getattr(edit, field.name) != default)


def _short(value: Any, limit: int = 60) -> str:
    if is_dataclass(value) and not isinstance(value, type):
        text = str(value)
    elif isinstance(value, (tuple, list)) and len(value) == 1:
        text = _short(value[0])
    else:
        text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def decided(default: Any = None) -> Any:
    """A field of a record that says what was decided, not what was asked: `str` leaves it out."""
    return field(default=default, metadata={"decided": True})


@cache
def _adapter(kind: str) -> Any:
    from pydantic import ConfigDict, TypeAdapter

    edit_type: Any = _KINDS[kind]
    edit_type.__pydantic_config__ = ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return TypeAdapter(edit_type)


def _validated(edit_type: type[EditT], values: dict[str, Any], kind: str) -> EditT:
    from pydantic import ValidationError

    try:
        found: EditT = _adapter(kind).validate_python(values)
        return found
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])
        names = [f.name for f in fields(edit_type)]
        unknown = first["type"] in ("unexpected_keyword_argument", "extra_forbidden")
        raise EditError(
            f"{kind!r} has no such key" if unknown else first["msg"],
            path=f"{kind}{where}",
            found=None if unknown else first["input"],
            expected=names if unknown else None,
            hint=nearest(str(first["loc"][-1]), names) if unknown and first["loc"] else None,
        ) from error
