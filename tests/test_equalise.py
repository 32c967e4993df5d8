"""Equalised ranges: the same function, other scales, and less error in int8."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from torchtrim.errors import InputError
from torchtrim.export.bias_correction import output_errors
from torchtrim.export.calibration import calibrate
from torchtrim.export.equalise import equalise_layers, smooth, smoothing_tensors
from torchtrim.export.static import calibration_tensors, quantize_static

FLOAT = onnx.TensorProto.FLOAT
RNG = np.random.default_rng(0)


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, inputs, [output], name=f"node_{output}", **attributes)


def write(
    path: Path,
    nodes: list[onnx.NodeProto],
    constants: dict[str, NDArray[Any]],
    shape: list[int],
    outputs: tuple[str, ...] = ("y",),
) -> Path:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, ["n", *shape])],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in outputs],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)
    return path


def run(path: Path, x: NDArray[Any]) -> NDArray[Any]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def same(one: Path, other: Path, x: NDArray[Any]) -> None:
    expected = run(one, x)
    assert np.abs(run(other, x) - expected).max() <= 1e-5 * np.abs(expected).max()


def constants_of(path: Path) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


# Norms and products.


def normed(path: Path, *, tap: bool = False, shared: bool = False) -> Path:
    """A norm with outlier channels, read by a MatMul and a Gemm with transposed weights."""
    scale = np.ones(16)
    scale[[2, 9]] = 40.0
    constants = {
        "scale": scale,
        "bias": RNG.normal(size=16),
        "w1": RNG.normal(size=(16, 8)),
        "w2": RNG.normal(size=(8, 16)),
    }
    constants["w1"][[2, 9]] /= 40  # as trained models do: the product does not blow up
    constants["w2"][:, [2, 9]] /= 40
    nodes = [
        node("LayerNormalization", ["x", "scale", "bias"], "n", axis=-1),
        node("MatMul", ["n", "w1"], "a"),
        node("Gemm", ["n", "w2"], "b", transB=1),
        node("Add", ["a", "b"], "y"),
    ]
    if shared:
        nodes.insert(1, node("MatMul", ["x", "w1"], "c"))
        nodes[-1] = node("Sum", ["a", "b", "c"], "y")
    return write(path, nodes, constants, [16], ("y", "n") if tap else ("y",))


def smoothed(source: Path, path: Path, x: NDArray[Any], alpha: float = 0.5) -> int:
    statistics = calibrate(source, [{"x": x}], [], channels=smoothing_tensors(source))
    return smooth(source, path, statistics, alpha=alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8, 1.0])
def test_smoothing_computes_the_same(tmp_path: Path, alpha: float) -> None:
    source, changed = normed(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    x = RNG.normal(size=(64, 16)).astype(np.float32)
    assert smoothed(source, changed, x, alpha) == 1
    same(source, changed, x)
    scales = constants_of(changed)["scale"]
    assert scales.max() / scales.min() < (40 if alpha else 1e9)


def test_smoothing_lowers_the_error_of_int8(tmp_path: Path) -> None:
    source, changed = normed(tmp_path / "a.onnx"), tmp_path / "b.onnx"
    x = RNG.normal(size=(64, 16)).astype(np.float32)
    smoothed(source, changed, x)
    errors = []
    for path in (source, changed):
        statistics = calibrate(path, [{"x": x}], calibration_tensors(path))
        quantize_static(path, tmp_path / "q.onnx", statistics, reduce_range=True)
        errors += output_errors(source, [tmp_path / "q.onnx"], [{"x": x}])
    assert errors[1] < 0.6 * errors[0]


def test_shared_weights_are_copied(tmp_path: Path) -> None:
    source, changed = normed(tmp_path / "a.onnx", shared=True), tmp_path / "b.onnx"
    x = RNG.normal(size=(8, 16)).astype(np.float32)
    assert smoothed(source, changed, x) == 1
    same(source, changed, x)
    assert "w1" in constants_of(changed)


def test_a_norm_that_others_read_is_left_alone(tmp_path: Path) -> None:
    source = normed(tmp_path / "a.onnx", tap=True)
    assert smoothing_tensors(source) == {}
    assert smoothed(source, tmp_path / "b.onnx", np.zeros((1, 16), np.float32)) == 0


@pytest.mark.parametrize("alpha", [-0.1, 1.5, True, "0.5"])
def test_bad_alpha(tmp_path: Path, alpha: Any) -> None:
    with pytest.raises(InputError, match="alpha"):
        smoothed(normed(tmp_path / "a.onnx"), tmp_path / "b.onnx", np.ones((1, 16), np.float32), alpha)


def test_smoothing_needs_channels(tmp_path: Path) -> None:
    source = normed(tmp_path / "a.onnx")
    statistics = calibrate(source, [{"x": np.ones((1, 16), np.float32)}], ["n"])
    with pytest.raises(InputError, match="channels="):
        smooth(source, tmp_path / "b.onnx", statistics)


# Convolutions.


def convolutions(path: Path, activation: str | None, *, tap: bool = False, groups: int = 2) -> Path:
    """1x1, depthwise, grouped; the channels of the first two have very different ranges."""
    spread = np.geomspace(0.01, 10, 8)
    constants = {
        "w1": RNG.normal(size=(8, 3, 1, 1)) * spread[:, None, None, None],
        "b1": RNG.normal(size=8) * spread,
        "w2": RNG.normal(size=(8, 1, 3, 3)) * spread[::-1, None, None, None],
        "b2": RNG.normal(size=8) * spread[::-1],
        "w3": RNG.normal(size=(6, 8 // groups, 1, 1)),
    }
    nodes = [node("Conv", ["x", "w1", "b1"], "a")]
    last = "a"
    if activation:
        nodes.append(node(activation, ["a"], "r"))
        last = "r"
    nodes.append(node("Conv", [last, "w2", "b2"], "c", group=8, pads=[1, 1, 1, 1]))
    nodes.append(node("Conv", ["c", "w3"], "y", group=groups))
    return write(path, nodes, constants, [3, 6, 6], ("y", "a") if tap else ("y",))


@pytest.mark.parametrize("activation", [None, "Relu"])
@pytest.mark.parametrize("groups", [1, 2])
def test_equalised_layers_compute_the_same(tmp_path: Path, activation: str | None, groups: int) -> None:
    source, changed = convolutions(tmp_path / "a.onnx", activation, groups=groups), tmp_path / "b.onnx"
    assert equalise_layers(source, changed) == 2
    same(source, changed, RNG.normal(size=(4, 3, 6, 6)).astype(np.float32))
    before, after = constants_of(source), constants_of(changed)

    def uneven(weights: NDArray[Any]) -> float:
        largest = np.abs(weights).reshape(8, -1).max(1)
        return float(largest.max() / largest.min())

    assert uneven(after["w1"]) < 0.2 * uneven(before["w1"])


def test_equalising_lowers_the_error_of_int8_with_one_scale(tmp_path: Path) -> None:
    source, changed = convolutions(tmp_path / "a.onnx", "Relu"), tmp_path / "b.onnx"
    equalise_layers(source, changed)
    x = RNG.normal(size=(16, 3, 6, 6)).astype(np.float32)
    errors = []
    for path in (source, changed):
        statistics = calibrate(path, [{"x": x}], calibration_tensors(path))
        quantize_static(path, tmp_path / "q.onnx", statistics, per_channel=False, reduce_range=True)
        errors += output_errors(source, [tmp_path / "q.onnx"], [{"x": x}])
    assert errors[1] < 0.7 * errors[0]


@pytest.mark.parametrize(("activation", "tap"), [("Sigmoid", False), ("HardSwish", False), ("Relu", True)])
def test_pairs_that_would_compute_something_else_are_left_alone(tmp_path: Path, activation: str, tap: bool) -> None:
    source, changed = convolutions(tmp_path / "a.onnx", activation, tap=tap), tmp_path / "b.onnx"
    assert equalise_layers(source, changed) == 1  # of the second and the third only
    same(source, changed, RNG.normal(size=(4, 3, 6, 6)).astype(np.float32))


def test_dead_channels_stay_as_they_are(tmp_path: Path) -> None:
    source, changed = convolutions(tmp_path / "a.onnx", "Relu"), tmp_path / "b.onnx"
    model = onnx.load(source)
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            weights = numpy_helper.to_array(tensor).copy()
            weights[3] = 0
            tensor.CopyFrom(numpy_helper.from_array(weights, "w1"))
    onnx.save(model, source)
    equalise_layers(source, changed)
    assert all(np.isfinite(array).all() for array in constants_of(changed).values())
    same(source, changed, RNG.normal(size=(4, 3, 6, 6)).astype(np.float32))
