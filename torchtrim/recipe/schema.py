"""The JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from torchtrim.recipe.edit_forms import edits_schema
from torchtrim.recipe.form import RecipeForm


def recipe_schema() -> dict[str, Any]:
    """What a recipe may hold, as a JSON Schema (2020-12), with the short ways to write a section.

    Example:
        >>> sorted(recipe_schema()["properties"])
        ['data', 'edits', 'export', 'head', 'input', 'model', 'out', 'recipe', 'training']
    """
    schema = RecipeForm.model_json_schema()
    edits = edits_schema()
    definitions: dict[str, Any] = {**schema.pop("$defs", {}), **edits.pop("$defs")}
    properties: dict[str, Any] = schema["properties"]
    properties["edits"] = edits
    properties["head"] = _head(edits)
    properties["input"] = _input(properties["input"])
    properties["model"] = _or_text(properties["model"], "The model's name.")
    file = "A .npz, .npy or .pt file, or a folder of pictures."
    properties["data"] = _or_text(properties["data"], file)
    training: dict[str, Any] = definitions["TrainingSection"]["properties"]
    for name in ("data", "validation"):
        training[name] = _or_text(training[name], file)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "torchtrim recipe",
        "$defs": definitions,
    }


def _head(edits: dict[str, Any]) -> dict[str, Any]:
    """The arguments of the edit that attaches a head."""
    forms: list[dict[str, Any]] = edits["items"]["anyOf"]
    short = next(form for form in forms if "attach_head" in form.get("properties", {}))
    return {**short["properties"]["attach_head"], "description": "A new head, after all edits."}


def _input(section: dict[str, Any]) -> dict[str, Any]:
    shape = {"type": "array", "items": {"type": "integer", "minimum": 0}}
    tensor = {"anyOf": [{"$ref": "#/$defs/TensorSection"}, shape]}
    several = [{"type": "array", "items": tensor}, {"type": "object", "additionalProperties": tensor}]
    return {"description": section.get("description"), "anyOf": [tensor, *several, {"type": "null"}]}


def _or_text(section: dict[str, Any], meaning: str) -> dict[str, Any]:
    about = {key: value for key, value in section.items() if key in ("description", "default")}
    rest = {key: value for key, value in section.items() if key not in about}
    return {**about, "anyOf": [{"type": "string", "description": meaning}, *rest.pop("anyOf", [rest])]}
