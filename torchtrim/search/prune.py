"""`prune_channels`: take the least important channels out of a model; to a ratio, a budget, or a latency."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from torchtrim.channels.select import Scope
from torchtrim.edits.apply import apply, run
from torchtrim.edits.budget import Budget
from torchtrim.edits.edit import Edit
from torchtrim.edits.history import history
from torchtrim.edits.module_spec import Trusted
from torchtrim.edits.prune import PruneChannels, request
from torchtrim.errors import EditError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.paths import What
from torchtrim.graph.reader import inputs_for
from torchtrim.importance.channels import Importance
from torchtrim.importance.gradients import Loss
from torchtrim.search.prune_latency import pruned_to_latency


def prune_channels(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    ratio: float | Mapping[Any, float] | None = None,
    *,
    importance: Importance = "magnitude",
    scope: Scope = "uniform",
    budget: Budget | Mapping[str, float] | None = None,
    thresholds: Mapping[Any, float] | None = None,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    round_to: int = 8,
    min_channels: int = 1,
    max_ratio: float = 0.9,
    protect: What | Iterable[What] = (),
    reconstruct: bool = False,
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Take the least important channels out of a model, and all that depends on them.

    Which channels go together is found by following them through the whole forward, operator by operator, in both
    modes: through residual connections, concatenations, groups, attention heads and recurrent cells. What reaches the
    model's outputs stays. Layers whose channels cannot go are left alone; `tt.history` lists them, and why.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`.
        ratio: The fraction of the channels of each layer that go; or a dict of fractions by path, glob, type, predicate
            or tuple of these, of which for each layer the first counts that fits it or a module it is in (layers that
            none fits keep their width).
        importance: What channels are ranked by, the least important going first: `"magnitude"`, `"l1"`, `"bn_scale"`,
            `"lamp"`, `"fpgm"`, `"taylor"`, `"hessian"`, `"apoz"`, `"activation"`, `"reconstruction"`, `"random"`; a
            criterion of torch-pruning; or a function that is given a `ChannelGroup` and returns scores.
        scope: `"uniform"`: each layer loses its fraction. `"global"`: all layers are ranked together. `"isomorphic"`:
            those of the same structure are (Fang et al., *Isomorphic Pruning for Vision Models*, ECCV 2024).
        budget: Limits to stay within (or a dict of them), in place of a ratio: no more channels go than have to. A
            latency is that of the ONNX file in ONNX Runtime, measured on this machine at the batch size of the example
            inputs with PyTorch's present number of threads; candidates are exported and measured beside the original,
            which takes a while.
        thresholds: Scores by layer as for `ratio`, in place of it: channels of a layer that score less go.
        data: Batches for criteria that look at activations or gradients, and for reconstruction.
        loss: For criteria of gradients: `loss(output, target)`.
        round_to: Widths are rounded to multiples of this, where a layer is twice as wide; in narrower ones to half of
            it, and so on. 1 for no rounding.
        min_channels: How many channels of a layer stay at least.
        max_ratio: The largest fraction of a layer that may go.
        protect: Modules that keep their width, with all in them: paths, globs, types, predicates, or a list of these.
        reconstruct: Solve the layers that read pruned channels anew on `data`, by least squares.
        copy: As for `cut`; without it, parameters that lose channels stay the same objects too, and `sync_optimizer`
            brings an optimizer up to date.
        check: Run the result in both modes, at several batch sizes and another input size, and compare it with the
            original that ignores the pruned channels. Where a norm goes over them, it is only run.

    Returns:
        The narrower model. Where a budget cannot be kept, the smallest (or fastest) that was found, with a warning;
        `tt.history` says what was asked, what was reached and why not more.

    Raises:
        EditError: Nothing says how many channels are to go, or the model cannot be followed.
        PathError: A path that does not exist.
        SelectionError: A glob, type or predicate that no layer fits.
        InputError: A criterion needs data, and there is none.
        CheckFailed: The result does not compute what it should.
        ExportError: A latency is asked for, and the model cannot be exported.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(1152, 10))
        >>> narrow = prune_channels(net, torch.zeros(1, 3, 8, 8), 0.5)
        >>> narrow[0].out_channels, narrow[1].num_features, narrow[4].in_features
        (16, 16, 576)
        >>> narrow = prune_channels(net, torch.zeros(1, 3, 8, 8), budget=Budget(macs=0.8))
        >>> narrow[0].out_channels
        24
    """
    edit = request(
        ratio,
        importance=importance,
        scope=scope,
        budget=budget,
        thresholds=thresholds,
        loss=loss,
        round_to=round_to,
        min_channels=min_channels,
        max_ratio=max_ratio,
        protect=protect,
        reconstruct=reconstruct,
    )
    if _wants_latency(edit):
        model = unwrap(model)
        inputs = inputs_for(model, example_inputs)
        edit = _decided(model, inputs, edit, data)
    return run(model, example_inputs, [edit], copy=copy, check=check, data=data)


def with_latencies(
    model: nn.Module,
    inputs: Inputs,
    edits: Callable[[], Sequence[Edit]],
    *,
    data: Iterable[Any] | None = None,
    trusted: Trusted = (),
) -> Callable[[], list[Edit]]:
    """Edits in which each pruning to a latency is replaced by the record with what was decided.

    Args:
        model: The model that they are for. It is left as it was.
        inputs: Example inputs.
        edits: Gives the edits, each time with modules of their own.
        data: As for `apply`.
        trusted: As for `apply`.

    Returns:
        Gives the edits so, each time with modules of their own.
    """
    found: dict[int, Edit] = {}

    def again() -> list[Edit]:
        return [found.get(number, edit) for number, edit in enumerate(edits())]

    for number, edit in enumerate(edits()):
        if isinstance(edit, PruneChannels) and _wants_latency(edit):
            earlier = again()[:number]
            before = apply(model, inputs, earlier, data=data, trusted=trusted) if earlier else model
            found[number] = _decided(before, inputs, edit, data)
    return again


def _wants_latency(edit: PruneChannels) -> bool:
    return edit.pruned is None and edit.budget is not None and edit.budget.latency_ms is not None


def _decided(model: nn.Module, inputs: Inputs, edit: PruneChannels, data: Iterable[Any] | None) -> PruneChannels:
    def prune(budget: Budget) -> tuple[nn.Module, PruneChannels]:
        net = run(model, inputs, [edit.within(budget)], check=False, data=data)  # the file is run
        record = history(net).entries[-1].edit
        if not isinstance(record, PruneChannels):
            raise EditError("not the record of a pruning", found=record.kind, expected=edit.kind)
        return net, record

    if edit.budget is None:
        raise EditError("no latency is asked for", path="budget.latency_ms")
    return pruned_to_latency(model, inputs, edit.budget, prune)
