"""The benchmark: fair, complete, and without a trace on the model."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from torchtrim.bench.latency import benchmark
from torchtrim.bench.machine import machine
from torchtrim.bench.table import Table
from torchtrim.errors import ExportError, InputError, ModelError
from torchtrim.export.onnx import export_onnx


def slow(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.004)
    return x


def fast(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.002)
    return x


def test_names_the_machine() -> None:
    found = machine()
    assert found.processor
    assert found.cores >= 1
    assert found.versions["torch"].startswith(torch.__version__.split("+")[0])
    assert json.loads(json.dumps(found.to_dict()))["processor"] == found.processor


def test_ratio_and_interval_of_two_candidates() -> None:
    result = benchmark({"slow": slow, "fast": fast}, torch.zeros(2, 1), rounds=8)
    assert result["slow"].ratio == 1
    assert 0.4 < result["fast"].ratio < 0.7
    assert result["fast"].ratio_low <= result["fast"].ratio <= result["fast"].ratio_high
    assert result["fast"].median_ms <= result["fast"].p95_ms
    assert result["slow"].throughput == pytest.approx(2 / result["slow"].median_ms * 1e3)


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
    result = benchmark({"a": slow, "b": fast}, torch.zeros(1, 1), rounds=2)
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
        benchmark(fast, torch.zeros(1), rounds=0)
    with pytest.raises(ExportError, match="no such ONNX file"):
        benchmark("nowhere.onnx")
    with pytest.raises(ModelError, match="meta device"):
        benchmark(nn.Linear(2, 2, device="meta"), torch.zeros(1, 2))


@pytest.mark.parametrize(
    "options",
    [{"confidence": 3}, {"confidence": 0.0}, {"rounds": 2.5}, {"seconds": "a"}, {"seconds": 0}, {"threads": 1.5}],
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
