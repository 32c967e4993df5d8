"""`cluster_weights`: a few shared values in the place of a tensor's many."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import ClassVar, get_args

import torch
from torch import nn

from torchtrim.edits.apply import run
from torchtrim.edits.cluster_record import Clustered
from torchtrim.edits.edit import Edit
from torchtrim.edits.sparse_weights import Weight, choose, held_at
from torchtrim.edits.sparsify import finite_still, has_no_values
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import EditError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import What, several, spelled
from torchtrim.importance.shared_values import ClusterInit, share

_MOST = 256  # what a byte can number


def cluster_weights(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    clusters: int = 16,
    *,
    init: ClusterInit = "linear",
    include: What | Iterable[What] | None = None,
    exclude: What | Iterable[What] = (),
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Give the entries of each weight a few values that they share: 16 take 4 bits an entry, and zip far better.

    The values are found by k-means for each tensor by itself (Han, Mao and Dally, *Deep compression*, 2016). Zeros
    stay zero, as one of the values: prune first, then cluster. To train the values afterwards, so that accuracy comes
    back, see `WeightClustering`.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `sparsify`.
        clusters: How many values a tensor may have, zero among them: 2 to 256.
        init: Where k-means starts: `"linear"` or `"density"`; see `importance.shared_values`.
        include: Only these; by default what `sparsify` takes: layers' weights, but the first and the last.
        exclude: What is left out besides.
        copy: As for `cut`.
        check: Run the result in eval mode, where inputs are given or known.

    Returns:
        The model with shared values.

    Raises:
        EditError: No such number or start, or nothing to cluster.
        PathError: A path that does not exist; the nearest are named.
        SelectionError: A glob, type or predicate that nothing fits.
        ModelError: A weight is lazy, not finite, parametrized, or masked by `torch.nn.utils.prune`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> shared = cluster_weights(net, torch.zeros(1, 4), clusters=4)
        >>> len(shared[2].weight.unique()), len(net[2].weight.unique())
        (4, 64)
    """
    model = unwrap(model)
    return run(model, example_inputs, [clustering(model, clusters, init, include, exclude)], copy=copy, check=check)


@dataclass(frozen=True)
class ClusterWeights(Edit):
    """A few shared values in each weight.

    Attributes:
        clusters: How many values a tensor may have.
        init: Where k-means starts: `"linear"` or `"density"`.
        include: Paths and globs of what takes part; `None` for the default.
        exclude: Paths and globs of what does not.
        decided: The values, in the record of what was done.
    """

    kind: ClassVar[str] = "cluster_weights"
    joins: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    clusters: int = 16
    init: ClusterInit = "linear"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    decided: Clustered | None = field(default=None, metadata={"decided": True})

    def __post_init__(self) -> None:
        if type(self.clusters) is not int or not 2 <= self.clusters <= _MOST:
            raise EditError(
                "a number of values",
                path="clusters",
                found=repr(self.clusters),
                expected=f"a whole one, 2 to {_MOST}",
            )
        if self.init not in get_args(ClusterInit):
            raise EditError("no such start", path="init", found=repr(self.init), expected="linear or density")
        if self.include is not None:
            object.__setattr__(self, "include", tuple(map(_key, several(self.include))))
        object.__setattr__(self, "exclude", tuple(map(_key, several(self.exclude))))

    def perform(self, work: Work) -> ClusterWeights:
        """Do it on `work.model`; returns the record with the values."""
        decided = self.decided
        if decided is None:
            weights, left_out = taking(work.model, self, work.inputs)
            found = {each.name: share(each.name, each.parameter, self.clusters, self.init) for each in weights}
            before = {each.name: each.parameter.detach() for each in weights}
            decided = Clustered.of(found, before, left_out)
        _put(work, decided.tensors())
        work.joints += [Joint(each.path, None, None, f"{each.values} values") for each in decided.layers]
        work.notes += decided.told()
        if work.check:
            work.checked += finite_still(work)
        return replace(self, decided=decided)


def clustering(
    model: nn.Module,
    clusters: int,
    init: ClusterInit,
    include: What | Iterable[What] | None,
    exclude: What | Iterable[What],
) -> ClusterWeights:
    """The record of what is asked for, selections written as paths and globs.

    Raises:
        EditError: A value is none.
        SelectionError: A type or predicate that nothing fits.
    """
    given = None if include is None else spelled(model, include)
    return ClusterWeights(clusters, init, given, spelled(model, exclude))


def taking(model: nn.Module, asked: ClusterWeights, inputs: Inputs | None) -> tuple[list[Weight], dict[str, str]]:
    """The weights that take part, and why the others do not.

    Raises:
        EditError: None does.
    """
    chosen = choose(model, asked.include, asked.exclude, inputs=inputs)
    left_out = dict(chosen.left_out)
    left_out |= {each.name: "complex numbers" for each in chosen.weights if each.parameter.is_complex()}
    weights = [each for each in chosen.weights if each.name not in left_out]
    if not weights:
        raise EditError("none of the weights are real numbers", path=chosen.weights[0].name)
    return weights, left_out


def _put(work: Work, tensors: dict[str, torch.Tensor]) -> None:
    """Put values in the place of weights in a model that is edited.

    Raises:
        PathError: The model has no such parameter.
        EditError: It has another shape.
    """
    held = held_at(work.model, tensors)
    for name, values in tensors.items():
        if held[name].shape != values.shape:
            raise EditError(
                "it has another shape than where this was recorded",
                path=name,
                found=list(held[name].shape),
                expected=list(values.shape),
                hint="the model that the record was made of",
            )
    for name, values in tensors.items():
        weight = held[name]
        if has_no_values(weight):
            continue  # they are read later
        path, _, key = name.rpartition(".")
        new = work.reshape(work.model.get_submodule(path), key, values.to(weight.device, weight.dtype))
        new.grad = weight.grad


def _key(given: object) -> str:
    if not isinstance(given, str):
        raise EditError("a record names weights by paths and globs", found=repr(given), hint="tt.cluster_weights")
    return given
