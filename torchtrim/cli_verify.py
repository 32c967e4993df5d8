"""The commands that look at an ONNX file: does it agree with its model, and why is it not faster."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchtrim.cli_data import Data, Limit, labelled_batches
from torchtrim.cli_options import (
    EXIT_CODES,
    Debug,
    InputShapes,
    Json,
    Model,
    Pretrained,
    Seed,
    Trust,
    Weights,
    example,
    load_named,
    print_json,
    show,
    tensors,
)
from torchtrim.errors import ExportMismatch

if TYPE_CHECKING:
    from torchtrim.graph.inputs import Inputs
    from torchtrim.models import NamedModel

OnnxFile = Annotated[Path, typer.Argument(metavar="FILE.onnx")]


def add_commands(app: typer.Typer) -> None:
    """Give the command line these commands."""
    app.command(epilog=EXIT_CODES)(verify)
    app.command(epilog=EXIT_CODES)(explain)


def verify(
    file: OnnxFile,
    model: Model,
    data: Data = None,
    limit: Limit = 512,
    max_drop: Annotated[
        float | None,
        typer.Option(
            help="The largest loss of accuracy on --data, of top-1 agreement without labels: 0.01 for a point."
        ),
    ] = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare node by node with the model's float ONNX file.")
    ] = False,
    reference: Annotated[
        Path | None, typer.Option(metavar="FLOAT.onnx", help="That float file; exported for it where it is left out.")
    ] = None,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run an ONNX file against its model, at several batch sizes; exit code 3 where they disagree.

    Example: torchtrim verify resnet18.onnx timm:resnet18 --pretrained --data pictures --max-drop 0.01
    """
    import torchtrim as tt

    if reference is not None and not layers:
        raise typer.BadParameter("it is what the file is compared with node by node", param_hint="--layers")
    named = load_named(model, pretrained, weights, seed, trust)
    # Another seed than the one an export was checked with.
    x = example(named, input, seed + 1, batch=3)
    batches = None if data is None else labelled_batches(data, limit, x, _columns(file))

    def run(float_file: Path | None) -> Any:
        return tt.verify_onnx(file, named.model, batches, example_inputs=x, max_drop=max_drop, reference=float_file)

    if not layers:
        show(run(None), json)
        return
    with tempfile.TemporaryDirectory(prefix="torchtrim.") as folder:
        float_file = reference or _export(named, x, Path(folder))
        try:
            verification = run(float_file)
        except ExportMismatch as error:
            found = getattr(error, "layers", None)
            if found is not None and not json:
                typer.echo(found)
            raise
        compared = tt.compare_layers(float_file, file, x)
    if json:
        print_json({**verification.to_dict(), "layers": compared.to_dict()})
    else:
        typer.echo(f"{verification}\n\n{compared}")


def _export(named: NamedModel, x: Inputs, folder: Path) -> Path:
    """The model's float ONNX file."""
    import torchtrim as tt

    return tt.export_onnx(named.model, x, folder / "float.onnx", benchmark=False).path


def _columns(file: Path) -> int | None:
    """How many classes the first output of shape (batch, classes) has."""
    import onnx

    if not file.is_file():
        return None  # which is said when it is opened
    shapes = [value.type.tensor_type.shape.dim for value in onnx.load(file, load_external_data=False).graph.output]
    return next((int(shape[1].dim_value) for shape in shapes if len(shape) == 2 and shape[1].dim_value > 1), None)


def explain(
    file: OnnxFile,
    input: InputShapes = None,
    batch: Annotated[int, typer.Option(help="Rows in a batch.", min=1)] = 1,
    threads: Annotated[int | None, typer.Option(help="Processor threads to run it with.", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="About how long to run it.", min=0.01)] = 1.0,
    provider: Annotated[
        list[str] | None, typer.Option(help="ONNX Runtime's execution providers, best first; the CPU's by default.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the time of each operator.")] = None,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say why an ONNX file is not faster: the time of its nodes, what was not fused or not quantized, what to try.

    Example: torchtrim explain resnet18.onnx --threads 1
    """
    import torchtrim as tt

    x = tensors(input, seed) if input else None
    why = tt.explain_onnx(file, x, threads=threads, providers=provider, batch=batch, seconds=seconds)
    if plot is not None:
        why.plot(plot)
    show(why, json)
