"""Where an export will run, what each place takes, and whether it is here."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

from onnx import TensorProto, helper

from torchtrim.bench.openvino_session import OPENVINO
from torchtrim.errors import ExportError, MissingDependency, nearest

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Target:
    """A place an exported file can run.

    Attributes:
        name: `cpu`, `openvino`, `cuda` or `tensorrt`.
        provider: ONNX Runtime's name for it; `OpenVINO` where OpenVINO itself runs the file.
        schemes: The values of `quantize` it takes; the first is what `quantize=None` means.
        install: What to install to run a file there.
    """

    name: str
    provider: str
    schemes: tuple[str, ...]
    install: str


TARGETS = {
    target.name: target
    for target in (
        Target("cpu", CPU, ("float32", "dynamic", "static", "weight_only", "mixed", "auto"), "pip install onnxruntime"),
        Target("openvino", OPENVINO, ("float32", "static", "weight_only", "fp16", "auto"), "pip install openvino"),
        Target(
            "cuda",
            "CUDAExecutionProvider",
            ("fp16", "bf16", "float32", "dynamic", "static", "weight_only", "auto"),
            "pip install onnxruntime-gpu, beside an NVIDIA driver, CUDA and cuDNN",
        ),
        Target(
            "tensorrt",
            "TensorrtExecutionProvider",
            ("fp16", "bf16", "float32", "static", "weight_only", "auto"),
            "pip install onnxruntime-gpu tensorrt, beside an NVIDIA driver and CUDA",
        ),
    )
}

# The schemes that exist somewhere, and why not here.
_WHY_NOT = {
    (
        "cpu",
        "fp16",
    ): "ONNX Runtime's CPU provider has few float16 kernels and casts around all other nodes",
    ("cpu", "bf16"): "ONNX Runtime's CPU provider does not compute in bfloat16",
    ("openvino", "dynamic"): "OpenVINO has no integer kernel for MatMulInteger and computes it in float",
    ("openvino", "bf16"): "in OpenVINO bfloat16 is a setting of the run, not of the file",
    ("openvino", "mixed"): "mixed chooses between the int8 kernels of ONNX Runtime's CPU provider",
    ("cuda", "mixed"): "mixed chooses between the int8 kernels of ONNX Runtime's CPU provider",
    ("tensorrt", "dynamic"): "TensorRT's parser knows neither DynamicQuantizeLinear nor MatMulInteger",
    ("tensorrt", "mixed"): "mixed chooses between the int8 kernels of ONNX Runtime's CPU provider",
}


def resolve(target: str, quantize: str | None) -> tuple[Target, str]:
    """The target of that name, and the scheme the weights are written in.

    Raises:
        ExportError: An unknown target, or a scheme that does not run there; it says why not.

    Example:
        >>> resolve("cpu", "dynamic")[1], resolve("cuda", None)[1]
        ('dynamic', 'fp16')
        >>> resolve("tensorrt", "dynamic")
        Traceback (most recent call last):
        torchtrim.errors.ExportError: TensorRT's parser knows neither DynamicQuantizeLinear nor ...
    """
    place = _named(target)
    scheme = place.schemes[0] if quantize is None else quantize
    if isinstance(scheme, str) and scheme in place.schemes:
        return place, scheme
    expected = ", ".join(["None", *map(repr, place.schemes)])
    reason = _WHY_NOT.get((target, scheme)) if isinstance(scheme, str) else None
    if reason is not None:
        others = [name for name, other in TARGETS.items() if scheme in other.schemes]
        raise ExportError(
            reason,
            found=f"target={target!r}, quantize={scheme!r}",
            expected=expected,
            hint="quantize=None, or target=" + " or ".join(map(repr, others)),
        )
    raise ExportError(
        f"an unknown quantization for the target {target!r}",
        found=quantize,
        expected=expected,
        hint=nearest(str(quantize), place.schemes),
    )


def installed(target: str) -> bool:
    """Whether files for a target can be run here: its runtime is installed, and finds the device it needs.

    Raises:
        ExportError: An unknown target.

    Example:
        >>> installed("cpu")
        True
    """
    place = _named(target)
    if place.provider == OPENVINO:
        return find_spec("openvino") is not None
    return _provider_runs(place.provider)


def require(target: str) -> None:
    """Refuse where files for a target cannot be run here.

    Raises:
        ExportError: An unknown target.
        MissingDependency: Its runtime is not installed, or does not find the device.
    """
    place = _named(target)
    if not installed(target):
        raise MissingDependency(
            f"the target {target!r} cannot be run here",
            found=f"no {place.provider}",
            hint=f"{place.install}; or run the same file on the CPU provider, for its numbers only",
        )


def run_on(target: str) -> tuple[str, str | None]:
    """The provider to run a target's files on here, and where that is another than the target's, a note that says so.

    Raises:
        ExportError: An unknown target.

    Example:
        >>> run_on("cpu")
        ('CPUExecutionProvider', None)
    """
    place = _named(target)
    if installed(target):
        return place.provider, None
    told = f"checked on {CPU}, since {place.provider} is not here: the numbers are those of the file, its speed is not"
    return CPU, told


def _named(target: str) -> Target:
    if not isinstance(target, str) or target not in TARGETS:
        raise ExportError(
            "an unknown target", found=target, expected=" or ".join(TARGETS), hint=nearest(str(target), TARGETS)
        )
    return TARGETS[target]


@cache
def _provider_runs(provider: str) -> bool:
    """Whether a provider really opens a file. A package that has it may lack the device, the driver or a library."""
    if find_spec("onnxruntime") is None:
        return False
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    if provider not in onnxruntime.get_available_providers():
        return False
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "probe", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=[provider], enable_fallback=0
        )
    except (RuntimeError, ValueError, state.Fail, state.EPFail, state.RuntimeException, state.NotImplemented):
        return False  # no device, no driver, or a library that is missing or too old
    return provider in session.get_providers()
