"""What the commands share: their options, the model they start from, and how they write and show what they made."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from torchtrim.errors import InputError

if TYPE_CHECKING:
    import torch
    from torch import nn

    from torchtrim.graph.inputs import Inputs
    from torchtrim.models import NamedModel

EXIT_CODES = (
    "Exit codes: 0 done, 1 an error that torchtrim explains, 2 wrong usage, 3 a file that disagrees with its model."
)


def _remember(ctx: typer.Context, option: typer.CallbackParam, value: bool) -> bool:
    ctx.meta[str(option.name)] = value
    return value


Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="timm:NAME, torchvision:NAME, package.module:function or FILE.trim.")
]
Pretrained = Annotated[bool, typer.Option("--pretrained", help="Load the weights its authors trained.")]
Weights = Annotated[Path | None, typer.Option(help="A state_dict to load into the model.", metavar="FILE")]
InputShapes = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        metavar="SHAPE[:TYPE]",
        help="The shape of an input, batch first: 1,3,224,224 or 1,128:int64. Once for each input. "
        "Left out: what the model's own configuration or history says.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of random weights and inputs.", min=0, max=2**32 - 1)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what exists.")]
Target = Annotated[str, typer.Option(help="Where the file will run: cpu, openvino, cuda or tensorrt.")]
Quantize = Annotated[
    str | None,
    typer.Option(help="dynamic, static, weight_only, mixed, fp16, bf16, float32; auto: the fastest that is right."),
]
Trust = Annotated[
    list[str] | None,
    typer.Option(
        "--trust",
        metavar="NAME",
        help="Code that a file may import: package.module:function. Only where you know it. Once for each.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.", callback=_remember)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.", callback=_remember)]


def load(
    name: str,
    shapes: list[str] | None,
    pretrained: bool = False,
    weights: Path | None = None,
    seed: int = 0,
    trust: list[str] | None = None,
) -> tuple[NamedModel, Inputs]:
    """The model of a name, and an example of its input."""
    named = load_named(name, pretrained, weights, seed, trust)
    return named, example(named, shapes, seed)


def load_named(
    name: str, pretrained: bool = False, weights: Path | None = None, seed: int = 0, trust: list[str] | None = None
) -> NamedModel:
    """The model of a name."""
    from torchtrim.models import load_model

    return load_model(name, pretrained=pretrained, weights=weights, seed=seed, trusted=trust or ())


def example(named: NamedModel, shapes: list[str] | None, seed: int, batch: int = 1) -> Inputs:
    """An example of a model's input: of the shapes given, or of those that the model is known to take."""
    from torchtrim.edits.history import recorded_inputs
    from torchtrim.graph.inputs import Inputs

    if shapes:
        return Inputs(tensors(shapes, seed))
    recorded = recorded_inputs(named.model)
    if recorded is not None:
        return recorded.with_batch(batch)
    if named.input_shape is None:
        raise InputError("nothing says which input this model takes", path=named.name, hint="--input 1,3,224,224")
    return Inputs(tensors([",".join(map(str, (batch, *named.input_shape)))], seed))


def tensors(shapes: list[str], seed: int) -> tuple[torch.Tensor, ...]:
    """Random tensors: normal for float types, zeros for integers, which may be indices."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    made = []
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
            made.append(torch.randn(shape, generator=generator).to(dtype))
        else:
            made.append(torch.zeros(shape, dtype=dtype))
    return tuple(made)


def check_out(out: Path, overwrite: bool) -> None:
    """Refuse before the work is done, not after."""
    if out.suffix not in {".onnx", ".pt", ".trim"}:
        raise InputError("the name of the file says its format", path=out, expected=".trim, .onnx or .pt")
    check_free(out, overwrite)


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a name that is taken, and one in a folder that is not there."""
    if os.path.lexists(out) and not overwrite:
        raise InputError("the file exists", path=out, hint="--overwrite")
    if not out.absolute().parent.is_dir():
        raise InputError("there is no such folder", path=out.absolute().parent)


def write(net: nn.Module, x: Inputs, out: Path, *, overwrite: bool, as_json: bool) -> None:
    """Write a model in the format that the file's name says, and show it."""
    import torchtrim as tt
    from torchtrim.checkpoint.save import save

    summary = tt.summary(net, x)
    if out.suffix == ".onnx":
        show(tt.export_onnx(net, x, out, overwrite=overwrite), as_json, also=summary)
        return
    if out.suffix == ".trim":
        save(net, out)
    else:
        _save_state(net.state_dict(), out)
    show(summary, as_json, also=None if as_json else f"{out}: {out.stat().st_size / 1e6:.1f} MB")


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


def write_text(text: str, out: Path) -> None:
    """Write a text beside its place, then move it there."""
    try:
        with tempfile.TemporaryDirectory(prefix=".torchtrim.", dir=out.absolute().parent) as folder:
            part = Path(folder) / out.name
            part.write_text(text, encoding="utf-8")
            part.replace(out)
    except OSError as error:
        raise InputError(f"cannot be written: {error}", path=out) from error


def show(result: Any, as_json: bool, also: Any = None) -> None:
    """Print a result as its table, or as JSON."""
    if as_json:
        print_json(result.to_dict() if also is None else {**result.to_dict(), "summary": also.to_dict()})
        return
    if also is not None:
        typer.echo(also)
    typer.echo(result)


def print_json(value: Any) -> None:
    """Print plain data as JSON."""
    json.dump(value, sys.stdout, indent=2)
    typer.echo()
