"""A plain training loop, as a user of torchtrim would write it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from torchtrim.demo.digits import Digits

_BATCH = 32


@dataclass(frozen=True)
class Epoch:
    """One pass over the training pictures.

    Attributes:
        phase: What was trained: `head` or `last blocks`.
        loss: Mean cross-entropy on the training pictures, while they were learnt.
        accuracy: Share of the held-out pictures that were right afterwards.
    """

    phase: str
    loss: float
    accuracy: float


def train(
    net: nn.Module, groups: list[dict[str, object]], digits: Digits, *, phase: str, epochs: int, seed: int
) -> Iterator[Epoch]:
    """Train `net` with AdamW and one cycle of the learning rate, and yield after every epoch.

    Args:
        net: The model; only what `groups` holds is trained.
        groups: Parameter groups, each with its learning rate.
        digits: What to train on, and what to measure on.
        phase: The name the epochs are told under.
        epochs: Passes over the training pictures.
        seed: Seed of the order of the pictures.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(groups)
    steps = epochs * -(-len(digits.train_labels) // _BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in optimizer.param_groups], total_steps=steps
    )
    for _ in range(epochs):
        net.train()
        losses = []
        for rows in torch.randperm(len(digits.train_labels), generator=generator).split(_BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(digits.train_images[rows]), digits.train_labels[rows])
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        yield Epoch(phase, sum(losses) / len(losses), accuracy(net.eval(), digits))


def accuracy(predict: Callable[[torch.Tensor], torch.Tensor], digits: Digits) -> float:
    """The share of the held-out pictures whose largest logit is the right one."""
    with torch.no_grad():
        answers = torch.cat([predict(images).argmax(1) for images in digits.test_images.split(_BATCH)])
    return (answers == digits.test_labels).float().mean().item()
