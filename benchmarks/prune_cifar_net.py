"""The CIFAR networks of He et al. (2016), section 4.2, and how they are trained and tested here."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two convolutions and a shortcut.

    Where the width grows, the published shortcut takes every second pixel and pads channels with zeros. It is a 1x1
    convolution here that starts as just that, so that channels of the residual stream can be chosen on their own on
    both sides, by any tool. It costs 0.2% of the MACs, which count.
    """

    def __init__(self, wide: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(wide, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if wide != out:
            self.shortcut = nn.Conv2d(wide, out, 1, stride, bias=False)
            with torch.no_grad():
                nn.init.zeros_(self.shortcut.weight)
                first = (out - wide) // 2
                for channel in range(wide):
                    self.shortcut.weight[first + channel, channel] = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, wide, height, width)` to `(batch, out, height / stride, width / stride)`."""
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


class CifarResNet(nn.Module):
    """`6 * blocks + 2` layers: ResNet-20 has 3 blocks in each of its stages, ResNet-56 has 9."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        wide = 16
        for stage, out in enumerate((16, 32, 64), start=1):
            several = [
                Block(wide if first else out, out, 2 if first and stage > 1 else 1)
                for first in (True, *(False,) * (blocks - 1))
            ]
            setattr(self, f"layer{stage}", nn.Sequential(*several))
            wide = out
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, 3, 32, 32)` to `(batch, 10)`."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.layer3(self.layer2(self.layer1(y)))
        return self.linear(y.mean(dim=(2, 3)))


def load_network(weights: Path) -> CifarResNet:
    """The network with weights of a safetensors file, whose keys tell how deep it is."""
    held = load_file(weights)
    blocks = 1 + max(int(name.split(".")[1]) for name in held if name.startswith("layer1."))
    net = CifarResNet(blocks)
    missing, unknown = net.load_state_dict(held, strict=False)
    wrong = [name for name in missing if "shortcut" not in name and "num_batches" not in name]
    if wrong or unknown:
        raise SystemExit(f"{weights} does not fit: missing {wrong[:3]}, unknown {unknown[:3]}")
    return net.eval()


@torch.no_grad()
def accuracy(net: nn.Module, pictures: torch.Tensor, labels: torch.Tensor, device: str) -> float:
    """The share of pictures that are read right."""
    net.to(device).eval()
    right = 0
    for start in range(0, len(pictures), 500):
        found = net(pictures[start : start + 500].to(device)).argmax(dim=1).cpu()
        right += int((found == labels[start : start + 500]).sum())
    return right / len(pictures)


def batches(
    pictures: torch.Tensor, labels: torch.Tensor, size: int, generator: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch in another order: each picture moved by up to four pixels, half of them mirrored, as is usual."""
    for chosen in torch.randperm(len(pictures), generator=generator).split(size):
        if len(chosen) < 2:
            continue
        rows, columns = (torch.randint(0, 9, (len(chosen), 1), generator=generator) for _ in range(2))
        rows, columns = rows + torch.arange(32), columns + torch.arange(32)
        mirrored = torch.rand(len(chosen), 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
        # Chosen on the processor, so that the order is the same everywhere, and looked up where the pictures are.
        chosen, rows, columns = (index.to(pictures.device) for index in (chosen, rows, columns))
        x = F.pad(pictures[chosen], (4, 4, 4, 4))
        each = torch.arange(len(chosen), device=x.device).reshape(-1, 1, 1)
        yield x.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2), labels[chosen]


def train(
    net: nn.Module,
    pictures: torch.Tensor,
    labels: torch.Tensor,
    *,
    epochs: int,
    lr: float,
    schedule: str,
    batch: int,
    device: str,
    seed: int,
    penalty: Callable[[], torch.Tensor | None] | None = None,
    after_backward: Callable[[], None] | None = None,
) -> None:
    """Plain SGD: momentum 0.9, weight decay 5e-4.

    Args:
        net: Trained in place.
        pictures: `(count, 3, 32, 32)`.
        labels: `(count,)`.
        epochs: How many.
        lr: The learning rate at the start.
        schedule: `"cosine"` to nothing, or `"steps"`: a tenth from 60% of the epochs, a hundredth from 80%.
        batch: Pictures in a batch.
        device: Where.
        seed: Of the order and the augmentation.
        penalty: Something to add to the loss; on a GPU it is captured, so that it computes the same in every step.
        after_backward: Called between backward and the step.
    """
    generator = torch.Generator().manual_seed(seed)
    net.to(device).train()
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=5e-4)
    steps = epochs * -(-len(pictures) // batch)

    def rate(step: int) -> float:
        share = step / max(steps, 1)
        if schedule == "cosine":
            return 0.5 * (1 + float(torch.cos(torch.tensor(share * torch.pi))))
        return 1.0 if share < 0.6 else 0.1 if share < 0.8 else 0.01

    def gradients(x: torch.Tensor, y: torch.Tensor) -> None:
        loss = F.cross_entropy(net(x), y)
        added = penalty() if penalty is not None else None
        (loss if added is None else loss + added).backward()

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    pictures, labels = pictures.to(device), labels.to(device)
    step = Captured(net, gradients) if torch.device(device).type == "cuda" else gradients
    for _ in range(epochs):
        for x, y in batches(pictures, labels, batch, generator):
            optimizer.zero_grad(set_to_none=step is gradients)
            step(x, y)
            if after_backward is not None:
                after_backward()
            optimizer.step()
            scheduler.step()
    net.eval()


class Captured:
    """A step's gradients as a CUDA graph: a network of many small layers waits for its launches more than it computes.

    The graph is of the first batch's shape; another (the last batch of an epoch) is computed without it. Gradients are
    always the same tensors, which the graph writes anew.

    Args:
        net: In train mode, on a GPU.
        gradients: Forward and backward of a batch.
    """

    def __init__(self, net: nn.Module, gradients: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        self._net, self._gradients = net, gradients
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """The gradients of a batch; those of the one before are to be zero."""
        if self._graph is None:
            self._capture(x, y)
        if x.shape != self._x.shape:
            self._gradients(x, y)
            return
        self._x.copy_(x)
        self._y.copy_(y)
        self._graph.replay()  # type: ignore[union-attr]

    def _capture(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self._x, self._y = x.clone(), y.clone()
        held = [buffer.clone() for buffer in self._net.buffers()]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self._net.zero_grad(set_to_none=True)
                self._gradients(self._x, self._y)
        torch.cuda.current_stream().wait_stream(stream)
        self._net.zero_grad(set_to_none=True)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._gradients(self._x, self._y)
        for buffer, value in zip(self._net.buffers(), held, strict=True):  # the statistics of those runs
            buffer.data.copy_(value)
