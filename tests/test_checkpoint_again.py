"""Several loads in one process: what was made before is copied, where nothing that decides it has changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import torchtrim as tt
from torchtrim.checkpoint import again, rebuild
from torchtrim.edits import calls
from torchtrim.graph.opened import OpenedModule

HERE = "tests.test_checkpoint_again" if __name__.startswith("tests.") else __name__
X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the factories that were called, one for each model that was made and not copied."""
    names: list[str] = []
    make = rebuild.Factory.make

    def counted(self: rebuild.Factory, trusted: Any) -> nn.Module:
        names.append(self.name)
        return make(self, trusted)

    monkeypatch.setattr(rebuild.Factory, "make", counted)
    again.forget()
    return names


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small residual network with a layer put into the middle of a block, whose forward is opened for that."""
    path = tmp_path_factory.mktemp("again") / "net.trim"
    net = tt.insert(timm.create_model("test_resnet"), X, nn.PReLU(), after="layer1.0.bn2", check=False)
    assert any(isinstance(module, OpenedModule) for module in net.modules())
    tt.save(net, path, factory="timm:test_resnet")
    return path


def outputs(net: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = net.eval()(X)
    return found


def test_the_second_load_gives_the_same_and_makes_nothing(saved: Path, made: list[str]) -> None:
    first, second, third = (tt.load(saved) for _ in range(3))
    assert made == ["timm:test_resnet"]
    assert tt.history(first) == tt.history(second) == tt.history(third)
    assert list(first.state_dict()) == list(second.state_dict())
    assert torch.equal(outputs(first), outputs(second))
    assert torch.equal(outputs(first), outputs(third))
    assert [type(m).__qualname__ for m in first.modules()] == [type(m).__qualname__ for m in second.modules()]


def test_edits_are_done_again_with_one_run_in_each_mode(
    saved: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[tuple[bool, bool]] = []
    run_once = calls._run_once

    def counted(model: nn.Module, inputs: Any, training: bool, watch: Any, fake: Any, user_hooks: bool) -> None:
        runs.append((training, fake is not None))
        run_once(model, inputs, training, watch, fake, user_hooks)

    monkeypatch.setattr(calls, "_run_once", counted)
    tt.load(saved)
    assert sorted(runs) == [(False, True), (True, True)]


def test_loaded_models_share_nothing(saved: Path, made: list[str]) -> None:
    nets = [tt.load(saved) for _ in range(3)]
    expected = outputs(nets[2])
    for net in nets[:2]:  # the one that was made, and a copy
        with torch.no_grad():
            for tensor in (*net.parameters(), *net.buffers()):
                tensor.zero_()
        for module in net.modules():
            module.register_forward_hook(lambda *_: torch.zeros(1))
            module.__dict__["stain"] = True
            if isinstance(module, OpenedModule):
                for node in reversed(list(module.graph.nodes)):
                    if node.op == "call_module" and node.target == "prelu":
                        node.replace_all_uses_with(node.args[0])
                        module.graph.erase_node(node)
                module.recompile()
        net.layer2 = nn.Identity()
    for net in (nets[2], tt.load(saved)):
        assert torch.equal(outputs(net), expected)
        assert not any(hasattr(module, "stain") for module in net.modules())
    assert len(made) == 1


def test_a_copy_trains_and_is_edited_like_another(saved: Path, tmp_path: Path, made: list[str]) -> None:
    tt.load(saved)
    net = tt.load(saved)
    net.train()(X).sum().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())
    smaller = tt.attach_head(tt.cut(net, X, after="layer2"), X, num_classes=3)
    tt.save(smaller, tmp_path / "smaller.trim")
    assert torch.equal(outputs(tt.load(tmp_path / "smaller.trim")), outputs(smaller))


def test_files_of_other_weights_share_what_was_made(saved: Path, tmp_path: Path, made: list[str]) -> None:
    net = tt.load(saved)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(0.5)
    tt.save(net, tmp_path / "half.trim")
    made.clear()
    assert torch.equal(outputs(tt.load(tmp_path / "half.trim")), outputs(net))
    assert made == []


def test_records_of_other_values_are_other_models(tmp_path: Path, made: list[str]) -> None:
    for slope in (0.25, 0.5):
        layer = nn.LeakyReLU(slope)
        net = tt.replace(timm.create_model("test_resnet"), X, "layer1.0.act1", layer, check=False)
        tt.save(net, tmp_path / f"{slope}.trim", factory="timm:test_resnet")
    made.clear()
    slopes = [tt.load(tmp_path / f"{slope}.trim").layer1[0].act1.negative_slope for slope in (0.25, 0.5, 0.25)]
    assert slopes == [0.25, 0.5, 0.25]
    assert len(made) == 2


def small() -> nn.Module:
    """A factory of the user's."""
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def test_factories_of_the_user_are_called_each_time(tmp_path: Path, made: list[str]) -> None:
    name = f"{HERE}:small"
    tt.save(tt.cut(small(), torch.zeros(1, 4), after="1"), tmp_path / "a.trim", factory=name)
    made.clear()
    for _ in range(2):
        tt.load(tmp_path / "a.trim", trusted=[name])
    assert made == [name, name]


def test_models_that_users_register_are_made_each_time(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision.models import _api

    monkeypatch.setitem(_api.BUILTIN_MODELS, "my_net", lambda **options: ResNet(BasicBlock, [1, 1, 1, 1]))
    tt.save(ResNet(BasicBlock, [1, 1, 1, 1]), tmp_path / "a.trim", factory="torchvision:my_net")
    made.clear()
    for _ in range(2):
        tt.load(tmp_path / "a.trim")
    assert made == ["torchvision:my_net"] * 2


def test_a_forward_that_was_replaced_is_seen(saved: Path, made: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(tt.load(saved))
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: forward(self, x))
    tt.load(saved)
    assert len(made) == 2


def test_switches_of_torch_and_of_the_zoo_are_seen(saved: Path, made: list[str]) -> None:
    from timm.layers import set_fused_attn

    tt.load(saved)
    try:
        set_fused_attn(False)
        tt.load(saved)
    finally:
        set_fused_attn(True)
    assert len(made) == 2
    tt.load(saved)
    assert len(made) == 2


def test_a_smaller_bound_is_kept(made: list[str]) -> None:
    start, past = rebuild.Factory("timm:test_resnet"), tt.history(nn.Identity())
    again.made_again(start, past, trusted=(), limit=None)
    assert again._made[next(iter(again._made))].limit is None
    again.made_again(start, past, trusted=(), limit=2**30)  # what was made without a bound says nothing of one
    again.made_again(start, past, trusted=(), limit=2**31)
    assert len(made) == 2


def test_few_are_remembered_and_none_with_memory_of_its_own(made: list[str]) -> None:
    past = tt.history(nn.Identity())
    for count in range(1, again._COUNT + 3):
        again.made_again(rebuild.Factory("timm:test_resnet", {"num_classes": count}), past, trusted=(), limit=None)
    assert len(again._made) == again._COUNT
    for held in again._made.values():
        assert all(tensor.untyped_storage().nbytes() <= 8 for tensor in held.model.state_dict().values())
