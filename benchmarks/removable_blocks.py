"""Every residual block or layer of seven networks: taken out, run in both modes, and exported to ONNX.

    python benchmarks/removable_blocks.py                # all, one after the other (an hour on two cores)
    python benchmarks/removable_blocks.py --quick        # the first block of each stage of two small networks
    python benchmarks/removable_blocks.py convnext_atto  # only these networks (nothing is written)

A block is taken out with `tt.remove(..., adapter=None)`, which compares the result with the original in which hooks
stand in for the block, in eval and train mode, at several batch sizes and another size of picture, gradients too. One
that is refused says both shapes; these are looked up by hooks of this script's own, and must be the right ones. It is
then taken out again with the adapter that `adapter="auto"` chooses. Each result is exported with `tt.export_onnx`,
which runs the file in ONNX Runtime against the PyTorch model. Weights are random, pictures small. A run that is stopped
goes on where it was. Writes `removable_blocks.json` and `removable_blocks.md`.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table
from torchtrim.edits.remove import Remove, remove

# name: (how to make it, side of the picture, the blocks)
NETWORKS: dict[str, tuple[str, int, str]] = {
    "convnext_atto": ("timm:convnext_atto", 64, "stages.?.blocks.?"),
    "mobilenetv3": ("timm:mobilenetv3_small_100", 64, "blocks.?.?"),
    "vit_tiny": ("timm:vit_tiny_patch16_224", 64, "blocks.*"),
    "maxvit_pico": ("timm:maxvit_pico_rw_256", 64, "stages.?.blocks.?"),
    "resnet50": ("timm:resnet50", 64, "layer?.?"),
    "swin_t": ("torchvision:swin_t", 64, "features.[1357].?"),
    "densenet121": ("torchvision:densenet121", 64, "features.denseblock?.denselayer*"),
}


def made(name: str) -> tuple[nn.Module, torch.Tensor]:
    """The network with random weights, in eval mode, and pictures for it."""
    torch.manual_seed(0)
    (source, _, model), side = NETWORKS[name][0].partition(":"), NETWORKS[name][1]
    if source == "timm":
        import timm

        sized = {"img_size": side} if "vit" in model else {}
        net = timm.create_model(model, **sized)
    else:
        import torchvision

        net = torchvision.models.get_model(model)
    return net.eval(), torch.randn(2, 3, side, side)


def blocks(name: str, model: nn.Module) -> list[str]:
    """The paths of its blocks."""
    pattern = NETWORKS[name][2]
    return [
        path
        for path, _ in model.named_modules()
        if path.count(".") == pattern.count(".") and fnmatchcase(path, pattern)
    ]


def shapes(model: nn.Module, path: str, x: torch.Tensor) -> tuple[list[int], list[int]]:
    """What goes into a block and what comes out; of a list of values the first."""
    seen: list[tuple[list[int], list[int]]] = []

    def look(_module: nn.Module, args: Any, output: torch.Tensor) -> None:
        value = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
        seen.append((list(value.shape), list(output.shape)))

    handle = model.get_submodule(path).register_forward_hook(look)
    with torch.no_grad():
        model(x)
    handle.remove()
    return seen[0]


def exported(net: nn.Module, x: torch.Tensor) -> str:
    """Export it; `"yes"`, or why not."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            tt.export_onnx(net.eval(), x, Path(folder) / "net.onnx", benchmark=False, threads=2)
        except tt.TorchTrimError as error:
            return f"{type(error).__name__}: {str(error)[:200]}"
    return "yes"


def one(model: nn.Module, path: str, x: torch.Tensor) -> dict[str, Any]:
    """Take one block out, both ways; what came of it."""
    before, after = shapes(model, path, x)
    row: dict[str, Any] = {"path": path, "before": before, "after": after}
    began = time.perf_counter()
    try:
        net = remove(model, x, path, adapter=None)
        row |= {"plain": "removed"}
    except tt.EditError as error:
        told = (error.found, error.expected) == (before, after)
        row |= {"plain": "refused, with the right shapes" if told else f"refused: {error}"}
        try:
            net = remove(model, x, path)
        except tt.TorchTrimError as failed:
            return row | {"how": f"{type(failed).__name__}: {failed}"}
    row["seconds"] = round(time.perf_counter() - began, 1)
    entry = tt.history(net).entries[-1]
    record = entry.edit
    if not isinstance(record, Remove):
        raise TypeError(f"the last edit is a {type(record).__name__}")
    row["how"] = record.taken[0].how
    row["adapter"] = " ".join(str(record.adapters[path]).split()) if record.adapters else ""
    row["checked"] = list(entry.checked)
    row["params"] = [entry.params_before, entry.params_after]
    row["exported"] = exported(net, x)
    return row


def table(found: dict[str, list[dict[str, Any]]]) -> Table:
    """A row for each network."""
    rows = []
    for name, each in found.items():
        count: Callable[[Callable[[dict[str, Any]], bool]], str] = lambda fits, each=each: str(  # noqa: E731
            sum(map(fits, each))
        )
        wrong = [row["path"] for row in each if row.get("exported") != "yes"]
        rows.append(
            (
                name,
                str(len(each)),
                count(lambda row: row["plain"] == "removed"),
                count(lambda row: row["plain"].startswith("refused, with")),
                count(lambda row: bool(row.get("adapter"))),
                count(lambda row: all("equal" in line for line in row.get("checked", ["no"])[:3])),
                count(lambda row: row.get("exported") == "yes"),
                ", ".join(wrong) or "-",
            )
        )
    return Table(
        "Blocks taken out one at a time",
        (
            "network",
            "blocks",
            "removed as they are",
            "refused, with the right shapes",
            "of these repaired by an adapter",
            "equal to the hooked original in both modes",
            "exported and verified",
            "not exported",
        ),
        tuple(rows),
        left=1,
    )


def main() -> None:
    """Run it."""
    options = parser(__doc__)
    options.add_argument("networks", nargs="*", help="only these")
    given = options.parse_args()
    names = given.networks or (["convnext_atto", "vit_tiny"] if given.quick else list(NETWORKS))
    partial = given.out / "removable_blocks.partial.json"
    whole = not given.networks and not given.quick
    found: dict[str, list[dict[str, Any]]] = json.loads(partial.read_text()) if whole and partial.exists() else {}
    for name in names:
        model, x = made(name)
        paths = blocks(name, model)[:: 3 if given.quick else 1]
        rows = found.setdefault(name, [])
        for path in paths[len(rows) :]:
            rows.append(one(model, path, x))
            print(name, path, rows[-1]["plain"], rows[-1].get("adapter"), rows[-1].get("exported"), file=sys.stderr)
            if whole:
                partial.parent.mkdir(parents=True, exist_ok=True)
                partial.write_text(json.dumps(found))
    if whole:
        write("removable_blocks", {"networks": found}, table(found), out=given.out)
        partial.unlink()
    else:
        print(table(found).text())


if __name__ == "__main__":
    main()
