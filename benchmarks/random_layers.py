"""Layers of many kinds, of random widths, for random networks: each takes `(batch, width, height, width)` maps.

A builder is given a random generator and how many channels come in; it gives a module, how many channels come out, and
whether removing a channel leaves the others as they were (no norm or sum goes over channels).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

Built = tuple[nn.Module, int, bool]
Builder = Callable[[random.Random, int], Built]
LAYERS: dict[str, Builder] = {}


def layer(builder: Builder) -> Builder:
    """Register a builder under its name."""
    LAYERS[builder.__name__.strip("_")] = builder
    return builder


class Do(nn.Module):
    """A forward written as a function of the module; modules, parameters, buffers and numbers are attributes."""

    def __init__(self, does: Callable[[Any, torch.Tensor], Any], **held: Any) -> None:
        super().__init__()
        for name, value in held.items():
            if name.startswith("buffer_"):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self.does = does

    def forward(self, x: torch.Tensor) -> Any:
        return self.does(self, x)


def width(draw: random.Random, of: int = 4) -> int:
    return of * draw.randint(max(1, 8 // of), max(2, 24 // of))


def conv(inputs: int, outputs: int, size: int = 1, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)


def values(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * 0.3)


@layer
def _plain(draw: random.Random, c: int) -> Built:
    out = width(draw)
    norm = draw.choice([nn.BatchNorm2d(out), nn.BatchNorm2d(out, affine=False), nn.Identity(), nn.PReLU(out)])
    act = draw.choice([nn.ReLU(inplace=True), nn.GELU(), nn.PReLU(), nn.Hardswish(), nn.Softplus()])
    return nn.Sequential(conv(c, out, draw.choice([1, 3]), bias=draw.random() < 0.5), norm, act), out, True


@layer
def _dilated(draw: random.Random, c: int) -> Built:
    out = width(draw)
    return nn.Sequential(nn.Conv2d(c, out, 3, padding=2, dilation=2), nn.Tanh()), out, True


@layer
def _grouped(draw: random.Random, c: int) -> Built:
    groups = draw.choice([each for each in (2, 4) if c % each == 0])
    return nn.Sequential(nn.Conv2d(c, 2 * c, 3, padding=1, groups=groups), nn.BatchNorm2d(2 * c)), 2 * c, True


@layer
def _depthwise(draw: random.Random, c: int) -> Built:
    out, times = width(draw), draw.choice([1, 2])
    return nn.Sequential(conv(c, c * times, 3, groups=c), nn.BatchNorm2d(c * times), conv(c * times, out)), out, True


@layer
def _transposed(draw: random.Random, c: int) -> Built:
    groups = draw.choice([1, 1, 2, c])
    out = c * draw.choice([1, 2]) if groups > 1 else width(draw)
    up = nn.ConvTranspose2d(c, out, 2, stride=2, groups=groups)
    return nn.Sequential(up, nn.ReLU(), nn.AvgPool2d(2)), out, True


@layer
def _volume(draw: random.Random, c: int) -> Built:
    out = width(draw)
    net = nn.Sequential(nn.Conv3d(c, out, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(out))
    return Do(lambda m, x: torch.relu(m.net(x.unsqueeze(2)).squeeze(2)), net=net), out, True


@layer
def _line(draw: random.Random, c: int) -> Built:
    out = width(draw)
    net = nn.Sequential(nn.Conv1d(c, out, 3, padding=1), nn.BatchNorm1d(out))
    return Do(lambda m, x: m.net(x.flatten(2)).unflatten(2, x.shape[2:]), net=net), out, True


@layer
def _last(draw: random.Random, c: int) -> Built:
    out = width(draw)
    norm = draw.choice([nn.LayerNorm(c), nn.RMSNorm(c), nn.Identity()])
    net = nn.Sequential(norm, nn.Linear(c, 2 * c), nn.GELU(), nn.Linear(2 * c, out))
    return (
        Do(lambda m, x: m.net(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), net=net),
        out,
        isinstance(norm, nn.Identity),
    )


@layer
def _residual(draw: random.Random, c: int) -> Built:
    inner, out, exact = build(draw, c)
    if out == c:
        return Do(lambda m, x: x + m.inner(x), inner=inner), c, exact
    return Do(lambda m, x: m.inner(x) + m.short(x), inner=inner, short=conv(c, out)), out, exact


@layer
def _in_place(draw: random.Random, c: int) -> Built:
    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        y += x
        y.mul_(m.scale.view(1, -1, 1, 1))
        return y.relu_()

    return Do(does, conv=conv(c, c, 3), scale=values(c)), c, True


@layer
def _broadcast(draw: random.Random, c: int) -> Built:
    one = draw.choice([1, c])
    return (
        Do(lambda m, x: x * torch.sigmoid(m.gate(x)) + m.shift[:, None, None], gate=conv(c, one), shift=values(c)),
        c,
        True,
    )


@layer
def _join(draw: random.Random, c: int) -> Built:
    one, a, exact = build(draw, c)
    other, b, also = build(draw, c)
    if draw.random() < 0.5:
        return Do(lambda m, x: torch.cat([m.one(x), m.other(x)], 1), one=one, other=other), a + b, exact and also
    return Do(lambda m, x: torch.cat([x, m.one(x), m.other(x)], 1), one=one, other=other), c + a + b, exact and also


@layer
def _gate(draw: random.Random, c: int) -> Built:
    half = width(draw)

    def chunked(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b = m.conv(x).chunk(2, 1)
        return a * torch.sigmoid(b)

    def sliced(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return y[:, : m.half] * y[:, m.half :].tanh()

    def counted(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        n = y.shape[1] // 2
        return y[:, :n] + y[:, n:]

    def glu(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.glu(m.conv(x), 1)

    def literal(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        return y[:, :half] - y[:, half:]

    does = draw.choice([chunked, sliced, counted, glu, literal])
    return Do(does, conv=conv(c, 2 * half, 3), half=half), half, True


@layer
def _parted(draw: random.Random, c: int) -> Built:
    a, b, out = width(draw), width(draw), width(draw)

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        one, other = torch.split(m.first(x), [m.a, m.b], dim=1)
        return m.left(one) + m.right(other)

    return Do(does, first=conv(c, a + b), a=a, b=b, left=conv(a, out), right=conv(b, out)), out, True


@layer
def _excite(draw: random.Random, c: int) -> Built:
    small = width(draw)
    if draw.random() < 0.5:
        net: nn.Module = nn.Sequential(nn.AdaptiveAvgPool2d(1), conv(c, small), nn.ReLU(), conv(small, c), nn.Sigmoid())
        return Do(lambda m, x: x * m.net(x), net=net), c, True
    net = nn.Sequential(nn.Linear(c, small), nn.SiLU(), nn.Linear(small, c), nn.Hardsigmoid())
    return Do(lambda m, x: x * m.net(x.mean((2, 3)))[:, :, None, None], net=net), c, True


@layer
def _film(draw: random.Random, c: int) -> Built:
    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        scale, shift = m.fc(x.amax((-2, -1))).view(x.size(0), 2, -1, 1, 1).unbind(1)
        return x * (1 + scale) + shift

    return Do(does, fc=nn.Linear(c, 2 * c)), c, True


@layer
def _shuffled(draw: random.Random, c: int) -> Built:
    out = width(draw)
    up = nn.Sequential(
        conv(c, 4 * out), nn.PixelShuffle(2), nn.BatchNorm2d(out), nn.PixelUnshuffle(2), conv(4 * out, out)
    )
    return up, out, True


@layer
def _mixed(draw: random.Random, c: int) -> Built:
    groups = draw.choice([2, 4])

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, n, h, w = x.shape
        x = x.view(b, m.groups, n // m.groups, h, w).transpose(1, 2).reshape(b, n, h, w)
        return m.conv(x)

    if draw.random() < 0.5:
        return nn.Sequential(nn.ChannelShuffle(groups), conv(c, c, 3, groups=groups)), c, True
    return Do(does, groups=groups, conv=conv(c, c, 3, groups=draw.choice([1, groups]))), c, True


@layer
def _normed(draw: random.Random, c: int) -> Built:
    out = width(draw)
    kind = draw.choice(["group", "instance", "own", "one"])
    norm: nn.Module = nn.GroupNorm(draw.choice([2, 4]), out)
    if kind == "instance":
        norm = nn.InstanceNorm2d(out, affine=True)
    if kind == "one":
        norm = nn.GroupNorm(1, out)
    if kind == "own":
        norm = Do(
            lambda m, x: F.batch_norm(x, m.buffer_mean, m.buffer_var, m.w, m.b, m.training),
            buffer_mean=torch.rand(out),
            buffer_var=torch.rand(out) + 0.5,
            w=values(out),
            b=values(out),
        )
    return nn.Sequential(conv(c, out, 3), norm, nn.SiLU()), out, kind in ("instance", "own")


@layer
def _spatial(draw: random.Random, c: int) -> Built:
    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        seen = torch.cat([x.mean(1, keepdim=True), x.amax(1, keepdim=True)], 1)
        return x * torch.sigmoid(m.conv(seen))

    return Do(does, conv=conv(2, 1, 3)), c, False


@layer
def _neighbours(draw: random.Random, c: int) -> Built:
    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        return x * torch.sigmoid(m.conv(x.mean((2, 3))[:, None]))[:, 0, :, None, None]

    return Do(does, conv=nn.Conv1d(1, 1, 3, padding=1)), c, True


@layer
def _stacked(draw: random.Random, c: int) -> Built:
    out = width(draw)

    def summed(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([each(x) for each in m.list], 1).sum(1)

    def apart(m: Any, x: torch.Tensor) -> torch.Tensor:
        a, b, c = torch.stack([each(x) for each in m.list], 1).unbind(1)
        return a * b.sigmoid() + c

    def weighed(m: Any, x: torch.Tensor) -> torch.Tensor:
        share = m.alpha.softmax(0)
        return sum(share[i] * each(x) for i, each in enumerate(m.list))

    does = draw.choice([summed, apart, weighed])
    return Do(does, list=nn.ModuleList(conv(c, out) for _ in range(3)), alpha=values(3)), out, True


@layer
def _selective(draw: random.Random, c: int) -> Built:
    out, small = width(draw), width(draw)

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        paths = torch.stack([m.paths["a"](x), m.paths["b"](x)], 1)
        seen = m.fc2(torch.relu(m.fc1(paths.sum(1).mean((2, 3)))))
        share = seen.view(x.shape[0], 2, -1).softmax(1)
        return (paths * share[..., None, None]).sum(1)

    paths = nn.ModuleDict({"a": conv(c, out), "b": conv(c, out, 3)})
    return Do(does, paths=paths, fc1=nn.Linear(out, small), fc2=nn.Linear(small, 2 * out)), out, True


@layer
def _resized(draw: random.Random, c: int) -> Built:
    out = width(draw)
    mode = draw.choice(["nearest", "bilinear"])
    return (
        Do(lambda m, x: F.interpolate(m.down(x), x.shape[-2:], mode=mode), down=nn.Conv2d(c, out, 3, 2, 1)),
        out,
        True,
    )


@layer
def _maxout(draw: random.Random, c: int) -> Built:
    out = width(draw)
    last = draw.random() < 0.5

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.conv(x)
        b, n, h, w = y.shape
        return y.view(b, n // 2, 2, h, w).amax(2) if last else y.view(b, 2, n // 2, h, w).amax(1)

    return Do(does, conv=conv(c, 2 * out)), out, True


@layer
def _repeated(draw: random.Random, c: int) -> Built:
    does = draw.choice(
        [
            lambda m, x: m.conv(x.repeat(1, 2, 1, 1)),
            lambda m, x: m.conv(x.repeat_interleave(2, 1)),
            lambda m, x: m.conv(torch.cat([x, x.neg()], 1)),
            lambda m, x: m.conv(F.pad(x, (0, 0, 0, 0, 0, x.shape[1]))),
            lambda m, x: m.conv(torch.cat([x, x.new_zeros(x.shape)], 1)),
        ]
    )
    out = width(draw)
    return Do(does, conv=conv(2 * c, out)), out, True


@layer
def _by_number(draw: random.Random, c: int) -> Built:
    does = draw.choice(
        [
            lambda m, x: m.conv(x)[:, ::2],
            lambda m, x: m.conv(x)[:, m.buffer_order],
            lambda m, x: torch.roll(m.conv(x), 1, 1)[:, : m.half],
            lambda m, x: m.conv(x).index_select(1, m.buffer_order),
            lambda m, x: m.conv(x).flip(1)[:, m.half :],
        ]
    )
    return Do(does, conv=conv(c, 2 * c), buffer_order=torch.randperm(2 * c)[:c], half=c), c, True


@layer
def _softened(draw: random.Random, c: int) -> Built:
    does = draw.choice(
        [
            lambda m, x: m.conv(x).softmax(1),
            lambda m, x: F.normalize(m.conv(x), dim=1),
            lambda m, x: m.conv(x) - m.conv(x).mean(1, keepdim=True),
            lambda m, x: F.layer_norm(m.conv(x), (x.shape[2], x.shape[3])),
        ]
    )
    return Do(does, conv=conv(c, c)), c, False


def build(draw: random.Random, c: int) -> Built:
    """A random layer."""
    return LAYERS[draw.choice(sorted(LAYERS))](draw, c)
