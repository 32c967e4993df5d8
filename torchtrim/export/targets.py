"""Where an export will run, and what each place can run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import onnx
from onnx import defs, helper

from torchtrim.errors import ExportError, nearest


@dataclass(frozen=True)
class Target:
    """A place an exported file can run.

    Attributes:
        name: `cpu` or `cuda`.
        provider: ONNX Runtime's name for it.
        schemes: The values of `quantize` it takes; the first is what `quantize=None` means.
    """

    name: str
    provider: str
    schemes: tuple[str, ...]


TARGETS = {
    "cpu": Target("cpu", "CPUExecutionProvider", ("float32", "dynamic")),
    "cuda": Target("cuda", "CUDAExecutionProvider", ("fp16",)),
}


def resolve(target: str, quantize: str | None) -> tuple[Target, str]:
    """The target of that name, and the scheme the weights are written in.

    Raises:
        ExportError: An unknown target, or a scheme that does not run there.

    Example:
        >>> resolve("cpu", "dynamic")[1]
        'dynamic'
        >>> resolve("cuda", None)[1]
        'fp16'
    """
    if not isinstance(target, str) or target not in TARGETS:
        raise ExportError(
            "an unknown target", found=target, expected=" or ".join(TARGETS), hint=nearest(str(target), TARGETS)
        )
    place = TARGETS[target]
    scheme = place.schemes[0] if quantize is None else quantize
    if scheme in place.schemes:
        return place, scheme
    if scheme == "dynamic":
        raise ExportError(
            "dynamic int8 does not run on a GPU: DynamicQuantizeLinear has no CUDA kernel and falls back to the CPU",
            found='quantize="dynamic"',
            expected=f"quantize=None, which is {place.schemes[0]} there",
            hint='quantize=None, or target="cpu"',
        )
    raise ExportError(
        f"an unknown quantization for the target {target!r}",
        found=quantize,
        expected=", ".join(["None", *map(repr, place.schemes)]),
    )


@dataclass(frozen=True)
class Unsupported:
    """A node that a provider has no kernel for.

    Attributes:
        node: The node's name in the file.
        op: Its operator.
        reason: What is missing.
    """

    node: str
    op: str
    reason: str

    def __str__(self) -> str:
        return f"{self.op} ({self.node}): {self.reason}"


def cuda_unsupported(model: onnx.ModelProto) -> list[Unsupported]:
    """The nodes that ONNX Runtime's CUDA provider has no kernel for, and so would hand back to the CPU.

    Compared are the operator, the version of it that the file's opset means, and the types of its inputs.
    Integer shape arithmetic may still be placed on the CPU by ONNX Runtime's own choice; that costs nothing.

    Source: the kernels registered in `onnxruntime-gpu` 1.31.1, as `get_all_opkernel_def()` lists them.
    """
    opset = next((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), 0)
    types = _value_types(model)
    return list(_check(model.graph, opset, types))


def has_cuda_kernel(op: str, opset: int, letter: str = "h") -> bool:
    """Whether the CUDA provider runs `op` on data of a type: `h` float16, `f` float32, `d` float64, `l` int64, ...

    Example:
        >>> has_cuda_kernel("MaxPool", 18), has_cuda_kernel("MaxPool", 22), has_cuda_kernel("Acos", 18)
        (True, False, False)
    """
    kernels = _kernels().get(op, {}).get(_since(op, opset))
    if kernels is None:
        return False
    first = next((kernels.get(formal.type_str) for formal in defs.get_schema(op, opset, "").inputs), None)
    return first is None or letter in first


def _check(graph: onnx.GraphProto, opset: int, types: dict[str, int]) -> Iterator[Unsupported]:
    for node in graph.node:
        if node.op_type != "Constant":
            reason = _missing(node, opset, types)
            if reason:
                yield Unsupported(node.name, node.op_type, reason)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _check(attribute.g, opset, types)


def _missing(node: onnx.NodeProto, opset: int, types: dict[str, int]) -> str | None:
    if node.domain not in ("", "ai.onnx"):
        return f"an operator of the domain {node.domain!r}"
    versions = _kernels().get(node.op_type)
    if versions is None:
        return "the CUDA provider has no kernel for it"
    since = _since(node.op_type, opset)
    if since not in versions:
        return f"no kernel for version {since} (it has {', '.join(map(str, sorted(versions)))})"
    formals = list(defs.get_schema(node.op_type, opset, "").inputs)
    for position, name in enumerate(node.input):
        formal = formals[min(position, len(formals) - 1)]
        accepted = versions[since].get(formal.type_str)
        if name in types and accepted is not None and _letter(types[name]) not in accepted:
            return f"no kernel for {_dtype_name(types[name])} as its input {formal.name!r}"
    if node.op_type in ("ArgMax", "ArgMin") and _attribute(node, "select_last_index"):
        return "no kernel for select_last_index"
    if node.op_type == "ConvTranspose":
        pads = _attribute(node, "pads") or []
        if list(pads[: len(pads) // 2]) != list(pads[len(pads) // 2 :]):
            return "no kernel for uneven padding"
    return None


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def _value_types(model: onnx.ModelProto) -> dict[str, int]:
    """The element type of every tensor that is known, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    types = {tensor.name: int(tensor.data_type) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.HasField("tensor_type"):
            types[value.name] = int(value.type.tensor_type.elem_type)
    return types


def _since(op: str, opset: int) -> int:
    try:
        return int(defs.get_schema(op, opset, "").since_version)
    except defs.SchemaError:
        return -1


def _letter(elem_type: int) -> str:
    return _LETTERS.get(_dtype_name(elem_type), "none")


def _dtype_name(elem_type: int) -> str:
    return str(onnx.TensorProto.DataType.Name(elem_type)).lower()


@cache
def _kernels() -> dict[str, dict[int, dict[str, str]]]:
    """The table below, as {operator: {version: {type parameter: letters of its types}}}."""
    table: dict[str, dict[int, dict[str, str]]] = {}
    for line in _CUDA_KERNELS.strip().splitlines():
        op, _, variants = line.partition(": ")
        for variant in variants.split(" | "):
            versions, *constraints = variant.split()
            pairs = (constraint.split("=") for constraint in constraints)
            types = {name: _EVERY if letters == "*" else letters for name, letters in pairs}
            table.setdefault(op, {}).update({int(version): types for version in versions.split(",")})
    return table


_LETTERS = {
    "bool": "?",
    "int8": "b",
    "int16": "s",
    "int32": "i",
    "int64": "l",
    "uint8": "B",
    "uint16": "S",
    "uint32": "I",
    "uint64": "L",
    "float16": "h",
    "bfloat16": "g",
    "float": "f",
    "double": "d",
}
_EVERY = "".join(_LETTERS.values())

# operator: its versions (of those in opsets 18 to 28) that have a kernel, and their types; `|` where versions differ
_CUDA_KERNELS = """
Abs: 13 T=BILSbdfghils
Add: 14 T=BILSbdfghils
And: 7 T=? T1=?
ArgMax: 13 T=dfh
ArgMin: 13 T=dfh
Attention: 23,24 T1=fgh T2=fgh U=?fgh
AveragePool: 11,19 T=dfh | 22 T=dfgh
BatchNormalization: 15 T=dfh T1=dfh T2=dfh
Cast: 13,19,21,23,24,25 T1=* T2=*
Ceil: 13 T=dfh
Clip: 13 T=BLbdfhl
Compress: 11 T=* T1=?
Concat: 13 T=*
ConcatFromSequence: 11
ConstantOfShape: 9,20,21,23,24,25 T1=l T2=*
Conv: 11 T=dfh | 22 T=dfgh
ConvTranspose: 11,22 T=dfh
Cos: 7 T=dfh | 22 T=dfgh
CumSum: 14 T=ILdfhil T2=il
DeformConv: 19 T=dfh | 22 T=dfgh
DepthToSpace: 13 T=dfh
DequantizeLinear: 13 T=Bb | 19,21 T1=Bb T2=fh | 23,24,25 T1=Bb T2=fh T3=fh
Div: 14 T=BILSbdfghils
Dropout: 13 T=dfgh T1=dfgh T2=?
Einsum: 12 T=dfh
Elu: 6 T=dfh
Equal: 13,19 T=?ILdfhil T1=?
Erf: 13 T=dfgh
Exp: 13 T=dfgh
Expand: 13 T=*
EyeLike: 9 T1=Ldfil T2=Ldfil
Flatten: 13,21,23,24,25 T=*
Floor: 13 T=dfh
GRU: 14,22 T=dfh T1=i
Gather: 13 T=* Tind=il
GatherElements: 13 T=* Tind=il
GatherND: 13 T=?dfghl
Gelu: 20 T=dfgh
Gemm: 13 T=dfgh
GlobalAveragePool: 1,22 T=dfh
GlobalMaxPool: 1,22 T=dfh
Greater: 13 T=ILdfhil T1=?
GreaterOrEqual: 16 T=ILdfhil T1=?
GridSample: 16,20,22 T1=f T2=f
HardSigmoid: 6 T=dfh | 22 T=dfgh
HardSwish: 14 T=dfh | 22 T=dfgh
Identity: 16,19,21,23,24,25 V=*
If: 16,19,21,23,24,25 B=? V=*
InstanceNormalization: 6 T=dfh
IsInf: 10 T1=df T2=? | 20 T1=dfgh T2=?
IsNaN: 13,20 T1=dfgh T2=?
LRN: 13 T=dfh
LSTM: 14,22 T=dfh T1=i
LayerNormalization: 17 T=dfgh U=f
LeakyRelu: 16 T=dfh
Less: 13 T=ILdfhil T1=?
LessOrEqual: 16 T=ILdfhil T1=?
Log: 13 T=dfh
LogSoftmax: 13 T=dfh
Loop: 16,19,21,23,24,25 B=? I=l V=*
LpNormalization: 1 T=fh | 22 T=fgh
MatMul: 13 T=dfgh
MatMulInteger: 10 T1=b T2=b T3=i
Max: 13 T=ILdfghil
MaxPool: 12 I=l T=Bbdfh
Min: 13 T=ILdfghil
Mod: 13 T=ILdfghil
Mul: 14 T=BILSbdfghils
Neg: 13 T=bdfghils
NonMaxSuppression: 11
NonZero: 13 T=?Bfhil
Not: 1 T=?
OneHot: 11 T1=il T2=il T3=fhl
Or: 7 T=? T1=?
PRelu: 16 T=dfh
Pad: 18,19,21,23,24,25 T=?dfh
Pow: 15 T=dfghil T1=dfghil
QuantizeLinear: 13 T1=f T2=Bb | 19,21 T1=fh T2=Bb | 23,24,25 T1=fh T2=fh T3=Bb
RMSNormalization: 23 T=dfgh V=dfgh
RNN: 14,22 T=dfh T1=i
RandomNormal: 1 T=dfh | 22 T=dfgh
RandomNormalLike: 1 T1=* T2=dfh | 22 T1=* T2=dfgh
RandomUniform: 1 T=dfh | 22 T=dfgh
RandomUniformLike: 1 T1=* T2=dfh | 22 T1=* T2=dfgh
Range: 11,27 T=dfils
Reciprocal: 13 T=dfh
ReduceL1: 18 T=dfhi
ReduceL2: 18 T=dfhi
ReduceLogSum: 18 T=dfh
ReduceLogSumExp: 18 T=dfh
ReduceMax: 18,20 T=Bbdfhil
ReduceMean: 18 T=dfghi
ReduceMin: 18,20 T=Bbdfhil
ReduceProd: 18 T=dfhi
ReduceSum: 13 T=dfghil
ReduceSumSquare: 18 T=dfh
Relu: 14 T=dfgh
Reshape: 14,19,21,23,24,25 T=*
Resize: 18,19 T1=Bdfhi
ReverseSequence: 10 T=*
RoiAlign: 16 T1=dfh T2=l | 22 T1=dfgh T2=l
RotaryEmbedding: 23 M=l T=fgh
Round: 11,22 T=dfh
Scan: 16,19,21,23,24,25 V=*
ScatterElements: 18 T=* Tind=il
ScatterND: 18 T=*
Selu: 6 T=dfh
SequenceAt: 11 I=il T=*
SequenceConstruct: 11 T=*
SequenceEmpty: 11
SequenceErase: 11 I=il
SequenceInsert: 11 I=il
SequenceLength: 11 I=l
Shape: 15,19,21,23,24,25 T=* T1=l
Shrink: 9 T=BILSbdfhils
Sigmoid: 13 T=dfgh
Sign: 13 T=BILSbdfghils
Sin: 7 T=dfh | 22 T=dfgh
Size: 13,19,21,23,24,25 T=* T1=l
Slice: 13 T=* Tind=il
Softmax: 13 T=dfgh
Softplus: 1 T=dfh | 22 T=dfgh
Softsign: 1 T=dfh | 22 T=dfgh
SpaceToDepth: 13 T=dfh
Split: 18 T=*
Sqrt: 13 T=dfgh
Squeeze: 13,21,23,24,25 T=*
Sub: 14 T=BILSbdfghils
Sum: 13 T=dfgh
Tanh: 13 T=dfgh
TensorScatter: 24 T=*
ThresholdedRelu: 10 T=dfh
Tile: 13 T=dfghil T1=l
TopK: 11 I=l T=Bbdfhils | 24 I=l T=Bbdfghils
Transpose: 13,21,23,24,25 T=*
Trilu: 14 T=*
Unsqueeze: 13,21,23,24,25 T=*
Where: 16 B=? T=Bdfghil
Xor: 7 T=? T1=?
"""
