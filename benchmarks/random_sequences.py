"""Attention, recurrence and other layers over sequences, of random widths, for random networks over maps."""

from __future__ import annotations

import random
from typing import Any

import torch
from random_layers import Built, Do, layer, values, width
from torch import nn
from torch.nn import functional as F


class Tokens(nn.Module):
    """A layer over sequences `(batch, tokens, width)` that is given maps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.net(x.flatten(2).transpose(1, 2))
        return y.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


@layer
def _torch_attention(draw: random.Random, c: int) -> Built:
    first, own = draw.random() < 0.5, draw.random() < 0.4
    wide = width(draw)
    options: dict[str, Any] = {"batch_first": first, "bias": draw.random() < 0.7, "add_bias_kv": draw.random() < 0.2}
    if own:
        options |= {"kdim": wide, "vdim": c}
    attention = nn.MultiheadAttention(c, draw.choice([2, 4]), **options)
    weights = draw.random() < 0.3
    masked = draw.random() < 0.3

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x if first else x.transpose(0, 1)
        key = m.key(y) if own else y
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1) if masked else None
        z = m.attention(y, key, y, need_weights=weights, attn_mask=mask)[0]
        return x + (z if first else z.transpose(0, 1))

    return Tokens(Do(does, attention=attention, key=nn.Linear(c, wide) if own else nn.Identity())), c, True


@layer
def _own_attention(draw: random.Random, c: int) -> Built:
    heads, each = draw.choice([2, 3, 4]), draw.choice([4, 6])
    inner = heads * each
    fused, literal, packed = draw.random() < 0.5, draw.random() < 0.2, draw.random() < 0.6

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        h, d = (heads, each) if literal else (m.heads, m.dim)
        if packed:
            q, k, v = m.qkv(x).reshape(b, n, 3, h, d).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (part.view(b, n, h, -1).transpose(1, 2) for part in m.qkv(x).chunk(3, -1))
        if fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = (q @ k.transpose(-2, -1) * d**-0.5).softmax(-1) @ v
        return m.out(y.transpose(1, 2).reshape(b, n, -1))

    return Tokens(Do(does, heads=heads, dim=each, qkv=nn.Linear(c, 3 * inner), out=nn.Linear(inner, c))), c, True


@layer
def _shared_keys(draw: random.Random, c: int) -> Built:
    held, times, each = draw.choice([2, 4]), draw.choice([2, 3]), 4
    kind = draw.choice(["interleave", "expand", "enable"])

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q = m.q(x).view(b, n, -1, m.dim).transpose(1, 2)
        k = m.k(x).view(b, n, -1, m.dim).transpose(1, 2)
        v = m.v(x).view(b, n, -1, m.dim).transpose(1, 2)
        if kind == "interleave":
            k, v = k.repeat_interleave(m.times, 1), v.repeat_interleave(m.times, 1)
        elif kind == "expand":
            k, v = (z[:, :, None].expand(-1, -1, m.times, -1, -1).reshape(b, -1, n, m.dim) for z in (k, v))
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=kind == "enable")
        return m.out(y.transpose(1, 2).reshape(b, n, -1))

    parts = {"q": nn.Linear(c, held * times * each), "k": nn.Linear(c, held * each), "v": nn.Linear(c, held * each)}
    return Tokens(Do(does, dim=each, times=times, out=nn.Linear(held * times * each, c), **parts)), c, True


@layer
def _encoder(draw: random.Random, c: int) -> Built:
    first = draw.random() < 0.6
    made = nn.TransformerEncoderLayer(
        c,
        draw.choice([2, 4]),
        width(draw),
        0.0,
        batch_first=first,
        norm_first=draw.random() < 0.5,
        activation=draw.choice(["relu", "gelu"]),
    )
    net: nn.Module = nn.TransformerEncoder(made, 2, enable_nested_tensor=False) if draw.random() < 0.5 else made
    return Tokens(Do(lambda m, x: m.net(x) if first else m.net(x.transpose(0, 1)).transpose(0, 1), net=net)), c, False


@layer
def _decoder(draw: random.Random, c: int) -> Built:
    made = nn.TransformerDecoderLayer(c, 2, width(draw), 0.0, batch_first=True)

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        return m.net(m.asked.expand(x.shape[0], -1, -1), x)[:, :1] + x

    return Tokens(Do(does, net=made, asked=values(1, 3, c))), c, False


@layer
def _recurrent(draw: random.Random, c: int) -> Built:
    hidden, both = width(draw), draw.random() < 0.5
    kind = draw.choice([nn.LSTM, nn.GRU, nn.RNN])
    options: dict[str, Any] = {"num_layers": draw.choice([1, 2]), "bidirectional": both, "batch_first": True}
    out = hidden
    if kind is nn.LSTM and draw.random() < 0.4:
        out = hidden // 2
        options["proj_size"] = out
    out *= 2 if both else 1
    return Tokens(Do(lambda m, x: m.net(x)[0], net=kind(c, hidden, **options))), out, True


@layer
def _cell(draw: random.Random, c: int) -> Built:
    hidden = width(draw)

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        state = x.new_zeros(x.shape[0], m.hidden)
        found = []
        for each in x[:, :4].unbind(1):
            state = m.cell(each, state)
            found.append(state)
        return torch.stack(found, 1).mean(1, keepdim=True) + m.skip(x)

    return Tokens(Do(does, cell=nn.GRUCell(c, hidden), hidden=hidden, skip=nn.Linear(c, hidden))), hidden, True


@layer
def _tokens(draw: random.Random, c: int) -> Built:
    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        n = x.shape[1]
        x = torch.cat([m.token.expand(x.shape[0], -1, -1), x], 1) + m.place
        x = x + m.gamma * m.two(F.gelu(m.one(x)))
        return x[:, 1 : n + 1] * x[:, :1].sigmoid()

    inner = width(draw)
    return (
        Tokens(
            Do(
                does,
                token=values(1, 1, c),
                place=values(1, 1, c),
                gamma=values(c),
                one=nn.Linear(c, inner),
                two=nn.Linear(inner, c),
            )
        ),
        c,
        True,
    )


@layer
def _gated_mlp(draw: random.Random, c: int) -> Built:
    inner = width(draw)
    return (
        Tokens(
            Do(
                lambda m, x: x + m.down(F.silu(m.gate(x)) * m.up(x)),
                gate=nn.Linear(c, inner, bias=False),
                up=nn.Linear(c, inner, bias=False),
                down=nn.Linear(inner, c, bias=False),
            )
        ),
        c,
        True,
    )


@layer
def _across(draw: random.Random, c: int) -> Built:
    """Attention between channels in place of tokens."""
    heads = draw.choice([1, 2])

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = m.qkv(x).view(b, n, 3, m.heads, -1).permute(2, 0, 3, 4, 1)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return m.out(y.permute(0, 3, 1, 2).reshape(b, n, -1))

    return Tokens(Do(does, heads=heads, qkv=nn.Linear(c, 3 * c), out=nn.Linear(c, c))), c, False


@layer
def _rotary(draw: random.Random, c: int) -> Built:
    heads, each = draw.choice([2, 4]), 4

    def turned(x: torch.Tensor) -> torch.Tensor:
        n, d = x.shape[-2:]
        angle = torch.arange(n)[:, None] / 10 ** (torch.arange(0, d, 2) / d)
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        one, other = x.chunk(2, -1)
        return x * cos + torch.cat([-other, one], -1) * sin

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (net(x).view(b, n, -1, m.dim).transpose(1, 2) for net in (m.q, m.k, m.v))
        y = F.scaled_dot_product_attention(turned(q), turned(k), v)
        return m.out(y.transpose(1, 2).flatten(2))

    parts = {name: nn.Linear(c, heads * each) for name in "qkv"}
    return Tokens(Do(does, dim=each, out=nn.Linear(heads * each, c), **parts)), c, True


@layer
def _biased(draw: random.Random, c: int) -> Built:
    """Attention with a learned bias for each head, as in swin."""
    heads, each = draw.choice([2, 4]), 4

    def does(m: Any, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = m.qkv(x).view(b, n, 3, m.heads, -1).permute(2, 0, 3, 1, 4)
        bias = m.table[m.buffer_index[:n, :n].reshape(-1)].view(n, n, -1).permute(2, 0, 1)
        y = ((q * m.scale) @ k.transpose(-2, -1) + bias).softmax(-1) @ v
        return m.out(y.transpose(1, 2).reshape(b, n, m.heads * m.dim))

    index = torch.arange(64)[:, None] - torch.arange(64) + 63
    return (
        Tokens(
            Do(
                does,
                heads=heads,
                dim=each,
                scale=0.5,
                table=values(127, heads),
                buffer_index=index,
                qkv=nn.Linear(c, 3 * heads * each),
                out=nn.Linear(heads * each, c),
            )
        ),
        c,
        True,
    )
