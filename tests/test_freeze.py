import copy
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

from torchtrim.errors import PathError, SelectionError
from torchtrim.train.freeze import freeze, has_statistics, unfreeze

image = torch.zeros(2, 3, 64, 64)


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def held(model: nn.Module) -> set[str]:
    model.train()
    return {name for name, module in model.named_modules() if has_statistics(module) and not module.training}


class Tied(nn.Module):
    """Registered backwards; the last layer shares the weight of the first, and one parameter is the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 10, bias=False)
        self.last = nn.BatchNorm1d(8)
        self.middle = nn.Linear(8, 8)
        self.embed = nn.Embedding(10, 8)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.ones(8))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.last(self.middle(self.embed(ids).sum(1))) * self.scale)


def test_frozen_parameters_and_statistics_stay_and_the_rest_moves() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4)
    for parameter in model.parameters():  # timm starts some norms at zero, behind which no gradient comes
        nn.init.normal_(parameter, std=0.5)
    report = freeze(model, upto="layer2", example_inputs=image)
    assert report.paths == ("conv1", "bn1", "layer1", "layer2")
    assert report.frozen + report.trainable == sum(p.numel() for p in model.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(torch.randn(4, 3, 64, 64)).sum().backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(before[name], tensor) == name.startswith(report.paths), name


@pytest.mark.parametrize(
    "move", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_held_statistics_survive_copies(move) -> None:  # type: ignore[no-untyped-def]
    model = timm.create_model("test_efficientnet")
    freeze(model, "blocks.0")
    moved = move(model)
    assert held(moved) == held(model) != set()
    original = next(module for module in model.blocks[0].modules() if has_statistics(module))
    unfreeze(moved)
    assert not held(moved) and not original.training, "a copy is freed without the original"
    assert trainable(moved) == {name for name, _ in moved.named_parameters()}


def test_tracked_statistics_go_on() -> None:
    model = timm.create_model("test_resnet").train()
    report = freeze(model, "layer1", batchnorm="track")
    assert report.batchnorm == 0 and not held(model)
    before = model.layer1[0].bn1.running_mean.clone()
    model(torch.randn(2, 3, 64, 64))
    assert not torch.equal(before, model.layer1[0].bn1.running_mean)


def test_tracking_releases_what_an_earlier_call_held() -> None:
    model = timm.create_model("test_resnet").train()
    everywhere = freeze(model).batchnorm
    assert 0 < freeze(model, "layer1", batchnorm="track").batchnorm < everywhere
    model.train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("running_mean")}
    model(torch.randn(2, 3, 64, 64))
    moved = {
        name.split(".")[0]
        for name, buffer in model.named_buffers()
        if not torch.equal(before.get(name, buffer), buffer)
    }
    assert moved == {"layer1"} and trainable(model) == set()


def test_sync_batchnorm_conversion_comes_before_freezing() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    freeze(model)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert held(converted) == set(), "the conversion makes new norms, as the docstring says"
    assert freeze(converted).batchnorm == 1 and held(converted) == {"1"}


def test_parameters_are_named_by_themselves() -> None:
    model = timm.create_model("test_vit")
    report = freeze(model, ["head.bias", "cls_token", "blocks.0"])
    assert report.paths == ("blocks.0", "head.bias", "cls_token")
    names = {name for name, _ in model.named_parameters()}
    assert names - trainable(model) == {n for n in names if n in report.paths or n.startswith("blocks.0.")}
    unfreeze(model, "*.bias")
    assert "head.bias" in trainable(model) and "cls_token" not in trainable(model)
    unfreeze(model, "*_token")
    assert "cls_token" in trainable(model)

    norm = nn.Sequential(nn.BatchNorm1d(2))
    assert freeze(norm, "0.weight").batchnorm == 0 and held(norm) == set() and trainable(norm) == {"0.bias"}
    tied = Tied()
    freeze(tied, "head.weight")
    assert trainable(tied) == {"last.weight", "last.bias", "middle.weight", "middle.bias", "scale"}
    freeze(tied, "**.bias")
    assert trainable(tied) == {"last.weight", "middle.weight", "scale"}


def test_unfreeze_puts_norms_in_the_mode_of_what_holds_them() -> None:
    model = timm.create_model("test_resnet").train()
    freeze(model, "layer1")
    unfreeze(model, "layer1")
    assert model.layer1[0].bn1.training and "train" not in model.layer1[0].bn1.__dict__
    freeze(model, "layer1")
    model.eval()
    unfreeze(model, "layer1")
    assert not model.layer1[0].bn1.training


def test_the_order_is_that_of_execution_where_inputs_are_known() -> None:
    ids = torch.zeros(2, 3, dtype=torch.int64)
    model = Tied()
    assert freeze(model, upto="middle", example_inputs=ids).paths == ("head", "middle", "embed")
    assert trainable(model) == {"last.weight", "last.bias", "scale"} and held(model) == set()
    unfreeze(model)
    freeze(model, upto="last", example_inputs=ids)
    assert trainable(model) == {"scale"} and held(model) == {"last"}
    unfreeze(model, since="last", example_inputs=ids)
    assert trainable(model) == {"scale", "last.weight", "last.bias"} and held(model) == set()

    registered = Tied()
    freeze(registered, upto="last")
    assert trainable(registered) == {"middle.weight", "middle.bias"}
    freeze(registered)
    unfreeze(registered, since="middle")
    assert trainable(registered) == {"middle.weight", "middle.bias", "head.weight"}, "its embedding is shared"


def test_a_vision_transformer_freezes_its_own_parameters_with_the_first_blocks() -> None:
    model = timm.create_model("test_vit")
    freeze(model, upto="blocks.1", example_inputs=torch.zeros(1, 3, 160, 160))
    assert {name.split(".")[0] for name in trainable(model)} == {"blocks", "norm", "head"}
    assert "blocks.2.norm1.weight" in trainable(model) and "blocks.1.norm1.weight" not in trainable(model)


def test_selections_add_up() -> None:
    model = timm.create_model("test_resnet")
    freeze(model)
    assert trainable(model) == set()
    unfreeze(model, ["fc", "layer4.*"])
    assert {name.split(".")[0] for name in trainable(model)} == {"fc", "layer4"}
    freeze(model, nn.Linear)
    assert {name.split(".")[0] for name in trainable(model)} == {"layer4"}
    unfreeze(model, lambda path, module: path.endswith("bn1"))
    assert "layer1.0.bn1.weight" in trainable(model)


def test_stale_gradients_do_not_move_what_is_frozen() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(torch.ones(1, 2)).sum().backward()
    before = model[0].weight.clone()
    freeze(model, "0")
    optimizer.step()
    assert torch.equal(before, model[0].weight)


def test_every_norm_with_statistics_is_held_and_no_other() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3),
        nn.SyncBatchNorm(3),
        nn.InstanceNorm2d(3, track_running_stats=True),
        timm.layers.BatchNormAct2d(3),
        nn.InstanceNorm2d(3),
        torchvision.ops.FrozenBatchNorm2d(3),
        nn.GroupNorm(1, 3),
        nn.BatchNorm2d(3, track_running_stats=False),
    )
    assert freeze(model).batchnorm == 4
    assert held(model) == {"0", "1", "2", "3"}


def test_what_cannot_be_frozen_changes_nothing() -> None:
    model = Tied()
    for wrong in (
        {"what": "heads"},
        {"what": "x*"},
        {"what": "head", "upto": "last"},
        {"upto": "nowhere"},
        {"upto": nn.Linear},
        {"upto": "scale"},
        {"what": lambda module: True},
        {"what": ["head", "scal"]},
        {"what": []},
        {"what": "head", "batchnorm": "keep"},
    ):
        with pytest.raises((PathError, SelectionError)):
            freeze(model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(PathError, match="'head'"):
        unfreeze(model, "heads")
    with pytest.raises(PathError, match=r"no module or parameter of this name.*'head.weight'"):
        freeze(model, "head.weigth")
    with pytest.raises(SelectionError, match=r"no module and no parameter.*'scale'"):
        freeze(model, "scales*")
    inception = torchvision.models.inception_v3(init_weights=False, weights=None)
    with pytest.raises(PathError, match="never called"):
        freeze(inception, upto="AuxLogits", example_inputs=torch.zeros(1, 3, 299, 299))
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_the_report_says_what_was_done() -> None:
    report = freeze(timm.create_model("test_resnet"), "layer*")
    assert str(report).startswith("froze layer1, layer2, layer3, layer4: ")
    assert report.to_dict()["paths"] == ["layer1", "layer2", "layer3", "layer4"] and "<p>" in report._repr_html_()
