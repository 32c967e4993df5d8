"""Replacing modules by path, glob, type, predicate and address; the ready-made functions; and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import nn

import torchtrim as tt
from torchtrim.edits.edit import Edit
from torchtrim.edits.replace import Old, Replace, replace
from torchtrim.edits.replacements import group_norm
from torchtrim.graph.check import differs

X = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
SMALL = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.act = nn.ReLU()
        self.also = self.act
        self.body = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout(0.5))
        self.fc = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.act(self.norm(self.conv(x)))
        y = self.also(self.body(x))
        y = torch.relu(x - y)
        y += x
        torch.relu_(y)
        return self.fc(y.mean((2, 3)))  # type: ignore[no-any-return]


class Double(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def outputs(model: nn.Module, x: torch.Tensor, training: bool = False) -> Any:
    twin = copy.deepcopy(model).train(training)
    torch.manual_seed(3)
    return twin(x)


def by_hand(model: nn.Module, **modules: nn.Module) -> nn.Module:
    twin = copy.deepcopy(model)
    for path, module in modules.items():
        owner, _, name = path.replace("__", ".").rpartition(".")
        setattr(twin.get_submodule(owner), name, module)
    return twin


def replayed(model: nn.Module, net: nn.Module, x: Any, **options: Any) -> nn.Module:
    return tt.apply(model, x, [Edit.from_dict(tt.history(net).edits[-1].to_dict())], **options)


@pytest.mark.parametrize(
    ("what", "paths"),
    [
        (nn.ReLU, ["act", "body.1"]),
        ("act", ["act"]),
        ("body.*", ["body.0", "body.1", "body.2"]),
        (["body.1", nn.Dropout], ["body.1", "body.2"]),
        (lambda path, module: path.endswith("2"), ["body.2"]),
        (["body", "body.1"], ["body"]),
    ],
)
def test_what_is_replaced(what: Any, paths: list[str]) -> None:
    model = Net()
    net = replace(model, SMALL, what, nn.Hardswish())
    assert list(tt.history(net).edits[0].modules) == paths
    assert [path for path, each in net.named_modules() if isinstance(each, nn.Hardswish)] == paths
    assert not any(isinstance(each, nn.Hardswish) for each in model.modules())
    assert type(net) is Net
    twin = by_hand(model, **{path.replace(".", "__"): nn.Hardswish() for path in paths})
    if "act" in paths:
        twin.also = twin.act
    for training in (False, True):
        assert torch.equal(outputs(net, SMALL, training), outputs(twin, SMALL, training))
    assert torch.equal(outputs(replayed(model, net, SMALL), SMALL), outputs(net, SMALL))


def test_a_shared_module_is_replaced_once_everywhere() -> None:
    net = replace(Net(), SMALL, "also", nn.SiLU())
    assert isinstance(net.act, nn.SiLU)
    assert net.also is net.act


def test_every_place_gets_a_copy_of_its_own() -> None:
    new = nn.PReLU()
    net = replace(Net(), SMALL, nn.ReLU, new)
    assert len({id(each.weight) for each in (net.act, net.body[1], new)}) == 3


def test_a_function_of_the_old_module() -> None:
    model = Net()
    wider = replace(model, SMALL, "fc", lambda old: nn.Linear(old.in_features, 7))
    assert wider(SMALL).shape == (2, 7)
    assert "where it returned" in tt.history(wider).entries[0].notes[0]
    seen: list[str] = []

    def change(path: str, old: nn.Module) -> nn.Module | None:
        seen.append(path)
        return nn.Sequential(old, nn.Dropout(0.1)) if path == "fc" else None

    wrapped = replace(model, SMALL, nn.Linear, change)
    assert seen == ["fc"]
    assert torch.equal(wrapped.fc[0].weight, model.fc.weight)
    assert wrapped.fc[0].weight is not model.fc.weight
    assert torch.equal(outputs(wrapped, SMALL), outputs(model, SMALL))
    assert torch.equal(outputs(replayed(model, wrapped, SMALL), SMALL), outputs(wrapped, SMALL))


def test_the_old_module_in_the_new_one() -> None:
    class Own(nn.Linear):
        """A class that no record may name."""

    model = Net()
    model.fc = Own(4, 2)
    own = model.fc
    for new in (lambda old: nn.Sequential(old, nn.Dropout(0.1)), nn.Sequential(Old(), nn.Dropout(0.1))):
        net = replace(model, SMALL, "fc", new)
        assert torch.equal(net.fc[0].weight, own.weight)
        spec = tt.history(net).edits[0].modules["fc"]
        assert spec.weights is None
        other = copy.deepcopy(model)
        nn.init.ones_(other.fc.weight)
        again = replayed(other, net, SMALL, copy=False)
        assert again.fc[0] is other.get_submodule("fc.0")
        assert isinstance(again.fc[0], Own)
        assert bool((again.fc[0].weight == 1).all())
    assert replace(model, SMALL, "fc", lambda old: nn.Sequential(old), copy=False).fc[0] is own
    with pytest.raises(tt.EditError, match="no old module"):
        replace(model, SMALL, ":relu", nn.Sequential(Old(), nn.ReLU()))


def test_a_function_that_changes_the_old_one() -> None:
    model = Net()

    def stronger(old: nn.Module) -> nn.Module:
        old.p = 0.9
        return old

    net = replace(model, SMALL, nn.Dropout, stronger)
    assert (net.body[2].p, model.body[2].p) == (0.9, 0.5)
    assert replayed(model, net, SMALL).body[2].p == 0.9


def test_in_place_the_parameters_stay_the_same_objects() -> None:
    model = Net()
    parameters = dict(model.named_parameters())
    net = replace(model, SMALL, "fc", lambda old: nn.Sequential(old), copy=False)
    assert net is model
    assert net.fc[0].weight is parameters["fc.weight"]
    assert all(net.get_parameter(name) is held for name, held in parameters.items() if not name.startswith("fc"))


def test_the_mode_and_the_type_of_values_follow_the_old_one() -> None:
    model = Net().double()
    model.norm.eval()
    net = replace(
        model,
        SMALL.double(),
        ["norm", "fc"],
        lambda old: nn.Linear(4, 2) if isinstance(old, nn.Linear) else nn.GroupNorm(2, 4),
    )
    assert (net.norm.training, net.fc.training) == (False, True)
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float64}


def test_one_call_of_a_shared_module() -> None:
    model = Net()
    for address, count in (("act#0", 1), ("act#1", 1), (["act#0", "act#1"], 2)):
        net = replace(model, SMALL, address, nn.SiLU())
        assert sum(isinstance(each, nn.SiLU) for each in net.modules()) == count
        assert not torch.equal(outputs(net, SMALL), outputs(model, SMALL))
        assert differs(outputs(replayed(model, net, SMALL), SMALL), outputs(net, SMALL)) is None
    every, whole = (replace(model, SMALL, what, nn.SiLU()) for what in (["act#0", "act#1"], "act"))
    assert torch.allclose(outputs(every, SMALL), outputs(whole, SMALL))


def test_at_functions() -> None:
    model = Net()
    same = replace(model, SMALL, ":relu", nn.ReLU())
    for training in (False, True):
        assert torch.allclose(outputs(same, SMALL, training), outputs(model, SMALL, training), atol=1e-6)
    assert isinstance(same.relu, nn.ReLU)
    assert tt.history(same).entries[0].removed == (":relu",)
    with pytest.raises(tt.EditError, match="takes 2 positional arguments but 3"):
        replace(model, SMALL, ":sub", nn.ReLU())


@pytest.mark.parametrize(
    ("what", "new", "message"),
    [
        ("acts", nn.SiLU(), "'act'"),
        (nn.Tanh, nn.SiLU(), "Tanh"),
        ("act", nn.SiLU, r"SiLU\(\)"),
        ("act", "SiLU", "a module, or a function"),
        ("act", lambda: nn.SiLU(), "lambda old"),
        ("act", lambda old: 3, "no module"),
        ("act", lambda old: None, "nothing to replace"),
        ([], nn.SiLU(), "nothing to replace"),
        ("", nn.SiLU(), "whole model"),
        ("conv", nn.Conv2d(3, 5, 3, padding=1), r"what follows.*\[1, 4, 8, 8\]"),
        ("conv", nn.Conv2d(5, 4, 3, padding=1), r"does not take what is given there.*\[1, 4, 8, 8\]"),
        (":relu_", nn.ReLU(), "in place"),
        (":relu", lambda old: nn.ReLU(), "no old module"),
        (":tanh", nn.ReLU(), "no such call"),
        ("act#2", nn.ReLU(), "2 calls"),
    ],
)
def test_what_cannot_be_done_says_why_and_changes_nothing(what: Any, new: Any, message: str) -> None:
    model = Net()
    expected, kinds = outputs(model, SMALL), [type(each) for each in model.modules()]
    with pytest.raises(tt.TorchTrimError, match=message):
        replace(model, SMALL, what, new, copy=False)
    assert torch.equal(outputs(model, SMALL), expected)
    assert [type(each) for each in model.modules()] == kinds
    assert tt.history(model).entries == ()


def test_a_record_by_hand() -> None:
    record = {"kind": "replace", "what": ["body.**"], "types": ["nn.ReLU"], "module": {"type": "LeakyReLU"}}
    net = tt.apply(Net(), SMALL, record)
    assert (type(net.act), type(net.body[1])) == (nn.ReLU, nn.LeakyReLU)
    everywhere = tt.apply(Net(), SMALL, {"kind": "replace", "types": ["ReLU"], "module": {"type": "LeakyReLU"}})
    assert isinstance(everywhere.act, nn.LeakyReLU)
    assert str(tt.history(everywhere).edits[0]) == "replace(act: LeakyReLU(), body.1: LeakyReLU())"
    with pytest.raises(tt.EditError, match="no such key"):
        tt.apply(Net(), SMALL, {"kind": "replace", "type": ["ReLU"]})
    with pytest.raises(tt.EditError, match="nothing is said"):
        tt.apply(Net(), SMALL, {"kind": "replace", "types": ["ReLU"]})


def test_a_plan_tells_the_shapes_and_changes_nothing() -> None:
    module = nn.SiLU()
    edit = Replace(("act",), module=tt.history(replace(Net(), SMALL, "act", module)).edits[0].modules["act"])
    joint = tt.plan(Net(), SMALL, edit).steps[0].joints[0]
    assert (joint.address, joint.before, joint.after) == ("act", (1, 4, 8, 8), (1, 4, 8, 8))
    assert module.training


def test_an_own_class_is_replayed_where_it_is_trusted() -> None:
    model = Net()
    net = replace(model, SMALL, "act", Double())
    name = f"{__name__}:Double"
    with pytest.raises(tt.EditError, match="may not name"):
        replayed(model, net, SMALL)
    assert torch.equal(outputs(replayed(model, net, SMALL, trusted={name: Double}), SMALL), outputs(net, SMALL))


def test_group_norm_for_batch_norm() -> None:
    model = timm.create_model("test_efficientnet").eval()
    torch.nn.init.uniform_(model.bn1.weight)
    net = replace(model, X, nn.BatchNorm2d, group_norm(8))
    assert not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in net.modules())
    norm, act = net.bn1
    assert torch.equal(norm.weight, model.bn1.weight)
    assert norm.weight is not model.bn1.weight
    assert (norm.num_groups, norm.eps, type(act)) == (8, model.bn1.eps, type(model.bn1.act))
    assert torch.equal(outputs(replayed(model, net, X), X), outputs(net, X))
    plain = replace(torchvision.models.resnet18(), X, nn.BatchNorm2d, group_norm())
    assert plain.bn1.num_groups == 32
    with pytest.raises(tt.EditError, match="groups"):
        group_norm(0)


def test_group_norm_leaves_other_classes_and_refuses_what_it_cannot_tell() -> None:
    class Odd(nn.BatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 3

    assert group_norm()(nn.ReLU()) is None
    with pytest.raises(tt.EditError, match="does more"):
        group_norm()(Odd(4))


class Side(nn.Module):
    """Uses a module for what it writes to its input."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.r, self.b = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.a(x)
        self.r(h)
        return self.b(h)  # type: ignore[no-any-return]


def test_what_works_in_place_and_whose_value_is_not_used() -> None:
    x = torch.randn(2, 4)
    for check in (True, False):
        with pytest.raises(tt.EditError, match="its value is not used"):
            replace(Side(), x, "r", nn.ReLU(), check=check)
        with pytest.raises(tt.EditError, match="its value is not used"):
            tt.insert(Side(), x, nn.Tanh(), before="r", check=check)
    model = Side()
    net = replace(model, x, "r", nn.ReLU6(inplace=True))
    assert torch.equal(net(x), model.b(nn.functional.relu6(model.a(x))))
    net = replace(nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True)), x, "1", nn.SiLU())
    assert isinstance(net[1], nn.SiLU)


def test_a_function_that_writes_to_the_old_module_writes_to_a_copy() -> None:
    def doubled(old: nn.Module) -> nn.Module:
        with torch.no_grad():
            old.get_parameter("weight").mul_(2)
        old.eps = 0.5  # type: ignore[assignment]
        return old

    x = torch.randn(2, 3, 8, 8)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    net = replace(model, x, nn.BatchNorm2d, doubled)
    assert float(model[1].weight.detach().sum()) == 4
    assert (float(net[1].weight.detach().sum()), net[1].eps) == (8, 0.5)
    assert torch.equal(replayed(model, net, x)(x), net(x))
    bias = model[1].bias
    replace(model, x, nn.BatchNorm2d, doubled, copy=False)
    assert model[1].bias is bias
