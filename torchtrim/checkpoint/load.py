"""`load`: the model that `save` wrote, to the bit, without running code from the file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.checkpoint import container
from torchtrim.checkpoint.again import made_again
from torchtrim.checkpoint.container import Container, place_of
from torchtrim.checkpoint.document import Document, history_with
from torchtrim.checkpoint.follow import completed
from torchtrim.checkpoint.kinds import compare_kinds
from torchtrim.checkpoint.optimizer import check, restore, tensor_names
from torchtrim.checkpoint.origin import Factory, remember, write_history
from torchtrim.checkpoint.plain import from_plain
from torchtrim.checkpoint.rebuild import placed
from torchtrim.checkpoint.settings import set_loose, set_modes, set_plain
from torchtrim.checkpoint.tensors import State, check_shapes, is_dense, put
from torchtrim.edits.history import History
from torchtrim.edits.module_spec import Trusted
from torchtrim.edits.weights import Weights
from torchtrim.errors import CheckpointDamaged, CheckpointError, CheckpointMismatch
from torchtrim.graph.copying import unwrap


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    trusted: Trusted = (),
    optimizer: torch.optim.Optimizer | None = None,
    device: str | torch.device = "cpu",
) -> nn.Module:
    """Load a model that `save` wrote: parameters, buffers, training flags and history are those that were saved.

    The model is made again by its factory, its parameters taking no memory, the edits are done on it again, and each
    tensor is read straight into its place. Nothing is unpickled. The only code that is called is that of the factory,
    of a class named in a record, and only where these are of torch, timm or torchvision, or named in `trusted`.
    A process remembers the last few models that it made so from timm and torchvision, without their weights: the next
    load of the same edits copies one, unless something is `trusted`, or a class in it has another forward since.

    Args:
        path: The file.
        model: The model as it was before the edits (or after some of them), for a file without a factory, or instead
            of it. Its class need not be the one that was saved; its names, its shapes and the layers of `torch.nn` in
            it must. It is left as it was, whatever happens; its weights are not used, nor are numbers and texts that
            the file has too (a dropout's `p`). A warning says where an opened forward makes other calls than the one
            that was saved.
        trusted: Names of factories, and of classes of inserted modules, that may be called:
            `"package.module:function"`; or a dict of them with the functions to call instead.
        optimizer: An optimizer of the class that was saved: it is given the loaded model's parameters, in the groups
            and with the state that were saved. What it held is dropped, so it can be made of any parameters.
        device: Where the tensors go.

    Raises:
        CheckpointDamaged: Not such a file, or one that was cut short or altered.
        CheckpointTooNew: Its format is a later one, or an edit is of a later version.
        CheckpointUntrusted: Its factory is neither of timm or torchvision nor in `trusted`, or a class of a module in
            it is not of these, of torch or of torchtrim, nor in `trusted`.
        CheckpointMismatch: What the factory (or `model`) and the edits give is not the model that was saved.
        CheckpointError: It cannot be opened, or has no factory and no `model` was given.
        MissingDependency: It is compressed, and zstandard is not installed.

    Example:
        >>> import tempfile, torchtrim as tt
        >>> path = tempfile.mkdtemp() + "/net.trim"
        >>> tt.save(nn.Linear(4, 3), path)
        >>> tt.load(path, model=nn.Linear(4, 3))
        Linear(in_features=4, out_features=3, bias=True)
    """
    place, where = place_of(path), _device(device)
    file = container.read(place)
    with _named(place):
        return _loaded(file, Document.of(place, file.text), model, trusted, optimizer, where)


def read_history(path: str | os.PathLike[str]) -> History:
    """What was done to the model in a file, without making the model.

    Raises:
        CheckpointDamaged: As for `load`.
        CheckpointTooNew: As for `load`.
        CheckpointError: It cannot be opened.
    """
    place = place_of(path)
    file = container.read(place)
    with _named(place):
        document = Document.of(place, file.text)
        return _history(file, document, _names(file, document))


@contextmanager
def _named(place: Path) -> Iterator[None]:
    """Errors name the file too: a program may load several."""
    try:
        yield
    except RecursionError as error:
        raise CheckpointDamaged("its description is nested too deep", path=place) from error
    except CheckpointError as error:
        if error.path is not None and str(place) in str(error.path):
            raise
        message = error.message if error.path is None else f"{error.path}: {error.message}"
        told = type(error)(message, path=place, found=error.found, expected=error.expected, hint=error.hint)
        raise told from error


def _loaded(
    file: Container,
    document: Document,
    model: nn.Module | None,
    trusted: Trusted,
    optimizer: torch.optim.Optimizer | None,
    device: torch.device,
) -> nn.Module:
    part = check(document.optimizer, optimizer) if optimizer is not None else None
    names = _names(file, document)
    past = _history(file, document, names)
    factory = _factory(document)
    start = unwrap(model) if model is not None else factory
    if start is None:
        raise CheckpointError(
            "the file does not say what makes the model",
            hint=f"load(path, model=...) with a {past.origin} as it was before the edits",
        )
    net = _rebuilt(start, past, trusted, file, document)
    # Before what is packed takes room: it has that of the model which was asked for, and no more.
    check_shapes(net, {name.removeprefix("model."): file.entries[name].shape for name in names["model"]})
    if optimizer is None:
        file.verify(names["optimizer"])
    read = file.tensors([*names["model"], *names["loose"]])
    compare_kinds(net, document.kinds)
    state = _state(document, read, device)
    put(net, state)
    set_loose(net, {name.removeprefix("loose."): read[name].to(device) for name in names["loose"]})
    set_plain(net, _settings(document.settings))
    set_modes(net, document.training, document.held)
    write_history(net, past)
    if factory is not None:
        remember(net, factory)
    if optimizer is not None and part is not None:
        moments = file.tensors(names["optimizer"])
        restore(part, optimizer, net, {name.removeprefix("optimizer."): held for name, held in moments.items()})
    return net


def _history(file: Container, document: Document, names: dict[str, list[str]]) -> History:
    records = file.tensors(names["edits"])
    weights = [
        (list(item.at), Weights({name: records[f"edits.{number}.{name}"] for name in item.names}))
        for number, item in enumerate(document.weights)
    ]
    return completed(history_with(file.path, document, weights), document, file)


def _rebuilt(
    start: Factory | nn.Module, past: History, trusted: Trusted, file: Container, document: Document
) -> nn.Module:
    # What was there before pruning may be larger than what is left; not without bound.
    limit = 2**30 + 16 * file.size
    try:
        return made_again(start, past, trusted=trusted, limit=limit)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(
            error.message,
            path=error.path,
            found=error.found,
            expected=error.expected,
            hint=error.hint or f"the versions it was written with: {_written(document)}",
        ) from error


def _written(document: Document) -> str:
    return ", ".join(
        f"{name} {version}" for name, version in {"torchtrim": document.torchtrim, **document.versions}.items()
    )


def _names(file: Container, document: Document) -> dict[str, list[str]]:
    """The tensors by what they are for, each accounted for."""
    found: dict[str, list[str]] = {"model": [], "edits": [], "loose": [], "optimizer": []}
    for name in file.entries:
        kind = name.partition(".")[0]
        if kind not in found:
            raise CheckpointDamaged("holds a tensor that is for nothing", path=file.path, found=name)
        found[kind].append(name)
    edits = [f"edits.{number}.{name}" for number, item in enumerate(document.weights) for name in item.names]
    loose = [f"loose.{name}" for name in document.loose]
    optimizer = [f"optimizer.{name}" for name in tensor_names(document.optimizer)]
    for kind, expected in (("edits", edits), ("loose", loose), ("optimizer", optimizer)):
        if sorted(found[kind]) != sorted(expected):
            raise CheckpointDamaged(f"its tensors under {kind!r} are not those its description lists", path=file.path)
    return found


def _factory(document: Document) -> Factory | None:
    if document.factory is None:
        return None
    arguments = from_plain(document.factory.arguments)
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise CheckpointDamaged("its factory's arguments are not given by name", path=document.factory.name)
    return Factory(document.factory.name, arguments)


def _state(document: Document, read: dict[str, torch.Tensor], device: torch.device) -> State:
    tensors = {name.removeprefix("model."): held for name, held in read.items() if name.startswith("model.")}
    for name, other in (*document.shared.items(), *document.tied.items()):
        if name in tensors or (other not in tensors and other not in document.shared):
            raise CheckpointDamaged("a name of a tensor stands for one that is not in the file", path=name, found=other)
    for name, other in document.shared.items():
        if other not in tensors:
            raise CheckpointDamaged("a name of a tensor stands for one that is not in the file", path=name, found=other)
    for name, strides in document.strides.items():
        right = name in tensors and len(strides) == tensors[name].dim() and min(strides, default=0) >= 0
        if not right or not is_dense(tuple(tensors[name].shape), tuple(strides)):
            raise CheckpointDamaged("no such order of a tensor in memory", path=name, found=str(strides)[:60])
    tensors = {name: placed(held, document.strides.get(name), device) for name, held in tensors.items()}
    return State(
        tensors,
        set(document.parameters),
        document.tied,
        document.shared,
        document.strides,
        document.flags,
    )


def _settings(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {path: {name: from_plain(value) for name, value in held.items()} for path, held in settings.items()}


def _device(given: str | torch.device) -> torch.device:
    try:
        device = torch.device(given)
    except RuntimeError as error:
        raise CheckpointError("no such device", found=given, expected="cpu, cuda, cuda:1, mps, ...") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CheckpointError("there is no such device here", found=str(device), hint='device="cpu"')
    return device
