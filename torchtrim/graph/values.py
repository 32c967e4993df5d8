"""The output and the cost of every call that was read, from a run on fake tensors (shapes without data)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrim.graph.copying import has_function_hooks, kept_random_state, structural_copy, unwrap
from torchtrim.graph.execution import no_fused_attention
from torchtrim.graph.fakes import Fakes
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.macs import macs_of
from torchtrim.graph.reader import Reader, Site
from torchtrim.graph.reading import UNKNOWABLE
from torchtrim.graph.structure import map_leaves


class SiteValues:
    """Fake outputs, and MACs at batch 1, of every site; each worked out when first asked for."""

    def __init__(self, reader: Reader) -> None:
        self._reader = reader

    @cached_property
    def outputs(self) -> dict[Site, Any]:
        """The outputs, without those that depend on the values of the input."""
        return self._run(self._reader.inputs)[0]

    @cached_property
    def macs(self) -> dict[Site, int]:
        """Multiply-accumulates of each call."""
        return self._run(self._reader.inputs.with_batch(1))[1]

    def _run(self, inputs: Inputs) -> tuple[dict[Site, Any], dict[Site, int]]:
        model = unwrap(self._reader.model)
        found = self._run_once(inputs, structural_copy(model, own_buffers=True, user_hooks=False))
        complete = all(site in found[0] for site in self._reader.sites if site.inside is None)
        if complete or not has_function_hooks(model):
            return found
        return self._run_once(inputs, structural_copy(model, own_buffers=True))  # a hook may change a shape

    def _run_once(self, inputs: Inputs, twin: nn.Module) -> tuple[dict[Site, Any], dict[Site, int]]:
        outputs: dict[Site, Any] = {}
        macs: dict[Site, int] = {}
        fake, counter = Fakes(), _MacCounter()
        tensors = [fake.from_tensor(tensor.detach()) for tensor in inputs.tensors]
        twin.eval()  # for shapes and cost that is enough, also at train-only calls: batch norm takes a batch of one
        with kept_random_state(), torch.no_grad(), no_fused_attention(), fake, counter:
            for site in self._reader.sites:
                counter.total = 0
                if site.inside is None and all(source in outputs for source in site.inputs):
                    with suppress(*UNKNOWABLE):
                        outputs[site] = _evaluated(site, outputs, tensors, twin)
                macs[site] = counter.total
        return outputs, macs


def _evaluated(site: Site, outputs: dict[Site, Any], tensors: Sequence[torch.Tensor], twin: nn.Module) -> Any:
    if site.op == "input":
        return tensors[site.target]
    if site.op == "attribute":
        return site.target
    args, kwargs = map_leaves((site.args, site.kwargs), Site, outputs.__getitem__)
    if site.op == "module":
        return twin.get_submodule(site.name)(*args, **kwargs)
    if site.op == "method":
        return getattr(args[0], site.target)(*args[1:], **kwargs)
    return site.target(*args, **kwargs)


class _MacCounter(TorchDispatchMode):
    def __init__(self) -> None:
        TorchDispatchMode.__init__(self)
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.total += macs_of(func, args, kwargs or {}, out)
        return out
