"""An opened module: a `GraphModule` that keeps what the module it replaces had.

Children, parameters, buffers and hooks are those of the original, under the same names and with the same classes, so
that `state_dict` keys stay. Where the forward differs between train and eval mode it holds both graphs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx, nn

from torchtrim.graph.copying import structural_copy
from torchtrim.graph.reading import same_graph
from torchtrim.graph.writable import check_writable

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_OUTPUT_HOOKS = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_backward_hooks")


class OpenedModule(fx.GraphModule):
    """A module whose forward is a graph read from the original's forward.

    Attributes:
        graph: The graph in eval mode, and in train mode too where `train_graph` is `None`.
        train_graph: The graph in train mode, where it differs.
    """

    train_graph: fx.Graph | None = None
    _name: str = ""

    def __init__(self, name: str, graph: fx.Graph, train_graph: fx.Graph | None = None) -> None:
        super().__init__(nn.Module(), fx.Graph(), name)
        self.__dict__["train_graph"] = train_graph
        self.__dict__["_name"] = name
        self.graph = graph

    def _get_name(self) -> str:
        return self._name

    def recompile(self) -> Any:
        """Compile the forward from the graphs.

        Raises:
            TraceError: A name in them cannot be written into source.
        """
        for graph in filter(None, (self._graph, self.train_graph)):
            check_writable(graph)
        if self.train_graph is None:
            code = super().recompile()
            _call_plainly(type(self))
            return code
        in_eval_graph = self._graph
        try:
            self._graph = self.train_graph
            super().recompile()
            in_train: Callable[..., Any] = type(self).forward
        finally:
            self._graph = in_eval_graph
        code = super().recompile()
        in_eval: Callable[..., Any] = type(self).forward

        @functools.wraps(in_eval)
        def forward(self: OpenedModule, *args: Any, **kwargs: Any) -> Any:
            return (in_train if self.training else in_eval)(self, *args, **kwargs)

        type(self).forward = forward
        _call_plainly(type(self))
        return code

    def __deepcopy__(self, memo: dict[int, Any]) -> OpenedModule:
        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if name != "_graph":
                twin.__dict__[name] = copy.deepcopy(value, memo)
        twin.graph = copy.deepcopy(self._graph, memo)
        return twin

    def __copy__(self) -> OpenedModule:
        twin = type(self).__new__(type(self))
        for name, value in self.__dict__.items():
            if name != "_graph":
                twin.__dict__[name] = copy.copy(value) if name in ("_parameters", "_buffers", "_modules") else value
        twin.graph = copy.deepcopy(self._graph)
        return twin

    def __reduce__(self) -> Any:
        # The graphs point back at this module, so they travel in the state and not in the constructor's arguments.
        return (_empty, (self._name,), dict(self.__dict__), None, None, _restore)


def with_own_graphs(model: nn.Module, *, compiled: bool = True) -> nn.Module:
    """A structural copy whose opened modules share no graph and no class with the original's.

    Args:
        model: The model; parameters and buffers are shared.
        compiled: Make the copy fit to run. Without it, it can only be copied in this way again.
    """
    twin = structural_copy(model)
    for module in twin.modules():
        if isinstance(module, OpenedModule):
            if module.train_graph is not None:
                module.__dict__["train_graph"] = copy.deepcopy(module.train_graph)
            graph = copy.deepcopy(module._graph)
            if compiled:
                module.__class__ = type(OpenedModule.__new__(OpenedModule))  # fx makes a class for each instance
                module.graph = graph
            else:
                module.__dict__["_graph"] = graph
    return twin


def _call_plainly(kind: type) -> None:
    """Without fx's own `__call__`, which prints the generated code to stderr when something in it raises."""
    if "__call__" in kind.__dict__:
        del kind.__call__


def _empty(name: str) -> OpenedModule:
    return OpenedModule(name, fx.Graph())


def _restore(module: OpenedModule, state: dict[str, Any]) -> None:
    graph = state.pop("_graph")
    module.__dict__.update(state)
    module.graph = graph


def opened(
    source: nn.Module,
    graph: fx.Graph,
    train_graph: fx.Graph | None = None,
    *,
    replacements: Mapping[str, nn.Module] | None = None,
    output_hooks: bool = True,
) -> OpenedModule:
    """The module that runs `graph` with the children, parameters, buffers and hooks of `source`.

    Only what the graphs use is kept. Kept children are the very objects of `source`.

    Args:
        source: The module that the graphs were read from, or one with the same paths.
        graph: The forward in eval mode.
        train_graph: The forward in train mode, where it is another.
        replacements: Modules to put at some paths instead of the original's; new paths are added.
        output_hooks: Keep hooks on the output (not where the output is no longer the original's).
    """
    if train_graph is not None and same_graph(graph, train_graph):
        train_graph = None
    module = OpenedModule(source._get_name(), graph, train_graph)
    used = {
        str(node.target)
        for each in (graph, train_graph)
        if each is not None
        for node in each.nodes
        if node.op in ("call_module", "get_attr")
    }
    keep(source, module, used, replacements or {})
    for name in _HOOKS:
        if name in source.__dict__ and (output_hooks or name not in _OUTPUT_HOOKS):
            module.__dict__[name] = source.__dict__[name]
    module.training = source.training
    return module


def keep(source: nn.Module, target: nn.Module, used: set[str], replacements: Mapping[str, nn.Module]) -> None:
    """Give `target` the members of `source` that are used: containers keep their class, aliases their names."""
    wanted = {id(_member(source, path)) for path in used if path not in replacements}
    if source._forward_pre_hooks:  # such a hook may compute a weight from others (weight_norm): they stay
        wanted |= {id(held) for held in (*source._parameters.values(), *source._buffers.values()) if held is not None}
    _keep_in(source, target, "", wanted, used, replacements)
    for path, replacement in replacements.items():
        parent, _, name = path.rpartition(".")
        if path in used:
            target.get_submodule(parent)._modules[name] = replacement
    for path in used - set(replacements):
        value = _member(source, path)
        if not isinstance(value, (nn.Module, nn.Parameter)) and not _is_buffer(source, path):
            parent, _, name = path.rpartition(".")
            target.get_submodule(parent).__dict__[name] = value


def _keep_in(
    source: nn.Module,
    target: nn.Module,
    prefix: str,
    wanted: set[int],
    used: set[str],
    replacements: Mapping[str, nn.Module],
) -> bool:
    """Fill `target`; returns whether anything was kept."""
    members = target.__dict__
    members["_parameters"] = {name: held for name, held in source._parameters.items() if id(held) in wanted}
    members["_buffers"] = {name: held for name, held in source._buffers.items() if id(held) in wanted}
    members["_non_persistent_buffers_set"] = source._non_persistent_buffers_set & set(members["_buffers"])
    members["_modules"] = children = {}
    for name, child in source._modules.items():
        path = f"{prefix}{name}"
        if child is None:
            continue
        if path in replacements and path in used:
            children[name] = replacements[path]
        elif id(child) in wanted:
            children[name] = child
        else:
            shell = nn.Module() if isinstance(child, fx.GraphModule) else object.__new__(type(child))
            shell.__dict__.update(child.__dict__)
            if _keep_in(child, shell, f"{path}.", wanted, used, replacements):
                children[name] = shell
    return bool(children or members["_parameters"] or members["_buffers"]) or any(
        path.startswith(prefix) for path in used if prefix
    )


def _member(source: nn.Module, path: str) -> Any:
    value: Any = source
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _is_buffer(source: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return name in source.get_submodule(parent)._buffers


def has_output_hooks(module: nn.Module) -> bool:
    """Whether hooks look at, or change, a module's output."""
    return any(module.__dict__.get(name) for name in _OUTPUT_HOOKS)
