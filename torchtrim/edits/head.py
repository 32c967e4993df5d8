"""`attach_head`: a new head, after a cut or in place of the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from torchtrim.edits import head_behind, head_in_place
from torchtrim.edits.cut import Cut
from torchtrim.edits.head_record import AttachHead, HeadRequest
from torchtrim.edits.history import Applied, count_params, history, record
from torchtrim.errors import HeadError
from torchtrim.graph.copying import full_copy, structural_copy, unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.reader import inputs_for

__all__ = ["AttachHead", "attach_head"]


def attach_head(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    num_classes: int | None = None,
    *,
    head: nn.Module | Mapping[str, nn.Module] | None = None,
    pool: str | None = "avg",
    hidden: Sequence[int] = (),
    dropout: float = 0.0,
    layout: str | None = None,
    replace: bool | None = None,
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Give a model a new head.

    A model that has a head keeps its class and its methods: the last layers with weights (found from the outputs, in
    train mode too) are replaced where they are, and every `num_classes` or `num_labels` around them is brought up to
    date, so timm's `get_classifier` and torchvision's own forward work on. A model that was cut gets pooling and linear
    layers after its output, under the path `head`; the width and the place of the channels are found from the model.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`.
        num_classes: How many outputs the new head has.
        head: A module to attach instead; it gets what the old head got, or the features, shape (N, ...) as they are.
            A dict `{path: module}` where the model has several heads. It is used as it is, not copied.
        pool: After a cut: `"avg"`, `"max"`, `"token"` (the first token), `"attention"` (learned weights), or `None`: a
            head at every place, for dense prediction. A model with a head of its own keeps its own pooling.
        hidden: Widths of linear layers with ReLU before the last layer.
        dropout: Probability of dropout before the last layer.
        layout: Where the channels are, if it cannot be told: one of `flat NLC LNC NCL NCHW NHWC NCDHW NDHWC`.
        replace: Replace the model's own head (`True`), or attach after its output (`False`). By default the own head is
            replaced, unless the last edit was a cut.
        copy: Copy the parameters, as for `cut`.
        check: Run the result, forward in both modes, and compare its features with the original's.

    Returns:
        The model with the new head; freshly initialised, with the random numbers of `torch.manual_seed`.

    Raises:
        HeadError: The head does not fit (the message says both shapes), or the model returns several outputs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> attach_head(net, torch.zeros(1, 3, 8, 8), num_classes=4)[4]
        Linear(in_features=8, out_features=4, bias=True)
    """
    model = unwrap(model)
    inputs = inputs_for(model, example_inputs)
    wanted = HeadRequest.of(num_classes, head, pool, hidden, dropout, layout)
    execution = run_fake(model, inputs)
    own = [] if replace is False or (replace is None and _was_cut(model)) else head_in_place.own_heads(model, inputs)
    if replace and not own:
        raise HeadError("the model has no head of its own to replace", hint="replace=False")
    if own and wanted.pool not in ("avg", None):
        raise HeadError(
            "the model pools before its own head", found=f"pool={pool!r}", hint="cut it first, or replace=False"
        )
    before = count_params(model)
    checked: tuple[str, ...] = ("not checked",)
    # Tried on a copy that shares the weights: where it fails, nothing has been changed.
    trial = structural_copy(model)
    if own:
        edit, layers = head_in_place.make(model, own, inputs, wanted)
        if check:
            trial = head_in_place.put(trial, edit, layers)
            checked = head_in_place.check_outputs(model, trial, inputs, edit, execution.user_hooks)
        net = head_in_place.put(full_copy(model) if copy else model, edit, layers)
    else:
        edit, made = head_behind.make(model, inputs, execution.calls_of("")[0].outputs, wanted)
        if check:
            trial = head_behind.put(trial, inputs, edit, made)
            checked = head_behind.check_features(model, trial, inputs, edit)
        net = head_behind.put(full_copy(model) if copy else model, inputs, edit, made)
    record(model, net, inputs, Applied(edit, before, count_params(net), (), checked))
    return net


def _was_cut(model: nn.Module) -> bool:
    """Whether the last edit that concerns the head was a cut."""
    relevant = [edit for edit in history(model).edits if isinstance(edit, (Cut, AttachHead))]
    return bool(relevant) and isinstance(relevant[-1], Cut)
