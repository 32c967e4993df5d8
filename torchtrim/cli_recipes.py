"""The commands about recipes: `run`, `recipe new`, `recipe schema`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from torchtrim.cli_options import (
    EXIT_CODES,
    Debug,
    InputShapes,
    Json,
    Model,
    Overwrite,
    Pretrained,
    Trust,
    check_free,
    load,
    print_json,
    show,
    write_text,
)


def add_commands(app: typer.Typer) -> None:
    """Give the command line these commands."""
    app.command(epilog=EXIT_CODES)(run)
    recipes = typer.Typer(help="Write a recipe to begin with, or the schema of recipes.", no_args_is_help=True)
    recipes.command(epilog=EXIT_CODES)(new)
    recipes.command(epilog=EXIT_CODES)(schema)
    app.add_typer(recipes, name="recipe")


def run(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML or JSON file.")],
    plan: Annotated[bool, typer.Option("--plan", help="Only say what its edits would do.")] = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a value: export.quantize=dynamic.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write; the recipe's name by default.")] = None,
    overwrite: Overwrite = False,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Do a recipe, and write a folder: net.trim, the ONNX file, the report, and a recipe that repeats it.

    Example: torchtrim run recipe.yaml --set model.pretrained=true --out result
    """
    from torchtrim.recipe.recipe import Recipe

    loaded = Recipe.load(recipe, overrides=settings or ())
    if plan:
        show(loaded.run(plan=True, trusted=trust or ()), json)
    else:
        show(loaded.run(out, overwrite=overwrite, trusted=trust or ()), json)


def new(
    model: Model,
    out: Annotated[Path | None, typer.Option(help="The file to write; printed where it is left out.")] = None,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    overwrite: Overwrite = False,
    trust: Trust = None,
    debug: Debug = False,
) -> None:
    """Write a commented recipe for a model. It runs as it is.

    Example: torchtrim recipe new timm:resnet18 --out recipe.yaml
    """
    from torchtrim.recipe.new import new_recipe

    if out is not None:
        check_free(out, overwrite)
    named, x = load(model, input, trust=trust)
    file = "recipe.yaml" if out is None else out.name
    if model.endswith(".trim"):  # its path starts at the recipe's folder
        model = os.path.relpath(model, "." if out is None else out.parent)
    text = new_recipe(model, named.model, x, pretrained=pretrained, file=file)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(text, out)
        typer.echo(f"{out}: torchtrim run {out}")


def schema(debug: Debug = False) -> None:
    """Print a JSON Schema of recipes, with which editors complete and check them.

    Example: torchtrim recipe schema > recipe.schema.json
    """
    from torchtrim.recipe.recipe import Recipe

    print_json(Recipe.json_schema())
