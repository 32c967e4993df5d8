"""Layers that use their weights in unusual ways, of random widths, for random networks."""

from __future__ import annotations

import random
from typing import Any

import torch
from random_layers import Built, Do, conv, layer, values, width
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


@layer
def _reparametrised(draw: random.Random, c: int) -> Built:
    out = width(draw)
    kind = draw.choice(["weight", "old", "spectral", "orthogonal"])
    made = conv(c, out, 3)
    if kind == "weight":
        parametrizations.weight_norm(made, dim=draw.choice([0, 1, None]))
    elif kind == "old":
        nn.utils.spectral_norm(made)
    elif kind == "spectral":
        parametrizations.spectral_norm(made)
    else:
        parametrizations.orthogonal(made)
    return made, out, False


@layer
def _standardised(draw: random.Random, c: int) -> Built:
    out = width(draw)

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(m.weight, (1, 2, 3), keepdim=True)
        return F.conv2d(x, (m.weight - mean) * torch.rsqrt(var + 1e-5) * m.gain, m.bias, padding=1)

    return Do(does, weight=values(out, c, 3, 3), gain=values(out, 1, 1, 1), bias=values(out)), out, False


@layer
def _functions(draw: random.Random, c: int) -> Built:
    out = width(draw)

    def summed(m: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bchw,oc->bohw", x, m.weight) + m.bias.view(-1, 1, 1)

    def linear(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.movedim(1, -1), m.weight, m.bias).movedim(-1, 1)

    def convolved(m: Any, x: torch.Tensor) -> torch.Tensor:
        return F.conv2d(x, m.weight[:, :, None, None], m.bias)

    def product(m: Any, x: torch.Tensor) -> torch.Tensor:
        return (m.weight @ x.flatten(2) + m.bias[:, None]).view(x.shape[0], m.out, *x.shape[2:])

    return (
        Do(draw.choice([summed, linear, convolved, product]), weight=values(out, c), bias=values(out), out=out),
        out,
        True,
    )


@layer
def _held(draw: random.Random, c: int) -> Built:
    table = torch.rand(1, c, 1, 1) + 0.5
    return (
        Do(
            lambda m, x: (x - m.buffer_mean) * m.buffer_scale + m.place,
            buffer_scale=table,
            buffer_mean=torch.rand(c, 1, 1),
            place=values(1, c, 1, 1),
        ),
        c,
        True,
    )


@layer
def _shared(draw: random.Random, c: int) -> Built:
    same = conv(c, c, 3)
    return Do(lambda m, x: m.same(torch.relu(m.same(x))), same=same), c, True


@layer
def _tied(draw: random.Random, c: int) -> Built:
    inner = width(draw)
    there, back = conv(c, inner), nn.ConvTranspose2d(inner, c, 1)
    other = nn.Conv2d(c, inner, 1)
    other.weight = there.weight
    return (
        Do(
            lambda m, x: m.back(torch.relu(m.there(x)) + m.other(x)) + F.conv_transpose2d(m.there(x), m.there.weight),
            there=there,
            other=other,
            back=back,
        ),
        c,
        True,
    )


@layer
def _experts(draw: random.Random, c: int) -> Built:
    out = width(draw)

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, _, h, w = x.shape
        share = m.route(x.mean((2, 3))).softmax(1)
        weight = torch.einsum("be,eoc->boc", share, m.weight)
        return torch.bmm(weight, x.flatten(2)).view(b, -1, h, w)

    return Do(does, route=nn.Linear(c, 3), weight=values(3, out, c)), out, False


@layer
def _bilinear(draw: random.Random, c: int) -> Built:
    out = width(draw)
    net = nn.Bilinear(c, c, out)
    return Do(lambda m, x: m.net(*[x.movedim(1, -1).contiguous()] * 2).movedim(-1, 1), net=net), out, True
