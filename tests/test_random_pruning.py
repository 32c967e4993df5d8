"""Random networks, pruned; and what such networks have found."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import torchtrim as tt

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from random_pruning import sequence


@pytest.mark.parametrize("seed", [1, 4, 7, 9, 12, 18, 40, 53])
def test_random_networks(seed: int) -> None:
    told = sequence(seed)
    assert told.done or told.refused


def halved(net: nn.Module, x: torch.Tensor) -> tuple[nn.Module, dict[str, str]]:
    pruned = tt.prune_channels(net.eval(), x, 0.5, round_to=1)
    twin = copy.deepcopy(pruned).train()
    twin(torch.cat([x, x])).sum().backward()
    edit: Any = tt.history(pruned).entries[-1].edit
    return pruned, edit.pruned.left_alone


def test_the_products_of_a_bilinear_layer() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(3, 6), nn.Linear(3, 8)
            self.both, self.fc = nn.Bilinear(6, 8, 10), nn.Linear(10, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.both(self.one(x), self.other(x)))

    pruned, left = halved(Two(), torch.randn(2, 3))
    assert pruned.both.weight.shape == (5, 3, 4)
    assert (pruned.both.out_features, pruned.both.in1_features, pruned.both.in2_features) == (5, 3, 4)
    assert set(left) == {"fc"}


def test_a_gated_linear_unit() -> None:
    pruned, left = halved(nn.Sequential(nn.Linear(3, 12), nn.GLU(), nn.Linear(6, 2)), torch.randn(2, 3))
    assert pruned[0].weight.shape == (6, 3) and set(left) == {"2"}
    gone: Any = tt.history(pruned).entries[-1].edit
    rows = gone.narrowed["0.weight"]["0"]
    assert [row + 6 for row in rows[:3]] == list(rows[3:])


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = nn.Linear(8, 32), nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(32, 8)
        self.dim = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (each(x).view(b, n, -1, self.dim).transpose(1, 2) for each in (self.q, self.k, self.v))
        y = functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


def test_queries_that_share_keys_inside_the_attention() -> None:
    pruned, left = halved(Grouped(), torch.randn(2, 5, 8))
    assert [each.weight.shape[0] for each in (pruned.q, pruned.k, pruned.v)] == [16, 8, 8]
    assert set(left) == {"out"}


class Standardised(nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        var, mean = torch.var_mean(self.weight, (1, 2, 3), keepdim=True)
        return functional.conv2d(x, (self.weight - mean) * torch.rsqrt(var + 1e-5), self.bias)


def test_a_weight_that_is_standardised_by_hand() -> None:
    """What is standardised is another weight without some of its inputs: equality cannot be expected."""
    net = nn.Sequential(nn.Conv2d(3, 8, 1), Standardised(8, 6, 1), nn.Conv2d(6, 2, 1), nn.AdaptiveAvgPool2d(1))
    pruned, _ = halved(net, torch.randn(2, 3, 4, 4))
    assert pruned[1].weight.shape == (3, 4, 1, 1)


@pytest.mark.parametrize("dim", [0, 1, None])
def test_a_weight_norm_along_any_dimension(dim: int | None) -> None:
    normed = parametrizations.weight_norm(nn.Conv2d(8, 6, 3), dim=dim)
    net = nn.Sequential(nn.Conv2d(3, 8, 1), normed, nn.ReLU(), nn.Conv2d(6, 2, 1), nn.AdaptiveAvgPool2d(1))
    pruned, left = halved(net, torch.randn(2, 3, 5, 5))
    assert pruned[1].weight.shape == (3, 4, 3, 3) and set(left) == {"3"}
    assert (pruned[1].out_channels, pruned[1].in_channels) == (3, 4)


def test_a_spectral_norm_of_a_kernel() -> None:
    """Its vector has an entry for each input at each place of the kernel."""
    normed = parametrizations.spectral_norm(nn.Conv2d(8, 6, 3))
    net = nn.Sequential(nn.Conv2d(3, 8, 1), normed, nn.ReLU(), nn.Conv2d(6, 2, 1), nn.AdaptiveAvgPool2d(1))
    pruned, left = halved(net, torch.randn(2, 3, 5, 5))
    norm = pruned[1].parametrizations.weight[0]
    assert pruned[1].weight.shape == (3, 4, 3, 3) and (norm._u.shape, norm._v.shape) == ((3,), (36,))
    assert set(left) == {"3"}


def test_a_parametrization_that_cannot_be_narrower() -> None:
    """Its weight cannot be computed once its inputs are gone; the layer before it stays, with the reason."""
    net = nn.Sequential(nn.Linear(3, 6), parametrizations.orthogonal(nn.Linear(6, 8)), nn.Linear(8, 2))
    pruned, left = halved(net, torch.randn(2, 3))
    assert pruned[1].weight.shape[1] == pruned[1].in_features == 6 and "0" in left


class Projection(nn.Module):
    """A projection that is drawn once and never learned."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("drawn", torch.randn(6, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.linear(x, self.drawn)


def test_a_buffer_that_reads_channels() -> None:
    net = nn.Sequential(nn.Linear(3, 8), Projection(), nn.ReLU(), nn.Linear(6, 2))
    pruned, _ = halved(net, torch.randn(2, 3))
    assert pruned[0].weight.shape == (4, 3) and pruned[1].drawn.shape[1] == 4


def test_the_inputs_of_a_layer_that_stays_as_wide_as_its_narrower_outputs_were() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(12, 12), nn.Linear(12, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(x.reshape(-1, 12)).relu())

    pruned, _ = halved(Net(), torch.randn(2, 3, 4))
    assert (pruned.fc1.in_features, pruned.fc1.out_features) == (12, 6)


class Biased(nn.Module):
    """Attention as in swin or T5: a learned number for each head is added to the scores, as a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.num_attention_heads, self.head_dim = 4, 6
        self.q, self.k, self.v, self.out = (nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(8, 24), nn.Linear(24, 2))
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, n, _ = x.shape
        q, k, v = (each(x).view(b, n, -1, self.head_dim).transpose(1, 2) for each in (self.q, self.k, self.v))
        apart = torch.arange(n)[:, None] - torch.arange(n) + n - 1
        mask = self.table[apart.view(-1)].view(n, n, -1).permute(2, 0, 1)[None]
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.out(y.transpose(1, 2).reshape(b, n, -1))


def test_a_number_for_each_head_that_is_added_as_a_mask() -> None:
    """The heads go with theirs; how many there are is told, though the forward does not read it."""
    pruned, left = halved(Biased(), torch.randn(2, 5, 8))
    assert pruned.table.shape == (9, 2) and pruned.q.weight.shape == (12, 8) and set(left) == {"out"}
    assert (pruned.num_attention_heads, pruned.head_dim) == (2, 6)


def test_vectors_flattened_from_a_kernel_meet_a_value_without_channels() -> None:
    """What a kernel is multiplied with along its flattened inputs is as long as it was: the inputs stay."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.weight = nn.Conv2d(3, 8, 1), nn.Parameter(torch.randn(6, 8, 3, 3))
            self.fc = nn.Linear(6, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            scaled = self.weight.flatten(1) * x.flatten()[:72]
            y = functional.conv2d(self.stem(x), scaled.view(6, -1, 3, 3))
            return self.fc(y.mean((2, 3)))

    pruned, left = halved(Net(), torch.randn(2, 3, 6, 6))
    assert pruned.weight.shape[1:] == (8, 3, 3)
    assert "stem" in left


@pytest.mark.parametrize("fused", [True, False])
def test_learned_queries(fused: bool) -> None:
    """Of parameters alone are the queries, as in DETR's decoder; their heads go whole all the same."""

    class Asked(Biased):
        def __init__(self) -> None:
            super().__init__()
            self.asked = nn.Parameter(torch.randn(1, 3, 8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            held = self.asked
            for source in (held, x):  # of the queries among themselves, then of what was given
                q, k, v = (
                    each(given).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
                    for each, given in zip((self.q, self.k, self.v), (held, source, source), strict=True)
                )
                if fused:
                    y = functional.scaled_dot_product_attention(q.expand(source.shape[0], -1, -1, -1), k, v)
                else:
                    y = (q @ k.transpose(-2, -1) * self.head_dim**-0.5).softmax(-1) @ v
            return self.out(y.transpose(1, 2).flatten(2))

    net = Asked()
    pruned, _ = halved(net, torch.randn(2, 5, 8))
    assert [each.weight.shape for each in (pruned.q, pruned.k, pruned.v)] == [(12, 8)] * 3
    gone: Any = tt.history(pruned).entries[-1].edit
    heads = torch.tensor(gone.narrowed["q.weight"]["0"]).view(2, 6)
    assert bool((heads % 6 == torch.arange(6)).all())


def test_an_attention_whose_queries_stay_as_wide_as_its_narrower_heads_were() -> None:
    """What comes in cannot be narrowed, and has the width that all heads together had."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.fc = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.reshape(x.shape[0], -1, 8)
            return self.fc(self.attention(x, x, x, need_weights=False)[0])

    pruned, _ = halved(Net(), torch.randn(2, 5, 8))
    assert pruned.attention.in_proj_weight.shape == (12, 8) and pruned.attention.num_heads == 1
    assert (pruned.attention.embed_dim, pruned.attention.kdim, pruned.attention.vdim) == (8, 8, 8)


def test_an_attention_that_a_cut_leaves_as_the_last_layer() -> None:
    net = nn.Sequential(nn.Linear(4, 12), nn.TransformerEncoderLayer(12, 2, 16, 0.0, batch_first=True))
    x = torch.randn(2, 5, 4)
    cut = tt.cut(net.eval(), x, after="1.dropout1")
    pruned = tt.prune_channels(cut, ratio=0.5, round_to=1, protect="0")
    attention = pruned.get_submodule("1.self_attn")
    assert (attention.embed_dim, attention.num_heads, attention.out_proj.in_features) == (12, 1, 6)
