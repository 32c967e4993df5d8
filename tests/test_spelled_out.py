"""Functions that the exporter takes apart badly: attention, averages, clips of one tensor."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import onnx
import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import torchtrim as tt
from torchtrim.export.spelled_out import SpelledOut


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


SHAPES = [(5, 8), (3, 5, 8), (2, 3, 5, 8), (2, 2, 4, 5, 8), (2, 2, 3, 4, 5, 8)]
FLOATS, TRUTHS = torch.linspace(-1, 1, 25).reshape(5, 5), torch.ones(5, 5).tril() > 0


@pytest.mark.parametrize("shape", SHAPES, ids=len)
@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"attn_mask": FLOATS}, {"attn_mask": TRUTHS}, {"is_causal": True, "scale": 2.0}],
    ids=["plain", "scaled", "floats", "booleans", "causal"],
)
def test_attention_is_the_same_on_any_axes(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, *shape)
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    with SpelledOut():
        found = F.scaled_dot_product_attention(query, key, value, **options)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("lead", [(2,), (2, 3)], ids=len)
def test_grouped_heads_and_a_mask_for_each_row(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(*lead, 4, 5, 8), torch.randn(*lead, 2, 5, 8), torch.randn(*lead, 2, 5, 6)
    mask = torch.rand(lead[0], *(1,) * len(lead), 5, 5) > 0.3
    mask[..., 0] = True  # a row that sees nothing has no right answer
    expected = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    with SpelledOut():
        found = F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)
    assert found.shape == (*lead, 4, 5, 6)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("keys", [(1, 3, 4, 6, 8), (2, 1, 4, 6, 8), (2, 3, 1, 6, 8), (4, 6, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"attn_mask": torch.arange(30).reshape(5, 6) % 7 > 0}], ids=["plain", "mask"])
def test_keys_are_broadcast_to_the_query_and_back(keys: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    query, key = torch.randn(2, 3, 4, 5, 8), torch.randn(keys)
    full = key.expand(2, 3, 4, 6, 8)
    with SpelledOut():
        found = F.scaled_dot_product_attention(query, key, key, **options)
        other = F.scaled_dot_product_attention(query[:1], full, full, **options)
    assert torch.allclose(found, F.scaled_dot_product_attention(query, full, full, **options), atol=1e-6)
    first = query[:1].expand_as(query)
    assert torch.allclose(other, F.scaled_dot_product_attention(first, full, full, **options), atol=1e-6)


def test_a_mask_of_another_precision() -> None:
    query = torch.randn(2, 3, 5, 8, dtype=torch.bfloat16)
    expected = F.scaled_dot_product_attention(query, query, query, FLOATS.bfloat16())
    with SpelledOut():
        found = F.scaled_dot_product_attention(query, query, query, FLOATS)
    assert found.dtype == torch.bfloat16
    assert torch.allclose(found, expected, atol=0.05)


class Attention(nn.Module):
    """Attention of tokens that have axes in front."""

    def __init__(self, axes: int, **options: Any) -> None:
        super().__init__()
        self.qkv, self.axes, self.options = nn.Linear(8, 24), axes, options

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = self.qkv(x).chunk(3, -1)
        fold = (x.shape[0], *(2,) * (self.axes - 3), -1, 8)
        return F.scaled_dot_product_attention(
            query.reshape(fold), key.reshape(fold), value.reshape(fold), **self.options
        )


@pytest.mark.parametrize("options", [{}, {"is_causal": True}], ids=["plain", "causal"])
@pytest.mark.parametrize("axes", [3, 5])
def test_attention_of_other_than_four_axes_is_exported(axes: int, options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = tt.export_onnx(Attention(axes, **options), torch.randn(2, 8, 8), tmp_path / "net.onnx", benchmark=False)
    assert found.verification is not None
    assert found.verification.passed
    assert found.verification.batches == (1, 2, 3)


class Learned(nn.Module):
    """One learned query for all rows, and a mask of each row's tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 2, 3, 8))

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        keys = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(self.query, keys, keys, seen[:, None, None, :] > 0)


def test_a_learned_query_and_a_mask_of_booleans(tmp_path: Path) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 5, 16), torch.ones(4, 5, dtype=torch.long)
    found = tt.export_onnx(Learned(), inputs, tmp_path / "net.onnx", benchmark=False)
    assert found.verification is not None
    assert found.verification.passed
    assert operators(found.path)["Expand"] == 0


def test_attention_of_pytorchs_own_layers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()
    found = tt.export_onnx(net, torch.randn(2, 5, 16), tmp_path / "net.onnx", benchmark=False)
    assert found.verification is not None
    assert found.verification.passed
    ran = operators(found.path)
    assert not {"Shape", "Slice", "Concat"} & set(ran), ran
    assert F.scaled_dot_product_attention is torch._C._nn.scaled_dot_product_attention


@pytest.mark.parametrize(("opset", "operator"), [(18, "Softmax"), (23, "Attention")])
def test_where_onnx_has_attention_it_is_used(opset: int, operator: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net, x = Attention(4), torch.randn(2, 8, 8)
    found = tt.export_onnx(net, x, tmp_path / "net.onnx", opset=opset, benchmark=False)
    assert operators(found.path)[operator] == 1


def test_keys_are_transposed_by_one_node(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = timm.create_model("test_vit").eval()
    found = operators(tt.export_onnx(net, torch.randn(1, 3, 160, 160), tmp_path / "net.onnx", benchmark=False).path)
    blocks = len(net.blocks)
    assert found["Softmax"] == blocks
    assert found["Shape"] <= 1, "only the class token asks for the batch"
    assert found["Reshape"] <= 2 * blocks + 1


class ChannelsLast(nn.Module):
    """A norm over channels, as convnext has them, around an average."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.pool, self.head = (
            nn.Conv2d(3, 8, 4, 4), nn.LayerNorm(8), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 4)
        )  # fmt: skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = self.norm(self.pool(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.head(x.flatten(1))


def test_an_average_of_channels_that_lie_last_gathers_nothing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = tt.export_onnx(ChannelsLast().eval(), torch.randn(2, 3, 16, 16), tmp_path / "net.onnx", benchmark=False)
    assert not {"Gather", "Range", "Shape"} & set(operators(found.path)), operators(found.path)


def test_averages_are_the_same() -> None:
    x = torch.randn(2, 3, 8, 8)
    for size in (1, (1, 1), [1, 1], 4, (2, 4), (None, 1)):
        with SpelledOut():
            found = F.adaptive_avg_pool2d(x, size)
        assert torch.allclose(found, F.adaptive_avg_pool2d(x, size), atol=1e-6), size


class Clipped(nn.Module):
    """Layers that clip one tensor at bounds of their own, as gemma4's do."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.register_buffer("low", torch.tensor([-0.1, -0.2, -0.3]))
        self.register_buffer("high", torch.tensor([0.2, 0.3, 0.4]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.5
        return sum(
            (layer(torch.clamp(x, self.low[i], self.high[i])) for i, layer in enumerate(self.layers)), torch.zeros(4)
        )


class ClippedByScalars(Clipped):
    """The same, with a buffer for each bound."""

    def __init__(self) -> None:
        super().__init__()
        for i in range(3):
            self.register_buffer(f"low{i}", self.low[i].clone())
            self.register_buffer(f"high{i}", self.high[i].clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * 1.5
        bounds = ((getattr(self, f"low{i}"), getattr(self, f"high{i}")) for i in range(3))
        return sum((layer(torch.clamp(x, *both)) for layer, both in zip(self.layers, bounds, strict=True)), 0 * x)


class Twice(ClippedByScalars):
    """One tensor returned twice."""

    def forward(self, x: torch.Tensor) -> Any:
        y = super().forward(x)
        return y, y


@pytest.mark.parametrize("kind", [Clipped, Twice])
def test_clips_of_one_tensor_keep_their_bounds(kind: type[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = kind().eval()
    found = tt.export_onnx(net, torch.randn(4, 4), tmp_path / "net.onnx", benchmark=False)
    assert found.verification is not None
    assert found.verification.passed


def test_weights_that_one_file_can_hold_are_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # PyTorch puts more than 1.6 GB beside the file; here, anything.
    monkeypatch.setattr("torch.onnx._internal.exporter._onnx_program._LARGE_MODEL_THRESHOLD", 1)
    torch.manual_seed(0)
    net, x = (
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4)).eval(),
        torch.randn(4, 3, 8, 8),
    )
    for scheme in (None, "static"):
        path = tmp_path / f"{scheme}.onnx"
        tt.export_onnx(net, x, path, quantize=scheme, data=[x], benchmark=False)
        assert [each.name for each in tmp_path.glob(f"{scheme}.onnx*")] == [path.name]
