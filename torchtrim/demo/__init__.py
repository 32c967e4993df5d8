"""The demo: one real model, from ImageNet to handwritten digits to a verified ONNX file."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

from torchtrim.bench.latency import benchmark
from torchtrim.bench.machine import machine
from torchtrim.bench.session import OnnxSession
from torchtrim.demo.digits import Digits, load_digits
from torchtrim.demo.lite0 import efficientnet_lite0, require_packages
from torchtrim.demo.picture import draw
from torchtrim.demo.stages import DemoResult, Stage
from torchtrim.demo.training import Epoch, accuracy, train
from torchtrim.edits.cut import cut
from torchtrim.edits.head import attach_head
from torchtrim.errors import InputError
from torchtrim.export.onnx import export_onnx
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.inputs import Inputs
from torchtrim.train.freeze import freeze, unfreeze
from torchtrim.train.groups import param_groups

_CUT = "blocks.4"
_PIXELS = 64
_THREADS = 1
_HEAD_EPOCHS, _BLOCK_EPOCHS = 4, 5


def run_demo(out: str | Path = "demo-output", *, seed: int = 0) -> DemoResult:
    """Cut a pretrained EfficientNet-Lite0, train it on digits, and ship it as ONNX.

    The model is cut after `blocks.4` and given a head for ten digits; the head is trained first, then the last blocks
    with it; what comes out is written as fp32 and as dynamic int8 ONNX, each verified against the model and timed.

    Args:
        out: The folder for the two ONNX files, `demo.png` and `demo.json`; made when it is missing.
        seed: Seed of the head's first weights and of the order of the pictures.

    Raises:
        MissingDependency: The packages of the extra `demo` are not installed.
        InputError: The folder cannot be made or written.
    """
    require_packages()
    start = time.perf_counter()
    folder = _make_folder(Path(out))
    with kept_random_state(), _one_thread():
        torch.manual_seed(seed)
        digits = load_digits(_PIXELS)
        original = efficientnet_lite0()
        net = attach_head(cut(original, digits.test_images[:2], after=_CUT), digits.test_images[:2], num_classes=10)
        curve = list(_train(net, digits, seed))
        exported = _export(net, digits, folder)
        stages = _stages(original, net, exported, curve, digits)
    files = {**exported, "picture": folder / "demo.png", "figures": folder / "demo.json"}
    draw(stages, curve, f"EfficientNet-Lite0, cut after {_CUT} and trained on handwritten digits", files["picture"])
    result = DemoResult(stages, tuple(curve), machine(), _THREADS, time.perf_counter() - start, files)
    files["figures"].write_text(json.dumps(result.to_dict(), indent=2), encoding="utf-8")
    return result


def _train(net: nn.Module, digits: Digits, seed: int) -> Iterator[Epoch]:
    """The head first, while the backbone is frozen; then the last blocks with it, more slowly."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("training the head", total=_HEAD_EPOCHS + _BLOCK_EPOCHS)

        def told(epochs: Iterator[Epoch]) -> Iterator[Epoch]:
            for epoch in epochs:
                text = f"training: {epoch.phase}, held-out accuracy {epoch.accuracy:.1%}"
                progress.update(task, description=text, advance=1)
                yield epoch

        freeze(net, upto=_CUT)
        groups = param_groups(net, lr=1e-2)
        yield from told(train(net, groups, digits, phase="head", epochs=_HEAD_EPOCHS, seed=seed))
        unfreeze(net, _CUT)
        groups = param_groups(net, lr=2e-3, layer_decay=0.75, weight_decay=0.05)
        yield from told(train(net, groups, digits, phase="last blocks", epochs=_BLOCK_EPOCHS, seed=seed + 1))


def _export(net: nn.Module, digits: Digits, folder: Path) -> dict[str, Path]:
    """The two files, by stage; each was run against the model before it was kept.

    Dynamic int8 takes the linear layers, which in this model is the head alone.
    """
    files = {"fp32 file": folder / "digits-fp32.onnx", "int8 file": folder / "digits-int8.onnx"}
    for path, quantize in zip(files.values(), (None, "dynamic"), strict=True):
        export_onnx(net, digits.test_images[:2], path, quantize=quantize, overwrite=True, benchmark=False)
    return files


def _stages(
    original: nn.Module, net: nn.Module, files: dict[str, Path], curve: list[Epoch], digits: Digits
) -> tuple[Stage, ...]:
    """What each stage costs; all are timed in one run, taking turns."""
    times = benchmark({"original": original, "net": net, **files}, digits.test_images[:1], threads=_THREADS)
    head_only = [epoch.accuracy for epoch in curve if epoch.phase == "head"][-1]
    in_torch = [
        ("original", original, times["original"], None),
        ("cut, new head", net, times["net"], head_only),
        ("fine-tuned", net, times["net"], curve[-1].accuracy),
    ]
    stages = [
        Stage(name, "PyTorch", _megabytes(model), sum(p.numel() for p in model.parameters()), time.median_ms, right)
        for name, model, time, right in in_torch
    ]
    for stage, path in files.items():
        right = accuracy(_predictor(path), digits)
        stages.append(Stage(stage, "ONNX Runtime", path.stat().st_size / 1e6, None, times[stage].median_ms, right))
    return tuple(stages)


def _predictor(path: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    session = OnnxSession(path, threads=_THREADS)
    return lambda images: torch.from_numpy(session.run(session.feed(Inputs.of(images)))[0])


@contextmanager
def _one_thread() -> Iterator[None]:
    """With pictures this small a second thread gains little, and where the processor is busy it loses much."""
    before = torch.get_num_threads()
    torch.set_num_threads(_THREADS)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _megabytes(model: nn.Module) -> float:
    tensors = (*model.parameters(), *model.buffers())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6


def _make_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"the folder cannot be made: {error.strerror}", path=folder) from error
    if not os.access(folder, os.W_OK):
        raise InputError("the folder cannot be written to", path=folder)
    return folder
