"""The command that sets weights to zero, and lets the others share values."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from torchtrim.cli_edits import Out, PlanOnly
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
    check_out,
    load,
    show,
    write,
)
from torchtrim.cli_prune import numbers_by_path, share_or_by_path


def add_commands(app: typer.Typer) -> None:
    """Give the command line this command."""
    app.command(epilog=EXIT_CODES)(sparsify)


def sparsify(
    model: Model,
    sparsity: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SHARE | PATH=SHARE", help="The share of the weights that is zero: 0.5, or of a path or glob."
        ),
    ] = None,
    pattern: Annotated[str | None, typer.Option(help="Instead: 2:4, of 4 neighbours along the inputs 2 stay.")] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH=VALUE", help="Instead: all weights of a path or glob that are smaller."),
    ] = None,
    block: Annotated[str | None, typer.Option(help="Weights go in blocks of outputs,inputs: 4,1.")] = None,
    pool: Annotated[str, typer.Option(help="Blocks are ranked by their mean (avg) or their largest (max).")] = "avg",
    scope: Annotated[str, typer.Option(help="uniform: of each weight; global: of all together.")] = "uniform",
    importance: Annotated[str, typer.Option(help="magnitude, or random:SEED.")] = "magnitude",
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Only these: paths or globs, the first and last layer too.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATH", help="What is left out besides.")] = None,
    clusters: Annotated[
        int | None, typer.Option(help="Then let the entries of each weight share so many values.", min=2, max=256)
    ] = None,
    out: Out = None,
    plan: PlanOnly = False,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Set the smallest weights of a model to zero, and write it.

    Example: torchtrim sparsify timm:resnet18 --sparsity 0.5 --pretrained --out net.trim
    """
    if sum(map(bool, (sparsity, pattern, threshold))) != 1:
        raise typer.BadParameter("one of these says how much goes", param_hint="--sparsity, --pattern or --threshold")
    asked: dict[str, Any] = {"pool": pool, "scope": scope, "importance": importance, "exclude": exclude or []}
    asked |= {} if include is None else {"include": include}
    asked |= {} if block is None else {"block": _sides(block)}
    if sparsity:
        asked["sparsity"] = share_or_by_path(sparsity, "--sparsity")
    elif threshold:
        asked["thresholds"] = numbers_by_path(threshold, "--threshold")
    else:
        asked["pattern"] = pattern
    items: list[dict[str, Any]] = [{"sparsify": asked}]
    if clusters is not None:
        also = {} if include is None else {"include": include}
        items.append({"cluster_weights": {"clusters": clusters, "exclude": exclude or [], **also}})
    if not plan:
        if out is None:
            raise typer.BadParameter("a file to write, or --plan", param_hint="--out")
        check_out(out, overwrite)
    named, x = load(model, input, pretrained, weights, seed, trust)
    _do(items, named.model, x, out, overwrite, plan, trust, json)


def _sides(text: str) -> list[int]:
    try:
        return [int(side) for side in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}: whole numbers like 4,1", param_hint="--block") from error


def _do(
    items: list[dict[str, Any]],
    model: Any,
    x: Any,
    out: Path | None,
    overwrite: bool,
    plan: bool,
    trust: list[str] | None,
    as_json: bool,
) -> None:
    """Do the edits and write the result, or say what they would do."""
    import torchtrim as tt
    from torchtrim.recipe.edit_forms import edit_of

    edits = [edit_of(item, "") for item in items]
    if plan or out is None:
        show(tt.plan(model, x, edits, trusted=trust or ()), as_json)
        return
    net = tt.apply(model, x, edits, trusted=trust or ())
    for entry in tt.history(net).entries[-len(edits) :]:
        for note in entry.notes:
            typer.echo(note, err=True)
    write(net, x, out, overwrite=overwrite, as_json=as_json)
