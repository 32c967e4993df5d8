"""What does `tt.finetune` cost over the loop that one writes by hand, and how much memory does it take?

    python benchmarks/finetune_speed.py --device cuda    # ResNet-50 and ViT-S in bf16, batch 128, minutes
    python benchmarks/finetune_speed.py --quick          # a tiny network on a processor, a minute

Three trainings take turns: by hand (autocast, AdamW, a cosine schedule), `tt.finetune` with the same settings, and
`tt.finetune` with a pruner on its way to 80% zeros, which decides anew every 100 steps (with fewer in an epoch, at its
start and its end). All have their batches in memory. The times are of whole epochs, the first of each left out. Ratios
are medians of the rounds' ratios. Memory on a GPU is the peak that torch allocated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import timm
import torch
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

MODELS = ("resnet50", "vit_small_patch16_224")


class Batches:
    """The same random batch again and again, where the model is."""

    def __init__(self, rows: int, pixels: int, steps: int, device: torch.device) -> None:
        self._x = torch.randn(rows, 3, pixels, pixels, device=device)
        self._y, self._steps = torch.arange(rows, device=device) % 10, steps

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return ((self._x, self._y) for _ in range(self._steps))


def by_hand(net: nn.Module, batches: Batches, device: torch.device) -> None:
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4)
    steps = len(batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 0.5 * (1 + math.cos(math.pi * at / steps)))
    net.train()
    total = torch.zeros((), device=device)
    for x, y in batches:
        with torch.autocast(device.type, torch.bfloat16):
            loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        total += loss.detach()
    total.item()


def ours(net: nn.Module, batches: Batches, device: torch.device, **options: Any) -> None:
    tt.finetune(net, batches, epochs=1, lr=1e-4, precision="bf16", keep="last", **options)


def pruned(net: nn.Module, batches: Batches, device: torch.device) -> None:
    ours(net, batches, device, pruner=tt.PolynomialDecay(0.2, 0.8, end=len(batches)))


WAYS: dict[str, Callable[[nn.Module, Batches, torch.device], None]] = {
    "by hand": by_hand, "finetune": ours, "finetune, pruning": pruned,
}  # fmt: skip


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--device", default="cpu")
    made.add_argument("--models", nargs="+", help=f"timm's names ({', '.join(MODELS)})")
    made.add_argument("--batch", type=int, help="pictures in a batch")
    made.add_argument("--steps", type=int, help="steps in an epoch")
    made.add_argument("--rounds", type=int, default=5)
    options = made.parse_args()
    device = torch.device(options.device)
    models = options.models or (("test_resnet", "test_vit") if options.quick else MODELS)
    found = {
        name: measured(
            name, options.batch or (16 if options.quick else 128), options.steps or 20, options.rounds, device
        )
        for name in models
    }
    rows = tuple(
        (f"{name}: {way}", f"{each['ms']:.1f}", f"{each['ratio']:.3f}", f"{each['mb']:.0f}" if each["mb"] else "")
        for name, ways in found.items()
        for way, each in ways.items()
    )
    columns = ("model: way", "ms a step", "times by hand", "peak MB")
    stem = "finetune_speed" + ("_quick" if options.quick else "") + f"_{device.type}"
    write(stem, {"results": found}, Table("A training step, bf16", columns, rows), out=options.out)
    return 0


def measured(name: str, rows: int, steps: int, rounds: int, device: torch.device) -> dict[str, Any]:
    net = timm.create_model(name, num_classes=10).to(device)
    pixels = net.default_cfg["input_size"][-1]
    batches = Batches(rows, pixels, steps, device)
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    peaks: dict[str, float] = {}
    for number in range(rounds + 1):
        for way, run in WAYS.items():
            if device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            run(net, batches, device)
            if device.type == "cuda":
                torch.cuda.synchronize()
                peaks[way] = torch.cuda.max_memory_allocated() / 1e6
            if number:
                times[way].append((time.perf_counter() - start) / steps)
    return {
        way: {
            "ms": 1e3 * median(each),
            "ratio": median(mine / hand for mine, hand in zip(each, times["by hand"], strict=True)),
            "mb": peaks.get(way),
        }
        for way, each in times.items()
    }


if __name__ == "__main__":
    raise SystemExit(main())
