"""Dynamic int8 for an NVIDIA GPU, from operators that ONNX Runtime's CUDA provider has kernels for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from torchtrim.export.kernels import refuse_unsupported
from torchtrim.export.products import Product, product_of
from torchtrim.export.quantize import to_float16
from torchtrim.export.rewrite import FLOATS, Rewrite

_WIDTH = 4  # cuBLAS has int8 kernels for the tensor cores where both widths are multiples of this
_LEVELS = 127.0
# The least scale: one of zeros is not divided by zero. For float16 it is a step that its smallest numbers still have.
_LEAST = {onnx.TensorProto.FLOAT: 1e-30, onnx.TensorProto.FLOAT16: 2.0**-20}


def quantize_for_cuda(
    source: Path, destination: Path, *, per_channel: bool = True, half: bool = True, external_data: bool = False
) -> int:
    """Write a copy of an ONNX file whose matrix products compute in int8 on a GPU, quantized as the file runs.

    The CUDA provider has no DynamicQuantizeLinear. So each product with constant weights becomes: the largest absolute
    value of the activation over 127 as its scale, QuantizeLinear with that scale, MatMulInteger of int8 by int8, and
    the sum in int32 times both scales, plus the bias. An activation that several products read is quantized once.
    Everything else, convolutions too, is float16. Products of two activations, as in attention, stay as they are;
    so do those whose widths are no multiple of 4, for which cuBLAS has no int8 kernel on the tensor cores.

    Args:
        source: The float file.
        destination: Where the int8 file goes.
        per_channel: One weight scale for each output channel; one for each weight otherwise.
        half: Compute the rest in float16; in float32 otherwise.
        external_data: Keep the weights beside the file (past 2 GB).

    Returns:
        How many products compute in int8.

    Raises:
        ExportError: The file cannot be turned into float16, or has nodes that the CUDA provider has no kernel for.

    Source: symmetric quantization by the largest absolute value, per tensor and run for activations, per output channel
        for weights: Jacob et al., "Quantization and training of neural networks for efficient integer-arithmetic-only
        inference", 2018.
    """
    with TemporaryDirectory(prefix=".torchtrim.", dir=destination.parent) as folder:
        plain = source
        if half:
            plain = Path(folder) / "half.onnx"
            to_float16(source, plain, external_data=external_data)
        file = Rewrite(plain)
        quantizer = _Quantizer(file, per_channel)
        for node in file.nodes:
            product = product_of(file, node)
            if product is None or any(width % _WIDTH for width in product.weight.shape):
                file.keep(node)
            else:
                quantizer.write(product)
        refuse_unsupported(file.save(destination, external_data=external_data), "cuda", path=source.name)
    return quantizer.written


@dataclass(frozen=True)
class _Activation:
    """A quantized activation: the names of its int8 values, and of its scale in float32."""

    values: str
    scale: str


class _Quantizer:
    """Writes products into a file, and remembers which activations are quantized already."""

    def __init__(self, file: Rewrite, per_channel: bool) -> None:
        self.file = file
        self.per_channel = per_channel
        self.written = 0
        self._activations: dict[str, _Activation] = {}
        self._weights: dict[tuple[str, tuple[bool, float]], tuple[str, str]] = {}
        self._constants: dict[tuple[str, int], str] = {}

    def write(self, product: Product) -> None:
        """Write one product in int8."""
        file, name = self.file, product.output
        x = self._activations.get(product.x) or self._quantize(product.x, product.dtype)
        weight, weight_scale = self._weight(product)
        total = file.add("MatMulInteger", [x.values, weight], f"{name}_int32")
        scale = file.add("Mul", [x.scale, weight_scale], f"{name}_scale")
        wide = file.add("Cast", [total], f"{name}_sum", to=onnx.TensorProto.FLOAT)
        # The sums are past float16's range before they are scaled.
        steps: list[tuple[str, list[str], dict[str, Any]]] = [("Mul", [wide, scale], {})]
        if product.dtype != onnx.TensorProto.FLOAT:
            steps.append(("Cast", [], {"to": product.dtype}))
        if product.bias is not None:
            steps.append(("Add", [product.bias], {}))
        value = ""
        for number, (op, inputs, attributes) in enumerate(steps):
            given = [value, *inputs] if value else inputs
            if number == len(steps) - 1:
                file.put(op, given, name, **attributes)
            else:
                value = file.add(op, given, f"{name}_{op.lower()}", **attributes)
        self.written += 1

    def _quantize(self, x: str, dtype: int) -> _Activation:
        file, source = self.file, x
        if dtype == onnx.TensorProto.FLOAT16 and file.opset < 19:  # QuantizeLinear takes float16 from version 19 on
            source = file.add("Cast", [x], f"{x}_float", to=onnx.TensorProto.FLOAT)
            dtype = onnx.TensorProto.FLOAT
        size = file.add("Abs", [source], f"{x}_abs")
        top = file.add("ReduceMax", [size], f"{x}_top", keepdims=0)
        step = file.add("Mul", [top, self._constant("step", 1 / _LEVELS, dtype)], f"{x}_step")
        scale = file.add("Max", [step, self._constant("least_step", _LEAST[dtype], dtype)], f"{x}_scale")
        values = file.add("QuantizeLinear", [source, scale, self._zero()], f"{x}_int8")
        if dtype != onnx.TensorProto.FLOAT:
            scale = file.add("Cast", [scale], f"{x}_scale_float", to=onnx.TensorProto.FLOAT)
        self._activations[x] = _Activation(values, scale)
        return self._activations[x]

    def _weight(self, product: Product) -> tuple[str, str]:
        key = (product.weight_name, product.scaled)
        if key not in self._weights:
            values, scale = quantize_weight(product.weight, axis=0 if self.per_channel else None)
            stored = self.file.store(f"{product.weight_name}_int8", values)
            self._weights[key] = stored, self.file.store(f"{product.weight_name}_scale", scale.reshape(-1))
        return self._weights[key]

    def _constant(self, name: str, value: float, dtype: int) -> str:
        if (name, dtype) not in self._constants:
            self._constants[name, dtype] = self.file.store(f"int8_{name}", np.array(value, FLOATS[dtype]))
        return self._constants[name, dtype]

    def _zero(self) -> str:
        key = ("zero", int(onnx.TensorProto.INT8))
        if key not in self._constants:
            self._constants[key] = self.file.store("int8_zero", np.array(0, np.int8))
        return self._constants[key]


def quantize_weight(
    weight: NDArray[Any], axis: int | tuple[int, ...] | None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Symmetric int8 weights and their scales.

    Args:
        weight: The float weights.
        axis: The dimension, or dimensions, along which weights share a scale; None for all.

    Returns:
        The int8 weights, and the scales with the reduced dimensions of size 1. Zeros have a scale of 1.

    Example:
        >>> values, scale = quantize_weight(np.array([[0.0, 2.54], [0.0, -1.27]]), axis=0)
        >>> values.tolist(), scale.tolist() == [[1.0, np.float32(0.02)]]
        ([[0, 127], [0, -64]], True)
    """
    wide = weight.astype(np.float32)
    scale = np.abs(wide).max(axis=axis, keepdims=True) / np.float32(_LEVELS)
    scale = np.where(scale > 0, scale, 1).astype(np.float32)
    return np.rint(wide / scale).clip(-_LEVELS, _LEVELS).astype(np.int8), scale
