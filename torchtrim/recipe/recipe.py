"""`Recipe`: a model, its edits, training and export, read from one file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch
import yaml

from torchtrim.edits.edit import Edit
from torchtrim.edits.module_spec import Trusted
from torchtrim.edits.plan import Plan
from torchtrim.edits.prune import PruneChannels
from torchtrim.edits.remove import Remove
from torchtrim.errors import RecipeError, TorchTrimError
from torchtrim.graph.copying import kept_random_state
from torchtrim.recipe.edit_forms import edit_of, edits_of
from torchtrim.recipe.folder import run_into, to_yaml
from torchtrim.recipe.form import RecipeForm, checked
from torchtrim.recipe.run import NEED_DATA, RecipeRun, plan_recipe
from torchtrim.recipe.schema import recipe_schema

_PLACE = "a key of the recipe, edits[0] for an item of a list"
# The sections that may be written as one value, and the key it stands for.
_SHORT = {"model": "name", "data": "file"}


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `Recipe.load` reads one, `run` does it.

    Attributes:
        form: Its sections.
        folder: Where the relative paths in it start: the folder of its file.
        name: The name of its file without the ending; `None` for one that was not read from a file.
    """

    form: RecipeForm
    folder: Path = Path()
    name: str | None = None

    @staticmethod
    def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe from a YAML or JSON file, and check it.

        Args:
            path: The file.
            overrides: What to change in it: `"model.pretrained=true"`, `"edits[0].cut.after=layer2"`. The value is
                read as YAML.

        Raises:
            RecipeError: The file cannot be read, or a key or a value in it does not belong; says where, and what was
                meant.
            EditError: The same for an edit.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"the recipe cannot be read: {error}", path=path) from error
        data = parse(text, str(path))
        return Recipe.from_dict(data, overrides, folder=path.parent, name=path.stem)

    @staticmethod
    def from_dict(
        data: Mapping[str, Any], overrides: Sequence[str] = (), *, folder: str | Path = ".", name: str | None = None
    ) -> Recipe:
        """Check a recipe given as plain data.

        Args:
            data: Its sections.
            overrides: As for `load`.
            folder: Where relative paths start.
            name: The name of the folder that a run writes, unless it is told another.

        Raises:
            RecipeError: As for `load`.
            EditError: As for `load`.

        Example:
            >>> recipe = Recipe.from_dict({"model": "timm:test_resnet", "edits": [{"cut": {"after": "layer2"}}]})
            >>> recipe.edits
            [Cut(after=('layer2',), names=None, single=True, clone=None)]
        """
        for text in overrides:
            data = _overridden(data, text)
        recipe = Recipe(checked(data, name), Path(folder), name)
        _ = recipe.edits  # wrong ones are told now, before any work
        return recipe

    @property
    def edits(self) -> list[Edit]:
        """The records of its edits, the head's last. Modules written as text are made anew at each call."""
        with kept_random_state():
            torch.manual_seed(self.form.model.seed)
            found = edits_of(self.form.edits)
            if self.form.head is not None:
                found.append(_head(self.form.head))
        return found

    @overload
    def run(
        self,
        out: str | Path | None = None,
        plan: Literal[False] = False,
        *,
        overwrite: bool = False,
        trusted: Trusted = (),
    ) -> RecipeRun: ...

    @overload
    def run(
        self, out: str | Path | None = None, *, plan: Literal[True], overwrite: bool = False, trusted: Trusted = ()
    ) -> Plan: ...

    def run(
        self, out: str | Path | None = None, plan: bool = False, *, overwrite: bool = False, trusted: Trusted = ()
    ) -> RecipeRun | Plan:
        """Do the recipe, and write a folder: the `.trim` file, the ONNX file, the report, and a recipe that repeats it.

        The folder is made whole beside its place and then moved there; a run that fails leaves nothing.

        Args:
            out: The folder; else the recipe's `out`, which starts at its own folder; else one of its name in the
                current directory.
            plan: Only say what the edits would do, and write nothing.
            overwrite: Replace a folder that an earlier run wrote.
            trusted: Names `package.module:function` that may be imported to build the model, and classes of modules
                that edits may build; see `apply`.

        Returns:
            What was done; with `plan`, what would be.

        Raises:
            RecipeError: The folder exists, or the recipe names code that is not trusted.
            TorchTrimError: What its steps raise.
        """
        if plan:
            return plan_recipe(self.form, self.folder, lambda: self.edits, trusted)
        self._check_data()
        place = out or (self.folder / self.form.out if self.form.out else self.name)
        if place is None:
            raise RecipeError("where does the run write to?", path="out", hint="run(out=FOLDER), or out: in the recipe")
        return run_into(Path(place), self.form, self.folder, lambda: self.edits, overwrite=overwrite, trusted=trusted)

    def _check_data(self) -> None:
        """Before any work: what is fitted to data needs some."""
        for index, edit in enumerate(self.edits if self.form.data is None else ()):
            if isinstance(edit, Remove) and edit.heal is not None and not edit.taken:
                where, found = "remove.heal", edit.heal
            elif isinstance(edit, PruneChannels) and edit.pruned is None and edit.reconstruct:
                where, found = "prune_channels.reconstruct", str(edit.reconstruct)
            elif isinstance(edit, PruneChannels) and edit.pruned is None and edit.importance in NEED_DATA:
                where, found = "prune_channels.importance", edit.importance
            else:
                continue
            what = "healing" if isinstance(edit, Remove) else "this"
            raise RecipeError(
                f"{what} is fitted to data, and the recipe names none",
                path=f"edits[{index}].{where}",
                found=found,
                hint="data: FILE",
            )

    def to_dict(self) -> dict[str, Any]:
        """What was given, as plain data."""
        return self.form.model_dump(mode="json", exclude_unset=True)

    def to_yaml(self) -> str:
        """What was given, as YAML."""
        return to_yaml(self.to_dict())

    @staticmethod
    def json_schema() -> dict[str, Any]:
        """A JSON Schema of recipes: editors complete and check with it."""
        return recipe_schema()

    def __str__(self) -> str:
        return self.to_yaml()


def parse(text: str, where: str) -> Any:
    """The plain data in a YAML or JSON text; a key that comes twice is refused.

    Raises:
        RecipeError: It is neither.
    """
    try:
        if text.lstrip().startswith("{"):
            with suppress(json.JSONDecodeError):  # YAML may begin so, too
                return json.loads(text, object_pairs_hook=_once)
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RecipeError(f"neither YAML nor JSON: {' '.join(str(error).split())}", path=where) from error


class _Loader(yaml.SafeLoader):
    """YAML without code, and without a key that comes twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    merge = "tag:yaml.org,2002:merge"
    _once([(loader.construct_object(key, deep=True), None) for key, _ in node.value if key.tag != merge])
    loader.flatten_mapping(node)  # what `<<` brings comes first, so that the mapping's own keys win
    return {loader.construct_object(k, deep=True): loader.construct_object(v, deep=True) for k, v in node.value}


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _once(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for key, value in pairs:
        if isinstance(key, (list, dict)):
            raise ValueError(f"a key is a word, not {key!r}")
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def _overridden(data: Any, text: str) -> dict[str, Any]:
    """The data with one value set: `model.pretrained=true`."""
    key, equals, value = text.partition("=")
    parts: list[str | int] = [
        int(part[1:-1]) if part[0] == "[" else part for part in re.findall(r"\[\d+\]|[^.\[\]]+", key)
    ]
    if not equals or not parts:
        raise RecipeError("not a setting", path=text, expected="key=value, like model.pretrained=true")
    try:
        return dict(_set(data, parts, parse(value, text) if value.strip() else None, key))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise RecipeError("there is nothing to set there", path=key, hint=_PLACE) from error


def _set(held: Any, parts: list[str | int], value: Any, key: str) -> Any:
    if not parts:
        return value
    part, rest = parts[0], parts[1:]
    if isinstance(part, int):
        items = list(held)
        items[part] = _set(items[part], rest, value, key)
        return items
    if held is not None and not isinstance(held, Mapping):
        raise TypeError(key)
    inner = (held or {}).get(part)
    if rest and isinstance(inner, str) and part in ("model", "data", "validation"):
        inner = {_SHORT.get(part, "file"): inner}
    return {**(held or {}), part: _set(inner, rest, value, key)}


def _head(values: dict[str, Any]) -> Edit:
    try:
        return edit_of({"attach_head": values}, "head")
    except TorchTrimError as error:
        error.path = str(error.path).replace("head.attach_head", "head")
        raise
