"""Where a file is made and put: whole or not at all, with others at it, on a full disk, after a kill."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from torchtrim.errors import ExportError
from torchtrim.export import place as module
from torchtrim.export.place import put_in_place
from torchtrim.export.workshop import room_beside, workshop


def put(destination: Path, letter: str, start: threading.Barrier, size: int, *, overwrite: bool) -> bool:
    """What an export does at its end: its model and its weights, both of one letter, into place."""
    with workshop(destination) as folder:
        final = folder / "final" / destination.name
        final.parent.mkdir()
        final.write_text(letter * size)
        final.with_name(f"{final.name}.data").write_text(letter * size)
        start.wait()
        try:
            put_in_place(final, destination, overwrite=overwrite, aside=folder)
        except ExportError as error:
            if "exists already" not in str(error):
                raise
            return False
    return True


@pytest.mark.parametrize("lock", ["folder", "file"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_of_exports_to_one_path_at_once(
    overwrite: bool, lock: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if lock == "file":
        monkeypatch.setattr(module, "_lock_folder", lambda folder, held: False)
    for round in range(20):
        destination, won = tmp_path / f"{round}.onnx", []
        start = threading.Barrier(4)

        def work(letter: str, destination: Path = destination, start: threading.Barrier = start) -> None:
            if put(destination, letter, start, 10, overwrite=overwrite):
                won.append(letter)  # noqa: B023

        threads = [threading.Thread(target=work, args=(letter,)) for letter in "abcd"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == (4 if overwrite else 1)
        weights = destination.with_name(f"{destination.name}.data").read_text()
        assert destination.read_text() == weights
        assert weights[0] in won
    assert len(list(tmp_path.iterdir())) == 40


def test_a_file_that_came_this_moment_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Another program puts its file there between the look and the move.
    destination = tmp_path / "m.onnx"
    monkeypatch.setattr(module, "_refuse_taken", lambda files, overwrite: destination.write_text("theirs"))
    with workshop(destination) as folder:
        final = folder / "final" / "m.onnx"
        final.parent.mkdir()
        final.write_text("ours")
        final.with_name("m.onnx.data").write_text("our weights")
        with pytest.raises(ExportError, match="exists already"):
            put_in_place(final, destination, overwrite=False, aside=folder)
    assert destination.read_text() == "theirs"
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    start = threading.Barrier(1)
    assert put(tmp_path / "m.onnx", "a", start, 3, overwrite=False)
    assert not put(tmp_path / "m.onnx", "b", start, 3, overwrite=False)
    assert (tmp_path / "m.onnx").read_text() == "aaa"


def test_a_lock_that_is_never_given_back_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_lock_folder", lambda folder, held: False)
    monkeypatch.setattr(module, "_PATIENCE", 0.05)
    (tmp_path / ".torchtrim.lock").touch()
    with pytest.raises(ExportError, match="another export holds the folder"):
        put(tmp_path / "m.onnx", "a", threading.Barrier(1), 3, overwrite=False)
    assert [file.name for file in tmp_path.iterdir()] == [".torchtrim.lock"]


def test_what_a_killed_export_left_is_swept_up(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from torchtrim.export.workshop import workshop
with workshop(Path({str(tmp_path / "m.onnx")!r})) as folder:
    (folder / "half.onnx").write_text("half")
    os.kill(os.getpid(), signal.SIGTERM)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = tmp_path.iterdir()
    before = time.time() - 25 * 3600

    def aged(folder: Path) -> None:
        for entry in (*folder.iterdir(), folder):
            os.utime(entry, (before, before))

    # Not ours: no marker, another name, a link to a folder of somebody's.
    bare, named, target = tmp_path / ".torchtrim.abcdefgh", tmp_path / ".torchtrim.mine", tmp_path / "target"
    for folder in (bare, named, target):
        folder.mkdir()
        (folder / "kept").write_text("kept")
    for folder in (named, target):
        (folder / "torchtrim-made-this").write_text("")
    (tmp_path / ".torchtrim.12345678").symlink_to(target, target_is_directory=True)
    for folder in (bare, named, target):
        aged(folder)
    with workshop(tmp_path / "m.onnx"):
        assert left.is_dir()  # it may be at work still
    aged(left)
    with workshop(tmp_path / "m.onnx"):
        assert not left.exists()
    assert all((folder / "kept").is_file() for folder in (bare, named, target))
    assert len(list(tmp_path.iterdir())) == 4


def test_a_full_disk_is_said_and_other_errors_pass(tmp_path: Path) -> None:
    for inside in (workshop, room_beside):
        with pytest.raises(ExportError, match="no space left") as raised, inside(tmp_path / "m.onnx"):
            raise OSError(errno.ENOSPC, "No space left on device")
        assert raised.value.path == tmp_path / "m.onnx"
        with pytest.raises(ExportError, match="cannot be written"), inside(tmp_path / "m.onnx") as folder:
            (folder / "none" / "file").write_text("")
        with pytest.raises(FileNotFoundError), inside(tmp_path / "m.onnx"):  # a user's own, from the data
            (tmp_path / "none").read_text()
    assert not list(tmp_path.iterdir())


def test_a_copy_of_a_file_that_lies_where_nothing_can_be_written(tmp_path: Path) -> None:
    with room_beside(tmp_path / "m.onnx") as folder:
        assert folder.parent == tmp_path
    with room_beside(Path("/proc/m.onnx")) as folder:
        assert folder.parent != Path("/proc")


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
from torch import nn
import torchtrim as tt
from torchtrim.errors import ExportError
from torchtrim.export.calibration import calibrate
from torchtrim.export.calibration_data import CalibrationData
from torchtrim.export.prepare import prepare
from torchtrim.export.static import quantize_static
from torchtrim.export.workshop import workshop

net, x = nn.Sequential(nn.Flatten(), nn.Linear(192, 64), nn.ReLU(), nn.Linear(64, 32)), torch.randn(2, 3, 8, 8)
data = torch.randn(64, 3, 8, 8)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path(sys.argv[1])
plain = tt.export_onnx(net, x, folder / "plain.onnx", benchmark=False).path
tensors = ["input"]
found = calibrate(plain, [{"input": data.numpy()}], tensors)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))

def inside(work):
    with workshop(folder / "m.onnx") as place:
        work(place)

for number, work in enumerate([
    lambda: tt.export_onnx(net, x, folder / "m.onnx", benchmark=False, overwrite=True),
    lambda: tt.compare_layers(plain, plain, x),
    lambda: calibrate(plain, [{"input": data.numpy()}], tensors),
    lambda: inside(lambda place: prepare(plain, place / "m.onnx")),
    lambda: inside(lambda place: quantize_static(plain, place / "m.onnx", found, nodes=[])),
    lambda: inside(lambda place: CalibrationData.spool(data, net, plain, place / "data")),
]):
    try:
        work()
    except ExportError as error:
        print("refused", number, error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no limit on the size of files there")
@pytest.mark.slow
def test_no_room_for_a_file_leaves_nothing(tmp_path: Path) -> None:
    folder, temporary = tmp_path / "files", tmp_path / "tmp"
    folder.mkdir()
    temporary.mkdir()
    (folder / "m.onnx").write_text("before")
    command = [sys.executable, "-c", FULL_DISK, str(folder)]
    settings = {**os.environ, "TMPDIR": str(temporary)}
    told = subprocess.run(command, capture_output=True, text=True, check=False, env=settings)
    refused = [line.split() for line in told.stdout.splitlines() if "no space left" in line]
    assert [line[1] for line in refused] == list("012345"), told.stdout + told.stderr
    assert not [file for file in temporary.iterdir() if "torchtrim" in file.name]
    assert sorted(file.name for file in folder.iterdir()) == ["m.onnx", "plain.onnx"]
    assert (folder / "m.onnx").read_text() == "before"
