"""An ONNX file in OpenVINO, with the face of an ONNX Runtime session."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from torchtrim.bench.openvino_session import OPENVINO, OpenVinoSession, open_session
from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError, InputError, MissingDependency
from torchtrim.export.onnx import export_onnx
from torchtrim.export.quantize import to_float16
from torchtrim.export.weight_only import quantize_weights
from torchtrim.graph.inputs import Inputs


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(64, 32)
        self.mix = nn.Linear(32, 64)

    def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.mix(self.words(ids)) * scale
        return hidden.relu(), hidden.mean(1)


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("ov") / "two.onnx"
    inputs = (torch.randint(0, 64, (2, 5)), torch.rand(2, 1, 1))
    export_onnx(Two(), inputs, path, output_names=["hidden", "pooled"], opset=21, benchmark=False)
    return path


def inputs(batch: int) -> Inputs:
    generator = torch.Generator().manual_seed(batch)
    return Inputs.of((torch.randint(0, 64, (batch, 5), generator=generator), torch.rand(batch, 1, 1)))


def test_it_has_the_face_of_a_session(file: Path) -> None:
    ours, theirs = open_session(file, providers=[OPENVINO], threads=1), open_session(file, threads=1)
    assert isinstance(ours, OpenVinoSession)
    assert type(theirs) is OnnxSession
    assert ours.provider == "OpenVINO"
    assert ours.input_names == theirs.input_names == ["ids", "scale"]
    assert ours.output_names == theirs.output_names == ["hidden", "pooled"]
    assert ours.metadata == theirs.metadata
    assert ours.metadata["torchtrim.target"] == "cpu"
    assert ours.fixed_batch is None
    for batch in (1, 3, 2):
        given = inputs(batch)
        found, expected = ours.run(ours.feed(given)), theirs.run(theirs.feed(given))
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_an_output_is_not_written_over_by_the_next_call(file: Path) -> None:
    session = open_session(file, providers=[OPENVINO])
    first = session.run(session.feed(inputs(2)))[0]
    kept = first.copy()
    session.run(session.feed(inputs(2).map(lambda tensor: tensor * 0)))
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("threads", [1, None])
def test_inputs_that_the_file_does_not_take(file: Path, threads: int | None) -> None:
    session = open_session(file, providers=[OPENVINO], threads=threads)
    with pytest.raises(InputError, match="another number of inputs"):
        session.feed(Inputs.of(torch.zeros(2, 5)))
    with pytest.raises(InputError, match="ids"):
        session.feed(Inputs.of((torch.zeros(2, 5), torch.zeros(2, 1, 1))))
    with pytest.raises(ExportError, match="OpenVINO cannot run the file") as raised:
        session.run({"ids": np.full((2, 5), 3), "scale": np.ones((3, 1, 1), np.float32)})
    assert raised.value.found == {"ids": [2, 5], "scale": [3, 1, 1]}


def test_a_fixed_batch_is_said(tmp_path: Path) -> None:
    path = tmp_path / "fixed.onnx"
    export_onnx(nn.Linear(4, 2), torch.zeros(2, 4), path, dynamic=False, benchmark=False)
    assert open_session(path, providers=[OPENVINO]).fixed_batch == 2


@pytest.mark.parametrize("scheme", ["fp16", "int8", "int4"])
def test_half_and_small_weights(scheme: str, file: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.onnx"
    if scheme == "fp16":
        to_float16(file, path, target="openvino")
    else:
        ops = ("MatMul", "Gemm", "Gather")
        assert quantize_weights(file, path, bits=int(scheme[3:]), form="qdq", ops=ops) == 2
    assert path.stat().st_size < 0.8 * file.stat().st_size
    session, exact = open_session(path, providers=[OPENVINO]), open_session(file)
    given = inputs(3)
    a, b = session.run(session.feed(given, cast=True))[0], exact.run(exact.feed(given))[0]
    assert float((a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())) > (0.99 if scheme == "int4" else 0.999)


def test_files_that_openvino_cannot_open(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such ONNX file"):
        open_session(tmp_path / "none.onnx", providers=[OPENVINO])
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x07\x12no model")
    with pytest.raises(ExportError, match="OpenVINO cannot open"):
        open_session(tmp_path / "cut.onnx", providers=[OPENVINO])
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [2])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    strange = helper.make_node("NoSuchOperator", ["x"], ["y"], domain="nowhere")
    graph = helper.make_graph([strange], "g", [x], [y], [numpy_helper.from_array(np.zeros(1), "w")])
    domains = [helper.make_opsetid("", 18), helper.make_opsetid("nowhere", 1)]
    onnx.save(helper.make_model(graph, opset_imports=domains, ir_version=9), tmp_path / "strange.onnx")
    with pytest.raises(ExportError, match="NoSuchOperator"):
        open_session(tmp_path / "strange.onnx", providers=[OPENVINO])


def test_openvino_beside_others_and_not_installed(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="by itself"):
        open_session(file, providers=[OPENVINO, "CPUExecutionProvider"])
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(MissingDependency, match="pip install openvino"):
        open_session(file, providers=[OPENVINO])


@pytest.mark.parametrize("scheme", ["fp16", "auto"])
def test_half_precision_keeps_the_files_names(scheme: str, tmp_path: Path) -> None:
    # Casts at the inputs and outputs of an fp16 file leave names of their own on OpenVINO's ports.
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    x = torch.randn(2, 3, 16, 16)
    data = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    report = export_onnx(
        net, x, tmp_path / "net.onnx", target="openvino", quantize=scheme, data=data, benchmark=False, threads=1
    )
    assert report.verification.passed
    session = open_session(report.path, providers=[OPENVINO])
    assert (session.input_names, session.output_names) == (["input"], ["output"])
    if scheme == "auto":
        assert report.selection is not None
        half = next(entry for entry in report.selection.tried if entry.scheme == "fp16")
        assert half.agreement is not None  # it was made and run
        assert half.agreement.wrong is None


SIGNALLED = """
import faulthandler, signal, subprocess, sys
import numpy as np
from torchtrim.bench.openvino_session import OpenVinoSession

faulthandler.enable()  # as pytest does: handlers get a stack of their own
one, two = (OpenVinoSession(sys.argv[1], threads=1) for _ in range(2))
one.run({one.input_names[0]: np.zeros((1, 4), "float32")})
del one
del two
signal.signal(signal.SIGCHLD, lambda *given: None)
subprocess.run([sys.executable, "-c", "import time; time.sleep(0.1)"])
"""


def test_signals_reach_the_program_after_a_file_was_closed(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    export_onnx(nn.Linear(4, 2), torch.zeros(1, 4), path, benchmark=False)
    assert subprocess.run([sys.executable, "-c", SIGNALLED, str(path)], check=False).returncode == 0
