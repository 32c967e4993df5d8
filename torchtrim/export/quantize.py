"""Smaller weights in an ONNX file: int8 with dynamic activations, or float16."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import onnx

from torchtrim.errors import ExportError
from torchtrim.export.kernels import has_kernel
from torchtrim.export.quiet import quiet
from torchtrim.export.rewrite import sort_nodes
from torchtrim.export.saving import save_model
from torchtrim.export.weight_types import stacked_products

DYNAMIC_OPS = ("MatMul", "Gemm")
_QUANTIZABLE = ("MatMul", "Gemm", "Conv", "Attention", "EmbedLayerNormalization", "Gather", "LSTM")
_INTEGER_OPS = (
    "MatMulInteger",
    "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul",
    "ConvInteger",
    "DynamicQuantizeLSTM",
    "QAttention",
    "QEmbedLayerNormalization",
)


def quantize_dynamic(
    prepared: Path,
    destination: Path,
    *,
    nodes: Collection[str] | None = None,
    ops: Sequence[str] = DYNAMIC_OPS,
    per_channel: bool = True,
    reduce_range: bool = False,
    external_data: bool = False,
) -> int:
    """Write a copy of an ONNX file with int8 weights, whose activations are quantized to uint8 while it runs.

    Products of two activations, as in attention, stay in float; so do those with weights that are no matrix, where
    `per_channel` asks for what ONNX Runtime has no kernel for.

    Args:
        prepared: A float file that `prepare` wrote, or one in which other nodes are static int8 already.
        destination: Where the int8 file goes.
        nodes: Only the nodes of these names; None: all of `ops`.
        ops: The operators whose weights are quantized. Convolutions are slower in dynamic int8 than in float.
        per_channel: One scale for each output channel instead of one for each weight.
        reduce_range: Weights in 7 bits, for x86 processors without VNNI, whose 8-bit sums can overflow.
        external_data: Keep the weights beside the file (past 2 GB).

    Returns:
        How many nodes compute in int8 while it runs now.

    Raises:
        ExportError: An operator that has no dynamic int8 form, or a file that ONNX Runtime cannot quantize.
    """
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize_dynamic as ort_quantize_dynamic

    ops = checked_ops(ops)
    if nodes is not None and not nodes:  # to ONNX Runtime an empty list means every node
        raise ExportError("no nodes to quantize", path=prepared.name, expected="at least one")
    stacked = stacked_products(onnx.load(prepared, load_external_data=False).graph) if per_channel else []
    try:
        with quiet():
            ort_quantize_dynamic(
                prepared,
                destination,
                op_types_to_quantize=list(ops),
                # ONNX Runtime makes a MatMul and an Add of a Gemm before it looks at the names.
                nodes_to_quantize=None if nodes is None else sorted({*nodes, *(f"{name}_MatMul" for name in nodes)}),
                nodes_to_exclude=[node.name for node in stacked],
                per_channel=per_channel,
                reduce_range=reduce_range,
                weight_type=QuantType.QInt8,
                use_external_data_format=external_data,
                extra_options={"MatMulConstBOnly": True},
            )
    except Exception as error:  # its parts raise what they like, and share no base class
        raise ExportError(
            f"ONNX Runtime cannot quantize this model: {type(error).__name__}: {error}",
            path=prepared.name,
            hint="quantize=None, or fewer dynamic_ops",
        ) from error
    return count_quantized(destination)


def checked_ops(ops: str | Sequence[str]) -> tuple[str, ...]:
    """The operators to quantize, where all of them can be; one may be given by itself.

    Raises:
        ExportError: None, or one that has no dynamic int8 form.

    Example:
        >>> checked_ops("MatMul")
        ('MatMul',)
    """
    named = (ops,) if isinstance(ops, str) else tuple(ops)
    unknown = [op for op in named if op not in _QUANTIZABLE]
    if unknown or not named:
        raise ExportError(
            "operators that have no dynamic int8 form", found=unknown or "none", expected=", ".join(_QUANTIZABLE)
        )
    if "Gemm" in named and "MatMul" not in named:
        raise ExportError(
            "a Gemm is quantized as a MatMul and an Add", found=named, expected="MatMul too", hint='("MatMul", "Gemm")'
        )
    return named


def count_quantized(path: Path) -> int:
    """How many nodes of an ONNX file compute in int8."""
    nodes = onnx.load(path, load_external_data=False).graph.node
    return sum(node.op_type in _INTEGER_OPS for node in nodes)


def to_float16(
    source: Path, destination: Path, *, half_io: bool = False, external_data: bool = False, target: str = "cuda"
) -> None:
    """Write a copy of an ONNX file that computes in float16, as GPUs and OpenVINO can.

    Operators that the target runs in float32 only stay in float32.

    Args:
        source: The float file.
        destination: Where the float16 file goes.
        half_io: Take and give float16 too; inputs and outputs stay float32 otherwise.
        external_data: Keep the weights beside the file (past 2 GB).
        target: `cuda`, `tensorrt` or `openvino`. OpenVINO takes every operator in float16.

    Raises:
        ExportError: The file cannot be converted.
    """
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = onnx.load(source)
    opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    used = {node.op_type for node in model.graph.node}
    kept = [] if target == "openvino" else sorted(op for op in used if not has_kernel(target, op, opset))
    try:
        converted = convert_float_to_float16(
            model, keep_io_types=not half_io, op_block_list=kept, disable_shape_infer=external_data
        )
        ONNXModel(converted).topological_sort()  # its casts come last, which ONNX does not allow
    except Exception as error:  # as above
        raise ExportError(f"the file cannot be turned into float16: {error}", path=source.name) from error
    sort_nodes(converted.graph)  # the converter puts its casts at the end
    save_model(converted, destination, external_data=external_data)
