"""What a file is compared on: the batches of data, other batch sizes, and other sizes where a file leaves them open."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils import _pytree as pytree

from torchtrim.bench.session import OnnxSession
from torchtrim.errors import InputError
from torchtrim.export.calibration_data import ROWS
from torchtrim.export.inputs import arguments_of, in_order, input_names
from torchtrim.export.rows import with_other_rows
from torchtrim.graph.inputs import ExampleInputs, Inputs

Data: TypeAlias = "ExampleInputs | Iterable[Any]"

_LABELS = ("labels", "label", "targets", "target", "y")


@dataclass(frozen=True)
class Run:
    """One run of the file and the model.

    Attributes:
        inputs: The forward's arguments.
        feed: The same, as the file takes them.
        targets: The class of each row, where the data says it.
        resized: Whether it has another size than the data, which the model need not take.
    """

    inputs: Inputs
    feed: dict[str, NDArray[Any]]
    targets: NDArray[np.int64] | None = None
    resized: bool = False


def runs_of(
    data: Data | None,
    example_inputs: ExampleInputs | None,
    model: nn.Module,
    session: OnnxSession,
    graph: onnx.GraphProto,
    max_batches: int | None,
) -> Iterator[Run]:
    """The runs: each batch as it is; the first one also at batch 1, at another batch, and at other open sizes.

    A file of one batch size gets the rows in portions of that size; what is left at the end is filled up only where
    nothing else would be compared.

    Args:
        data: Batches, or one example.
        example_inputs: One example, where there is no data; what the model's history recorded where there is neither.
        model: The model.
        session: The file.
        graph: The file's graph.
        max_batches: Stop after this many batches.
    """
    for number, (inputs, targets) in enumerate(islice(_batches(data, example_inputs, model, session), max_batches)):
        fixed = session.fixed_batch
        if fixed is not None:
            for portion, own in _portions(inputs, targets, fixed):
                yield Run(portion, feed_of(session, model, portion), own)
        else:
            yield Run(inputs, feed_of(session, model, inputs), targets)
        if number or not inputs.batch:
            continue
        small = inputs.with_batch(min(inputs.batch, 3) if fixed is None else fixed)
        if fixed is None:
            for batch in dict.fromkeys((1, 2 if inputs.batch == 3 else 3)):
                if batch != inputs.batch:
                    other = with_other_rows(inputs, batch)
                    yield Run(other, feed_of(session, model, other))
        for other in _other_sizes(small, model, session, graph):
            yield Run(other, feed_of(session, model, other), resized=True)


def at_most(data: Data, rows: int = ROWS) -> Data:
    """The same data up to a number of rows; one example as it is.

    Args:
        data: Batches, or one example.
        rows: Stop once there are so many.
    """
    if isinstance(data, (torch.Tensor, Mapping, tuple, Inputs)) or not isinstance(data, Iterable):
        return data
    return _FirstRows(data, rows)


@dataclass(frozen=True)
class _FirstRows:
    """The first batches of some data."""

    data: Iterable[Any]
    rows: int

    def __iter__(self) -> Iterator[Any]:
        seen = 0
        for batch in self.data:
            yield batch
            sizes = (len(leaf) for leaf in pytree.tree_leaves(batch) if isinstance(leaf, torch.Tensor) and leaf.dim())
            seen += next(sizes, 1)
            if seen >= self.rows:
                return


def feed_of(session: OnnxSession, model: nn.Module, inputs: Inputs) -> dict[str, NDArray[Any]]:
    """The file's inputs: by the names that an export gives them, or in the order of the forward's parameters.

    Raises:
        InputError: Another number of inputs, or one that the file does not take.
    """
    if len(inputs.tensors) != len(session.input_names):
        return session.feed(inputs, cast=True)  # which says what is wrong
    inputs = in_order(inputs, model)
    named = dict(zip(input_names(model, inputs), inputs.tensors, strict=True))
    return session.feed(Inputs((), named), cast=True)


def _batches(
    data: Data | None, example_inputs: ExampleInputs | None, model: nn.Module, session: OnnxSession
) -> Iterator[tuple[Inputs, NDArray[np.int64] | None]]:
    batches: Iterable[Any]
    if data is None:
        found = Inputs.of(example_inputs) if example_inputs is not None else _recorded(model)
        yield found, None
        return
    if isinstance(data, (torch.Tensor, Mapping, tuple, Inputs)):
        batches = [data]
    elif isinstance(data, Iterable):
        batches = data
    else:
        raise InputError("data is an iterable of batches, or one example", found=type(data).__name__)
    for batch in batches:
        inputs = arguments_of(batch, model, session.input_names)
        yield inputs, _targets(batch, inputs)


def _recorded(model: nn.Module) -> Inputs:
    from torchtrim.edits.history import recorded_inputs

    found = recorded_inputs(model)
    if found is None:
        raise InputError("the file is compared on inputs, and there are none", hint="pass data or example_inputs")
    return found


def _targets(batch: Any, inputs: Inputs) -> NDArray[np.int64] | None:
    """The classes in a batch: whole numbers, one a row, that the model does not take itself."""
    found: Any = None
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _LABELS if name in batch), None)
    elif isinstance(batch, (tuple, list)) and len(batch) == 2:
        found = batch[1]
    if not isinstance(found, torch.Tensor) or any(found is tensor for tensor in inputs.tensors):
        return None
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype is torch.bool)
    if not whole or found.dim() != 1 or len(found) != inputs.batch:
        return None
    return np.asarray(found.detach().cpu().numpy(), dtype=np.int64)


def _portions(
    inputs: Inputs, targets: NDArray[np.int64] | None, size: int
) -> Iterator[tuple[Inputs, NDArray[np.int64] | None]]:
    rows = inputs.batch
    if rows <= size:
        own = targets
        if own is not None and rows < size:
            own = np.concatenate([own, np.full(size - rows, -1, dtype=np.int64)])
        yield (inputs if rows == size else inputs.with_batch(size)), own
        return
    for start in range(0, rows - size + 1, size):
        rows_of = slice(start, start + size)

        def take(tensor: torch.Tensor, rows_of: slice = rows_of) -> torch.Tensor:
            return tensor[rows_of] if tensor.dim() and tensor.shape[0] == rows else tensor

        yield inputs.map(take), None if targets is None else targets[rows_of]


def _other_sizes(inputs: Inputs, model: nn.Module, session: OnnxSession, graph: onnx.GraphProto) -> Iterator[Inputs]:
    """The inputs cropped in every open dimension, and wrapped around in the first one."""
    ordered = in_order(inputs, model)
    names = input_names(model, ordered)
    if set(names) != set(session.input_names):
        names = session.input_names
    described = {value.name: value.type.tensor_type.shape.dim for value in graph.input}
    batch = {dims[0].dim_param for dims in described.values() if dims and dims[0].dim_param}
    places: list[dict[int, str]] = []  # of each tensor, which of its dimensions are open
    sizes: dict[str, int] = {}
    for name, tensor in zip(names, ordered.tensors, strict=True):
        symbols = {place: dim.dim_param for place, dim in enumerate(described[name]) if dim.dim_param and place}
        places.append({place: symbol for place, symbol in symbols.items() if symbol not in batch})
        sizes |= {symbol: int(tensor.shape[place]) for place, symbol in places[-1].items()}
    if not sizes:
        return
    first = next(iter(sizes))
    for wanted in (
        {symbol: _smaller(size) for symbol, size in sizes.items()},
        {**sizes, first: _larger(sizes[first])},
    ):
        if wanted != sizes:
            yield _resized(ordered, places, wanted)


def _smaller(size: int) -> int:
    # Networks on pictures halve them five times; a size that 32 does not divide often is refused.
    return max(1, size // 2) if size < 64 else max(32, size * 3 // 4 // 32 * 32)


def _larger(size: int) -> int:
    return size + max(1, size // 2) if size < 64 else size + 32


def _resized(inputs: Inputs, places: list[dict[int, str]], sizes: Mapping[str, int]) -> Inputs:
    own = iter(places)

    def resize(tensor: torch.Tensor) -> torch.Tensor:
        for place, symbol in next(own).items():
            kept = torch.arange(sizes[symbol], device=tensor.device) % tensor.shape[place]
            tensor = tensor.index_select(place, kept)
        return tensor

    return inputs.map(resize)
