"""Random networks, pruned: what comes back must equal the original with zeros at the channels that went.

Each network is a chain of random layers (`random_layers.py`, `random_sequences.py`, `random_weights.py`) with a random
head. It is pruned by random settings, sometimes after another edit; or channels of one layer are deleted. The result
has to run forward and backward in both modes at other batch sizes, to hold no number that is wrong, to be the same
to the bit when its history is done again and when it is saved and loaded; the model it was given has to stay as it was.

    python benchmarks/random_pruning.py --sequences 500 --keep-going
"""

from __future__ import annotations

import copy
import random
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import random_sequences
import random_weights
import torch
from random_edits import Wrong, _picture, _replays, _same, _saves
from random_layers import LAYERS
from torch import nn
from torch.utils import _pytree as pytree

import torchtrim as tt

__all__ = ["main", "network", "random_sequences", "random_weights", "sequence"]


@dataclass
class Told:
    """What a sequence did."""

    layers: list[str]
    done: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)


class Network(nn.Module):
    """A stem, random layers, and a head of one of several kinds."""

    def __init__(self, draw: random.Random, names: tuple[str, ...]) -> None:
        super().__init__()
        wide = 4 * draw.randint(2, 5)
        self.words = draw.random() < 0.2
        self.stem = nn.Embedding(11, wide) if self.words else nn.Conv2d(3, wide, 3, padding=1)
        layers, self.exact = [], True
        for name in names:
            layer, wide, exact = LAYERS[name](draw, wide)
            layers.append(layer)
            self.exact &= exact
        self.layers = nn.Sequential(*layers)
        self.kind = draw.choice(["pool", "flat", "two", "dict", "map"])
        self.head = nn.Linear(wide * (4 if self.kind == "flat" else 1), 5)
        self.other = nn.Conv2d(wide, 2, 1) if self.kind in ("two", "dict", "map") else None

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x).movedim(-1, 1).unflatten(2, (4, 4)) if self.words else self.stem(x)
        x = self.layers(x)
        if self.kind == "flat":
            return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(x, 2), 1))
        found = self.head(x.mean((2, 3)))
        if self.other is None:
            return found
        return {"all": found, "map": self.other(x)} if self.kind == "dict" else (found, self.other(x))


def network(seed: int, only: str | None = None) -> tuple[Network, torch.Tensor, list[str]]:
    """A random network, an input for it, and the names of its layers."""
    draw = random.Random(seed)
    names = tuple(draw.choice(sorted(LAYERS)) for _ in range(draw.randint(1, 4)))
    if only is not None:
        names = (only, *names[:1])
    torch.manual_seed(seed)
    net = Network(draw, names)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                if tensor is not None:
                    nn.init.uniform_(tensor, 0.5, 1.5)
    x = torch.randint(0, 11, (2, 16)) if net.words else torch.randn(2, 3, 8, 8)
    return net.train(draw.random() < 0.5), x, list(names)


def sequence(seed: int, only: str | None = None) -> Told:
    """One network, perhaps an edit, and a pruning.

    Raises:
        Wrong: Something that must never happen.
    """
    net, x, names = network(seed, only)
    draw = random.Random(-1 - seed)
    told = Told(names)
    for parameter in net.parameters():
        parameter.requires_grad_(draw.random() > 0.1)
    original, given = net, x
    if draw.random() < 0.25:
        net = _edited(draw, net, x, told)
        given = x if net is original else None
    for _ in range(draw.choice([1, 1, 2])):
        before, seed = _picture(net), draw.randrange(1 << 30)
        text, change = _pruning(draw, net, given) if draw.random() < 0.8 else _deletion(draw, net, given)
        try:
            torch.manual_seed(seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", tt.TorchTrimWarning)
                pruned = change()
        except tt.TorchTrimError as error:
            _same(before, _picture(net), f"{told}: {text} was refused and changed the model")
            if isinstance(error, tt.CheckFailed):
                raise Wrong(f"{told}: {text}: {error}") from error
            told.refused.append(f"{text}: {error}")
            continue
        except Exception as error:
            raise Wrong(f"{told}: {text}: {type(error).__name__}: {error}") from error
        _same(before, _picture(net), f"{told}: {text} changed the model it was given")
        told.done.append(text)
        _runs(pruned, x, told)
        _true(pruned, told)
        _told(net, pruned, told)
        if original.exact and net is original:
            _like_masked(net, pruned, x, told)
        net, given = pruned, None
    if told.done:
        for does in (_replays, _saves):
            does(net, copy.deepcopy(original), x, told)
    return told


def _edited(draw: random.Random, net: nn.Module, x: torch.Tensor, told: Told) -> nn.Module:
    """The network after another edit, which may open modules."""
    places = [node.address for node in tt.trace(net, x, check=False) if node.op != "attribute"]
    place = draw.choice(places)
    kind = draw.choice(["insert", "remove", "cut"])
    try:
        if kind == "insert":
            found = tt.insert(net, x, nn.Dropout(0.0), after=place)
        elif kind == "remove":
            found = tt.remove(net, x, draw.choice([name for name, _ in net.named_modules() if name]))
        else:
            found = tt.cut(net, x, after=place)
    except tt.TorchTrimError:
        return net
    with torch.no_grad():
        leaves = pytree.tree_leaves(copy.deepcopy(found)(x))
    if not all(isinstance(leaf, torch.Tensor) and leaf.shape[:1] == x.shape[:1] for leaf in leaves):
        return net
    told.done.append(f"{kind} {place}")
    return found


def _pruning(draw: random.Random, net: nn.Module, x: Any) -> tuple[str, Any]:
    options: dict[str, Any] = {
        "ratio": draw.choice([0.3, 0.5, 0.7]),
        "round_to": draw.choice([1, 1, 2, 4]),
        "scope": draw.choice(["uniform", "uniform", "global", "isomorphic"]),
        "importance": draw.choice(["magnitude", "random:3", "l1"]),
    }
    return f"prune_channels({options})", lambda: tt.prune_channels(net, x, **options)


def _deletion(draw: random.Random, net: nn.Module, x: Any) -> tuple[str, Any]:
    twin = copy.deepcopy(net).eval()
    layers = [name for name, each in twin.named_modules() if getattr(each, "weight", None) is not None and name]
    path = draw.choice(layers)
    size = twin.get_submodule(path).weight.shape[0]
    channels = sorted(draw.sample(range(size), draw.randint(1, max(size // 2, 1))))
    return f"delete_channels({path!r}, {channels})", lambda: tt.delete_channels(net, x, path, channels)


def _inputs(x: torch.Tensor, batch: int) -> torch.Tensor:
    return torch.cat([x] * batch)[:batch]


def _runs(net: nn.Module, x: torch.Tensor, told: Told) -> None:
    """Forward and backward in both modes, at other batch sizes."""
    for training in (False, True):
        for batch in (1, 3) if not training else (2, 3):
            twin = copy.deepcopy(net).train(training)
            try:
                found = pytree.tree_leaves(twin(_inputs(x, batch)))
                if any(leaf.requires_grad for leaf in found):
                    torch.stack([leaf.sum() for leaf in found]).sum().backward()
            except Exception as error:
                text = f"training={training}, batch {batch}: {type(error).__name__}: {error}"
                raise Wrong(f"{told}: does not run, {text}") from error
            if any(leaf.shape[0] != batch for leaf in found):
                raise Wrong(f"{told}: another batch size comes out")


def _true(net: nn.Module, told: Told) -> None:
    """What modules of torch say of their widths is so."""
    net = copy.deepcopy(net).eval()  # a weight that is computed may change what it is computed from
    for path, module in net.named_modules():
        said: dict[str, Any] = {}
        weight = getattr(module, "weight_orig", getattr(module, "weight", None))
        if isinstance(module, nn.Linear):
            said = {"out_features": weight.shape[0], "in_features": weight.shape[1]}
        elif isinstance(module, nn.modules.conv._ConvNd):
            rows, columns = (weight.shape[1], weight.shape[0]) if module.transposed else weight.shape[:2]
            said = {"out_channels": rows * (module.groups if module.transposed else 1)}
            said["in_channels"] = columns * (1 if module.transposed else module.groups)
        elif isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            said = {"num_features": module.running_mean.shape[0]}
        elif isinstance(module, nn.GroupNorm):
            said = {"num_channels": weight.shape[0]}
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            said = {"normalized_shape": tuple(weight.shape)}
        elif isinstance(module, nn.Embedding):
            said = {"embedding_dim": weight.shape[1], "num_embeddings": weight.shape[0]}
        elif isinstance(module, nn.RNNBase):
            said = {"input_size": module.weight_ih_l0.shape[1]}
            gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
            said["hidden_size"] = module.weight_hh_l0.shape[0] // gates
        elif isinstance(module, nn.GRUCell):
            said = {"input_size": module.weight_ih.shape[1], "hidden_size": module.weight_hh.shape[1]}
        elif isinstance(module, nn.MultiheadAttention):
            said = {"embed_dim": module.out_proj.weight.shape[0]}
        for name, value in said.items():
            if getattr(module, name) != value:
                raise Wrong(f"{told}: {path}.{name} says {getattr(module, name)} and it is {value}")


def _told(before: nn.Module, after: nn.Module, told: Told) -> None:
    """A layer that is as wide as it was is a group that was not asked for, or has a reason."""
    edit: Any = tt.history(after).entries[-1].edit
    pruned = getattr(edit, "pruned", None)
    if pruned is None:
        return
    told.reasons += [re.sub(r"['\d][\w.']*", "_", why) for why in pruned.left_alone.values()]
    spoken = {name for group in pruned.groups for name in (group.name, *group.members)} | set(pruned.left_alone)
    names = {name.rpartition(".")[0] for name, _ in before.named_parameters()}  # of a tied weight the first
    for path, module in before.named_modules():
        weight = module._parameters.get("weight")
        if path not in names or path in spoken or weight is None or isinstance(module, nn.Embedding):
            continue
        if weight.dim() > 1 and 1 < weight.shape[0] == after.get_submodule(path)._parameters["weight"].shape[0]:
            raise Wrong(f"{told}: {path} is as wide as it was, and nothing says why")


def _like_masked(before: nn.Module, after: nn.Module, x: torch.Tensor, told: Told) -> None:
    """Zeros in every parameter at the indices that went compute the same."""
    twin, net = copy.deepcopy(before).double(), copy.deepcopy(after).double()
    if x.is_floating_point():
        x = x.double()
    parameters = dict(twin.named_parameters(remove_duplicate=False))
    narrowed: Any = tt.history(after).entries[-1].edit.narrowed
    for path, axes in narrowed.items():
        for axis, indices in axes.items() if path in parameters else ():
            values = parameters[path].data
            if axis == "0,1":
                values.flatten(0, 1)[list(indices)] = 0
            else:
                values.index_fill_(int(axis), torch.tensor(indices), 0)
    with torch.no_grad():
        one, other = (pytree.tree_leaves(each.eval()(x)) for each in (twin, net))
    for left, right in zip(one, other, strict=True):
        if left.shape != right.shape or not torch.allclose(left, right, rtol=1e-6, atol=1e-8):
            raise Wrong(f"{told}: it differs from the masked original by {(left - right).abs().max():.2e}")


def main() -> None:
    import argparse

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--only", choices=sorted(LAYERS), default=None, help="a layer that stands first in each network"
    )
    parser.add_argument("--keep-going", action="store_true")
    parser.add_argument("--reasons", default=None, help="print the sequences in which a layer was left alone for this")
    options = parser.parse_args()
    torch.set_num_threads(1)
    done: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    wrong, began = 0, time.monotonic()
    for seed in range(options.seed, options.seed + options.sequences):
        try:
            told = sequence(seed, options.only)
        except Wrong as error:
            wrong += 1
            print(f"seed {seed}: {error}", flush=True)
            if not options.keep_going:
                sys.exit(1)
            continue
        done.update(text.partition("(")[0].partition(" ")[0] for text in told.done)
        refused.update(text.partition("(")[0] for text in told.refused)
        reasons.update(told.reasons)
        if options.reasons is not None and any(options.reasons in each for each in told.reasons):
            print(f"seed {seed}: {told}", flush=True)
    print(f"{options.sequences} sequences in {time.monotonic() - began:.0f} s, {wrong} wrong")
    print("done:   ", dict(done))
    print("refused:", dict(refused))
    for reason, count in reasons.most_common():
        print(f"{count:6} left alone: {reason}")
    sys.exit(wrong > 0)


if __name__ == "__main__":
    main()
