"""Masks and assignments that a compressed file holds once: in the model's tensors, and not in the history too."""

from __future__ import annotations

import copy
import json
import resource
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.checkpoint.container import read
from torchtrim.checkpoint.container_write import write
from torchtrim.checkpoint.load import load, read_history
from torchtrim.checkpoint.save import save
from torchtrim.edits.history import _ATTRIBUTE
from torchtrim.errors import CheckpointDamaged

X = torch.zeros(2, 3, 8, 8)
FIRST, DEEP, FLAT = "0.weight", "2.weight", "6.weight"


def model(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 24, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.ReLU(),
        nn.Linear(24 * 16, 160),
        nn.ReLU(),
        nn.Linear(160, 5),
    )


def pruned(seed: int = 0, sparsity: float = 0.9) -> nn.Module:
    return tt.sparsify(model(seed), X, sparsity)


def clustered(net: nn.Module, clusters: int = 16) -> nn.Module:
    return tt.cluster_weights(net, X, clusters)


def trained(net: nn.Module) -> nn.Module:
    """Pruned and clustered in a loop."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    pruner = tt.MagnitudePruner(net, tt.ConstantSparsity(0.8, begin=0), example_inputs=X)
    x = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    for _ in range(2):
        net(x).square().sum().backward()
        optimizer.step()
        pruner.step()
    pruner.finish()
    clusters = tt.WeightClustering(net, 8, example_inputs=X)
    for _ in range(3):
        net(x).square().sum().backward()
        optimizer.step()
        clusters.step()
    clusters.finish()
    return net


def weight(net: nn.Module, name: str) -> torch.Tensor:
    return net.get_parameter(name).data


def follow(path: Path) -> tuple[list[int], list[str]]:
    """Which edits lack bits in a file, and the bits that it holds."""
    file = read(path)
    held = [name for name, entry in file.entries.items() if name.startswith("edits.") and entry.dtype == torch.uint8]
    return json.loads(file.text).get("follow", []), sorted(name.partition(".")[2].partition(".")[2] for name in held)


def comes_back(net: nn.Module, path: Path, fresh: Callable[[], nn.Module] = model) -> nn.Module:
    """Save and load it: weights and history are the same to the bit, and the same file again."""
    save(net, path, factory=False, compress="zstd")
    past = tt.history(net)
    again = load(path, model=fresh())
    for found in (tt.history(again), read_history(path)):
        assert found == past
        assert found.to_json() == past.to_json()  # the order of what is in it too
    ours, theirs = net.state_dict(), again.state_dict()
    for name, tensor in ours.items():
        kinds = [each.contiguous().reshape(-1).view(torch.uint8) for each in (tensor, theirs[name])]
        assert tensor.dtype == theirs[name].dtype and torch.equal(*kinds), name
    other = path.with_name("other.trim")
    save(again, other, factory=False, compress="zstd")
    assert other.read_bytes() == path.read_bytes()
    return again


def replays(net: nn.Module, again: nn.Module, fresh: Callable[[], nn.Module] = model) -> None:
    """Both histories make the same of a fresh model."""
    one, other = (tt.apply(fresh(), X, tt.history(each)).state_dict() for each in (net, again))
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


MADE: dict[str, Callable[[], nn.Module]] = {
    "pruned": pruned,
    "half": lambda: pruned(sparsity=0.5),
    "nothing": lambda: pruned(sparsity=0.0),
    "2:4": lambda: tt.sparsify(model(), X, pattern="2:4"),
    "blocks": lambda: tt.sparsify(model(), X, 0.5, block=(4, 4)),
    "clustered": lambda: clustered(model()),
    "three values": lambda: clustered(model(), 3),
    "256 values": lambda: clustered(model(), 256),
    "both": lambda: clustered(pruned()),
    "in a loop": lambda: trained(model()),
}


@pytest.mark.parametrize("make", MADE.values(), ids=MADE.keys())
def test_it_comes_back_whole_and_holds_no_bits_of_its_own(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    net = make()
    again = comes_back(net, tmp_path / "net.trim")
    assert follow(tmp_path / "net.trim") == (list(range(len(tt.history(net).edits))), [])
    replays(net, again)


@pytest.mark.parametrize("name", ["pruned", "clustered", "both", "in a loop"])
def test_the_history_takes_next_to_no_room(name: str, tmp_path: Path) -> None:
    net = MADE[name]()
    bare = copy.deepcopy(net)
    del bare.__dict__[_ATTRIBUTE]
    sizes = []
    for each in (net, bare):
        save(each, tmp_path / "net.trim", factory=False, compress="zstd")
        file = read(tmp_path / "net.trim")
        sizes.append(sum(entry.end - entry.begin for entry in file.entries.values()))
    assert sizes[0] < 1.02 * sizes[1]
    assert (tmp_path / "net.trim").stat().st_size < 60_000


def test_a_file_of_a_sparse_model_is_as_small_as_without_its_history(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 1000), nn.ReLU(), nn.Linear(1000, 4))
    net = tt.sparsify(net, torch.zeros(1, 64), 0.9)
    both = tt.cluster_weights(net, clusters=16)
    for each in (net, both):
        bare = copy.deepcopy(each)
        del bare.__dict__[_ATTRIBUTE]
        save(each, tmp_path / "net.trim", factory=False, compress="zstd")
        save(bare, tmp_path / "bare.trim", factory=False, compress="zstd")
        sizes = [(tmp_path / name).stat().st_size for name in ("net.trim", "bare.trim")]
        assert sizes[0] <= 1.1 * sizes[1]


def test_the_plain_form_holds_all_and_says_nothing_of_it(tmp_path: Path) -> None:
    net = clustered(pruned())
    save(net, tmp_path / "net.trim", factory=False)
    assert "follow" not in json.loads(read(tmp_path / "net.trim").text)
    assert follow(tmp_path / "net.trim")[1] == sorted([DEEP, FLAT] * 2)
    assert tt.history(load(tmp_path / "net.trim", model=model())) == tt.history(net)


def changed(net: nn.Module, change: Callable[[nn.Module], Any]) -> nn.Module:
    with torch.no_grad():
        return change(net) or net


def more_zeros(net: nn.Module) -> None:
    weight(net, DEEP)[weight(net, DEEP) != 0] *= (torch.arange(346) % 3 > 0).float()


def grown(net: nn.Module) -> None:
    weight(net, FLAT)[5, 7:9] = 0.25


def infinite(net: nn.Module) -> None:
    weight(net, DEEP)[weight(net, DEEP) != 0] = float("nan")


def minus(net: nn.Module) -> None:
    weight(net, DEEP).mul_(-1)


def at_the_end(net: nn.Module) -> None:
    weight(net, FLAT)[-1, -1] = 0.0 if float(weight(net, FLAT)[-1, -1]) else 1.0


CHANGED: dict[str, tuple[Callable[[], nn.Module], list[int], list[str]]] = {
    "more zeros": (lambda: changed(pruned(), more_zeros), [0], [DEEP]),
    "a zero that grew": (lambda: changed(pruned(), grown), [0], [FLAT]),
    "a last entry": (lambda: changed(pruned(), at_the_end), [0], [FLAT]),
    "not finite": (lambda: changed(pruned(), infinite), [0], []),
    "zeros with a minus": (lambda: changed(pruned(), minus), [0], []),
    "trained since": (lambda: changed(clustered(model()), minus), [0], [DEEP]),
    "pruned again": (lambda: tt.sparsify(pruned(sparsity=0.5), X, 0.9), [1], [DEEP, FLAT]),
    "pruned twice the same": (lambda: tt.sparsify(pruned(), X, 0.9), [0, 1], []),
    "clustered, then pruned": (lambda: tt.sparsify(clustered(model()), X, 0.9), [1], [DEEP, FLAT]),
    "rounded since": (lambda: clustered(model(), 4).half().float(), [], [DEEP, FLAT]),
    "channels that went": (lambda: tt.delete_channels(pruned(), X, "2", [0, 3]), [], [DEEP, FLAT]),
    "channels of one that went": (lambda: tt.delete_channels(pruned(), X, "0", [1]), [0], [DEEP]),
    "a layer that went": (lambda: tt.cut(pruned(), X, after="3"), [0], [FLAT]),
    "a layer that is another": (lambda: tt.replace(pruned(), X, "2", nn.Conv2d(16, 24, 3)), [0], [DEEP]),
    "half precision": (lambda: pruned().bfloat16(), [0], []),
    "half precision, of values": (lambda: clustered(pruned()).half(), [0, 1], []),
    "made in half precision": (
        lambda: tt.cluster_weights(tt.sparsify(model().half(), None, 0.9), X.half()),
        [0, 1],
        [],
    ),
    "double precision": (lambda: clustered(pruned()).double(), [0, 1], []),
    "another order in memory": (lambda: clustered(pruned()).to(memory_format=torch.channels_last), [0, 1], []),
}  # fmt: skip


@pytest.mark.parametrize(("make", "edits", "bits"), CHANGED.values(), ids=CHANGED.keys())
def test_what_the_tensors_do_not_say_is_written(
    make: Callable[[], nn.Module], edits: list[int], bits: list[str], tmp_path: Path
) -> None:
    net = make()
    dtype = next(net.parameters()).dtype
    comes_back(net, tmp_path / "net.trim", lambda: model(1).to(dtype))
    assert follow(tmp_path / "net.trim") == (edits, sorted(bits))


class Twins(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.one = nn.Linear(64, 64)
        self.other = nn.Linear(64, 64)
        if tied:
            self.one.weight = self.other.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.other(self.one(x).relu())


@pytest.mark.parametrize("tied", [True, False])
def test_a_weight_that_is_in_the_file_under_another_name(tied: bool, tmp_path: Path) -> None:
    net = tt.sparsify(Twins(tied=False), torch.zeros(1, 64), 0.5, include="other")
    assert isinstance(net, Twins)
    net.one.weight = net.other.weight if tied else nn.Parameter(net.other.weight.data)
    comes_back(net, tmp_path / "net.trim", lambda: Twins(tied))
    assert follow(tmp_path / "net.trim") == ([0], [])
    assert "model.other.weight" not in read(tmp_path / "net.trim").entries


def test_a_weight_that_was_shared_when_it_was_pruned(tmp_path: Path) -> None:
    net = clustered_of(tt.sparsify(Twins(tied=True), torch.zeros(1, 64), 0.5, include="**"))
    comes_back(net, tmp_path / "net.trim", lambda: Twins(tied=True))
    assert follow(tmp_path / "net.trim") == ([0, 1], [])


def clustered_of(net: nn.Module) -> nn.Module:
    return tt.cluster_weights(net, clusters=5, include="**")


def test_a_tensor_of_several_pieces_and_an_odd_size(tmp_path: Path) -> None:
    def wide() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(1013, 1021), nn.Linear(4, 3))

    net = tt.cluster_weights(tt.sparsify(wide(), None, 0.9, include="1"), clusters=6, include="1")
    comes_back(net, tmp_path / "net.trim", wide)
    assert follow(tmp_path / "net.trim") == ([0, 1], [])


def test_no_more_follows_than_is_read_again(tmp_path: Path) -> None:
    net = pruned()
    for _ in range(11):
        net = tt.sparsify(net, X, 0.9)
    comes_back(net, tmp_path / "net.trim")
    # Four times both weights are a little less than four times the model: there is room for the small one once more.
    assert follow(tmp_path / "net.trim") == ([0, 1, 2, 3, 4], [DEEP] * 7 + [FLAT] * 8)


def test_a_compressed_file_that_holds_all_is_read(tmp_path: Path) -> None:
    """As they were written at first."""
    net = clustered(pruned())
    save(net, tmp_path / "net.trim", factory=False)
    file = read(tmp_path / "net.trim")
    write(tmp_path / "net.trim", file.text, file.tensors(file.entries), packed=True)
    assert follow(tmp_path / "net.trim") == ([], sorted([DEEP, FLAT] * 2))
    again = load(tmp_path / "net.trim", model=model())
    assert tt.history(again).to_json() == tt.history(net).to_json()


Change = Callable[[dict[str, Any], dict[str, torch.Tensor]], Any]


def record(document: dict[str, Any], number: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = document["history"]["entries"][number]["edit"]["decided"]
    return found


def layer(document: dict[str, Any], number: int = 0, **changes: Any) -> None:
    record(document, number)["layers"][0].update(changes)


def without(document: dict[str, Any], tensors: dict[str, torch.Tensor], name: str) -> None:
    """The first layer's values are gone."""
    at = next(number for number, item in enumerate(document["weights"]) if item["at"][-1] == "values")
    document["weights"][at]["names"].remove(name)
    del tensors[f"edits.{at}.{name}"]


def valued(change: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    def changing(document: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        (name,) = (name for name in tensors if name.startswith("edits.") and name.endswith(DEEP))
        tensors[name] = change(tensors[name])

    return changing


FORGED: dict[str, Change] = {
    "no such edit": lambda d, t: d.update(follow=[0, 1, 2]),
    "a number below": lambda d, t: d.update(follow=[-1]),
    "a large number": lambda d, t: d.update(follow=[10**30]),
    "no number": lambda d, t: d.update(follow=["0"]),
    "no list": lambda d, t: d.update(follow=1),
    "nothing": lambda d, t: d.update(follow=None),
    "no such weight": lambda d, t: layer(d, path="9.weight"),
    "a name of the record's": lambda d, t: layer(d, path="edits.0.weight"),
    "another shape": lambda d, t: layer(d, shape=[24, 16, 9]),
    "a larger shape": lambda d, t: layer(d, shape=[2**40, 2**40]),
    "a shape below": lambda d, t: layer(d, shape=[-24, -16, 3, 3]),
    "no bits at all": lambda d, t: d["weights"].pop(0),
    "tied to nothing": lambda d, t: d.update(tied={DEEP: "no.weight"}),
    "tied in a ring": lambda d, t: d.update(tied={DEEP: FLAT, FLAT: DEEP}),
    "whole numbers": lambda d, t: t.update({f"model.{DEEP}": t[f"model.{DEEP}"].int()}),
    "complex numbers": lambda d, t: t.update({f"model.{DEEP}": t[f"model.{DEEP}"].to(torch.complex64)}),
    "another tensor": lambda d, t: t.update({f"model.{DEEP}": torch.zeros(24, 16, 3, 1)}),
    "other values": lambda d, t: t[f"model.{DEEP}"].add_(0.001),
    "not a number": lambda d, t: t[f"model.{DEEP}"].fill_(float("nan")),
    "a value less": valued(lambda values: values[:-1]),
    "no values": valued(lambda values: values[:0]),
    "too many values": valued(lambda values: torch.linspace(-1, 1, 257)),
    "values of two sides": valued(lambda values: values[None]),
    "one value": valued(lambda values: values[0]),
    "complex values": valued(lambda values: values.to(torch.complex64)),
    "values that are whole": valued(lambda values: values.int()),
    "values gone": lambda d, t: without(d, t, DEEP),
    "an edit without a record": lambda d, t: d["history"]["entries"][0]["edit"].update(decided=None),
    "many edits": lambda d, t: many(d, 40),
}


def many(document: dict[str, Any], count: int) -> None:
    """So many records that follow from the same tensors."""
    entry = document["history"]["entries"][0]
    at = len(document["history"]["entries"])
    document["history"]["entries"] += [copy.deepcopy(entry) for _ in range(count)]
    document["weights"] += [
        {"at": ["entries", number, "edit", "decided", "masks"], "names": []} for number in range(at, at + count)
    ]
    document["follow"] += range(at, at + count)


@pytest.mark.parametrize("change", FORGED.values(), ids=FORGED.keys())
def test_a_forged_claim_is_a_clear_error(change: Change, tmp_path: Path) -> None:
    path = tmp_path / "net.trim"
    save(clustered(pruned()), path, factory=False, compress="zstd")
    file = read(path)
    document, tensors = json.loads(file.text), file.tensors(file.entries)
    write(path, json.dumps(document), tensors, packed=True)
    load(path, model=model())  # the forger's own files are right, where nothing was changed
    change(document, tensors)
    write(path, json.dumps(document), tensors, packed=True)
    for reading in (lambda: load(path, model=model()), lambda: read_history(path)):
        with pytest.raises(CheckpointDamaged) as caught:
            reading()
        assert str(path) in str(caught.value) and len(str(caught.value)) < 1500


def test_a_record_that_is_whole_lacks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "net.trim"
    save(pruned(), path, factory=False)
    file = read(path)
    write(path, json.dumps({**json.loads(file.text), "follow": [0]}), file.tensors(file.entries), packed=True)
    with pytest.raises(CheckpointDamaged, match="lacks bits, which does not"):
        load(path, model=model())


def test_a_weight_that_was_altered_is_told(tmp_path: Path) -> None:
    path = tmp_path / "net.trim"
    save(pruned(), path, factory=False, compress="zstd")
    entry = read(path).entries[f"model.{FLAT}"]
    data = bytearray(path.read_bytes())
    data[(entry.begin + entry.end) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointDamaged, match="was altered"):
        read_history(path)


def test_a_small_file_fills_neither_memory_nor_time(tmp_path: Path) -> None:
    """Tensors of zeros, packed to a thousandth, and hundreds of records that are said to follow from them."""
    path, shape = tmp_path / "bomb.trim", [2**12, 2**12]
    save(tt.sparsify(nn.Sequential(nn.Linear(64, 64)), None, 0.5, include="**"), path, factory=False, compress="zstd")
    file = read(path)
    document, tensors = json.loads(file.text), file.tensors(file.entries)
    layer(document, shape=shape)
    tensors["model.0.weight"] = torch.zeros(shape)
    many(document, 500)
    write(path, json.dumps(document), tensors, packed=True)
    del tensors
    assert path.stat().st_size < 1_000_000
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointDamaged, match="more is said to follow"):
            read_history(path)
        assert tracemalloc.get_traced_memory()[1] < 40 * 2**20  # of 32 GiB
    finally:
        tracemalloc.stop()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - kilobytes < 100_000  # of 1 GB of masks
