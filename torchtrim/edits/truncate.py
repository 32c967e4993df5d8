"""Shorten the graphs that were read, so that they compute some values inside them and nothing else."""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn

from torchtrim.edits.kept_nodes import Plan, plans_of, shortens
from torchtrim.errors import EditError
from torchtrim.graph.opened import has_output_hooks, opened
from torchtrim.graph.reader import Frame, Reader, Site
from torchtrim.graph.structure import map_leaves

_OWN = ()  # the place of a module's own output among what it is to return


class Tap:
    """A value to return: the calls that lead to it, from the model's own forward inwards."""

    def __init__(self, reader: Reader, site: Site) -> None:
        self.site = site
        caller = {each.inside: each for each in reader.sites if each.inside is not None}
        self.steps = [site]
        while self.steps[0].owner.path:
            self.steps.insert(0, caller[self.steps[0].owner])
        same = [each for each in reader.sites if each.name == site.name and each.mode == site.mode]
        self.call = same.index(site)


def truncated(
    model: nn.Module,
    reader: Reader,
    taps: Sequence[Tap],
    *,
    names: Sequence[str] | None,
    single: bool,
    clone: bool,
    whole: bool = False,
) -> nn.Module:
    """The model that computes the taps.

    Args:
        model: The model whose modules to use; it has the paths that were read.
        reader: What was read of it.
        taps: The values to return.
        names: Names for them: the result is a dict.
        single: The result is the one value itself.
        clone: Return copies of values that are used further, in case a later in-place layer writes to them.
        whole: Return `(the model's own output, the taps)`.

    Raises:
        EditError: A module that is called several times would have to be cut at one call and not at another.
    """
    work = _Truncation(model, clone)
    steps = [tuple(tap.steps) for tap in taps]
    root = reader.frames[""][0]

    def result(values: dict[tuple[Site, ...], Any]) -> Any:
        found = [values[step] for step in steps]
        shaped: Any = dict(zip(names, found, strict=True)) if names is not None else tuple(found)
        shaped = found[0] if single else shaped
        return (values[_OWN], shaped) if whole else shaped

    return work.module(root, steps, own=whole, result=None if single and not whole else result)


class _Truncation:
    def __init__(self, model: nn.Module, clone: bool) -> None:
        self.model = model
        self.clone = clone

    def module(self, frame: Frame, steps: list[tuple[Site, ...]], own: bool, result: Any = None) -> nn.Module:
        """The module that returns its own output (where `own`) and the values at `steps`."""
        source = self.model.get_submodule(frame.path)
        if result is None and shortens(frame, steps, own):
            return self._sequential(source, frame, steps[0])
        plans = plans_of(frame, steps, own)
        children = self._children(plans, steps)
        graphs = [self._graph(plan, steps, own, result) for plan in plans]
        return opened(
            source, graphs[0], graphs[1] if len(graphs) > 1 else None, replacements=children, output_hooks=own
        )

    def _sequential(self, source: nn.Module, frame: Frame, step: tuple[Site, ...]) -> nn.Module:
        calls = [node for node in frame.eval.graph.nodes if node.op == "call_module"]
        position = calls.index(step[0].node)
        shell = copy.copy(source)
        shell._modules = dict(list(source._modules.items())[: position + 1])
        if has_output_hooks(source):
            last = position == len(source._modules) - 1 and len(step) == 1
            for name in () if last else ("_forward_hooks", "_backward_hooks"):
                shell.__dict__[name] = type(shell.__dict__[name])()
        if len(step) > 1:
            inside = step[0].inside
            if inside is None:
                raise EditError("it was not opened", path=step[0].name)
            name = list(shell._modules)[-1]
            shell._modules[name] = self.module(inside, [step[1:]], own=False)
        return shell

    def _children(self, plans: list[Plan], steps: list[tuple[Site, ...]]) -> dict[str, nn.Module]:
        """The children that the values go through, shortened; one that is called often must be cut alike each time."""
        deeper = {step[0]: str(step[0].node.target) for step in steps if len(step) > 1}
        for plan in plans:
            for node in plan.kept:
                target = str(node.target)
                if node.op == "call_module" and target in deeper.values():
                    shape = {"/".join(site.node.name for site in step[1:]) for step in plan.inner.get(node, [])}
                    plan.shapes.setdefault(target, []).append(shape)
                    plan.own_of[target] = plan.own_of.get(target, False) or node in plan.values
        children: dict[str, nn.Module] = {}
        for site, target in deeper.items():
            if any(shape != plan.shapes[target][0] for plan in plans for shape in plan.shapes[target]):
                raise EditError(
                    "this module is called several times, and would be cut at one call and not at another",
                    path=site.name,
                    hint="cut after the same place in each of its calls, or after the module itself",
                )
            own = any(plan.own_of[target] for plan in plans)
            for plan in plans:
                plan.own_of[target] = own
            if target not in children and site.inside is not None:
                inner = [step[1:] for step in dict.fromkeys(steps) if step[0] is site and len(step) > 1]
                children[target] = self.module(site.inside, inner, own)
        return children

    def _graph(self, plan: Plan, steps: list[tuple[Site, ...]], own: bool, result: Any) -> fx.Graph:
        """The shortened graph of one mode."""
        graph = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        values: dict[tuple[Site, ...], Any] = {}
        taken: dict[fx.Node, list[tuple[Site, ...]]] = {}
        for step in dict.fromkeys(steps):
            taken.setdefault(plan.here(step[0].node), []).append(step)
        for node in plan.graph.nodes:
            if node not in plan.kept or node.op == "output":
                continue
            args, kwargs = map_leaves(plan.arguments(node), fx.Node, copied.__getitem__)
            twin = graph.create_node(node.op, node.target, args, kwargs, node.name, node.type)
            copied[node] = twin
            inner = [step for step in taken.get(node, []) if len(step) > 1]
            if inner:
                parts: list[tuple[Site, ...]] = ([_OWN] if plan.own_of[str(node.target)] else []) + inner
                for index, part in enumerate(parts):
                    value = twin if len(parts) == 1 else graph.call_function(operator.getitem, (twin, index))
                    if part is _OWN:
                        copied[node] = value
                    else:
                        values[part] = value
            for step in taken.get(node, []):
                if len(step) == 1:
                    used = self.clone and any(user in plan.kept for user in node.users)
                    values[step] = graph.call_function(cloned, (copied[node],)) if used else copied[node]
        if own:
            (output,) = [node for node in plan.graph.nodes if node.op == "output"]
            values[_OWN] = fx.node.map_arg(output.args[0], lambda other: copied[other])
        if result is not None:
            graph.output(result(values))
        else:
            returned = ([values[_OWN]] if own else []) + [values[step] for step in dict.fromkeys(steps)]
            graph.output(returned[0] if len(returned) == 1 else tuple(returned))
        return graph


def cloned(value: Any) -> Any:
    """A copy of every tensor in a value."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, value)
