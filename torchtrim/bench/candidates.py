"""What can be measured: models, compiled models, ONNX files on any provider, callables."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn

from torchtrim.bench.openvino_session import OPENVINO, open_session
from torchtrim.bench.session import OnnxSession
from torchtrim.errors import ExportError, InputError, ModelError, TorchTrimError
from torchtrim.graph.copying import is_meta, kept_modes, structural_copy, unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import ExampleInputs, Inputs

_SHORT = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": OPENVINO,
}


@dataclass(frozen=True)
class OnnxFile:
    """An ONNX file with what runs it, as a candidate of `benchmark`.

    Attributes:
        path: The file.
        provider: An execution provider of ONNX Runtime, `OpenVINO` for OpenVINO's own runtime, or one of the short
            names `cpu`, `cuda`, `tensorrt`, `openvino`.

    Example:
        >>> OnnxFile("net.onnx", "cuda").runtime
        'CUDAExecutionProvider'
    """

    path: str | os.PathLike[str]
    provider: str = "cpu"

    def __post_init__(self) -> None:
        if not isinstance(self.path, (str, os.PathLike)) or not isinstance(self.provider, str):
            raise InputError(
                "an OnnxFile is a path and the name of a provider", found=(self.path, self.provider), hint='"cpu"'
            )

    @property
    def runtime(self) -> str:
        """The provider's full name."""
        return _SHORT.get(self.provider.lower(), self.provider)


Candidate: TypeAlias = "nn.Module | str | os.PathLike[str] | OnnxFile | Callable[..., Any]"


@dataclass(frozen=True)
class Runner:
    """A candidate that is ready: calling `run` is one forward, finished when it returns."""

    kind: str
    provider: str
    run: Callable[[], object]


def name_of(candidate: Candidate) -> str:
    """What a candidate without a name is called."""
    if isinstance(candidate, nn.Module):
        return type(unwrap(candidate)).__name__
    if isinstance(candidate, OnnxFile):
        return Path(candidate.path).name
    if isinstance(candidate, (str, os.PathLike)):
        return Path(candidate).name
    return str(getattr(candidate, "__name__", type(candidate).__name__))


def checked_candidates(
    given: Candidate | Mapping[str, Candidate], providers: Sequence[str] | None
) -> dict[str, nn.Module | OnnxFile | Callable[..., Any]]:
    """The candidates by name, with every path as an `OnnxFile` on the first of `providers`.

    Raises:
        InputError: There is none, or something else is among them.
    """
    if isinstance(providers, str):
        raise InputError("providers is a list of names", found=providers, hint=f"[{providers!r}]")
    provider = next(iter(providers or ()), "cpu")
    named = dict(given) if isinstance(given, Mapping) else {name_of(given): given}
    if not named:
        raise InputError("there is nothing to measure", found="no candidates")
    checked: dict[str, nn.Module | OnnxFile | Callable[..., Any]] = {}
    for name, candidate in named.items():
        if isinstance(candidate, (str, os.PathLike)):
            checked[name] = OnnxFile(candidate, provider)
        elif isinstance(candidate, (nn.Module, OnnxFile)) or callable(candidate):
            checked[name] = candidate
        else:
            raise InputError(
                "a candidate is a model, the path of an ONNX file, an OnnxFile or a callable",
                path=name,
                found=type(candidate).__name__,
            )
    return checked


def inputs_for(
    named: Mapping[str, nn.Module | OnnxFile | Callable[..., Any]], example_inputs: ExampleInputs | None
) -> Inputs:
    """The inputs given, or ones made up for the first ONNX file.

    Raises:
        InputError: There is no file among the candidates, or it does not say what it takes.
        ExportError: The file cannot be opened.
    """
    if example_inputs is not None:
        return Inputs.of(example_inputs)
    for candidate in named.values():
        if isinstance(candidate, OnnxFile):
            here = OnnxFile(candidate.path) if candidate.runtime == OPENVINO else candidate
            made = open_file(here, 1).random_inputs()
            return made if len(named) == 1 else Inputs(tuple(made.tensors))
    raise InputError("a model needs example inputs to be measured", hint="pass example_inputs as the second argument")


def open_file(file: OnnxFile, threads: int | None) -> OnnxSession:
    """An ONNX file, open on the provider it names.

    Raises:
        ExportError: It cannot be opened, or the provider cannot start here and another would have run it.
        MissingDependency: The runtime is not installed.
    """
    if file.runtime == OPENVINO:
        return open_session(file.path, providers=[OPENVINO], threads=threads)
    session = OnnxSession(file.path, providers=[file.runtime], threads=threads)
    if session.provider != file.runtime:
        raise ExportError(
            "the provider is installed and could not start, so another would be measured in its name",
            path=file.path,
            found=session.provider,
            expected=file.runtime,
        )
    return session


def opened(
    name: str, candidate: nn.Module | OnnxFile | Callable[..., Any], inputs: Inputs, threads: int, stack: ExitStack
) -> Runner:
    """A candidate made ready for these inputs, and run once.

    Args:
        name: What it is called in errors.
        candidate: What to run. A model is copied, without the user's hooks where it does not need them.
        inputs: What to run it on; moved to the model's device.
        threads: Threads for a file's session.
        stack: Puts back what was changed (a compiled model's mode).

    Raises:
        InputError: The candidate does not take these inputs.
        ModelError: A model on the meta device, or one that does not compile.
        ExportError: A file that cannot be opened or run.
    """
    if isinstance(candidate, OnnxFile):
        session = open_file(candidate, threads)
        feed = session.feed(inputs, cast=True)
        kind = "openvino" if candidate.runtime == OPENVINO else "onnxruntime"
        run_file = session.bound(feed)
        run_file()
        return Runner(kind, session.provider, run_file)
    if not isinstance(candidate, nn.Module):
        function = candidate
        return Runner("callable", "", lambda: inputs.call(function))
    kind = "compiled" if is_compiled(candidate) else "pytorch"
    if kind == "pytorch" and not isinstance(candidate, torch.jit.ScriptModule):
        candidate = working_copy(name, candidate, inputs)
    model = candidate
    stack.enter_context(kept_modes(model))
    model.eval()
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    moved = inputs.map(lambda tensor: tensor.to(device))

    def run() -> object:
        with torch.inference_mode():
            output = moved.call(model)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return output

    try:
        run()
    except (TorchTrimError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's forward, and the compiler, raise what they like
        if kind == "compiled":
            raise ModelError(f"torch.compile failed: {error}", path=name, hint="leave compile out") from error
        raise InputError(f"the model does not take these inputs: {error}", path=name, found=moved.describe()) from error
    return Runner(kind, str(device), run)


def compiled_copy(name: str, model: nn.Module, inputs: Inputs) -> nn.Module:
    """`torch.compile` of a model's copy.

    The code is made for the very size that is measured, and nothing is shared with other copies where PyTorch can keep
    them apart: it would turn to code for any size at the second one, and back to eager after eight of them.
    """
    apart = {"isolate_recompiles": True} if "isolate_recompiles" in signature(torch.compile).parameters else {}
    compiled: nn.Module = torch.compile(working_copy(name, model, inputs), dynamic=False, **apart)  # type: ignore[call-overload]
    return compiled


def working_copy(name: str, model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy that is called as often as it takes, without the user's own hooks unless the model needs them to run."""
    inner = unwrap(model)
    if is_meta(inner):
        raise ModelError(
            "the model has no weights to run with", path=name, found="the meta device", hint="load weights"
        )
    return structural_copy(inner, own_buffers=True, user_hooks=run_fake(inner, inputs).user_hooks)


def is_compiled(model: nn.Module) -> bool:
    """Whether a model is what `torch.compile` gives."""
    return type(model).__name__ == "OptimizedModule"
