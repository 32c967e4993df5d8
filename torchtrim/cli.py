"""The command line: a thin face over the public API.

torch is imported by the commands, not by this file, so that `torchtrim --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from torchtrim.errors import ExportMismatch, InputError, TorchTrimError

if TYPE_CHECKING:
    import torch

    from torchtrim.models import NamedModel

_EXIT_CODES = (
    "Exit codes: 0 done, 1 an error that torchtrim explains, 2 wrong usage, 3 a file that disagrees with its model."
)


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
    "A MODEL is timm:NAME, torchvision:NAME, or package.module:function.",
    epilog=_EXIT_CODES,
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


def _remember(ctx: typer.Context, option: typer.CallbackParam, value: bool) -> bool:
    ctx.meta[str(option.name)] = value
    return value


Model = Annotated[str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME or package.module:function.")]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the weights its authors trained.")]
Weights = Annotated[Path | None, typer.Option(help="A state_dict to load into the model.", metavar="FILE")]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:TYPE]",
        help="The shape of an input, batch first: 1,3,224,224 or 1,128:int64. Once for each input. "
        "Left out: what the model's own configuration says.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of random weights and inputs.", min=0, max=2**32 - 1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a file that exists.")]
Target = Annotated[str, typer.Option(help="Where the file will run: cpu or cuda.")]
Quantize = Annotated[str | None, typer.Option(help="dynamic: int8 weights in the linear layers.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_remember)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember)]


@app.command(epilog=_EXIT_CODES)
def inspect(
    model: Model,
    input: InputShapes = None,
    depth: Annotated[int | None, typer.Option(help="Levels of modules to show.", min=1)] = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's modules: paths, output shapes, parameters, MACs.

    Example: torchtrim inspect timm:resnet18 --depth 2
    """
    import torchtrim as tt

    named, x = _load(model, input, pretrained, weights, seed)
    _show(tt.summary(named.model, x, depth=depth), json)


@app.command(epilog=_EXIT_CODES)
def cut(
    model: Model,
    after: Annotated[list[str], typer.Option(help="The path to keep up to; several give several outputs.")],
    out: Annotated[Path, typer.Option(help="FILE.onnx, or FILE.pt for a state_dict.")],
    num_classes: Annotated[int | None, typer.Option(help="Attach a new, untrained head with this many.", min=1)] = None,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Keep a model up to a path, and write what is left.

    Example: torchtrim cut timm:resnet18 --after layer3 --num-classes 10 --out net.onnx
    """
    import torch

    import torchtrim as tt

    _check_out(out, overwrite)
    if num_classes is not None and len(after) > 1:
        raise InputError("a head needs one output", path="--after", found=len(after), expected=1)
    named, x = _load(model, input, pretrained, weights, seed)
    net = tt.cut(named.model, x, after=after[0] if len(after) == 1 else after)
    if num_classes is not None:
        torch.manual_seed(seed)
        net = tt.attach_head(net, x, num_classes=num_classes)
    summary = tt.summary(net, x)
    if out.suffix == ".onnx":
        report = tt.export_onnx(net, x, out, overwrite=overwrite)
        _show(report, json, also=summary)
    else:
        _save_state(net.state_dict(), out)
        _show(summary, json, also=None if json else f"{out}: {out.stat().st_size / 1e6:.1f} MB")


@app.command(epilog=_EXIT_CODES)
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="FILE.onnx", help="The file to write.")],
    target: Target = "cpu",
    quantize: Quantize = None,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    overwrite: Overwrite = False,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model as an ONNX file that was run and compared.

    Example: torchtrim export timm:resnet18 resnet18.onnx --pretrained
    """
    import torchtrim as tt

    if out.suffix != ".onnx":
        raise typer.BadParameter(f"{out}: an ONNX file, so its name ends in .onnx", param_hint="FILE.onnx")
    _check_out(out, overwrite)
    named, x = _load(model, input, pretrained, weights, seed)
    _show(tt.export_onnx(named.model, x, out, target=target, quantize=quantize, overwrite=overwrite), json)


@app.command(epilog=_EXIT_CODES)
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE.onnx")],
    model: Model,
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run an ONNX file against its model, on random inputs at batch 1 and another; exit code 3 where they disagree.

    Example: torchtrim verify resnet18.onnx timm:resnet18 --pretrained
    """
    import torchtrim as tt
    from torchtrim.models import load_model

    named = load_model(model, pretrained=pretrained, weights=weights, seed=seed)
    # Another seed than the one an export was checked with.
    _show(tt.verify_onnx(file, named.model, example_inputs=_example(named, input, seed + 1, batch=3)), json)


@app.command(epilog=_EXIT_CODES)
def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models, or .onnx files.")],
    input: InputShapes = None,
    batch: Annotated[int | None, typer.Option(help="Rows in a batch.", min=1)] = None,
    threads: Annotated[int | None, typer.Option(help="Processor threads to time with.", min=1)] = None,
    seconds: Annotated[float, typer.Option(help="About how long to time each.", min=0.01)] = 1.0,
    compile: Annotated[bool, typer.Option("--compile", help="Time torch.compile of each model too.")] = False,
    pretrained: Pretrained = False,
    seed: Seed = 0,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time models and ONNX files side by side on this machine, all with the same input.

    Example: torchtrim bench timm:resnet18 resnet18.onnx --threads 1
    """
    import torchtrim as tt
    from torchtrim.models import load_model

    candidates: dict[str, Any] = {}
    x = _tensors(input, seed) if input else None
    for name in models:
        if name.endswith(".onnx"):
            candidates[name] = Path(name)
            continue
        named = load_model(name, pretrained=pretrained, seed=seed)
        candidates[name] = named.model
        x = x or _example(named, None, seed)
    _show(tt.benchmark(candidates, x, batch=batch, threads=threads, seconds=seconds, compile=compile), json)


@app.command(epilog=_EXIT_CODES)
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

    _show(run_demo(out, seed=seed), json)


def _load(
    name: str, shapes: list[str] | None, pretrained: bool, weights: Path | None, seed: int
) -> tuple[NamedModel, tuple[torch.Tensor, ...]]:
    from torchtrim.models import load_model

    named = load_model(name, pretrained=pretrained, weights=weights, seed=seed)
    return named, _example(named, shapes, seed)


def _example(named: NamedModel, shapes: list[str] | None, seed: int, batch: int = 1) -> tuple[torch.Tensor, ...]:
    if shapes:
        return _tensors(shapes, seed)
    if named.input_shape is None:
        raise InputError("nothing says which input this model takes", path=named.name, hint="--input 1,3,224,224")
    return _tensors([",".join(map(str, (batch, *named.input_shape)))], seed)


def _tensors(shapes: list[str], seed: int) -> tuple[torch.Tensor, ...]:
    """Random tensors: normal for float types, zeros for integers, which may be indices."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    tensors = []
    for text in shapes:
        sizes, _, kind = text.partition(":")
        dtype = getattr(torch, kind or "float32", None)
        try:
            shape = [int(size) for size in sizes.split(",")]
        except ValueError:
            shape = []
        if not shape or min(shape) < 1 or not isinstance(dtype, torch.dtype):
            raise InputError("not a shape", path="--input", found=text, expected="1,3,224,224 or 1,128:int64")
        if dtype.is_floating_point:
            tensors.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            tensors.append(torch.zeros(shape, dtype=dtype))
    return tuple(tensors)


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse before the work is done, not after."""
    if out.suffix not in {".onnx", ".pt"}:
        raise InputError("the name of the file says its format", path=out, expected=".onnx or .pt")
    if os.path.lexists(out) and not overwrite:
        raise InputError("the file exists", path=out, hint="--overwrite")
    if not out.absolute().parent.is_dir():
        raise InputError("there is no such folder", path=out.absolute().parent)


def _save_state(state: Mapping[str, Any], out: Path) -> None:
    """Write beside the file, then move: a failure leaves the old file as it was."""
    import torch

    try:
        with tempfile.TemporaryDirectory(prefix=".torchtrim.", dir=out.absolute().parent) as folder:
            part = Path(folder) / out.name
            torch.save(dict(state), part)
            part.replace(out)
    except (OSError, RuntimeError) as error:
        raise InputError(f"cannot be written: {error}", path=out) from error


def _show(result: Any, as_json: bool, also: Any = None) -> None:
    if as_json:
        _print_json(result.to_dict() if also is None else {**result.to_dict(), "summary": also.to_dict()})
        return
    if also is not None:
        typer.echo(also)
    typer.echo(result)


def _print_json(value: Any) -> None:
    json.dump(value, sys.stdout, indent=2)
    typer.echo()


def _error_dict(error: TorchTrimError) -> dict[str, str | None]:
    values = {"path": error.path, "found": error.found, "expected": error.expected, "hint": error.hint}
    texts = {name: None if value is None else str(value) for name, value in values.items()}
    return {"type": type(error).__name__, "message": error.message, **texts}
