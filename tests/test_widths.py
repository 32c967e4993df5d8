"""What a model costs without some channels, where widths come from, and what they become."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torchvision
from torch import nn

import torchtrim as tt
from torchtrim.channels import cost
from torchtrim.channels.follow import Flow, follow
from torchtrim.channels.labels import Layer, Mask
from torchtrim.channels.settle import Settled, settle
from torchtrim.channels.widths import Attribute
from torchtrim.edits.attention import NarrowAttention, unwiden, widen
from torchtrim.edits.channel_check import check_shapes
from torchtrim.edits.channel_narrow import narrow, narrowings, set_attributes, tell_the_truth
from torchtrim.edits.work import Work
from torchtrim.graph.copying import full_copy, structural_copy
from torchtrim.graph.inputs import Inputs


def without(net: nn.Module, x: torch.Tensor, channels: dict[str, list[int]]) -> tuple[Flow, Mask]:
    """The channels of a model, and those that go with some rows of some weights."""
    flow = follow(net, Inputs.of(x))
    wanted = np.zeros(flow.channels.count, dtype=bool)
    for path, numbers in channels.items():
        rows = flow.tensors[id(net.get_submodule(path).weight)].layers[0]
        wanted[rows.ravel()[numbers]] = True
    return flow, flow.channels.closure(wanted)


@pytest.mark.parametrize(
    ("name", "channels"),
    [
        ("resnet18", {"layer1.0.conv1": [0, 5], "conv1": [3]}),
        ("mobilenet_v3_small", {"features.1.block.0.0": [1, 2], "features.5.block.0.0": [4]}),
        ("resnext50_32x4d", {"layer1.0.conv1": [0, 1, 2, 3]}),
    ],
)
def test_cost_is_foretold(name: str, channels: dict[str, list[int]]) -> None:
    net, x = torchvision.models.get_model(name, num_classes=5), torch.randn(1, 3, 64, 64)
    flow, gone = without(net, x, channels)
    for mask, model in ((np.zeros_like(gone), net), (gone, tt.delete_channels(net, x, channels, check=False))):
        summary = tt.summary(model, x)
        assert cost.macs(flow, mask) == summary.macs
        assert cost.params(net, flow, mask) == summary.params
        assert cost.size_mb(net, flow, mask) == pytest.approx(summary.size_mb)
        assert sum(step.macs_after(mask) for step in flow.runs[0].steps) == summary.macs * flow.runs[0].batch


def narrowed(net: nn.Module, x: torch.Tensor, wanted: Callable[[Flow], list[Layer]]) -> tuple[nn.Module, Flow, Mask]:
    """A model without some channels, every shape checked; and what was followed."""
    work = Work(structural_copy(net), Inputs.of(x))
    work.start(structural_copy(net))
    widen(work)
    flow = follow(work.model, work.inputs)
    gone = np.zeros(flow.channels.count, dtype=bool)
    for layer in wanted(flow):
        gone[layer] = True
    gone = flow.channels.closure(gone)
    assert settle(flow, gone).broken == []
    changes = narrowings(work.model, flow, gone)
    narrow(work, changes)
    before = full_copy(work.model)
    data = tell_the_truth(work.model, flow, gone, {change.owner for change in changes})
    check_shapes(work, flow, gone, cut=False)
    set_attributes(before, json.loads(json.dumps(data)))
    assert before(x[:1]).shape == work.model(x[:1]).shape
    assert before.state_dict().keys() == net.state_dict().keys()
    unwiden(work)
    return full_copy(work.model), flow, gone


def last_heads(flow: Flow) -> list[Layer]:
    """The last head of each attention."""
    return [table[-1] for table, axis in flow.channels.heads if axis == 0]


@pytest.mark.parametrize("name", ["test_vit", "test_vit2"])
def test_heads_of_timm(name: str) -> None:
    net = timm.create_model(name)
    x = torch.randn(2, *net.default_cfg["input_size"])
    pruned, flow, gone = narrowed(net, x, last_heads)
    attention = pruned.get_submodule("blocks.0.attn")
    heads = net.get_submodule("blocks.0.attn").num_heads
    assert (attention.num_heads, attention.attn_dim) == (heads - 1, (heads - 1) * attention.head_dim)
    assert attention.qkv.out_features == 3 * attention.attn_dim and attention.proj.in_features == attention.attn_dim
    assert cost.macs(flow, gone) == tt.summary(pruned, x).macs < tt.summary(net, x).macs


def test_what_a_model_says_of_its_stages() -> None:
    net, x = timm.create_model("test_convnext", num_classes=5), torch.randn(2, 3, 64, 64)

    def some(flow: Flow) -> list[Layer]:
        weights = [net.stages[1].downsample[1].weight, net.stages[3].downsample[1].weight]
        return [flow.tensors[id(weight)].layers[0].ravel()[:4] for weight in weights]

    pruned, _, _ = narrowed(net, x, some)
    assert [stage["num_chs"] for stage in pruned.feature_info] == [24, 28, 48, 60]
    assert pruned.num_features == pruned.head.num_features == 60
    assert [int(each.shape[1]) for each in pruned.forward_intermediates(x, intermediates_only=True)] == [24, 28, 48, 60]
    pruned.reset_classifier(7)
    assert pruned(x).shape == (2, 7)
    assert [stage["num_chs"] for stage in net.feature_info] == [24, 32, 48, 64]


class Halves(nn.Module):
    """Widths in many forms: an attribute, a size, half of a size, a list of sizes, a literal."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(6, 12), nn.Linear(6, 8), nn.Linear(20, 3)
        self.heads, self.sizes, self.fixed = 4, {"parts": [5, 7]}, nn.Linear(6, 10)
        self.last = nn.Linear(10, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        a, b = self.a(x), self.b(x)
        one, other = a.split(self.sizes["parts"], dim=-1)
        a = torch.cat([one.relu(), other], -1)
        b = b.reshape(b.shape[0], self.heads, -1).relu().reshape(b.shape[0], b.shape[1])
        b = torch.cat([b[:, : b.shape[1] // 2], b[:, b.shape[1] // 2 :].tanh()], 1)
        return self.out(torch.cat([a, b], -1)) + self.last(self.fixed(x).reshape(-1, 10))


def test_numbers_are_settled_where_they_come_from() -> None:
    net = Halves()
    flow = follow(net, Inputs.of(torch.randn(2, 6)))

    def settled(path: str, rows: list[int]) -> Settled:
        gone = np.zeros(flow.channels.count, dtype=bool)
        gone[flow.tensors[id(net.get_submodule(path).weight)].layers[0].ravel()[rows]] = True
        return settle(flow, flow.channels.closure(gone))

    assert settled("a", [0, 5, 6]).attributes == {
        Attribute("", "sizes", ("parts", 0)): 4,
        Attribute("", "sizes", ("parts", 1)): 5,
    }
    assert settled("a", [0]).broken == []
    assert settled("b", [0, 1]).attributes == {Attribute("", "heads"): 3}
    (broken, *_) = settled("fixed", [3]).broken
    assert "`reshape` in the model's forward" in broken.where and "written into the forward" in broken.reason
    rows = flow.tensors[id(net.fixed.weight)].layers[0].ravel().tolist()
    assert set(rows) <= set(np.concatenate([layer.ravel() for layer in broken.layers]).tolist())
    assert [part.channels.shape for part in flow.equal_parts] == [(2, 4)] * len(flow.equal_parts) != []


class Windows(nn.Module):
    """An attention that takes the width of its heads from its input."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.heads = nn.Linear(8, 24), nn.Linear(8, 8), 2
        self.embed, self.head = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.head(x + self.proj(y.transpose(1, 2).reshape(b, n, c)))


def test_widths_of_two_vectors_are_tied() -> None:
    net, x = Windows(), torch.randn(2, 7, 5)
    flow = follow(net, Inputs.of(x))
    embed, values = (flow.tensors[id(each.weight)].layers[0].ravel() for each in (net.embed, net.qkv))
    pairs = [(set(tie.one.tolist()), set(tie.other.tolist())) for tie in flow.ties]
    assert any(one == set(embed.tolist()) and other <= set(values.tolist()) for one, other in pairs)
    one_head = [table[1] for table, _ in flow.channels.heads]
    gone = np.zeros(flow.channels.count, dtype=bool)
    for layer in one_head:
        gone[layer] = True
    assert settle(flow, flow.channels.closure(gone)).broken
    pruned, _, _ = narrowed(
        net, x, lambda flow: [*last_heads(flow), flow.tensors[id(net.embed.weight)].layers[0].ravel()[:4]]
    )
    assert (pruned.heads, pruned.embed.out_features, pruned.qkv.out_features) == (1, 4, 12)


@pytest.mark.parametrize(
    ("options", "masked", "weights"),
    [
        ({"batch_first": True}, "none", True),
        ({"bias": False}, "bool", False),
        ({"batch_first": True, "add_bias_kv": True, "add_zero_attn": True}, "float", True),
        ({"batch_first": True, "kdim": 6, "vdim": 10}, "padding", False),
        ({"dropout": 0.5}, "heads", True),
    ],
)
def test_an_attention_of_any_width_computes_the_same(options: dict[str, Any], masked: str, weights: bool) -> None:
    torch.manual_seed(0)
    net = nn.MultiheadAttention(8, 4, **options).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    same = NarrowAttention(8, 4, **options).eval()
    assert same.load_state_dict(net.state_dict()) and [*same.state_dict()] == [*net.state_dict()]
    batch = bool(options.get("batch_first"))
    q, k, v = (
        torch.randn((3, n, w) if batch else (n, 3, w))
        for n, w in ((5, 8), (7, options.get("kdim", 8)), (7, options.get("vdim", 8)))
    )
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[1, 4:] = True
    masks: dict[str, dict[str, Any]] = {
        "none": {},
        "bool": {"attn_mask": torch.ones(5, 7, dtype=torch.bool).triu(3)},
        "float": {"attn_mask": torch.randn(5, 7), "key_padding_mask": hidden},
        "padding": {"key_padding_mask": hidden},
        "heads": {"attn_mask": torch.randn(12, 5, 7), "average_attn_weights": False},
    }
    for one, other in zip(
        net(q, k, v, need_weights=weights, **masks[masked]),
        same(q, k, v, need_weights=weights, **masks[masked]),
        strict=True,
    ):
        torch.testing.assert_close(one, other)
    if len({each.shape for each in (k[0], v[0])}) == 1:
        torch.testing.assert_close(net(q[:, 0], k[:, 0], v[:, 0])[0], same(q[:, 0], k[:, 0], v[:, 0])[0])


def test_layers_of_torch_with_fewer_heads() -> None:
    layer = nn.TransformerEncoderLayer(8, 4, 16, batch_first=True)
    net, x = nn.Sequential(nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)).eval(), torch.randn(2, 5, 8)
    pruned, _, _ = narrowed(net, x, last_heads)
    attention = pruned.get_submodule("0.layers.1.self_attn")
    assert isinstance(attention, NarrowAttention) and (attention.num_heads, attention.head_dim) == (3, 2)
    assert attention.in_proj_weight.shape == (18, 8) and attention.out_proj.in_features == 6
    silent = copy.deepcopy(net)
    for each in silent[0].layers:
        each.self_attn.out_proj.weight.data[:, 6:] = 0
    for grad in (torch.enable_grad(), torch.no_grad()):
        with grad:
            torch.testing.assert_close(pruned(x), silent(x), rtol=1e-4, atol=1e-5)
    whole, _, _ = narrowed(net, x, lambda flow: [])
    assert type(whole[0].layers[0].self_attn) is nn.MultiheadAttention
    torch.testing.assert_close(whole(x), net(x))


class Product(nn.Module):
    """An attention in `einsum`, which moves dimensions of size 1 elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = 2, nn.Linear(5, 24), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(2, 3) for each in self.qkv(x).chunk(3, -1))
        scores = torch.einsum("bghid,bghjd->bghij", q, k).softmax(-1)
        return self.out(torch.einsum("bghij,bghjd->bghid", scores, v).transpose(2, 3).flatten(3))


def test_one_head_is_left() -> None:
    net, x = Product(), torch.randn(2, 4, 7, 5)
    pruned, _, _ = narrowed(net, x, last_heads)
    assert (pruned.heads, pruned.qkv.out_features, pruned.out.in_features) == (1, 12, 4)


class Paths(nn.Module):
    """A width computed from two numbers, neither of which is a size by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.num_paths, self.in_channels = nn.Linear(5, 8), 2, 8
        self.out = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, other = torch.split(self.first(x), self.in_channels // self.num_paths, 1)
        return self.out(one + other)


def test_of_two_numbers_the_one_that_counts_channels() -> None:
    net, x = Paths(), torch.randn(2, 5)
    pruned, _, _ = narrowed(net, x, lambda flow: [flow.tensors[id(net.first.weight)].layers[0].ravel()[[1, 5]]])
    assert (pruned.in_channels, pruned.num_paths, pruned.out.in_features) == (6, 2, 3)


class _Attends(nn.Module):
    """An attention whose residual stream is narrowed less than its heads are."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, _ = self.attention(x, x, x, need_weights=False)
        return self.head((x + y).mean(1))


def test_an_attention_of_fewer_heads_comes_back_from_files(tmp_path: Path) -> None:
    model, x = _Attends().eval(), torch.randn(2, 6, 32)
    net = tt.prune_channels(model, x, 0.5)
    assert type(net.attention) is NarrowAttention and net.attention.num_heads == 2
    tt.save(net, tmp_path / "net.trim")
    again = tt.load(tmp_path / "net.trim", model=_Attends()).eval()
    assert type(again.attention) is NarrowAttention
    assert torch.equal(again(x), net(x))
    tt.export_onnx(net, x, tmp_path / "net.onnx")
    assert tt.verify_onnx(tmp_path / "net.onnx", net, [torch.randn(3, 6, 32)]).passed
