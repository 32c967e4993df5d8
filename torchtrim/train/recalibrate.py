"""`recalibrate_batchnorm`: statistics of batch norms that fit a model that was changed, by agreement with the original.

After channels or layers are taken out, the mean and variance that each batch norm holds are those of another model.
Measured anew on a few hundred inputs they are noisy, and they are of other pictures than those that the model was
trained on (crops, colours): on an untouched EfficientNet-Lite0 that alone costs four points. So with the original at
hand it is measured what the change *did*: on the same inputs, in both models, the difference of the means and the ratio
of the variances is what the old statistics are moved by. A model in which nothing was changed is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from torchtrim.bench.table import Table
from torchtrim.edits.heal_data import Calibration
from torchtrim.edits.heal_norms import Judge
from torchtrim.edits.history import history
from torchtrim.edits.norms import is_norm
from torchtrim.errors import InputError, ModelError
from torchtrim.graph.copying import kept_random_state, structural_copy, unwrap
from torchtrim.graph.execution import known_inputs
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.train.lost import losses, taken

_ROWS = 64  # of one piece: its statistics are those that the norms normalise by while they are measured
_SHARES = (1.0, 0.75, 0.5, 0.25)
_LARGEST_RATIO = 16.0  # of variances: what hardly varied before says nothing of how it varies now
_WORTH = 0.99  # an error on data held back has to fall to this share; less may be chance

Statistics = dict[str, tuple[torch.Tensor, torch.Tensor]]  # mean and variance of each norm, by its path


@dataclass(frozen=True)
class Recalibration:
    """What became of the statistics of a model's batch norms.

    Attributes:
        norms: How many batch norms there are that have statistics.
        what: What was chosen, in words.
        before: With an original: the error on data held back (the difference of the outputs from the original's,
            relative to the deviation of these).
        after: The same afterwards.
        tried: The error of everything that was tried.
    """

    norms: int
    what: str
    before: float | None = None
    after: float | None = None
    tried: dict[str, float] = field(default_factory=dict)

    def _table(self) -> Table:
        rows = tuple((name, f"{error:.4f}") for name, error in self.tried.items())
        return Table("Batch norm statistics", ("tried", "error"), rows, [f"- {self.norms} norms: {self.what}"])

    def __str__(self) -> str:
        return self._table().text()

    def _repr_html_(self) -> str:
        return self._table().html()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {**self.__dict__, "tried": dict(self.tried)}


def recalibrate_batchnorm(
    model: nn.Module,
    data: Iterable[Any],
    example_inputs: ExampleInputs | None = None,
    *,
    original: nn.Module | None = None,
) -> Recalibration:
    """Measure the statistics of a model's batch norms anew, and write them into the model.

    With the `original`, four fifths of the data are measured on, in both models, and the old statistics are moved by
    what has changed between the two: by all of it, by a part, or not at all, or they are replaced by what is measured
    (drawn to the old ones by a part, or wholly). What agrees best with the original's outputs on the last fifth is
    kept. Without it, the statistics are those of the data: the mean and variance over all of it, the norms normalising
    by what they see meanwhile, as in `torch.optim.swa_utils.update_bn`; the old ones play no part.

    Everything but the batch norms runs in eval mode. Memory: one piece of 64 inputs, and those held back.

    Args:
        model: The model; its modes and all but `running_mean` and `running_var` stay as they are.
        data: Batches: tensors, `(inputs, targets)` pairs or dicts; gone through several times.
        example_inputs: What the forward takes, where neither the model's history nor the first batch tells.
        original: The model before it lost channels or layers, unchanged. Channels are matched by the model's history,
            so it is one that `model` came from, or has the same shapes.

    Returns:
        What was chosen, and the errors of all that was tried.

    Raises:
        ModelError: The model has no batch norms with statistics.
        InputError: No data, too little, or such as can be gone through only once.
        EditError: The two models return different shapes. Nothing has changed then, and in all other cases.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
        >>> x = torch.randn(40, 4)
        >>> found = recalibrate_batchnorm(net, [x])
        >>> bool(torch.allclose(net[1].running_mean, net[0](x).mean(0), atol=1e-6))
        True
        >>> recalibrate_batchnorm(net, [x], original=net).what
        'kept as they are'
    """
    model = unwrap(model)
    norms = {path: each for path, each in model.named_modules() if is_norm(each)}
    if not norms:
        raise ModelError("it has no batch norm with statistics", found=type(model).__name__)
    data = [data] if isinstance(data, (torch.Tensor, Mapping)) else data
    inputs = _example(model, data, example_inputs)
    calibration = Calibration.of(data, model, inputs, what="recalibration")
    with torch.no_grad(), kept_random_state():
        if original is None:
            new = measured(model, lambda: calibration.all(_ROWS))
            _write(norms, new)
            return Recalibration(len(norms), "measured on the data")
        return _chosen(model, norms, unwrap(original), calibration)


def measured(model: nn.Module, pieces: Callable[[], Iterator[Inputs]]) -> Statistics:
    """The mean and variance of what comes into each batch norm; a norm that never runs is left out."""
    twin = structural_copy(model, own_buffers=True, user_hooks=False).eval()
    found: dict[str, _Moments] = {}
    for path, norm in twin.named_modules():
        if is_norm(norm):
            # Normalising by what it sees: a mean that is off in one norm would be passed on to those behind it.
            norm.train(isinstance(norm, nn.modules.batchnorm._BatchNorm) and not isinstance(norm, nn.SyncBatchNorm))
            found[path] = moments = _Moments()
            norm.register_forward_pre_hook(lambda _module, args, moments=moments: moments.add(args[0]))
    for piece in pieces():
        piece.call(twin)
    statistics = {path: moments.result() for path, moments in found.items() if moments.count}
    for path, values in statistics.items():
        if not all(bool(each.isfinite().all()) for each in values):
            raise InputError("on this data its statistics are not finite", path=path, hint="data without NaN")
    return statistics


class _Moments:
    """Sums for the mean and variance of each channel, shifted by the first mean so that offsets cost no precision."""

    def __init__(self) -> None:
        self.count = 0

    def add(self, value: torch.Tensor) -> None:
        flat = value.detach().movedim(1, -1).flatten(0, -2).double()
        if not self.count:
            self.shift = flat.mean(0)
            self.first, self.second = torch.zeros_like(self.shift), torch.zeros_like(self.shift)
        flat = flat - self.shift
        self.first += flat.sum(0)
        self.second += flat.square().sum(0)
        self.count += len(flat)

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        mean = self.first / self.count
        variance = (self.second / self.count - mean.square()).clamp_min(0) * (self.count / max(self.count - 1, 1))
        return mean + self.shift, variance


def _chosen(
    model: nn.Module, norms: Mapping[str, nn.Module], original: nn.Module, calibration: Calibration
) -> Recalibration:
    """Write what agrees best with the original on data held back."""
    _refuse_untaken(original, calibration)
    judge = Judge(structural_copy(original, own_buffers=True, user_hooks=False).eval(), calibration)
    trial = structural_copy(model, own_buffers=True, user_hooks=False).eval()
    on_trial = {path: each for path, each in trial.named_modules() if path in norms}
    before = judge.error(trial)
    tried, best, chosen = {"kept as they are": before}, before * _WORTH, None
    if before > 0:
        for name, statistics in _candidates(model, norms, original, calibration):
            _write(on_trial, statistics)
            tried[name] = error = judge.error(trial)
            if error < best:
                best, chosen = error, (name, statistics)
    if chosen is None:
        return Recalibration(len(norms), "kept as they are", before, before, tried)
    _write(norms, chosen[1])
    return Recalibration(len(norms), chosen[0], before, best, tried)


def _refuse_untaken(original: nn.Module, calibration: Calibration) -> None:
    """Run the original on a piece of the data, so that an error names it."""
    try:
        next(iter(Calibration(calibration.data, original, calibration.example).held_back()), None)
    except InputError as error:
        raise InputError(
            f"the original is another model: {error.message}",
            path="original",
            found=error.found,
            expected=error.expected,
            hint="the model before it lost channels or layers",
        ) from error


def _candidates(
    model: nn.Module, norms: Mapping[str, nn.Module], original: nn.Module, calibration: Calibration
) -> Iterator[tuple[str, Statistics]]:
    old = {path: _statistics(norm) for path, norm in norms.items()}
    new = measured(model, lambda: calibration.to_fit(_ROWS))
    reference = _matched(model, original, measured(original, lambda: calibration.to_fit(_ROWS)))
    if reference.keys() & new.keys():
        for share in _SHARES:
            moved = {path: _moved(old[path], new[path], reference.get(path), share) for path in new}
            yield f"moved by {share:.0%} of the change", moved
    for share in _SHARES:
        drawn = {path: _drawn(old[path], new[path], share) for path in new}
        yield ("measured on the data" if share == 1 else f"{share:.0%} measured, the rest as before"), drawn


def _moved(
    old: Sequence[torch.Tensor], new: Sequence[torch.Tensor], reference: Sequence[torch.Tensor] | None, share: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if reference is None:
        return old[0], old[1]
    ratio = (new[1] / reference[1]).nan_to_num(1.0, 1.0, 1.0).clamp(1 / _LARGEST_RATIO, _LARGEST_RATIO)
    return old[0] + share * (new[0] - reference[0]), old[1] * ratio**share


def _drawn(old: Sequence[torch.Tensor], new: Sequence[torch.Tensor], share: float) -> tuple[torch.Tensor, torch.Tensor]:
    mean, variance = (share * fresh + (1 - share) * known for known, fresh in zip(old, new, strict=True))
    return mean, variance


def _matched(model: nn.Module, original: nn.Module, found: Statistics) -> Statistics:
    """The original's statistics for the channels that are left, where that can be told."""
    past = len(history(original).entries)
    same = history(model).entries[:past] == history(original).entries
    lost = losses(model, past) if same else []
    buffers = dict(model.named_buffers(remove_duplicate=False))
    matched: Statistics = {}
    for path, (mean, variance) in found.items():
        name = f"{path}.running_mean" if path else "running_mean"
        for removed in (step[name] for step in lost if name in step):
            mean, variance = taken(mean, removed), taken(variance, removed)
        held = buffers.get(name)
        if held is not None and held.shape == mean.shape:
            matched[path] = mean, variance
    return matched


def _statistics(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    held: Any = norm
    return held.running_mean.double(), held.running_var.double()


def _write(norms: Mapping[str, nn.Module], statistics: Statistics) -> None:
    for path, (mean, variance) in statistics.items():
        held: Any = norms[path]
        held.running_mean.copy_(mean)
        held.running_var.copy_(variance)


def _example(model: nn.Module, data: Any, example_inputs: ExampleInputs | None) -> Inputs:
    """Example inputs: those given, those known, or the first batch without its targets."""
    device = next((held.device for held in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    known = Inputs.of(example_inputs) if example_inputs is not None else known_inputs(model)
    if known is None:
        first = next(iter(data), None) if isinstance(data, Iterable) and iter(data) is not data else None
        if first is None:
            raise InputError("no data to recalibrate on", expected="batches that can be gone through several times")
        pair = isinstance(first, (tuple, list)) and len(first) == 2
        known = Inputs.of(first[0] if pair and isinstance(first, (tuple, list)) else first)
    return known.map(lambda tensor: tensor.to(device))
