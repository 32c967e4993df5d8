"""`WeightClustering`: weights that share a few values are trained on, and go on sharing them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from torchtrim.bench.table import Table
from torchtrim.edits.bits import pack, unpack
from torchtrim.edits.cluster import clustering, taking
from torchtrim.edits.cluster_record import Clustered, ClusteredLayer, cluster_table
from torchtrim.edits.history import Applied, count_params, record
from torchtrim.edits.sparse_record import reasons
from torchtrim.errors import EditError, ModelError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import known_inputs
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import What
from torchtrim.importance.shared_values import ClusterInit, Shared, cluster_means, cluster_sums, share
from torchtrim.train.followed import Followed

Aggregate = Literal["mean", "sum"]


@dataclass(frozen=True)
class ClusterReport:
    """Which weights share how many values. `print` shows it.

    Attributes:
        layers: For each weight its `path`, `shape`, number of `weights` and of `values`, `bits` an entry, `zeros`.
        left_out: The names of the other parameters, and why.
        notes: What the user should know.
    """

    layers: tuple[ClusteredLayer, ...]
    left_out: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        layers = [layer.to_dict() for layer in self.layers]
        return {"layers": layers, "left_out": dict(self.left_out), "notes": list(self.notes)}

    def _table(self) -> Table:
        return cluster_table("Shared values", self.layers, [*self.notes, *reasons(self.left_out)])

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()


class WeightClustering:
    """Weights with a few shared values, in a training loop (trained quantization: Han, Mao and Dally, 2016).

    When it is made the weights are clustered, in place, as by `tt.cluster_weights`. From then on each entry keeps its
    cluster, and what is trained is the clusters' values: behind `optimizer.step()`, `step()` gives all entries of a
    cluster the mean of what the optimizer made of them, and zeros stay zero. For plain SGD that is the same as a step
    of the value along the mean of its entries' gradients. With optimizers that look at single gradients (Adam) call
    `share_gradients()` between `loss.backward()` and `optimizer.step()` too: then all entries of a cluster get one
    gradient, and so one step.

    There are no wrappers, and names never change. Prune first (`MagnitudePruner.finish`), then cluster: pruned weights
    are a value of their own, which stays zero. Weights, gradients and so values are the same on every rank of
    `DistributedDataParallel`. Edits in between with `copy=False` are followed, as the model's history tells them.

    Args:
        model: The model; its weights are changed in place.
        clusters: How many values a tensor may have, zero among them: 2 to 256.
        init: Where k-means starts: `"linear"` or `"density"`.
        aggregate: What `share_gradients` makes of a cluster's gradients: their `"mean"`, for the learning rates that
            single weights have, or their `"sum"`, which is the gradient of the shared value.
        include: Only these; by default what `sparsify` takes.
        exclude: What is left out besides.
        example_inputs: To tell the first and the last layer by the order of execution.

    Raises:
        EditError: No such number, start or aggregate, or nothing to cluster.
        PathError: A path that does not exist; the nearest are named.
        SelectionError: A glob, type or predicate that nothing fits.
        ModelError: A weight is lazy, not finite, parametrized, or masked by `torch.nn.utils.prune`.

    Example:
        >>> net, x = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 2)), torch.randn(32, 4)
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        >>> clusters = WeightClustering(net, clusters=8)
        >>> for _ in range(5):
        ...     optimizer.zero_grad(); net(x).square().mean().backward()
        ...     clusters.share_gradients(); optimizer.step(); clusters.step()
        >>> clusters.finish().layers[0].values, len(net[2].weight.unique())
        (8, 8)
    """

    def __init__(
        self,
        model: nn.Module,
        clusters: int = 16,
        *,
        init: ClusterInit = "linear",
        aggregate: Aggregate = "mean",
        include: What | Iterable[What] | None = None,
        exclude: What | Iterable[What] = (),
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        model = unwrap(model)
        if aggregate not in ("mean", "sum"):
            raise EditError("no such aggregate", path="aggregate", found=repr(aggregate), expected="mean or sum")
        self._asked = clustering(model, clusters, init, include, exclude)
        self._aggregate = aggregate
        self._inputs = known_inputs(model) if example_inputs is None else Inputs.of(example_inputs)
        weights, self._left_out = taking(model, self._asked, self._inputs)
        found = {each.parameter: share(each.name, each.parameter, clusters, init) for each in weights}
        # Nothing below can fail.
        self._followed = Followed(model, weights)
        self._followed.held = {parameter: shared.index for parameter, shared in found.items()}
        self._zero = {parameter for parameter, shared in found.items() if shared.keeps_zero}
        self._counts = {parameter: shared.values.numel() for parameter, shared in found.items()}
        self._steps = 0
        self._finished = False
        with torch.no_grad():
            for parameter, shared in found.items():
                parameter.copy_(shared.weight())

    @property
    def model(self) -> nn.Module:
        """The model, out of its wrapper."""
        return self._followed.model

    @property
    def finished(self) -> bool:
        """Whether `finish` was called."""
        return self._finished

    @torch.no_grad()
    def share_gradients(self) -> None:
        """Give all entries of a cluster one gradient: between `loss.backward()` and `optimizer.step()`.

        Raises:
            EditError: After `finish`; or a weight was replaced or reshaped, and the model's history does not say how.
        """
        self._check_on()
        for parameter, index in self._followed.held.items():
            if parameter.grad is not None:
                gradients = self._of_clusters(parameter, parameter.grad, index, mean=self._aggregate == "mean")
                parameter.grad.copy_(gradients[index.int()])

    @torch.no_grad()
    def step(self) -> None:
        """Give all entries of a cluster the same value again: behind `optimizer.step()`.

        Raises:
            EditError: As for `share_gradients`.
        """
        self._check_on()
        for parameter, index in self._followed.held.items():
            values = self._of_clusters(parameter, parameter, index, mean=True)
            parameter.copy_(values[index.int()])
        self._steps += 1

    def finish(self) -> ClusterReport:
        """Write what was done into the model's history; the values as they are then.

        Returns:
            What it came to. A second call only tells that again.

        Raises:
            EditError: As for `step`.
            ModelError: A value is not finite.
        """
        if not self._finished:
            self.step()
            self._steps -= 1
            found = self._shared()
            for name, shared in found.items():
                if not bool(torch.isfinite(shared.values).all()):
                    raise ModelError("its values are not finite", path=name, hint="the last good state")
            before = {name: shared.weight() for name, shared in found.items()}
            notes = (f"trained, in {self._steps:,} steps", *self._followed.notes)
            decided = Clustered.of(found, before, self._left_out, notes)
            count = count_params(self.model)
            edit = replace(self._asked, decided=decided)
            inputs = known_inputs(self.model) or self._inputs or Inputs()
            told, checked = decided.told(), ("every entry has one of its tensor's values",)
            record(self.model, self.model, inputs, Applied(edit, count, count, told, checked))
            self._finished = True
        return self.report()

    def report(self) -> ClusterReport:
        """Which weights share how many values."""
        found = self._shared()
        layers = Clustered.of(found, {name: each.weight() for name, each in found.items()}, {}).layers
        return ClusterReport(layers, dict(self._left_out), tuple(self._followed.notes))

    def state_dict(self) -> dict[str, Any]:
        """Where the clustering is, for a checkpoint: which cluster each entry is in. The values are the model's."""
        followed = self._followed
        return {
            "version": 1,
            "steps": self._steps,
            "finished": self._finished,
            "index": {each.name: pack(followed.held[each.parameter], 8) for each in followed.weights},
            "shapes": {each.name: list(each.parameter.shape) for each in followed.weights},
            "values": {each.name: self._counts[each.parameter] for each in followed.weights},
            "zero": [each.name for each in followed.weights if each.parameter in self._zero],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave. Load the model's weights first, and give them back their values with it.

        Raises:
            EditError: It is not such a state, or of another model. Nothing has changed.
        """
        own = {each.name: each.parameter for each in self._followed.weights}
        try:
            if state["version"] != 1:
                raise ValueError(f"version {state['version']}")
            steps, finished = int(state["steps"]), bool(state["finished"])
            shapes, counts, zero = dict(state["shapes"]), dict(state["values"]), set(state["zero"])
            packed = dict(state["index"])
        except (KeyError, TypeError, ValueError) as error:
            raise EditError(f"not the state of a clustering: {error!r}", expected="what state_dict() gives") from error
        for name, parameter in own.items():
            if list(shapes.get(name, ())) != list(parameter.shape) or name not in packed or name not in counts:
                raise EditError(
                    "the state is of another model", path=name, found=shapes.get(name), expected=list(parameter.shape)
                )
        index = {name: unpack(packed[name], tuple(own[name].shape), 8, name=name) for name in own}
        self._steps, self._finished = steps, finished
        self._followed.held = {own[name]: numbers.to(own[name].device) for name, numbers in index.items()}
        self._counts = {own[name]: int(counts[name]) for name in own}
        self._zero = {own[name] for name in own if name in zero}
        if not finished:
            self.step()
            self._steps -= 1

    def _check_on(self) -> None:
        if self._finished:
            raise EditError("the clustering has finished", path="step", hint="a new WeightClustering")
        self._followed.refresh()
        for parameter, index in self._followed.held.items():
            if index.device != parameter.device:
                self._followed.held[parameter] = index.to(parameter.device)

    def _of_clusters(
        self, parameter: nn.Parameter, entries: torch.Tensor, index: torch.Tensor, mean: bool
    ) -> torch.Tensor:
        """The mean or the sum of each cluster's entries, in the weight's type; that of zeros is zero."""
        count = self._counts[parameter]
        found = cluster_means(entries, index, count) if mean else cluster_sums(entries, index, count)
        if parameter in self._zero:
            found[0] = 0
        return found.to(parameter.dtype)

    @torch.no_grad()
    def _shared(self) -> dict[str, Shared]:
        found = {}
        for each in self._followed.weights:
            index = self._followed.held[each.parameter]
            values = self._of_clusters(each.parameter, each.parameter, index, mean=True)
            found[each.name] = Shared(values, index, each.parameter in self._zero)
        return found

    def __repr__(self) -> str:
        return f"WeightClustering({self._asked}: {len(self._followed.weights)} weights, step {self._steps:,})"
