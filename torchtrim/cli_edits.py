"""The commands that edit a model: `remove`, `insert`, `replace`; `plan`, what edits would do; `history`, what was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

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
    print_json,
    show,
    write,
)
from torchtrim.errors import InputError

if TYPE_CHECKING:
    from torch import nn

    from torchtrim.graph.inputs import Inputs

Out = Annotated[Path | None, typer.Option(help="FILE.trim, FILE.onnx, or FILE.pt for a state_dict.")]
PlanOnly = Annotated[bool, typer.Option("--plan", help="Only say what would be done.")]
DataFile = Annotated[
    Path | None, typer.Option("--data", metavar="FILE", help="Calibration data: .npz, .npy, .pt, or a picture folder.")
]


def add_commands(app: typer.Typer) -> None:
    """Give the command line these commands."""
    for command in (remove, insert, replace, plan, history):
        app.command(epilog=EXIT_CODES)(command)


def remove(
    model: Model,
    paths: Annotated[list[str], typer.Argument(metavar="PATH...", help="What goes: paths, addresses or globs.")],
    out: Out = None,
    adapter: Annotated[
        str, typer.Option(help="What repairs shapes that differ: auto, pool, slice, project, none, or a module.")
    ] = "auto",
    heal: Annotated[str | None, typer.Option(help="Fit the joints on --data: auto, linear, scale or norm.")] = None,
    data: DataFile = None,
    branch: Annotated[bool, typer.Option("--branch", help="Take the whole branch that a path lies in.")] = False,
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
    """Take layers out of the middle of a model, and write what is left.

    Example: torchtrim remove timm:resnet50 layer3.4 layer3.5 --pretrained --out net.trim
    """
    if heal is not None and data is None and not plan:
        raise typer.BadParameter("healing is fitted to data", param_hint="--data")
    asked: dict[str, Any] = {"paths": paths, "adapter": None if adapter == "none" else adapter}
    asked |= {"branch": True} if branch else {}
    asked |= {} if heal is None else {"heal": heal}
    _check(out, overwrite, plan)
    named, x = load(model, input, pretrained, weights, seed, trust)
    _do({"remove": asked}, named.model, x, out, overwrite, plan, seed, trust, json, data)


def insert(
    model: Model,
    module: Annotated[str, typer.Argument(metavar="MODULE", help='As in Python: "nn.Dropout(0.2)".')],
    out: Out = None,
    after: Annotated[str | None, typer.Option(help="The path or address it comes after.")] = None,
    before: Annotated[str | None, typer.Option(help="The path or address it comes before.")] = None,
    name: Annotated[str | None, typer.Option(help="Its name in the module it goes into.")] = None,
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
    """Put a layer in.

    Example: torchtrim insert timm:resnet18 "nn.Dropout(0.2)" --after global_pool --out net.trim
    """
    if (after is None) == (before is None):
        raise typer.BadParameter("one of the two says where", param_hint="--after, --before")
    asked = {"module": module, "after": after, "before": before, "name": name}
    _check(out, overwrite, plan)
    named, x = load(model, input, pretrained, weights, seed, trust)
    given = {key: value for key, value in asked.items() if value is not None}
    _do({"insert": given}, named.model, x, out, overwrite, plan, seed, trust, json)


def replace(
    model: Model,
    what: Annotated[str, typer.Argument(metavar="WHAT", help="A path, a glob, or a type: nn.ReLU.")],
    new: Annotated[str, typer.Argument(metavar="NEW", help='As in Python: "nn.ReLU6()".')],
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
    """Put other layers in place of some.

    Example: torchtrim replace timm:resnet18 nn.ReLU "nn.ReLU6()" --out net.trim
    """
    _check(out, overwrite, plan)
    named, x = load(model, input, pretrained, weights, seed, trust)
    from torch import nn

    if isinstance(getattr(nn, what, None), type) and what not in dict(named.model.named_modules()):
        what = f"nn.{what}"
    _do({"replace": {"what": what, "new": new}}, named.model, x, out, overwrite, plan, seed, trust, json)


def plan(
    model: Model,
    edits: Annotated[Path, typer.Argument(metavar="EDITS", help="A YAML or JSON list of edits, or a recipe.")],
    input: InputShapes = None,
    pretrained: Pretrained = False,
    weights: Weights = None,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what edits would do: what goes, what stays, shapes, parameters and MACs.

    Example: torchtrim plan timm:resnet18 edits.yaml
    """
    import torchtrim as tt
    from torchtrim.recipe.edit_forms import edits_of
    from torchtrim.recipe.recipe import parse

    try:
        data = parse(edits.read_text(encoding="utf-8"), str(edits))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot be read: {error}", path=edits) from error
    listed = edits_of(data.get("edits", []) if isinstance(data, dict) and "kind" not in data else data)
    named, x = load(model, input, pretrained, weights, seed, trust)
    show(tt.plan(named.model, x, listed, trusted=trust or ()), json)


def history(
    file: Annotated[Path, typer.Argument(metavar="FILE.trim")],
    edits: Annotated[bool, typer.Option("--edits", help="Print the records as YAML, for a recipe or `plan`.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show what was done to the model in a file. The model is not built.

    Example: torchtrim history net.trim
    """
    from torchtrim.checkpoint.load import read_history

    found = read_history(file)
    if edits:
        if json:
            print_json([edit.to_dict() for edit in found.edits])
        else:
            typer.echo(found.edits_as("yaml"))
        return
    if json:
        print_json(found.to_dict(weights=False))
    else:
        typer.echo(found)


def _check(out: Path | None, overwrite: bool, plan: bool) -> None:
    if plan:
        return
    if out is None:
        raise typer.BadParameter("a file to write, or --plan", param_hint="--out")
    check_out(out, overwrite)


def _do(
    item: dict[str, Any],
    model: nn.Module,
    x: Inputs,
    out: Path | None,
    overwrite: bool,
    plan: bool,
    seed: int,
    trust: list[str] | None,
    as_json: bool,
    data: Path | None = None,
) -> None:
    """Do one edit and write the result, or say what it would do."""
    import torch

    import torchtrim as tt
    from torchtrim.recipe.data import read_data
    from torchtrim.recipe.edit_forms import edit_of
    from torchtrim.recipe.form import DataSection

    torch.manual_seed(seed)
    edit = edit_of(item, "")
    if plan or out is None:
        show(tt.plan(model, x, [edit], trusted=trust or ()), as_json)
        return
    batches = None if data is None else read_data(DataSection(file=str(data)), x)
    net = tt.apply(model, x, [edit], data=batches, trusted=trust or ())
    write(net, x, out, overwrite=overwrite, as_json=as_json)
