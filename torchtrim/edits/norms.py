"""Batch norms in eval mode: a number for each channel to multiply by, one to add, and what a class does behind that."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchtrim.graph.check import differs
from torchtrim.graph.copying import kept_random_state, structural_copy

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


def is_norm(module: nn.Module) -> bool:
    """Whether a module keeps a mean and a variance for each channel, as batch norms of all packages do.

    Example:
        >>> is_norm(nn.BatchNorm2d(3)), is_norm(nn.LayerNorm(3))
        (True, False)
    """
    held = module._buffers.get("running_mean"), module._buffers.get("running_var")
    return None not in held and hasattr(module, "eps") and not isinstance(module, nn.modules.instancenorm._InstanceNorm)


def affine(norm: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a batch norm multiplies each channel by, and adds to it, in eval mode; in double precision."""
    held: Any = norm
    scale = (held.running_var.double() + held.eps).rsqrt()
    weight, bias = getattr(held, "weight", None), getattr(held, "bias", None)
    if weight is not None:
        scale = scale * weight.detach().double()
    shift = -held.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.detach().double()
    return scale, shift


def behind(norm: nn.Module, shape: tuple[int, ...]) -> nn.Module | None:
    """What a norm's class does behind the norm (an activation), told by trying; `None` where it does something else.

    Args:
        norm: The norm.
        shape: The shape of what it is given.
    """
    if type(norm) in _PLAIN:
        return nn.Identity()
    children = [child for child in norm.children() if not isinstance(child, nn.Identity)]
    rest: nn.Module = nn.Identity() if not children else children[0] if len(children) == 1 else nn.Sequential(*children)
    scale, shift = affine(norm)
    if scale.is_meta:
        return None
    given = noise(shape, norm)
    across = (1, -1, *(1,) * (given.dim() - 2))
    expected = tried(norm, given)
    plain = given.double() * scale.reshape(across) + shift.reshape(across)
    return rest if differs(expected, tried(rest, plain.to(expected.dtype))) is None else None


def noise(shape: tuple[int, ...], module: nn.Module) -> torch.Tensor:
    """Seeded normal values for a module, at batch 1."""
    reference = next(iter((*module.parameters(), *module.buffers())))
    generator = torch.Generator().manual_seed(0)
    given = torch.randn((1, *shape[1:]), generator=generator)
    return given.to(reference.device, reference.dtype)


def tried(module: nn.Module, given: torch.Tensor) -> torch.Tensor:
    """What a module makes of values in eval mode; the module is left as it was."""
    twin = structural_copy(module, own_buffers=True, user_hooks=False).eval()
    with torch.no_grad(), kept_random_state():
        result: torch.Tensor = twin(given.clone())
    return result
