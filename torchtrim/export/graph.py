"""A PyTorch model to an ONNX file: torch.export, the dynamo exporter, names, a dynamic batch."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.errors import ExportError, InputError
from torchtrim.export.outputs import free_name, named_outputs
from torchtrim.graph.inputs import Inputs

LARGE = 2_000_000_000  # bytes; one protobuf file cannot hold more


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
        InputError: Another number of names than of tensors, a name given twice, or an output without tensors.
    """
    found_inputs = _input_names(model, inputs)
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
        ExportError: The model cannot be exported.
    """
    if dynamic and inputs.batch < 2:
        inputs = inputs.with_batch(2)  # the exporter takes a batch of 1 for a constant
    flat = _Flat(model, inputs)
    shapes: tuple[Any, ...] | None = None
    if dynamic:
        batch = torch.export.Dim("batch", min=1)
        size = inputs.batch
        shapes = (tuple({0: batch} if t.dim() and t.shape[0] == size else {} for t in flat.tensors),)
    try:
        with torch.no_grad():
            program = torch.export.export(flat, tuple(flat.tensors), dynamic_shapes=shapes, strict=False)
            exported = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                input_names=list(names.inputs),
                output_names=list(names.outputs),
                opset_version=opset,
            )
    except Exception as error:
        # The exporter raises a dozen unrelated kinds, its own and the model's.
        fixed = "dynamic=False, if one batch size is enough" if dynamic else "another opset="
        raise ExportError(
            f"{type(model).__name__} cannot be turned into ONNX: {_root(error)}", found=inputs.describe(), hint=fixed
        ) from error
    if exported is None:
        raise ExportError("the exporter gave nothing back", found=type(model).__name__)
    exported.save(path, external_data=weight_bytes(model) > LARGE)
    _tidy(path)


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


def _tidy(path: Path) -> None:
    """Give weights their names in the model's `state_dict`, and take out what only gets in the way.

    That is: lines of the user's source files, and a second description of each weight.
    """
    model = onnx.load(path, load_external_data=False)
    _rename(model.graph, {t.name: t.name.removeprefix("model.") for t in model.graph.initializer})
    for node in model.graph.node:
        kept = [entry for entry in node.metadata_props if not entry.key.endswith("stack_trace")]
        del node.metadata_props[:]
        node.metadata_props.extend(kept)
    weights = {tensor.name for tensor in model.graph.initializer}
    # ONNX Runtime's quantizer transposes weights, and then stumbles over the shapes written here.
    described = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(described)
    path.write_bytes(model.SerializeToString())


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


def _input_names(model: nn.Module, inputs: Inputs) -> list[str]:
    """A name for each tensor in the arguments: its parameter, then the keys or places that lead to it."""
    leaves, spec = pytree.tree_flatten((inputs.args, inputs.kwargs))
    args, kwargs = pytree.tree_unflatten(list(range(len(leaves))), spec)
    named: dict[int, str] = {}
    taken: set[str] = set()

    def walk(value: Any, name: str) -> None:
        if isinstance(value, int):
            named[value] = free_name(name, taken)
            taken.add(named[value])
        elif isinstance(value, Mapping):
            for key, item in value.items():
                walk(item, f"{name}_{key}" if name else str(key))
        elif isinstance(value, (tuple, list)):
            for position, item in enumerate(value):
                walk(item, f"{name}_{position}" if position else name)

    variadic = {p.name for p in _parameters(model) if p.kind is p.VAR_KEYWORD}
    for parameter, value in Inputs(tuple(args), dict(kwargs)).bind(model).items():
        walk(value, "" if parameter in variadic else parameter)
    return [named.get(i, f"input_{i}") for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]


def _parameters(model: nn.Module) -> list[Any]:
    return list(inspect.signature(model.forward).parameters.values())
