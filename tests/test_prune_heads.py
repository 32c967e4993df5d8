"""Heads that go whole though a weight is shared by all of them, and blocs of heads that keep a stream's share."""

from __future__ import annotations

import copy
import importlib
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

import torchtrim as tt
from torchtrim.channels.blank import META, Blanks
from torchtrim.channels.labels import kept_indices
from torchtrim.errors import TorchTrimError
from torchtrim.graph.copying import full_copy


class ByHeads(nn.Module):
    """Attention over 4 heads of 8; what all heads share is given."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.num_heads, self.head_dim = kind, 4, 8
        self.stem = nn.Linear(6, 32)
        self.qkv = nn.Linear(32, 96)
        self.proj = nn.Linear(32, 5)
        self.pool = nn.Conv2d(8, 8, 3, padding=1, groups=8 if kind == "depthwise" else 1)
        self.rel = nn.Parameter(torch.randn(9, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, count, _ = x.shape
        qkv = self.qkv(self.stem(x)).reshape(batch, count, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        if self.kind in ("depthwise", "dense"):
            pooled = k.reshape(-1, 3, 3, self.head_dim).permute(0, 3, 1, 2)
            k = self.pool(pooled).reshape(batch, self.num_heads, self.head_dim, count).transpose(-1, -2)
        scores = q @ k.transpose(-1, -2)
        if self.kind == "turned":  # by rotary embeddings over all of a head: the part that is left out is empty
            q, rest = q[..., : self.head_dim], q[..., self.head_dim :]
            q = torch.cat([torch.cat([-q[..., 4:], q[..., :4]], -1), rest], -1)
        if self.kind == "split":
            q = torch.cat(q.split([self.head_dim, q.shape[-1] - self.head_dim], -1), -1)
        if self.kind == "interleaved":  # rotary embeddings of neighbours
            q = torch.stack([-q[..., 1::2], q[..., ::2]], -1).reshape(q.shape)
        if self.kind == "einsum":
            scores = scores + torch.einsum("bhnd,md->bhnm", q, self.rel)
        if self.kind == "repeated":  # a product of as many matrices as there are heads, all the same
            folded = q.reshape(batch * self.num_heads, 3, 3, self.head_dim).transpose(1, 2)
            scores = scores + (folded @ self.rel.T).transpose(1, 2).reshape(batch, self.num_heads, count, 9)
        mixed = (scores * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(batch, count, -1))


@pytest.mark.parametrize("kind", ["depthwise", "einsum", "repeated", "turned", "split", "interleaved"])
def test_heads_go_whole_beside_what_they_share(kind: str) -> None:
    torch.manual_seed(0)
    net, x = ByHeads(kind).eval(), torch.randn(2, 9, 6)
    narrow = tt.prune_channels(net, x, 0.5)
    assert (narrow.num_heads, narrow.head_dim) == (2, 8)
    assert narrow.qkv.out_features == 48
    assert (narrow.pool.in_channels, narrow.pool.groups, len(narrow.rel[0])) == (8, net.pool.groups, 8)
    torch.testing.assert_close(narrow(x), _with_some_heads(net, narrow)(x), atol=1e-5, rtol=1e-4)


def test_counted_channels_that_are_in_no_heads_stay() -> None:
    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 16), nn.Linear(8, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x)[..., ::2])

    narrow = tt.prune_channels(Counted(), torch.randn(2, 6), 0.5, round_to=1)
    assert narrow.first.out_features == 16
    told = " ".join(tt.history(narrow).entries[-1].notes)
    assert "first: it runs together with what cannot be narrowed at `slice` in the model's forward, which takes" in told


def test_a_full_convolution_of_each_head() -> None:
    net, x = ByHeads("dense").eval(), torch.randn(2, 9, 6)
    narrow = tt.prune_channels(net, x, 0.5)
    assert narrow.stem.out_features == 16
    assert (narrow.num_heads, narrow.pool.in_channels, narrow.pool.out_channels) == (
        4,
        *narrow.pool.weight.shape[1::-1],
    )
    torch.testing.assert_close(narrow(x), _with_some_heads(net, narrow)(x), atol=1e-5, rtol=1e-4)


def _with_some_heads(net: ByHeads, narrow: nn.Module) -> nn.Module:
    """The original with zeros in what reads the stem's and the heads' channels that went."""
    twin = copy.deepcopy(net)
    lost = tt.history(narrow).edits[-1].narrowed
    twin.qkv.weight.data[:, list(lost["qkv.weight"]["1"])] = 0
    twin.proj.weight.data[:, list(lost.get("proj.weight", {}).get("1", ()))] = 0
    return twin


class Remembering(ByHeads):
    """Keeps, in eval mode, the bias of each head spread over the places; `drops` says with which mode it goes."""

    def __init__(self, drops: bool) -> None:
        super().__init__("depthwise")
        self.bias = nn.Parameter(torch.randn(self.num_heads, 9))
        self.drops = drops
        self.kept: dict[str, torch.Tensor] = {}

    def train(self, mode: bool = True) -> Remembering:
        super().train(mode)
        if mode is self.drops:
            self.kept = {}
        return self

    def spread(self) -> torch.Tensor:
        made = self.bias[:, None].expand(-1, 9, -1)
        return made if self.training else self.kept.setdefault("cpu", made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.stem(x)).reshape(len(x), 9, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        mixed = (q @ k.transpose(-1, -2) + self.spread()).softmax(-1) @ v
        return self.proj(mixed.transpose(1, 2).reshape(len(x), 9, -1))


@pytest.mark.parametrize("drops", [True, False])
@pytest.mark.parametrize("in_place", [False, True])
def test_what_a_module_computed_from_its_heads_is_computed_anew(drops: bool, in_place: bool) -> None:
    torch.manual_seed(0)
    net, x = Remembering(drops).eval(), torch.randn(2, 9, 6)
    net(x)
    kept = net.kept["cpu"]
    narrow = tt.prune_channels(net, x, 0.5, copy=not in_place)
    narrow(x)
    assert narrow.kept["cpu"].shape == (2, 9, 9)
    assert not narrow.training
    record = tt.history(narrow).edits
    if not in_place:
        assert net.kept["cpu"] is kept
        again = tt.apply(net, x, record)
        torch.testing.assert_close(again(x), narrow(x), atol=0, rtol=0)


class Doubled(nn.Module):
    """A layer that keeps twice its weight once it has run in eval mode, or from the change of mode on."""

    def __init__(self, when: str) -> None:
        super().__init__()
        self.weight, self.heads, self.when = nn.Parameter(torch.randn(16, 32)), 4, when
        self.kept: torch.Tensor | None = None

    def twice(self) -> torch.Tensor:
        return 2 * self.weight.detach().view(self.heads, -1, self.weight.shape[1]).flatten(0, 1)

    def train(self, mode: bool = True) -> Doubled:
        super().train(mode)
        if self.when == "mode" or mode:
            self.kept = None if mode else self.twice()
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            return x @ (2 * self.weight).T
        if self.kept is None:
            self.kept = self.twice()
        return x @ self.kept.T


@pytest.mark.parametrize("when", ["run", "mode"])
def test_what_a_layer_kept_of_its_weight_is_not_compared_with(when: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), Doubled(when), nn.Linear(16, 3)).eval(), torch.randn(4, 6)
    net(x)
    narrow = tt.prune_channels(net, x, 0.5, round_to=4)
    assert narrow[0].out_features == 16
    twin = copy.deepcopy(net)
    lost = tt.history(narrow).edits[-1].narrowed
    twin[2].weight.data[:, list(lost["2.weight"]["1"])] = 0
    twin[3].weight.data[:, list(lost["3.weight"]["1"])] = 0
    twin.train().eval()
    torch.testing.assert_close(narrow(x), twin(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("when", ["run", "mode"])
def test_what_a_layer_kept_is_dropped_where_channels_are_deleted(when: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 32), nn.ReLU(), Doubled(when), nn.Linear(16, 3)).eval(), torch.randn(4, 6)
    net(x)
    narrow = tt.delete_channels(net, x, "0", [0, 5])
    assert narrow[2].kept is None or narrow[2].kept.shape == (16, 30)
    with torch.no_grad():
        expected = net[3](net[1](net[0](x))[:, [*range(1, 5), *range(6, 32)]] @ (2 * narrow[2].weight).T)
    torch.testing.assert_close(narrow(x), expected, atol=1e-5, rtol=1e-5)


class Gathering(nn.Module):
    """Keeps the mean of what it gives in training, and begins anew with each epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.mean = nn.Linear(6, 32), nn.Linear(32, 3), torch.zeros(3)

    def train(self, mode: bool = True) -> Gathering:
        self.mean = torch.zeros(3) if mode else self.mean
        super().train(mode)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.last(self.first(x).relu())
        if self.training:
            self.mean = self.mean + y.detach().mean(0)
        return y - self.mean


def test_what_a_module_gathered_is_not_dropped_with_others_weights() -> None:
    net, x = Gathering(), torch.randn(4, 6)
    net(x)
    net.eval()
    gathered = net.mean.clone()
    assert gathered.abs().min() > 0
    narrow = tt.prune_channels(net, x, 0.5)
    assert torch.equal(narrow.mean, gathered)
    assert torch.equal(net.mean, gathered)


class Merging(nn.Linear):
    """Low-rank weights beside its own, which its own take up in eval mode."""

    def __init__(self) -> None:
        super().__init__(32, 32)
        self.down, self.up, self.merged = nn.Parameter(torch.randn(2, 32)), nn.Parameter(torch.randn(32, 2)), False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if self.merged is mode:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


@pytest.mark.parametrize("training", [True, False])
def test_weights_that_a_module_merges_do_not_move(training: bool) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(6, 32), Merging(), nn.Linear(32, 3)).train(training), torch.randn(4, 6)
    before, expected = net[1].weight.detach().clone(), net(x).detach()
    narrow = tt.prune_channels(net, x, 0.5, protect=["**"])
    assert torch.equal(net[1].weight, before)
    torch.testing.assert_close(net(x), expected, atol=0, rtol=0)
    torch.testing.assert_close(narrow(x), expected, atol=1e-5, rtol=1e-5)


class Counting(ByHeads):
    """The bias of the keys is set to zero, found by how many numbers there are, as Swin V2 does."""

    def __init__(self, count: Callable[[torch.Tensor], int]) -> None:
        super().__init__("depthwise")
        self.count = count

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = self.qkv.bias.clone()
        length = self.count(bias) // 3
        bias[length : 2 * length].zero_()
        made = functional.linear(self.stem(x), self.qkv.weight, bias)
        q, k, v = made.reshape(len(x), 9, 3, self.num_heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(((q @ k.transpose(-1, -2)).softmax(-1) @ v).transpose(1, 2).reshape(len(x), 9, -1))


@pytest.mark.parametrize("count", [torch.Tensor.numel, torch.numel, lambda tensor: torch.numel(input=tensor)])
def test_how_many_numbers_there_are_is_a_size(count: Callable[[torch.Tensor], int]) -> None:
    torch.manual_seed(0)
    net, x = Counting(count).eval(), torch.randn(2, 9, 6)
    narrow = tt.prune_channels(net, x, 0.5)
    assert (narrow.num_heads, narrow.qkv.out_features) == (2, 48)
    torch.testing.assert_close(narrow(x), _with_some_heads(net, narrow)(x), atol=1e-5, rtol=1e-4)


class Queries(nn.Module):
    """One query of an image for all of its windows: repeated so many times."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj = nn.Linear(6, 32), nn.Linear(6, 64), nn.Linear(32, 4)
        self.heads = 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        windows = x.reshape(-1, 4, 6)
        q = self.q(x[:, :4]).repeat_interleave(len(windows) // len(x), dim=0)
        q = q.reshape(len(windows), 4, self.heads, 8).transpose(1, 2)
        k, v = self.kv(windows).reshape(len(windows), 4, 2, self.heads, 8).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (q @ k.transpose(-1, -2) * 8**-0.5).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(len(windows), 4, -1))


def test_queries_that_are_repeated_have_heads() -> None:
    narrow = tt.prune_channels(Queries(), torch.randn(2, 16, 6), 0.5)
    assert (narrow.heads, narrow.q.out_features, narrow.kv.out_features) == (2, 16, 32)


class Split(nn.Module):
    """8 heads, of which 2, 3 and 3 go through convolutions of their own; added to a stream whose width they read."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 8
        self.splits = [2 * 4, 3 * 4, 3 * 4]
        self.stem, self.value, self.out = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(32, 4)
        self.convs = nn.ModuleList(nn.Conv1d(width, width, 3, padding=1, groups=width) for width in self.splits)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        batch, count, width = x.shape
        heads = self.value(x).reshape(batch, count, self.num_heads, width // self.num_heads).transpose(1, 2)
        scores = (heads @ heads.transpose(-1, -2) * 0.5).softmax(-1)
        image = heads.transpose(-1, -2).reshape(batch, -1, count)
        parts = [conv(part) for conv, part in zip(self.convs, image.split(self.splits, 1), strict=True)]
        image = torch.cat(parts, 1).reshape(batch, self.num_heads, -1, count).transpose(-1, -2)
        mixed = (scores @ heads + image).transpose(1, 2).reshape(batch, count, width)
        return self.out(x + functional.relu(mixed.sum(-1, keepdim=True)))


def test_a_bloc_of_heads_keeps_the_share_of_the_stream() -> None:
    narrow = tt.prune_channels(Split(), torch.randn(2, 5, 6), 0.5)
    assert narrow.num_heads == 4
    assert narrow.stem.out_features == narrow.value.in_features == narrow.value.out_features == 16
    assert sum(narrow.splits) == 16
    assert all(size in (4, 8) for size in narrow.splits)
    assert [conv.groups for conv in narrow.convs] == list(narrow.splits)


def test_with_more_to_keep_no_part_of_a_bloc_gets_less() -> None:
    net, x = Split(), torch.randn(2, 5, 6)
    found = [tt.prune_channels(net, x, ratio).splits for ratio in (0.625, 0.5, 0.375, 0.25)]
    for fewer, more in itertools.pairwise(found):
        assert all(one <= other for one, other in zip(fewer, more, strict=True))
        assert sum(fewer) < sum(more)


class Branches(nn.Module):
    """Two streams, whose widths stand in a list that no forward reads."""

    def __init__(self, form: Callable[[list[int]], object]) -> None:
        super().__init__()
        self.embed_dim = form([16, 32])
        self.stems = nn.ModuleList([nn.Linear(6, 16), nn.Linear(6, 32)])
        self.head = nn.ModuleList([nn.Linear(16, 4), nn.Linear(32, 4)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(head(stem(x).relu()) for stem, head in zip(self.stems, self.head, strict=True))


@pytest.mark.parametrize("form", [list, tuple])
def test_widths_in_a_list_tell_the_truth(form: Callable[[list[int]], object]) -> None:
    net, x = Branches(form), torch.randn(2, 6)
    narrow = tt.prune_channels(net, x, 0.5)
    assert narrow.embed_dim == form([8, 16])
    assert net.embed_dim == form([16, 32])
    again = tt.apply(Branches(form), x, tt.history(narrow))
    assert again.embed_dim == form([8, 16])


def test_a_model_of_timm_with_two_streams_takes_another_classifier() -> None:
    timm = importlib.import_module("timm")
    net, x = timm.create_model("crossvit_tiny_240").eval(), torch.randn(1, 3, 240, 240)
    narrow = tt.prune_channels(net, x, 0.5, check=False)
    narrow.reset_classifier(7)
    assert narrow(x).shape == (1, 7)


def test_in_place_operators_are_remembered_by_their_shapes() -> None:
    blanks, op = Blanks(), torch.ops.aten.add_.Tensor
    for _ in range(2):
        x, y = torch.empty(2, 3, device=META), torch.empty(3, device=META)
        assert blanks.call(op, (x, y), {}) is x
    with pytest.raises(RuntimeError):
        blanks.call(op, (torch.empty(3, device=META), torch.empty(2, 3, device=META)), {})
    grown = torch.empty(2, 3, device=META)
    for _ in range(2):
        assert blanks.call(torch.ops.aten.unsqueeze_.default, (grown, 0), {}) is grown
    assert grown.shape == (1, 1, 2, 3)


def test_kept_indices_of_a_vector() -> None:
    import numpy as np

    gone = np.array([False, True, False, False])
    assert (kept_indices(np.array([[1], [2]]), gone) or {})[0].tolist() == [False, True]
    assert kept_indices(np.array([[3]]), gone) == {}


class Told(nn.Module):
    """A module that says what of it is copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.cache = nn.Linear(2, 2), [1]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "cache": []}


def test_a_full_copy_is_that_of_deepcopy() -> None:
    net = nn.Sequential(Told(), nn.LSTM(2, 2), nn.Linear(2, 2))
    net[2].weight = net[0].layer.weight
    twin = full_copy(net)
    assert twin[0].cache == []
    assert twin[2].weight is twin[0].layer.weight
    assert twin[2].weight is not net[2].weight
    assert all(ref() is held for ref, held in zip(twin[1]._flat_weight_refs, twin[1]._flat_weights, strict=True))
    for one, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)
        assert one.data_ptr() != other.data_ptr()


def test_an_edit_that_fails_leaves_all_as_it_was() -> None:
    net, x = Split(), torch.randn(2, 5, 6)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(TorchTrimError):
        tt.prune_channels(net, x, {"nowhere": 0.5})
    kept = tt.prune_channels(net, x, 0.5, copy=False)
    assert kept is net
    assert net.value.weight.shape == (16, 16)
    assert set(before) == set(net.state_dict())
