"""`attach_head`: a new head, after a cut or in place of the model's own."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import nn

from torchtrim.edits import head_behind, head_in_place
from torchtrim.edits.apply import run
from torchtrim.edits.cut import Cut
from torchtrim.edits.edit import Edit, decided
from torchtrim.edits.head_request import HeadRequest
from torchtrim.edits.history import history
from torchtrim.edits.module_spec import ModuleSpec
from torchtrim.edits.rewire import call_by_name
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import HeadError
from torchtrim.graph.copying import kept_random_state
from torchtrim.graph.execution import Execution, run_fake
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import resolve
from torchtrim.graph.reader import Site


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
    HeadRequest.of(num_classes, head, pool, hidden, dropout, layout)
    given = head if isinstance(head, Mapping) else {} if head is None else {"": head}
    widths = (hidden,) if isinstance(hidden, int) else tuple(hidden)
    heads = {path: ModuleSpec.of(module) for path, module in given.items()}
    edit = AttachHead(num_classes, pool, widths, float(dropout), layout, replace, heads)
    return run(model, example_inputs, [edit], copy=copy, check=check)


@dataclass(frozen=True)
class AttachHead(Edit):
    """A new head.

    Attributes:
        num_classes: How many outputs it has; `None` where the head was given and has no single width.
        pool: How features are pooled; `None` for a head that replaced the model's own, or works at every place.
        hidden: Widths of the layers before the last.
        dropout: Dropout probability before the last layer.
        layout: Where the channels of the features are; `None` for a head that replaced the model's own.
        replace: Whether the model's own head is replaced.
        heads: The modules to attach, where they were given, by path; under `""` one for wherever the head is.
        seed: The seed of the new head's initial weights.
        in_features: The width of the features.
        paths: Where the new head, or heads, are.
        replaced: The classes of the layers that were there before; empty after a cut.
    """

    kind: ClassVar[str] = "attach_head"
    num_classes: int | None = None
    pool: str | None = "avg"
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    layout: str | None = None
    replace: bool | None = None
    heads: dict[str, ModuleSpec] = field(default_factory=dict)
    seed: int | None = decided()
    in_features: int | None = decided()
    paths: tuple[str, ...] = decided(())
    replaced: tuple[str, ...] = decided(())

    def perform(self, work: Work) -> AttachHead:
        """Attach it to `work.model`."""
        model, inputs = work.model, work.inputs
        wanted = self._request(work)
        if self.paths and not work.check and not work.planning:
            return self._again(work, wanted)
        execution = run_fake(model, inputs)
        in_place = self.replace is not False and (self.replace is True or not _was_cut(work.before))
        own = head_in_place.own_heads(model, inputs) if in_place else []
        if self.replace and not own:
            raise HeadError("the model has no head of its own to replace", hint="replace=False")
        if own and wanted.pool not in ("avg", None):
            raise HeadError(
                "the model pools before its own head",
                found=f"pool={self.pool!r}",
                hint="cut it first, or replace=False",
            )
        # Drawn from the user's generator, so that `torch.manual_seed` decides the weights; a record knows it already.
        seed = int(torch.randint(2**53, ())) if self.seed is None and not self.heads else self.seed
        heads = {path: spec.recorded() for path, spec in self.heads.items()}
        done = dataclasses.replace(self, replace=bool(own), heads=heads, seed=seed)
        with kept_random_state():
            if seed is not None:
                torch.manual_seed(seed)
            if own:
                return self._in_place(work, own, wanted, done, execution.user_hooks)
            return self._behind(work, execution, wanted, done)

    def _again(self, work: Work, wanted: HeadRequest) -> AttachHead:
        """Do what was decided before, without looking at the model."""
        for path in self.paths if self.replace else ():
            resolve(work.model, path)
        with kept_random_state():
            if self.seed is not None:
                torch.manual_seed(self.seed)
            if self.replace:
                layers = head_in_place.layers_at(work.model, self.paths, self.in_features or 0, wanted)
                call_by_name(work, layers)
                head_in_place.put(work.model, self.num_classes, layers)
            else:
                made = head_behind.head_of(work.model, self.in_features or 0, self.layout or "flat", wanted)
                work.model = head_behind.put(work.model, work.inputs, self.paths[0], made)
        return dataclasses.replace(self, heads={path: spec.recorded() for path, spec in self.heads.items()})

    def _request(self, work: Work) -> HeadRequest:
        given = {path: work.module(spec) for path, spec in self.heads.items()}
        head = None if not given else given[""] if set(given) == {""} else given
        count = None if given else self.num_classes
        return HeadRequest.of(count, head, self.pool, self.hidden, self.dropout, self.layout)

    @staticmethod
    def _in_place(work: Work, own: list[Site], wanted: HeadRequest, done: AttachHead, user_hooks: bool) -> AttachHead:
        num_classes, width, layers = head_in_place.make(work.model, own, work.inputs, wanted)
        replaced = tuple(type(work.model.get_submodule(path)).__name__ for path in layers)
        work.joints += [
            Joint(path, None, None, f"replaced: {name}") for path, name in zip(layers, replaced, strict=True)
        ]
        call_by_name(work, layers)
        head_in_place.put(work.model, num_classes, layers)
        paths = tuple(layers)
        if work.check:
            work.checked += head_in_place.check_outputs(
                work.before, work.model, work.inputs, paths, num_classes, user_hooks
            )
        return dataclasses.replace(
            done, num_classes=num_classes, pool=None, layout=None, in_features=width, paths=paths, replaced=replaced
        )

    @staticmethod
    def _behind(work: Work, execution: Execution, wanted: HeadRequest, done: AttachHead) -> AttachHead:
        outputs = execution.calls_of("")[0].outputs
        name, layout, width, made = head_behind.make(work.model, work.inputs, outputs, wanted)
        work.joints.append(Joint(name, tuple(outputs[0].shape), None, "behind the output"))
        work.model = head_behind.put(work.model, work.inputs, name, made)
        if work.check:
            work.checked += head_behind.check_features(work.before, work.model, work.inputs, name)
        return dataclasses.replace(done, layout=layout, in_features=width, paths=(name,), replaced=())


def _was_cut(model: nn.Module) -> bool:
    """Whether the last edit that concerns the head was a cut."""
    relevant = [edit for edit in history(model).edits if isinstance(edit, (Cut, AttachHead))]
    return bool(relevant) and isinstance(relevant[-1], Cut)
