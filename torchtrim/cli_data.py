"""Data for the commands that compare or calibrate: a folder of pictures, or a file of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torchtrim.graph.inputs import Inputs

Data = Annotated[
    Path | None,
    typer.Option(help="A folder of pictures, in a folder for each class; or a .npz, .npy or .pt file of arrays."),
]
Limit = Annotated[int, typer.Option(help="Use this many rows of --data, spread evenly.", min=1)]


def labelled_batches(data: Path, limit: int, x: Inputs, classes: int | None) -> Any:
    """The data in batches, with labels where they are the classes of the model's output.

    Args:
        data: The folder, the file, or the data set of torchvision.
        limit: At most this many rows.
        x: An example of the model's input.
        classes: How many classes the model's output has; None where it has none.
    """
    from torchtrim.recipe.data import read_data
    from torchtrim.recipe.form import DataSection
    from torchtrim.recipe.torchvision_data import PREFIX

    section = DataSection(file=str(data), limit=limit)
    if str(data).startswith(PREFIX):
        return read_data(section, x, labelled=True)
    if data.is_dir():
        folders = sum(each.is_dir() and not each.name.startswith(".") for each in data.iterdir())
        labelled = folders > 0 and folders == classes
        if folders and not labelled:
            told = f"{data}: {folders} folders, which are not the {classes or 'no'} classes of the model, so no labels"
            typer.echo(told, err=True)
    else:
        labelled = _holds_labels(section, x)
    return read_data(section, x, labelled=labelled)


def _holds_labels(section: Any, x: Inputs) -> bool:
    from torchtrim.errors import InputError
    from torchtrim.recipe.data import read_data

    try:
        read_data(section, x, labelled=True)
    except InputError as error:
        if error.message == "training needs labels":
            return False
        raise
    return True
