"""Verification: what it accepts as data, what it measures, and when it raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from torchtrim.errors import ExportError, ExportMismatch, InputError, ModelError
from torchtrim.export.compare import TOLERANCES, Tally, Tolerance
from torchtrim.export.onnx import export_onnx
from torchtrim.export.outputs import named_outputs
from torchtrim.export.rows import with_other_rows
from torchtrim.export.verify import verify_onnx
from torchtrim.graph.inputs import Inputs


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.fc(x)
        return logits, logits.argmax(1)


@pytest.fixture(scope="module")
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(scope="module")
def file(model: Net, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.onnx"
    return export_onnx(model, torch.randn(2, 4), path, benchmark=False).path


def test_one_example_runs_at_batch_one_and_another(file: Path, model: Net) -> None:
    result = verify_onnx(file, model, torch.randn(4, 4))
    assert result.batches == (1, 4)
    logits, choice = result.outputs
    assert logits.top1 == 1
    assert choice.agreement == 1
    assert result.cosine == pytest.approx(1)
    assert result.max_abs < 1e-5
    assert "top-1" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["passed"] is True


def test_data_may_be_batches_pairs_or_dicts(file: Path, model: Net) -> None:
    x, y = torch.randn(6, 4), torch.zeros(6)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    assert verify_onnx(file, model, loader).batches == (1, 2, 4)
    assert verify_onnx(file, model, [x[:2], x[2:4]]).rows == 5
    assert verify_onnx(file, model, [{"x": x, "labels": y}]).batches == (1, 6)
    assert verify_onnx(file, model, (batch for batch in x.split(2)), max_batches=1).batches == (1, 2)
    assert verify_onnx(file, model, example_inputs=x).passed


def test_other_weights_raise_with_the_measurements(file: Path, model: Net) -> None:
    torch.manual_seed(1)
    other = Net()
    with pytest.raises(ExportMismatch, match="'output' is too far") as raised:
        verify_onnx(file, other, torch.randn(8, 4))
    assert not raised.value.verification.passed  # type: ignore[attr-defined]
    assert raised.value.verification.outputs[0].relative > 1e-3  # type: ignore[attr-defined]
    loose = Tolerance(relative=None, cosine=-1.0, agreement=0.0)
    assert verify_onnx(file, other, torch.randn(8, 4), tolerance=loose).passed
    with pytest.raises(InputError, match="positive"):
        verify_onnx(file, model, torch.randn(8, 4), tolerance=0.0)


def test_nan_on_either_side_is_an_error(file: Path, model: Net) -> None:
    broken = Net()
    with torch.no_grad():
        broken.fc.bias[0] = float("nan")
    with pytest.raises(ExportMismatch, match="NaN from the PyTorch model"):
        verify_onnx(file, broken, torch.randn(2, 4), tolerance=1e9)


def test_bad_files_and_inputs(file: Path, model: Net, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such ONNX file"):
        verify_onnx(tmp_path / "no.onnx", model, torch.randn(2, 4))
    (tmp_path / "bad.onnx").write_bytes(b"not a model")
    with pytest.raises(ExportError, match="cannot open the file"):
        verify_onnx(tmp_path / "bad.onnx", model, torch.randn(2, 4))
    with pytest.raises(InputError, match=r"x: an input that the ONNX file does not take .*float32\[2, 5\]"):
        verify_onnx(file, model, torch.randn(2, 5))
    with pytest.raises(InputError, match=r"int64\[2, 4\]"):
        verify_onnx(file, model, torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(InputError, match="another number of inputs"):
        verify_onnx(file, model, {"p": torch.ones(2, 4), "q": torch.ones(2, 4)})
    with pytest.raises(InputError, match="no data"):
        verify_onnx(file, model, [])
    with pytest.raises(ExportError, match="execution provider"):
        verify_onnx(file, model, torch.randn(2, 4), providers=["NoSuchExecutionProvider"])
    with pytest.raises(ModelError, match="meta"):
        verify_onnx(file, Net().to("meta"), torch.randn(2, 4))


def test_model_stays_in_its_mode(file: Path, model: Net) -> None:
    model.train()
    verify_onnx(file, model, torch.randn(2, 4))
    assert model.training


def test_names_of_nested_outputs() -> None:
    one = torch.zeros(1)
    assert list(named_outputs({"a": one, "b": {"c": one, "d": (one, one)}})) == ["a", "b_c", "b_d", "b_d_1"]
    assert list(named_outputs([one, None, one])) == ["output", "output_1"]


class Renamed(nn.Module):
    def forward(self, a: torch.Tensor, mask: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        return a * scale - mask


def test_one_row_is_not_compared_again_and_again(tmp_path: Path) -> None:
    class FirstRow(Net):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            logits = self.fc(x[:1]).expand(x.shape[0], 3)
            return logits, logits.argmax(1)

    first, all_rows = FirstRow(), Net()
    all_rows.load_state_dict(first.state_dict())
    for x in (torch.randn(1, 4), torch.zeros(1, 4)):
        path = export_onnx(first, x, tmp_path / "m.onnx", overwrite=True, benchmark=False).path
        with pytest.raises(ExportMismatch, match="too far"):
            verify_onnx(path, all_rows, x)


def test_other_rows_of_whole_numbers_are_the_same_numbers() -> None:
    state = torch.get_rng_state()
    ids, mask = torch.tensor([[7, 8, 9, 0]]), torch.tensor([[True, True, True, False]])
    rows = with_other_rows(Inputs.of((ids, mask)), 3)
    assert rows.tensors[0].tolist() == [[7, 8, 9, 0], [0, 7, 8, 9], [9, 0, 7, 8]]
    assert torch.equal(rows.tensors[0] > 0, rows.tensors[1])
    assert torch.equal(state, torch.get_rng_state())


def test_batches_without_rows_compare_nothing(file: Path, model: Net) -> None:
    with pytest.raises(InputError, match="batches without rows"):
        verify_onnx(file, model, [torch.zeros(0, 4)])
    assert verify_onnx(file, model, [torch.randn(2, 4), torch.zeros(0, 4)]).rows == 3


@pytest.mark.parametrize("scheme", ["float32", "dynamic"])
def test_an_infinity_on_one_side_is_past_every_tolerance(scheme: str) -> None:
    reference = np.random.default_rng(0).normal(size=(4, 10))
    found = reference.copy()
    found[0, 0] = np.inf
    for a, b in ((reference, found), (found, reference)):
        tally = Tally("output")
        tally.add(a, b, Path("m.onnx"))
        assert not tally.result(TOLERANCES[scheme]).passed
    both = Tally("output")
    both.add(found, found, Path("m.onnx"))
    assert both.result(TOLERANCES[scheme]).passed


def test_dict_data_with_a_number_and_renamed_inputs_in_any_order(tmp_path: Path) -> None:
    model, inputs = Renamed(), {"mask": torch.randn(2, 3), "a": torch.randn(2, 3), "scale": 3.0}
    data = [{"a": torch.randn(4, 3), "scale": 3.0, "mask": torch.randn(4, 3)}]
    plain = export_onnx(model, inputs, tmp_path / "a.onnx", data=data, benchmark=False)
    assert plain.input_names == ("a", "mask")
    export_onnx(model, inputs, tmp_path / "b.onnx", input_names=["one", "two"], data=data, benchmark=False)
    with pytest.raises(ExportMismatch):
        verify_onnx(plain.path, model, [{**data[0], "scale": 1.0}])


def test_labels_that_the_forward_could_take_are_left_out(tmp_path: Path) -> None:
    class Lossy(nn.Module):
        def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
            return x * 2

    path = export_onnx(Lossy(), torch.randn(2, 3), tmp_path / "m.onnx", benchmark=False).path
    assert verify_onnx(path, Lossy(), [{"labels": torch.zeros(4), "x": torch.randn(4, 3), "id": "a"}]).rows == 5


def test_what_the_model_raises_is_an_input_error(file: Path) -> None:
    class Picky(Net):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            raise KeyError("no such thing")

    with pytest.raises(InputError, match="no such thing"):
        verify_onnx(file, Picky(), torch.randn(2, 4))


def test_labels_may_be_anything(file: Path, model: Net) -> None:
    assert verify_onnx(file, model, [(torch.randn(2, 4), ["cat", "dog"])]).rows == 3


def test_options_that_make_no_sense(file: Path, model: Net) -> None:
    with pytest.raises(InputError, match="not a number"):
        Tolerance(relative=float("nan"))
    for options, says in (({"tolerance": "a"}, "a number"), ({"max_batches": 0}, "max_batches")):
        with pytest.raises(InputError, match=says):
            verify_onnx(file, model, torch.randn(2, 4), **options)
    paths: list[Any] = [None, 3, "a\0b.onnx", "a" * 300]
    for path in paths:
        with pytest.raises(ExportError, match="no such ONNX file"):
            verify_onnx(path, model, torch.randn(2, 4))
