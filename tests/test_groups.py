from typing import Any

import pytest
import timm
import torch
import torchvision
from timm.optim import param_groups_layer_decay
from torch import nn

from torchtrim.errors import PathError, SelectionError
from torchtrim.train.freeze import freeze
from torchtrim.train.groups import param_groups


def by_name(model: nn.Module, groups: list[dict[str, Any]], key: str) -> dict[str, Any]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)]: group[key] for group in groups for parameter in group["params"]}


def in_one_group_each(model: nn.Module, groups: list[dict[str, Any]]) -> bool:
    listed = [id(parameter) for group in groups for parameter in group["params"]]
    return sorted(listed) == sorted(id(p) for p in model.parameters() if p.requires_grad)


ZOO = ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "test_byobnet", "resnet18", "efficientnet_b0"]


@pytest.mark.parametrize(
    "name", [*ZOO, "swin_tiny_patch4_window7_224", "levit_128s", "beit_base_patch16_224", "regnetx_002", "densenet121"]
)
def test_layer_decay_equals_that_of_timm(name: str) -> None:
    with torch.device("meta"):
        model = timm.create_model(name)
    ours = param_groups(model, lr=0.01, layer_decay=0.7)
    own = model.no_weight_decay() if hasattr(model, "no_weight_decay") else ()
    theirs = param_groups_layer_decay(model, layer_decay=0.7, no_weight_decay_list=own)
    assert in_one_group_each(model, ours)
    assert by_name(model, ours, "lr_scale") == by_name(model, theirs, "lr_scale")
    assert by_name(model, ours, "lr") == {name: 0.01 * s for name, s in by_name(model, theirs, "lr_scale").items()}
    assert by_name(model, ours, "weight_decay") == by_name(model, theirs, "weight_decay")


class Backwards(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(4, 2)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.relu = nn.ReLU()
        self.stem = nn.Linear(3, 4)
        self.scale = nn.Parameter(torch.ones(4))
        self.token = nn.Parameter(torch.ones(1, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x + self.token)
        for block in self.blocks:
            x = self.relu(block(x))
        return self.head(x * self.scale)


def test_depth_follows_the_execution_order() -> None:
    model = Backwards()
    scales = by_name(model, param_groups(model, layer_decay=0.5, example_inputs=torch.zeros(1, 3)), "lr_scale")
    assert {name.removesuffix(".weight"): scale for name, scale in scales.items() if not name.endswith("bias")} == {
        "token": 0.125,
        "stem": 0.125,
        "blocks.0": 0.25,
        "blocks.1": 0.5,
        "scale": 0.5,
        "head": 1.0,
        "unused": 1.0,
    }


def test_torchvision_models_are_layered_by_block() -> None:
    model = torchvision.models.resnet18()
    groups = param_groups(model, lr=1.0, layer_decay=0.9, example_inputs=torch.zeros(1, 3, 64, 64))
    rates = by_name(model, groups, "lr")
    order = ["conv1", "bn1", *(f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)), "fc"]
    assert [rates[f"{name}.weight"] for name in order] == [pytest.approx(0.9**k) for k in range(10, -1, -1)]
    assert groups[0]["name"].startswith("layer 1 of 11") and in_one_group_each(model, groups)
    registered = by_name(model, param_groups(model, lr=1.0, layer_decay=0.9), "lr")
    assert registered == rates


def test_a_wrapper_is_looked_into() -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))

    assert len({group["lr"] for group in param_groups(Wrapped(), layer_decay=0.5)}) == 2
    assert len({group["lr"] for group in param_groups(nn.DataParallel(Wrapped()), layer_decay=0.5)}) == 2


def test_norms_biases_and_named_parameters_do_not_decay() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.norm = nn.LayerNorm((4, 4))
            self.table = nn.Parameter(torch.zeros(3, 3))
            self.position = nn.Parameter(torch.zeros(1, 3))
            self.tall = nn.ParameterDict({"bias": nn.Parameter(torch.zeros(2, 2))})

        def no_weight_decay(self) -> set[str]:
            return {"position"}

    model = Model()
    decays = by_name(model, param_groups(model, weight_decay=0.1, no_decay=["tab*"]), "weight_decay")
    assert {name for name, decay in decays.items() if decay} == {"linear.weight"}
    assert by_name(model, param_groups(model), "weight_decay")["table"] == 0.05


def test_discriminative_rates_and_an_optimizer_that_takes_them() -> None:
    model = timm.create_model("test_resnet")
    freeze(model, "layer1")
    groups = param_groups(model, lr=0.1, lrs={"fc": 1.0, "layer[34]": 0.01})
    assert in_one_group_each(model, groups)
    rates = by_name(model, groups, "lr")
    assert (rates["fc.weight"], rates["layer3.0.conv1.weight"], rates["conv1.0.weight"]) == (1.0, 0.01, 0.1)
    assert {group["name"] for group in groups} >= {"fc", "fc, no weight decay", "layer[34]", "all layers"}
    optimizer = torch.optim.AdamW(groups)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    with_decay = param_groups(model, lr=0.1, layer_decay=0.5, lrs={"layer?": 0.02})
    assert len([group for group in with_decay if group["name"].startswith("layer?")]) == 2
    assert len({group["name"] for group in with_decay}) == len(with_decay)


def test_shared_parameters_come_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    groups = param_groups(model, layer_decay=0.5, lrs={"1": 0.2})
    assert in_one_group_each(model, groups)
    with pytest.raises(SelectionError, match=r"0.weight: two learning rates.*'0': 0.1 and '1': 0.2"):
        param_groups(model, lrs={"0": 0.1, "1": 0.2})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lrs": {"layer4": 0.1, "layer*": 0.2}}, "two learning rates"),
        ({"lrs": {"stage*": 0.1}}, "nothing in ResNet fits"),
        ({"lrs": {"fc": -1.0}}, r"^lrs\[.fc.\]: out of range \(found: -1.0"),
        ({"lr": 0.0}, "^lr: out of range .*a number above 0"),
        ({"lr": -0.1}, "^lr: out of range"),
        ({"lr": "1e-3"}, "^lr: not a number .found: '1e-3'; expected: a number above 0"),
        ({"lrs": {"fc": "1e-3"}}, "not a number"),
        ({"lrs": ["fc"]}, "^lrs: not rates by path"),
        ({"layer_decay": None}, "^layer_decay: not a number"),
        ({"layer_decay": 1.5}, "above 0 and at most 1"),
        ({"layer_decay": float("nan")}, "above 0 and at most 1"),
        ({"weight_decay": -0.1}, "^weight_decay: out of range"),
        ({"weight_decay": float("inf")}, "^weight_decay: out of range"),
        ({"no_decay": "fc.weigth"}, "no_decay='fc.weigth': no parameter of ResNet.*'fc.weight'"),
        ({"no_decay": ["fc.*", "layer4"]}, r"no_decay='layer4'.*Try: layer4\.\*"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(SelectionError, match=message):
        param_groups(timm.create_model("test_resnet"), **arguments)


def test_one_name_is_one_name() -> None:
    model = timm.create_model("test_resnet")
    for no_decay in ("fc.weight", ["fc.weight"], iter(["fc.w*"])):
        decays = by_name(model, param_groups(model, no_decay=no_decay), "weight_decay")
        assert decays["fc.weight"] == 0 and decays["layer4.0.conv1.weight"] == 0.05
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    assert by_name(tied, param_groups(tied, no_decay="1.weight"), "weight_decay")["0.weight"] == 0


def test_rates_of_parameters_by_name() -> None:
    model = timm.create_model("test_vit")
    groups = param_groups(model, lr=0.1, lrs={"pos_embed": 0.01, "head": 1.0, "**.qkv.bias": 0.5})
    rates = by_name(model, groups, "lr")
    assert in_one_group_each(model, groups)
    assert {name for name, rate in rates.items() if rate == 0.01} == {"pos_embed"}
    assert (
        {name for name, rate in rates.items() if rate == 0.5} == {n for n in rates if n.endswith("qkv.bias")} != set()
    )
    with pytest.raises(PathError, match="'pos_embed'"):
        param_groups(model, lrs={"pos_embedding": 0.1})
    with pytest.raises(SelectionError, match=r"head\.bias: two learning rates"):
        param_groups(model, lrs={"head": 0.1, "head.bias": 0.2})


def test_nothing_trainable_and_unknown_paths() -> None:
    model = timm.create_model("test_resnet")
    with pytest.raises(PathError, match="'layer4'"):
        param_groups(model, lrs={"layer9": 0.1})
    freeze(model)
    with pytest.raises(SelectionError, match="no parameter of the model is trainable"):
        param_groups(model)
