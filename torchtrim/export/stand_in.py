"""The copy of a model that is exported and compared: what it computes is what the user's model computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from torchtrim.errors import InputError, TorchTrimError
from torchtrim.export.outputs import named_outputs
from torchtrim.graph.copying import has_function_hooks, kept_random_state, structural_copy
from torchtrim.graph.execution import no_fused_attention, run_fake
from torchtrim.graph.inputs import Inputs


def stand_in(model: nn.Module, inputs: Inputs) -> nn.Module:
    """A copy of a model, in eval mode, that can be run as often as one likes; it shares the parameters.

    Forward hooks that are plain functions are left out, since what they write to is the user's, unless they change
    what the model gives. To find that out, they run once.

    Raises:
        InputError: The model does not take the inputs; names the module that refuses.
    """
    needed = run_fake(model, inputs).user_hooks
    bare = structural_copy(model, own_buffers=True, user_hooks=False).eval()
    if not needed and has_function_hooks(model):
        hooked = structural_copy(model, own_buffers=True).eval()
        needed = not _same(_seeded(hooked, inputs), _seeded(bare, inputs))
    return structural_copy(model, own_buffers=True, user_hooks=needed).eval()


def run_once(model: nn.Module, inputs: Inputs) -> Any:
    """One forward without gradients, on copies of the inputs, by the operators that an ONNX file is made of.

    Raises:
        InputError: The model does not take the inputs.
    """
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    moved = inputs.map(lambda tensor: tensor.detach().clone().to(device))
    try:
        # The fused path of nn.TransformerEncoder gives zeros at padded places, and an exported file does not.
        with torch.no_grad(), no_fused_attention():
            return moved.call(model)
    except (TorchTrimError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # a user's forward raises what it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise InputError(f"the model does not take these inputs: {reason}", found=inputs.describe()) from error


def _seeded(model: nn.Module, inputs: Inputs) -> dict[str, torch.Tensor]:
    with kept_random_state():
        torch.manual_seed(0)
        return named_outputs(run_once(model, inputs))


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)
        for a, b in zip(one.values(), other.values(), strict=True)
    )
