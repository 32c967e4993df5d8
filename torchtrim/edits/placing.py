"""Where a module is put in: between a call and what uses its value, or between a call and one of its arguments."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from torchtrim.edits.rewire import Room
from torchtrim.errors import EditError

Structure = Any  # tuples, lists and dicts of whatever is in them


def fit(module: nn.Module, model: nn.Module, training: bool) -> None:
    """Take a module to a model's device, type of values and mode, where it differs and was not made for another.

    Values are converted where the module has the default type and all of the model's weights have another.

    Args:
        module: The module. Its parameters stay the same objects.
        model: The model.
        training: The mode of the place it is put.
    """
    held = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.is_floating_point()]
    own = [tensor for tensor in (*module.parameters(), *module.buffers()) if tensor.is_floating_point()]
    if held and own:
        kinds = {tensor.dtype for tensor in held}
        convert = len(kinds) == 1 and all(tensor.dtype == torch.get_default_dtype() for tensor in own)
        if any(tensor.device != held[0].device for tensor in own) or (convert and own[0].dtype not in kinds):
            module.to(device=held[0].device, dtype=held[0].dtype if convert else None)
    if module.training != training:
        module.train(training)


def tensors_in(value: Structure) -> list[torch.Tensor]:
    """The tensors in a value or in the arguments of a call, in order."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def passed_through(value: Structure, index: int, function: Callable[[torch.Tensor], Any]) -> Structure:
    """A value with one of its tensors, counted in order, passed through a function.

    Example:
        >>> passed_through((torch.ones(1), [torch.ones(1)]), 1, lambda tensor: tensor + 1)
        (tensor([1.]), [tensor([2.])])
    """
    leaves, form = pytree.tree_flatten(value)
    positions = [position for position, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
    leaves[positions[index]] = function(leaves[positions[index]])
    return pytree.tree_unflatten(leaves, form)


def put_behind(room: Room, node: fx.Node, index: int, name: str) -> tuple[int, ...]:
    """Call a new child on the value of a node, and hand what it returns to all that used the value.

    Args:
        room: The opened module.
        node: The node, in one of its graphs.
        index: Which of the tensors in the value.
        name: The name of the new child.

    Returns:
        The shape of that tensor.

    Raises:
        EditError: The value holds no such tensor, or is no tuple, list or dict of tensors.
    """
    value = room.value(node)
    users = list(node.users)
    graph = node.graph
    with graph.inserting_before(node.next):
        parts = _parts(graph, node, value[0])
        new, shape = _called(graph, parts, value, index, name)
    for user in users:
        key = user.args[1] if user.op == "call_function" and user.target is operator.getitem else None
        known = isinstance(new, dict) or (isinstance(new, (tuple, list)) and isinstance(key, int))
        if key is not None and known and isinstance(new[key], fx.Node):
            user.replace_all_uses_with(new[key])
            graph.erase_node(user)
        else:
            user.args, user.kwargs = _with(user.args, node, new), _with(user.kwargs, node, new)
    _sweep(graph, node)
    return shape


def put_behind_whole(node: fx.Node, name: str) -> None:
    """`put_behind` for a value that is one tensor, as is known without working it out."""
    with node.graph.inserting_before(node.next):
        new = node.graph.call_module(name, (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)


def put_before(room: Room, node: fx.Node, index: int, name: str) -> tuple[int, ...]:
    """Call a new child on one of the tensors that a node is given, and give the node what it returns.

    Args and errors: as for `put_behind`; `index` counts the tensors in all arguments.
    """
    graph = node.graph
    leaves, form = pytree.tree_flatten((node.args, node.kwargs))
    left = index
    for position, leaf in enumerate(leaves):
        if not isinstance(leaf, fx.Node):
            continue
        value = room.value(leaf)
        count = len(tensors_in(value[0]))
        if left < count:
            with graph.inserting_before(node):
                leaves[position], shape = _called(graph, _parts(graph, leaf, value[0]), value, left, name)
            node.args, node.kwargs = pytree.tree_unflatten(leaves, form)
            _sweep(graph, leaf)
            return shape
        left -= count
    raise no_such_tensor(index, index - left)


def no_such_tensor(index: int, count: int) -> EditError:
    """The error for a tensor that is not there."""
    return EditError(
        f"there is no tensor with index {index}" if count else "no tensor goes through there",
        found=f"{count} tensors" if count > 1 else None,
        expected=f"0 to {count - 1}" if count else "a call that takes, or returns, a tensor",
    )


def shape_of(one: torch.Tensor, other: torch.Tensor) -> tuple[int, ...]:
    """The shape at batch 1 of a tensor that is known at two batch sizes."""
    return tuple(
        1 if a != b and dim == 0 else int(a) for dim, (a, b) in enumerate(zip(one.shape, other.shape, strict=True))
    )


def _called(
    graph: fx.Graph, parts: Structure, value: tuple[Any, Any], index: int, name: str
) -> tuple[Structure, tuple[int, ...]]:
    """The structure with the child's call in place of one tensor; new nodes go where the graph's cursor is."""
    nodes, form = pytree.tree_flatten(parts)
    tensors = [
        (position, one, other)
        for position, (one, other) in enumerate(zip(*map(pytree.tree_leaves, value), strict=True))
        if isinstance(one, torch.Tensor)
    ]
    if not 0 <= index < len(tensors):
        raise no_such_tensor(index, len(tensors))
    position, one, other = tensors[index]
    nodes[position] = graph.call_module(name, (nodes[position],))
    return pytree.tree_unflatten(nodes, form), shape_of(one, other)


def _parts(graph: fx.Graph, node: fx.Node, value: Structure) -> Structure:
    """The structure of a value with a node for each part."""
    if isinstance(value, torch.Tensor):
        return node
    if not pytree.tree_leaves(value):
        return value
    if type(value) is dict:
        return {key: _parts(graph, _item(graph, node, key), item) for key, item in value.items()}
    if type(value) in (tuple, list) or (isinstance(value, tuple) and hasattr(value, "_fields")):
        items = [_parts(graph, _item(graph, node, number), item) for number, item in enumerate(value)]
        if type(value) in (tuple, list):
            return type(value)(items)
        return type(value)(*items)
    if tensors_in(value) or pytree.tree_leaves(value) != [value]:
        raise EditError(
            f"the value there is a {type(value).__name__}, which cannot be put together again",
            expected="a tensor, or a tuple, list or dict of them",
            hint="a call further inside, which returns a tensor",
        )
    return node


def _item(graph: fx.Graph, node: fx.Node, key: Any) -> fx.Node:
    return graph.call_function(operator.getitem, (node, key))


def _sweep(graph: fx.Graph, node: fx.Node) -> None:
    """Take out the parts of a node's value that nothing uses."""
    for user in list(node.users):
        if user.op == "call_function" and user.target is operator.getitem:
            _sweep(graph, user)
            if not user.users:
                graph.erase_node(user)


def _with(arguments: Any, node: fx.Node, new: Structure) -> Any:
    return fx.node.map_arg(arguments, lambda each: new if each is node else each)
