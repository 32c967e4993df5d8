"""What does gradual sparsity cost in a training step? The target is 1.03 times a plain step, or less.

    python benchmarks/sparse_overhead.py            # ResNet-50 on 224 pixels, a few minutes
    python benchmarks/sparse_overhead.py --quick    # a small residual network, seconds

One model and one optimizer (SGD with momentum) train on random pictures. Rounds alternate: a plain step (forward,
backward, `optimizer.step()`), and the same followed by `MagnitudePruner.step()` with 80% of the weights at zero and the
momentum masked too. The ratio is the median, over the rounds, of one over the other beside it. A step at which weights
are chosen costs more: it is timed by itself, and spread over the 100 steps that lie between two of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

EVERY = 100
TARGET = 1.03


class Small(nn.Module):
    """A residual network that is small enough for seconds."""

    def __init__(self, width: int = 64, units: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, 2, 1)
        self.units = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(units))
        self.fc = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu()
        for unit in self.units:
            x = x + unit(x).relu()
        return self.fc(x.mean((2, 3)))


def resnet50() -> nn.Module:
    from torchvision.models import resnet50 as make

    return make(weights=None)


def seconds(call: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measured(
    make: Callable[[], nn.Module], batch: int, pixels: int, rounds: int, device: torch.device
) -> dict[str, Any]:
    torch.manual_seed(0)
    model = make().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x, y = torch.randn(batch, 3, pixels, pixels, device=device), torch.arange(batch, device=device) % 10

    def plain() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()

    plain()
    chosen: list[float] = []
    for settings in ({}, {"scope": "global"}):
        choosing = tt.MagnitudePruner(model, tt.PolynomialDecay(0.1, 0.8, end=10**6, every=1), **settings)  # type: ignore[arg-type]
        chosen.append(median(seconds(choosing.step, device) for _ in range(3)))
    pruner = tt.MagnitudePruner(model, tt.OneShotSparsity(0.8), optimizer=optimizer)
    pruner.step()

    def pruned() -> None:
        plain()
        pruner.step()

    pairs = []
    for number in range(rounds):
        first, second = (plain, pruned) if number % 2 else (pruned, plain)
        times = {first: seconds(first, device), second: seconds(second, device)}
        pairs.append((times[plain], times[pruned]))
    alone = median(seconds(pruner.step, device) for _ in range(max(rounds, 10)))
    step = median(plain_time for plain_time, _ in pairs)
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "batch": batch,
        "pixels": pixels,
        "rounds": rounds,
        "plain_s": step,
        "ratio_of_rounds": median(with_pruner / without for without, with_pruner in pairs),
        "masks_s": alone,
        "choose_uniform_s": chosen[0],
        "choose_global_s": chosen[1],
        "ratio_masks": 1 + alone / step,
        "ratio_uniform": 1 + (alone * (EVERY - 1) + chosen[0]) / EVERY / step,
        "ratio_global": 1 + (alone * (EVERY - 1) + chosen[1]) / EVERY / step,
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, help="pairs of steps (8 at full size)")
    arguments.add_argument("--batch", type=int, help="pictures in a batch (32 at full size)")
    arguments.add_argument("--device", default="cpu", help="cpu or cuda")
    given = arguments.parse_args()
    device = torch.device(given.device)
    if given.quick:
        name, found = "small", measured(Small, given.batch or 32, 64, given.rounds or 20, device)
    else:
        name, found = "ResNet-50", measured(resnet50, given.batch or 32, 224, given.rounds or 8, device)
    row = (
        f"{name}, {found['batch']} x {found['pixels']} px",
        f"{found['parameters'] / 1e6:.1f}",
        f"{1e3 * found['plain_s']:.1f}",
        f"{1e3 * found['masks_s']:.2f}",
        f"{1e3 * found['choose_uniform_s']:.0f} / {1e3 * found['choose_global_s']:.0f}",
        f"{found['ratio_of_rounds']:.3f}",
        f"{found['ratio_uniform']:.4f} / {found['ratio_global']:.4f}",
    )
    columns = ("model", "M params", "plain step, ms", "masks, ms", "choosing, ms", "ratio of rounds", "ratio, all told")
    notes = [
        f"- choosing and the last ratio: per layer / all layers together, once in {EVERY} steps",
        f"- {'met' if found['ratio_global'] <= TARGET else 'missed'}: at most {TARGET} times a plain step",
    ]
    stem = "sparse_overhead" + ("_quick" if given.quick else "") + ("" if device.type == "cpu" else f"_{device.type}")
    write(stem, found, Table("A training step with and without the pruner", columns, (row,), notes), out=given.out)


if __name__ == "__main__":
    main()
