"""The same training in two processes as in one: losses, weights and decisions; and only one of them writes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset, default_collate

import torchtrim as tt
from torchtrim.train.finetune import finetune
from torchtrim.train.shares import Shares

SCRIPT = """
import json, os, sys
sys.path.insert(0, sys.argv[2])
from test_finetune_processes import norms, train
rank = int(os.environ["RANK"])
folder = sys.argv[1]
found = train(f"{folder}/run") | {"norms": norms()}
open(f"{folder}/{rank}.json", "w").write(json.dumps(found))
"""
KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_finetune_processes import train, before_batch
before_batch(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == 17 else None)
train(sys.argv[1])
"""
ONE_KILLED = """
import json, os, signal, sys
sys.path.insert(0, sys.argv[2])
from test_finetune_processes import train, before_batch
resume = os.path.isfile(f"{sys.argv[1]}/run/state.pt")
if os.environ["RANK"] == "1" and not resume:
    before_batch(lambda number: os.kill(os.getpid(), signal.SIGKILL) if number == 17 else None)
found = train(f"{sys.argv[1]}/run", resume=resume)
open(f"{sys.argv[1]}/{os.environ['RANK']}.json", "w").write(json.dumps(found))
"""
_before_batch: list[Any] = []


def before_batch(call: Any) -> None:
    """Call with the number of each batch that is trained on."""
    _before_batch.append(call)


class Counting:
    """A loader's collating, that tells of each batch."""

    count = 0

    def __call__(self, rows: list[Any]) -> Any:
        self.count += 1
        for call in _before_batch:
            call(self.count)
        return default_collate(rows)


def train(folder: str, resume: bool = False) -> dict[str, Any]:
    """Shuffled, the last batch of an epoch having an odd row, the head first, two batches a step, a teacher with hints,
    masks, an average, stopping early."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 12), nn.Linear(12, 3))
    teacher = nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 12), nn.Linear(12, 3))
    x = torch.randn(45, 8)
    data = TensorDataset(x, (x[:, :3].argmax(1)))
    done = finetune(
        model,
        DataLoader(data, batch_size=4, shuffle=True, collate_fn=Counting()),
        list(zip(x.split(7), x[:, :3].argmax(1).split(7), strict=True)),
        epochs=9,
        unfreeze={0: "head", 1: "all"},
        lr=0.2,
        accumulate=2,
        patience=3,
        clip_norm=1.0,
        ema=0.9,
        teacher=teacher,
        distill={"temperature": 2.0, "hints": {"2": "2"}},
        pruner=lambda net, optimizer: tt.MagnitudePruner(
            net, tt.PolynomialDecay(0.2, 0.6, end=20, every=4), optimizer=optimizer, include=["0", "3"]
        ),
        folder=folder,
        resume=resume,
    )
    epochs = [epoch.to_dict() | {"seconds": 0} for epoch in done.epochs]
    weights = {name: value.tolist() for name, value in model.state_dict().items()}
    return {"epochs": epochs, "best": done.best, "rows": done.rows, "weights": weights, "processes": done.processes}


def norms() -> dict[str, Any]:
    """With a norm that collects statistics, of other rows in each process."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))
    x = torch.randn(40, 8)
    finetune(model, [(x[:20], x[:20, :3].argmax(1))] * 3, [(x, x[:, :3].argmax(1))], epochs=2, ema=0.5)
    return {name: value.tolist() for name, value in model.state_dict().items()}


def in_two(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "script.py").write_text(script)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--standalone",
        folder / "script.py",
    ]
    return subprocess.run(
        [*map(str, command), str(folder), str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[dict[str, Any]], Path]:
    folder = tmp_path_factory.mktemp("two")
    run = in_two(SCRIPT, folder)
    assert run.returncode == 0, run.stderr[-3000:]
    return train(str(folder / "alone")), [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], folder


def test_two_processes_make_the_steps_of_one(both: Any) -> None:
    alone, two, _ = both
    assert (alone["processes"], two[0]["processes"], alone["rows"]) == (1, 2, 45)
    assert len(two[0]["epochs"]) == len(alone["epochs"])
    for one, other in zip(alone["epochs"], two[0]["epochs"], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
        assert other["val_metric"] == pytest.approx(one["val_metric"], abs=1e-6)
    for name, value in alone["weights"].items():
        assert torch.allclose(torch.tensor(value), torch.tensor(two[0]["weights"][name]), atol=1e-5), name


def test_every_process_decides_the_same(both: Any) -> None:
    _, two, _ = both
    assert two[0] == two[1]


def test_one_process_writes(both: Any) -> None:
    _, _, folder = both
    names = {"best.trim", "last.trim", "state.pt"}
    assert {path.name for path in (folder / "run").iterdir()} == names


def test_a_killed_training_goes_on_to_the_same_bits(both: Any, tmp_path: Path) -> None:
    """Killed in the middle of its second epoch; the run of the other tests was not."""
    alone, _, folder = both
    run = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "run"), str(Path(__file__).parent)], check=False)
    assert run.returncode == -9
    assert len(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["epochs"]) == 1
    again = train(str(tmp_path / "run"), resume=True)
    assert again == alone
    for name in ("best.trim", "last.trim"):
        assert (tmp_path / "run" / name).read_bytes() == (folder / "alone" / name).read_bytes()


@pytest.mark.slow
def test_one_of_two_processes_is_killed_and_both_go_on_to_the_weights_of_one(both: Any, tmp_path: Path) -> None:
    alone, _, _ = both
    assert in_two(ONE_KILLED, tmp_path).returncode != 0
    assert len(torch.load(tmp_path / "run" / "state.pt", weights_only=True)["epochs"]) == 1
    run = in_two(ONE_KILLED, tmp_path)
    assert run.returncode == 0, run.stderr[-3000:]
    again = json.loads((tmp_path / "0.json").read_text())
    assert (again["best"], len(again["epochs"])) == (alone["best"], len(alone["epochs"]))
    for name, value in alone["weights"].items():
        assert torch.allclose(torch.tensor(value), torch.tensor(again["weights"][name]), atol=1e-5), name


@pytest.mark.parametrize("workers", [0, 2])
def test_shares_of_a_loader_are_its_batches(workers: int) -> None:
    def loader() -> DataLoader[Any]:
        return DataLoader(TensorDataset(torch.arange(11)), batch_size=4, shuffle=True, num_workers=workers)

    torch.manual_seed(3)
    whole = [batch[0].tolist() for batch in loader()]
    shares = []
    for rank in (0, 1):
        torch.manual_seed(3)
        shares.append(list(Shares(loader(), rank, 2)))
    for batch, one, other in zip(whole, *shares, strict=True):
        assert one.batch[0].tolist() == batch[::2]
        assert other.batch[0].tolist() == batch[1::2]
        assert (one.rows, other.rows, one.total) == (len(batch[::2]), len(batch[1::2]), len(batch))
