"""Edits as people write them in a recipe: `cut: {after: layer3}`; and the records that they mean."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping
from typing import Any, Union, get_args, get_origin, get_type_hints

from torchtrim.edits.edit import Edit, json_schema, kinds
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.module_types import name_of
from torchtrim.edits.remove_adapters import EVERY
from torchtrim.edits.weights import Weights
from torchtrim.errors import EditError, TorchTrimError, nearest
from torchtrim.recipe.module_text import names_a_type, read_module, read_type

# Where the functions' arguments have other names than the records' fields.
_ALIASES = {"attach_head": {"head": "heads"}, "replace": {"new": "module"}}


def edits_of(items: Any, where: str = "edits") -> list[Edit]:
    """The records that a list of edits means.

    An edit is `{kind: {argument: value}}`, the name of one that needs no arguments, or a whole record
    `{"kind": ..., "version": ..., ...}` as `Edit.to_dict` writes it. One path may stand for a list of them, and a
    module may be written as text (`nn.Dropout(0.2)`, see `read_module`).

    Args:
        items: The list.
        where: What it is called in messages.

    Raises:
        EditError: One of them is wrong: says where, and what was meant.

    Example:
        >>> edits_of([{"cut": {"after": "layer3"}}, {"attach_head": {"num_classes": 10}}])[0].after
        ('layer3',)
        >>> edits_of([{"cut": {"aftr": "layer3"}}])
        Traceback (most recent call last):
        torchtrim.errors.EditError: edits[0].cut.aftr: 'cut' has no such key (expected: ...). Try: one of these names: \
'after'
    """
    if not isinstance(items, (list, tuple)):
        raise EditError("edits come as a list", path=where, found=type(items).__name__, expected="- cut: {...}")
    return [edit_of(item, f"{where}[{index}]") for index, item in enumerate(items)]


def edit_of(item: Any, where: str) -> Edit:
    """The record that one edit means.

    Raises:
        EditError: It is wrong; says where.
    """
    if isinstance(item, Edit):
        return item
    record = _as_record(item, where)
    try:
        edit_type = kinds().get(str(record.get("kind")))
        if edit_type is None:
            raise EditError(
                "no such kind of edit",
                path=record.get("kind"),
                expected=", ".join(sorted(kinds())),
                hint=nearest(str(record.get("kind")), kinds()),
            )
        return Edit.from_dict(_loosened(record, edit_type))
    except TorchTrimError as error:
        place = where if error.path is None else f"{where}.{error.path}".lstrip(".")
        raise EditError(
            error.message, path=place or None, found=error.found, expected=error.expected, hint=error.hint
        ) from error


def short_form(edit: Edit) -> dict[str, Any]:
    """A record as `Edit.to_dict` gives it, less what is empty and would be read so without.

    Example:
        >>> from torchtrim import Cut
        >>> short_form(Cut(("layer3",)))
        {'kind': 'cut', 'version': 1, 'after': ['layer3'], 'single': True}
    """
    whole = edit.to_dict()
    return {"kind": whole["kind"], "version": whole["version"], **_short(edit, whole)}


def _short(value: Any, plain: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        held = {field.name: field for field in dataclasses.fields(value) if field.name in plain}
        return {
            name: _short(getattr(value, name), plain[name])
            for name, field in held.items()
            if plain[name] not in (None, [], {}) or getattr(value, name) != _default(field)
        }
    if isinstance(value, Mapping) and not isinstance(value, Weights):
        return {key: _short(item, plain[key]) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_short(item, each) for item, each in zip(value, plain, strict=True)]
    return plain


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def edits_schema() -> dict[str, Any]:
    """A JSON Schema of a recipe's `edits`, and the definitions that it refers to under `$defs`."""
    schema = json_schema()
    records: list[dict[str, Any]] = schema["items"]["oneOf"]
    short = [_short_schema(record) for record in records]
    names = {"enum": sorted(record["properties"]["kind"]["const"] for record in records)}
    return {
        "type": "array",
        "description": "What is done to the model, in this order.",
        "items": {"anyOf": [*short, *records, names]},
        "$defs": schema.get("$defs", {}),
    }


def _as_record(item: Any, where: str) -> dict[str, Any]:
    if isinstance(item, str):
        return {"kind": item}
    if not isinstance(item, Mapping):
        raise EditError("an edit is its name and its arguments", path=where, found=repr(item), expected="cut: {...}")
    if "kind" in item:
        return dict(item)
    if len(item) != 1:
        raise EditError(
            "each edit is an item of its own", path=where, found=list(item), hint="a dash before each of them"
        )
    ((kind, values),) = item.items()
    if values is None:
        values = {}
    if not isinstance(values, Mapping):
        first = next((field.name for field in dataclasses.fields(kinds()[kind])), "key") if kind in kinds() else "key"
        raise EditError(
            "arguments are given by name",
            path=f"{where}.{kind}",
            found=repr(values),
            expected="{key: value}",
            hint=f"{kind}: {{{first}: {values}}}",
        )
    return {**values, "kind": kind}


def _loosened(record: dict[str, Any], edit_type: type[Edit]) -> dict[str, Any]:
    """The record with what people may leave out put in: brackets, and modules made of their text."""
    kind = str(record["kind"])
    record = {_ALIASES.get(kind, {}).get(name, name): value for name, value in record.items()}
    if kind == "cut" and isinstance(record.get("after"), Mapping):
        record |= {"after": list(record["after"]), "names": list(record["after"].values())}
    adapter = record.get("adapter")
    if kind == "remove" and (isinstance(adapter, Mapping) or "(" in str(adapter)):
        record |= {"adapter": "auto", "adapters": adapter if isinstance(adapter, Mapping) else {EVERY: adapter}}
    if kind == "replace":
        given = record.pop("what", [])
        places = given if isinstance(given, (list, tuple)) else [given]
        types_ = [place for place in places if isinstance(place, str) and names_a_type(place)]
        record["types"] = [*record.get("types", []), *(name_of(read_type(name)) for name in types_)]
        record["what"] = [place for place in places if place not in types_]
    hints = get_type_hints(edit_type)
    for field in dataclasses.fields(edit_type):
        if field.name in record:
            record[field.name] = _fitted(record[field.name], hints[field.name], f"{kind}.{field.name}")
    return record


def _fitted(value: Any, annotation: Any, where: str) -> Any:
    """A value in the form its field has."""
    choices = _choices(annotation)
    origins = {get_origin(choice) or choice for choice in choices}
    if isinstance(value, str) and ModuleSpec in choices:
        return _module(value, where)
    for choice in choices:
        if get_origin(choice) is dict and ModuleSpec in _choices(get_args(choice)[1]):
            named = value if isinstance(value, Mapping) and "type" not in value else {"": value}
            return {name: _fitted(each, ModuleSpec, where) for name, each in named.items()}
        if get_origin(choice) is tuple and ModuleSpec in _choices(get_args(choice)[0]):
            return [_fitted(each, ModuleSpec, where) for each in (value if isinstance(value, list) else [value])]
    if tuple in origins and isinstance(value, (str, int, float)) and type(value) not in origins:
        return [value]
    return value


def _module(text: str, where: str) -> ModuleSpec:
    try:
        return ModuleSpec.of(read_module(text))
    except EditError as error:
        message = f"{error.path}: {error.message}"
        raise EditError(message, path=where, found=error.found, expected=error.expected, hint=error.hint) from error


def _choices(annotation: Any) -> list[Any]:
    if get_origin(annotation) in (Union, types.UnionType):
        return [choice for arg in get_args(annotation) for choice in _choices(arg)]
    return [annotation]


def _short_schema(record: dict[str, Any]) -> dict[str, Any]:
    """The schema of `kind: {arguments}`, from that of the whole record."""
    kind = record["properties"]["kind"]["const"]
    arguments = {
        name: _loose_schema(value) for name, value in record["properties"].items() if name not in ("kind", "version")
    }
    arguments |= {alias: arguments[name] for alias, name in _ALIASES.get(kind, {}).items()}
    if kind == "cut":
        by_name = {"type": "object", "additionalProperties": {"type": "string"}}
        arguments["after"] = {"anyOf": [arguments["after"], by_name]}
    inner = {"type": ["object", "null"], "properties": arguments, "additionalProperties": False}
    if "description" in record:
        inner["description"] = record["description"].partition("\n")[0]
    return {"type": "object", "properties": {kind: inner}, "required": [kind], "additionalProperties": False}


def _loose_schema(value: dict[str, Any]) -> dict[str, Any]:
    forms = [value, *value.get("anyOf", [])]
    loose: list[dict[str, Any]] = []
    for form in forms:
        if form.get("type") == "array" and isinstance(form.get("items"), dict):
            loose.append(form["items"])
        if "ModuleSpec" in str(form):
            loose.append({"type": "string", "description": "A module as it is written in Python: nn.Dropout(0.2)"})
    return {"anyOf": [value, *loose]} if loose else value
