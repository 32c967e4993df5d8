"""The command that ranks blocks: which of them can go?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from torchtrim.cli_data import Limit, labelled_batches
from torchtrim.cli_options import (
    EXIT_CODES,
    Debug,
    InputShapes,
    Json,
    Model,
    Overwrite,
    Pretrained,
    Seed,
    Trust,
    Weights,
    check_free,
    load,
    show,
)


def add_commands(app: typer.Typer) -> None:
    """Give the command line this command."""
    app.command(epilog=EXIT_CODES)(rank)


def rank(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(help="A folder of pictures, in a folder for each class; or a .npz, .npy or .pt file of arrays."),
    ],
    metric: Annotated[
        str,
        typer.Option(
            help="influence, angular, norm, sampled, fisher, ablation, attribution; with labels also taylor, gradient."
        ),
    ] = "influence",
    measure: Annotated[str | None, typer.Option(help="What ablation looks at: loss, accuracy, kl or output.")] = None,
    blocks: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="What to rank: paths or globs. Left out: what is found.")
    ] = None,
    runs: Annotated[int, typer.Option(help="Rank runs of so many blocks that feed one another.", min=1)] = 1,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw scores and costs by depth into this file.")
    ] = None,
    limit: Limit = 512,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Rank the blocks of a model: which matter, and what does each cost?

    Example: torchtrim rank timm:resnet50 --pretrained --data pictures --metric sampled --plot blocks.png
    """
    import torchtrim as tt
    from torchtrim.cli_export import classes_of

    if plot is not None:
        check_free(plot, overwrite)
    named, x = load(model, input, pretrained, weights, seed, trust)
    batches = labelled_batches(data, limit, x, classes_of(named.model, x))
    found = tt.rank_blocks(named.model, batches, metric, x, measure=measure, blocks=blocks or None, runs=runs)
    if plot is not None:
        found.plot(plot)
    show(found, json)
