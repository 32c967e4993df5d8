"""An ONNX file, opened in ONNX Runtime and fed with PyTorch inputs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from torchtrim.errors import ExportError, InputError, MissingDependency
from torchtrim.graph.inputs import Inputs

_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(int8)": torch.int8,
    "tensor(int16)": torch.int16,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
_ON_GPU = ("CUDAExecutionProvider", "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")


class OnnxSession:
    """An ONNX file that is ready to run.

    Args:
        path: The file.
        providers: ONNX Runtime's execution providers, best first; the CPU's by default.
        threads: Threads for one operator; as many as PyTorch has where it is None.
        optimise: Whether ONNX Runtime may fuse nodes. Without that it computes what the file says, node by node, as
            slow as that is: what it would fuse for this processor may saturate where another device does not.

    Raises:
        ExportError: There is no such file, it cannot be read, or a provider is not installed here.
        MissingDependency: ONNX Runtime is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
        optimise: bool = True,
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.path.isfile(path):
            raise ExportError("there is no such ONNX file", path=path, hint="export_onnx writes one")
        self.path = Path(path)
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingDependency("ONNX Runtime is needed to run the file", hint="pip install onnxruntime") from error
        present = onnxruntime.get_available_providers()
        wanted = list(providers or ["CPUExecutionProvider"])
        missing = [name for name in wanted if name not in present]
        if missing:
            raise ExportError(
                "this ONNX Runtime lacks an execution provider", path=self.path, found=present, expected=missing
            )
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        if not optimise:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
        options.inter_op_num_threads = 1
        # Threads that wait for the next run by spinning take the cores from whatever else is timed in between: with a
        # thread for each core, files in alternating rounds took twice as long as each by itself.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        try:
            self._session = onnxruntime.InferenceSession(str(self.path), options, providers=wanted)
        except Exception as error:  # ONNX Runtime's errors share no base class
            raise ExportError(f"ONNX Runtime cannot open the file: {error}", path=self.path) from error
        self._inputs = self._session.get_inputs()

    @property
    def provider(self) -> str:
        """The provider it runs on."""
        return str(self._session.get_providers()[0])

    @property
    def metadata(self) -> dict[str, str]:
        """The file's own notes (`metadata_props`).

        Raises:
            ExportError: They are no text.
        """
        try:
            return dict(self._session.get_modelmeta().custom_metadata_map)
        except UnicodeDecodeError as error:
            raise ExportError("the file's notes are no text, so it was altered", path=self.path) from error

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs, in the file's order."""
        return [entry.name for entry in self._inputs]

    @property
    def output_names(self) -> list[str]:
        """The names of the outputs, in the file's order."""
        return [entry.name for entry in self._session.get_outputs()]

    @property
    def fixed_batch(self) -> int | None:
        """The only batch size the file takes, or None where it takes any."""
        sizes = [entry.shape[0] for entry in self._inputs if entry.shape]
        return None if not sizes or any(not isinstance(size, int) for size in sizes) else int(sizes[0])

    def feed(self, inputs: Inputs, *, cast: bool = False) -> dict[str, NDArray[Any]]:
        """The file's inputs from the forward's arguments: by name where all names agree, in order elsewhere.

        Args:
            inputs: The arguments.
            cast: Turn floats into the file's own float type, as a half-precision file needs it.

        Raises:
            InputError: Another number of inputs, or a shape or type that the file does not take.
        """
        tensors = inputs.tensors
        if not inputs.args and set(inputs.kwargs) == set(self.input_names):
            tensors = [inputs.kwargs[name] for name in self.input_names]
        if len(tensors) != len(self._inputs):
            raise InputError(
                "another number of inputs than the ONNX file takes",
                path=self.path,
                found=f"{len(tensors)} ({inputs.describe()})",
                expected=f"{len(self._inputs)} ({', '.join(self.input_names)})",
            )
        return {
            entry.name: self._array(entry, tensor, cast) for entry, tensor in zip(self._inputs, tensors, strict=True)
        }

    def run(self, feed: dict[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> list[NDArray[Any]]:
        """The outputs: those named, or all in the file's order.

        Raises:
            ExportError: ONNX Runtime could not run it.
        """
        try:
            return [np.asarray(value) for value in self._session.run(outputs, feed)]
        except Exception as error:  # ONNX Runtime's errors share no base class
            shapes = {name: list(array.shape) for name, array in feed.items()}
            raise ExportError(f"ONNX Runtime cannot run the file: {error}", path=self.path, found=shapes) from error

    def bound(self, feed: dict[str, NDArray[Any]], *, device: str | None = None) -> Callable[[], object]:
        """A call that runs the file on one feed again and again, as a benchmark does.

        On a GPU the inputs lie there already and the outputs stay there, as those of a PyTorch model do; the call
        returns when they are computed.

        Args:
            feed: The inputs.
            device: `cpu` or `cuda`, where inputs and outputs lie; by default where the provider computes. On the
                processor nothing needs to be bound.
        """
        if device is None and self.provider not in _ON_GPU:
            return lambda: self.run(feed)
        from onnxruntime import OrtValue

        place = device or "cuda"
        binding = self._session.io_binding()
        for name, array in feed.items():
            binding.bind_ortvalue_input(name, OrtValue.ortvalue_from_numpy(array, place, 0))
        for name in self.output_names:
            binding.bind_output(name, place)

        def run() -> object:
            try:
                self._session.run_with_iobinding(binding)
                binding.synchronize_outputs()
            except Exception as error:  # ONNX Runtime's errors share no base class
                shapes = {name: list(array.shape) for name, array in feed.items()}
                raise ExportError(f"ONNX Runtime cannot run the file: {error}", path=self.path, found=shapes) from error
            return binding.get_outputs()

        return run

    def random_inputs(self, batch: int = 1) -> Inputs:
        """Inputs made up from the file's own description: normal noise, zeros for integers.

        Raises:
            InputError: A dimension other than the first has no fixed size.
        """
        generator = torch.Generator().manual_seed(0)
        made: dict[str, torch.Tensor] = {}
        for entry in self._inputs:
            sizes = [batch if i == 0 and not isinstance(n, int) else n for i, n in enumerate(entry.shape)]
            if any(not isinstance(size, int) for size in sizes):
                raise InputError(
                    "the file leaves more than the batch open, so its input cannot be made up",
                    path=entry.name,
                    found=entry.shape,
                    hint="pass example_inputs",
                )
            dtype = _DTYPES[entry.type]
            noise = torch.randn(sizes, generator=generator) if dtype.is_floating_point else torch.zeros(sizes)
            made[entry.name] = noise.to(dtype)
        return Inputs((), made)

    def _array(self, entry: Any, tensor: torch.Tensor, cast: bool) -> NDArray[Any]:
        expected = _DTYPES.get(entry.type)
        if cast and expected is not None and expected.is_floating_point and tensor.is_floating_point():
            tensor = tensor.to(expected)
        fits = len(entry.shape) == tensor.dim() and all(
            not isinstance(size, int) or size == actual for size, actual in zip(entry.shape, tensor.shape, strict=True)
        )
        if not fits or tensor.dtype != expected:
            raise InputError(
                "an input that the ONNX file does not take",
                path=entry.name,
                found=f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}",
                expected=f"{str(expected).removeprefix('torch.')}{entry.shape}",
            )
        return np.asarray(tensor.detach().cpu().contiguous().numpy())
