"""What a GPU's runtime can run: tables of kernels, and the nodes of a file that are not in them.

`cuda.json` and `tensorrt.json` beside this file are the tables; each names the release it was taken from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import onnx
from onnx import defs, helper

from torchtrim.errors import ExportError, nearest
from torchtrim.export.saving import LARGE, held_bytes

_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True)
class Unsupported:
    """A node that a target has no kernel for.

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


def unsupported(model: onnx.ModelProto, target: str) -> list[Unsupported]:
    """The nodes of a file that a GPU's runtime has no kernel for.

    For `cuda`: those that ONNX Runtime's CUDA provider would hand back to the CPU. Compared are the operator, the
    version of it that the file's opset means, and the types of its inputs. Integer shape arithmetic may still be placed
    on the CPU by ONNX Runtime's own choice; that costs nothing. For `tensorrt`: those that its parser refuses, by
    operator, types, attributes, and inputs that must be constant.

    Args:
        model: The file's model; its weights may lie elsewhere.
        target: `cuda` or `tensorrt`.

    Raises:
        ExportError: A target without a table.

    Source: the kernels that `onnxruntime-gpu` 1.31.1 registers; the operator table of onnx-tensorrt for TensorRT 10.15.

    Example:
        >>> node = helper.make_node("Acos", ["x"], ["y"], name="angle")
        >>> x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
        >>> graph = helper.make_graph([node], "g", [x], [y])
        >>> model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
        >>> print(*unsupported(model, "cuda"), unsupported(model, "tensorrt"))
        Acos (angle): the CUDA provider has no kernel for it []
    """
    if target not in _CHECKS:
        raise ExportError(
            "there is no table of kernels for that target",
            found=target,
            expected=" or ".join(_CHECKS),
            hint=nearest(str(target), _CHECKS),
        )
    return list(_walk(model.graph, _File.of(model), _CHECKS[target]))


def refuse_unsupported(model: onnx.ModelProto, target: str, *, path: object = None) -> None:
    """Raise where a file has nodes that a GPU's runtime has no kernel for.

    Args:
        model: The file's model.
        target: `cuda` or `tensorrt`.
        path: The file, for the message.

    Raises:
        ExportError: Some nodes have none; it names the first five.
    """
    missing = unsupported(model, target)
    if missing:
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise ExportError(
            _REFUSALS[target],
            path=path,
            found="; ".join(map(str, missing[:5])) + more,
            hint='another opset=, a layer without these operators, or target="cpu"',
        )


def has_kernel(target: str, op: str, opset: int, dtype: str = "float16") -> bool:
    """Whether a target runs a standard operator on data of a type, as far as its first input goes.

    Args:
        target: `cuda` or `tensorrt`.
        op: The operator, of the standard domain.
        opset: The file's opset.
        dtype: ONNX's name of the type: `float`, `float16`, `bfloat16`, `int64`, ...

    Example:
        >>> has_kernel("cuda", "MaxPool", 18), has_kernel("cuda", "MaxPool", 22), has_kernel("tensorrt", "MaxPool", 22)
        (True, False, True)
        >>> has_kernel("cuda", "Conv", 20, "bfloat16"), has_kernel("tensorrt", "Conv", 20, "bfloat16")
        (False, True)
    """
    if target == "tensorrt":
        return dtype in tensorrt_types(op)
    versions = _cuda().get(op, {})
    kernels = versions.get(_since(op, opset))
    if kernels is None:
        return False
    first = next((kernels.get(formal.type_str) for formal in defs.get_schema(op, opset, "").inputs), None)
    return first is None or dtype in first


def takes(target: str, op: str, opset: int, parameter: str, dtype: str) -> bool:
    """Whether a target's kernel of a standard operator takes a type for one type parameter (`T`, `U`, ...).

    Example:
        >>> takes("cuda", "LayerNormalization", 20, "U", "bfloat16")
        False
    """
    if target == "tensorrt":
        return dtype in tensorrt_types(op)
    kernels = _cuda().get(op, {}).get(_since(op, opset))
    if kernels is None:
        return False
    accepted = kernels.get(parameter)
    return accepted is None or dtype in accepted


@cache
def tensorrt_types(op: str) -> frozenset[str]:
    """The types that TensorRT's parser takes an operator in; none where it does not know the operator.

    Example:
        >>> sorted(tensorrt_types("Conv")), sorted(tensorrt_types("MatMulInteger"))
        (['bfloat16', 'float', 'float16'], [])
    """
    table = _table("tensorrt")
    groups = [group for group, operators in table["operators"].items() if op in operators]
    return frozenset(dtype for group in groups for dtype in table["types"][group].split())


@dataclass(frozen=True)
class _File:
    """What a check needs to know of a file: its opset, the type of each tensor, and the constants among them."""

    opset: int
    types: dict[str, str]
    constants: dict[str, onnx.TensorProto | None]

    @staticmethod
    def of(model: onnx.ModelProto) -> _File:
        opset = next((int(entry.version) for entry in model.opset_import if entry.domain in _STANDARD), 0)
        graph = onnx.shape_inference.infer_shapes(model).graph if _small(model) else model.graph
        types: dict[str, str] = {}
        constants: dict[str, onnx.TensorProto | None] = {}
        for part in _graphs(graph):
            for tensor in part.initializer:
                types[tensor.name] = _dtype_name(tensor.data_type)
                constants[tensor.name] = tensor
            for value in (*part.input, *part.value_info, *part.output):
                if value.type.HasField("tensor_type"):
                    types[value.name] = _dtype_name(value.type.tensor_type.elem_type)
            for node in part.node:
                if node.op_type == "Constant":
                    constants[node.output[0]] = _attribute(node, "value")
        return _File(opset, types, constants)


def _small(model: onnx.ModelProto) -> bool:
    return held_bytes(model) < LARGE


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _walk(
    graph: onnx.GraphProto, file: _File, check: Callable[[onnx.NodeProto, _File], str | None]
) -> Iterator[Unsupported]:
    for part in _graphs(graph):
        for node in part.node:
            reason = None if node.op_type == "Constant" else check(node, file)
            if reason:
                yield Unsupported(node.name, node.op_type, reason)


def _cuda_reason(node: onnx.NodeProto, file: _File) -> str | None:
    formals: list[tuple[str, str]]
    if node.domain in _STANDARD:
        versions = _cuda().get(node.op_type)
        if versions is None:
            return "the CUDA provider has no kernel for it"
        since = _since(node.op_type, file.opset)
        if since not in versions:
            return f"no kernel for version {since} (it has {', '.join(map(str, sorted(versions)))})"
        kernels = versions[since]
        formals = [(formal.name, formal.type_str) for formal in defs.get_schema(node.op_type, file.opset, "").inputs]
    else:
        entry = _table("cuda")["kernels"].get(node.domain, {}).get(node.op_type)
        if entry is None:
            return f"the CUDA provider has no kernel for it in the domain {node.domain!r}"
        kernels = _accepted(entry["1"])
        formals = [(str(place), parameter) for place, parameter in enumerate(entry["inputs"].split())]
    for position, name in enumerate(node.input):
        title, parameter = formals[min(position, len(formals) - 1)]
        accepted = kernels.get(parameter)
        if name in file.types and accepted is not None and file.types[name] not in accepted:
            return f"no kernel for {file.types[name]} as its input {title!r}"
    if node.op_type in ("ArgMax", "ArgMin") and _attribute(node, "select_last_index"):
        return "no kernel for select_last_index"
    if node.op_type == "ConvTranspose":
        pads = _attribute(node, "pads") or []
        if list(pads[: len(pads) // 2]) != list(pads[len(pads) // 2 :]):
            return "no kernel for uneven padding"
    if node.op_type == "MatMulNBits" and _attribute(node, "bits") not in (4, 8):
        return f"no kernel for {_attribute(node, 'bits')} bits"
    return None


def _tensorrt_reason(node: onnx.NodeProto, file: _File) -> str | None:
    if node.domain not in _STANDARD:
        return f"TensorRT does not know the domain {node.domain!r}"
    table = _table("tensorrt")
    least, most = table["opsets"]
    if not least <= file.opset <= most:
        return f"TensorRT reads opsets {least} to {most}, and the file has {file.opset}"
    accepted = tensorrt_types(node.op_type)
    if not accepted:
        return "TensorRT's parser does not know it"
    for name in _data_inputs(node, file.opset):
        found = file.types.get(name)
        # Doubles are read as floats.
        if found is not None and found != "double" and found not in accepted:
            return f"TensorRT does not take {found} as its data"
    if node.op_type == "Cast" and _dtype_name(_attribute(node, "to")) not in {*accepted, "double"}:
        return f"TensorRT does not cast to {_dtype_name(_attribute(node, 'to'))}"
    return _tensorrt_limit(node, file, table)


def _tensorrt_limit(node: onnx.NodeProto, file: _File, table: dict[str, Any]) -> str | None:
    op, given = node.op_type, [bool(name) for name in node.input]
    for place in table["constant"].get(op, ()):
        if place < len(given) and given[place] and node.input[place] not in file.constants:
            return f"TensorRT wants its input {place} to be a constant"
    for name, allowed in table["attributes"].get(op, {}).items():
        found = _attribute(node, name)
        found = found.decode() if isinstance(found, bytes) else found
        if found is not None and found not in allowed:
            return f"TensorRT does not take {name}={found}"
    if sum(given) > table["inputs"].get(op, len(given)):
        return f"TensorRT takes its first {table['inputs'][op]} inputs only"
    if sum(bool(name) for name in node.output) > table["outputs"].get(op, len(node.output)):
        return f"TensorRT gives its first {table['outputs'][op]} outputs only"
    ones = table["ones"].get(op)
    if ones and set(_attribute(node, ones) or [1]) != {1}:
        return f"TensorRT does not take {ones} other than 1"
    place = table["zeros"].get(op)
    if place and place < len(given) and given[place] and not _is_zero(file.constants.get(node.input[place])):
        return "TensorRT wants a zero point of 0"
    return None


def _is_zero(tensor: onnx.TensorProto | None) -> bool:
    """Whether a constant is known to be zero. One that lies in another file, or is computed, is not."""
    if tensor is None or tensor.external_data:
        return False
    return not onnx.numpy_helper.to_array(tensor).any()


def _data_inputs(node: onnx.NodeProto, opset: int) -> Iterator[str]:
    """The inputs that hold data, not indices, sizes or truth values: those of the first input's, or output's, type."""
    schema = defs.get_schema(node.op_type, opset, "")
    formals = list(schema.inputs)
    if not formals:
        return
    kinds = {formals[0].type_str}
    if node.op_type == "Where":
        kinds.add(schema.outputs[0].type_str)
    for position, name in enumerate(node.input):
        if name and formals[min(position, len(formals) - 1)].type_str in kinds:
            yield name


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(entry) for entry in node.attribute if entry.name == name), None)


def _since(op: str, opset: int) -> int:
    try:
        return int(defs.get_schema(op, opset, "").since_version)
    except defs.SchemaError:
        return -1


def _dtype_name(elem_type: int) -> str:
    return str(onnx.TensorProto.DataType.Name(elem_type)).lower()


@cache
def _table(name: str) -> dict[str, Any]:
    text = resources.files(__name__).joinpath(f"{name}.json").read_text(encoding="utf-8")
    table: dict[str, Any] = json.loads(text)
    return table


@cache
def _cuda() -> dict[str, dict[int, dict[str, frozenset[str]]]]:
    """The CUDA provider's standard kernels: {operator: {version: {type parameter: its types}}}."""
    return {
        op: {int(version): _accepted(types) for versions, types in entries.items() for version in versions.split(",")}
        for op, entries in _table("cuda")["kernels"]["ai.onnx"].items()
    }


def _accepted(types: dict[str, str]) -> dict[str, frozenset[str]]:
    every = _table("cuda")["every"]
    return {name: frozenset((every if listed == "*" else listed).split()) for name, listed in types.items()}


_CHECKS: dict[str, Callable[[onnx.NodeProto, _File], str | None]] = {
    "cuda": _cuda_reason,
    "tensorrt": _tensorrt_reason,
}
_REFUSALS = {
    "cuda": "ONNX Runtime's CUDA provider has no kernel for some nodes and would hand them back to the CPU",
    "tensorrt": "TensorRT does not take some nodes",
}
