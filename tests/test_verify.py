"""Verification: what it accepts as data, what it measures, and when it raises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from torchtrim.errors import ExportError, ExportMismatch, InputError, ModelError
from torchtrim.export.compare import TOLERANCES, OutputError, Tally, Tolerance
from torchtrim.export.onnx import export_onnx
from torchtrim.export.outputs import named_outputs
from torchtrim.export.rounding import InDouble, Rounding, rounding_of
from torchtrim.export.rows import with_other_rows
from torchtrim.export.verify import scheme_of, verify_onnx
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
    assert result.batches == (1, 3, 4)
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
    assert verify_onnx(file, model, loader).batches == (1, 2, 3, 4)
    assert verify_onnx(file, model, [x[:2], x[2:4]]).rows == 2 + 1 + 3 + 2
    assert verify_onnx(file, model, [{"x": x, "labels": y}]).batches == (1, 3, 6)
    assert verify_onnx(file, model, (batch for batch in x.split(2)), max_batches=1).batches == (1, 2, 3)
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
    with pytest.raises(ExportError, match=r"bad\.onnx: cannot be read as an ONNX file"):
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
    assert verify_onnx(file, model, [torch.randn(2, 4), torch.zeros(0, 4)]).rows == 2 + 1 + 3


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
    assert verify_onnx(path, Lossy(), [{"labels": torch.zeros(4), "x": torch.randn(4, 3), "id": "a"}]).rows == 4 + 1 + 3


def test_what_the_model_raises_is_an_input_error(file: Path) -> None:
    class Picky(Net):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            raise KeyError("no such thing")

    with pytest.raises(InputError, match="no such thing"):
        verify_onnx(file, Picky(), torch.randn(2, 4))


def test_labels_may_be_anything(file: Path, model: Net) -> None:
    assert verify_onnx(file, model, [(torch.randn(2, 4), ["cat", "dog"])]).labelled == 0


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


def test_accuracy_is_told_where_there_are_labels(file: Path, model: Net) -> None:
    x = torch.randn(40, 4)
    with torch.no_grad():
        labels = model(x)[1]
    labels[:10] = (labels[:10] + 1) % 3
    labels[-2:] = -100  # not known
    result = verify_onnx(file, model, [(x[:20], labels[:20]), (x[20:], labels[20:])], max_drop=0.0)
    assert (result.labelled, result.accuracy, result.reference_accuracy) == (38, 28 / 38, 28 / 38)
    assert "accuracy on 38 labelled rows: 73.68%" in str(result)
    assert json.loads(json.dumps(result.to_dict()))["accuracy"] == 28 / 38
    named = verify_onnx(file, model, [{"x": x, "labels": labels}])
    assert named.labelled == 38
    with pytest.raises(InputError, match=r"a label past the last class .*found: 3; expected: 0 to 2"):
        verify_onnx(file, model, [(x, labels + 1)])
    for other in (labels.float(), labels[:, None], labels[:3]):
        assert verify_onnx(file, model, [(x, other)]).accuracy is None


def test_a_drop_of_accuracy_gates(file: Path, model: Net) -> None:
    other = Net()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        other.fc.bias += torch.tensor([0.3, 0.0, -0.3])
    x = torch.randn(200, 4)
    with torch.no_grad():
        labels = other(x)[1]
    loose = Tolerance(relative=None, agreement=0.0)
    kept = verify_onnx(file, other, [(x, labels)], tolerance=loose)
    assert kept.reference_accuracy == 1
    assert kept.accuracy is not None
    assert 0.5 < kept.accuracy < 1
    assert kept.accuracy == pytest.approx((model(x)[1] == labels).float().mean().item())
    with pytest.raises(ExportMismatch, match=r"found: accuracy \d\d.*a drop of at most 1.00%"):
        verify_onnx(file, other, [(x, labels)], tolerance=loose, max_drop=0.01)
    with pytest.raises(ExportMismatch, match="found: top-1 agreement"):
        verify_onnx(file, other, [x], tolerance=loose, max_drop=0.01)
    assert verify_onnx(file, other, [x], tolerance=loose, max_drop=0.5).passed
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(InputError, match="max_drop"):
            verify_onnx(file, other, [x], max_drop=bad)


def test_max_drop_needs_classes(tmp_path: Path) -> None:
    path = export_onnx(nn.Conv2d(1, 2, 1), torch.randn(1, 1, 4, 4), tmp_path / "m.onnx", benchmark=False).path
    with pytest.raises(InputError, match="max_drop is about classes"):
        verify_onnx(path, nn.Conv2d(1, 2, 1), torch.randn(2, 1, 4, 4), tolerance=1e9, max_drop=0.1)


def measured(reference: np.ndarray[Any, Any], found: np.ndarray[Any, Any], limits: Tolerance) -> OutputError:
    tally = Tally("output")
    tally.add(reference, found, Path("m.onnx"))
    return tally.result(limits)


def test_top1_is_asked_of_many_rows_only() -> None:
    reference = np.random.default_rng(0).normal(size=(100, 10))
    found = reference.copy()
    found[:20] = found[:20, ::-1]
    limits = Tolerance(relative=None, top1=0.9)
    many = measured(reference, found, limits)
    assert not many.passed
    assert many.missed == (("top-1 agreement 80.0%", "at least 90.0%"),)
    assert measured(reference[:49], found[:49], limits).passed
    assert many.top5 is not None
    assert 0.8 < many.top5 < 1
    assert measured(reference, found, Tolerance(relative=None, top1=0.9, max_drop=0.3)).passed


def test_the_99th_percentile_bounds_the_errors() -> None:
    reference = np.zeros((10, 1000))
    found = np.random.default_rng(0).normal(size=reference.shape)
    exact = float(np.percentile(np.abs(found), 99))
    assert exact <= measured(reference, found, Tolerance()).p99_abs <= exact * 1.03
    found[:, 5:] = 0
    assert measured(reference, found, Tolerance()).p99_abs == 0
    assert measured(reference, reference, Tolerance()).p99_abs == 0


def test_denormals_count_as_zero() -> None:
    tiny = np.full((2, 3), 1e-35, dtype=np.float32)
    flushed = measured(tiny, np.zeros_like(tiny), Tolerance(relative=1e-3, cosine=0.99))
    assert flushed.passed
    assert flushed.relative == 0
    assert not measured(np.full((2, 3), 1e-20), np.zeros((2, 3)), Tolerance(relative=1e-3)).passed


def test_nan_in_both_is_no_number_either() -> None:
    same = np.array([[1.0, np.nan]])
    assert measured(same, same, Tolerance(relative=1e9)).missed[0][0] == "NaN from the PyTorch model"


def test_a_model_that_is_random_in_eval_mode_is_not_blamed_on_the_file(file: Path) -> None:
    class Noisy(Net):
        def __init__(self) -> None:
            super().__init__()
            self.noise = nn.Module()
            self.noise.forward = lambda x: nn.functional.dropout(x, 0.5, training=True)  # type: ignore[method-assign]

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().forward(self.noise(x))

    with pytest.raises(ModelError, match="gives other values on the same inputs") as raised:
        verify_onnx(file, Noisy(), torch.randn(4, 4))
    assert raised.value.path == "noise"


class Cancelling(nn.Module):
    """Large weights that cancel: float32 rounds the sums, and double precision hardly does."""

    def __init__(self, large: float) -> None:
        super().__init__()
        self.fc = nn.Linear(128, 5, bias=False)
        with torch.no_grad():
            self.fc.weight[:, :64] += large
            self.fc.weight[:, 64:] -= large

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.cat([x, x], 1))


def settled(model: Cancelling) -> nn.Linear:
    """The same outputs without the large weights: their sums are exact in float32."""
    fc = nn.Linear(64, 5, bias=False)
    with torch.no_grad():
        fc.weight.copy_(model.fc.weight[:, :64] + model.fc.weight[:, 64:])
    return fc


@pytest.mark.filterwarnings("error")
def test_rounding_of_the_models_own_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Cancelling(3e3), torch.randn(8, 64)
    exact = export_onnx(settled(model), x, tmp_path / "exact.onnx", benchmark=False).path
    found = verify_onnx(exact, model, x)
    (output,) = found.outputs
    assert found.passed
    assert output.relative > 1e-3 > output.file_rounding  # type: ignore[operator]
    assert output.model_rounding == pytest.approx(output.relative, rel=1e-2)
    assert "is rounding: beside double precision the model is off by" in found.notes[0]
    assert found.notes[0] in str(found)
    assert json.loads(json.dumps(found.to_dict()))["outputs"][0]["model_rounding"] == output.model_rounding
    with pytest.raises(ExportMismatch, match=r"relative error [^;]*; expected: at most 1e-03"):
        verify_onnx(exact, model, x, tolerance=1e-3)


def test_rounding_of_the_files_own_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Cancelling(3e3), torch.randn(8, 64)
    rounds = export_onnx(model, x, tmp_path / "rounds.onnx", benchmark=False, tolerance=1.0).path
    with pytest.raises(ExportMismatch, match=r"relative error .*; beside double precision") as raised:
        verify_onnx(rounds, settled(model), x)
    (output,) = raised.value.verification.outputs  # type: ignore[attr-defined]
    assert output.file_rounding > 1e-3 > output.model_rounding


def told(exact: np.ndarray[Any, Any], own: np.ndarray[Any, Any], off: np.ndarray[Any, Any]) -> str | None:
    found = rounding_of(exact + own, exact + off, exact, 1e-3)
    assert found is not None
    return found.why


def test_rounding_explains_no_other_row_and_no_other_way() -> None:
    exact = np.array([[1.0, 8.0], [2.0, 3.0], [4.0, 5.0]])
    own = np.array([[0.1, 0.0], [0.0, 0.0], [0.0, 0.0]])
    assert told(exact, own, -3.9 * own) is None
    assert "four times" in (told(exact, own, -4.1 * own) or "")
    assert "four times" in (told(exact, own, own[[1, 0, 2]]) or "")
    assert told(exact, own, own * [[1.0], [0.0], [0.0]] + 7e-3) is None
    assert "four times" in (told(exact, own, own + 9e-3 * np.array([[0.0], [1.0], [0.0]])) or "")
    assert told(exact, 7.9 * own, 7.9 * own) is None
    assert "a tenth" in (told(exact, 8.1 * own, own) or "")
    assert "a tenth" in (told(exact, 7.9 * own, 8.1 * own) or "")
    assert rounding_of(exact, exact, exact[:2], 1e-3) is None
    assert rounding_of(exact, exact + np.nan, exact, 1e-3) is None
    scalar = np.array(2.0)
    assert rounding_of(scalar + 0.1, scalar - 0.1, scalar, 1e-3) == Rounding(pytest.approx(0.1), pytest.approx(0.1))


def test_rounding_explains_no_shift_and_no_other_choice() -> None:
    exact = np.linspace(-1.0, 1.0, 100)[None] * np.ones((2, 1))
    own = np.zeros_like(exact)
    own[:, 3] = 0.02
    assert told(exact, own, own[:, ::-1]) is None
    assert "four times" in (told(exact, own, np.full_like(exact, 0.02)) or "")  # no larger, and everywhere
    last = np.zeros_like(exact)
    last[:, -1] = -0.03
    assert "columns" in (told(exact, own, last) or "")


def test_an_error_of_one_run_is_not_explained_by_another() -> None:
    tally = Tally("y")
    one = np.ones((2, 3))
    tally.add(one, one + 0.5, Path("f"), rounding=Rounding(0.4, 0.1))
    limits = Tolerance(relative=1e-3, rounding=True)
    assert tally.result(limits).passed
    assert not tally.result(Tolerance(relative=1e-3)).passed
    assert tally.past(one, one + 0.01, 1e-3)
    tally.add(one, one + 0.01, Path("f"), rounding=Rounding(0.001, 0.01, "another row"))
    found = tally.result(limits)
    assert not found.passed
    assert found.missed[0][0] == (
        "relative error 1.00e-02; beside double precision 1.00e-02, and 1.00e-03 of the model: another row"
    )
    assert not tally.past(one, one + 0.01, 1e-3)  # it is refused: no other run has to be measured


def test_each_output_is_explained_by_itself(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self, rounds: bool, factor: float) -> None:
            super().__init__()
            torch.manual_seed(0)
            cancelling = Cancelling(3e3)
            self.inner, self.factor = cancelling if rounds else settled(cancelling), factor

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return self.factor * x, self.inner(x)

    x = torch.randn(8, 64)
    right = export_onnx(Both(False, 1.0), x, tmp_path / "right.onnx", benchmark=False).path
    plain, noisy = verify_onnx(right, Both(True, 1.0), x).outputs
    assert plain.model_rounding is None
    assert noisy.model_rounding is not None
    wrong = export_onnx(Both(False, 1.02), x, tmp_path / "wrong.onnx", benchmark=False).path
    with pytest.raises(ExportMismatch, match="'output' is too far"):
        verify_onnx(wrong, Both(True, 1.0), x)


class Seeded(nn.Module):
    """The same noise each time, of the type of the input: in double precision it is another one."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.02 * torch.randn(x.shape, generator=torch.Generator().manual_seed(7), dtype=x.dtype)


class Stored(nn.Module):
    """Keeps, from its first run on, what cannot be copied."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.held = Uncopyable()
        return 1.1 * x


class Uncopyable:
    def __deepcopy__(self, memo: dict[int, Any]) -> Uncopyable:
        raise KeyError("not to be copied")


class Strict(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (1.1 * torch.eye(4))  # refuses any other type


@pytest.mark.parametrize("model", [Seeded(), Stored(), Strict()], ids=lambda model: type(model).__name__)
def test_without_double_precision_nothing_is_explained(model: nn.Module, tmp_path: Path) -> None:
    x = torch.ones(2, 4)
    path = export_onnx(nn.Identity(), x, tmp_path / "m.onnx", benchmark=False).path
    with pytest.raises(ExportMismatch, match=r"relative error [^;]*; expected"):
        verify_onnx(path, model, x)
    model(x)
    assert InDouble(model).outputs(Inputs.of(x)) is None


def test_attention_draws_nothing() -> None:
    layer, x = nn.MultiheadAttention(8, 2, dropout=0.5).eval(), torch.randn(3, 2, 8)
    outputs = InDouble(layer).outputs(Inputs.of((x, x, x)))
    assert outputs is not None
    assert np.abs(outputs[0] - layer(x, x, x)[0].detach().numpy()).max() < 1e-5


def test_only_float32_files_are_excused() -> None:
    assert [scheme for scheme, limits in TOLERANCES.items() if limits.rounding] == ["float32"]


def test_double_precision_leaves_the_model_as_it_was() -> None:
    seen: list[tuple[int, torch.dtype]] = []

    class Watched(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append((id(self.weight), x.dtype))
            return super().forward(x)

    model = nn.Sequential(Watched(4, 4), nn.BatchNorm1d(4)).eval()
    before = {
        name: (id(each), each.data_ptr(), each._version) for name, each in model.state_dict(keep_vars=True).items()
    }
    x = torch.randn(3, 4)
    (found,) = InDouble(model).outputs(Inputs.of(x)) or ()
    assert seen[0][0] != id(model[0].weight)
    assert seen[0][1] == torch.float64
    assert found.dtype == np.float64
    assert np.abs(found - model(x).detach().numpy()).max() < 1e-5
    after = {
        name: (id(each), each.data_ptr(), each._version) for name, each in model.state_dict(keep_vars=True).items()
    }
    assert after == before


def test_a_file_that_is_random_is_said(tmp_path: Path) -> None:
    text = (
        '<ir_version: 9, opset_import: ["": 18]> g (float[N, 3] input) => (float[N, 3] output) '
        "{ noise = RandomNormalLike(input) output = Add(input, noise) }"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "noisy.onnx")
    with pytest.raises(ExportMismatch, match="the file gives other values each time"):
        verify_onnx(tmp_path / "noisy.onnx", nn.Identity(), torch.randn(4, 3))
    result = verify_onnx(tmp_path / "noisy.onnx", nn.Identity(), torch.randn(4, 3), tolerance=1e9)
    assert "'output' differs by up to" in result.notes[0]


def test_open_height_and_width_are_run_at_other_sizes(tmp_path: Path) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.conv(x).mean((2, 3)))

    class OfOneSize(Pooled):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[2] * x.shape[3] != 64:
                raise ValueError("eight by eight")
            return super().forward(x)

    path, net, x = tmp_path / "open.onnx", Pooled().eval(), torch.randn(2, 3, 8, 8)
    sizes = {0: torch.export.Dim("batch"), 2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    torch.onnx.export(net, (x,), path, dynamo=True, dynamic_shapes=(sizes,), verbose=False, external_data=False)
    result = verify_onnx(path, net, x)
    assert result.shapes == ((2, 3, 8, 8), (1, 3, 8, 8), (3, 3, 8, 8), (2, 3, 4, 4), (2, 3, 12, 8))
    strict = OfOneSize().eval()
    strict.load_state_dict(net.state_dict())
    result = verify_onnx(path, strict, x)
    assert len(result.shapes) == 3
    assert result.notes[0].startswith("the model does not take float32[2, 3, 4, 4]")


def test_a_file_of_one_batch_gets_all_rows(tmp_path: Path) -> None:
    net = nn.Linear(4, 3)
    path = export_onnx(net, torch.randn(2, 4), tmp_path / "m.onnx", dynamic=False, benchmark=False).path
    labels = torch.tensor([0, 1, 2, 0, 1])
    result = verify_onnx(path, net, [(torch.randn(5, 4), labels)])
    assert (result.batches, result.rows, result.labelled) == ((2,), 4, 4)
    result = verify_onnx(path, net, [(torch.randn(1, 4), labels[:1])])
    assert (result.rows, result.labelled) == (2, 1)


def test_a_broken_file_is_an_export_error_that_names_it(file: Path, model: Net, tmp_path: Path) -> None:
    whole, broken, x = file.read_bytes(), tmp_path / "broken.onnx", torch.randn(4, 4)
    for kept in (0, 1, len(whole) // 3, len(whole) - 20, len(whole) - 1):
        broken.write_bytes(whole[:kept])
        with pytest.raises(ExportError, match=r"broken\.onnx"):
            verify_onnx(broken, model, x)
    numbers = np.random.default_rng(0)
    refused = 0
    for place in numbers.integers(len(whole) * 8, size=60):
        turned = bytearray(whole)
        turned[place // 8] ^= 1 << (place % 8)
        broken.write_bytes(turned)
        try:
            verify_onnx(broken, model, x)
        except (ExportError, InputError):  # a bit in a name of an input, or in a shape, makes another file
            refused += 1
    assert refused > 10


@pytest.mark.parametrize(
    ("body", "scheme"),
    [
        ("y = Relu(x)", "float32"),
        ("q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) y = Relu(d)", "static"),
        ("a, b, c = DynamicQuantizeLinear(x) i = MatMulInteger(a, w, c) f = Cast<to=1>(i) y = Mul(f, b)", "dynamic"),
        ("m = ReduceMax<keepdims=0>(x) q = QuantizeLinear(x, m, z) y = DequantizeLinear(q, m, z)", "dynamic"),
        ("v = DequantizeLinear(w, s, z) y = MatMul(x, v)", "weight_only"),
        ("v = DequantizeLinear(w, s, z) t = Transpose(v) q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) "
         "y = MatMul(d, t)", "static"),
        ("v = DequantizeLinear(w, s, z) h = MatMul(x, v) a, b, c = DynamicQuantizeLinear(h) "
         "d = DequantizeLinear(a, b, c) y = Relu(d)", "mixed"),
    ],
)  # fmt: skip
def test_the_scheme_is_told_from_the_nodes(body: str, scheme: str, tmp_path: Path) -> None:
    text = (
        '<ir_version: 9, opset_import: ["": 18]> g (float[N, 4] x) => (float[N, 4] y) '
        f"<float s = {{0.1}}, uint8 z = {{0}}, uint8[4, 4] w = {{{', '.join('1' * 16)}}}> {{ {body} }}"
    )
    onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
    assert scheme_of(tmp_path / "m.onnx") == scheme
    assert scheme in TOLERANCES


def test_a_scheme_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="cannot be read"):
        scheme_of(tmp_path / "no.onnx")
