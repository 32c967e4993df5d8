"""A new head behind the output of a model that has none, such as one that was cut."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

from torch import fx, nn

from torchtrim.edits.head_fit import try_head
from torchtrim.edits.head_layers import AttentionPool, Pool, channel_dim, stack
from torchtrim.edits.head_request import HeadRequest
from torchtrim.errors import HeadError
from torchtrim.graph.check import Side, compare
from torchtrim.graph.copying import is_meta
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.layout import feature_layout
from torchtrim.graph.opened import has_output_hooks, opened
from torchtrim.graph.reader import Reader, Site, has_rooms
from torchtrim.graph.watch import Value


def make(
    model: nn.Module, inputs: Inputs, outputs: tuple[Value, ...], wanted: HeadRequest
) -> tuple[str, str | None, int | None, nn.Module]:
    """The name of the new head, the layout and the width of its features (`None` where it was given), and the head."""
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
    head = wanted.head
    if isinstance(head, Mapping):
        raise HeadError("this model has no heads of its own, so one module is enough", found=sorted(head), hint="head=")
    layout, width = wanted.layout, None
    if head is None:
        layout = layout or feature_layout(reader, site, shape)
        if len(shape) != (2 if layout == "flat" else len(layout)):
            raise HeadError("the features have not that layout", found=tuple(shape), expected=layout)
        width = int(shape[channel_dim(layout)])
    made = head_of(model, width or 0, layout or "flat", wanted)
    if not is_meta(made):
        try_head(made, tuple(shape), name)
    return name, layout, width, made


def head_of(model: nn.Module, width: int, layout: str, wanted: HeadRequest) -> nn.Module:
    """The head that was given, or a new one for features of that width and layout, as the model's weights are."""
    if isinstance(wanted.head, nn.Module):
        return wanted.head
    made = _new_head(width, wanted, layout)
    reference = next(iter(model.parameters()), None)
    return made if reference is None else made.to(device=reference.device, dtype=reference.dtype)


def put(model: nn.Module, inputs: Inputs, name: str, head: nn.Module) -> nn.Module:
    """The model with a module behind its output: one element more of a `Sequential`; else its forward is opened."""
    head.train(model.training)
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


def check_features(model: nn.Module, net: nn.Module, inputs: Inputs, name: str) -> tuple[str, ...]:
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


def _new_head(width: int, wanted: HeadRequest, layout: str) -> nn.Sequential:
    """Pooling, then linear layers with ReLU and dropout between them; without pooling, a head at every place."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    if layout != "flat" and wanted.pool is not None:
        if wanted.pool == "token" and layout not in ("NLC", "LNC"):
            raise HeadError("only a sequence of tokens has a class token", found=layout, hint="pool='avg'")
        attention = wanted.pool == "attention"
        layers["pool"] = AttentionPool(width, layout) if attention else Pool(wanted.pool, layout)
        layout = "flat"
    layers.update(stack(width, wanted.num_classes or 0, layout=layout, hidden=wanted.hidden, dropout=wanted.dropout))
    return nn.Sequential(layers)
