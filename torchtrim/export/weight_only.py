"""Smaller weights only: int8 or int4 in the file, computed with in the activations' own precision."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper

from torchtrim.errors import ExportError, InputError
from torchtrim.export.cuda_int8 import quantize_weight
from torchtrim.export.products import product_of, write_product
from torchtrim.export.quiet import quiet
from torchtrim.export.rewrite import FLOATS, Rewrite, attribute
from torchtrim.export.saving import save_model

FORMS = ("nbits", "qdq")
_OPS = {"nbits": ("MatMul", "Gemm"), "qdq": ("MatMul", "Gemm", "Conv", "Gather")}
_SMALL = 4096  # bytes; below it a weight is not worth a node of its own
_INT4 = 7.0
_LEAST_BLOCK = 16
MOST_BLOCK = 256  # of MatMulNBits


def quantize_weights(
    source: Path,
    destination: Path,
    *,
    bits: int = 8,
    block: int = 128,
    symmetric: bool = True,
    ops: str | Sequence[str] = ("MatMul", "Gemm"),
    form: str = "nbits",
    accuracy_level: int = 0,
    external_data: bool = False,
) -> int:
    """Write a copy of an ONNX file with int8 or int4 weights, and everything else as it was.

    `nbits` is ONNX Runtime's own operator MatMulNBits, which its CPU and CUDA providers have: matrix products only, a
    scale for each block of a column. `qdq` is standard ONNX: DequantizeLinear of the weights, for TensorRT, OpenVINO
    and others. There, 8 bits have one scale for each output channel (each row of an embedding), also in convolutions
    and embeddings; 4 bits have a scale for each block in matrix products, need opset 21, and leave the rest at 8 bits.
    A block that does not divide a column is halved until it does; TensorRT wants 64 or 128.

    Args:
        source: The file; its weights are float32 or float16.
        destination: Where the copy goes.
        bits: 8 or 4.
        block: Weights that share a scale, along a column: a power of two from 16 on, up to 256 for `nbits`. Not used by
            `qdq` in 8 bits.
        symmetric: No zero points. `qdq` has none in any case, as TensorRT wants it.
        ops: The operators whose weights are quantized: MatMul, Gemm, and for `qdq` Conv and Gather.
        form: `nbits` or `qdq`.
        accuracy_level: For `nbits`, what ONNX Runtime may compute in: 0 its own choice, 1 float32, 4 int8 (the CPU
            provider quantizes the activations block by block then, which is faster).
        external_data: Keep the weights beside the file (past 2 GB).

    Returns:
        How many weights are smaller now. Those below 4 KB stay, and those that whole blocks would make larger.

    Raises:
        ExportError: An operator that has no such form, an opset that is too low, or weights that cannot be quantized.
        InputError: Another number of bits, a block that is no power of two, an unknown form.

    Source: rounding with a scale per block: Dettmers and Zettlemoyer, "The case for 4-bit precision", 2023.
    """
    named = _checked(bits, block, symmetric, ops, form)
    file = Rewrite(source)
    if form == "nbits":
        kept = _plain_products(file, named, bits, block)
        model = file.finish()
        count = _to_nbits(model, kept, bits, block, symmetric, accuracy_level, source.name)
        save_model(model, destination, external_data=external_data)
        return count
    if bits == 4 and file.opset < 21:
        raise ExportError(
            "int4 weights in standard ONNX need a later opset",
            path=source.name,
            found=file.opset,
            expected="21 or more",
            hint="opset=21, or 8 bits",
        )
    count = _to_qdq(file, named, bits, block)
    file.save(destination, external_data=external_data)
    return count


def _checked(bits: int, block: int, symmetric: bool, ops: str | Sequence[str], form: str) -> tuple[str, ...]:
    if form not in FORMS:
        raise InputError("an unknown form of weights", path="form", found=form, expected=" or ".join(FORMS))
    if isinstance(bits, bool) or bits not in (4, 8):
        raise InputError("weights have 8 bits or 4", path="bits", found=bits)
    if isinstance(block, bool) or not isinstance(block, int) or block < _LEAST_BLOCK or block & (block - 1):
        raise InputError("a block is a power of two, 16 or more", path="block", found=block)
    if form == "nbits" and block > MOST_BLOCK:
        raise InputError(f"MatMulNBits takes blocks of at most {MOST_BLOCK}", path="block", found=block)
    if form == "qdq" and not symmetric:
        raise InputError("weights in standard ONNX have no zero points here", path="symmetric", found=symmetric)
    named = (ops,) if isinstance(ops, str) else tuple(ops)
    unknown = [op for op in named if op not in _OPS[form]]
    if unknown or not named:
        raise ExportError(
            f"operators whose weights have no form {form!r}", found=unknown or "none", expected=", ".join(_OPS[form])
        )
    return named


def _plain_products(file: Rewrite, ops: tuple[str, ...], bits: int, block: int) -> list[str]:
    """Write every Gemm with constant weights as a MatMul and an Add, and list the MatMuls to be left as they are."""
    kept: list[str] = []
    for number, node in enumerate(file.nodes):
        product = product_of(file, node)
        wanted = product is not None and node.op_type in ops and _shrinks(product.weight, bits, block)
        if product is None or not wanted:
            if node.op_type == "MatMul":
                node.name = node.name or file.fresh(f"MatMul_{number}")
                kept.append(node.name)
            file.keep(node)
            continue
        weight = product.weight_name
        if node.op_type == "Gemm" or file.is_computed(weight):
            weight = file.store(f"{weight}_matrix", product.weight)
        write_product(file, product, weight)
    return kept


def _shrinks(weight: NDArray[Any], bits: int, block: int) -> bool:
    """Whether MatMulNBits is the smaller: it fills up every column to whole blocks."""
    length, width = weight.shape
    return weight.nbytes >= _SMALL and -(-length // block) * block * width * bits // 8 < weight.nbytes


def _to_nbits(
    model: onnx.ModelProto, kept: list[str], bits: int, block: int, symmetric: bool, level: int, name: str
) -> int:
    with quiet(), _root_logger_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            MatMulNBitsQuantizer,
            QuantFormat,
        )

        config = DefaultWeightOnlyQuantConfig(
            block_size=block,
            is_symmetric=symmetric,
            accuracy_level=level,
            quant_format=QuantFormat.QOperator,
            op_types_to_quantize=("MatMul",),
            bits=bits,
        )
        quantizer = MatMulNBitsQuantizer(model, nodes_to_exclude=kept, algo_config=config)
        try:
            quantizer.process()
        except Exception as error:  # its parts raise what they like, and share no base class
            raise ExportError(
                f"ONNX Runtime cannot quantize these weights: {type(error).__name__}: {error}", path=name
            ) from error
    written = quantizer.model.model
    if written is not model:
        model.CopyFrom(written)
    return sum(node.op_type == "MatMulNBits" for node in model.graph.node)


def _to_qdq(file: Rewrite, ops: tuple[str, ...], bits: int, block: int) -> int:
    done: dict[tuple[str, object], str] = {}
    for node in file.nodes:
        product = product_of(file, node) if bits == 4 and node.op_type in ops else None
        size = _dividing(block, product.weight.shape[0]) if product is not None else 0
        if product is not None and size and product.weight.nbytes >= _SMALL:
            key: tuple[str, object] = (product.weight_name, product.scaled)
            if key not in done:
                done[key] = _int4(file, product.weight_name, product.weight, size)
            write_product(file, product, done[key])
            continue
        place = 0 if node.op_type == "Gather" else 1
        channel = _channel(file, node, ops)
        weight = None if channel is None else file.constant(node.input[place])
        if channel is None or weight is None or weight.dtype not in _FLOAT_TYPES or weight.nbytes < _SMALL:
            file.keep(node)
            continue
        key = (node.input[place], channel)
        if key not in done:
            done[key] = _int8(file, node.input[place], weight, channel)
        changed = onnx.NodeProto()
        changed.CopyFrom(node)
        changed.input[place] = done[key]
        file.keep(changed)
    return len(done)


def _dividing(block: int, length: int) -> int:
    """The largest block, of this size or halved until it fits, of which a column holds a whole number; 0 if none."""
    while block >= _LEAST_BLOCK and length % block:
        block //= 2
    return block if block >= _LEAST_BLOCK else 0


_FLOAT_TYPES = tuple(np.dtype(dtype) for dtype in FLOATS.values())


def _channel(file: Rewrite, node: onnx.NodeProto, ops: tuple[str, ...]) -> int | None:
    """The dimension of a node's weights that has a scale for each of its entries; None where they are not quantized."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in ops:
        return None
    if node.op_type in ("MatMul", "Gemm"):
        weight = file.constant(node.input[1])
        if weight is None or weight.ndim != 2:
            return None
        return 0 if node.op_type == "Gemm" and attribute(node, "transB", 0) else 1
    if node.op_type == "Gather":
        table = file.constant(node.input[0])
        return 0 if table is not None and table.ndim == 2 and attribute(node, "axis", 0) in (0, -2) else None
    return 0


def _int8(file: Rewrite, name: str, weight: NDArray[Any], channel: int) -> str:
    others = tuple(place for place in range(weight.ndim) if place != channel)
    values, scale = quantize_weight(weight, others)
    inputs = [file.store(f"{name}_int8", values), file.store(f"{name}_scale", scale.reshape(-1).astype(weight.dtype))]
    return file.add("DequantizeLinear", inputs, f"{name}_float", axis=channel)


def _int4(file: Rewrite, name: str, weight: NDArray[Any], block: int) -> str:
    """Int4 weights `(K, N)` with a scale for each block of a column."""
    blocks = weight.astype(np.float32).reshape(-1, block, weight.shape[1])
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(_INT4)
    scale = np.where(scale > 0, scale, 1).astype(weight.dtype)
    values = np.rint(blocks / scale.astype(np.float32)).clip(-_INT4 - 1, _INT4).astype(np.int8)
    stored = file.store_proto(int4_tensor(file.fresh(f"{name}_int4"), values.reshape(weight.shape)))
    scales = file.store(f"{name}_scale", scale[:, 0])
    return file.add("DequantizeLinear", [stored, scales], f"{name}_float", axis=0, block_size=block)


def int4_tensor(name: str, values: NDArray[np.int8]) -> onnx.TensorProto:
    """A constant in int4: two values in each byte, the first in its lower half.

    Example:
        >>> int4_tensor("w", np.array([1, -1, 2], np.int8)).raw_data.hex()
        'f102'
    """
    flat = values.reshape(-1).astype(np.uint8) & 0xF
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    packed = (flat[0::2] | (flat[1::2] << 4)).astype(np.uint8)
    return helper.make_tensor(name, onnx.TensorProto.INT4, list(values.shape), packed.tobytes(), raw=True)


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """Undo what importing the quantizer does: it sets up logging for the whole program."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
