"""A model cut by `tt.cut` trains as the same model truncated by hand: the loss curves of five SGD steps.

    python benchmarks/train_truth.py              # five models, 5 steps, batch 8
    python benchmarks/train_truth.py --quick      # two models, batch 4

Both get the same weights, head and data, and the same seed before each step, in float32 and in train mode,
with stochastic depth and dropout at work. Fails where a loss, a weight or a batch-norm statistic differs by more than
1e-5 (relative). Also trains the cut model with one wrong thing (eval mode), to show that the comparison can fail.
Writes `train_truth.json` and `train_truth.md`.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from truncated_by_hand import CASES, Case
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

QUICK = ("timm ghostnet_100", "timm convnext_atto")
TOLERANCE = 1e-5
CLASSES = 10


class WithHead(nn.Module):
    """A backbone with average pooling and a linear layer."""

    def __init__(self, backbone: nn.Module, head: nn.Linear, dims: tuple[int, int]) -> None:
        super().__init__()
        self.backbone, self.head, self.dims = backbone, head, dims

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x).mean(self.dims))


def main() -> int:
    made = parser(__doc__)
    made.add_argument("--steps", type=int, default=5, help="SGD steps (5)")
    options = made.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    wanted = QUICK if options.quick else tuple(CASES)
    results = []
    for name in track(wanted, "models", disable=not sys.stderr.isatty()):
        results.append(compare(name, CASES[name], options.steps, 4 if options.quick else 8))
    stem = "train_truth_quick" if options.quick else "train_truth"
    write(stem, {"tolerance": TOLERANCE, "results": results}, table(results), out=options.out)
    return 0 if all(result["equal"] for result in results) else 1


def compare(name: str, case: Case, steps: int, batch: int) -> dict[str, Any]:
    """Train both on the same batches; the largest relative differences of losses, and of the state after."""
    torch.manual_seed(0)
    model = case.build()
    data = [(torch.randn(batch, 3, case.size, case.size), torch.randint(CLASSES, (batch,))) for _ in range(steps)]
    cut = tt.cut(model, data[0][0][:1], after=case.after)
    by_hand = case.by_hand(copy.deepcopy(model))
    with torch.no_grad():
        features = by_hand.eval()(data[0][0][:1])
    last = case.channels_last or features.shape[-1] > features.shape[1]
    head = nn.Linear(features.shape[-1 if last else 1], CLASSES)
    dims = (1, 2) if last else (2, 3)
    curves, states = {}, {}
    for kind, backbone in (("by hand", by_hand), ("tt.cut", cut), ("tt.cut, in eval mode", copy.deepcopy(cut))):
        net = WithHead(backbone, copy.deepcopy(head), dims).train(kind != "tt.cut, in eval mode")
        curves[kind] = train(net, data)
        tensors = [*net.parameters(), *net.buffers()]
        # Names differ between the two; the norms, in order of size, do not.
        states[kind] = torch.tensor(sorted(float(tensor.detach().double().norm()) for tensor in tensors))
    loss = _relative(curves["by hand"], curves["tt.cut"])
    same = len(states["by hand"]) == len(states["tt.cut"])
    state = _relative(states["by hand"].tolist(), states["tt.cut"].tolist()) if same else float("inf")
    return {
        "model": name,
        "after": case.after,
        "losses": curves,
        "loss_difference": loss,
        "state_difference": state,
        "eval_mode_difference": _relative(curves["by hand"], curves["tt.cut, in eval mode"]),
        "equal": loss <= TOLERANCE and state <= TOLERANCE,
    }


def train(net: nn.Module, data: list[tuple[Tensor, Tensor]]) -> list[float]:
    """SGD with momentum, one step a batch; the losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for step, (x, y) in enumerate(data):
        torch.manual_seed(step)
        loss = nn.functional.cross_entropy(net(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def _relative(expected: list[float], found: list[float]) -> float:
    return max(abs(a - b) / max(abs(a), 1e-8) for a, b in zip(expected, found, strict=True))


def table(results: list[dict[str, Any]]) -> Table:
    """The losses of the first and last step, and the differences."""
    rows = []
    for found in results:
        hand, cut = found["losses"]["by hand"], found["losses"]["tt.cut"]
        differences = [f"{found[f'{what}_difference']:.1e}" for what in ("loss", "state", "eval_mode")]
        curve = " ".join(f"{loss:.5f}" for loss in cut)
        verdict = "equal" if found["equal"] else "**differs**"
        rows.append(
            (
                found["model"],
                f"`{found['after']}`",
                " ".join(f"{loss:.5f}" for loss in hand),
                curve,
                *differences,
                verdict,
            )
        )
    columns = (
        "model",
        "cut after",
        "losses by hand",
        "losses of tt.cut",
        "loss",
        "weights",
        "loss in eval mode",
        "verdict",
    )
    notes = [
        "- largest relative difference to the model truncated by hand: of the losses, of the norms of weights and "
        "batch-norm statistics after the last step, and of the losses if the cut model were in eval mode; "
        f"equal: at most {TOLERANCE:g}"
    ]
    return Table("Loss curves in train mode", columns, tuple(rows), notes, left=4)


if __name__ == "__main__":
    sys.exit(main())
