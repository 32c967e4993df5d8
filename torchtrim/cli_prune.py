"""The command that prunes channels: by a ratio, or to a budget."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchtrim.cli_edits import DataFile, Out, PlanOnly
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

if TYPE_CHECKING:
    from torch import nn

    from torchtrim.graph.inputs import Inputs


def add_commands(app: typer.Typer) -> None:
    """Give the command line this command."""
    app.command(epilog=EXIT_CODES)(prune)


Ratios = Annotated[
    list[str] | None,
    typer.Option(metavar="RATIO | PATH=RATIO", help="The share of the channels that goes: 0.5, or of a path or glob."),
]


def prune(
    model: Model,
    ratio: Ratios = None,
    macs: Annotated[float | None, typer.Option(help="Keep at most so many MACs; up to 1 a share.")] = None,
    params: Annotated[float | None, typer.Option(help="Keep at most so many parameters; up to 1 a share.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Keep at most so many megabytes of weights.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Of the ONNX file on this machine, in milliseconds; measured.")
    ] = None,
    threshold: Annotated[
        list[str] | None,
        typer.Option(metavar="PATH=SCORE", help="Instead: all channels of a path or glob that score below."),
    ] = None,
    importance: Annotated[
        str,
        typer.Option(
            help="magnitude, l1, bn_scale, lamp, fpgm or random; on --data: taylor, hessian, apoz, activation, "
            "reconstruction."
        ),
    ] = "magnitude",
    scope: Annotated[
        str, typer.Option(help="uniform: of each layer; global: of all together; isomorphic: of layers alike.")
    ] = "uniform",
    round_to: Annotated[int, typer.Option(help="Widths are multiples of this.", min=1)] = 8,
    min_channels: Annotated[int, typer.Option(help="What is left of a layer at least.", min=1)] = 1,
    max_ratio: Annotated[float, typer.Option(help="What goes of a layer at most.")] = 0.9,
    protect: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Layers that stay as wide as they are: paths or globs.")
    ] = None,
    reconstruct: Annotated[
        bool, typer.Option("--reconstruct", help="Fit the layers that read pruned channels on --data.")
    ] = False,
    out: Out = None,
    data: DataFile = None,
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
    """Take channels out of a model, and write what is left.

    Example: torchtrim prune timm:resnet50 --macs 0.5 --pretrained --out net.trim
    """
    limits = {"macs": macs, "params": params, "size_mb": size_mb, "latency_ms": latency_ms}
    budget = {name: limit for name, limit in limits.items() if limit is not None}
    targets = [bool(ratio), bool(budget), bool(threshold)]
    if sum(targets) != 1:
        raise typer.BadParameter(
            "one of these says how much goes", param_hint="--ratio, --threshold, or --macs and the other limits"
        )
    if reconstruct and data is None and not plan:
        raise typer.BadParameter("layers are fitted to data", param_hint="--data")
    if data is None and not plan and _looks_at_data(importance):
        raise typer.BadParameter(f"{importance} looks at data", param_hint="--data")
    asked: dict[str, Any] = {"importance": importance, "scope": scope, "round_to": round_to}
    asked |= {
        "min_channels": min_channels,
        "max_ratio": max_ratio,
        "protect": protect or [],
        "reconstruct": reconstruct,
    }
    if ratio:
        asked["ratio"] = share_or_by_path(ratio, "--ratio")
    elif budget:
        asked["budget"] = budget
    else:
        asked["thresholds"] = numbers_by_path(threshold or [], "--threshold")
    if not plan:
        if out is None:
            raise typer.BadParameter("a file to write, or --plan", param_hint="--out")
        check_out(out, overwrite)
    named, x = load(model, input, pretrained, weights, seed, trust)
    _do(asked, named.model, x, out, overwrite, plan, seed, trust, json, data)


def _looks_at_data(importance: str) -> bool:
    from torchtrim.importance.channels import NEED_DATA  # with torch, which only a command that runs loads

    return importance in NEED_DATA


def share_or_by_path(given: list[str], option: str) -> float | dict[str, float]:
    """A number, or numbers by path, of an option that may be given several times."""
    if len(given) == 1 and "=" not in given[0]:
        return _number(given[0], option)
    return numbers_by_path(given, option)


def numbers_by_path(given: list[str], option: str) -> dict[str, float]:
    """The numbers of `PATH=NUMBER`, by path."""
    found = {}
    for each in given:
        path, equals, number = each.rpartition("=")
        if not equals or not path:
            raise typer.BadParameter(f"{each!r}: a path or glob and a number, like layer3.*=0.5", param_hint=option)
        found[path] = _number(number, option)
    return found


def _number(text: str, option: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a number", param_hint=option) from error


def _do(
    asked: dict[str, Any],
    model: nn.Module,
    x: Inputs,
    out: Path | None,
    overwrite: bool,
    plan: bool,
    seed: int,
    trust: list[str] | None,
    as_json: bool,
    data: Path | None,
) -> None:
    """Prune and write the result, or say what would be pruned."""
    import torch

    import torchtrim as tt
    from torchtrim.recipe.edit_forms import edit_of
    from torchtrim.recipe.form import DataSection
    from torchtrim.recipe.run import calibration_data
    from torchtrim.search.prune import with_latencies

    torch.manual_seed(seed)
    edit = edit_of({"prune_channels": asked}, "")
    batches = None if data is None else calibration_data(DataSection(file=str(data)), x, Path(), [edit])
    edits = with_latencies(model, x, lambda: [edit], data=batches, trusted=trust or ())
    if plan or out is None:
        show(tt.plan(model, x, edits(), trusted=trust or ()), as_json)
        return
    net = tt.apply(model, x, edits(), data=batches, trusted=trust or ())
    for note in tt.history(net).entries[-1].notes:
        typer.echo(note, err=True)
    write(net, x, out, overwrite=overwrite, as_json=as_json)
