"""Small models of many kinds, for sequences of random edits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Made = tuple[nn.Module, Any]


class Residual(nn.Module):
    """A residual network with one stride, a downsampling shortcut and functional activations."""

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            same = stride == 1 and inputs == outputs
            self.shortcut = nn.Identity() if same else nn.Conv2d(inputs, outputs, 1, stride)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.relu(self.bn1(self.conv1(x)))
            y = self.bn2(self.conv2(y))
            y += self.shortcut(x)
            return torch.relu(y)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.layer1 = nn.Sequential(*(self.Block(8, 8, 1) for _ in range(3)))
        self.layer2 = nn.Sequential(self.Block(8, 12, 2), self.Block(12, 12, 1))
        self.fc = nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer2(self.layer1(self.stem(x)))
        return self.fc(x.mean((2, 3)))


class Branches(nn.Module):
    """Branches joined by concatenation, dropout as a function, a flatten before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.left = nn.Conv2d(6, 4, 1)
        self.middle = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.Conv2d(6, 4, 1), nn.GELU())
        self.right = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(6, 4, 1))
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc1 = nn.Linear(48, 16)
        self.fc2 = nn.Linear(16, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        x = torch.cat([self.left(x), self.middle(x), self.right(x)], 1)
        x = torch.flatten(self.pool(x), 1)
        x = nn.functional.dropout(torch.relu(self.fc1(x)), 0.3, self.training)
        return self.fc2(x)


class Attention(nn.Module):
    """Transformer layers with pre-norm, a class token, learned positions."""

    class Layer(nn.Module):
        def __init__(self, width: int, heads: int) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(width)
            self.qkv = nn.Linear(width, 3 * width)
            self.proj = nn.Linear(width, width)
            self.norm2 = nn.LayerNorm(width)
            self.mlp = nn.Sequential(
                nn.Linear(width, 2 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(2 * width, width)
            )
            self.heads = heads

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            batch, length, width = x.shape
            q, k, v = self.qkv(self.norm1(x)).reshape(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
            y = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + self.proj(y.transpose(1, 2).reshape(batch, length, width))
            return x + self.mlp(self.norm2(x))

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 16))
        self.positions = nn.Parameter(torch.randn(1, 17, 16))
        self.blocks = nn.ModuleList(self.Layer(16, 4) for _ in range(3))
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Shared(nn.Module):
    """One layer under two names and called twice, tied weights, a buffer that is not saved."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.act = nn.Tanh()
        self.again = self.first
        self.inner = nn.Linear(8, 8)
        self.out = nn.Linear(8, 8)
        self.out.weight = self.inner.weight
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 8), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.first(x))
        x = self.act(self.again(x) * self.scale)
        return self.out(self.act(self.inner(x)))


class Recurrent(nn.Module):
    """An embedding, a GRU and an LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.proj = nn.Linear(6, 8)
        self.gru = nn.GRU(8, 8, batch_first=True)
        self.lstm = nn.LSTM(8, 5, batch_first=True, bidirectional=True)
        self.fc = nn.Linear(10, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x, _ = self.gru(torch.relu(self.proj(self.embed(ids))))
        x, _ = self.lstm(x)
        return self.fc(x[:, -1])


class TwoWays(nn.Module):
    """Two inputs, two outputs in a dict, an auxiliary head in train mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
        self.right = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8))
        self.trunk = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU())
        self.one = nn.Linear(8, 3)
        self.two = nn.Linear(8, 2)
        self.aux = nn.Linear(8, 3)

    def forward(self, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
        joint = self.left(a) + self.right(b)
        x = self.trunk(joint)
        found = {"one": self.one(x), "two": self.two(x)}
        if self.training:
            found["aux"] = self.aux(joint)
        return found


def _plain() -> Made:
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 8, 3, padding=1, groups=2), nn.GroupNorm(2, 8), nn.SiLU(), nn.Dropout(0.2)]
    layers += [nn.Flatten(), nn.Linear(8 * 64, 10), nn.ReLU(), nn.Linear(10, 4)]
    return nn.Sequential(*layers), torch.randn(2, 3, 16, 16)


MODELS: dict[str, Callable[[], Made]] = {
    "plain": _plain,
    "residual": lambda: (Residual(), torch.randn(2, 3, 16, 16)),
    "branches": lambda: (Branches(), torch.randn(2, 3, 12, 12)),
    "attention": lambda: (Attention(), torch.randn(2, 3, 16, 16)),
    "shared": lambda: (Shared(), torch.randn(2, 8)),
    "recurrent": lambda: (Recurrent(), torch.randint(0, 11, (2, 7))),
    "two_ways": lambda: (TwoWays(), (torch.randn(2, 6), torch.randn(2, 4))),
}


def make(name: str, seed: int = 0) -> Made:
    """A model of that name, trained by nobody, always the same; its inputs."""
    torch.manual_seed(seed)
    model, inputs = MODELS[name]()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    return model.eval(), inputs
