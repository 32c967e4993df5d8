"""Distillation in training: a real lesson, several processes, accelerate, mixed precision, resuming."""

from __future__ import annotations

import copy
import importlib
import itertools
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import torchtrim as tt


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    sklearn = importlib.import_module("sklearn.datasets")
    found = sklearn.load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    return torch.tensor(found.data[order] / 16.0).float(), torch.tensor(found.target[order])


def mlp(*widths: int, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def accuracy(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> float:
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


def test_a_taught_student_beats_an_untaught_one() -> None:
    x, y = digits()
    few, held = torch.arange(60), slice(1000, None)
    teacher = mlp(64, 256, 10, seed=0)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(teacher(x[:1000]), y[:1000]).backward()
        optimizer.step()
    assert accuracy(teacher, x[held], y[held]) > 0.94

    def after_200_steps(seed: int, options: dict[str, float] | None, labelled: bool = True) -> float:
        student = mlp(64, 16, 10, seed=seed)
        distiller = None if options is None else tt.Distiller(student, teacher, **options)
        optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
        for step in range(200):
            rows = few if labelled else torch.arange(step * 60, step * 60 + 60) % 1000
            optimizer.zero_grad()
            if distiller is None:
                F.cross_entropy(student(x[rows]), y[rows]).backward()
            else:
                distiller(x[rows], y[rows] if labelled else None).loss.backward()
            optimizer.step()
        return accuracy(student, x[held], y[held])

    alone, taught, unlabelled = (
        [after_200_steps(seed, *how) for seed in (1, 2)]
        for how in ((None,), ({"alpha": 0.9},), ({"alpha": 1.0}, False))
    )
    assert sum(taught) / 2 > sum(alone) / 2 + 0.04, (alone, taught)  # the same 60 rows, the same 200 steps
    assert sum(unlabelled) / 2 > sum(alone) / 2 + 0.07, (alone, unlabelled)


def made(seed: int = 0) -> tt.Distiller:
    # In double precision: training magnifies the last bit of a sum that is taken in another order.
    student, teacher = mlp(8, 6, 5, 4, seed=seed).double(), mlp(8, 16, 12, 4, seed=seed + 1).double()
    return tt.Distiller(
        student,
        teacher,
        hints={"1": "1", "attention": tt.Hint("3", loss=F.l1_loss, project=True)},
        balance=True,
        example_inputs=torch.zeros(2, 8).double(),
    )


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(8, 8, generator=generator).double(), torch.randint(0, 4, (8,), generator=generator)


def trained(model: nn.Module, distiller: tt.Distiller, x: torch.Tensor, y: torch.Tensor) -> list[torch.Tensor]:
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.02, momentum=0.9)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        result = model(x, y)
        result.loss.backward()
        optimizer.step()
        losses.append(result.loss.detach())
    return losses


def one_of_two(rank: int, port: int, out: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2")
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    x, y = rows()
    found = {}
    for unused in (False, True):
        distiller = made()
        if rank:  # other projections on the second process, which DDP is to make the same
            with torch.no_grad():
                for parameter in distiller.projections.parameters():
                    parameter.add_(1.0)
        model = nn.parallel.DistributedDataParallel(distiller, find_unused_parameters=unused)
        losses = trained(model, distiller, x[rank * 4 : rank * 4 + 4], y[rank * 4 : rank * 4 + 4])
        gradients = {name: p.grad for name, p in distiller.named_parameters()}
        found[unused] = {"losses": losses, "state": distiller.state_dict(), "gradients": gradients}
    torch.save(found, f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_are_one_with_the_whole_batch(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=one_of_two, args=(rank, port, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(200)
    assert [process.exitcode for process in processes] == [0, 0]
    both = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    alone = made()
    losses = trained(alone, alone, *rows())
    assert float(losses[-1]) < float(losses[0])
    for unused in (False, True):
        first, second = (each[unused] for each in both)
        assert all(torch.equal(value, second["state"][name]) for name, value in first["state"].items())
        assert all(torch.equal(value, second["gradients"][name]) for name, value in first["gradients"].items())
        means = [(a + b) / 2 for a, b in zip(first["losses"], second["losses"], strict=True)]
        assert max(float((a - b).abs()) for a, b in zip(losses, means, strict=True)) < 1e-5
        for name, value in alone.state_dict().items():
            assert torch.allclose(value, first["state"][name], atol=1e-5), name


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_under_accelerate(precision: str) -> None:
    accelerate = importlib.import_module("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision)
    distiller = made().float()
    distiller.teacher.float()
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(distiller, optimizer)
    x, y = rows()[0].float(), rows()[1]
    with accelerator.accumulate(model):
        before = copy.deepcopy(distiller.state_dict())
        result = model(x, y)
        accelerator.backward(result.loss)
        optimizer.step()
    assert result.loss.dtype == torch.float32 and set(result.parts) == {"hard", "soft", "1", "attention"}
    moved = [name for name, p in distiller.named_parameters() if not torch.equal(before[name], p)]
    assert len(moved) == len(list(distiller.parameters()))
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


def test_a_resumed_training_goes_on_to_the_bit() -> None:
    x, y = rows()
    whole = made()
    optimizer = torch.optim.AdamW(whole.parameters(), lr=1e-2)

    def step(distiller: tt.Distiller, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        distiller(x, y).loss.backward()
        optimizer.step()

    for _ in range(3):
        step(whole, optimizer)
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict()))
    for _ in range(3):
        step(whole, optimizer)

    again = made()
    again.load_state_dict(saved[0])
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(saved[1])
    for _ in range(3):
        step(again, optimizer)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in whole.state_dict().items())


def test_hints_see_no_recomputed_forward() -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = nn.Sequential(nn.Linear(8, 6), nn.ReLU()), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(torch.utils.checkpoint.checkpoint(self.block, x, use_reentrant=False))

    x, y = rows()[0].float(), rows()[1]
    student, teacher = Checkpointed(), mlp(8, 16, 4, seed=1)
    distiller = tt.Distiller(student, teacher, hints={"block.0": "0"}, example_inputs=x)
    result = distiller(x, y)
    result.loss.backward()
    plain = copy.deepcopy(student)
    direct = tt.Distiller(
        nn.Sequential(plain.block, nn.Identity(), plain.head), teacher, hints={"0.0": "0"}, example_inputs=x
    )
    direct.projections.load_state_dict({f"0_{name[6:]}": p for name, p in distiller.projections.state_dict().items()})
    plain.zero_grad()
    direct(x, y).loss.backward()
    assert all(
        torch.allclose(p.grad, q.grad, atol=1e-6)
        for p, q in zip(student.parameters(), plain.parameters(), strict=True)
        if p.grad is not None and q.grad is not None
    )


def test_a_training_is_resumed_with_its_own_distillation(tmp_path: Path) -> None:
    x, y = rows()[0].float(), rows()[1]
    data = list(zip(x.split(16), y.split(16), strict=True))
    teacher = mlp(8, 16, 4, seed=1)
    for epochs, distill in ((1, {"temperature": 2.0}), (1, {"temperature": 2.0})):
        tt.finetune(
            mlp(8, 16, 4, seed=2), data, epochs=epochs, teacher=teacher, distill=distill, folder=tmp_path, resume=True
        )
    for other in ({"temperature": 8.0}, {"temperature": 2.0, "alpha": 0.9}, {"temperature": 2.0, "hints": None}):
        with pytest.raises(tt.CheckpointMismatch, match="distill"):
            tt.finetune(
                mlp(8, 16, 4, seed=2), data, epochs=1, teacher=teacher, distill=other, folder=tmp_path, resume=True
            )
