"""The command that brings a model within a budget."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from torchtrim.cli_data import labelled_batches
from torchtrim.cli_options import (
    EXIT_CODES,
    Debug,
    InputShapes,
    Json,
    Model,
    Pretrained,
    Seed,
    Target,
    Trust,
    Weights,
    load,
    show,
)


def add_commands(app: typer.Typer) -> None:
    """Give the command line this command."""
    app.command(epilog=EXIT_CODES)(trim)


def trim(
    model: Model,
    data: Annotated[
        str,
        typer.Option(
            help="A folder of pictures, in a folder for each class; a .npz, .npy or .pt file of arrays; or "
            "torchvision:CIFAR10:FOLDER. Calibrated on, and scored on where there is no --val."
        ),
    ],
    out: Annotated[
        Path, typer.Option(help="The folder for the model, its file, the report and the study. A search goes on in it.")
    ],
    macs: Annotated[float | None, typer.Option(help="Keep at most so many MACs; up to 1 a share.")] = None,
    params: Annotated[float | None, typer.Option(help="Keep at most so many parameters; up to 1 a share.")] = None,
    size_mb: Annotated[float | None, typer.Option(help="Keep at most so many megabytes.")] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Of the ONNX file on this machine, in milliseconds; measured.")
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="Lose at most so much of the score; by itself: as small as that allows.")
    ] = None,
    val: Annotated[
        str | None, typer.Option(help="Labelled data to score on, as for --data: torchvision:CIFAR10:FOLDER:test.")
    ] = None,
    train: Annotated[
        str | None, typer.Option(help="Labelled data to train the best on, with the untouched model as its teacher.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over --train.", min=1)] = 3,
    lr: Annotated[float, typer.Option(help="The largest learning rate.")] = 1e-3,
    quantize: Annotated[
        list[str] | None,
        typer.Option(help="A scheme of the file to choose from, once for each; auto: those that are faster here."),
    ] = None,
    pruning: Annotated[
        list[str] | None,
        typer.Option(
            help="A way to prune channels to choose from, once for each: magnitude, magnitude:global, "
            "magnitude:reconstruct, isomorphic, activation, taylor, reconstruction; none."
        ),
    ] = None,
    removal: Annotated[bool, typer.Option(help="Whether blocks may be taken out.")] = True,
    heal: Annotated[bool, typer.Option(help="Whether norms and joints are fitted to --data.")] = True,
    metric: Annotated[str, typer.Option(help="What blocks are ranked by, as for rank.")] = "sampled",
    order: Annotated[str | None, typer.Option(help="In which order blocks go: ranked or search.")] = None,
    trials: Annotated[int, typer.Option(help="How many plans to try.", min=1)] = 12,
    seconds: Annotated[float | None, typer.Option(help="Begin no more plans after this time.")] = None,
    rows: Annotated[int, typer.Option(help="How many rows of --data to calibrate on.", min=1)] = 512,
    storage: Annotated[
        str | None, typer.Option(help="A database for the study, that machines share: mysql://..., sqlite:///trim.db.")
    ] = None,
    study: Annotated[str, typer.Option(help="The study's name there.")] = "trim",
    threads: Annotated[int | None, typer.Option(help="Threads to measure latencies with.", min=1)] = None,
    target: Target = "cpu",
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Bring a model within a budget at the least loss: blocks and channels out, other numbers, a report.

    Example: torchtrim trim timm:resnet50 --pretrained --data pictures --macs 0.5 --max-drop 0.01 --out trimmed
    """
    import torchtrim as tt
    from torchtrim.cli_export import classes_of

    limits = {"macs": macs, "params": params, "size_mb": size_mb, "latency_ms": latency_ms, "max_drop": max_drop}
    budget = {name: limit for name, limit in limits.items() if limit is not None}
    if not budget:
        raise typer.BadParameter("what is it to be brought within?", param_hint="--macs, --latency-ms, --max-drop, ...")
    named, x = load(model, input, pretrained, weights, seed, trust)
    classes = classes_of(named.model, x)
    training: dict[str, Any] = {}
    if train is not None:
        training = {"train_data": _labelled(train, x, seed), "training": {"epochs": epochs, "lr": lr}}
    result = tt.trim(
        named.model,
        labelled_batches(Path(data), rows * (1 if val else 2), x, classes),
        example_inputs=x,
        budget=budget,
        target=target,
        quantize=quantize or None,
        removal=removal,
        pruning=None if not pruning else [] if pruning == ["none"] else pruning,
        heal=heal,
        metric=metric,
        order=order,
        val_data=None if val is None else _labelled(val, x, None),
        trials=trials,
        seconds=seconds,
        rows=rows,
        folder=out,
        storage=storage,
        study=study,
        threads=threads,
        seed=seed,
        **training,
    )
    command = shlex.join(["torchtrim", *sys.argv[1:]])
    replace(result.report, model=named.name, command=command, data=f"{data}, {result.report.data}").write(out)
    show(result, json, also=None if json else f"{out}: net.trim, report.html, report.md, report.json")


def _labelled(data: str, x: Any, seed: int | None) -> Any:
    from torchtrim.recipe.data import read_data
    from torchtrim.recipe.form import DataSection

    return read_data(DataSection(file=data), x, labelled=True, seed=seed)
