"""Blocks are found by what they hand on, and ranked in the order that can be worked out by hand."""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torchtrim as tt
from torchtrim.cli import app
from torchtrim.graph.inputs import Inputs
from torchtrim.importance.blocks import blocks_of
from torchtrim.importance.rank_blocks import METRICS

UNLABELLED = ("influence", "angular", "norm", "sampled", "fisher", "ablation")


class Unit(nn.Module):
    """x + strength * tanh(Wx); W turns the input out of its direction."""

    def __init__(self, width: int, strength: float) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width, bias=False)
        self.strength = strength

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.strength * torch.tanh(self.inner(x))


def chain(*strengths: float, width: int = 16, classes: int = 4) -> nn.Module:
    """Residual units of which each adds so much: the more, the more it matters."""
    generator = torch.Generator().manual_seed(1)
    net = nn.Sequential(*(Unit(width, strength) for strength in strengths), nn.Linear(width, classes))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Linear):
                square = torch.randn(width, width, generator=generator)
                module.weight.copy_(torch.linalg.qr(square)[0][: module.out_features])
    return net


class Small(nn.Sequential):
    """A convolutional network whose forwards are counted."""

    rows = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if type(x) is torch.Tensor:  # no fake one
            Small.rows += len(x)
        return super().forward(x)


class ConvUnit(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn(self.conv(x))
        out += x
        return self.act(out)


def small() -> Small:
    return Small(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        ConvUnit(8),
        ConvUnit(8),
        nn.MaxPool2d(2),
        ConvUnit(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )


def pictures(count: int = 24, size: int = 8) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(count, 3, 12, 12)
    y = torch.randint(0, 5, (count,))
    return list(zip(x.split(size), y.split(size), strict=True))


def rows(width: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x = torch.randn(96, width)
    return list(zip(x.split(32), chain(0.1, 0.4, 0.0, 0.2)(x).argmax(1).split(32), strict=True))


@pytest.mark.parametrize("metric", [name for name in METRICS if not name.startswith("attribution")])
def test_the_order_is_the_one_worked_out_by_hand(metric: str) -> None:
    net = chain(0.1, 0.4, 0.0, 0.2)
    ranking = tt.rank_blocks(net, rows(), metric)
    assert ranking.metric == metric and [each.path for each in ranking.blocks] == ["0", "1", "2", "3"]
    assert ranking["2"].score == pytest.approx(0, abs=1e-12)
    if metric != "ablation":  # without a block the loss can fall too
        assert ranking.order == ("2", "0", "3", "1") and ranking.least() == ["2"], ranking


def test_blocks_are_units_and_not_what_is_in_them_nor_stacks() -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Sequential(Unit(8, 1.0), nn.Sequential(Unit(8, 1.0))), nn.Linear(8, 8))
    found = blocks_of(net, Inputs.of(torch.zeros(2, 3)))
    assert [block.path for block in found] == ["1.0", "1.1.0"]
    assert [block.follows for block in found] == [False, True]
    assert [block.macs for block in found] == [64, 64]


def test_what_scales_its_input_is_no_block() -> None:
    class Gate(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.inner(x).sigmoid()

    with pytest.raises(tt.EditError, match="no block"):
        blocks_of(nn.Sequential(Gate(), nn.Linear(8, 8)), Inputs.of(torch.zeros(2, 8)))


@pytest.mark.parametrize(("name", "count"), [("resnet18", 5), ("swin_t", 12), ("shufflenet_v2_x0_5", 13)])
def test_what_is_found_can_be_removed(name: str, count: int) -> None:
    from torchvision import models

    net = models.get_model(name).eval()
    x = torch.zeros(1, 3, 64, 64)
    found = [block.path for block in blocks_of(net, Inputs.of(x))]
    assert len(found) == count
    if name == "resnet18":
        tt.remove(net, x, found, adapter=None, check=False)


@torch.no_grad()
def test_one_pass_equals_a_naive_one() -> None:
    net, data = small().eval(), pictures()
    seen: dict[str, list[torch.Tensor]] = {"2": [], "3": [], "5": []}
    for path in seen:
        net[int(path)].register_forward_hook(lambda _m, args, out, path=path: seen[path].append((args[0], out)))
    for x, _ in data:
        net(x)
    influence, angular, norm = (tt.rank_blocks(net, data, name) for name in ("influence", "angular", "norm"))
    for path, pairs in seen.items():
        before, after = (torch.cat(each).double() for each in zip(*pairs, strict=True))
        cosine = torch.cosine_similarity(before, after, dim=1)
        assert influence[path].score == pytest.approx(float((1 - cosine).mean()), rel=1e-4)
        assert angular[path].score == pytest.approx(float(cosine.clamp(-1, 1).arccos().mean()) / np.pi, rel=1e-4)
        added = (after - before).norm(dim=1) / before.norm(dim=1)
        finite = added.nan_to_num(0.0, 1.0)  # nothing added to nothing; something added to nothing
        assert norm[path].score == pytest.approx(float(finite.mean()), rel=1e-4)


@torch.no_grad()
def test_ablation_is_what_removal_does() -> None:
    net, data = small().eval(), pictures()
    x, y = (torch.cat(each) for each in zip(*data, strict=True))
    loss, accuracy, kl, output = (
        tt.rank_blocks(net, data, "ablation", measure=each) for each in ("loss", "accuracy", "kl", "output")
    )
    whole = net(x)
    for path in ("2", "3", "5"):
        other = tt.remove(net, x[:1], path)(x)
        rise = nn.functional.cross_entropy(other, y) - nn.functional.cross_entropy(whole, y)
        assert loss[path].score == pytest.approx(float(rise), abs=1e-5)
        lost = (whole.argmax(1) == y).float().mean() - (other.argmax(1) == y).float().mean()
        assert accuracy[path].score == pytest.approx(float(lost), abs=1e-6)
        moved = nn.functional.kl_div(other.log_softmax(1), whole.log_softmax(1), log_target=True, reduction="batchmean")
        assert kl[path].score == pytest.approx(float(moved), abs=1e-5)
        assert output[path].score == pytest.approx(float((other - whole).norm() / whole.norm()), abs=1e-5)
    assert tt.rank_blocks(net, data, "ablation")["2"].score == loss["2"].score  # the labels are looked at by default


@pytest.mark.parametrize(
    ("metric", "passes"), [("influence", 1), ("angular", 1), ("norm", 1), ("fisher", 1), ("taylor", 1), ("ablation", 4)]
)
def test_passes_are_counted_and_not_more_than_said(metric: str, passes: int) -> None:
    net, data = small(), pictures()
    Small.rows = 0
    ranking = tt.rank_blocks(net, data, metric)
    assert Small.rows == passes * 24 and ranking.forwards == passes and ranking.rows == 24
    assert ranking.backwards == (metric in ("fisher", "taylor"))


@torch.no_grad()
def test_sampled_is_ablation_on_its_rows_at_the_cost_of_one_pass() -> None:
    net, data = small().eval(), [x for x, _ in pictures(32, 16)]
    Small.rows = 0
    ranking = tt.rank_blocks(net, data, "sampled")
    assert Small.rows == 32 and ranking.forwards == 1 and "8 of the 32 rows" in str(ranking)
    taken = [x[torch.arange(4) * 4] for x in data]
    reference = tt.rank_blocks(net, taken, "ablation", measure="kl")
    for path in ("2", "3", "5"):
        assert ranking[path].score == pytest.approx(reference[path].score, rel=1e-4)


def test_taylor_and_fisher_are_gradient_times_what_is_added() -> None:
    net, data = small().eval(), pictures(8, 8)
    x, y = data[0]
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for path in ("2", "3", "5"):
        net[int(path)].register_forward_hook(lambda _m, args, out, path=path: kept.update({path: (args[0], out)}))
    losses = nn.functional.cross_entropy(net(x.clone()), y, reduction="none")
    taylor = tt.rank_blocks(net, data, "taylor")
    for path, (before, after) in kept.items():
        (slope,) = torch.autograd.grad(losses.sum(), after, retain_graph=True)
        change = (slope * (after - before)).flatten(1).sum(1)
        assert taylor[path].score == pytest.approx(float(change.detach().abs().mean()), rel=1e-4)


def test_fisher_is_the_divergence_to_the_second_order() -> None:
    net = chain(0.02, 0.06, 0.03)
    data = [torch.randn(4000, 16)]
    fisher = tt.rank_blocks(net, data, "fisher")
    true = tt.rank_blocks(net, data, "ablation", measure="kl")
    for each in fisher.blocks:
        assert each.score == pytest.approx(true[each.path].score, rel=0.15)
    assert fisher.spearman(true) == 1


def test_gradient_is_the_mean_length_over_batches() -> None:
    net, data = small(), pictures()
    net[3].requires_grad_(False)
    ranking = tt.rank_blocks(net, data, "gradient")
    assert all(held.grad is None for held in net.parameters())
    net.eval().requires_grad_()
    lengths = []
    for x, y in data:
        net.zero_grad()
        nn.functional.cross_entropy(net(x), y).backward()
        lengths.append(torch.stack([held.grad.norm() for held in net[3].parameters()]).norm())
    assert ranking["3"].score == pytest.approx(float(torch.stack(lengths).mean()), rel=1e-4)


def test_runs_of_blocks() -> None:
    net = chain(0.1, 0.4, 0.0, 0.2)
    data = [torch.randn(40, 16)]
    ranking = tt.rank_blocks(net, data, "angular", runs=2)
    assert [each.paths for each in ranking.blocks] == [("0", "1"), ("1", "2"), ("2", "3")]
    with torch.no_grad():
        x = data[0]
        after = net[3](net[2](net[1](net[0](x))))
        before = net[1](net[0](x))
        angle = torch.cosine_similarity(before, after, dim=1).arccos().mean() / np.pi
    assert ranking["2 .. 3"].score == pytest.approx(float(angle), rel=1e-3)
    assert ranking.least() == ["2", "3"] and ranking.least(2) == ["2", "3", "0", "1"]
    ablated = tt.rank_blocks(net, data, "ablation", runs=2, measure="output")
    with torch.no_grad():
        moved = (net[4](before) - net(x)).norm() / net(x).norm()
    assert ablated["2 .. 3"].score == pytest.approx(float(moved), rel=1e-4)
    assert tt.rank_blocks(net, data, "sampled", runs=2).order[0] == "2 .. 3"
    with pytest.raises(tt.EditError, match="so many times"):
        tt.rank_blocks(net, data, runs=5)
    with pytest.raises(tt.EditError, match="at most 2"):
        tt.rank_blocks(small(), pictures(), runs=3)  # a pooling lies between


@pytest.mark.parametrize("metric", METRICS)
def test_the_model_is_left_as_it_was(metric: str) -> None:
    net, data = small().train(), pictures(16, 8)
    net[2].eval()
    net[3].conv.weight.requires_grad_(False)
    calls: list[int] = []
    net[2].register_forward_hook(lambda *_: calls.append(1))
    net[8].weight.grad = torch.ones_like(net[8].weight)
    before = {name: held.clone() for name, held in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()]
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # type: ignore[index,union-attr]
    if metric == "attribution:lrp":
        with pytest.raises(tt.EditError, match="captum"):
            tt.rank_blocks(net, data, metric)
    else:
        tt.rank_blocks(net, data, metric)
    assert all(torch.equal(held, before[name]) for name, held in net.state_dict().items())
    assert [module.training for module in net.modules()] == modes and not calls
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in net.modules()] == hooks
    assert not net[3].conv.weight.requires_grad and bool((net[8].weight.grad == 1).all())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[2]
    assert np.random.get_state()[1].tolist() == states[1]  # type: ignore[index,union-attr]
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("metric", UNLABELLED)
def test_a_language_model_with_several_inputs_and_no_labels(metric: str) -> None:
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    net = transformers.BertModel(config, add_pooling_layer=False).eval()
    layer = net.encoder.layer[1]
    with torch.no_grad():  # its branches add nothing, and its norms find their input as they would leave it
        for dense in (layer.attention.output.dense, layer.output.dense):
            dense.weight.zero_(), dense.bias.zero_()
    batch = {"input_ids": torch.randint(0, 40, (6, 5)), "attention_mask": torch.ones(6, 5, dtype=torch.long)}
    ranking = tt.rank_blocks(net, [batch], metric)
    assert [each.path for each in ranking.blocks] == [f"encoder.layer.{n}" for n in range(3)]
    assert ranking.order[0] == "encoder.layer.1"
    x = dict(batch)
    assert tt.remove(net, x, ranking.least())(**x).last_hidden_state.shape == (6, 5, 16)


def test_a_causal_model_with_its_own_loss() -> None:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, vocab_size=40
    )
    net = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 40, (4, 6))
    for metric in ("taylor", "gradient", "ablation"):
        ranking = tt.rank_blocks(net, [{"input_ids": ids, "labels": ids}], metric)
        assert [each.path for each in ranking.blocks] == ["model.layers.0", "model.layers.1"]
    assert "loss" in ranking.unit


def test_a_vision_transformer() -> None:
    import timm

    net = timm.create_model("test_vit").eval()
    ranking = tt.rank_blocks(net, torch.randn(4, 3, 160, 160), "sampled")
    assert [each.path for each in ranking.blocks] == [f"blocks.{n}" for n in range(6)]


def test_attribution_by_captum() -> None:
    ranking = tt.rank_blocks(small(), pictures(8, 4), "attribution")
    assert [each.path for each in ranking.blocks] == ["2", "3", "5"]
    assert min(each.score for each in ranking.blocks) > 0 and ranking.backwards == 3 * 16
    with pytest.raises(tt.EditError, match="single blocks"):
        tt.rank_blocks(small(), pictures(), "attribution", runs=2)

    class Plain(nn.Sequential):
        pass

    plain = Plain(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3))
    relevance = tt.rank_blocks(plain, [torch.rand(5, 4)], "attribution:lrp", blocks=["0", "2"])
    assert all(each.score > 0 for each in relevance.blocks)


def test_without_captum_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "captum", None)
    with pytest.raises(tt.MissingDependency, match=r"torchtrim\[attribution\]"):
        tt.rank_blocks(small(), pictures(), "attribution")


def test_blocks_of_ones_own_choice() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    ranking = tt.rank_blocks(net, [torch.randn(8, 4)], blocks=["1", "3"])
    assert [each.path for each in ranking.blocks] == ["1", "3"]
    with pytest.raises(tt.EditError, match="not the shape") as error:
        tt.rank_blocks(net, [torch.randn(8, 4)], blocks="0")
    assert error.value.path == "0" and error.value.found == "[8, 4] to [8, 6]"
    with pytest.raises(tt.PathError):
        tt.rank_blocks(net, [torch.randn(8, 4)], blocks="9")


def test_a_ranking_is_a_table_a_picture_and_plain_data(tmp_path: Path) -> None:
    ranking = tt.rank_blocks(chain(0.1, 0.4, 0.0), [torch.randn(32, 16)])
    text = str(ranking)
    assert "█" in text and "MACs" in text and "1 forward passes" in text
    assert json.loads(json.dumps(ranking.to_dict()))["order"] == ["2", "0", "1"]
    assert "<table>" in ranking._repr_html_()
    assert ranking.plot(tmp_path / "blocks.png").stat().st_size > 5000
    assert ranking.spearman({"0": 1.0, "1": 2.0, "2": 3.0}) == pytest.approx(-0.5)
    assert ranking.spearman({"0": 5.0, "1": 5.0, "2": 1.0}) == pytest.approx(0.8660254, abs=1e-6)
    assert np.isnan(ranking.spearman({"0": 1.0, "1": 1.0, "2": 1.0}))
    with pytest.raises(tt.InputError):
        ranking.spearman({"0": 1.0})
    with pytest.raises(tt.InputError, match="so many"):
        ranking.least(4)
    with pytest.raises(tt.PathError):
        _ = ranking["7"]


class Nothing:
    def __iter__(self) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("made", "kind", "told"),
    [
        (lambda: tt.rank_blocks(nn.Sequential(nn.Linear(4, 4)), [torch.zeros(2, 4)]), tt.EditError, "no block"),
        (lambda: tt.rank_blocks(small(), []), tt.InputError, "no batches"),
        (lambda: tt.rank_blocks(small(), Nothing()), tt.InputError, "no batches"),
        (lambda: tt.rank_blocks(small(), Nothing(), "norm", torch.zeros(1, 3, 12, 12)), tt.InputError, "no batches"),
        (lambda: tt.rank_blocks(small(), 3), tt.InputError, "iterable of batches"),  # type: ignore[arg-type]
        (lambda: tt.rank_blocks(small(), pictures()[0]), tt.InputError, "this is one batch"),
        (lambda: tt.rank_blocks(small(), [torch.zeros(2, 5, 12, 12)]), tt.InputError, "refuses"),
        (lambda: tt.rank_blocks(small(), [x for x, _ in pictures()], "taylor"), tt.InputError, "no labels"),
        (lambda: tt.rank_blocks(small(), [x for x, _ in pictures()], "gradient"), tt.InputError, "no labels"),
        (
            lambda: tt.rank_blocks(small(), [x for x, _ in pictures()], "ablation", measure="loss"),
            tt.InputError,
            "no labels",
        ),
        (
            lambda: tt.rank_blocks(small(), [x for x, _ in pictures()], "ablation", measure="accuracy"),
            tt.InputError,
            "needs labels",
        ),
        (lambda: tt.rank_blocks(small(), pictures(), "influense"), tt.EditError, "influence"),
        (lambda: tt.rank_blocks(small(), pictures(), "influence", measure="kl"), tt.EditError, "no such measure"),
        (lambda: tt.rank_blocks(small(), pictures(), "ablation", measure="f1"), tt.EditError, "no such measure"),
        (lambda: tt.rank_blocks(small(), pictures(), runs=0), tt.EditError, "1 or more"),
        (lambda: tt.rank_blocks(small().to("meta"), pictures()), tt.ModelError, "meta"),
    ],
)
def test_bad_input_is_told(made: Any, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        made()


@pytest.mark.parametrize("metric", [name for name in METRICS if name != "attribution:lrp"])
def test_values_that_are_not_finite_are_told(metric: str) -> None:
    net = small()
    with torch.no_grad():
        net[3].conv.weight.fill_(torch.nan)
    with pytest.raises(tt.ModelError, match="finite") as error:
        tt.rank_blocks(net, pictures(), metric)
    if metric in ("influence", "angular", "norm", "sampled", "taylor", "fisher"):
        assert error.value.path == "3"
    if metric == "influence":
        x = torch.full((4, 3, 12, 12), torch.nan)
        with pytest.raises(tt.ModelError, match="goes into it"):
            tt.rank_blocks(small(), [x], metric)


def test_an_iterator_is_gone_through_once_and_no_row_is_lost() -> None:
    data = pictures()
    assert tt.rank_blocks(small(), iter(data)).rows == 24
    assert tt.rank_blocks(small(), torch.randn(8, 3, 12, 12).split(4)).rows == 8  # a tuple of two batches


def test_from_the_shell(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.random.default_rng(0).normal(size=(8, 3, 64, 64)).astype("float32"))
    plot = tmp_path / "blocks.png"
    command = ["rank", "timm:test_resnet", "--input", "1,3,64,64", "--data", str(tmp_path / "data.npz")]
    answer = CliRunner().invoke(app, [*command, "--metric", "sampled", "--plot", str(plot), "--json"])
    assert answer.exit_code == 0, answer.output
    assert json.loads(answer.stdout)["order"] == ["layer1.0"] and plot.stat().st_size > 1000
    answer = CliRunner().invoke(app, [*command, "--metric", "tailor"])
    assert answer.exit_code == 1 and "taylor" in answer.output
