"""An optimizer's state, by the names of the parameters it belongs to."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchtrim.checkpoint.document import OptimizerPart
from torchtrim.checkpoint.plain import from_plain, to_plain
from torchtrim.errors import CheckpointError, CheckpointMismatch


def described(optimizer: torch.optim.Optimizer, model: nn.Module) -> tuple[OptimizerPart, dict[str, torch.Tensor]]:
    """An optimizer as plain data, and its tensors by name.

    Raises:
        CheckpointError: It holds a parameter that is not the model's, or a value that is not plain data.
    """
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[name] = value
            return {"tensor": name}
        try:
            return to_plain(value)
        except CheckpointError as error:
            raise CheckpointError(
                "the optimizer holds a value that is neither a tensor nor plain data",
                path=name,
                found=f"{type(value).__name__} with a {error.found} in it",
            ) from error

    groups, state = [], {}
    for number, group in enumerate(optimizer.param_groups):
        unknown = [parameter for parameter in group["params"] if parameter not in names]
        if unknown:
            raise CheckpointError(
                "the optimizer holds a parameter that is not the model's",
                path=f"param_groups[{number}]",
                found=f"shape {list(unknown[0].shape)}",
                hint="an optimizer made after the edits: torch.optim.AdamW(net.parameters())",
            )
        options = {key: plain(value, f"{number}.{key}") for key, value in group.items() if key != "params"}
        groups.append({"params": [names[parameter] for parameter in group["params"]], "options": options})
        for parameter in group["params"]:
            held = optimizer.state.get(parameter, {})
            if held:
                name = names[parameter]
                state[name] = {key: plain(value, f"{number}.{key}.{name}") for key, value in held.items()}
    return OptimizerPart(type=type(optimizer).__name__, groups=groups, state=state), tensors


def tensor_names(part: OptimizerPart | None) -> list[str]:
    """The names of the tensors that a description speaks of."""

    def names(data: Any) -> list[str]:
        if isinstance(data, dict) and set(data) == {"tensor"}:
            return [str(data["tensor"])]
        items = data.values() if isinstance(data, dict) else data if isinstance(data, list) else ()
        return [name for item in items for name in names(item)]

    return [] if part is None else names([part.groups, part.state])


def check(part: OptimizerPart | None, optimizer: torch.optim.Optimizer) -> OptimizerPart:
    """The part of a file that is for this optimizer.

    Raises:
        CheckpointMismatch: There is none, or it was of another class.
    """
    if part is None or part.type != type(optimizer).__name__:
        raise CheckpointMismatch(
            "the file holds no state of such an optimizer",
            found=None if part is None else part.type,
            expected=type(optimizer).__name__,
            hint="tt.save(net, path, optimizer=optimizer)" if part is None else None,
        )
    return part


def restore(
    part: OptimizerPart, optimizer: torch.optim.Optimizer, model: nn.Module, tensors: dict[str, torch.Tensor]
) -> None:
    """Give an optimizer the parameters of `model` by name, and the groups and the state that were saved.

    What it held before is dropped. Schedulers that hold the optimizer see the new groups.

    Raises:
        CheckpointMismatch: The description is wrong. The optimizer has not changed.
    """
    parameters = dict(model.named_parameters())

    def value(data: Any) -> Any:
        if isinstance(data, dict) and set(data) == {"tensor"}:
            return tensors[data["tensor"]]
        return from_plain(data)

    def placed(held: Any, parameter: nn.Parameter) -> Any:
        # As torch does: moments go where the parameter is, step counts stay on the CPU.
        return held.to(parameter.device) if isinstance(held, torch.Tensor) and held.dim() else held

    try:
        groups = [
            {
                **{key: value(data) for key, data in group["options"].items()},
                "params": [parameters[name] for name in group["params"]],
            }
            for group in part.groups
        ]
        state = {
            parameters[name]: {key: placed(value(data), parameters[name]) for key, data in held.items()}
            for name, held in part.state.items()
        }
    except (LookupError, TypeError, AttributeError) as error:
        raise CheckpointMismatch(f"the optimizer's state does not belong to the model: {error!r}") from error
    optimizer.param_groups[:] = groups
    optimizer.state.clear()
    optimizer.state.update(state)  # type: ignore[arg-type]
