"""`size_report`: the same figures from every form, and what compression makes of them."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import zstandard
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save_file
from torch import nn
from typer.testing import CliRunner

import torchtrim as tt
from torchtrim.cli import app
from torchtrim.errors import CheckpointDamaged, InputError, ModelError


def net() -> nn.Module:
    """Three quarters of one weight at zero, three values in another; a buffer, a tied weight."""
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 8), nn.Linear(8, 8))
    with torch.no_grad():
        made[0].weight[2:] = 0.0
        made[0].weight[2] = -0.0  # a zero too
        made[3].weight.copy_(torch.arange(64).reshape(8, 8) % 3)
    made[4].weight = made[3].weight
    return made


PARAMS = 8 * 27 + 8 + 16 + 64 + 8 + 8
ZEROS = 6 * 27 + 8 + 22  # of the convolution, of the norm's bias, of the linear layer


def test_a_model() -> None:
    size = tt.size_report(net())["Sequential"]
    assert (size.params, size.params - size.nonzeros) == (PARAMS, ZEROS)
    assert size.memory_bytes == 4 * (PARAMS + 16) + 8 and size.disk_bytes is None
    by_name = {each.name: each for each in size.tensors}
    assert by_name["3.weight"].distinct == 3 and by_name["0.weight"].distinct == 55
    assert by_name["0.weight"].nonzeros == 54 and "4.weight" not in by_name
    assert size.distinct == 55 and not by_name["1.running_mean"].parameter
    raw = b"".join(t.detach().numpy().tobytes() for t in (*net().parameters(), *net().buffers()))
    assert size.gzip_bytes == len(gzip.compress(raw, 6))


def forms(folder: Path) -> dict[str, Any]:
    made = net()
    torch.save(made.state_dict(), folder / "net.pt")
    torch.save({"model": made.state_dict(), "steps": 3}, folder / "old.pt", _use_new_zipfile_serialization=False)
    tied = {name: tensor for name, tensor in made.state_dict().items() if name != "4.weight"}
    save_file(tied, folder / "net.safetensors")
    tt.save(made, folder / "net.trim")
    tt.save(made, folder / "packed.trim", compress="zstd")
    return {"model": made, **{file.name: file for file in sorted(folder.iterdir())}}


def test_every_form_says_the_same(tmp_path: Path) -> None:
    report = tt.size_report(forms(tmp_path))
    kinds = {size.name: size.kind for size in report.sizes}
    assert kinds == {
        "model": "model",
        "net.pt": "torch",
        "old.pt": "torch",
        "net.safetensors": "safetensors",
        "net.trim": ".trim",
        "packed.trim": ".trim (zstd)",
    }
    for size in report.sizes:
        assert size.memory_bytes == 4 * (PARAMS + 16) + 8, size.name
        assert sum(each.numel for each in size.tensors) == PARAMS + 17
        assert max(each.distinct or 0 for each in size.tensors if len(each.shape) > 1) == 55
        if "trim" in size.name or size.name == "model":
            assert (size.params, size.params - size.nonzeros) == (PARAMS, ZEROS)
        if size.disk_bytes is not None:
            data = (tmp_path / size.name).read_bytes()
            assert size.disk_bytes == len(data)
            assert size.gzip_bytes == len(gzip.compress(data, 6))
            stream = zstandard.ZstdCompressor(level=3).compressobj()
            assert size.zstd_bytes == len(stream.compress(data)) + len(stream.flush())
    assert json.loads(json.dumps(report.to_dict()))["gzip_level"] == 6
    assert "gzip at level 6, zstd at level 3" in str(report) and "<table>" in report._repr_html_()
    assert "3.weight" not in str(report) and "3.weight" in str(tt.size_report(net(), tensors=True))


def test_an_onnx_file_with_weights_beside_it(tmp_path: Path) -> None:
    made = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        made[0].weight[16:] = 0.0
    tt.export_onnx(made, torch.zeros(2, 64), tmp_path / "net.onnx", benchmark=False)
    loaded = onnx.load(tmp_path / "net.onnx")
    expected = sum(numpy_helper.to_array(each).size for each in loaded.graph.initializer)
    onnx.save(loaded, tmp_path / "apart.onnx", save_as_external_data=True, location="apart.bin", size_threshold=0)
    whole, apart = tt.size_report({"whole": tmp_path / "net.onnx", "apart": tmp_path / "apart.onnx"}).sizes
    assert whole.params == apart.params == expected
    assert whole.nonzeros == apart.nonzeros == expected - 48 * 64
    assert apart.disk_bytes == sum((tmp_path / name).stat().st_size for name in ("apart.onnx", "apart.bin"))
    (tmp_path / "apart.bin").unlink()
    with pytest.raises(InputError, match=r"apart\.bin: a file with weights of the model is not there"):
        tt.size_report(tmp_path / "apart.onnx")
    (tmp_path / "folder").mkdir()
    (tmp_path / "apart.onnx").rename(tmp_path / "folder" / "apart.onnx")
    data = (tmp_path / "folder" / "apart.onnx").read_bytes()
    (tmp_path / "folder" / "apart.onnx").write_bytes(data.replace(b"apart.bin", b"../ap.bin"))
    (tmp_path / "ap.bin").write_bytes(bytes(100_000))
    with pytest.raises(InputError, match="outside of its folder"):
        tt.size_report(tmp_path / "folder" / "apart.onnx")


def test_onnx_types_and_places(tmp_path: Path) -> None:
    """Numbers written as lists, four bits, half floats, texts, constants, and graphs within nodes."""

    def branch(name: str, values: list[float]) -> onnx.GraphProto:
        constant = helper.make_tensor(name, TensorProto.FLOAT, [len(values)], values)
        node = helper.make_node("Constant", [], [f"{name}_out"], value=constant)
        output = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, None)
        return helper.make_graph([node], name, [], [output])

    initializers = [
        helper.make_tensor("listed", TensorProto.FLOAT, [4], [0.0, -0.0, 2.0, 2.0]),
        numpy_helper.from_array(np.array([[0, 1], [2, 0]], dtype=np.float16), "half"),
        helper.make_tensor("nibbles", TensorProto.INT4, [3], [0, -3, 5]),
        helper.make_tensor("texts", TensorProto.STRING, [1], [b"word"]),
        helper.make_tensor("ids", TensorProto.INT64, [2], [0, 7]),
    ]
    choice = helper.make_node(
        "If", ["yes"], ["out"], then_branch=branch("a", [1.0]), else_branch=branch("b", [0, 0, 3])
    )
    graph = helper.make_graph(
        [choice],
        "g",
        [helper.make_tensor_value_info("yes", TensorProto.BOOL, [])],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        initializers,
    )
    onnx.save(helper.make_model(graph), tmp_path / "net.onnx")
    found = {each.name: each for each in tt.size_report(tmp_path / "net.onnx").sizes[0].tensors}
    counts = {name: (each.dtype, each.numel, each.nonzeros, each.distinct, each.bytes) for name, each in found.items()}
    assert counts == {
        "listed": ("float32", 4, 2, 2, 16),
        "half": ("float16", 4, 2, 3, 8),
        "nibbles": ("int4", 3, 2, 3, 2),
        "ids": ("int64", 2, 1, 2, 16),
        "a": ("float32", 1, 1, 1, 4),
        "b": ("float32", 3, 1, 2, 12),
    }


def test_a_pickle_with_a_sparse_tensor(tmp_path: Path) -> None:
    torch.save({"a": torch.eye(4).to_sparse(), "b": torch.ones(3)}, tmp_path / "net.pt")
    size = tt.size_report(tmp_path / "net.pt").sizes[0]
    assert (size.params, size.nonzeros) == (7, 7)


def test_sparse_tensors_of_onnx_count_as_they_are(tmp_path: Path) -> None:
    places = helper.make_tensor("at", TensorProto.INT64, [3], [0, 4, 8])
    found = [helper.make_tensor(name, TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]) for name in ("w", "c")]
    one, two = (helper.make_sparse_tensor(values, places, [3, 3]) for values in found)
    nodes = [helper.make_node("Constant", [], ["c"], sparse_value=two), helper.make_node("Add", ["w", "c"], ["y"])]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 3])
    onnx.save(
        helper.make_model(helper.make_graph(nodes, "g", [], [out], sparse_initializer=[one])), tmp_path / "s.onnx"
    )
    size = tt.size_report(tmp_path / "s.onnx").sizes[0]
    assert (size.params, size.memory_bytes) == (6, 24)


def test_types_of_torch() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values = torch.tensor([0.0, -0.0, 1.0, 2.0])
            for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.float64, torch.bool, torch.int8):
                self.register_buffer(str(dtype).replace(".", "_"), values.to(dtype))
            self.register_buffer("many", torch.arange(1000))
            self.register_buffer("none", torch.zeros(0, 3))

    found = {each.name: each for each in tt.size_report(Odd()).sizes[0].tensors}
    assert {each.nonzeros for name, each in found.items() if name.startswith("torch")} == {2}
    assert found["torch_float8_e4m3fn"].distinct == 3 and found["torch_complex64"].bytes == 32
    assert found["many"].distinct is None and found["many"].nonzeros == 999 and found["none"].numel == 0


def test_bad_input(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return (print, ("this must not be seen",))

    torch.save({"weight": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "text").write_text("Dear reader,\n" * 9)
    (tmp_path / "empty.onnx").touch()
    (tmp_path / "text.onnx").write_text("Dear reader,\n" * 9)
    (tmp_path / "cut.safetensors").write_bytes((10**6).to_bytes(8, "little") + b"{" + b" " * 99)
    onnx.save(
        helper.make_model(helper.make_graph([], "g", [], [], [helper.make_tensor("w", 1, [9], [0.0] * 9)])),
        tmp_path / "cut.onnx",
    )
    data = (tmp_path / "cut.onnx").read_bytes()
    (tmp_path / "cut.onnx").write_bytes(data[: len(data) // 2])
    for name in ("no.trim", "evil.pt", "text", "empty.onnx", "text.onnx", "cut.safetensors", "cut.onnx"):
        with pytest.raises(InputError, match=name.replace(".", r"\.")):
            tt.size_report(tmp_path / name)
    tt.save(net(), tmp_path / "net.trim", compress="zstd")
    data = (tmp_path / "net.trim").read_bytes()
    (tmp_path / "net.trim").write_bytes(data[:-9] + b"\1" + data[-8:])
    with pytest.raises(CheckpointDamaged, match=r"net\.trim"):
        tt.size_report(tmp_path / "net.trim")
    with pytest.raises(ModelError, match=r"weight: a tensor without values"):
        tt.size_report(nn.Linear(2, 2, device="meta"))
    for wrong in (3, {}, {"a": 3}):
        with pytest.raises(InputError):
            tt.size_report(wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="gzip_level: no such level"):
        tt.size_report(net(), gzip_level=12)


def test_without_zstandard_the_column_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    report = tt.size_report(net())
    assert report.sizes[0].zstd_bytes is None and report.sizes[0].gzip_bytes
    assert 'pip install "torchtrim[zstd]"' in str(report)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Of five forms of 96 MB, one after the other: less than one of them stays in memory."""
    code = """
import sys, pathlib, torch, onnx, resource, psutil
import torchtrim as tt
from onnx import helper, numpy_helper
from safetensors.torch import save_file
folder = pathlib.Path(sys.argv[1])
if sys.argv[2] == "write":
    net = torch.nn.Linear(4000, 6000, bias=False)
    net.weight.data.zero_()
    net.weight.data[:60] = 1.5
    torch.save(net.state_dict(), folder / "net.pt")
    save_file(net.state_dict(), folder / "net.safetensors")
    tt.save(net, folder / "net.trim", factory=False)
    tt.save(net, folder / "packed.trim", factory=False, compress="zstd")
    weight = numpy_helper.from_array(net.weight.detach().numpy(), "weight")
    onnx.save(helper.make_model(helper.make_graph([], "g", [], [], [weight])), folder / "net.onnx")
else:
    files = sorted(folder.iterdir())
    tt.size_report({file.name: file for file in files}, compress=False)  # imports, and the files in the page cache
    peak = 0
    import threading, time
    done = threading.Event()
    def watch():
        global peak
        while not done.is_set():
            info = psutil.Process().memory_info()
            peak = max(peak, info.rss - info.shared)
            time.sleep(0.002)
    info = psutil.Process().memory_info()
    before = info.rss - info.shared
    thread = threading.Thread(target=watch)
    thread.start()
    report = tt.size_report({file.name: file for file in files}, gzip_level=1, zstd_level=1)
    done.set(); thread.join()
    assert [size.nonzeros for size in report.sizes] == [60 * 4000] * 5
    print((peak - before) // 2**20)
"""
    for step in ("write", "read"):
        found = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path), step], check=True, capture_output=True, text=True
        )
    assert int(found.stdout) < 40


def test_the_command(tmp_path: Path) -> None:
    tt.save(net(), tmp_path / "net.trim", compress="zstd")
    result = CliRunner().invoke(app, ["size", str(tmp_path / "net.trim"), "timm:test_resnet", "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)["sizes"]
    assert [size["kind"] for size in told] == [".trim (zstd)", "model"] and told[0]["params"] == PARAMS
    assert "0.weight" in CliRunner().invoke(app, ["size", str(tmp_path / "net.trim"), "--tensors"]).stdout
    assert CliRunner().invoke(app, ["size", str(tmp_path / "none.onnx")]).exit_code == 1
