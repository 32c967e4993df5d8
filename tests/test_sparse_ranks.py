"""Two processes: masks and shared values are the same on each, bit for bit."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import torchtrim as tt


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 2))


SETTINGS: list[dict[str, Any]] = [{}, {"scope": "global"}, {"importance": "random"}, {"block": (2, 2)}]


def work(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    found = []
    for settings in SETTINGS:
        model = nn.parallel.DistributedDataParallel(net())
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        schedule = tt.PolynomialDecay(0.3, 0.8, end=8, every=2)
        p = tt.MagnitudePruner(model, schedule, optimizer=optimizer, **settings)
        torch.manual_seed(100 + rank)  # other data, other random numbers
        for _ in range(7):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            p.step()
        p.finish()
        clusters = tt.WeightClustering(model, 4)
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            clusters.share_gradients()
            optimizer.step()
            clusters.step()
        clusters.finish()
        found.append({"state": model.module.state_dict(), "masks": p.state_dict()["masks"]})
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_masks_and_values_agree_on_every_rank(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(work, (port, str(tmp_path)), nprocs=2)  # type: ignore[no-untyped-call]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    for settings, a, b in zip(SETTINGS, one, other, strict=True):
        for part in ("state", "masks"):
            assert a[part].keys() == b[part].keys()
            assert all(torch.equal(a[part][name], b[part][name]) for name in a[part]), settings
        zeros = int((a["state"]["2.weight"] == 0).sum() + (a["state"]["4.weight"] == 0).sum())
        assert abs(zeros - round(0.8 * 512)) <= 4
