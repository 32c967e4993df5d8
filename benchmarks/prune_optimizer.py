"""An optimizer with momentum across three prunings: does the loss go on as if nothing had happened to the optimizer?

    python benchmarks/prune_optimizer.py            # a minute or two on one core
    python benchmarks/prune_optimizer.py --quick

A small residual network learns scikit-learn's digits. Three times in the middle a quarter of its channels are pruned in
place and `sync_optimizer` brings the optimizer up to date. Beside it, from each of these moments on, the same network
goes on with two other optimizers: one freshly made, with a copy of the state that was narrowed in another way (the
momentum is written into a model in place of its weights, and that model is pruned by the same record), and one freshly
made without a state. The first must give the same losses to the last bit.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from written import parser, write

import torchtrim as tt
from torchtrim.bench.table import Table

MAKERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD, momentum 0.9": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=1e-4),
    "AdamW": lambda params: torch.optim.AdamW(params, lr=2e-3, weight_decay=0.01),
    "AdamW, amsgrad": lambda params: torch.optim.AdamW(params, lr=2e-3, amsgrad=True),
    "RMSprop, momentum 0.9": lambda params: torch.optim.RMSprop(params, lr=5e-4, momentum=0.9),
    "Adafactor": lambda params: torch.optim.Adafactor(params, lr=1e-2),
}
EXAMPLE = torch.zeros(2, 1, 8, 8)
ROWS = 64


class Block(nn.Module):
    """A residual unit."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def network() -> nn.Module:
    stem = nn.Sequential(nn.Conv2d(1, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU())
    down = nn.Sequential(nn.Conv2d(64, 128, 3, 2, 1, groups=4, bias=False), nn.BatchNorm2d(128), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10))
    return nn.Sequential(stem, Block(64), down, Block(128), head)


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 8 - 1
    y = torch.tensor(found.target)
    generator = torch.Generator().manual_seed(0)
    while True:
        for rows in torch.randperm(len(x), generator=generator).split(ROWS)[:-1]:
            yield x[rows], y[rows]


def train(
    net: nn.Module, optimizer: torch.optim.Optimizer, data: list[tuple[torch.Tensor, torch.Tensor]]
) -> list[float]:
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def pruned(net: nn.Module, optimizer: torch.optim.Optimizer, make: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Prune in place; returns a copy of the network with a fresh optimizer whose state was narrowed by the record."""
    names = dict(net.named_parameters())
    keys = {key for state in optimizer.state.values() for key in state}
    twins = {}
    for key in keys:
        twin = copy.deepcopy(net)
        for name, held in twin.named_parameters():
            value = optimizer.state[names[name]].get(key)
            if isinstance(value, torch.Tensor) and value.dim() == held.dim():
                held.data = value.detach().expand_as(held).clone()
        twins[key] = twin
    plain = {key: {name: optimizer.state[each].get(key) for name, each in names.items()} for key in keys}
    tt.prune_channels(net, EXAMPLE, 0.25, copy=False)
    tt.sync_optimizer(optimizer, net)
    record = tt.history(net).edits[-1]
    twins = {key: tt.apply(twin, EXAMPLE, record, check=False) for key, twin in twins.items()}
    other = copy.deepcopy(net)
    fresh = make(other.parameters())
    for name, parameter in other.named_parameters():
        for key in keys:
            value = plain[key][name]
            if isinstance(value, torch.Tensor) and value.dim() == parameter.dim():
                narrow = twins[key].get_parameter(name).detach()
                # A sum along a dimension was spread over it.
                value = narrow[tuple(slice(0, 1) if size == 1 else slice(None) for size in value.shape)].clone()
            elif isinstance(value, torch.Tensor):
                value = value.clone()
            if key in optimizer.state[names[name]]:
                fresh.state[parameter][key] = value
    return other, fresh


def main() -> int:
    options = parser(__doc__).parse_args()
    steps = 10 if options.quick else 60
    makers = dict(list(MAKERS.items())[:2]) if options.quick else MAKERS
    stream = batches()
    data = [[next(stream) for _ in range(steps)] for _ in range(4)]
    rows, results = [], []
    for name, make in makers.items():
        torch.manual_seed(0)
        net = network()
        optimizer = make(net.parameters())
        before = train(net, optimizer, data[0])
        for number in (1, 2, 3):
            other, copied = pruned(net, optimizer, make)
            without = copy.deepcopy(net)
            bare = make(without.parameters())
            held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            complete = held == set(net.parameters()) and set(optimizer.state) == held
            after = train(net, optimizer, data[number])
            copies = train(other, copied, data[number])
            bares = train(without, bare, data[number])
            apart = max(abs(a - b) for a, b in zip(after, copies, strict=True))
            row = {
                "optimizer": name,
                "pruning": number,
                "parameters": sum(parameter.numel() for parameter in net.parameters()),
                "complete": complete,
                "largest_difference": apart,
                "loss_before": sum(before[-5:]) / 5,
                "loss_synced": sum(after[:5]) / 5,
                "loss_without_state": sum(bares[:5]) / 5,
                "loss_synced_end": sum(after[-5:]) / 5,
            }
            results.append(row)
            numbers = (row["loss_before"], row["loss_synced"], row["loss_without_state"], row["loss_synced_end"])
            told = ("yes" if complete else "NO", f"{apart:g}", *(f"{each:.4f}" for each in numbers))
            rows.append((name, str(number), f"{row['parameters']:,}", *told))
            print(rows[-1], flush=True)
            before = after
    columns = ("optimizer", "pruning", "parameters", "all in it", "apart", "before", "after", "no state", "at the end")
    notes = [
        f"- {steps} steps before the first pruning and after each; losses are means of 5 steps",
        "- apart: the largest difference of a loss from that with a fresh optimizer and a copy of the state",
        "- no state: a fresh optimizer without one",
    ]
    table = Table("An optimizer across three prunings of a quarter of the channels", columns, tuple(rows), notes)
    write("prune_optimizer_quick" if options.quick else "prune_optimizer", {"rows": results}, table, out=options.out)
    return 0 if all(row["complete"] and row["largest_difference"] == 0 for row in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
