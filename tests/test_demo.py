"""The demo, held to its figures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from torchtrim.cli import app
from torchtrim.demo import lite0, run_demo
from torchtrim.demo.digits import load_digits
from torchtrim.demo.lite0 import efficientnet_lite0
from torchtrim.errors import InputError, MissingDependency


@pytest.mark.parametrize(
    ("head_epochs", "block_epochs", "accuracy"), [(2, 1, 0.9), pytest.param(4, 5, 0.97, marks=pytest.mark.slow)]
)
def test_demo_reaches_its_accuracy_and_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, head_epochs: int, block_epochs: int, accuracy: float
) -> None:
    monkeypatch.setattr("torchtrim.demo._HEAD_EPOCHS", head_epochs)
    monkeypatch.setattr("torchtrim.demo._BLOCK_EPOCHS", block_epochs)
    threads, random_state = torch.get_num_threads(), torch.get_rng_state()
    result = run_demo(tmp_path / "out")
    assert torch.get_num_threads() == threads
    assert result.accuracy >= accuracy
    assert torch.equal(random_state, torch.get_rng_state())

    original, head_only, tuned, fp32, int8 = result.stages
    assert original.accuracy is None
    assert head_only.accuracy is not None
    assert fp32.accuracy is not None
    assert fp32.accuracy == tuned.accuracy > head_only.accuracy
    assert int8.accuracy is not None
    assert int8.accuracy >= fp32.accuracy - 0.01
    assert fp32.size_mb < 0.25 * original.size_mb
    assert int8.size_mb < fp32.size_mb
    assert fp32.latency_ms < original.latency_ms

    assert (tmp_path / "out" / "demo.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "out" / "demo.json").read_text())
    assert len(told["curve"]) == head_epochs + block_epochs
    assert told["stages"][3]["accuracy"] == fp32.accuracy
    for path in told["files"].values():
        assert Path(path).is_file()
    assert "fp32 file" in str(result)
    assert "<table>" in result._repr_html_()


def test_the_weights_are_the_real_ones() -> None:
    """A daisy in scikit-learn's sample pictures is a daisy (class 985 of ImageNet)."""
    from sklearn.datasets import load_sample_image

    flower = torch.from_numpy(load_sample_image("flower.jpg").copy()).permute(2, 0, 1).unsqueeze(0) / 127.5 - 1
    picture = torch.nn.functional.interpolate(flower, size=(224, 224), mode="bicubic", antialias=True)
    with torch.no_grad():
        assert efficientnet_lite0()(picture).argmax().item() == 985


def test_the_held_out_digits_are_not_trained_on() -> None:
    digits = load_digits(pixels=8)
    train = {bytes(image.numpy().tobytes()) for image in digits.train_images}
    assert not any(image.numpy().tobytes() in train for image in digits.test_images)
    assert digits.test_labels.bincount().min() >= 43


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be made"):
        run_demo(tmp_path / "file" / "out")
    assert CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "file" / "out")]).exit_code == 1


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(lite0, "_PACKAGES", ("torch", "no_such_package"))
    with pytest.raises(MissingDependency, match=r"no_such_package.*torchtrim\[demo\]"):
        run_demo(tmp_path)
