"""Adapters: the smallest module between two shapes, at other sizes too, and what may be done with it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torchtrim import EditError, export_onnx, history
from torchtrim.edits.adapter import KINDS, adapter_for, layout_of
from torchtrim.edits.adapter_layers import ChannelsLast, FitChannels, PassOn, TokenGrid
from torchtrim.edits.apply import apply
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.plan import plan
from torchtrim.edits.remove import Remove, remove

CASES = [
    ((2, 64, 56, 56), (2, 128, 28, 28), "NCHW"),
    ((2, 3, 57, 57), (2, 16, 29, 29), "NCHW"),
    ((2, 64, 32, 32), (2, 32, 30, 30), "NCHW"),
    ((2, 8, 30, 30), (2, 8, 32, 32), "NCHW"),
    ((2, 8, 14, 14), (2, 4, 28, 28), "NCHW"),
    ((2, 8, 14, 14), (2, 4, 31, 33), "NCHW"),
    ((2, 16, 7, 7), (2, 16, 1, 1), "NCHW"),
    ((2, 16, 7, 7), (2, 16), "NCHW"),
    ((2, 16, 7, 7), (2, 40), "NCHW"),
    ((2, 4, 2, 2), (2, 16), "NCHW"),
    ((2, 56, 56, 96), (2, 28, 28, 192), "NHWC"),
    ((2, 196, 64), (2, 49, 128), "NLC"),
    ((2, 197, 64), (2, 50, 32), "NLC"),
    ((2, 10, 64), (2, 7, 64), "NLC"),
    ((2, 64, 100), (2, 32, 50), "NCL"),
    ((2, 3, 32, 32), (2, 64, 48), "NCHW"),
    ((2, 7, 7, 8), (2, 8), "NHWC"),
    ((2, 4, 8, 8, 8), (2, 8, 4, 4, 4), "NCDHW"),
    ((2, 64), (2, 32), "flat"),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after", "layout"), CASES)
def test_the_shape_is_repaired(before: tuple[int, ...], after: tuple[int, ...], layout: str, kind: str) -> None:
    adapter = adapter_for(before, after, layout=layout, kind=kind)
    x = torch.randn(before)
    assert adapter(x).shape == after
    assert (kind in ("auto", "project")) or not list(adapter.parameters())
    twin = pickle.loads(pickle.dumps(adapter))
    assert torch.equal(twin(x), adapter(x))
    spec = ModuleSpec.of(adapter).recorded()
    assert spec.reason is None
    assert torch.equal(spec.build()(x), adapter(x))
    assert torch.equal(copy.deepcopy(adapter)(x), adapter(x))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9))
def test_any_picture_is_repaired(height: int, width: int, stride: int, old: int, new: int) -> None:
    before, after = (2, old, height, width), (2, new, -(-height // stride), -(-width // stride))
    for layout in ("NCHW", "NHWC"):
        order = (0, 1, 2, 3) if layout == "NCHW" else (0, 2, 3, 1)
        shapes = [tuple(shape[dim] for dim in order) for shape in (before, after)]
        for kind in KINDS:
            adapter = adapter_for(shapes[0], shapes[1], layout=layout, kind=kind)
            assert adapter(torch.randn(shapes[0])).shape == shapes[1]


def test_what_agrees_is_kept() -> None:
    x = torch.randn(2, 4, 8, 8)
    pooled = nn.functional.avg_pool2d(x, 2)
    auto = adapter_for((2, 4, 8, 8), (2, 6, 4, 4), layout="NCHW")(x)
    assert torch.equal(auto[:, :4], pooled)
    assert not auto[:, 4:].any()
    sliced = adapter_for((2, 4, 8, 8), (2, 6, 4, 4), layout="NCHW", kind="slice")(x)
    assert torch.equal(sliced[:, :4], x[:, :, ::2, ::2])
    narrow = adapter_for((2, 4, 8, 8), (2, 3, 8, 8), layout="NCHW")
    assert isinstance(narrow, nn.Conv2d)
    assert torch.allclose(narrow(x), x[:, :3])
    projected = adapter_for((2, 4, 8, 8), (2, 6, 4, 4), layout="NCHW", kind="project")
    assert isinstance(projected, nn.Conv2d)
    assert torch.allclose(projected(x), sliced)


def test_it_follows_the_stride_at_other_sizes() -> None:
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
    adapter = adapter_for((2, 3, 64, 64), (2, 8, 32, 32), layout="NCHW")
    for side in (31, 64, 65, 97):
        x = torch.randn(1, 3, side, side)
        assert adapter(x).shape == conv(x).shape


def test_class_tokens_stay() -> None:
    x = torch.randn(2, 17, 8)
    adapter = adapter_for((2, 17, 8), (2, 5, 8), layout="NLC")
    assert isinstance(adapter, TokenGrid)
    assert torch.equal(adapter(x)[:, 0], x[:, 0])
    assert torch.allclose(adapter(x)[:, 1], x[:, 1:].reshape(2, 4, 4, 8)[:, :2, :2].mean((1, 2)), atol=1e-6)


@pytest.mark.parametrize(
    ("before", "after", "modules", "layout"),
    [
        ((2, 8, 8, 8), (2, 4, 4, 8), [nn.Linear(8, 8)], "NHWC"),
        ((2, 8, 8, 8), (2, 8, 4, 4), [nn.Conv2d(8, 8, 1)], "NCHW"),
        ((2, 5, 9), (2, 5, 4), [nn.Linear(9, 4)], "NLC"),
        ((2, 5, 9), (2, 4, 9), [nn.Conv1d(5, 4, 1)], "NCL"),
        ((2, 3, 32, 32), (2, 7, 16, 16), [], "NCHW"),
        ((2, 32, 32, 3), (2, 16, 16, 7), [], "NHWC"),
        ((2, 9), (2, 4), [], "flat"),
    ],
)
def test_the_layout_is_told(
    before: tuple[int, ...], after: tuple[int, ...], modules: list[nn.Module], layout: str
) -> None:
    assert layout_of(before, after, modules) == layout


def test_what_is_not_known() -> None:
    for before, after in (((2, 8), (2, 8, 4, 4)), ((8, 3, 4), (2, 3, 4)), ((2, 3, 5, 6), (2, 7, 9))):
        with pytest.raises(EditError, match="no adapter is known") as caught:
            adapter_for(before, after, layout="NCHW")
        assert (caught.value.found, caught.value.expected) == (before, after)


def test_handing_on() -> None:
    x, mask = torch.randn(2, 4), torch.ones(2)
    assert PassOn("hidden")(mask, hidden=x) is x
    assert PassOn(0, 1)([mask, x]) is x
    copied = PassOn(copied=True)(x)
    assert copied is not x
    assert torch.equal(copied, x)
    assert PassOn(1, form="list", outputs=("=mask", "value", "none"))(3, x, mask=mask) == [mask, x, None]
    assert PassOn(adapter=FitChannels(6))(x).shape == (2, 6)
    assert "PassOn(1, list(value, =0))" in repr(PassOn(1, form="list", outputs=("value", "=0")))


@pytest.mark.parametrize("kind", KINDS)
def test_models_with_adapters_are_exported(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(5 * 196, 4)
    ).eval()
    x = torch.randn(2, 3, 32, 32)
    trimmed = remove(net, x, ["0", "2"], adapter=kind)
    assert not isinstance(trimmed[0], nn.Conv2d) or kind == "project"
    export_onnx(trimmed, x, tmp_path / "net.onnx", benchmark=False)


def test_adapters_of_the_user() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    x = torch.randn(3, 4)
    mine = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    trimmed = remove(net, x, "0", adapter=mine)
    assert trimmed[0] is mine
    assert torch.equal(trimmed.eval()(x), net[2](net[1](mine(x))))
    trimmed = remove(net, x, ["0", "2"], adapter={"2": nn.Linear(4, 7)})
    assert list(trimmed._modules) == ["1", "2"]
    assert trimmed(x).shape == (3, 7)
    again = apply(net, x, history(trimmed))
    assert torch.equal(again(x), trimmed(x))
    for adapter, message in [
        (nn.Linear(3, 4), "does not take its input"),
        (nn.Linear(4, 5), "does not give the shape"),
        ("huge", "no such adapter"),
        ({"1": nn.ReLU()}, "no run of what goes begins there"),
        ({"0": 3}, "an adapter is a module"),
    ]:
        with pytest.raises(EditError, match=message):
            remove(net, x, "0", adapter=adapter)  # type: ignore[arg-type]


def test_without_an_adapter_both_shapes_are_told() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 1))
    with pytest.raises(EditError, match="no adapter is allowed") as caught:
        plan(net, torch.zeros(1, 3, 8, 8), Remove(("0",), adapter=None))
    assert (caught.value.path, caught.value.found, caught.value.expected) == ("0", [1, 3, 8, 8], [1, 8, 4, 4])
    assert "AvgPool2d" in str(caught.value)


def test_channels_last() -> None:
    x = torch.randn(2, 6, 8, 3)
    assert ChannelsLast(nn.Conv2d(3, 5, 1))(x).shape == (2, 6, 8, 5)
