"""The folder of a run: what is written into it, and how it comes into place whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from torchtrim.edits.edit import Edit
from torchtrim.edits.module_spec import Trusted
from torchtrim.errors import RecipeError
from torchtrim.graph.execution import spec_of
from torchtrim.recipe.edit_forms import short_form
from torchtrim.recipe.form import RecipeForm
from torchtrim.recipe.run import RecipeRun, run_recipe

RECIPE, REPORT, FIGURES = "recipe.yaml", "report.md", "report.json"
_DEPTH = 2  # levels of modules that the report shows


def run_into(
    place: Path, form: RecipeForm, folder: Path, edits: Callable[[], list[Edit]], *, overwrite: bool, trusted: Trusted
) -> RecipeRun:
    """Run a recipe and write its folder: the checkpoint, the ONNX file, the report, and a recipe that repeats it.

    Args:
        place: The folder.
        form: The recipe.
        folder: Where its relative paths start.
        edits: Gives its edits, each time with modules of their own.
        overwrite: Replace a folder that an earlier run wrote.
        trusted: What the recipe may import.

    Raises:
        RecipeError: The folder is taken, or cannot be written.
        TorchTrimError: What a step raises. Nothing was written then, and a folder that was there is as it was.
    """
    place = _free(place, overwrite)
    try:
        made = tempfile.TemporaryDirectory(prefix=".torchtrim.", dir=place.parent)
    except OSError as error:
        raise RecipeError(f"the folder cannot be written to: {error.strerror}", path=place.parent) from error
    with made as aside:
        workshop = Path(aside) / place.name
        workshop.mkdir()
        run = run_recipe(form, folder, edits, trusted, workshop, place)
        run.files.update({"recipe": place / RECIPE, "report": place / REPORT, "figures": place / FIGURES})
        resolved = resolved_recipe(form, run, folder, place)
        (workshop / RECIPE).write_text(to_yaml(resolved), encoding="utf-8")
        (workshop / REPORT).write_text(markdown(run, form), encoding="utf-8")
        figures = {**run.to_dict(), "recipe": form.model_dump(mode="json", exclude_unset=True)}
        figures["read"] = _read_files(form, folder)
        (workshop / FIGURES).write_text(json.dumps(figures, indent=2), encoding="utf-8")
        _move(workshop, _free(place, overwrite), Path(aside))
    return run


def to_yaml(data: Any) -> str:
    """Plain data as YAML, with shapes and the like on one line."""
    return str(yaml.dump(data, Dumper=yaml.CSafeDumper, sort_keys=False, default_flow_style=None, width=10**9))


def resolved_recipe(form: RecipeForm, run: RecipeRun, folder: Path, place: Path) -> dict[str, Any]:
    """A recipe that does the same again: everything decided is written into it, and its paths start at `place`.

    It has no calibration data: the records hold what was fitted to it.
    """

    def moved(path: str) -> str:
        return os.path.relpath((folder / path).resolve(), place.resolve())

    data = form.model_dump(mode="json", exclude={"edits", "head", "input", "data", "out"})
    model = data["model"]
    model["name"] = moved(model["name"]) if model["name"].endswith(".trim") else model["name"]
    model["weights"] = None if model["weights"] is None else moved(model["weights"])
    for section in ((data["training"] or {}).get(name) for name in ("data", "validation")):
        if section is not None:
            section["file"] = moved(section["file"])
    shapes = spec_of(run.inputs)
    past = len(run.history.entries) - len(run.plan.steps)  # what a .trim file brought along
    made = [short_form(entry.edit) for entry in run.history.entries[past:]]
    return {
        "recipe": data["recipe"],
        "model": {key: value for key, value in model.items() if value not in (None, {})},
        "input": shapes["args"] or shapes["kwargs"],
        "edits": made,
        **({} if data["training"] is None else {"training": data["training"]}),
        "export": data["export"],
    }


def markdown(run: RecipeRun, form: RecipeForm) -> str:
    """The report for people."""
    given = to_yaml(form.model_dump(mode="json", exclude_unset=True))
    rows = tuple(row for row in run.after.rows if row.path.count(".") < _DEPTH)
    parts = [
        f"# {form.model.name}",
        run.table().markdown(),
        "## What went in",
        _block(given, "yaml"),
        f"Inputs: {run.inputs.describe()}.",
        "## What the edits were going to do",
        _block(str(run.plan)),
        "## What they did",
        _block(str(run.history)),
        "## The model now",
        _block(str(replace(run.after, rows=rows))),
    ]
    if run.training is not None:
        parts += ["## Training", run.training.table().markdown()]
    if run.export is not None:
        parts += ["## ONNX", *(table.markdown() for table in run.export.tables())]
    parts += ["## Made with", _block(str(run.machine))]
    return "\n\n".join(parts) + "\n"


def _block(text: str, language: str = "text") -> str:
    return f"```{language}\n{text.rstrip()}\n```"


def _read_files(form: RecipeForm, folder: Path) -> dict[str, str]:
    """The checksums of the files that went in, so that one can tell later whether they are still the same."""
    names = [form.model.weights, form.model.name if form.model.name.endswith(".trim") else None]
    sections = [form.data, *([form.training.data, form.training.validation] if form.training else [])]
    names += [section.file for section in sections if section is not None]
    found = {}
    for name in names:
        if name is not None and (folder / name).is_file():
            with (folder / name).open("rb") as stream:
                found[name] = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    return found


def _free(place: Path, overwrite: bool) -> Path:
    """The folder's absolute path, where it may be written."""
    place = Path(os.path.abspath(place))
    if not place.parent.is_dir():
        raise RecipeError("there is no such folder", path=place.parent, hint="create it first")
    if os.path.lexists(place):
        if not overwrite:
            raise RecipeError("the folder exists", path=place, hint="--overwrite (overwrite=True), or another --out")
        if place.is_symlink() or not _is_ours(place):
            raise RecipeError("not a folder that a run wrote, so it is not replaced", path=place, hint="another --out")
    return place


def _is_ours(place: Path) -> bool:
    """Whether a folder holds a run, and nothing else."""
    if not place.is_dir():
        return False
    names = {each.name for each in place.iterdir()}
    figures = place / FIGURES
    if not names:
        return True
    if not figures.is_file():
        return False
    try:
        written = {Path(file).name for file in json.loads(figures.read_text(encoding="utf-8"))["files"].values()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return False
    return names <= written | {f"{name}.data" for name in written}


def _move(workshop: Path, place: Path, aside: Path) -> None:
    """Put the new folder in place of an old one; where that fails, the old one comes back."""
    try:
        if not os.path.lexists(place):
            os.replace(workshop, place)
            return
        old = aside / "before"
        os.replace(place, old)
        try:
            os.replace(workshop, place)
        except BaseException:
            os.replace(old, place)
            raise
        shutil.rmtree(old)
    except OSError as error:
        raise RecipeError(f"the folder cannot be put in place: {error.strerror}", path=place) from error
