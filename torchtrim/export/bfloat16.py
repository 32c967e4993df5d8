"""An ONNX file in bfloat16, and the same arithmetic in a form that a processor without bfloat16 can run."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import defs, helper

from torchtrim.errors import ExportError
from torchtrim.export.kernels import refuse_unsupported, takes
from torchtrim.export.rewrite import Rewrite, names_read

_FLOAT, _BFLOAT16 = int(onnx.TensorProto.FLOAT), int(onnx.TensorProto.BFLOAT16)
# What the time goes into. These turn into bfloat16 wherever the target can; the others follow what they read.
_HEAVY = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum", "LSTM", "GRU", "RNN")
# These say in an attribute what type they give.
_OWN_TYPE = ("Cast", "CastLike", "QuantizeLinear", "DequantizeLinear")


def to_bfloat16(source: Path, destination: Path, *, target: str = "cuda", external_data: bool = False) -> int:
    """Write a copy of an ONNX file that computes in bfloat16: the range of float32, with 8 bits of precision.

    Matrix products and convolutions turn into bfloat16 where the target has a kernel for that version of them; the
    nodes between them follow, where they can. Inputs and outputs stay float32. ONNX Runtime's CUDA provider has
    convolutions in bfloat16 from opset 22 on, and no MaxPool there.

    Args:
        source: The float32 file.
        destination: Where the bfloat16 file goes.
        target: `cuda` or `tensorrt`.
        external_data: Keep the weights beside the file (past 2 GB).

    Returns:
        How many matrix products, convolutions and recurrent nodes compute in bfloat16.

    Raises:
        ExportError: None can, or the target has no kernel for some nodes.
    """
    file = Rewrite(source)
    converter = _Converter(file, target)
    for node in file.nodes:
        converter.write(node)
    converter.finish()
    if not converter.heavy:
        raise ExportError(
            "no node of the file can compute in bfloat16 there",
            path=source.name,
            found=f"opset {file.opset}, target {target!r}",
            expected=f"one of {', '.join(_HEAVY)} in float32, with a bfloat16 kernel",
            hint='quantize="fp16", or opset=22 for convolutions',
        )
    refuse_unsupported(file.save(destination, external_data=external_data), target, path=source.name)
    return converter.heavy


def widen_bfloat16(source: Path, destination: Path, *, external_data: bool = False) -> None:
    """Write a copy of a bfloat16 file that the CPU provider can run, and whose numbers are as near as they can be.

    Each node computes in float32, from operands that are bfloat16 numbers, and what it gives is rounded to bfloat16.
    So kernels compute that add up in float32, as those of GPUs do; the order of their sums is another.

    Args:
        source: A file that `to_bfloat16` wrote.
        destination: Where the copy goes.
        external_data: Keep the weights beside the file (past 2 GB).
    """
    file = Rewrite(source)
    for node in file.nodes:
        given = [name for name in node.output if file.types.get(name) == _BFLOAT16]
        if not given:
            file.keep(node)
            continue
        if node.op_type == "Cast":
            exact = {given[0]: str(node.input[0])}
        else:
            exact = {name: file.fresh(f"{name}_exact") for name in given}
            wide = onnx.NodeProto()
            wide.CopyFrom(node)
            wide.output[:] = [exact.get(name, name) for name in node.output]
            file.keep(wide)
        for name, before in exact.items():
            rounded = file.add("Cast", [before], f"{name}_rounded", to=_BFLOAT16)
            file.put("Cast", [rounded], name, to=_FLOAT)
    graph = file.model.graph
    for tensor in graph.initializer:
        if tensor.data_type == _BFLOAT16:
            tensor.CopyFrom(onnx.numpy_helper.from_array(_values(tensor), tensor.name))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type == _BFLOAT16:
            value.type.tensor_type.elem_type = _FLOAT
    file.save(destination, external_data=external_data)


class _Converter:
    """Writes nodes anew, in bfloat16 where they can be; a value has its name in float32, and another in bfloat16."""

    def __init__(self, file: Rewrite, target: str) -> None:
        self.file = file
        self.target = target
        self.heavy = 0
        self._wide = {value.name for value in file.model.graph.input}
        self._short: dict[str, str] = {}

    def write(self, node: onnx.NodeProto) -> None:
        """Write one node."""
        parameters = self._parameters(node)
        if parameters is None or not self._wants(node):
            for name in set(names_read(node)):
                self._widen(name)
            self.file.keep(node)
            self._wide.update(node.output)
            return
        inputs, outputs = parameters
        short = onnx.NodeProto()
        short.CopyFrom(node)
        for place in inputs:
            short.input[place] = self._shorten(node.input[place])
        for place, name in enumerate(node.input):
            if place not in inputs:
                self._widen(name)
        for place, name in enumerate(node.output):
            if place in outputs:
                self._short[name] = short.output[place] = self.file.fresh(f"{name}_bfloat16")
            else:
                self._wide.add(name)
        self.file.keep(short)
        self.heavy += node.op_type in _HEAVY

    def finish(self) -> None:
        """Give the file's outputs in float32."""
        for value in self.file.model.graph.output:
            self._widen(value.name)

    def _wants(self, node: onnx.NodeProto) -> bool:
        return node.op_type in _HEAVY or any(name in self._short for name in node.input)

    def _parameters(self, node: onnx.NodeProto) -> tuple[set[int], set[int]] | None:
        """The places of a node's float32 inputs and outputs, all of which can be bfloat16; None where they cannot."""
        if node.domain not in ("", "ai.onnx") or node.op_type in _OWN_TYPE or _has_branches(node):
            return None
        schema = defs.get_schema(node.op_type, self.file.opset, "")
        able = {
            constraint.type_param_str
            for constraint in schema.type_constraints
            if "tensor(bfloat16)" in constraint.allowed_type_strs
            and takes(self.target, node.op_type, self.file.opset, constraint.type_param_str, "bfloat16")
        }
        fixed = {constraint.type_param_str for constraint in schema.type_constraints} - able
        inputs = self._floats(node.input, list(schema.inputs))
        outputs = self._floats(node.output, list(schema.outputs))
        if not inputs or fixed & set(inputs.values()):
            return None
        return (
            {place for place, parameter in inputs.items() if parameter in able},
            {place for place, parameter in outputs.items() if parameter in able},
        )

    def _floats(self, names: Iterable[str], formals: list[Any]) -> dict[int, str]:
        """The places that hold float32, each with its type parameter."""
        return {
            place: formals[min(place, len(formals) - 1)].type_str
            for place, name in enumerate(names)
            if name and self.file.types.get(name) == _FLOAT
        }

    def _shorten(self, name: str) -> str:
        if name not in self._short:
            constant = self.file.constant(name)
            if constant is None:
                self._short[name] = self.file.add("Cast", [name], f"{name}_bfloat16", to=_BFLOAT16)
            else:
                fresh = self.file.fresh(f"{name}_bfloat16")
                self._short[name] = self.file.store_proto(bfloat16_tensor(fresh, constant))
        return self._short[name]

    def _widen(self, name: str) -> None:
        if name in self._short and name not in self._wide and self.file.constant(name) is None:
            self.file.put("Cast", [self._short[name]], name, to=_FLOAT)
            self._wide.add(name)


def _has_branches(node: onnx.NodeProto) -> bool:
    return any(entry.type == onnx.AttributeProto.GRAPH for entry in node.attribute)


def _values(tensor: onnx.TensorProto) -> NDArray[np.float32]:
    bits = torch.frombuffer(bytearray(tensor.raw_data), dtype=torch.int16)
    values: NDArray[np.float32] = bits.view(torch.bfloat16).float().numpy().reshape(tuple(tensor.dims))
    return values


def bfloat16_tensor(name: str, array: NDArray[Any]) -> onnx.TensorProto:
    """A constant in bfloat16, rounded to the nearest.

    Example:
        >>> bfloat16_tensor("w", np.ones(1)).raw_data.hex()
        '803f'
    """
    bits = torch.from_numpy(np.array(array, np.float32)).to(torch.bfloat16).view(torch.int16).numpy()
    return helper.make_tensor(name, _BFLOAT16, list(array.shape), bits.tobytes(), raw=True)
