"""Weights set to zero at once: which, how many, what the record holds, and what is said of wrong input."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from typer.testing import CliRunner, Result

import torchtrim as tt
from torchtrim.cli import app
from torchtrim.edits.bits import pack, unpack
from torchtrim.edits.edit import from_yaml, to_yaml
from torchtrim.edits.sparse_record import Sparsified
from torchtrim.importance.weights import blocks, lowest, lowest_together, pattern_groups, single
from torchtrim.recipe.edit_forms import edits_of, short_form

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Registered in another order than that of execution; a kernel is shared, a table is looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 5)
        self.wide = nn.Conv2d(8, 16, 3, padding=1)
        self.bn = nn.BatchNorm2d(16)
        self.deep = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.twin = nn.Conv2d(16, 16, 3, padding=1)
        self.twin.weight = self.deep.weight
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.table = nn.Embedding(4, 8)
        self.scale = nn.Parameter(torch.ones(1, 16, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x).relu() + self.table.weight[0, :, None, None]
        x = self.bn(self.wide(x)).relu() * self.scale
        x = self.twin(self.deep(x).relu()).relu()
        return self.head(x.mean((2, 3)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def zeros(model: nn.Module, name: str) -> int:
    return int((model.get_parameter(name) == 0).sum())


def decided(model: nn.Module) -> Sparsified:
    edit = tt.history(model).edits[-1]
    assert isinstance(edit, tt.Sparsify) and edit.decided is not None
    return edit.decided


def same(one: nn.Module, other: nn.Module) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return list(left) == list(right) and all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.333, 0.5, 0.8, 0.9999])
def test_as_many_weights_go_as_were_asked_for_and_they_are_the_smallest(sparsity: float) -> None:
    model = net()
    sparse = tt.sparsify(model, X, sparsity)
    for name in ("wide.weight", "deep.weight"):
        before, after = model.get_parameter(name).detach(), sparse.get_parameter(name).detach()
        gone = after == 0
        assert int(gone.sum()) == int(np.floor(sparsity * before.numel() + 0.5))
        assert torch.equal(after[~gone], before[~gone])
        if bool(gone.any()) and not bool(gone.all()):
            assert before[gone].abs().max() <= before[~gone].abs().min()
    assert isinstance(sparse, Net) and sparse.twin.weight is sparse.deep.weight
    assert zeros(model, "deep.weight") == 0


def test_the_ends_are_those_of_execution_where_inputs_are_known() -> None:
    sparse = tt.sparsify(net(), X, 0.5)
    assert {layer.path for layer in decided(sparse).layers} == {"wide.weight", "deep.weight"}
    left = decided(sparse).left_out
    assert left["stem.weight"] == "the first layer" and left["head.weight"] == "the last layer"
    assert "embedding" in left["table.weight"] and "two dimensions" in left["bn.weight"]
    assert left["scale"] == "not a layer's weight"
    assert "left out: stem.weight: the first layer" in str(tt.history(sparse))
    by_registration = tt.sparsify(net(), None, 0.5)
    left = decided(by_registration).left_out
    assert left["head.weight"] == "the first layer" and left["stem.weight"] == "the last layer"
    assert "not run" in str(tt.history(by_registration)) and tt.history(by_registration).inputs is None


def test_what_is_included_is_all_that_goes() -> None:
    everything = tt.sparsify(net(), X, 0.5, include="**", exclude=["wide", "scale"])
    assert {layer.path for layer in decided(everything).layers} == {
        *("head.weight", "deep.weight", "stem.weight", "table.weight"),
    }
    some = tt.sparsify(net(), X, 0.5, include=["table.weight", lambda path, module: path == "head", "sc*"])
    assert {layer.path for layer in decided(some).layers} == {"table.weight", "head.weight", "scale"}
    by_type = tt.sparsify(net(), X, 0.5, include=nn.Conv2d)
    assert {layer.path for layer in decided(by_type).layers} == {"wide.weight", "deep.weight", "stem.weight"}


def test_numbers_by_path() -> None:
    sparse = tt.sparsify(net(), X, {"deep": 0.9, "head": 0.25, "w*": 0.5})
    found = {layer.path: layer.sparsity for layer in decided(sparse).layers}
    assert decided(sparse).left_out["stem.weight"] == "the first layer"
    assert found == {"deep.weight": pytest.approx(0.9, abs=1e-3), "head.weight": 0.25, "wide.weight": 0.5}
    model = net()
    cut = tt.sparsify(model, X, thresholds={"wide": 0.03})
    small = model.wide.weight.abs() < 0.03
    assert torch.equal(cut.get_parameter("wide.weight") == 0, small) and zeros(cut, "deep.weight") == 0
    assert decided(cut).layers[0].threshold == 0.03
    assert decided(cut).left_out["deep.weight"] == "no threshold is given for it"


def test_all_are_ranked_together_but_none_is_emptied() -> None:
    model = net()
    with torch.no_grad():
        model.wide.weight.mul_(1e-4)
    sparse = tt.sparsify(model, X, 0.5, scope="global", max_sparsity=0.75)
    assert zeros(sparse, "wide.weight") == 864 and zeros(sparse, "deep.weight") == (1152 + 2304) // 2 - 864
    with pytest.raises(tt.EditError, match="max_sparsity"):
        tt.sparsify(model, X, 0.9, scope="global", max_sparsity=0.8)


@pytest.mark.parametrize(("pattern", "kept", "of"), [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8)])
def test_of_so_many_neighbours_so_many_stay(pattern: str, kept: int, of: int) -> None:
    model = net()
    sparse = tt.sparsify(model, X, pattern=pattern)
    before = model.deep.weight.detach().movedim(1, -1).reshape(-1, of)
    after = sparse.get_parameter("deep.weight").detach().movedim(1, -1).reshape(-1, of)
    assert bool(((after != 0).sum(1) == kept).all())
    assert torch.equal(after.abs().amax(1), before.abs().amax(1))
    assert bool((before.abs().topk(kept, dim=1).values.sum(1) - after.abs().sum(1) < 1e-6).all())


def test_a_pattern_runs_along_the_inputs_of_transposed_convolutions_too() -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(8, 6, 3, groups=2)})
    sparse = tt.sparsify(model, None, pattern="2:4", include="up")
    groups = sparse.get_parameter("up.weight").detach().reshape(2, 4, -1)
    assert bool(((groups != 0).sum(1) == 2).all())


def test_a_pattern_runs_along_the_inputs_of_layers_of_transformers() -> None:
    conv1d = importlib.import_module("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(4, 8), conv1d(6, 8), nn.Linear(6, 2))  # of 8 inputs, which lie first
    sparse = tt.sparsify(model, None, pattern="2:4")
    groups = sparse.get_parameter("1.weight").detach().reshape(2, 4, 6)
    assert bool(((groups != 0).sum(1) == 2).all())


def test_blocks_are_of_outputs_and_inputs_of_transposed_convolutions_too() -> None:
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(6, 8, 3)})
    sparse = tt.sparsify(model, None, 0.5, block=(4, 1), include="up")
    gone = (sparse.get_parameter("up.weight").detach() == 0).transpose(0, 1).reshape(2, 4, 6, 9)
    share = gone.float().mean((1, 3))
    assert bool(((share == 0) | (share == 1)).all()) and int(share.sum()) == 6


def test_norms_of_several_dimensions_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.RMSNorm((3, 4)), nn.Linear(4, 4), nn.Linear(4, 4))
    sparse = tt.sparsify(model, None, 0.5)
    assert [layer.path for layer in decided(sparse).layers] == ["2.weight"]
    assert "norm" in decided(sparse).left_out["1.weight"]


def test_a_pattern_that_does_not_divide() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, 8), nn.Linear(8, 2))
    sparse = tt.sparsify(model, None, pattern="2:4")
    assert decided(sparse).left_out["2.weight"] == "6 inputs, no multiple of 4"
    with pytest.raises(tt.EditError, match=r"2.weight.*found: 6"):
        tt.sparsify(model, None, pattern="2:4", include=["1", "2"])
    with pytest.raises(tt.EditError, match="multiple of 16"):
        tt.sparsify(model, None, pattern="8:16")


@pytest.mark.parametrize("pool", ["avg", "max"])
@pytest.mark.parametrize("shape", [(4, 1), (4, 4), (3, 5), (1, 1, 3, 1), (100, 1)])
def test_blocks_go_as_a_whole(pool: Any, shape: tuple[int, ...]) -> None:
    model = net()
    sparse = tt.sparsify(model, X, 0.4, block=shape, pool=pool)
    before, gone = model.deep.weight.detach().abs(), sparse.get_parameter("deep.weight").detach() == 0
    sides = (*shape, *before.shape[len(shape) :])
    spans = [
        [slice(at, at + side) for at in range(0, size, side)] for side, size in zip(sides, before.shape, strict=True)
    ]
    scores = {True: [], False: []}  # type: dict[bool, list[float]]
    for a in spans[0]:
        for b in spans[1]:
            for c in spans[2]:
                for d in spans[3]:
                    block = gone[a, b, c, d]
                    assert bool(block.all()) or not bool(block.any())
                    values = before[a, b, c, d]
                    scores[bool(block.all())].append(float(values.mean() if pool == "avg" else values.max()))
    assert len(scores[True]) == int(np.floor(0.4 * sum(map(len, scores.values())) + 0.5))
    assert max(scores[True]) <= min(scores[False]) + 1e-7


def test_random_weights_are_the_same_everywhere_and_a_seed_makes_others() -> None:
    torch.manual_seed(5)
    one = tt.sparsify(net(1), X, 0.5, importance="random")
    torch.manual_seed(6)
    state = torch.get_rng_state()
    other = tt.sparsify(net(2), X, 0.5, importance="random")
    assert decided(one).masks == decided(other).masks
    assert decided(tt.sparsify(net(1), X, 0.5, importance="random:1")).masks != decided(one).masks
    torch.manual_seed(6)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_record_replays_to_the_bit_through_text_and_files(tmp_path: Path) -> None:
    model = net()
    sparse = tt.sparsify(model, X, 0.8, scope="global")
    again = tt.apply(model, None, tt.history(sparse))
    assert same(sparse, again) and tt.history(again) == tt.history(sparse)
    edits = from_yaml(to_yaml(tt.history(sparse).edits))
    assert edits == list(tt.history(sparse).edits) and same(tt.apply(model, None, edits), sparse)
    assert tt.History.from_dict(json.loads(tt.history(sparse).to_json())) == tt.history(sparse)
    other = tt.apply(net(3), X, tt.history(sparse).edits)  # other weights: the same zeros
    assert torch.equal(other.get_parameter("deep.weight") == 0, sparse.get_parameter("deep.weight") == 0)
    tt.save(sparse, tmp_path / "net.trim")
    loaded = tt.load(tmp_path / "net.trim", model=net(4))
    assert same(loaded, sparse) and tt.history(loaded) == tt.history(sparse)


def test_a_history_without_inputs_is_saved_and_replayed(tmp_path: Path) -> None:
    sparse = tt.sparsify(net(), None, 0.5)
    tt.save(sparse, tmp_path / "net.trim")
    loaded = tt.load(tmp_path / "net.trim", model=net(4))
    assert same(loaded, sparse) and tt.history(loaded).inputs is None
    assert same(tt.apply(net(), None, tt.history(sparse)), sparse)
    with pytest.raises(tt.InputError):
        tt.apply(sparse, None, tt.Cut(("wide",)))


def test_masks_take_a_bit_a_weight() -> None:
    record = decided(tt.sparsify(net(), X, 0.5))
    assert record.masks is not None
    assert sum(mask.numel() for mask in record.masks.values()) == (1152 + 2304) // 8


def test_a_record_of_another_model_is_refused() -> None:
    history = tt.history(tt.sparsify(net(), X, 0.5))
    model = net()
    model.deep = nn.Conv2d(16, 32, 3)
    with pytest.raises(tt.EditError, match=r"deep.weight: it has another shape"):
        tt.apply(model, X, history.edits, check=False)
    with pytest.raises(tt.PathError, match="no such parameter"):
        tt.apply(nn.Linear(2, 2), torch.zeros(1, 2), history.edits)
    without = tt.Edit.from_dict(history.edits[0].to_dict(weights=False))
    with pytest.raises(tt.EditError, match="masks"):
        tt.apply(net(), X, without)


def test_in_place_parameters_stay_the_same_objects_and_gradients_are_masked() -> None:
    model = net()
    model(X).sum().backward()
    weight = model.deep.weight
    gradient = weight.grad.clone() if weight.grad is not None else None
    found = tt.sparsify(model, X, 0.5, copy=False)
    assert found is model and model.deep.weight is weight and model.twin.weight is weight
    gone = weight == 0
    assert int(gone.sum()) == 1152
    assert gradient is not None and weight.grad is not None and weight.grad.shape == gradient.shape
    assert not bool(weight.grad[gone].any()) and torch.equal(weight.grad[~gone], gradient[~gone])


def test_a_plan_computes_and_changes_nothing() -> None:
    model = net()
    planned = tt.plan(model, X, tt.Sparsify(0.75))
    assert [joint.how for joint in planned.steps[0].joints] == ["sparsity 75.00%"] * 2
    assert planned.macs[0] == planned.macs[1] and zeros(model, "deep.weight") == 0


def test_it_goes_with_channel_pruning_before_and_after() -> None:
    model = net()
    narrow = tt.prune_channels(tt.sparsify(model, X, 0.5), X, 0.5, round_to=1)
    sparse = tt.sparsify(narrow, X, 0.8)
    assert same(tt.apply(model, X, tt.history(sparse)), sparse)
    assert len(tt.history(sparse).edits) == 3


def test_in_a_recipe(tmp_path: Path) -> None:
    (edit,) = edits_of([{"sparsify": {"sparsity": 0.5, "include": "layer*", "block": [4, 1]}}])
    assert edit == tt.Sparsify(0.5, include=("layer*",), block=(4, 1))
    assert edits_of([short_form(edit)]) == [edit]
    assert edits_of([{"sparsify": {"pattern": "2:4"}}]) == [tt.Sparsify(pattern="2:4")]
    with pytest.raises(tt.EditError, match="'sparsity'"):
        edits_of([{"sparsify": {"sparsty": 0.5}}])
    written = {"model": "timm:test_resnet", "input": [1, 3, 32, 32], "export": None}
    found = tt.Recipe.from_dict({**written, "edits": [{"sparsify": {"sparsity": 0.5}}]}).run(tmp_path / "out")
    (edit,) = found.history.edits
    assert isinstance(edit, tt.Sparsify) and edit.decided is not None
    loaded = tt.load(tmp_path / "out" / "net.trim")
    assert all(zeros(loaded, layer.path) == layer.zeros > 0 for layer in edit.decided.layers)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({}, "how much"),
        ({"sparsity": 1.0}, "without 1"),
        ({"sparsity": -0.1}, "0 to 1"),
        ({"sparsity": float("nan")}, "0 to 1"),
        ({"sparsity": True}, "0 to 1"),
        ({"sparsity": {"wide": 2}}, "wide"),
        ({"sparsity": 0.5, "thresholds": {"wide": 1}}, "both"),
        ({"thresholds": {"wide": -1}}, "magnitude"),
        ({"thresholds": 0.1}, "by path"),
        ({"pattern": "4:2"}, "2:4"),
        ({"pattern": "0:4"}, "2:4"),
        ({"pattern": "two of four"}, "2:4"),
        ({"pattern": "2:4", "sparsity": 0.6}, "of its own"),
        ({"pattern": "2:4", "block": (4, 1)}, "not both"),
        ({"sparsity": 0.5, "block": (0, 1)}, "block"),
        ({"sparsity": 0.5, "block": ()}, "block"),
        ({"sparsity": 0.5, "pool": "min"}, "avg or max"),
        ({"sparsity": 0.5, "scope": "local"}, "uniform or global"),
        ({"sparsity": {"wide": 0.5}, "scope": "global"}, "rank together"),
        ({"sparsity": 0.5, "importance": "taylor"}, "random"),
        ({"sparsity": 0.5, "importance": "random:x"}, "random"),
        ({"thresholds": {"wide": 0.5}, "importance": "random"}, "magnitudes"),
        ({"sparsity": 0.5, "exclude": "**"}, "no weights are left"),
        ({"sparsity": 0.5, "include": "bn"}, "no weights are left"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(tt.EditError, match=says):
        tt.sparsify(net(), X, **settings)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"include": "dep"}, "'deep'"),
        ({"exclude": "deep.wait"}, "deep.weight"),
        ({"include": "nothing.*"}, "fits"),
        ({"exclude": nn.LSTM}, "LSTM"),
        ({"sparsity": {"stm": 0.5}}, "'stem'"),
        ({"sparsity": {"bn": 0.5}}, "bn"),
    ],
)
def test_unknown_places(settings: dict[str, Any], says: str) -> None:
    with pytest.raises((tt.PathError, tt.SelectionError), match=says):
        tt.sparsify(net(), X, **{"sparsity": 0.5, **settings})


def test_weights_that_cannot_be_pruned() -> None:
    model = net()
    parametrizations.orthogonal(model.wide)
    with pytest.raises(tt.ModelError, match="remove_parametrizations"):
        tt.sparsify(model, None, 0.5)
    assert decided(tt.sparsify(model, None, 0.5, exclude="wide")).layers[0].path == "deep.weight"
    model = net()
    prune.l1_unstructured(model.wide, "weight", 0.5)
    with pytest.raises(tt.ModelError, match=r"torch.nn.utils.prune.remove"):
        tt.sparsify(model, None, 0.5)
    model = net()
    nn.utils.weight_norm(model.wide)
    with pytest.raises(tt.ModelError, match="remove_weight_norm"):
        tt.sparsify(model, None, 0.5)
    with pytest.raises(tt.ModelError, match="lazy"):
        tt.sparsify(nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 3), nn.Linear(3, 3)), None, 0.5)
    model = net()
    with torch.no_grad():
        model.deep.weight[0, 0] = float("nan")
    with pytest.raises(tt.ModelError, match=r"deep.weight.*9 of 2,304"):
        tt.sparsify(model, X, 0.5, check=False)
    with pytest.raises(tt.ModelError, match="meta"):
        tt.sparsify(net().to("meta"), None, 0.5)


def test_whole_numbers_and_attention_and_recurrent_weights() -> None:
    model = nn.ModuleDict(
        {
            "a": nn.Linear(4, 8),
            "attention": nn.MultiheadAttention(8, 2),
            "lstm": nn.LSTM(8, 8, 2),
            "z": nn.Linear(8, 2),
        }
    )
    sparse = tt.sparsify(model, None, 0.5)
    found = {layer.path for layer in decided(sparse).layers}
    assert found == {
        *("attention.in_proj_weight", "attention.out_proj.weight"),
        *(f"lstm.weight_{side}_l{layer}" for side in ("ih", "hh") for layer in (0, 1)),
    }
    lstm = sparse.get_submodule("lstm")
    assert isinstance(lstm, nn.LSTM) and lstm._flat_weights[0] is lstm.weight_ih_l0
    assert int((lstm._flat_weights[0] == 0).sum()) == 128


# The arithmetic beneath.


def test_equal_scores_still_give_an_exact_number() -> None:
    chosen, edge = lowest(torch.ones(10), 4)
    assert chosen.tolist() == [True] * 4 + [False] * 6 and edge == 1
    assert lowest(torch.tensor([3.0, 1.0]), 0)[1] is None and bool(lowest(torch.tensor([3.0]), 5)[0].all())


def test_units_of_different_sizes_come_near_to_the_share() -> None:
    generator = torch.Generator().manual_seed(0)
    units = [blocks(torch.rand(10, 7, generator=generator), (4, 2), "avg"), single(torch.rand(30, generator=generator))]
    chosen, _ = lowest_together(units, 0.5, 1.0)
    gone = sum(int(each.spread(mask).sum()) for each, mask in zip(units, chosen, strict=True))
    assert abs(gone - 50) <= 4


def test_groups_that_are_done_go_first() -> None:
    scores = torch.tensor([[5.0, 6.0, 7.0, 8.0, -1.0, 9.0, -1.0, 9.0]])
    groups = pattern_groups(scores, 2, 4, 1)
    assert groups.done.tolist() == [False, True] and groups.scores[1] < groups.scores[0]


@pytest.mark.parametrize("width", [1, 3, 4, 8])
def test_bits(width: int) -> None:
    numbers = torch.randint(0, 2**width, (7, 5), generator=torch.Generator().manual_seed(width))
    packed = pack(numbers, width)
    assert packed.numel() == -(-35 * width // 8) and torch.equal(unpack(packed, (7, 5), width).long(), numbers)
    with pytest.raises(tt.EditError, match="bits"):
        unpack(packed, (70, 5), width)


# From the shell.


def shell(*args: object) -> Result:
    return CliRunner().invoke(app, ["sparsify", "timm:test_resnet", "--input", "1,3,32,32", *map(str, args)])


def test_from_the_shell(tmp_path: Path) -> None:
    out = tmp_path / "net.trim"
    options = ["--exclude", "layer4.*", "--clusters", 8, "--scope", "global", "--block", "4,1", "--pool", "max"]
    answer = shell("--sparsity", 0.5, *options, "--out", out)
    assert answer.exit_code == 0, answer.output
    assert "weights in" in answer.stderr and "left out" in answer.stderr
    sparse, shared = tt.history(tt.load(out)).edits
    assert isinstance(sparse, tt.Sparsify) and isinstance(shared, tt.ClusterWeights)
    assert (sparse.sparsity, sparse.scope, sparse.block, sparse.pool) == (0.5, "global", (4, 1), "max")
    assert shared.clusters == 8 and shared.exclude == sparse.exclude == ("layer4.*",)
    planned = shell("--sparsity", "layer3.*=0.5", "--sparsity", "layer2=0.25", "--plan", "--json")
    assert planned.exit_code == 0, planned.output
    assert json.loads(planned.stdout)["steps"][0]["edit"]["sparsity"] == {"layer3.*": 0.5, "layer2": 0.25}
    for args in (["--pattern", "2:4"], ["--threshold", "layer3=0.05", "--include", "layer3"]):
        assert shell(*args, "--plan").exit_code == 0


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--out", "x.trim"], "one of these"),
        (["--sparsity", 0.5, "--pattern", "2:4", "--plan"], "one of these"),
        (["--sparsity", 0.5], "--plan"),
        (["--sparsity", "half", "--plan"], "number"),
        (["--sparsity", 0.5, "--block", "4x1", "--plan"], "4,1"),
        (["--sparsity", 1.5, "--plan"], "without 1"),
    ],
)
def test_a_wrong_command(args: list[object], says: str) -> None:
    answer = shell(*args)
    assert answer.exit_code != 0 and says in " ".join(answer.output.split())
