"""Weights that share a few values: found once, trained on, recorded, and beside pruning."""

from __future__ import annotations

import copy
import io
import re
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import torchtrim as tt
from torchtrim.edits.edit import from_json, to_json
from torchtrim.importance.shared_values import cluster_sums, share, sorted_sums
from torchtrim.recipe.edit_forms import edits_of

X = torch.randn(16, 6, generator=torch.Generator().manual_seed(1))
Y = torch.arange(16) % 3


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 32), nn.ReLU(), nn.Linear(32, 40), nn.ReLU(), nn.Linear(40, 24), nn.ReLU(), nn.Linear(24, 3)
    )


def weight(model: nn.Module, name: str = "2") -> torch.Tensor:
    return model.get_parameter(f"{name}.weight").detach()


def step(
    model: nn.Module, optimizer: torch.optim.Optimizer, clusters: tt.WeightClustering, shared: bool = True
) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(X), Y).backward()
    if shared:
        clusters.share_gradients()
    optimizer.step()


@pytest.mark.parametrize("init", ["linear", "density"])
@pytest.mark.parametrize("clusters", [2, 5, 16, 256])
def test_each_entry_has_the_nearest_of_so_many_values(init: Any, clusters: int) -> None:
    model = net()
    shared = tt.cluster_weights(model, X, clusters, init=init)
    for name in ("2", "4"):
        before, after = weight(model, name), weight(shared, name)
        values = after.unique()
        assert 0.9 * clusters < len(values) <= clusters
        distance = (before.flatten()[:, None] - values).abs()
        assert torch.allclose((before - after).abs().flatten(), distance.amin(1), atol=1e-7)
        centres = torch.stack([before[after == value].mean() for value in values])
        if init == "linear" and clusters <= 16:
            assert torch.allclose(centres, values, atol=1e-3)
    assert torch.equal(weight(shared, "0"), weight(model, "0")) and torch.equal(weight(shared, "6"), weight(model, "6"))
    assert "left out: 6.weight: the last layer" in str(tt.history(shared))


def test_more_values_lie_nearer() -> None:
    errors = []
    for clusters in (2, 4, 16, 64):
        (edit,) = tt.history(tt.cluster_weights(net(), X, clusters)).edits
        assert isinstance(edit, tt.ClusterWeights) and edit.decided is not None
        errors.append(edit.decided.layers[0].error)
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.03


def test_k_means_finds_what_is_there() -> None:
    entries = torch.cat([torch.full((50,), value) + 0.01 * torch.randn(50) for value in (-3.0, 0.5, 4.0)])
    found = share("w", entries, 3, "linear")
    assert torch.allclose(found.values, torch.tensor([-3.0, 0.5, 4.0]), atol=0.01)
    assert [int((found.index == number).sum()) for number in range(3)] == [50, 50, 50]
    few = share("w", torch.tensor([[1.0, 1.0], [2.0, 2.0]]), 16, "linear")
    assert few.values.tolist() == [1.0, 2.0] and torch.equal(few.weight(), torch.tensor([[1.0, 1.0], [2.0, 2.0]]))
    assert share("w", torch.zeros(4), 4, "density").values.tolist() == [0.0]


def test_zeros_stay_zero_and_are_one_of_the_values() -> None:
    sparse = tt.sparsify(net(), X, 0.8)
    shared = tt.cluster_weights(sparse, X, 8)
    assert torch.equal(weight(shared) == 0, weight(sparse) == 0)
    assert len(weight(shared).unique()) == 8
    assert [edit.kind for edit in tt.history(shared).edits] == ["sparsify", "cluster_weights"]


def test_it_zips_far_better() -> None:
    def zipped(model: nn.Module) -> int:
        return len(zlib.compress(weight(model).numpy().tobytes(), 9))

    model = net()
    shared = tt.cluster_weights(model, X, 16)
    both = tt.cluster_weights(tt.sparsify(model, X, 0.9), X, 16)
    assert zipped(both) < zipped(shared) / 2 < zipped(model) / 6


def test_a_record_replays_to_the_bit(tmp_path: Path) -> None:
    shared = tt.cluster_weights(tt.sparsify(net(), X, 0.5), X, 5)
    again = tt.apply(net(4), None, from_json(to_json(tt.history(shared).edits)))  # other weights: the record's values
    assert torch.equal(weight(again), weight(shared)) and torch.equal(weight(again, "4"), weight(shared, "4"))
    tt.save(shared, tmp_path / "net.trim")
    loaded = tt.load(tmp_path / "net.trim", model=net(5))
    assert torch.equal(weight(loaded), weight(shared)) and tt.history(loaded) == tt.history(shared)
    (_, edit) = tt.history(shared).edits
    assert isinstance(edit, tt.ClusterWeights) and edit.decided is not None and edit.decided.index is not None
    assert edit.decided.index["2.weight"].numel() == 32 * 40 * 3 // 8  # 5 values: 3 bits
    without = tt.Edit.from_dict(edit.to_dict(weights=False))
    with pytest.raises(tt.EditError, match="does not hold the values"):
        tt.apply(net(), X, without)
    with pytest.raises(tt.EditError, match="another shape"):
        tt.apply(nn.Sequential(*[nn.Linear(6, 6) for _ in range(7)]), torch.zeros(1, 6), edit, check=False)
    assert edits_of([{"cluster_weights": {"clusters": 8, "exclude": "2"}}]) == [tt.ClusterWeights(8, exclude=("2",))]
    assert [joint.how for joint in tt.plan(net(), X, tt.ClusterWeights(4)).steps[0].joints] == ["4 values"] * 2


# In a training loop.


def test_members_of_a_cluster_stay_equal_and_the_values_learn() -> None:
    model = tt.sparsify(net(), X, 0.5)
    gone = weight(model) == 0
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    clusters = tt.WeightClustering(model, 8)
    first = weight(model).clone()
    before = float(nn.functional.cross_entropy(model(X), Y).detach())
    for _ in range(30):
        step(model, optimizer, clusters)
        moved = weight(model)
        assert all(len(moved[first == value].unique()) == 1 for value in first.unique() if value != 0)
        clusters.step()
        assert len(weight(model).unique()) <= 8 and torch.equal(weight(model) == 0, gone)
    assert not torch.equal(weight(model), first)
    assert float(nn.functional.cross_entropy(model(X), Y).detach()) < 0.7 * before
    report = clusters.finish()
    assert report.layers[0].values == 8 and report.layers[0].bits == 3
    assert "8" in str(report) and "<table>" in report._repr_html_() and report.to_dict()["layers"][0]["bits"] == 3


def test_for_plain_sgd_the_mean_of_steps_is_the_step_of_the_mean() -> None:
    found = []
    for shared in (True, False):
        model = net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        clusters = tt.WeightClustering(model, 6)
        for _ in range(5):
            step(model, optimizer, clusters, shared)
            clusters.step()
        found.append(weight(model).clone())
    assert torch.allclose(found[0], found[1], atol=1e-6)


def test_the_sum_is_the_gradient_of_the_shared_value() -> None:
    model = net()
    clusters = tt.WeightClustering(model, 4, aggregate="sum")
    before = weight(model)
    values, index = before.unique(return_inverse=True)
    values.requires_grad_(True)
    loss = nn.functional.cross_entropy(torch.func.functional_call(model, {"2.weight": values[index]}, X), Y)
    (expected,) = torch.autograd.grad(loss, values)
    nn.functional.cross_entropy(model(X), Y).backward()
    clusters.share_gradients()
    found = model.get_parameter("2.weight").grad
    assert found is not None and torch.allclose(found, expected[index], atol=1e-6)


def test_finish_writes_the_trained_values(tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    clusters = tt.WeightClustering(model, 8, example_inputs=X)
    for _ in range(3):
        step(model, optimizer, clusters)
        clusters.step()
    report = clusters.finish()
    assert clusters.finish().to_dict() == report.to_dict() and clusters.finished
    again = tt.apply(net(3), None, tt.history(model))
    assert torch.equal(weight(again), weight(model)) and "trained, in 3 steps" in str(tt.history(model))
    tt.save(model, tmp_path / "net.trim")
    assert torch.equal(weight(tt.load(tmp_path / "net.trim", model=net(8))), weight(model))
    for call in (clusters.step, clusters.share_gradients):
        with pytest.raises(tt.EditError, match="finished"):
            call()


def test_after_gradual_pruning_masks_are_kept() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    p = tt.MagnitudePruner(model, tt.PolynomialDecay(0.5, 0.8, end=4, every=2), optimizer=optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X), Y).backward()
        optimizer.step()
        p.step()
    p.finish()
    gone = weight(model) == 0
    clusters = tt.WeightClustering(model, 16)
    for _ in range(5):
        step(model, optimizer, clusters)
        clusters.step()
    clusters.finish()
    assert torch.equal(weight(model) == 0, gone) and int(gone.sum()) == 1024
    assert [edit.kind for edit in tt.history(model).edits] == ["sparsify", "cluster_weights"]


def test_a_run_that_is_taken_up_again_and_a_copy() -> None:
    one = net()
    optimizer = torch.optim.Adam(one.parameters(), lr=0.01)
    clusters = tt.WeightClustering(one, 8)
    step(one, optimizer, clusters)
    clusters.step()
    twin, twins, q = copy.deepcopy((one, optimizer, clusters))
    file = io.BytesIO()
    torch.save({"net": one.state_dict(), "optimizer": optimizer.state_dict(), "clusters": clusters.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = net(5)
    others, r = torch.optim.Adam(other.parameters(), lr=0.01), tt.WeightClustering(other, 8)
    other.load_state_dict(state["net"])
    others.load_state_dict(state["optimizer"])
    r.load_state_dict(state["clusters"])
    for model, optim, each in ((one, optimizer, clusters), (twin, twins, q), (other, others, r)):
        for _ in range(3):
            step(model, optim, each)
            each.step()
        assert torch.equal(weight(model), weight(one))
    assert r.state_dict()["steps"] == 4
    state["clusters"]["shapes"]["2.weight"] = [3, 3]
    with pytest.raises(tt.EditError, match=r"2.weight.*another model"):
        r.load_state_dict(state["clusters"])
    with pytest.raises(tt.EditError, match="state_dict"):
        r.load_state_dict({})


def test_values_in_double_precision_are_the_same_bits_after_a_checkpoint_and_in_the_record() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 300), nn.Linear(300, 200), nn.Linear(200, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clusters = tt.WeightClustering(model, 8)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X.double()), Y).backward()
        optimizer.step()
        clusters.step()
    trained = weight(model, "1").clone()
    clusters.load_state_dict(clusters.state_dict())
    assert torch.equal(weight(model, "1"), trained)
    clusters.finish()
    edit = tt.history(model).edits[-1]
    assert isinstance(edit, tt.ClusterWeights) and edit.decided is not None
    assert torch.equal(edit.decided.tensors()["1.weight"], trained)


def test_clusters_follow_deleted_channels() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    clusters = tt.WeightClustering(model, 8)
    step(model, optimizer, clusters)
    clusters.step()
    tt.delete_channels(model, X, "2", [0, 7], copy=False)
    tt.sync_optimizer(optimizer, model)
    step(model, optimizer, clusters)
    clusters.step()
    assert (
        weight(model).shape == (38, 32) and len(weight(model).unique()) <= 8 and len(weight(model, "4").unique()) <= 8
    )
    clusters.finish()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clusters": 1}, "2 to 256"),
        ({"clusters": 257}, "2 to 256"),
        ({"clusters": 4.0}, "2 to 256"),
        ({"init": "random"}, "linear or density"),
        ({"exclude": "**"}, "no weights are left"),
        ({"include": "7"}, "no module or parameter"),
    ],
)
def test_bad_settings(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(tt.TorchTrimError, match=says):
        tt.cluster_weights(net(), X, **settings)
    with pytest.raises(tt.TorchTrimError, match=says):
        tt.WeightClustering(net(), **settings)


def test_bad_states_of_a_model() -> None:
    with pytest.raises(tt.EditError, match="mean or sum"):
        tt.WeightClustering(net(), aggregate="max")  # type: ignore[arg-type]
    model = net()
    with torch.no_grad():
        model.get_parameter("2.weight")[0, 0] = float("nan")
    with pytest.raises(tt.ModelError, match=r"2.weight.*finite"):
        tt.WeightClustering(model)
    model = net()
    clusters = tt.WeightClustering(model)
    model[2] = nn.Linear(32, 40)
    with pytest.raises(tt.EditError, match="replaced"):
        clusters.step()


def test_sums_are_the_same_both_ways() -> None:
    entries = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    index = torch.randint(0, 9, (40, 30), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    one, other = cluster_sums(entries, index, 12), sorted_sums(entries.flatten(), index.flatten(), 12)
    assert torch.allclose(one, other) and one.shape == other.shape == (12,) and not bool(one[9:].any())


def test_the_code_in_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (Path(__file__).parent.parent / "docs" / "sparsity.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) >= 8
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "sparsity.md", "exec"), names)
    assert Path("sparse.trim").is_file() and Path("sparsity.png").is_file()
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        tt.Recipe.from_dict({"model": "timm:test_resnet", "edits": yaml.safe_load(block)})
