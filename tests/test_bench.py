"""The benchmark: fair, complete, and without a trace on the model."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from functools import partial
from itertools import groupby, pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchtrim.bench.candidates import opened
from torchtrim.bench.latency import Benchmark, OnnxFile, benchmark
from torchtrim.bench.machine import machine
from torchtrim.bench.rounds import alternating_rounds
from torchtrim.bench.session import OnnxSession
from torchtrim.bench.table import Table
from torchtrim.bench.timing import timings_of
from torchtrim.errors import ExportError, InputError, ModelError
from torchtrim.export.onnx import export_onnx
from torchtrim.graph.inputs import Inputs


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2


def same(x: torch.Tensor) -> torch.Tensor:
    return x


def test_names_the_machine() -> None:
    found = machine()
    assert found.processor
    assert found.cores >= 1
    assert found.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert json.loads(json.dumps(found.to_dict()))["processor"] == found.processor


def noise(middle: float, spread: float, rounds: int = 40, calls: int = 5, seed: int = 0) -> list[list[float]]:
    """Milliseconds around a middle."""
    return [[float(ms) for ms in turn] for turn in np.random.default_rng(seed).normal(middle, spread, (rounds, calls))]


def test_figures_of_samples() -> None:
    samples = {"slow": noise(10, 0.5), "fast": noise(5, 0.5, seed=1), "same": noise(10, 0.5, seed=2)}
    first, fast, same = timings_of(samples, batch=4, threads=2)
    assert (first.ratio, first.ratio_low, first.ratio_high, first.verdict) == (1, 1, 1, "no difference")
    assert fast.ratio == pytest.approx(0.5, abs=0.02)
    assert fast.ratio_low < fast.ratio < fast.ratio_high
    assert (fast.verdict, same.verdict) == ("faster", "no difference")
    assert same.ratio_low < 1 < same.ratio_high
    assert fast.throughput == pytest.approx(4 / fast.median_ms * 1e3)
    assert fast.speedup == pytest.approx(1 / fast.ratio)
    assert fast.median_low_ms < fast.median_ms < fast.median_high_ms < fast.p95_ms < fast.p99_ms
    assert (fast.calls, fast.batch, fast.threads) == (200, 4, 2)
    reverse = timings_of({name: samples[name] for name in ("fast", "slow")})
    assert reverse[1].verdict == "slower"


def test_percentiles_are_those_of_single_calls() -> None:
    (timing,) = timings_of({"a": [[float(ms) for ms in range(1, 101)]]})
    assert timing.median_ms == 50.5
    assert timing.p95_ms == pytest.approx(95.05)
    assert timing.p99_ms == pytest.approx(99.01)


def test_noise_that_both_share_is_no_difference_lost() -> None:
    """Rounds that are slow for both widen the medians' intervals, and not the ratio's."""
    loads = np.random.default_rng(3).uniform(1, 3, 60)
    samples = {"a": [[10 * load] * 3 for load in loads], "b": [[9 * load] * 3 for load in loads]}
    first, second = timings_of(
        {name: [[float(ms) for ms in turn] for turn in turns] for name, turns in samples.items()}
    )
    assert first.median_high_ms / first.median_low_ms > 1.1
    assert second.verdict == "faster"
    assert second.ratio_low == pytest.approx(0.9)
    assert second.ratio_high == pytest.approx(0.9)


def test_what_differs_from_opening_to_opening_is_no_difference() -> None:
    """A file that was slow in one opening of three, and by chance: not slower than one that was the same in all."""
    samples = {"a": noise(10, 0.1, rounds=60), "b": [*noise(9.8, 0.1, rounds=40), *noise(12, 0.1, rounds=20)]}
    assert timings_of(samples)[1].verdict == "faster"
    second = timings_of(samples, openings=[20, 20, 20])[1]
    assert second.verdict == "no difference"
    assert second.ratio_low < 0.99
    assert second.ratio_high > 1.15
    clear = timings_of({"a": samples["b"], "b": noise(5, 0.1, rounds=60)}, openings=[20, 20, 20])[1]
    assert clear.verdict == "faster"


def test_openings_of_unequal_rounds_are_drawn_within_their_own() -> None:
    samples = {"a": [[1.0]] * 3 + [[2.0]] * 7, "b": [[3.0]] * 3 + [[6.0]] * 7}
    first, second = timings_of(samples, openings=[3, 7])
    assert (second.ratio_low, second.ratio, second.ratio_high) == (3, 3, 3)
    assert (first.median_low_ms, first.median_ms, first.median_high_ms) == (1, 2, 2)


@pytest.mark.parametrize(
    ("options", "times"), [({}, 3), ({"openings": 1}, 1), ({"rounds": 2}, 2), ({"rounds": 7, "openings": 4}, 4)]
)
def test_files_are_opened_anew_and_models_are_not(
    options: dict[str, Any], times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def counted(name: str, *rest: Any) -> Any:
        made.append(name)
        return opened(name, *rest)

    monkeypatch.setattr("torchtrim.bench.latency.opened", counted)
    net, x = nn.Linear(8, 4).eval(), torch.zeros(1, 8)
    path = export_onnx(net, x, tmp_path / "net.onnx", benchmark=False).path
    result = benchmark({"net": net, "file": path}, x, seconds=0.05, **options)
    assert (made.count("net"), made.count("file")) == (1, times)
    assert result.rounds >= 5 or "rounds" in options
    assert result.rounds == options.get("rounds", result.rounds)
    assert [timing.name for timing in result.timings] == ["net", "file"]


def test_a_wider_confidence_gives_a_wider_interval() -> None:
    samples = {"a": noise(10, 2), "b": noise(10, 2, seed=1)}
    narrow, wide = (timings_of(samples, confidence=level)[1] for level in (0.5, 0.99))
    assert wide.ratio_low < narrow.ratio_low < narrow.ratio_high < wide.ratio_high


def test_every_round_calls_every_candidate_and_each_comes_after_each_other() -> None:
    called: list[str] = []
    state = random.getstate()
    samples = alternating_rounds({name: partial(called.append, name) for name in "abc"}, rounds=40, warmup=1)
    assert {name: len(rounds) for name, rounds in samples.items()} == {"a": 40, "b": 40, "c": 40}
    order = [name for name, _ in groupby(called)]
    follows = Counter(pairwise(order))
    assert set(follows) == set(permutations("abc", 2))
    assert max(follows.values()) < 2 * min(follows.values())
    assert random.getstate() == state


def test_a_grid_of_batches_and_threads(tmp_path: Path) -> None:
    options: dict[str, Any] = {"batches": (1, 8, 32), "thread_counts": (1, 2), "rounds": 2}
    result = benchmark({"double": double, "same": same}, torch.zeros(2, 1), **options)
    assert [(t.threads, t.batch, t.name) for t in result.timings] == [
        (threads, batch, name) for threads in (1, 2) for batch in (1, 8, 32) for name in ("double", "same")
    ]
    assert result["same"] == result.at("same", batch=1, threads=1)
    assert result.at("same", batch=32, threads=2).batch == 32
    assert (result.batch, result.threads, result.batches) == (1, 1, (1, 8, 32))
    assert "float32[1, 1]" in str(result)
    with pytest.raises(KeyError):
        result.at("same", batch=2)
    told = json.loads(json.dumps(result.to_dict()))
    assert told["batches"] == [1, 8, 32]
    assert told["timings"][1]["verdict"] in ("faster", "slower", "no difference")
    for name, timed in (
        ("grid.png", result),
        ("one.svg", benchmark({"a": double, "b": same}, torch.zeros(1), rounds=2)),
    ):
        assert timed.plot(tmp_path / name).stat().st_size > 1000
    with pytest.raises(InputError, match="picture cannot be written"):
        result.plot(tmp_path / "no" / "grid.png")


def test_the_table_says_where_there_is_no_difference() -> None:
    timings = timings_of({"a": noise(10, 1), "b": noise(10, 1, seed=1), "c": noise(2, 0.1)})
    lines = str(Benchmark(timings, "float32[1]", (1,), (1,), 40, 0.95, machine())).splitlines()
    assert [line.split()[-1] for line in lines[3:6]] == ["1.00", "difference", "faster"]


@pytest.mark.slow
def test_memory_and_load_time_of_each_in_a_process_of_its_own(tmp_path: Path) -> None:
    class Own(nn.Linear):
        pass

    wide = nn.Sequential(nn.Linear(1000, 5000), nn.Linear(5000, 1000))  # 40 MB
    path = export_onnx(nn.Linear(1000, 2), torch.zeros(1, 1000), tmp_path / "a.onnx", benchmark=False).path
    candidates = {"wide": wide, "file": path, "own": Own(1000, 2)}
    result = benchmark(candidates, torch.zeros(1, 1000), rounds=1, memory=True)
    found, file, own = result.resources
    assert found.problem is None
    assert file.problem is None
    if sys.platform == "linux":
        assert found.resident_mb is not None
        assert 38 < found.resident_mb < 100
        assert found.peak_mb is not None
        assert found.peak_mb >= found.resident_mb - 1
        assert file.resident_mb is not None
        assert file.resident_mb < 40
    assert found.load_ms is not None
    assert found.load_ms > 0
    assert own.problem is not None
    assert "another process" in own.problem
    assert f"own: not measured: {own.problem}" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["resources"][0]["name"] == "wide"


def test_a_file_on_a_provider(tmp_path: Path) -> None:
    path = export_onnx(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "linear.onnx", benchmark=False).path
    result = benchmark({"plain": path, "named": OnnxFile(path, "cpu")}, rounds=2)
    assert [timing.provider for timing in result.timings] == ["CPUExecutionProvider"] * 2
    with pytest.raises(ExportError, match="lacks an execution provider"):
        benchmark(OnnxFile(path, "NoSuchExecutionProvider"))
    with pytest.raises(InputError, match="OnnxFile"):
        OnnxFile(3)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="list of names"):
        benchmark(path, providers="CPUExecutionProvider")


def test_a_call_whose_inputs_are_bound_gives_the_same(tmp_path: Path) -> None:
    path = export_onnx(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "linear.onnx", benchmark=False).path
    session = OnnxSession(path, threads=1)
    feed = session.feed(Inputs.of(torch.randn(3, 4)))
    bound: Any = session.bound(feed, device="cpu")
    for _ in range(2):
        assert np.array_equal(bound()[0].numpy(), session.run(feed)[0])


def test_threads_do_not_spin_while_another_candidate_is_timed(tmp_path: Path) -> None:
    path = export_onnx(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "linear.onnx", benchmark=False).path
    options = OnnxSession(path, threads=2)._session.get_session_options()
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


@pytest.mark.slow
def test_several_compiled_sizes_stay_compiled() -> None:
    """Each batch size has code of its own, however many there are: past a limit PyTorch would run eagerly, unsaid."""
    from torch._dynamo import config
    from torch._dynamo.utils import counters

    counters.clear()
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    with config.patch(recompile_limit=2):
        result = benchmark({"net": model}, torch.zeros(1, 4), batches=(3, 4, 5), compile=True, rounds=1)
    assert [t.kind for t in result.timings[1::2]] == ["compiled"] * 3
    assert counters["stats"]["unique_graphs"] == 3


def test_model_is_left_as_it_was() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4))
    model[1].eval()
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(2, 4)
    random = torch.get_rng_state()
    threads = torch.get_num_threads()
    result = benchmark(model, x, batch=3, threads=threads + 1, rounds=2)
    assert result.batch == 3
    assert result.threads == threads + 1
    assert torch.get_num_threads() == threads
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.slow
def test_compile_is_a_candidate_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    result = benchmark({"mlp": model}, torch.zeros(1, 4), compile=True, rounds=2)
    assert [timing.kind for timing in result.timings] == ["pytorch", "compiled"]
    assert not hasattr(model, "_orig_mod")


def test_onnx_file_alone_and_beside_its_model(tmp_path: Path) -> None:
    model = nn.Linear(4, 2)
    path = export_onnx(model, torch.zeros(2, 4), tmp_path / "linear.onnx", benchmark=False).path
    alone = benchmark(path, batch=3, rounds=2)
    assert (alone.timings[0].name, alone.timings[0].kind, alone.batch) == ("linear.onnx", "onnxruntime", 3)
    both = benchmark({"eager": model, "file": path}, rounds=2)
    assert [timing.kind for timing in both.timings] == ["pytorch", "onnxruntime"]
    assert both["file"].speedup == pytest.approx(1 / both["file"].ratio)
    with pytest.raises(InputError, match="another number of inputs"):
        benchmark(path, (torch.zeros(1, 4), torch.zeros(1, 4)))


def test_result_reads_in_a_terminal_a_notebook_and_a_program() -> None:
    result = benchmark({"a": double, "b": same}, torch.zeros(1, 1), rounds=2)
    assert machine().processor in str(result)
    assert "ratio" in str(result)
    assert "<table>" in result._repr_html_()
    assert json.loads(json.dumps(result.to_dict()))["timings"][1]["name"] == "b"


def test_table_escapes_html() -> None:
    assert "<b>" not in Table("t", ("<b>",), (("[red]x",),)).html()
    assert "[red]x" in Table("t", ("c",), (("[red]x",),)).text()


def test_bad_input() -> None:
    with pytest.raises(InputError, match="example inputs"):
        benchmark(nn.Linear(2, 2))
    with pytest.raises(InputError, match=r"Linear refuses .*float32\[1, 3\]"):
        benchmark(nn.Linear(2, 2), torch.zeros(1, 3))
    with pytest.raises(InputError, match="nothing to measure"):
        benchmark({}, torch.zeros(1))
    with pytest.raises(InputError, match="rounds must be positive"):
        benchmark(same, torch.zeros(1), rounds=0)
    with pytest.raises(ExportError, match="no such ONNX file"):
        benchmark("nowhere.onnx")
    with pytest.raises(ModelError, match="meta device"):
        benchmark(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))


@pytest.mark.parametrize(
    "options",
    [
        {"confidence": 3},
        {"confidence": 0.0},
        {"rounds": 2.5},
        {"seconds": "a"},
        {"seconds": 0},
        {"threads": 1.5},
        {"batches": (1, 0)},
        {"batches": ()},
        {"batches": 4},
        {"thread_counts": (2, 2)},
        {"batches": (1,), "batch": 1},
    ],
)
def test_numbers_are_checked_before_any_work(options: dict[str, Any]) -> None:
    def never(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("the candidate was run")

    with pytest.raises(InputError, match=next(iter(options))):
        benchmark(never, torch.zeros(1), **options)


def test_whatever_a_forward_raises_is_an_input_error() -> None:
    class Picky(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise KeyError("no such thing")

    with pytest.raises(InputError, match="no such thing"):
        benchmark(nn.Sequential(Picky()), torch.zeros(1, 2), rounds=1)


def test_hooks_of_the_user_do_not_run() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    seen: list[int] = []
    model[0].register_forward_hook(lambda module, inputs, output: seen.append(1))
    benchmark(model, torch.zeros(1, 4), rounds=2)
    assert seen == []


def test_hooks_that_the_model_needs_run() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, inputs, output: output[:, :4])
    assert benchmark(model, torch.zeros(1, 4), rounds=2).timings[0].median_ms > 0
