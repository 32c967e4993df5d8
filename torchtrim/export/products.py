"""The matrix products of an ONNX file that have constant weights: what MatMul and Gemm have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from torchtrim.export.rewrite import FLOATS, Rewrite, attribute


@dataclass(frozen=True)
class Product:
    """`output = x @ weight + bias`, with constant weights.

    Attributes:
        x: The activation's name, `(..., K)`.
        weight: `(K, N)`, in the file's own precision, with a Gemm's `alpha` in it.
        weight_name: The name that the weights have in the file.
        scaled: Whether the file's weights were transposed for it, and what they were multiplied by.
        bias: The name of what is added; None where nothing is.
        output: The name of the result, `(..., N)`.
        dtype: The activation's type: float32 or float16.
    """

    x: str
    weight: NDArray[Any]
    weight_name: str
    scaled: tuple[bool, float]
    bias: str | None
    output: str
    dtype: int


def product_of(file: Rewrite, node: onnx.NodeProto) -> Product | None:
    """A node as a product with constant weights; None for any other node, as a MatMul of two activations is.

    A Gemm that transposes its activation is none of these, and neither is one whose weights are no matrix.
    """
    if node.domain not in ("", "ai.onnx") or node.op_type not in ("MatMul", "Gemm"):
        return None
    x, name = node.input[0], node.input[1]
    weight = file.constant(name)
    dtype = file.types.get(x, 0)
    if weight is None or weight.ndim != 2 or file.constant(x) is not None or dtype not in FLOATS:
        return None
    bias: str | None = None
    turned, alpha = False, 1.0
    if node.op_type == "Gemm":
        if attribute(node, "transA", 0):
            return None
        turned, alpha = bool(attribute(node, "transB", 0)), float(attribute(node, "alpha", 1.0))
        weight = ((weight.T if turned else weight) * alpha).astype(weight.dtype)
        bias = _bias(file, node, weight.dtype)
    return Product(x, np.ascontiguousarray(weight), name, (turned, alpha), bias, node.output[0], dtype)


def write_product(file: Rewrite, product: Product, weight: str) -> None:
    """Write a product as a MatMul, and an Add where it has a bias, with weights of another name."""
    if product.bias is None:
        file.put("MatMul", [product.x, weight], product.output)
        return
    total = file.add("MatMul", [product.x, weight], f"{product.output}_product")
    file.put("Add", [total, product.bias], product.output)


def _bias(file: Rewrite, node: onnx.NodeProto, dtype: np.dtype[Any]) -> str | None:
    if len(node.input) < 3 or not node.input[2]:
        return None
    name, beta = node.input[2], float(attribute(node, "beta", 1.0))
    if beta == 1.0:
        return str(name)
    constant = file.constant(name)
    if constant is not None:
        return file.store(f"{name}_scaled", (constant * beta).astype(dtype))
    return file.add("Mul", [name, file.store(f"{name}_beta", np.array(beta, dtype))], f"{name}_scaled")
