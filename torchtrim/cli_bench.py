"""The command that times models and files side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from torchtrim.cli_options import (
    EXIT_CODES,
    Debug,
    InputShapes,
    Json,
    Pretrained,
    Seed,
    Trust,
    example,
    load_named,
    show,
    tensors,
)


def add_commands(app: typer.Typer) -> None:
    """Give the command line this command."""
    app.command(epilog=EXIT_CODES)(bench)


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Models, or .onnx files.")],
    input: InputShapes = None,
    batch: Annotated[list[int] | None, typer.Option(help="Rows in a batch. Once for each to time.", min=1)] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Processor threads to time with. Once for each number.", min=1)
    ] = None,
    seconds: Annotated[float, typer.Option(help="About how long to time each.", min=0.01)] = 1.0,
    openings: Annotated[
        int, typer.Option(help="How many times files are opened, each for a share of the time.", min=1)
    ] = 3,
    compile: Annotated[bool, typer.Option("--compile", help="Time torch.compile of each model too.")] = False,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="What runs the files: cpu, cuda, tensorrt, openvino, or an execution provider of ONNX Runtime. "
            "Once for each to time."
        ),
    ] = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Measure memory and load time too, each in a process of its own.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the latencies, or the throughput by batch.")
    ] = None,
    pretrained: Pretrained = False,
    seed: Seed = 0,
    trust: Trust = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Time models and ONNX files side by side on this machine, all with the same input.

    Ratios are to the first; where its interval holds 1, there is no difference.

    Example: torchtrim bench timm:resnet18 resnet18.onnx --batch 1 --batch 8 --threads 1
    """
    import torchtrim as tt
    from torchtrim.bench.figure import figure
    from torchtrim.graph.inputs import Inputs

    if plot is not None:
        figure(1, 1)  # before the work, not after it
    candidates: dict[str, Any] = {}
    x = Inputs(tensors(input, seed)) if input else None
    for name in models:
        if name.endswith(".onnx"):
            wanted = provider or ["cpu"]
            for each in wanted:
                candidates[name if len(wanted) == 1 else f"{name} ({each})"] = tt.OnnxFile(name, each)
            continue
        named = load_named(name, pretrained, None, seed, trust)
        candidates[name] = named.model
        x = x or example(named, None, seed)
    result = tt.benchmark(
        candidates,
        x,
        batches=batch,
        thread_counts=threads,
        seconds=seconds,
        openings=openings,
        compile=compile,
        memory=memory,
    )
    show(result, json)
    if plot is not None:
        result.plot(plot)
        typer.echo(f"drawn: {plot}", err=True)
