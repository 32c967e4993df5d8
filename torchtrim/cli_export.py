"""The command that writes an ONNX file, and a folder to serve it from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from torchtrim.cli_data import Data, Limit, labelled_batches
from torchtrim.cli_options import (
    EXIT_CODES,
    Debug,
    InputShapes,
    Json,
    Model,
    Overwrite,
    Pretrained,
    Quantize,
    Seed,
    Target,
    Trust,
    Weights,
    check_free,
    check_out,
    load,
    print_json,
    show,
)

if TYPE_CHECKING:
    from torch import nn

    from torchtrim.graph.inputs import Inputs


def add_commands(app: typer.Typer) -> None:
    """Give the command line this command."""
    app.command(epilog=EXIT_CODES)(export)


def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The file to write.")],
    target: Target = "cpu",
    quantize: Quantize = None,
    data: Data = None,
    limit: Limit = 512,
    calibration: Annotated[
        str, typer.Option(help="How static int8 chooses ranges: minmax, entropy, percentile, mse.")
    ] = "minmax",
    max_drop: Annotated[
        float, typer.Option(help="How much accuracy mixed and auto may lose: 0.01 for a point.", min=0.0, max=1.0)
    ] = 0.01,
    bits: Annotated[int, typer.Option(help="Of the weights in weight_only: 8 or 4.")] = 8,
    threads: Annotated[int | None, typer.Option(help="Processor threads to time with.", min=1)] = None,
    serve: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Write a folder too: file, labels, pre-processing, predict.py, README."),
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE.txt", help="For --serve: the names of the classes, one a line.")
    ] = None,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as an ONNX file that was run and compared; exit code 3 where it disagrees.

    Example: torchtrim export timm:resnet18 resnet18.onnx --pretrained --quantize auto --data pictures
    """
    import torchtrim as tt

    if out.suffix != ".onnx":
        raise typer.BadParameter(f"{out}: an ONNX file, so its name ends in .onnx", param_hint="FILE.onnx")
    if labels is not None and serve is None:
        raise typer.BadParameter("names of classes go into the folder to serve from", param_hint="--serve")
    check_out(out, overwrite)
    if serve is not None:
        check_free(serve, overwrite)
    names = None if labels is None else _lines(labels)
    named, x = load(model, input, pretrained, weights, seed, trust)
    preprocessing = None if serve is None else tt.Preprocessing.of(named.model)
    batches = None if data is None else labelled_batches(data, limit, x, classes_of(named.model, x))
    report = tt.export_onnx(
        named.model,
        x,
        out,
        target=target,
        quantize=quantize,
        data=batches,
        calibration=calibration,
        max_drop=max_drop,
        bits=bits,
        threads=threads,
        overwrite=overwrite,
    )
    folder = None
    if serve is not None:
        folder = tt.write_serving_folder(
            out, serve, preprocessing=preprocessing, labels=names, report=report, overwrite=overwrite
        )
    if json and folder is not None:
        print_json({**report.to_dict(), "serving": folder.to_dict()})
        return
    show(report, json)
    if folder is not None:
        typer.echo(f"\n{folder}")


def classes_of(model: nn.Module, x: Inputs) -> int | None:
    """How many columns the model's first output of two dimensions has."""
    from torchtrim.export.outputs import named_outputs
    from torchtrim.export.stand_in import run_once, stand_in

    outputs = named_outputs(run_once(stand_in(model, x), x)).values()
    return next((int(output.shape[1]) for output in outputs if output.dim() == 2 and output.shape[1] > 1), None)


def _lines(path: Path) -> list[str]:
    from torchtrim.errors import InputError

    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"the labels cannot be read: {error}", path=path, expected="a text file, one name a line"
        ) from error
