"""`attach_head`: a new head, after a cut or in place of the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from torchtrim.edits.cut import Cut
from torchtrim.edits.head_fit import input_shape, outputs_in, run_once, try_head
from torchtrim.edits.head_layers import LAYOUTS, POOLS, channel_dim, new_head, stack
from torchtrim.edits.history import Applied, Edit, count_params, history, record
from torchtrim.errors import EditError, HeadError
from torchtrim.graph.check import Side, compare, flatten
from torchtrim.graph.copying import full_copy, is_meta, structural_copy, unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.head import head_sites
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.layout import feature_layout
from torchtrim.graph.opened import has_output_hooks, opened
from torchtrim.graph.reader import Reader, Site, ancestors, has_rooms, inputs_for
from torchtrim.graph.watch import Value


@dataclass(frozen=True)
class AttachHead(Edit):
    """A new head.

    Attributes:
        num_classes: How many outputs it has; `None` where the head was given and has no single width.
        pool: How features are pooled; `None` for a head that replaced the model's own, or works at every place.
        hidden: Widths of the layers before the last.
        dropout: Dropout probability before the last layer.
        layout: Where the channels of the features are; `None` for a head that replaced the model's own.
        in_features: The width of the features.
        paths: Where the new head, or heads, are.
        replaced: The classes of the layers that were there before; empty after a cut.
        given: The classes of the modules the user gave, as `module:name`; empty where they were made here.
    """

    kind: ClassVar[str] = "attach_head"
    num_classes: int | None = None
    pool: str | None = None
    hidden: tuple[int, ...] = ()
    dropout: float = 0.0
    layout: str | None = None
    in_features: int | None = None
    paths: tuple[str, ...] = ()
    replaced: tuple[str, ...] = ()
    given: tuple[str, ...] = ()


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
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
        >>> attach_head(net, torch.zeros(1, 3, 8, 8), num_classes=4)[4]
        Linear(in_features=8, out_features=4, bias=True)
    """
    model = unwrap(model)
    inputs = inputs_for(model, example_inputs)
    hidden = tuple(hidden) if isinstance(hidden, Sequence) else (hidden,)
    _refuse(num_classes, head, pool, hidden, dropout, layout)
    execution = run_fake(model, inputs)
    features = execution.calls_of("")[0].outputs
    own = [] if replace is False or (replace is None and _was_cut(model)) else _own_heads(model, inputs)
    if replace and not own:
        raise HeadError("the model has no head of its own to replace", hint="replace=False")
    before = count_params(model)
    if own:
        if pool not in ("avg", None):
            raise HeadError(
                "the model pools before its own head", found=f"pool={pool!r}", hint="cut it first, or replace=False"
            )
        edit, new = _in_place(model, own, inputs, num_classes, head, hidden, dropout)
        # Tried on a copy that shares the weights: where it fails, nothing has been changed.
        candidate = _replaced(structural_copy(model), edit, new)
        checked = _check_outputs(model, candidate, inputs, edit, execution.user_hooks) if check else _UNCHECKED
        net = _replaced(full_copy(model) if copy else model, edit, new)
    else:
        edit, made = _after(model, inputs, features, num_classes, head, pool, hidden, dropout, layout)
        (name,) = edit.paths
        checked = _UNCHECKED
        if check:
            checked = _check_features(model, _appended(structural_copy(model), inputs, name, made), inputs, name)
        net = _appended(full_copy(model) if copy else model, inputs, name, made)
    record(model, net, inputs, Applied(edit, before, count_params(net), (), checked))
    return net


_UNCHECKED = ("not checked",)


def _refuse(
    num_classes: int | None,
    head: Any,
    pool: str | None,
    hidden: tuple[int, ...],
    dropout: float,
    layout: str | None,
) -> None:
    if (num_classes is None) == (head is None):
        raise HeadError("a new head needs its number of outputs, or is given", expected="num_classes= or head=")
    if num_classes is not None and (
        isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1
    ):
        raise HeadError("num_classes is a whole number above 0", found=num_classes)
    if head is not None and not isinstance(head, (nn.Module, Mapping)):
        raise HeadError("a head is a module, or a dict of them by path", found=type(head).__name__)
    if pool is not None and pool not in POOLS:
        raise HeadError("no such pooling", found=pool, expected=f"one of {', '.join(POOLS)}, or None")
    if not all(_is_count(size) for size in hidden):
        raise HeadError("hidden widths are whole numbers above 0", found=hidden)
    if not isinstance(dropout, (int, float)) or not 0.0 <= dropout < 1.0:
        raise HeadError("dropout is a probability", found=dropout, expected="0 <= dropout < 1")
    if layout is not None and layout not in LAYOUTS:
        raise HeadError("no such layout", found=layout, expected=f"one of {', '.join(LAYOUTS)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _was_cut(model: nn.Module) -> bool:
    """Whether the last edit that concerns the head was a cut."""
    relevant = [edit for edit in history(model).edits if isinstance(edit, (Cut, AttachHead))]
    return bool(relevant) and isinstance(relevant[-1], Cut)


def _own_heads(model: nn.Module, inputs: Inputs) -> list[Site]:
    reader = Reader(model, inputs, wanted=has_rooms, lenient=[]).read()
    sites = head_sites(reader)
    function = next((site for site in sites if site.op == "attribute"), None)
    if function is not None:
        raise HeadError(
            "the model's last weights are used by a function, so there is no layer to replace",
            path=function.name,
            hint="cut the model before that function, or replace=False",
        )
    # An identity that passes feature maps on is no place for a linear layer.
    empty = [site for site in sites if isinstance(site.target, nn.Identity)]
    return [] if any(len(input_shape(model, site.name, inputs)) != 2 for site in empty) else sites


def _in_place(
    model: nn.Module,
    own: list[Site],
    inputs: Inputs,
    num_classes: int | None,
    head: nn.Module | Mapping[str, nn.Module] | None,
    hidden: tuple[int, ...],
    dropout: float,
) -> tuple[AttachHead, dict[str, nn.Module]]:
    """The record, and the new layers by path."""
    paths = tuple(site.name for site in own)
    given = _given(head, paths)
    new: dict[str, nn.Module] = {}
    for path in paths:
        old = model.get_submodule(path)
        if given is not None:
            new[path] = given[path]
            output = try_head(given[path], input_shape(model, path, inputs), path)
            num_classes = outputs_in(output)
        else:
            new[path] = _like(old, _width_in(model, path, inputs), num_classes or 0, hidden, dropout)
            reference = next(iter(old.parameters()), next(iter(model.parameters()), None))
            if reference is not None:
                new[path].to(device=reference.device, dtype=reference.dtype)
        new[path].train(old.training)
    edit = AttachHead(
        num_classes,
        None,
        hidden,
        dropout,
        None,
        _width_in(model, paths[0], inputs),
        paths,
        tuple(type(model.get_submodule(path)).__name__ for path in paths),
        tuple(_type_name(module) for module in given.values()) if given is not None else (),
    )
    return edit, new


def _replaced(net: nn.Module, edit: AttachHead, new: dict[str, nn.Module]) -> nn.Module:
    """The model, changed: its heads replaced wherever they are referred to, and the attributes that count them."""
    for path, layer in new.items():
        old = net.get_submodule(path)
        _tell_the_truth(net, path, _count_of(old), edit.num_classes)
        for parent in list(net.modules()):
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = layer
    return net


def _given(head: nn.Module | Mapping[str, nn.Module] | None, paths: tuple[str, ...]) -> dict[str, nn.Module] | None:
    if head is None:
        return None
    if isinstance(head, Mapping):
        if set(head) != set(paths):
            raise HeadError(
                "one head for each of the model's own is needed", found=sorted(head), expected=sorted(paths)
            )
        return {path: head[path] for path in paths}
    if len(paths) > 1:
        raise HeadError(
            "the model has several heads, and one was given",
            found=list(paths),
            hint="head={" + ", ".join(f"{path!r}: ..." for path in paths) + "}",
        )
    return {paths[0]: head}


def _like(old: nn.Module, width: int, num_classes: int, hidden: tuple[int, ...], dropout: float) -> nn.Module:
    """A new layer in place of an old one: a convolution for a convolution, of the same kernel; else linear layers."""
    weight = getattr(old, "weight", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() == 2:
        layers = stack(width, num_classes, layout="flat", hidden=hidden, dropout=dropout)
        return nn.Sequential(layers) if len(layers) > 1 else layers["fc"]
    kinds: dict[int, Any] = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}
    layout = {3: "NCL", 4: "NCHW", 5: "NCDHW"}.get(weight.dim(), "")
    if layout == "" or getattr(old, "transposed", False):
        raise HeadError(
            "its own head is a layer that torchtrim cannot make anew", found=type(old).__name__, hint="head="
        )
    layers = stack(width, num_classes, layout=layout, hidden=hidden, dropout=dropout)
    first = next(name for name, layer in layers.items() if isinstance(layer, tuple(kinds.values())))
    outputs = hidden[0] if hidden else num_classes
    same = {name: getattr(old, name) for name in ("kernel_size", "stride", "padding", "dilation") if hasattr(old, name)}
    layers[first] = kinds[weight.dim()](width, outputs, **same)
    return nn.Sequential(layers) if len(layers) > 1 else layers["fc"]


def _width_in(model: nn.Module, path: str, inputs: Inputs) -> int:
    old = model.get_submodule(path)
    weight = getattr(old, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.dim() >= 2:
        return int(weight.shape[1]) * int(getattr(old, "groups", 1))
    return int(input_shape(model, path, inputs)[-1])


def _count_of(module: nn.Module) -> int:
    """How many outputs an old head had; 0 for the identity that stands for none."""
    weight = getattr(module, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else 0


def _tell_the_truth(net: nn.Module, path: str, before: int, after: int | None) -> None:
    """Bring every `num_classes` (and transformers' `num_labels`) around a head up to date."""
    if after is None:
        return
    for outer in ancestors(path):
        module = net.get_submodule(outer)
        for holder in (module, module.__dict__.get("config")):
            for name in ("num_classes", "num_labels"):
                if holder is not None and _plain_number(holder, name) == before:
                    setattr(holder, name, after)


def _plain_number(holder: Any, name: str) -> Any:
    value = getattr(holder, name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"


def _after(
    model: nn.Module,
    inputs: Inputs,
    outputs: tuple[Value, ...],
    num_classes: int | None,
    head: nn.Module | Mapping[str, nn.Module] | None,
    pool: str | None,
    hidden: tuple[int, ...],
    dropout: float,
    layout: str | None,
) -> tuple[AttachHead, nn.Module]:
    """The record, and the new head."""
    if has_output_hooks(model):
        raise HeadError("hooks on the model's output would see the head's", hint="put them on a layer inside")
    shape = outputs[0].shape if outputs else ()
    reader = Reader(model, inputs, wanted=has_rooms, lenient=[]).read()
    site = reader.outputs["eval"]
    if len(outputs) != 1 or not isinstance(site, Site):
        raise HeadError(
            "a head goes behind one output",
            found=f"{len(outputs)} outputs: {', '.join(str(output) for output in outputs)}",
            hint="cut after one tensor: tt.trace lists the addresses, such as ':getitem' for an item of a tuple",
        )
    if len(shape) > 1 and shape[0] != inputs.batch:
        raise HeadError(
            "the batch is not the first dimension of the features",
            found=f"{tuple(shape)} for a batch of {inputs.batch}",
            hint="cut after a layer that gives one entry a sample",
        )
    if len(shape) < 2:
        raise HeadError("features have a batch and a width at least", found=shape, expected="2 to 5 dimensions")
    name = next(name for name in ("head", "new_head", "attached_head") if name not in model._modules)
    if isinstance(head, Mapping):
        raise HeadError("this model has no heads of its own, so one module is enough", found=sorted(head), hint="head=")
    reference = next(iter(model.parameters()), None)
    width: int | None = None
    made: nn.Module
    if head is None:
        layout = layout or feature_layout(reader, site, shape)
        if len(shape) != (2 if layout == "flat" else len(layout)):
            raise HeadError("the features have not that layout", found=tuple(shape), expected=layout)
        width = int(shape[channel_dim(layout)])
        made = new_head(width, num_classes or 0, layout=layout, pool=pool, hidden=hidden, dropout=dropout)
        if reference is not None:
            made.to(device=reference.device, dtype=reference.dtype)
        try_head(made, tuple(shape), name) if not is_meta(made) else None
    else:
        made = head
        try_head(made, tuple(shape), name)
    made.train(model.training)
    given = (_type_name(made),) if head is not None else ()
    return AttachHead(num_classes, pool, hidden, dropout, layout, width, (name,), (), given), made


def _appended(model: nn.Module, inputs: Inputs, name: str, head: nn.Module) -> nn.Module:
    """The model with a module behind its output: one element more of a `Sequential`; else its forward is opened."""
    if type(model).forward is nn.Sequential.forward:
        model.add_module(name, head)
        return model
    reader = Reader(model, inputs, wanted=lambda path, module: False, both_modes=True).read()
    frame = reader.frames[""][0]
    graphs = []
    for reading in (frame.eval, frame.train):
        graph = fx.Graph()
        output = graph.graph_copy(reading.graph, {})
        if not isinstance(output, fx.Node):
            raise HeadError("the model returns several outputs in train mode", hint="cut it first")
        graph.output(graph.call_module(name, (output,)))
        graphs.append(graph)
    return opened(model, *graphs, replacements={name: head}, output_hooks=False)


def _check_features(model: nn.Module, net: nn.Module, inputs: Inputs, name: str) -> tuple[str, ...]:
    """What reaches the new head is what the model gave before."""

    def features(module: nn.Module, given: Inputs) -> Any:
        caught: list[Any] = []
        handle = module.get_submodule(name).register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
        try:
            given.call(module)
        finally:
            handle.remove()
        return caught[0]

    return compare(Side(model), Side(net, features), inputs)


def _check_outputs(
    model: nn.Module, net: nn.Module, inputs: Inputs, edit: AttachHead, user_hooks: bool
) -> tuple[str, ...]:
    """The model runs in both modes, and its outputs are those of before but for the new width."""
    if is_meta(net):
        return ("not run: the model is on the meta device",)
    widths = {_count_of(model.get_submodule(path)) or edit.in_features for path in edit.paths}
    done, changed = [], False
    for training in (False, True):
        given = inputs.with_batch(max(inputs.batch, 2)) if training else inputs
        try:
            before = _shapes(model, given, training, user_hooks)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            done.append(f"{'train' if training else 'eval'}: not checked, the original refuses it: {error}")
            continue
        try:
            after = _shapes(net, given, training, user_hooks)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise HeadError(f"the model does not run with the new head: {error}", path=edit.paths[0]) from error
        for name, shape in after.items():
            old = before.get(name, ())
            differ = [(was, now) for was, now in zip(old, shape, strict=False) if was != now]
            changed = changed or bool(differ)
            right = all(was in widths and now == edit.num_classes for was, now in differ)
            if edit.num_classes is not None and (len(old) != len(shape) or not right):
                raise EditError("an output has not the new width", path=name, found=shape, expected=edit.num_classes)
        done.append(f"{'train' if training else 'eval'}: runs, {', '.join(map(str, after.values()))}")
    if edit.num_classes is not None and not changed and widths != {edit.num_classes}:
        raise EditError("no output has the new width", path=edit.paths[0], expected=edit.num_classes)
    return tuple(done)


def _shapes(model: nn.Module, inputs: Inputs, training: bool, user_hooks: bool) -> dict[str, tuple[int, ...]]:
    twin = structural_copy(model, own_buffers=True, user_hooks=user_hooks)
    outputs = flatten(run_once(twin, inputs, training))
    return {name: tuple(value.shape) for name, value in outputs.items() if isinstance(value, torch.Tensor)}
