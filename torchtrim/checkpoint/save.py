"""`save`: a model as one safe file."""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from typing import Any

import torch
from torch import nn

from torchtrim import __version__
from torchtrim.bench.size import zstandard
from torchtrim.checkpoint.container import place_of
from torchtrim.checkpoint.container_write import write
from torchtrim.checkpoint.document import Document, FactoryPart, WeightsPart, weights_in
from torchtrim.checkpoint.kinds import kinds_of
from torchtrim.checkpoint.optimizer import described
from torchtrim.checkpoint.origin import Factory, remembered
from torchtrim.checkpoint.plain import to_plain
from torchtrim.checkpoint.rebuild import rebuilt
from torchtrim.checkpoint.settings import compare, differences, loose_tensors, modes_of, plain_attributes, unwritten
from torchtrim.checkpoint.tensors import state_of
from torchtrim.checkpoint.zoo import guesses
from torchtrim.edits.history import history
from torchtrim.errors import CheckpointError, CheckpointMismatch, TorchTrimError, TorchTrimWarning
from torchtrim.graph.copying import unwrap
from torchtrim.graph.held import is_held


def save(
    net: nn.Module,
    path: str | os.PathLike[str],
    *,
    factory: Any = None,
    optimizer: torch.optim.Optimizer | None = None,
    overwrite: bool = True,
    compress: str | None = None,
) -> None:
    """Save a model as one file that holds no code: weights, the records of its edits, and the name of what made it.

    The file is in the safetensors format: parameters and buffers (those too that no `state_dict` has), each once, in
    their own types; the tensors of the records; and, as JSON in the header, the history, what is tied, what takes no
    gradient, the training flags, what `freeze` holds, and plain attributes set by hand (a dropout's `p`). Without a
    factory all plain attributes are written, and enough of the code to notice another model at `load`. Not kept:
    gradients, the random state, hooks, and attributes set by hand that are other objects (a warning says where there
    are some of these two).

    Before anything is written the model is made again from `factory` and its history, without weights, and compared:
    names, classes, shapes, the forwards of opened modules. The file is written beside its place, flushed to the disk,
    and put there in one step, so that a crash leaves the old file or the new one.

    Args:
        net: The model. It is left as it was.
        path: The file to write; by custom it ends in `.trim`.
        factory: What makes the model as it was before the edits: `"timm:resnet18"`, `"torchvision:resnet18"`, one of
            these with keyword arguments, `("timm:resnet18", {"num_classes": 10})`, or a function or class of a module
            of yours, by itself or as `"package.module:function"`. By default what `load_model` or `load` wrote on the
            model; else timm's own configuration is asked, and believed where it gives the same model. Where nothing is
            known, or for `False`, the file is written without, and `load` needs `model=`.
        optimizer: An optimizer of the model's parameters whose state is to be kept too.
        overwrite: Replace a file that is there.
        compress: `"zstd"` packs the tensors without loss: zeros, shared values and the exponents of floats take little
            room then, so that a network with nine weights of ten at zero takes about a tenth, one with 16 values a
            tensor about an eighth, a dense one about 0.84. `load` sees by itself which form a file has.

    Raises:
        CheckpointMismatch: The model is not what `factory` and its history make: it was changed by hand, or the
            factory is another's. The message names the first difference. No file is touched.
        CheckpointError: Something in it cannot be written, or the file cannot; or `compress` is unknown.
        MissingDependency: It is to be compressed, and zstandard is not installed.

    Example:
        >>> import tempfile, torchtrim as tt
        >>> net = tt.cut(nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)), torch.zeros(1, 4), after="1")
        >>> path = tempfile.mkdtemp() + "/net.trim"
        >>> save(net, path)
        >>> again = tt.load(path, model=nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2)))
        >>> x = torch.randn(5, 4)
        >>> bool((again(x) == net(x)).all()), tt.history(again) == tt.history(net)
        (True, True)
    """
    net, place = unwrap(net), place_of(path)
    if compress not in (None, "zstd"):
        raise CheckpointError("no such compression", path="compress", found=repr(compress), expected='"zstd" or None')
    if compress is not None:
        zstandard()
    if not overwrite and place.exists():
        raise CheckpointError("there is a file already", path=place, hint="overwrite=True")
    if not place.parent.is_dir():
        raise CheckpointError("there is no such folder", path=place.parent)
    _refuse_extra_state(net)
    state = state_of(net)
    made, reference = _origin(net, factory)
    _warn_of_hooks(net, reference)
    if reference is not None:
        _warn_of_lost(unwritten(net, reference))
    settings = plain_attributes(net) if reference is None else differences(net, reference)
    loose = loose_tensors(net, reference)
    part, moments = described(optimizer, net) if optimizer is not None else (None, {})
    past = history(net)
    records = weights_in(past)
    document = Document(
        torchtrim=__version__,
        versions=_versions(made),
        factory=None if made is None else FactoryPart(name=made.name, arguments=to_plain(made.arguments)),
        history=past.to_dict(weights=False),
        weights=[WeightsPart(at=at, names=list(held)) for at, held in records],
        parameters=sorted(state.parameters),
        tied=state.tied,
        shared=state.shared,
        strides=state.strides,
        flags=state.flags,
        training=modes_of(net),
        settings={name: {key: to_plain(value) for key, value in held.items()} for name, held in settings.items()},
        loose=sorted(loose),
        optimizer=part,
        held=[name for name, module in net.named_modules() if is_held(module)],
        kinds=kinds_of(net) if reference is None else {},
    )
    tensors = {f"model.{name}": tensor for name, tensor in state.tensors.items()}
    for number, (_, held) in enumerate(records):
        tensors |= {f"edits.{number}.{name}": tensor for name, tensor in held.items()}
    tensors |= {f"loose.{name}": tensor for name, tensor in loose.items()}
    tensors |= {f"optimizer.{name}": tensor for name, tensor in moments.items()}
    write(place, document.text(), tensors, packed=compress is not None)


def _origin(net: nn.Module, given: Any) -> tuple[Factory | None, nn.Module | None]:
    """What makes the model, and the model that it made; nothing where that is not known."""
    if given is False:
        return None, None
    known = Factory.of(given) if given is not None else remembered(net)
    if known is not None:
        return known, _verified(net, known)
    for name, arguments in guesses(net):
        guess = Factory(name, arguments)
        try:
            return guess, _verified(net, guess)
        except TorchTrimError:
            continue  # it was a guess: without one, the caller of `load` gives the model
    return None, None


def _verified(net: nn.Module, factory: Factory) -> nn.Module:
    # The classes that are in the model are the user's own choice, and so is the factory.
    trusted: dict[str, Any] = {
        f"{type(each).__module__}:{type(each).__qualname__}": type(each) for each in net.modules()
    }
    if not factory.of_a_zoo:
        trusted[factory.name] = factory.imported()
    found = rebuilt(factory, history(net), trusted=trusted, limit=None)
    try:
        compare(net, found)
    except CheckpointMismatch as error:
        raise CheckpointMismatch(
            f"the model is not what its factory and its history make: {error.path or 'it'} {error.message}",
            path=factory.name,
            found=error.found,
            expected=error.expected,
            hint=error.hint
            or "make the change as an edit (tt.replace, tt.insert), or factory=False, then load(model=)",
        ) from error
    return found


def _versions(factory: Factory | None) -> dict[str, str]:
    packages = {"torch"} | ({factory.name.partition(":")[0].partition(".")[0]} if factory is not None else set())
    found = {name: _version(name) for name in sorted(packages)}
    return {name: version for name, version in found.items() if version is not None}


def _version(package: str) -> str | None:
    """That of the distribution of the same name; only where there is none are all that are installed looked through."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        known = importlib.metadata.packages_distributions().get(package)
        return None if known is None else importlib.metadata.version(known[0])


def _refuse_extra_state(net: nn.Module) -> None:
    for name, module in net.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            raise CheckpointError(
                "keeps state that is not tensors (get_extra_state), which the file cannot hold",
                path=name or type(net).__name__,
                found=type(module).__name__,
            )


def _warn_of_hooks(net: nn.Module, reference: nn.Module | None) -> None:
    """Say which hooks a loaded model will not have."""
    others = {} if reference is None else {name: _hooks(module) for name, module in reference.named_modules()}
    lost = [name or "the model itself" for name, module in net.named_modules() if _hooks(module) > others.get(name, 0)]
    if lost:
        warnings.warn(TorchTrimWarning(f"hooks are not saved: those of {', '.join(lost[:5])}"), stacklevel=3)


def _warn_of_lost(attributes: list[str]) -> None:
    if attributes:
        shown = ", ".join(attributes[:5])
        warnings.warn(TorchTrimWarning(f"attributes that are no plain data are not saved: {shown}"), stacklevel=3)


def _hooks(module: nn.Module) -> int:
    held = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return sum(map(len, held))
