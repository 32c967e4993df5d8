"""An ONNX file, opened in OpenVINO and fed with PyTorch inputs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchtrim.bench.session import OnnxSession
from torchtrim.bench.signal_stack import kept_signal_stack
from torchtrim.errors import ExportError, InputError, MissingDependency

OPENVINO = "OpenVINO"

# OpenVINO's names of types, in ONNX Runtime's words.
_TYPES = {
    "f32": "tensor(float)",
    "f16": "tensor(float16)",
    "f64": "tensor(double)",
    "i8": "tensor(int8)",
    "i16": "tensor(int16)",
    "i32": "tensor(int32)",
    "i64": "tensor(int64)",
    "u8": "tensor(uint8)",
    "boolean": "tensor(bool)",
}


def open_session(
    path: str | os.PathLike[str],
    *,
    providers: Sequence[str] | None = None,
    threads: int | None = None,
    optimise: bool = True,
) -> OnnxSession:
    """An ONNX file that is ready to run: in OpenVINO where the provider asked for is `OpenVINO`, else in ONNX Runtime.

    Args:
        path: The file.
        providers: ONNX Runtime's execution providers, best first, or `["OpenVINO"]`; the CPU's by default.
        threads: Threads to compute with; the runtime's default where it is None.
        optimise: Whether ONNX Runtime may fuse nodes.

    Raises:
        ExportError: There is no such file, it cannot be read, or a provider is not installed here.
        InputError: OpenVINO beside other providers, which it does not share a file with.
        MissingDependency: ONNX Runtime or OpenVINO is needed and not installed.
    """
    wanted = list(providers or ())
    if OPENVINO not in wanted:
        return OnnxSession(path, providers=providers, threads=threads, optimise=optimise)
    if len(wanted) > 1:
        raise InputError("OpenVINO runs a whole file by itself", path="providers", found=wanted, expected=[OPENVINO])
    return OpenVinoSession(path, threads=threads)


@dataclass(frozen=True)
class _Entry:
    """One input or output, described as ONNX Runtime describes it."""

    name: str
    type: str
    shape: list[int | str]


class OpenVinoSession(OnnxSession):
    """An ONNX file that is ready to run in OpenVINO, with the face of an `OnnxSession`.

    It is compiled for latency: one call at a time. On processors that can, OpenVINO computes a float32 file in
    bfloat16 by its own choice; here it keeps to the file's precision.

    Args:
        path: The file.
        threads: Threads to compute with; OpenVINO's default where it is None.
        device: OpenVINO's name of the device.

    Raises:
        ExportError: There is no such file, or OpenVINO cannot read or compile it.
        MissingDependency: OpenVINO is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], *, threads: int | None = None, device: str = "CPU") -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
            raise ExportError("there is no such ONNX file", path=path, hint="export_onnx writes one")
        self.path = Path(path)
        try:
            import openvino
        except ImportError as error:
            raise MissingDependency("OpenVINO is needed to run the file there", hint="pip install openvino") from error
        settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        with kept_signal_stack():
            core = openvino.Core()
            try:
                model = core.read_model(str(self.path))
                self._notes = _notes(model)
                self._compiled = core.compile_model(model, device, settings)
            except RuntimeError as error:
                raise ExportError(f"OpenVINO cannot open the file: {error}", path=self.path) from error
            self._request = self._compiled.create_infer_request()
        inputs, outputs = _names(self.path)
        self._inputs = [_entry(port, inputs) for port in self._compiled.inputs]
        self._outputs = [_entry(port, outputs) for port in self._compiled.outputs]

    def __del__(self) -> None:
        with kept_signal_stack():
            self.__dict__.pop("_request", None)
            self.__dict__.pop("_compiled", None)

    @property
    def provider(self) -> str:
        """The provider it runs on: `OpenVINO`."""
        return OPENVINO

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own notes (`metadata_props`)."""
        return dict(self._notes)

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs, in the file's order."""
        return [entry.name for entry in self._outputs]

    def run(self, feed: dict[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> list[NDArray[Any]]:
        """The outputs: those named, or all in the file's order.

        Raises:
            ExportError: OpenVINO could not run it, or gives nothing for inputs that hold something.
        """
        try:
            self._request.infer([feed[entry.name] for entry in self._inputs], share_inputs=True)
            # The request keeps its own outputs and writes over them in the next call.
            places = [self.output_names.index(name) for name in outputs or self.output_names]
            found = [np.array(self._request.get_output_tensor(place).data) for place in places]
        except RuntimeError as error:
            raise ExportError(f"OpenVINO cannot run the file: {error}", path=self.path, found=_shapes(feed)) from error
        # With one thread it says nothing of inputs that do not fit each other, and computes nothing.
        if any(array.size == 0 for array in found) and all(array.size for array in feed.values()):
            raise ExportError("OpenVINO cannot run the file: it gives nothing", path=self.path, found=_shapes(feed))
        return found


def _shapes(feed: dict[str, NDArray[Any]]) -> dict[str, list[int]]:
    return {name: list(array.shape) for name, array in feed.items()}


def _names(path: Path) -> tuple[list[str], list[str]]:
    """The names of an ONNX file's inputs and outputs; none of a file in OpenVINO's own form."""
    if path.suffix == ".xml":
        return [], []
    import onnx  # not above: it is slow to load

    graph = onnx.load(path, load_external_data=False).graph
    return [value.name for value in graph.input], [value.name for value in graph.output]


def _entry(port: Any, names: list[str]) -> _Entry:
    shape = port.get_partial_shape()
    sizes = [dimension.get_length() if dimension.is_static else f"dim_{place}" for place, dimension in enumerate(shape)]
    kind = port.get_element_type().get_type_name()
    # A cast at an input or an output leaves a name of its own on the port, beside the file's.
    held = port.get_names()
    name = next((name for name in names if name in held), None)
    if name is not None:
        names.remove(name)  # one value may be two outputs: each port then has both names
    return _Entry(name or port.get_any_name(), _TYPES.get(kind, f"tensor({kind})"), sizes)


def _notes(model: Any) -> dict[str, str]:
    """What `metadata_props` held: OpenVINO's reader keeps it among its own notes on the model."""
    if not model.has_rt_info(["framework"]):
        return {}
    notes = model.get_rt_info(["framework"])
    found = notes.value if hasattr(notes, "value") else notes
    return {str(key): str(value) for key, value in found.items()} if isinstance(found, dict) else {}
