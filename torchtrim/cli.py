"""The command line: a thin face over the public API.

torch is imported by the commands, not by this file, so that `torchtrim --help` answers at once.
"""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from torchtrim import (
    cli_bench,
    cli_edits,
    cli_export,
    cli_prune,
    cli_rank,
    cli_recipes,
    cli_sparsify,
    cli_trim,
    cli_verify,
)
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
    load_named,
    show,
    write,
)
from torchtrim.errors import ExportMismatch, InputError, TorchTrimError


class _Commands(TyperGroup):
    """The commands, with torchtrim's errors told in one line and as an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TorchTrimError as error:
            if ctx.meta.get("debug"):
                traceback.print_exception(error)
            if ctx.meta.get("json"):
                typer.echo(json.dumps({"error": _error_dict(error)}))
            typer.echo(f"torchtrim: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(3 if isinstance(error, ExportMismatch) else 1) from error


app = typer.Typer(
    cls=_Commands,
    help="Make a pretrained PyTorch model smaller, faster or fit for another task, without breaking it.\n\n"
    "A MODEL is timm:NAME, torchvision:NAME, package.module:function, or a FILE.trim.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line, as `torchtrim` and `python -m torchtrim` do."""
    app(prog_name="torchtrim")


def _print_version(wanted: bool) -> None:
    if wanted:
        from torchtrim import __version__

        typer.echo(f"torchtrim {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Options before the command."""


@app.command(epilog=EXIT_CODES)
def inspect(
    model: Model,
    input: InputShapes = None,
    depth: Annotated[int | None, typer.Option(help="Levels of modules to show.", min=1)] = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's modules: paths, output shapes, parameters, MACs.

    Example: torchtrim inspect timm:resnet18 --depth 2
    """
    import torchtrim as tt

    named, x = load(model, input, pretrained, weights, seed, trust)
    show(tt.summary(named.model, x, depth=depth), json)


@app.command(epilog=EXIT_CODES)
def cut(
    model: Model,
    after: Annotated[list[str], typer.Option(help="The path to keep up to; several give several outputs.")],
    out: Annotated[Path, typer.Option(help="FILE.trim, FILE.onnx, or FILE.pt for a state_dict.")],
    num_classes: Annotated[int | None, typer.Option(help="Attach a new, untrained head with this many.", min=1)] = None,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Keep a model up to a path, and write what is left.

    Example: torchtrim cut timm:resnet18 --after layer3 --num-classes 10 --out net.onnx
    """
    import torch

    import torchtrim as tt

    check_out(out, overwrite)
    if num_classes is not None and len(after) > 1:
        raise InputError("a head needs one output", path="--after", found=len(after), expected=1)
    named, x = load(model, input, pretrained, weights, seed, trust)
    net = tt.cut(named.model, x, after=after[0] if len(after) == 1 else after)
    if num_classes is not None:
        torch.manual_seed(seed)
        net = tt.attach_head(net, x, num_classes=num_classes)
    write(net, x, out, overwrite=overwrite, as_json=json)


@app.command(epilog=EXIT_CODES)
def size(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL|FILE...", help="Models; .trim, .onnx, .safetensors files, or a state_dict's."),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="Show every tensor of each.")] = False,
    compress: Annotated[bool, typer.Option(help="Find out what gzip and zstd make of each.")] = True,
    gzip_level: Annotated[int, typer.Option(help="Level of gzip.", min=1, max=9)] = 6,
    zstd_level: Annotated[int, typer.Option(help="Level of zstd.", min=1, max=22)] = 3,
    pretrained: Pretrained = False,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say how large models and files are: parameters, zeros, bytes in memory, on disk, after gzip and after zstd.

    Example: torchtrim size net.trim net.onnx
    """
    import torchtrim as tt

    sized: dict[str, Any] = {}
    for name in models:
        is_file = ":" not in name or Path(name).is_file()
        sized[name] = Path(name) if is_file else load_named(name, pretrained, None, seed, trust).model
    report = tt.size_report(sized, tensors=tensors, compress=compress, gzip_level=gzip_level, zstd_level=zstd_level)
    show(report, json)


cli_bench.add_commands(app)
cli_edits.add_commands(app)
cli_export.add_commands(app)
cli_prune.add_commands(app)
cli_rank.add_commands(app)
cli_sparsify.add_commands(app)
cli_recipes.add_commands(app)
cli_trim.add_commands(app)
cli_verify.add_commands(app)


@app.command(epilog=EXIT_CODES)
def demo(
    out: Annotated[Path, typer.Option(help="The folder for the ONNX files, the picture and the figures.")] = Path(
        "demo-output"
    ),
    seed: Annotated[
        int, typer.Option(help="Seed of the head and of the order of the pictures.", min=0, max=2**32 - 1)
    ] = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Cut a real pretrained EfficientNet, train it on digits, ship it as ONNX: about a minute."""
    from torchtrim.demo import run_demo

    show(run_demo(out, seed=seed), json)


def _error_dict(error: TorchTrimError) -> dict[str, str | None]:
    values = {"path": error.path, "found": error.found, "expected": error.expected, "hint": error.hint}
    texts = {name: None if value is None else str(value) for name, value in values.items()}
    return {"type": type(error).__name__, "message": error.message, **texts}
