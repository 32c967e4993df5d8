import pytest
import timm
import torch
from torch import nn
from torch.nn import functional

from torchtrim.errors import InputError, PathError, SelectionError
from torchtrim.graph.paths import find, matches, resolve, select


class Backwards(nn.Module):
    """Registered in the reverse of the order in which it runs, with one module of two names and one never called."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(1, 1)
        self.last = nn.Linear(4, 2)
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.first = nn.Linear(3, 4)
        self.alias = self.first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for block in reversed(self.blocks):
            x = functional.relu(block(x))
        return self.last(x)


@pytest.mark.parametrize(
    ("path", "pattern", "fits"),
    [
        ("layer1.0.conv1", "layer1.*.conv1", True),
        ("layer1.0.conv1", "layer1.*", False),
        ("layer1.0.conv1", "layer?.[0-3].conv[12]", True),
        ("layer1.4.conv1", "layer?.[0-3].conv1", False),
        ("layer1.0.conv1", "**.conv1", True),
        ("conv1", "**.conv1", True),
        ("layer1", "layer1.**", True),
        ("layer1.0.conv1", "layer1.**.conv1", True),
        ("a.b.c.d", "a.**.c.**", True),
        ("layer10", "layer1", False),
        ("layer1.0", "layer1*", False),
    ],
)
def test_globs_work_component_by_component(path: str, pattern: str, fits: bool) -> None:
    assert matches(path, pattern) is fits


def test_registration_order_without_inputs_and_execution_order_with() -> None:
    model = Backwards()
    assert find(model) == ["unused", "last", "blocks", "blocks.0", "blocks.1", "first"]
    ordered = find(model, example_inputs=torch.zeros(2, 3))
    assert ordered == ["first", "blocks", "blocks.1", "blocks.0", "last", "unused"]


def test_inputs_that_the_history_recorded_give_the_order() -> None:
    model = Backwards()
    model.__dict__["_torchtrim_inputs"] = {"args": [{"shape": [1, 3], "dtype": "float32"}], "kwargs": {}}
    assert find(model, type=nn.Linear)[0] == "first"


def test_every_kind_of_selection() -> None:
    model = timm.create_model("test_resnet")
    convs = find(model, nn.Conv2d)
    assert convs == find(model, "**", type=nn.Conv2d) == find(model, lambda path, module: isinstance(module, nn.Conv2d))
    assert find(model, ["layer1.0", "layer?"]) == ["layer1", "layer1.0", "layer2", "layer3", "layer4"]
    assert find(model, "layer*", where=lambda path, module: path != "layer2", expect=3)
    assert find(model, "layer*", type=(nn.Sequential, nn.Conv2d), expect=range(2, 5))
    assert find(model, "layer*", type=nn.LSTM, expect=0) == []


def test_a_shared_module_comes_once_and_an_alias_by_request() -> None:
    model = Backwards()
    assert "alias" not in find(model)
    assert find(model, "alias") == ["alias"] == find(model, "al*")
    assert find(model, ["alias", "first"]) == ["alias"]
    assert resolve(model, "alias") is model.first


def test_a_wrong_count_lists_what_was_found() -> None:
    model = Backwards()
    with pytest.raises(SelectionError, match=r"fits 2 modules \(found: blocks.0, blocks.1; expected: 3 modules"):
        find(model, "blocks.*", expect=3)
    with pytest.raises(SelectionError, match=r"nothing in Backwards fits 'block\.\*'.*'blocks'"):
        find(model, "block.*")
    with pytest.raises(SelectionError, match="6 before the filters"):
        find(model, type=nn.LSTM)
    with pytest.raises(SelectionError):
        find(model, [])
    with pytest.raises(SelectionError, match="a path, a glob"):
        find(model, 3)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match="a path, a glob"):
        find(model, model.first)


def test_an_unknown_path_names_the_nearest() -> None:
    model = timm.create_model("test_resnet")
    with pytest.raises(PathError, match=r"layer1.0.conv9.*'layer1.0.conv1'") as caught:
        find(model, "layer1.0.conv9")
    assert caught.value.path == "layer1.0.conv9"
    with pytest.raises(PathError, match="under 'layer1': 0"):
        resolve(model, "layer1.7")
    with pytest.raises(PathError, match="under 'fc': none"):
        resolve(model, "fc.weight")
    with pytest.raises(PathError):
        select(model, ["layer1", "layer9"])


def test_a_path_that_is_no_string_and_a_predicate_of_one_argument() -> None:
    model = Backwards()
    with pytest.raises(PathError, match=r"a path is a string \(found: <class .*Linear"):
        resolve(model, nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(SelectionError, match=r"with a path and a module: too many.*<lambda>\(module\)"):
        find(model, lambda module: True)  # type: ignore[misc, arg-type]
    with pytest.raises(SelectionError, match="with a path and a module"):
        find(model, where=lambda: True)  # type: ignore[misc, arg-type]
    for wrong in ({"where": "first"}, {"type": "Linear"}, {"expect": "2"}):
        with pytest.raises(SelectionError, match=f"^{next(iter(wrong))}: not a"):
            find(model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="of the user"):
        find(model, lambda path, module: raises(TypeError("of the user")))


def raises(error: Exception) -> bool:
    raise error


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"^first: .*float32\[2, 5\].*3 in the last dimension"):
        find(Backwards(), example_inputs=torch.zeros(2, 5))


def test_wrapped_models_are_looked_into() -> None:
    model = Backwards()
    assert find(nn.DataParallel(model)) == find(model) == find(torch.compile(model))
