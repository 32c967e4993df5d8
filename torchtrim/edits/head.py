"""`attach_head`: a new head, after a cut or in place of the model's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx, nn

from torchtrim.edits.cut import Cut
from torchtrim.edits.head_fit import input_shape, outputs_of, run_once, try_head
from torchtrim.edits.head_layers import LAYOUTS, POOLS, channel_dim, new_head, stack
from torchtrim.edits.history import Applied, Edit, count_params, history, record
from torchtrim.errors import EditError, HeadError
from torchtrim.graph.check import Side, compare, flatten
from torchtrim.graph.copying import full_copy, is_meta, structural_copy, unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.head import head_sites
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.graph.layout import feature_layout
from torchtrim.graph.opened import opened
from torchtrim.graph.reader import Reader, Site, ancestors, inputs_for


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
    train mode too) are replaced where they are, and every `num_classes` around them is brought up to date, so timm's
    `get_classifier` and torchvision's own forward work on. A model that was cut gets pooling and linear layers after
    its output, under the path `head`; the width and the place of the channels are found from the model.

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
        layout: Where the channels are, if it cannot be told: one of `flat NLC NCL NCHW NHWC NCDHW NDHWC`.
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
    hidden = tuple(hidden)
    _refuse(num_classes, head, pool, hidden, dropout, layout)
    own = [] if replace is False or (replace is None and _was_cut(model)) else _own_heads(model, inputs)
    if replace and not own:
        raise HeadError("the model has no head of its own to replace", hint="replace=False")
    if own:
        if pool not in ("avg", None):
            raise HeadError(
                "the model pools before its own head", found=f"pool={pool!r}", hint="cut it first, or replace=False"
            )
        edit, net = _in_place(model, own, inputs, num_classes, head, hidden, dropout, copy)
        checked = _check_outputs(net, inputs, edit) if check else ("not checked",)
    else:
        edit, net = _after(model, inputs, num_classes, head, pool, hidden, dropout, layout, copy)
        checked = _check_features(model, net, inputs, edit.paths[0]) if check else ("not checked",)
    record(model, net, inputs, Applied(edit, count_params(model), count_params(net), (), checked))
    return net


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
    if any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in hidden):
        raise HeadError("hidden widths are whole numbers above 0", found=hidden)
    if not 0.0 <= dropout < 1.0:
        raise HeadError("dropout is a probability", found=dropout, expected="0 <= dropout < 1")
    if layout is not None and layout not in LAYOUTS:
        raise HeadError("no such layout", found=layout, expected=f"one of {', '.join(LAYOUTS)}")


def _was_cut(model: nn.Module) -> bool:
    """Whether the last edit that concerns the head was a cut."""
    relevant = [edit for edit in history(model).edits if isinstance(edit, (Cut, AttachHead))]
    return bool(relevant) and isinstance(relevant[-1], Cut)


def _own_heads(model: nn.Module, inputs: Inputs) -> list[Site]:
    reader = Reader(model, inputs, wanted=lambda path, module: bool(module._modules)).read()
    sites = head_sites(reader)
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
    copy: bool,
) -> tuple[AttachHead, nn.Module]:
    paths = tuple(site.name for site in own)
    given = _given(head, paths)
    replacements: dict[str, nn.Module] = {}
    widths = {path: _width_in(model, path, inputs) for path in paths}
    for path in paths:
        old = model.get_submodule(path)
        if given is not None:
            replacements[path] = given[path]
            try_head(given[path], input_shape(model, path, inputs), path)
        else:
            replacements[path] = _like(old, widths[path], num_classes or 0, hidden, dropout)
    net = full_copy(model) if copy else model
    for path, new in replacements.items():
        old = net.get_submodule(path)
        reference = next(iter(old.parameters()), next(iter(net.parameters()), None))
        if reference is not None and given is None:
            new.to(device=reference.device, dtype=reference.dtype)
        new.train(old.training)
        count = num_classes if num_classes is not None else outputs_of(new, input_shape(model, path, inputs))
        _tell_the_truth(net, path, _count_of(old), count)
        for parent in net.modules():
            for name, child in parent._modules.items():
                if child is old:
                    parent._modules[name] = new
    edit = AttachHead(
        num_classes,
        None,
        hidden,
        dropout,
        None,
        widths[paths[0]],
        paths,
        tuple(type(model.get_submodule(path)).__name__ for path in paths) if copy else tuple("" for _ in paths),
        tuple(_type_name(module) for module in given.values()) if given is not None else (),
    )
    return edit, net


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
    """Bring every `num_classes` around a head up to date."""
    if after is None:
        return
    for outer in ancestors(path):
        module = net.get_submodule(outer)
        if module.__dict__.get("num_classes") == before:
            module.__dict__["num_classes"] = after


def _type_name(module: nn.Module) -> str:
    return f"{type(module).__module__}:{type(module).__qualname__}"


def _after(
    model: nn.Module,
    inputs: Inputs,
    num_classes: int | None,
    head: nn.Module | Mapping[str, nn.Module] | None,
    pool: str | None,
    hidden: tuple[int, ...],
    dropout: float,
    layout: str | None,
    copy: bool,
) -> tuple[AttachHead, nn.Module]:
    outputs = run_fake(model, inputs).calls_of("")[0].outputs
    shape = outputs[0].shape if outputs else ()
    reader = Reader(model, inputs, wanted=lambda path, module: bool(module._modules)).read()
    site = reader.outputs["eval"]
    if len(outputs) != 1 or not isinstance(site, Site) or len(shape) < 2:
        raise HeadError(
            "a head goes behind one output",
            found=f"{len(outputs)} outputs: {', '.join(str(output) for output in outputs)}",
            hint="cut after one place, without a list",
        )
    name = next(name for name in ("head", "new_head", "attached_head") if name not in model._modules)
    if isinstance(head, Mapping):
        raise HeadError("this model has no heads of its own, so one module is enough", found=sorted(head), hint="head=")
    reference = next(iter(model.parameters()), None)
    width: int | None = None
    made: nn.Module
    if head is None:
        layout = layout or feature_layout(reader, site, shape)
        width = int(shape[channel_dim(layout)])
        made = new_head(width, num_classes or 0, layout=layout, pool=pool, hidden=hidden, dropout=dropout)
        if reference is not None:
            made.to(device=reference.device, dtype=reference.dtype)
        try_head(made, tuple(shape), name) if not is_meta(made) else None
    else:
        made = head
        try_head(made, tuple(shape), name)
    made.train(model.training)
    net = _appended(full_copy(model) if copy else model, inputs, name, made)
    given = (_type_name(made),) if head is not None else ()
    return AttachHead(num_classes, pool, hidden, dropout, layout, width, (name,), (), given), net


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


def _check_outputs(net: nn.Module, inputs: Inputs, edit: AttachHead) -> tuple[str, ...]:
    """The model runs in both modes, and each output has the width asked for."""
    if is_meta(net):
        return ("not run: the model is on the meta device",)
    done = []
    for training in (False, True):
        twin = structural_copy(net, own_buffers=True)
        given = inputs.with_batch(max(inputs.batch, 2)) if training else inputs
        try:
            outputs = flatten(run_once(twin, given, training))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise HeadError(f"the model does not run with the new head: {error}", path=edit.paths[0]) from error
        shapes = {name: tuple(v.shape) for name, v in outputs.items() if isinstance(v, torch.Tensor)}
        if edit.num_classes is not None and not any(edit.num_classes in shape for shape in shapes.values()):
            raise EditError("no output has the new width", found=shapes, expected=edit.num_classes)
        done.append(f"{'train' if training else 'eval'}: runs, {', '.join(map(str, shapes.values()))}")
    return tuple(done)
