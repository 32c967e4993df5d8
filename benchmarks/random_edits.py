"""Random sequences of edits on small models: each edit is refused and changes nothing, or gives a model that works.

A model works when it runs forward and backward in both modes, and when what is saved and loaded, and what its history
does again on a fresh model, are the same to the bit.

    python benchmarks/random_edits.py --sequences 1000
"""

from __future__ import annotations

import copy
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from random_models import MODELS, make
from torch import nn
from torch.utils import _pytree as pytree

import torchtrim as tt
from torchtrim.graph.inputs import Inputs

LONGEST = 4


class Wrong(Exception):
    """What must never happen."""


@dataclass
class Told:
    """What a sequence did."""

    model: str
    done: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def sequence(draw: random.Random, kinds: tuple[str, ...] | None = None) -> Told:
    """One model, some edits.

    Raises:
        Wrong: Something that must never happen; says what was done before it.
    """
    name = draw.choice(sorted(MODELS))
    model, inputs = make(name)
    told = Told(name)
    net = model
    for _ in range(draw.randint(1, LONGEST)):
        kind = draw.choice(kinds or tuple(EDITS))
        given = _inputs_of(net, inputs)
        try:
            change, text = EDITS[kind](draw, net, given)
        except tt.TorchTrimError as error:  # the model cannot even be read any more
            raise Wrong(f"{told}: tt.trace refuses: {error}") from error
        before = _picture(net)
        seed = draw.randrange(1 << 30)
        try:
            torch.manual_seed(seed)
            edited = change()
        except tt.TorchTrimError as error:
            told.refused.append(f"{text}: {error}")
            _same(before, _picture(net), f"{told}: {text} was refused and changed the model")
            if not str(error).strip() or type(error) is tt.TorchTrimError:
                raise Wrong(f"{told}: {text}: an error that says nothing") from error
            continue
        except Exception as error:
            raise Wrong(f"{told}: {text}: {type(error).__name__}: {error}") from error
        _same(before, _picture(net), f"{told}: {text} changed the model it was given")
        told.done.append(text)
        net = edited
        _runs(net, inputs, told)
    if told.done:
        _replays(net, make(name)[0], inputs, told)
        _saves(net, make(name)[0], inputs, told)
    return told


def _inputs_of(net: nn.Module, inputs: Any) -> Any:
    return inputs if not tt.history(net).entries else None


def _places(net: nn.Module, inputs: Any) -> list[str]:
    return [node.address for node in tt.trace(net, inputs, check=False) if node.op != "attribute"]


def _cut(draw: random.Random, net: nn.Module, inputs: Any) -> Any:
    place = draw.choice(_places(net, inputs))
    return lambda: tt.cut(net, inputs, after=place), f"cut(after={place!r})"


def _remove(draw: random.Random, net: nn.Module, inputs: Any) -> Any:
    modules = [name for name, _ in net.named_modules() if name]
    count = draw.choice([1, 1, 1, 2])
    places = [draw.choice(modules + _places(net, inputs)) for _ in range(count)]
    options: dict[str, Any] = draw.choice([{}, {}, {"adapter": None}, {"branch": True}])
    return lambda: tt.remove(net, inputs, places, **options), f"remove({places}, {options})"


def _module(draw: random.Random) -> nn.Module:
    torch.manual_seed(draw.randrange(1 << 30))
    width = draw.choice([5, 6, 8, 12, 16])
    made: list[Callable[[], nn.Module]] = [
        nn.Identity,
        nn.ReLU,
        lambda: nn.ReLU(inplace=True),
        lambda: nn.Dropout(0.2),
        lambda: nn.BatchNorm2d(width),
        lambda: nn.LayerNorm(width),
        lambda: nn.Linear(width, width),
        lambda: nn.Conv2d(width, width, 3, padding=1),
        lambda: nn.Sequential(nn.Linear(width, 4), nn.Tanh(), nn.Linear(4, width)),
        nn.Flatten,
    ]
    return draw.choice(made)()


def _insert(draw: random.Random, net: nn.Module, inputs: Any) -> Any:
    place, module = draw.choice(_places(net, inputs)), _module(draw)
    where = draw.choice(["after", "before"])
    return lambda: tt.insert(net, inputs, module, **{where: place}), f"insert({module}, {where}={place!r})"


def _replace(draw: random.Random, net: nn.Module, inputs: Any) -> Any:
    types = sorted({type(each) for each in net.modules() if not each._modules}, key=lambda each: each.__name__)
    what = draw.choice([draw.choice(types) if types else "*", draw.choice(_places(net, inputs))])
    module = _module(draw)
    return lambda: tt.replace(net, inputs, what, module), f"replace({what!r}, {module})"


def _delete(draw: random.Random, net: nn.Module, inputs: Any) -> Any:
    layers = [name for name, each in net.named_modules() if getattr(each, "weight", None) is not None and name]
    path = draw.choice(layers or ["nothing"])
    channels = sorted(draw.sample(range(8), draw.randint(1, 4)))
    return lambda: tt.delete_channels(net, inputs, path, channels), f"delete_channels({path!r}, {channels})"


def _head(draw: random.Random, net: nn.Module, inputs: Any) -> Any:
    count, hidden = draw.randint(2, 5), draw.choice([(), (7,)])
    return lambda: tt.attach_head(net, inputs, count, hidden=hidden), f"attach_head({count}, hidden={hidden})"


def _fuse(draw: random.Random, net: nn.Module, inputs: Any) -> Any:
    return lambda: tt.fuse_batchnorm(net, inputs), "fuse_batchnorm()"


EDITS: dict[str, Callable[[random.Random, nn.Module, Any], Any]] = {
    "remove": _remove,
    "insert": _insert,
    "replace": _replace,
    "delete_channels": _delete,
    "cut": _cut,
    "attach_head": _head,
    "fuse_batchnorm": _fuse,
}


def _picture(net: nn.Module) -> dict[str, Any]:
    """All that must stay as it was."""
    found: dict[str, Any] = {"repr": repr(net), "history": len(tt.history(net).entries)}
    found |= {f"mode {name}": module.training for name, module in net.named_modules()}
    for name, held in (*net.named_parameters(), *net.named_buffers()):
        found[f"values {name}"] = held.detach().clone()
        found[f"object {name}"] = (id(held), held.requires_grad, held.grad is None)
    return found


def _same(before: dict[str, Any], after: dict[str, Any], what: str) -> None:
    if list(before) != list(after):
        raise Wrong(f"{what}: {set(before) ^ set(after)}")
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, torch.Tensor) else value == after[name]
        if not same:
            raise Wrong(f"{what}: {name}")


def _outputs(net: nn.Module, inputs: Any, training: bool) -> list[torch.Tensor]:
    torch.manual_seed(1)
    net.train(training)
    return [leaf for leaf in pytree.tree_leaves(Inputs.of(inputs).fresh().call(net)) if isinstance(leaf, torch.Tensor)]


def _runs(net: nn.Module, inputs: Any, told: Told) -> None:
    """Forward and backward in both modes, on a copy."""

    for training in (False, True):
        twin = copy.deepcopy(net)
        try:
            found = [leaf for leaf in _outputs(twin, inputs, training) if leaf.requires_grad]
            if found:
                torch.stack([leaf.sum() for leaf in found]).sum().backward()
        except Exception as error:
            raise Wrong(f"{told}: does not run, training={training}: {type(error).__name__}: {error}") from error
        if any(
            parameter.grad is not None and parameter.grad.shape != parameter.shape for parameter in twin.parameters()
        ):
            raise Wrong(f"{told}: a gradient of another shape")


def _equal(one: nn.Module, other: nn.Module, inputs: Any, what: str) -> None:
    left, right = one.state_dict(), other.state_dict()
    if list(left) != list(right):
        raise Wrong(f"{what}: keys {set(left) ^ set(right) or 'in another order'}")
    for name, value in left.items():
        if value.dtype != right[name].dtype or not torch.equal(value, right[name]):
            raise Wrong(f"{what}: {name} differs")
    modes = [[module.training for module in each.modules()] for each in (one, other)]
    if modes[0] != modes[1]:
        raise Wrong(f"{what}: other modes")
    grads = [[held.requires_grad for held in each.parameters()] for each in (one, other)]
    if grads[0] != grads[1]:
        raise Wrong(f"{what}: requires_grad differs")

    for training in (False, True):
        pair = [_outputs(copy.deepcopy(each), inputs, training) for each in (one, other)]
        if len(pair[0]) != len(pair[1]) or not all(map(_bits, *pair)):
            raise Wrong(f"{what}: outputs differ, training={training}")


def _bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def _replays(net: nn.Module, fresh: nn.Module, inputs: Any, told: Told) -> None:
    from torchtrim.edits.edit import from_json

    records = from_json(tt.history(net).edits_as("json"))
    if records != list(tt.history(net).edits):
        raise Wrong(f"{told}: the records are not the same after JSON")
    for check in (True, False):
        try:
            again = tt.apply(fresh, inputs, records, check=check)
        except Exception as error:
            raise Wrong(f"{told}: the history does not replay: {type(error).__name__}: {error}") from error
        _equal(net, again, inputs, f"{told}: replayed, check={check}")


def _saves(net: nn.Module, fresh: nn.Module, inputs: Any, told: Told) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "net.trim"
        try:
            tt.save(net, path)
            again = tt.load(path, model=fresh)
        except Exception as error:
            raise Wrong(f"{told}: not saved and loaded: {type(error).__name__}: {error}") from error
        _equal(net, again, inputs, f"{told}: loaded")
        if tt.history(again).edits != tt.history(net).edits:
            raise Wrong(f"{told}: the history is another after loading")


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", nargs="*", choices=sorted(EDITS), default=None)
    parser.add_argument("--keep-going", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    wrong = 0
    began = time.monotonic()
    for seed in range(options.seed, options.seed + options.sequences):
        try:
            told = sequence(random.Random(seed), tuple(options.kinds) if options.kinds else None)
        except Wrong as error:
            wrong += 1
            print(f"seed {seed}: {error}", flush=True)
            if not options.keep_going:
                sys.exit(1)
            continue
        done.update(text.partition("(")[0] for text in told.done)
        refused.update(text.partition("(")[0] for text in told.refused)
    print(f"{options.sequences} sequences in {time.monotonic() - began:.0f} s, {wrong} wrong")
    print("done:   ", dict(done))
    print("refused:", dict(refused))
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
