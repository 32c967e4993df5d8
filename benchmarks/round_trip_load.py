"""The loading half of `round_trip.py`: one file in one new process, that has imported torch and nothing else."""

from __future__ import annotations

import copy
import resource
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from isolated import Report
from torch import nn


def load_trim(name: str, report: Report, stem: Path) -> None:
    """Load the `.trim` file; a detector's backbone, which no zoo makes by itself, is given."""

    def load(path: Path) -> nn.Module:
        import torchtrim as tt

        return tt.load(path, model=_backbone(name) if name.startswith("detection:") else None)

    _loaded(report, stem, "trim", load)


def _backbone(name: str) -> nn.Module:
    from torchvision.models import get_model

    backbone: nn.Module = get_model(name.partition(":")[2], weights=None, weights_backbone=None).backbone
    return backbone


def load_pickle(name: str, report: Report, stem: Path) -> None:
    """Load the pickled model."""
    _loaded(report, stem, "pt", lambda path: torch.load(path, weights_only=False))


def _loaded(report: Report, stem: Path, kind: str, load: Callable[[Path], nn.Module]) -> None:
    quiet()
    path = stem.with_suffix(f".{kind}")
    _read_once(path)
    before, peak = psutil.Process().memory_info().rss, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found: dict[str, Any] = {}
    try:
        began = time.perf_counter()
        net = load(path)
        found[f"{kind}_first_s"] = time.perf_counter() - began
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        # A peak that was there before hides a smaller one.
        found[f"{kind}_peak_mb"] = (after - before) / 1e6 if after > peak else 0.0
        expected = torch.load(stem.with_suffix(".expected"), weights_only=True)
        if sums(net) != expected["sums"]:
            raise RuntimeError("a parameter or a buffer differs")
        for ours, theirs in zip(outputs(net, expected["x"]), expected["outputs"], strict=True):
            if not same(ours, theirs):
                raise RuntimeError("an output differs")
        times = []
        for _ in range(3):
            began = time.perf_counter()
            load(path)
            times.append(time.perf_counter() - began)
        found[f"{kind}_s"] = min(times)
    except Exception as error:  # noqa: BLE001 (whatever is raised is the result)
        found["error"] = f"{kind}: {type(error).__name__}: {error}"[:600]
    report("loaded", found)


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two outputs are equal to the bit, where neither is a number too."""
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        return False
    return bool(((ours == theirs) | (ours.isnan() & theirs.isnan())).all())


def load_both(name: str, report: Report, folder: Path, edits: list[str]) -> None:
    """Load every file of a model, one after the other: compared to the bit, and timed beside the pickled one."""
    for edit in edits:
        found: dict[str, Any] = {}
        for loader, kind in ((load_trim, "trim"), (load_pickle, "pt")):
            told: dict[str, Any] = {}
            loader(name, lambda _, reported, told=told: told.update(reported), folder / edit)
            found |= {key: value for key, value in told.items() if key in ("error", f"{kind}_s")}
        report(edit, found)


def _read_once(path: Path) -> None:
    """Bring a file into the page cache, in little memory: no load is to wait for the disk."""
    with path.open("rb") as file:
        while file.read(2**20):
            pass


def sums(net: nn.Module) -> dict[str, str]:
    """A checksum of each parameter and buffer (those no `state_dict` has, too), with its type and shape."""
    tensors = [*net.named_parameters(remove_duplicate=False), *net.named_buffers(remove_duplicate=False)]
    return {name: f"{tensor.dtype}{list(tensor.shape)}{_crc(tensor)}{tensor.requires_grad}" for name, tensor in tensors}


def _crc(tensor: torch.Tensor) -> int:
    return zlib.crc32(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def outputs(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """What a model computes in eval mode, and in train mode with the same random numbers."""
    return [*_outputs(net, x, training=False), *_outputs(net, torch.cat([x, x * 0.5]), training=True)]


def _outputs(net: nn.Module, x: torch.Tensor, training: bool) -> list[torch.Tensor]:
    tried = copy.deepcopy(net).train(training)  # one at a time: some take gigabytes
    torch.manual_seed(0)
    with torch.no_grad():
        return [leaf for leaf in torch.utils._pytree.tree_leaves(tried(x)) if isinstance(leaf, torch.Tensor)]


def quiet() -> None:
    """One thread, and no warnings of foreign packages."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
