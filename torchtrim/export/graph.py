"""A PyTorch model to an ONNX file: torch.export, the dynamo exporter, names, a dynamic batch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.errors import ExportError, InputError
from torchtrim.export.inputs import input_names as names_of_inputs
from torchtrim.export.outputs import free_name, named_outputs
from torchtrim.export.quiet import quiet
from torchtrim.export.saving import LARGE
from torchtrim.export.spelled_out import SpelledOut
from torchtrim.graph.inputs import Inputs

ATTENTION = 23  # the opset from which on ONNX has an operator for attention


@dataclass(frozen=True)
class Names:
    """The names of a file's inputs and outputs, in order."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def names_for(
    model: nn.Module,
    inputs: Inputs,
    output: object,
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Names:
    """The names to give: the user's, or the forward's parameters and the output's keys.

    Raises:
        InputError: Another number of names than of tensors, a name given twice (also once to an input and once to an
            output), or an output without tensors.
    """
    found_inputs = names_of_inputs(model, inputs)
    found_outputs = list(named_outputs(output))
    if not found_outputs:
        raise InputError("the model returns no tensor", found=type(output).__name__)
    for kind, given, found in (("input", input_names, found_inputs), ("output", output_names, found_outputs)):
        if given is not None and (len(given) != len(found) or len(set(given)) != len(given)):
            raise InputError(
                f"{kind}_names needs one name for each {kind}",
                found=list(given),
                expected=f"{len(found)} different names, as in {found}",
            )
    inputs_named = tuple(input_names or found_inputs)
    twice = sorted(set(inputs_named) & set(output_names or ()))
    if twice:
        raise InputError(
            "an output cannot have the name of an input",
            found=twice,
            expected="names that differ",
            hint="other input_names or output_names",
        )
    taken = set(inputs_named)
    outputs_named: list[str] = []
    for name in output_names or found_outputs:
        outputs_named.append(free_name(name, taken))
        taken.add(outputs_named[-1])
    return Names(inputs_named, tuple(outputs_named))


def write_float(
    model: nn.Module, inputs: Inputs, path: Path, *, names: Names, dynamic: bool, opset: int | None
) -> None:
    """Write a model to an ONNX file as it is: in its own precision, with the mode its modules are in.

    Raises:
        ExportError: The model cannot be exported, or not with the batch or the opset asked for.
    """
    size = inputs.batch
    of_batch = [bool(tensor.dim()) and tensor.shape[0] == size for tensor in inputs.tensors]
    shapes: tuple[Any, ...] | None = None
    if dynamic:
        if not any(of_batch):
            raise ExportError("no input has a batch dimension", found=inputs.describe(), hint="dynamic=False")
        inputs = inputs.with_batch(max(2, size))  # the exporter takes a batch of 1 for a constant
        batch = torch.export.Dim("batch", min=1)
        shapes = (tuple({0: batch} if own else {} for own in of_batch),)
    flat = _Flat(model, inputs)
    try:
        with torch.no_grad(), quiet(), SpelledOut(keep_attention=(opset or 0) >= ATTENTION):
            program = torch.export.export(flat, tuple(flat.tensors), dynamic_shapes=shapes, strict=False)
            exported = _translated(program, names, opset)
    except Exception as error:
        # The exporter raises a dozen unrelated kinds, its own and the model's.
        fixed = "dynamic=False, if one batch size is enough" if dynamic else "another opset="
        raise ExportError(
            f"{type(model).__name__} cannot be turned into ONNX: {_root(error)}", found=inputs.describe(), hint=fixed
        ) from error
    if exported is None:
        raise ExportError("the exporter gave nothing back", found=type(model).__name__)
    exported.save(path, external_data=weight_bytes(model) > LARGE)
    join_files(path)  # the exporter puts weights of more than 1.6 GB beside the file, where one could hold them
    _tidy(path, batch=of_batch.index(True) if dynamic else None)
    written = opset_of(path)
    if opset is not None and written != opset:
        raise ExportError(
            "the model cannot be written in that opset", found=written, expected=opset, hint=f"opset={written}"
        )
    if dynamic and not has_dynamic_batch(path):
        raise ExportError(
            "the file takes one batch size only: the model computes with the size of its batch",
            found=inputs.describe(),
            hint="dynamic=False, if one batch size is enough",
        )


def _translated(program: torch.export.ExportedProgram, names: Names, opset: int | None) -> Any:
    """The exporter's file of a program.

    onnxscript 0.7 loses constants when it makes a Clip of a Min and a Max: those of several clips of one tensor get one
    name (gemma4's clipped linear layers). Such a program is translated again, with constants folded and no more.
    """
    for optimize in (True, False):
        exported = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(names.inputs),
            output_names=list(names.outputs),
            opset_version=opset,
            optimize=optimize,
        )
        if exported is None or not _loses_constants(exported.model.graph):
            break
    if exported is not None and not optimize:
        _simplify(exported.model)
    return exported


def _simplify(model: Any) -> None:
    """What onnxscript's optimizer does, but for its rules that make one node of several."""
    import onnxscript.optimizer
    from onnx_ir.passes import common

    onnxscript.optimizer.inline(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    onnxscript.optimizer.remove_unused_functions(model)
    steps: tuple[Any, ...] = (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )
    for step in steps:
        step(model)


def _loses_constants(graph: Any) -> bool:
    """Whether a node reads what is nowhere: no input, no weight, and made by no node. Names may be the same."""
    known = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    read = (value for node in graph for value in node.inputs if value is not None)
    return any(value.producer() is None and id(value) not in known for value in read)


def opset_of(path: Path) -> int:
    """The ONNX opset of a file."""
    entries = onnx.load(path, load_external_data=False).opset_import
    return next(int(entry.version) for entry in entries if entry.domain in ("", "ai.onnx"))


def has_dynamic_batch(path: Path) -> bool:
    """Whether a file has an input whose first dimension is left open."""
    shapes = [value.type.tensor_type.shape.dim for value in onnx.load(path, load_external_data=False).graph.input]
    return any(shape[0].dim_param for shape in shapes if shape)


def _root(error: BaseException) -> str:
    """The first thing that went wrong, in one line: the exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def stamp(path: Path, *, version: str, notes: Mapping[str, str]) -> onnx.ModelProto:
    """Write who made a file, and notes, into it.

    Returns:
        The file's model, without weights that lie beside it.
    """
    model = onnx.load(path, load_external_data=False)
    model.producer_name, model.producer_version = "torchtrim", version
    del model.metadata_props[:]
    for key, value in notes.items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, value
    path.write_bytes(model.SerializeToString())
    return model


def _tidy(path: Path, *, batch: int | None) -> None:
    """Give weights their names in the model's `state_dict`, the open dimension the name `batch`, and drop the rest.

    The rest is what only gets in the way: the exporter's notes on its own graph, lines of the user's source files, and
    a second description of each weight.

    Args:
        path: The file.
        batch: The position of an input whose first dimension is the batch; None where the batch is fixed.
    """
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    taken = {value.name for value in (*graph.input, *graph.output)} | set(_computed(graph))
    short = {tensor.name: tensor.name.removeprefix("model.") for tensor in graph.initializer}
    _rename(graph, {name: new for name, new in short.items() if new not in taken})
    weights = {tensor.name for tensor in graph.initializer}
    # ONNX Runtime's quantizer transposes weights, and then stumbles over the shapes written here.
    described = [value for value in graph.value_info if value.name not in weights]
    del graph.value_info[:]
    graph.value_info.extend(described)
    for noted in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        del noted.metadata_props[:]
    if batch is not None:
        _name_batch(graph, graph.input[batch])
    path.write_bytes(model.SerializeToString())


def _computed(graph: onnx.GraphProto) -> Iterator[str]:
    """The names of all values that nodes compute, in subgraphs too."""
    for node in graph.node:
        yield from node.output
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _computed(attribute.g)


def _name_batch(graph: onnx.GraphProto, first: onnx.ValueInfoProto) -> None:
    dimensions = first.type.tensor_type.shape.dim
    symbol = dimensions[0].dim_param if dimensions else ""
    if not symbol:
        return
    for value in (*graph.input, *graph.output, *graph.value_info):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param:
                dimension.dim_param = re.sub(rf"\b{re.escape(symbol)}\b", "batch", dimension.dim_param)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for value in (*graph.value_info, *graph.output):
        value.name = names.get(value.name, value.name)
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = names.get(name, name)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _rename(attribute.g, names)


def join_files(path: Path) -> None:
    """Take the weights beside a file into it, where one file can hold them all."""
    if len(files_of(path)) == 1 or size_mb(path) * 1e6 > LARGE:
        return
    model = onnx.load(path)
    path.with_name(f"{path.name}.data").unlink()
    onnx.save(model, path)


def weight_bytes(model: nn.Module) -> int:
    """The size of the weights in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def files_of(path: Path) -> tuple[Path, ...]:
    """A file and the weights beside it."""
    return tuple(sorted(other for other in path.parent.iterdir() if other.name in (path.name, f"{path.name}.data")))


def size_mb(path: Path) -> float:
    """Megabytes (10^6 bytes) of a file with the weights beside it."""
    return sum(os.path.getsize(other) for other in files_of(path)) / 1e6


class _Flat(nn.Module):
    """A model that takes its tensors in a row and returns a tuple of tensors: what ONNX can express.

    Everything in the arguments that is no tensor (None, a flag, a size) becomes a constant.
    """

    def __init__(self, model: nn.Module, inputs: Inputs) -> None:
        super().__init__()
        self.model = model
        leaves, self._spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
        self._constants = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        self._slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        self.tensors = [leaf.detach() for leaf in leaves if isinstance(leaf, torch.Tensor)]
        self.training = model.training

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self._constants)
        for slot, tensor in zip(self._slots, tensors, strict=True):
            leaves[slot] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._spec)
        return tuple(named_outputs(self.model(*args, **kwargs)).values())
