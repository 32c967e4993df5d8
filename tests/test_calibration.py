"""Calibration: a user's data on disk, and the ranges of the tensors of a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper
from torch import nn

from torchtrim.errors import ExportError, InputError
from torchtrim.export import calibration as module
from torchtrim.export.calibration import Statistics, calibrate
from torchtrim.export.calibration_data import CalibrationData
from torchtrim.export.histogram import BINS, Histogram
from torchtrim.export.ranges import METHODS, range_of
from torchtrim.graph.inputs import Inputs

FLOAT = onnx.TensorProto.FLOAT
IMAGE = (3, 4, 4)


class Net(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.relu()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(tmp_path / "net.onnx", "n")


def write(path: Path, batch: int | str) -> Path:
    """x -> relu -> double, an input of pictures."""
    x, y, r = (helper.make_tensor_value_info(name, FLOAT, [batch, *IMAGE]) for name in ("x", "y", "r"))
    nodes = [helper.make_node("Relu", ["x"], ["r"], name="a"), helper.make_node("Add", ["r", "r"], ["y"], name="b")]
    graph = helper.make_graph(nodes, "g", [x], [y], value_info=[r])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path


def pictures(rows: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, *IMAGE, generator=torch.Generator().manual_seed(seed))


def histogram_of(values: NDArray[Any]) -> Histogram:
    histogram = Histogram()
    histogram.add(values, float(values.min()), float(values.max()))
    return histogram


# Histograms and ranges.


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e5])
def test_histogram_counts_what_numpy_counts(scale: float) -> None:
    values = np.random.default_rng(0).normal(size=20_000).astype(np.float32) * np.float32(scale)
    histogram = histogram_of(values)
    expected, _ = np.histogram(values.astype(np.float64), bins=histogram.edges)
    assert (histogram.counts == expected).all()
    assert BINS / 2 - 1 <= len(histogram.counts) <= BINS


def test_streaming_equals_all_at_once() -> None:
    rng = np.random.default_rng(1)
    parts = [rng.normal(scale=scale, size=1000).astype(np.float32) for scale in (0.01, 5.0, 1e-4, 300.0, 1.0)]
    streamed = Histogram()
    for part in parts:
        streamed.add(part, float(part.min()), float(part.max()))
    whole = histogram_of(np.concatenate(parts))
    assert (streamed.width, streamed.first) == (whole.width, whole.first)
    assert (streamed.counts == whole.counts).all()


def test_histogram_of_one_value_and_of_zeros() -> None:
    assert histogram_of(np.full(7, 2.5, np.float32)).counts.tolist() == [7]
    zeros = histogram_of(np.zeros(3, np.float32))
    zeros.add(np.array([1.0], np.float32), 1.0, 1.0)
    assert zeros.counts.sum() == 4
    assert zeros.zeros == 3


def test_percentile_is_numpys() -> None:
    values = np.random.default_rng(2).standard_t(3, size=200_000)
    histogram = histogram_of(values)
    low, high = range_of(histogram, values.min(), values.max(), "percentile")
    assert low == pytest.approx(np.percentile(values, 0.005), abs=2 * histogram.width)
    assert high == pytest.approx(np.percentile(values, 99.995), abs=2 * histogram.width)


def squared_error(values: NDArray[Any], low: float, high: float) -> float:
    step = (high - low) / 255
    zero = np.round(-low / step)
    back = (np.clip(np.round(values / step) + zero, 0, 255) - zero) * step
    return float(((values - back) ** 2).mean())


@pytest.mark.parametrize("relu", [False, True])
def test_mse_is_no_worse_than_any_share_of_the_range(relu: bool) -> None:
    values = np.random.default_rng(3).standard_t(3, size=50_000)
    values = np.maximum(values, 0) if relu else values
    low, high = float(values.min()), float(values.max())
    found = squared_error(values, *range_of(histogram_of(values), low, high, "mse"))
    shares = [squared_error(values, low * share, high * share) for share in np.linspace(0.05, 1, 96)]
    assert found < squared_error(values, low, high)
    assert found <= 1.02 * min(shares)


def test_entropy_cuts_off_outliers_and_keeps_a_plain_range() -> None:
    rng = np.random.default_rng(4)
    plain = rng.uniform(0, 1, size=100_000)
    outlier = np.concatenate([rng.normal(size=100_000), [60.0]])
    assert range_of(histogram_of(plain), 0, 1, "entropy")[1] > 0.97
    assert range_of(histogram_of(outlier), outlier.min(), 60.0, "entropy")[1] < 20


@pytest.mark.parametrize("method", METHODS)
def test_no_method_leaves_the_range(method: str) -> None:
    for values in (np.linspace(-2, 7, 999), np.full(9, 3.0), np.zeros(5), np.array([0.0, 1e-9, 5e4])):
        low, high = range_of(histogram_of(values), values.min(), values.max(), method)
        assert values.min() <= low <= high <= values.max()


# Calibrating a file.


def feeds(*parts: torch.Tensor) -> Iterator[dict[str, NDArray[Any]]]:
    return ({"x": part.numpy()} for part in parts)


def test_ranges_and_channels_are_numpys(path: Path) -> None:
    data = pictures(10)
    found = calibrate(path, feeds(*data.split(3)), ["x", "r", "y"], channels={"r": 1})
    relu = data.relu()
    assert found.range("x") == (pytest.approx(data.min().item()), pytest.approx(data.max().item()))
    assert found.range("y") == (0.0, pytest.approx(2 * relu.max().item()))
    assert found.channel_means("r") == pytest.approx(relu.mean((0, 2, 3)).numpy(), rel=1e-5)
    assert found.channel_largest("r") == pytest.approx(relu.amax((0, 2, 3)).numpy())


@pytest.mark.parametrize("memory", [1, 400, 10**9])
def test_feeds_of_any_size_and_memory_give_the_same(path: Path, memory: int) -> None:
    data = pictures(12)
    whole = calibrate(path, feeds(data), ["r", "y"])
    parts = calibrate(path, feeds(*data.split(5)), ["r", "y"], memory=memory)
    for name in ("r", "y"):
        assert (whole.tensors[name].histogram.counts == parts.tensors[name].histogram.counts).all()
        assert [whole.range(name, method) for method in METHODS] == [parts.range(name, method) for method in METHODS]


def test_no_run_gives_back_more_than_the_memory(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    run = module.OnnxSession.run

    def measured(self: Any, *arguments: Any) -> list[NDArray[Any]]:
        given = run(self, *arguments)
        sizes.append(sum(array.nbytes for array in given))
        return given

    monkeypatch.setattr(module.OnnxSession, "run", measured)
    calibrate(path, feeds(pictures(40)), ["r", "y"], memory=2000)
    assert max(sizes) <= 2000
    assert len(sizes) >= 8


def test_large_rows_are_sampled_evenly() -> None:
    seen = module.TensorStatistics()
    values = np.random.default_rng(0).normal(size=(2, 16, 96, 96)).astype(np.float32)
    values[1, 15, 95, 95] = 40.0
    seen.add(values)
    assert seen.high == 40.0
    assert seen.histogram.counts.sum() <= 2 * module.SAMPLE
    low, high = Statistics({"t": seen}).range("t", "percentile")
    assert high == pytest.approx(np.percentile(values, 99.995), rel=0.1)
    assert low == pytest.approx(np.percentile(values, 0.005), rel=0.1)


def test_values_that_are_no_numbers_are_counted_and_left_out() -> None:
    seen = module.TensorStatistics()
    seen.add(np.array([[1.0, np.inf, -2.0, np.nan]], np.float32))
    assert (seen.low, seen.high, seen.beyond) == (-2.0, 1.0, 2)


def test_bad_calibration(path: Path) -> None:
    with pytest.raises(ExportError, match=r"no such tensors.*'q'"):
        calibrate(path, feeds(pictures(1)), ["q"])
    with pytest.raises(InputError, match="nothing to calibrate on"):
        calibrate(path, [], ["r"])
    found = calibrate(path, feeds(pictures(2)), ["r"])
    with pytest.raises(InputError, match="no calibration figures"):
        found.range("y")
    with pytest.raises(InputError, match=r"no such calibration method.*minmax"):
        found.range("r", "median")
    with pytest.raises(InputError, match="channels="):
        found.channel_means("r")


# A user's data.


def spool(data: Any, path: Path, limit: int = 512) -> CalibrationData:
    return CalibrationData.spool(data, Net(), path, path.parent / "spool", limit=limit)


def rows_of(feeds: Iterator[dict[str, NDArray[Any]]]) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([feed["x"] for feed in feeds]))


@pytest.mark.parametrize("size", [1, 7, 32, 200])
def test_every_row_is_once_in_one_half(path: Path, size: int) -> None:
    data = pictures(200)
    spooled = spool((part for part in data.split(size)), path)  # a generator: read once
    halves = [rows_of(spooled.calibration()), rows_of(spooled.comparison())]
    assert spooled.rows == (len(halves[0]), len(halves[1]))
    assert min(spooled.rows) >= 64
    together = torch.cat(halves)
    assert sorted(row.sum().item() for row in together) == sorted(row.sum().item() for row in data)
    assert all(len(feed["x"]) <= 32 for feed in spooled.calibration())


def test_forms_of_batches_and_their_classes(path: Path) -> None:
    data, targets = pictures(20), torch.arange(20)
    for batches in (
        [(data[:10], targets[:10]), (data[10:], targets[10:])],
        [{"x": data, "labels": targets}],
        (data, targets),
    ):
        spooled = spool(batches, path)
        assert spooled.labelled
        for feed, classes in spooled.labelled_comparison():
            assert (feed["x"] == data[torch.from_numpy(classes)].numpy()).all()
    plain = spool(data, path)
    assert not plain.labelled
    with pytest.raises(InputError, match="no integer classes"):
        next(plain.labelled_comparison())
    assert not spool([(data, torch.rand(20))], path).labelled


def test_reading_stops_at_the_limit_and_holds_one_feed(path: Path) -> None:
    asked = 0

    def endless() -> Iterator[torch.Tensor]:
        nonlocal asked
        while True:
            asked += 1
            yield pictures(10, asked)

    spooled = spool(endless(), path, limit=155)
    assert asked == 16
    assert sum(spooled.rows) == 155
    largest = max(file.stat().st_size for file in spooled.folder.iterdir())
    assert largest < 33 * 4 * np.prod(IMAGE) + 1000


def test_one_batch_is_split_by_rows_and_one_row_serves_twice(path: Path) -> None:
    two = spool(pictures(2), path)
    assert two.rows == (1, 1)
    assert two.notes == ["only 1 row to calibrate on; some hundred are usual"]
    one = spool([pictures(1)], path)
    assert one.rows == (1, 1)
    assert "both calibrated and compared on" in one.notes[0]


def test_a_file_of_one_batch_size_gets_that_many_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "fixed.onnx", 4)
    data = pictures(22)
    spooled = spool(list(data.split(3)), path)
    assert [len(feed["x"]) for feed in (*spooled.calibration(), *spooled.comparison())] == [4] * 6
    assert "repeated" in spooled.notes[0]
    assert torch.cat([rows_of(spooled.calibration()), rows_of(spooled.comparison())]).shape[0] == 24
    calibrate(path, spooled.calibration(), ["r"])


def test_wild_values_are_noted(path: Path) -> None:
    spooled = spool([pictures(4), pictures(4) * 1e6], path)
    assert len(spooled.notes) == 2
    assert "batch 2" in spooled.notes[0]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "no data"),
        ([], "no data.*no batches"),
        ([torch.zeros(0, *IMAGE)], "no data.*without rows"),
        ([pictures(2), torch.zeros(2, 1, 4, 4)], r"batch 2 of the data, x: .*float32\[2, 1, 4, 4\]"),
        ([torch.zeros(2, *IMAGE, dtype=torch.int64)], r"batch 1 of the data, x: .*int64"),
        ([pictures(2), torch.full((1, *IMAGE), torch.nan)], r"batch 2 of the data, x: .*NaN"),
        ([torch.full((1, *IMAGE), torch.inf)], "batch 1 of the data, x: .*infinite"),
        (["cat.png"], "batch 1 of the data: not a batch.*str"),
        ([np.zeros((1, *IMAGE), np.float32)], "not a batch.*ndarray"),
        ([{"y": "text"}], "batch 1 of the data: .*no tensor"),
        (3, "iterable of batches"),
        ("pictures", "iterable of batches"),
    ],
)
def test_bad_data(path: Path, data: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spool(data, path)


@pytest.mark.parametrize("limit", [0, -1, 1.5, True])
def test_bad_limit(path: Path, limit: Any) -> None:
    with pytest.raises(InputError, match="limit of rows"):
        spool([pictures(1)], path, limit=limit)


def test_bad_data_for_a_fixed_batch(tmp_path: Path) -> None:
    path = write(tmp_path / "fixed.onnx", 4)
    with pytest.raises(InputError, match="batch 1 of the data, x"):
        spool([torch.zeros(3, 1, 4, 4)], path)


# What a person should know of the data.


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (pictures(128).abs().clamp(max=1) * 255, True),  # 0 to 255, not normalised
        (pictures(128) / 200, True),  # divided once too often
        (pictures(128) + 30, True),  # the mean was not taken away
        (pictures(128) * 3, False),
    ],
)
def test_data_unlike_the_example_is_noted(data: torch.Tensor, says: bool, path: Path, tmp_path: Path) -> None:
    given = Inputs.of(pictures(2, seed=5))
    notes = CalibrationData.spool([data], Net(), path, tmp_path / "a", example=given).notes
    assert any("x is unlike the example" in note and "normalised" in note for note in notes) == says
    # Without an example, or with one that says nothing, nothing is said of it.
    for number, silent in enumerate((None, Inputs.of(torch.zeros(2, *IMAGE)))):
        notes = CalibrationData.spool([data], Net(), path, tmp_path / str(number), example=silent).notes
        assert not any("example" in note for note in notes)


def test_wild_values_are_noted_once(path: Path, tmp_path: Path) -> None:
    data = [pictures(64) * 1e5] * 4
    for folder, example in (("a", None), ("b", Inputs.of(pictures(1))), ("c", Inputs.of(torch.zeros(1, *IMAGE)))):
        notes = CalibrationData.spool(data, Net(), path, tmp_path / folder, example=example).notes
        assert [note.startswith("x ") and "normalised" in note for note in notes] == [True], notes


def test_few_rows_are_noted(path: Path, tmp_path: Path) -> None:
    classes = torch.zeros(300, dtype=torch.int64)
    few = CalibrationData.spool([(pictures(30), classes[:30])], Net(), path, tmp_path / "few")
    assert few.notes == [
        "only 15 rows to calibrate on; some hundred are usual",
        "accuracy goes in steps of 6.7 points: it is told on 15 rows only",
    ]
    enough = CalibrationData.spool([(pictures(300), classes)], Net(), path, tmp_path / "enough")
    assert enough.notes == []


@pytest.mark.parametrize("batch", ["n", 4])
@pytest.mark.parametrize("sizes", [(5, 7, 1, 12), (33, 40, 1, 70, 31), (1,), (3, 5)])
def test_rows_and_classes_stay_paired(batch: int | str, sizes: tuple[int, ...], tmp_path: Path) -> None:
    whole = torch.arange(sum(sizes))
    # A row is full of its own number, and so is its class; negative classes and large ones are the judge's business.
    batches = [(part.float()[:, None, None, None].expand(-1, *IMAGE), part - 3) for part in whole.split(list(sizes))]
    data = CalibrationData.spool(batches, Net(), write(tmp_path / "net.onnx", batch), tmp_path / "data")
    assert data.labelled
    seen: list[int] = []
    for feed, classes in data.labelled_comparison():
        numbers = feed["x"][:, 0, 0, 0].astype(np.int64)
        assert (numbers - 3 == classes).all()
        seen += numbers.tolist()
    calibrated = [int(number) for feed in data.calibration() for number in feed["x"][:, 0, 0, 0]]
    assert (len(calibrated), len(seen)) == data.rows
    assert {*seen, *calibrated} == set(range(sum(sizes)))
    assert len(sizes) == 1 or batch == 4 or not {*seen} & {*calibrated}


def test_how_far_it_is_is_told(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float]] = []

    @contextmanager
    def record(name: str) -> Iterator[Callable[[str, float], Any]]:
        assert name == "calibrating"
        yield lambda what, share: told.append((what, share))

    monkeypatch.setattr(module, "progress", record)
    data = CalibrationData.spool([pictures(300)], Net(), path, tmp_path / "data", told=lambda what, share: None)
    calibrate(path, data.calibration(), ["y"])
    assert told == [(f"{number} of 5 feeds", number / 5) for number in range(1, 6)]
    told.clear()
    calibrate(path, (feed for feed in data.comparison()), ["y"])  # nobody knows how many
    assert told == [(f"{number} feeds", 0.0) for number in range(1, 6)]
