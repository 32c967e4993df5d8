"""A kill, or a failure, at any moment of `save` leaves the old file or the new one; and files of old formats load."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import torchtrim as tt
from torchtrim.checkpoint import container
from torchtrim.checkpoint.load import load
from torchtrim.checkpoint.save import save
from torchtrim.errors import CheckpointError

DATA = Path(__file__).parent / "data"

# For each moment a process of its own saves 2 over 1, and kills itself there; "any" is killed from outside.
PARENT = """
import json, os, pathlib, signal, sys, time
import torch
from torch import nn
from torchtrim.checkpoint import container_write
from torchtrim.checkpoint.save import save

torch.set_num_threads(1)  # a child that is forked has none of its parent's other threads, and would wait for them

def net(value):
    made = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
    for parameter in made.parameters():
        parameter.data.fill_(value)
    return made

def killing(original, count, after=False):
    left = [count]
    def call(*args, **kwargs):
        left[0] -= 1
        if left[0] == 0 and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = original(*args, **kwargs)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call

def child(path, moment, count):
    if moment == "tensor":
        container_write.crc32 = killing(container_write.crc32, count)
    elif moment == "flush":
        os.fsync = killing(os.fsync, count)
    elif moment != "any":
        pathlib.Path.replace = killing(pathlib.Path.replace, count, after=moment == "replaced")
    save(net(2.0), path)
    while moment == "any":
        save(net(2.0), path)

for path, moment, count in json.loads(sys.argv[1]):
    save(net(1.0), path)
    process = os.fork()
    if not process:
        child(path, moment, count)
        os._exit(0)
    if moment == "any":
        time.sleep(count / 1000)
        os.kill(process, signal.SIGKILL)
    assert os.waitpid(process, 0)[1] == signal.SIGKILL, moment
"""
MOMENTS = [
    ("tensor", 1, {1.0}), ("tensor", 5, {1.0}), ("tensor", 9, {1.0}), ("flush", 1, {1.0}), ("replace", 1, {1.0}),
    ("replaced", 1, {2.0}), ("flush", 2, {2.0}), ("any", 3, {1.0, 2.0}), ("any", 8, {1.0, 2.0}),
    ("any", 21, {1.0, 2.0}), ("any", 55, {1.0, 2.0}),
]  # fmt: skip


def make(value: float) -> nn.Module:
    net = nn.Sequential(*(nn.Linear(300, 300) for _ in range(4)))
    for parameter in net.parameters():
        parameter.data.fill_(value)
    return net


def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path) -> None:
    jobs = [(str(tmp_path / f"{number}.trim"), moment, count) for number, (moment, count, _) in enumerate(MOMENTS)]
    subprocess.run([sys.executable, "-c", PARENT, json.dumps(jobs)], check=True, timeout=300)
    for (path, moment, _), (_, _, allowed) in zip(jobs, MOMENTS, strict=True):
        values = {float(value) for each in load(path, model=make(0.0)).parameters() for value in each.detach().unique()}
        assert len(values) == 1 and values <= allowed, moment
        save(make(3.0), path)  # what the killed one left beside it is not in the way
        assert bool((load(path, model=make(0.0))[0].bias == 3.0).all())


@pytest.mark.parametrize("compress", [None, "zstd"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compress: str | None
) -> None:
    path = tmp_path / "net.trim"
    save(make(1.0), path)
    old = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match=r"net\.trim: cannot be written: No space left"):
        save(make(2.0), path, compress=compress)
    assert path.read_bytes() == old and [file.name for file in tmp_path.iterdir()] == ["net.trim"]


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    real, link = tmp_path / "real.trim", tmp_path / "link.trim"
    save(make(1.0), real)
    real.chmod(0o640)
    link.symlink_to(real)
    save(make(2.0), link)
    assert link.is_symlink() and real.stat().st_mode & 0o777 == 0o640
    assert bool((load(real, model=make(0.0))[0].bias == 2.0).all())


def test_a_model_saved_over_the_file_it_came_from(tmp_path: Path) -> None:
    path = tmp_path / "net.trim"
    save(make(1.0), path)
    net = load(path, model=make(0.0))
    with torch.no_grad():
        net[0].bias.add_(1.0)
    save(net, path)
    again = load(path, model=make(0.0))
    assert bool((again[0].bias == 2.0).all()) and bool((again[1].bias == 1.0).all())
    assert bool((net[1].bias == 1.0).all())


def old_model() -> nn.Module:
    """What the kept files were made of: their tensors hold 0, 1, 2, ... divided by 8."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3))
    for tensor in net.state_dict().values():
        tensor.copy_((torch.arange(tensor.numel()) / 8).reshape(tensor.shape))
    return net


def write_old_file(path: Path) -> None:
    """How the kept files were written, with the version of the format that is in the name: 2 is the compressed form."""
    net = tt.attach_head(tt.cut(old_model(), torch.zeros(1, 3, 8, 8), after="2"), num_classes=2)
    head = net.get_submodule("head")
    for parameter in head.parameters():
        parameter.data = (torch.arange(parameter.numel()) / 4).reshape(parameter.shape)
    save(net.eval(), path, compress="zstd" if "2" in path.stem else None)


@pytest.mark.parametrize("version", [1, 2])
def test_a_file_of_an_old_format_still_loads(version: int) -> None:
    path = DATA / f"format_{version}.trim"
    net = load(path, model=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3)))
    assert [entry.edit.kind for entry in tt.history(net).entries] == ["cut", "attach_head"]
    for name, tensor in old_model().state_dict().items():
        if not name.startswith("3."):
            assert torch.equal(net.state_dict()[name], tensor)
    x = torch.arange(192.0).reshape(1, 3, 8, 8) / 64
    features = old_model().eval()[:3](x).mean((2, 3))
    weight, bias = torch.arange(8.0).reshape(2, 4) / 4, torch.arange(2.0) / 4
    assert torch.allclose(net(x), features @ weight.T + bias, rtol=1e-4)
    assert path.stat().st_size < 8000


def test_there_is_a_kept_file_of_every_format() -> None:
    assert {file.name for file in DATA.glob("format_*.trim")} == {
        f"format_{version}.trim" for version in range(1, container.FORMAT + 1)
    }
