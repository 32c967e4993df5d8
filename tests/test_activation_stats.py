"""What comes out of layers, how channels rank, feature maps, and the gradients of a training loop."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchtrim as tt


class Counted(nn.Sequential):
    rows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:
            Counted.rows += len(x)
        return super().forward(x)


def net() -> Counted:
    made = Counted(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(3)
    )
    made(torch.zeros(2, 3, 8, 8))
    with torch.no_grad():
        made[1].weight[2], made[1].bias[2] = 0.0, -1.0  # behind it nothing comes through
    return made


DATA = [torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(n)) for n in range(3)]


@torch.no_grad()
def test_one_pass_equals_a_naive_one() -> None:
    model = net().eval()
    kept: dict[int, list[torch.Tensor]] = {2: [], 4: []}
    for place in kept:
        model[place].register_forward_hook(lambda _m, _a, out, place=place: kept[place].append(out.double()))
    model(torch.cat(DATA))
    Counted.rows = 0
    found = tt.activation_stats(model.train(), DATA)
    assert Counted.rows == 15 == found.rows and [layer.path for layer in found.layers] == ["2", "4"]
    for place, (values,) in kept.items():
        layer = found[str(place)]
        assert layer.mean == pytest.approx(float(values.mean()))
        assert layer.std == pytest.approx(float(values.std(correction=0)))
        assert layer.zeros == pytest.approx(float((values == 0).double().mean()))
        assert layer.channel_mean == pytest.approx(values.mean((0, 2, 3)).tolist())
        assert layer.channel_std == pytest.approx(values.std((0, 2, 3), correction=0).tolist())
        assert layer.channel_zeros == pytest.approx((values == 0).double().mean((0, 2, 3)).tolist())
    assert found.dead == {"2": (2,)}
    assert model.training and len(kept[2]) == 1  # the user's hooks saw nothing of it


def test_an_offset_costs_no_precision() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(2) * 1e-2)
        layer.bias.fill_(1000.0)
    found = tt.activation_stats(nn.Sequential(layer), [torch.randn(500, 2), torch.randn(500, 2)])
    assert found["0"].channel_std == pytest.approx((1e-2, 1e-2), rel=0.1)


def test_paths_calls_and_tokens() -> None:
    import timm

    model = timm.create_model("test_vit").eval()
    found = tt.activation_stats(model, [torch.randn(2, 3, 160, 160)], "blocks.*.mlp.act")
    assert [layer.path for layer in found.layers] == [f"blocks.{n}.mlp.act" for n in range(6)]
    assert all(layer.channels == model.blocks[0].mlp.fc1.out_features for layer in found.layers)

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.act = nn.Linear(3, 4), nn.Linear(4, 5), nn.ReLU()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.act(self.two(self.act(self.one(x))))

    twice = tt.activation_stats(Twice(), [torch.randn(4, 3)])
    assert [(layer.path, layer.channels) for layer in twice.layers] == [("act#0", 4), ("act#1", 5)]
    assert json.loads(json.dumps(twice.to_dict()))["rows"] == 4 and "act#1" in str(twice)
    assert "<table>" in twice._repr_html_()


def test_bad_input_is_told() -> None:
    with pytest.raises(tt.InputError, match="no batches"):
        tt.activation_stats(net(), [])
    with pytest.raises(tt.PathError):
        tt.activation_stats(net(), DATA, "7")
    unused = net()
    unused[0].add_module("spare", nn.Linear(3, 3))
    with pytest.raises(tt.PathError, match="nothing came out"):
        tt.activation_stats(unused, DATA, "0.spare")
    with pytest.raises(tt.ModelError, match="finite"):
        tt.activation_stats(net(), [torch.full((2, 3, 8, 8), torch.nan)])
    with pytest.raises(tt.PathError, match="no statistics"):
        _ = tt.activation_stats(net(), DATA)["1"]


def test_channels_rank_as_they_are_pruned() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[4].zero_()
        model[1].weight[4] = 0.0
        model[3].weight[:, 4].zero_()
    found = tt.rank_channels(model, example_inputs=DATA[0])
    assert [layer.path for layer in found.layers] == ["0", "3"] and len(found["0"].scores) == 6
    assert found.least() == [("0", 4)] and found["0"].scores[4] == 0
    assert json.loads(json.dumps(found.to_dict()))["criterion"] == "magnitude"
    assert "sorted" in str(found) and "<table>" in found._repr_html_()
    quiet = tt.rank_channels(model, DATA, "apoz")
    assert quiet["0"].scores[2] == 0  # zero behind its norm
    assert tt.rank_channels(model, DATA, "bn_scale").notes == ("3: it has no batch norm to rank its channels by",)
    assert [layer.path for layer in tt.rank_channels(model, DATA, protect="3").layers] == ["0"]
    with pytest.raises(tt.InputError, match="needs data"):
        tt.rank_channels(model, None, "taylor", DATA[0])
    with pytest.raises(tt.InputError, match="nothing says"):
        tt.rank_channels(model)
    with pytest.raises(tt.EditError, match="no such importance"):
        tt.rank_channels(model, DATA, "size")
    with pytest.raises(tt.EditError, match="no channels that could go"):
        tt.rank_channels(nn.Sequential(nn.Linear(3, 2)), [torch.zeros(1, 3)])
    with pytest.raises(tt.InputError, match="so many"):
        found.least(11)


def test_feature_maps_are_what_comes_out(tmp_path: Path) -> None:
    model = net().train()
    maps = tt.feature_maps(model, DATA[0], ["0", "2", "6"], tmp_path / "maps.png", channels=3, row=1)
    assert {path: tuple(each.shape) for path, each in maps.items()} == {"0": (3, 6, 6), "2": (3, 6, 6), "6": (1, 1, 3)}
    with torch.no_grad():
        expected = model.eval()[0](DATA[0])[1, [0, 2, 5]]
    assert torch.allclose(maps["0"], expected, atol=1e-6)
    assert (tmp_path / "maps.png").stat().st_size > 5000
    with pytest.raises(tt.InputError, match="no such row"):
        tt.feature_maps(model, DATA[0], "0", row=5)
    with pytest.raises(tt.PathError):
        tt.feature_maps(model, DATA[0], "9")
    with pytest.raises(tt.InputError, match="cannot be written"):
        tt.feature_maps(model, DATA[0], "0", tmp_path / "no" / "maps.png")


def test_tokens_are_laid_out_as_a_square_and_go_into_tensorboard(tmp_path: Path) -> None:
    import timm
    from torch.utils import tensorboard

    model = timm.create_model("test_vit").eval()
    with tensorboard.SummaryWriter(tmp_path) as writer:
        maps = tt.feature_maps(model, torch.randn(1, 3, 160, 160), "blocks.[05]", writer=writer, step=3)
    assert [tuple(each.shape) for each in maps.values()] == [(12, 10, 10)] * 2
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path)).Reload()
    assert events.Tags()["images"] == ["feature maps/blocks.0", "feature maps/blocks.5"]
    assert events.Images("feature maps/blocks.0")[0].step == 3


def test_gradient_flow_records_what_the_loop_sees(tmp_path: Path) -> None:
    model = net()
    model[0].requires_grad_(False)
    flow = tt.GradientFlow(model, every=2)
    assert flow.paths == ("0", "3", "6")
    expected = []
    for number in range(4):
        model.zero_grad()
        model(DATA[0]).square().mean().backward()
        flow.step()
        if number % 2 == 0:
            own = [held.grad.norm() for held in model[3].parameters() if held.grad is not None]
            expected.append(float(torch.stack(own).norm()))
    assert flow.steps == 4 and flow.lengths.shape == (2, 3) and np.isnan(flow.lengths[:, 0]).all()
    assert flow.lengths[:, 1].tolist() == pytest.approx(expected, rel=1e-5)
    assert "never had a gradient" in str(flow) and "<table>" in flow._repr_html_()
    assert json.loads(json.dumps(flow.to_dict()))["lengths"][0][0] is None
    assert flow.plot(tmp_path / "flow.png").stat().st_size > 5000
    assert set(flow.least(2)) == {"3", "6"}
    with pytest.raises(tt.InputError):
        flow.least(3)


def test_gradient_flow_tells_low_gradients_and_writes_curves(tmp_path: Path) -> None:
    from torch.utils import tensorboard

    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    with tensorboard.SummaryWriter(tmp_path) as writer:
        flow = tt.GradientFlow(model, writer=writer)
        model(torch.randn(8, 4)).sum().backward()
        for held in model[1].parameters():
            held.grad.mul_(1e-5)
        flow.step()
    assert flow.table().rows[1][-1] == "low" and flow.least() == ["1"]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"] == [f"gradients/{n}" for n in range(3)]
    with pytest.raises(tt.InputError, match="nothing was recorded"):
        str(tt.GradientFlow(model))
    with pytest.raises(tt.InputError, match="1 or more"):
        tt.GradientFlow(model, every=0)
    with pytest.raises(tt.ModelError, match="no weights"):
        tt.GradientFlow(nn.ReLU())
    assert tt.GradientFlow(model, "2").paths == ("2",)
