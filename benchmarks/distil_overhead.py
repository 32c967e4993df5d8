"""What a step of distillation costs over a step of the student plus a forward of the teacher.

    python benchmarks/distil_overhead.py              # resnet50 taught by resnet152, batch 16; 9 rounds
    python benchmarks/distil_overhead.py --quick      # resnet18 taught by resnet50, batch 8, 64 pixels; 5 rounds
    python benchmarks/distil_overhead.py --device cuda

A step is a forward, a backward and SGD with momentum. The plain side runs the student's step with cross-entropy, and
the teacher's forward in eval mode without gradients: what distillation cannot do without. The candidates take turns, so
that a busy machine slows all of them; the ratio is the median of the rounds' ratios. Beside it the same loop as people
write it by hand (soft targets without checks). Writes `distil_overhead.json` and `distil_overhead.md`.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
import torchvision
from rich.progress import track
from torch.nn import functional as F
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

TARGET = 1.05
PLAIN = "student step + teacher forward"


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, help="rounds (9; quick: 5)")
    made.add_argument("--device", default="cpu", help="cpu or cuda")
    made.add_argument("--threads", type=int, default=1, help="threads of the CPU (1)")
    options = made.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    names = ("resnet18", "resnet50") if options.quick else ("resnet50", "resnet152")
    batch, size = (8, 64) if options.quick else (16, 224)
    rounds = options.rounds or (5 if options.quick else 9)
    ms = measured(names, torch.device(options.device), batch, size, rounds)
    found = {
        name: statistics.median(a / b for a, b in zip(times, ms[PLAIN], strict=True)) for name, times in ms.items()
    }
    rows = tuple((name, f"{statistics.median(ms[name]):.1f}", f"{ratio:.3f}") for name, ratio in found.items())
    notes = [
        f"- {names[0]} taught by {names[1]}, batch {batch}, {size} x {size} on {options.device}, {rounds} rounds",
        f"- target: `tt.Distiller` {TARGET:.2f} at most; hints do more than the plain side, by their losses and layers",
    ]
    table = Table("A step of distillation", ("step", "median ms", "ratio"), rows, notes)
    stem = "distil_overhead_quick" if options.quick else "distil_overhead"
    stem += "" if options.device == "cpu" else f"_{options.device}"
    write(stem, {"models": names, "batch": batch, "size": size, "ms": ms, "ratios": found}, table, out=options.out)
    return 0


def measured(
    names: tuple[str, str], device: torch.device, batch: int, size: int, rounds: int
) -> dict[str, list[float]]:
    """Milliseconds of each candidate's step in each round."""
    x = torch.randn(batch, 3, size, size, device=device)
    y = torch.randint(0, 1000, (batch,), device=device)
    student = torchvision.models.get_model(names[0], weights=None).to(device).train()
    teacher = torchvision.models.get_model(names[1], weights=None).to(device).eval()
    hints = ["layer2", "layer3", "layer4"]
    distillers = {
        "tt.Distiller": tt.Distiller(student, teacher),
        "tt.Distiller, three hints": tt.Distiller(student, teacher, hints=hints, example_inputs=x[:2]),
    }

    def plain() -> torch.Tensor:
        with torch.no_grad():
            teacher(x)
        return F.cross_entropy(student(x), y)

    def by_hand() -> torch.Tensor:
        with torch.no_grad():
            theirs = teacher(x)
        ours = student(x)
        soft = F.kl_div(F.log_softmax(ours / 4, 1), F.softmax(theirs / 4, 1), reduction="batchmean") * 16
        return 0.5 * F.cross_entropy(ours, y) + 0.5 * soft

    candidates: dict[str, Callable[[], torch.Tensor]] = {PLAIN: plain, "soft targets by hand": by_hand}
    candidates |= {name: lambda each=each: each(x, y).loss for name, each in distillers.items()}
    extra = [p for each in distillers.values() for p in each.projections.parameters()]
    optimizer = torch.optim.SGD([*student.parameters(), *extra], lr=1e-4, momentum=0.9)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for turn in track(range(-1, rounds), "rounds", disable=not sys.stderr.isatty()):
        order = list(candidates) if turn % 2 == 0 else list(candidates)[::-1]
        for name in order:
            took = _step(candidates[name], optimizer, device)
            if turn >= 0:  # the first warms up
                times[name].append(took * 1e3)
    return times


def _step(loss: Callable[[], torch.Tensor], optimizer: torch.optim.Optimizer, device: torch.device) -> float:
    _wait(device)
    began = time.perf_counter()
    optimizer.zero_grad()
    loss().backward()
    optimizer.step()
    _wait(device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    sys.exit(main())
