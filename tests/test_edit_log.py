"""The edit log: records as data, `apply`, `plan`, and what an edit that no longer fits says."""

from __future__ import annotations

import copy
import json
from typing import Any

import jsonschema
import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.edits.edit import from_json, from_yaml, json_schema, to_json, to_yaml
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.weights import Weights

X = torch.zeros(1, 3, 16, 16)
GELU = ModuleSpec("GELU", {})


def net() -> nn.Sequential:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))


def edited(model: nn.Module) -> nn.Module:
    return tt.attach_head(tt.cut(model, X, after="0.2"), num_classes=3, hidden=(6,), dropout=0.1)


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_a_history_replays_to_the_bit_through_text(form: str) -> None:
    model = net()
    trimmed = edited(model)
    text = tt.history(trimmed).edits_as(form)
    edits = from_json(text) if form == "json" else from_yaml(text)
    assert edits == list(tt.history(trimmed).edits)
    torch.manual_seed(99)
    again = tt.apply(model, X, edits)
    assert same(trimmed, again)
    assert tt.history(again).edits == tt.history(trimmed).edits
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(trimmed.eval()(x), again.eval()(x))


def test_the_whole_history_is_data() -> None:
    record = tt.history(edited(net()))
    again = tt.History.from_dict(json.loads(record.to_json()))
    assert again == record
    with pytest.raises(tt.EditError, match=r"entries\[1\]"):
        broken = record.to_dict()
        broken["entries"][1]["edit"]["pooling"] = "avg"
        tt.History.from_dict(broken)


def test_the_seed_of_a_head_is_the_users() -> None:
    model = net()
    torch.manual_seed(7)
    one = edited(model)
    torch.manual_seed(7)
    assert same(one, edited(model))
    assert not same(one, edited(model))


def test_weights_of_every_type_survive() -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn]
    tensors = {str(kind): torch.randn(2, 3).to(kind) for kind in kinds}
    weights = Weights(
        tensors | {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 4), "nan": torch.tensor([float("nan")])}
    )
    assert Weights.from_dict(json.loads(json.dumps(weights.to_dict()))) == weights
    tensors["torch.float32"].add_(1)
    assert weights != Weights(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": "float33"}, "no such type"),
        ({"dtype": {}}, "no such type"),
        ({"shape": [-1]}, "not a shape"),
        ({"shape": [3]}, "not the length"),
        ({"shape": [1 << 62, 1 << 62]}, "not the length"),
        ({"data": "???"}, "base64"),
        ({"more": 1}, "not a tensor"),
    ],
)
def test_wrong_weights_are_refused(change: dict[str, Any], message: str) -> None:
    data = Weights({"w": torch.zeros(2)}).to_dict()
    data["w"] |= change
    with pytest.raises(tt.EditError, match=message):
        Weights.from_dict(data)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"kind": "cutt", "after": ["a"]}, "one of these names: 'cut'"),
        ({"kind": "cut", "afte": ["a"]}, r"edits\[0\].cut.afte.*'after'"),
        ({"kind": "cut", "after": [1]}, r"edits\[0\].cut.after\[0\]"),
        ({"kind": "cut", "after": ["a"], "version": 9}, "newer torchtrim"),
        ({"kind": "cut", "after": []}, "nothing to cut"),
        ({"after": ["a"]}, "no such kind"),
        ({"cut": {"after": "a"}}, '"kind": "cut", ...'),
        ("cut", "object of keys"),
    ],
)
def test_a_wrong_record_says_where(record: Any, message: str) -> None:
    with pytest.raises(tt.EditError, match=message):
        tt.apply(net(), X, [record])


def test_text_that_is_not_records() -> None:
    for text in ("{", "3", '{"kind": "cut"}', "[" * 100_000):
        with pytest.raises(tt.EditError):
            from_json(text)
    for text in ("{", "!!python/object/apply:os.system ['true']", "a: &a [*a, *a]"):
        with pytest.raises(tt.EditError):
            from_yaml(text)


def test_the_schema_takes_records_and_refuses_others() -> None:
    schema = json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    good = json.loads(to_json(tt.history(edited(net())).edits))
    jsonschema.validate(good, schema)
    for bad in ([{"kind": "cut", "afte": ["a"]}], [{"after": ["a"]}], [{"kind": "cut", "after": "a"}]):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(bad, schema)


def test_yaml_is_readable() -> None:
    assert "after:\n  - '0.2'\n" in to_yaml(tt.history(edited(net())).edits)


def test_plan_tells_and_changes_nothing() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    planned = tt.plan(model, X, [tt.Cut(("0.2",)), tt.AttachHead(num_classes=3)])
    assert torch.equal(state, torch.get_rng_state())
    assert planned.removed == ("0.3", "0.4", "1", "2", "3")
    assert [step.params[1] for step in planned.steps] == [240, 267]
    assert planned.macs == (14 * 14 * 8 * 27 + 12 * 12 * 8 * 72 + 40, 14 * 14 * 8 * 27 + 24)
    assert planned.outputs == (("float32[1, 5]",), ("float32[1, 3]",))
    assert "Plan for Sequential" in str(planned) and "0.3, 0.4" in str(planned)
    json.dumps(planned.to_dict())
    assert "<table" in planned._repr_html_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not tt.history(model).entries


def test_an_edit_that_no_longer_fits_names_the_one_that_took_its_place() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(tt.PathError, match=r"edit 2 of 2, cut.*it went away with edit 1, cut\(after='0.2'"):
        tt.apply(model, X, [tt.Cut(("0.2",)), tt.Cut(("0.4",))], copy=False)
    assert same(model, net()) and all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with pytest.raises(tt.PathError, match="it went away with edit 1"):
        tt.cut(tt.cut(model, X, after="0.2"), after="3")


@pytest.mark.parametrize(
    ("edits", "taker"),
    [
        ([tt.Cut(("0.2",)), tt.AttachHead(num_classes=3), tt.Remove(("0.[34]",))], "edit 1, cut"),
        ([tt.Remove(("0.2",)), tt.Remove(("0.4",)), tt.Replace(types=("ReLU",), module=GELU)], "edit 2, remove"),
        ([tt.Replace(types=("ReLU",), module=GELU), tt.Replace(types=("ReLU",), module=GELU)], "edit 1, replace"),
    ],
)
def test_a_selection_that_fits_nothing_any_more_names_the_edit(edits: list[tt.Edit], taker: str) -> None:
    with pytest.raises(tt.SelectionError, match=f"edit {len(edits)} of {len(edits)}.*it went away with {taker}"):
        tt.apply(net(), X, edits)
    with pytest.raises(tt.SelectionError) as error:
        tt.apply(net(), X, tt.Remove(("no.*",)))
    assert "went away" not in str(error.value)


def test_what_is_edited_in_inference_mode_can_be_trained() -> None:
    model = net()
    with torch.inference_mode():
        x = torch.ones(1, 3, 16, 16)
        heads = [tt.attach_head(tt.remove(model, given, "0.4"), given, num_classes=3) for given in (X, x)]
    for result in heads:
        result(X).sum().backward()
        assert all(parameter.grad is not None for parameter in result.parameters())


def test_a_list_that_fails_gives_the_users_module_back() -> None:
    given = nn.Conv2d(8, 8, 1)
    edits = [tt.Insert(ModuleSpec.of(given), after="0.2", name="mine"), tt.DeleteChannels({"0.mine": (0,)})]
    assert tt.apply(net(), X, edits)[0].mine.out_channels == 7
    given = nn.Conv2d(8, 8, 1)
    edits[0] = tt.Insert(ModuleSpec.of(given), after="0.2", name="mine")
    with pytest.raises(tt.PathError):
        tt.apply(net(), X, [*edits, tt.Remove(("nope",))])
    assert given.weight.shape == (8, 8, 1, 1) and given.out_channels == 8


def test_a_glob_finds_the_edit_in_a_history_too() -> None:
    cut = tt.cut(net(), X, after="0.2")
    with pytest.raises(tt.SelectionError, match="it went away with edit 1, cut"):
        tt.apply(cut, X, tt.Remove(("0.[34]",)))
    with pytest.raises(tt.SelectionError) as error:
        tt.apply(cut, X, tt.Remove(("0.[56]",)))
    assert "went away" not in str(error.value)


def test_in_place_keeps_modules_parameters_and_hooks() -> None:
    model = net()
    parameters = dict(model.named_parameters())
    conv = model[0][0]
    seen: list[int] = []
    handle = conv.register_forward_hook(lambda *_: seen.append(1))
    result = tt.attach_head(model, X, num_classes=9, copy=False)
    assert result is model and model[0][0] is conv
    assert all(parameters[name] is held for name, held in model.named_parameters() if not name.startswith("3."))
    assert not seen
    model(torch.zeros(2, 3, 16, 16))
    handle.remove()
    model(torch.zeros(2, 3, 16, 16))
    assert seen == [1]


def test_a_given_head_is_in_the_record_with_its_weights() -> None:
    model, head = net(), nn.Sequential(nn.Linear(8, 4), nn.Tanh(), nn.Linear(4, 2))
    result = tt.attach_head(model, X, head=head)
    assert result[3] is head
    before = copy.deepcopy(result.state_dict())
    with torch.no_grad():
        head[0].weight.zero_()
    again = tt.apply(net(), None, tt.history(result))
    assert all(torch.equal(before[name], value) for name, value in again.state_dict().items())


def test_a_head_of_an_unknown_class_is_built_only_when_trusted() -> None:
    class Mine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(x)

    result = tt.attach_head(net(), X, head=Mine())
    record = from_json(tt.history(result).edits_as("json"))
    with pytest.raises(tt.TorchTrimError, match="Mine"):
        tt.apply(net(), X, record)
    name = record[0].heads["3" if "3" in record[0].heads else ""].type
    again = tt.apply(net(), X, record, trusted={name: Mine})
    assert same(result, again)
