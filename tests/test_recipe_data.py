"""Data in files and folders, as batches that a model takes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from torchtrim.errors import InputError
from torchtrim.graph.inputs import Inputs
from torchtrim.recipe.data import Batches, read_data
from torchtrim.recipe.form import DataSection

PICTURE = Inputs.of(torch.zeros(1, 3, 16, 16))
BYTES = np.random.default_rng(0).integers(0, 255, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(autouse=True)
def _in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(file: str, takes: Inputs = PICTURE, labelled: bool = False, seed: int | None = None, **keys: Any) -> Batches:
    return read_data(DataSection(file=file, **keys), takes, labelled=labelled, seed=seed)


def pictures(folder: str, count: int = 3, size: tuple[int, int] = (40, 20)) -> None:
    Path(folder).mkdir(parents=True)
    for number in range(count):
        Image.new("RGB", size, (10 * number, 128, 255)).save(f"{folder}/{number}.png")


def test_bytes_become_what_a_network_takes() -> None:
    np.savez("a.npz", images=BYTES, labels=np.arange(5))
    (batch,) = read("a.npz")
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    expected = ((torch.from_numpy(BYTES) / 255 - mean) / std).permute(0, 3, 1, 2)
    assert torch.allclose(batch, expected, atol=1e-6)
    (plain,) = read("a.npz", mean=[0, 0, 0], std=[1, 1, 1])
    assert torch.equal(plain, torch.from_numpy(BYTES).permute(0, 3, 1, 2) / 255)
    np.savez("first.npz", x=BYTES.transpose(0, 3, 1, 2))
    (other,) = read("first.npz")
    assert torch.equal(other, batch)


def test_arrays_of_other_kinds_stay_as_they_are() -> None:
    x = np.random.default_rng(0).standard_normal((4, 7), dtype=np.float32)
    np.save("x.npy", x)
    torch.save(torch.from_numpy(x), "x.pt")
    torch.save((torch.from_numpy(x), torch.tensor([0, 1, 2, 3], dtype=torch.int32)), "pair.pt")
    torch.save({"x": torch.from_numpy(x), "y": torch.zeros(4)}, "dict.pt")
    for file in ("x.npy", "x.pt", "pair.pt", "dict.pt"):
        (batch,) = read(file)
        assert torch.equal(batch, torch.from_numpy(x))
    ((_, targets),) = read("pair.pt", labelled=True)
    assert targets.tolist() == [0, 1, 2, 3]
    assert targets.dtype == torch.int64
    ((_, targets),) = read("dict.pt", labelled=True)
    assert targets.dtype == torch.float32


def test_several_arrays_by_place_and_by_name() -> None:
    ids, mask = np.arange(12).reshape(4, 3), np.ones((4, 3), dtype=bool)
    np.savez("a.npz", ids=ids, mask=mask, words=np.array(["a", "b", "c", "d"]))
    (pair,) = read("a.npz", inputs=["ids", "mask"])
    assert [tensor.dtype for tensor in pair] == [torch.int64, torch.bool]
    (named,) = read("a.npz", inputs={"input_ids": "ids"})
    assert torch.equal(named["input_ids"], torch.from_numpy(ids))


def test_batches_limits_and_orders() -> None:
    np.savez("a.npz", x=np.arange(9.0), y=np.arange(9))
    batches = read("a.npz", batch=4)
    assert [len(batch) for batch in batches] == [4, 5]  # never a batch of one row
    assert len(batches) == 2
    assert [len(batch) for batch in read("a.npz", batch=1, limit=3)] == [1, 2]
    (few,) = read("a.npz", limit=3)
    assert few.tolist() == [0.0, 3.0, 6.0]
    first, second = read("a.npz", labelled=True, seed=1), read("a.npz", labelled=True, seed=1)
    orders = [[batch[1].tolist() for batch in batches] for batches in (first, first, second, second)]
    assert orders[:2] == orders[2:]
    assert orders[0] != orders[1]
    assert sorted(orders[0][0]) == list(range(9))
    for inputs, targets in first:
        assert torch.equal(inputs.long(), targets)


def test_a_folder_of_pictures_with_and_without_classes() -> None:
    pictures("flat")
    (batch,) = read("flat")
    assert batch.shape == (3, 3, 16, 16)
    assert torch.allclose(batch[1, 0], torch.full((16, 16), (10 / 255 - 0.485) / 0.229), atol=1e-5)
    with pytest.raises(InputError, match="a folder for each class"):
        read("flat", labelled=True)
    pictures("classes/cat", 2)
    pictures("classes/dog", 3, (9, 9))
    Path("classes/dog/notes.txt").write_text("not a picture")
    ((inputs, targets),) = read("classes", labelled=True)
    assert inputs.shape == (5, 3, 16, 16)
    assert targets.tolist() == [0, 0, 1, 1, 1]
    (grey,) = read("flat", Inputs.of(torch.zeros(1, 1, 8, 12)))
    assert grey.shape == (3, 1, 8, 12)


@pytest.mark.parametrize(
    ("file", "keys", "says"),
    [
        ("none.npz", {}, "no such file"),
        ("text.npz", {}, "cannot be read"),
        ("text.npy", {}, "cannot be read"),
        ("text.pt", {}, "cannot be read"),
        ("text.csv", {}, "a .npz, .npy or .pt file"),
        ("code.pt", {}, "cannot be read"),
        ("code.npy", {}, "cannot be read"),
        ("two.npz", {}, "inputs: NAME"),
        ("two.npz", {"inputs": "aa"}, "'a'"),
        ("two.npz", {"inputs": ["a", "b"]}, "different lengths"),
        ("two.npz", {"inputs": "scalar"}, "without rows"),
        ("two.npz", {"inputs": "none"}, "no rows"),
        ("two.npz", {"inputs": "a", "labelled": True}, "labels"),
        ("bytes.npy", {"mean": [0.5]}, "each channel"),
        ("odd.pt", {}, "not data"),
        ("empty", {}, "no rows"),
        ("broken", {}, "cannot be read"),
    ],
)
def test_what_is_refused(file: str, keys: dict[str, Any], says: str) -> None:
    for name in ("text.npz", "text.npy", "text.pt", "text.csv"):
        Path(name).write_text("a,b\n1,2\n")
    torch.save(Path, "code.pt")
    np.save("code.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez("two.npz", a=np.zeros(3), b=np.zeros(4), scalar=np.float32(1), none=np.zeros((0, 2)))
    np.save("bytes.npy", BYTES)
    torch.save([1, 2, 3], "odd.pt")
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/a.png").write_text("no picture")
    with pytest.raises(InputError, match=re.escape(says)):
        list(read(file, **keys))


def test_pictures_need_a_model_that_takes_them() -> None:
    pictures("flat")
    with pytest.raises(InputError, match="N, C, H, W"):
        read("flat", Inputs.of(torch.zeros(1, 7)))
