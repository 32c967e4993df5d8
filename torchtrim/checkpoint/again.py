"""Models of a zoo that were made again before in this process: the next load of the same copies one of them.

Making a model and doing its edits again takes longer than reading its weights. What comes of it is decided by the
name and arguments of the factory, the records and torch's defaults; so a few results are kept, without weights.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from torchtrim.checkpoint.container import bytes_of
from torchtrim.checkpoint.document import weights_in
from torchtrim.checkpoint.hollow import emptied, held_tensors
from torchtrim.checkpoint.origin import Factory
from torchtrim.checkpoint.plain import to_plain
from torchtrim.checkpoint.rebuild import rebuilt
from torchtrim.checkpoint.zoo import settled
from torchtrim.edits.history import History
from torchtrim.edits.module_spec import Trusted
from torchtrim.graph.opened import OpenedModule, with_own_graphs

_COUNT = 8
_BYTES = 2**24  # of tensors that are neither parameters nor buffers, which a copy has to have of its own


@dataclass(frozen=True)
class _Made:
    """A model without weights, which nobody else holds.

    Attributes:
        model: The model.
        limit: The bound on its tensors that it was made under.
        code: The forward of each class in it.
    """

    model: nn.Module
    limit: int | None
    code: dict[type[nn.Module], Any]


_made: OrderedDict[Hashable, _Made] = OrderedDict()
_lock = threading.Lock()


def made_again(start: Factory | nn.Module, past: History, *, trusted: Trusted, limit: int | None) -> nn.Module:
    """As `rebuilt`; where a zoo's factory and the same records gave a model before, a copy of that.

    Code of the user's is called each time: where anything is `trusted`, where a model of the zoo was registered by
    others, and where a class of the model or its forward was replaced since, nothing is remembered.

    Raises:
        CheckpointError: As `rebuilt` does.
    """
    key = None if trusted or not isinstance(start, Factory) else _key(start, past)
    if key is None:
        return rebuilt(start, past, trusted=trusted, limit=limit)
    with _lock:
        found = _made.get(key)
        if found is not None:
            _made.move_to_end(key)
    if found is not None and _is_within(found.limit, limit) and found.code == _code_of(found.model):
        return with_own_graphs(found.model)
    net = rebuilt(start, past, trusted=trusted, limit=limit)
    code = _code_of(net)
    if code is not None and _can_be_kept(net):
        kept = with_own_graphs(net, compiled=False)
        emptied(kept, buffers=True)
        with _lock:
            _made[key] = _Made(kept, limit, code)
            while len(_made) > _COUNT:
                _made.popitem(last=False)
    return net


def forget() -> None:
    """Drop what is remembered."""
    with _lock:
        _made.clear()


def _key(start: Factory, past: History) -> Hashable | None:
    """Everything that decides what comes of it; `None` where code of the user's has a part in that."""
    settings = settled(start.name) if start.of_a_zoo else None
    if settings is None:
        return None
    digest = hashlib.sha256()
    records = [edit.to_dict(weights=False) for edit in past.edits]
    digest.update(json.dumps([to_plain(start.arguments), past.inputs, records]).encode())
    for at, held in weights_in(past):
        for name, tensor in held.items():
            digest.update(f"{at} {name} {tensor.dtype} {list(tensor.shape)}".encode())
            digest.update(bytes_of(tensor.detach().cpu().contiguous()))
    return start.name, settings, digest.digest(), torch.get_default_dtype(), torch.get_default_device()


def _is_within(limit: int | None, other: int | None) -> bool:
    """Whether what was made under one bound would have been under another."""
    return other is None or (limit is not None and limit <= other)


def _code_of(model: nn.Module) -> dict[type[nn.Module], Any] | None:
    """The classes of a model with their forwards; `None` where one is no longer what its module has by that name."""
    found: dict[type[nn.Module], Any] = {}
    for kind in {type(module) for module in model.modules() if not isinstance(module, OpenedModule)}:
        if getattr(sys.modules.get(kind.__module__), kind.__qualname__, None) is not kind:
            return None
        found[kind] = kind.forward
    return found


def _can_be_kept(model: nn.Module) -> bool:
    """Whether a structural copy is apart from it, and takes little memory."""
    if any(
        isinstance(module, (fx.GraphModule, torch.jit.ScriptModule)) and not isinstance(module, OpenedModule)
        for module in model.modules()
    ):
        return False
    members = {id(held) for held in (*model.parameters(), *model.buffers())}
    others = [held for held in held_tensors(model) if id(held) not in members]
    return sum(held.numel() * held.dtype.itemsize for held in others) <= _BYTES
