"""`torchtrim trim`, and data sets of torchvision for commands and recipes."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import torchtrim as tt
from torchtrim.cli import app
from torchtrim.errors import InputError
from torchtrim.graph.inputs import Inputs
from torchtrim.recipe.data import read_data
from torchtrim.recipe.form import DataSection


def digits() -> nn.Module:
    """A network for `package.module:function`."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, stride=4), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10),
    ).eval()  # fmt: skip


def mnist(root: Path) -> Path:
    """Files as MNIST has them: 40 training pictures and 30 others."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    generator = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 30)):
        pictures = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        (raw / f"{part}-images-idx3-ubyte").write_bytes(struct.pack(">IIII", 2051, count, 28, 28) + pictures.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 2049, count) + labels.tobytes())
    return root


def test_a_data_set_of_torchvision(tmp_path: Path) -> None:
    root = mnist(tmp_path)
    x = Inputs.of(torch.zeros(1, 1, 32, 32))
    train = read_data(DataSection(file=f"torchvision:MNIST:{root}"), x, labelled=True)
    test = read_data(DataSection(file="torchvision:MNIST:.:test", batch=10), x, folder=root, labelled=True)
    assert (train.rows, test.rows) == (40, 30)
    pictures, labels = next(iter(test))
    assert pictures.shape == (10, 1, 32, 32)
    assert labels.tolist() == list(range(10))
    for name, told in (
        ("torchvision:MNISTT:x", "not a data set"),
        ("torchvision:MNIST", "not a data set"),
        (f"torchvision:MNIST:{tmp_path}/nowhere", "cannot be read"),
        (f"torchvision:MNIST:{root}:val", "no such part"),
    ):
        with pytest.raises(InputError, match=told):
            read_data(DataSection(file=name), x, labelled=True)


def test_a_trim_from_the_shell(tmp_path: Path) -> None:
    root = mnist(tmp_path / "data")
    command = [
        "trim", f"{__name__}:digits", "--input", "1,1,28,28", "--data", f"torchvision:MNIST:{root}", "--val",
        f"torchvision:MNIST:{root}:test", "--train", f"torchvision:MNIST:{root}", "--epochs", "1", "--macs", "0.6",
        "--pruning", "magnitude", "--trials", "1", "--out", str(tmp_path / "out"), "--json",
    ]  # fmt: skip
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 0, run.output
    told = json.loads(run.stdout)
    assert told["met"]["macs"]["found"] <= told["met"]["macs"]["limit"]
    assert len(told["training"]["epochs"]) == 1
    page = (tmp_path / "out" / "report.html").read_text()
    assert "torchtrim" in page
    assert "--macs" not in told["notes"]
    net = tt.load(tmp_path / "out" / "net.trim", model=digits())
    assert net(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    again = CliRunner().invoke(app, command[:-1])
    assert again.exit_code == 0, again.output
    assert "report.html" in again.stdout


def test_a_trim_without_a_budget_is_wrong_usage(tmp_path: Path) -> None:
    run = CliRunner().invoke(app, ["trim", "timm:test_vit", "--data", str(tmp_path), "--out", str(tmp_path / "o")])
    assert run.exit_code == 2
    assert "brought within" in " ".join(run.output.replace("│", " ").split())
