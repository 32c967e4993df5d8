"""Which rule an operator has."""

from __future__ import annotations

from typing import Any

import torch

from torchtrim.channels import moves, products, windows  # their rules register themselves
from torchtrim.channels.arithmetic import batch_norm, elementwise, reduction, spatial
from torchtrim.channels.rules import RULES, Rule, unknown


def rule_for(op: Any) -> Rule:
    """The rule of an operator; where there is none, that what goes in cannot be narrowed."""
    name = op._schema.name.partition("::")[2]
    bare = name.removesuffix("_")
    found = RULES.get(name) or RULES.get(bare)
    if found is not None:
        return found
    if torch.Tag.pointwise in op.tags or bare in _ELEMENTWISE:
        return elementwise
    if bare in _REDUCTIONS:
        return reduction
    if name.startswith(_SPATIAL):
        return spatial
    return batch_norm if name.startswith(_NORMS) else unknown


_ELEMENTWISE = {
    *("copy", "clone", "contiguous", "detach", "alias", "to", "_to_copy", "lift_fresh", "lift_fresh_copy", "fill"),
    *("native_dropout", "dropout", "bernoulli", "masked_fill", "where", "hardswish", "hardsigmoid", "hardtanh"),
    *("_prelu_kernel", "prelu", "gelu", "elu", "selu", "celu", "mish", "silu", "softplus", "leaky_relu", "rrelu"),
    *("rrelu_with_noise", "threshold", "uniform", "normal", "exponential", "clamp", "clamp_min", "clamp_max", "zero"),
    *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "addcmul", "addcdiv", "lerp"),
    *("_conj", "nan_to_num", "logical_not", "relu6", "log_sigmoid_forward", "set_data"),
}
_REDUCTIONS = {
    *("sum", "mean", "amax", "amin", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "prod", "max"),
    *("min", "argmax", "argmin", "any", "all", "logsumexp", "median", "nansum"),
}
_SPATIAL: tuple[str, ...] = (
    "max_pool",
    "avg_pool",
    "_adaptive_avg_pool",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "upsample_",
)
_SPATIAL += ("_upsample_", "reflection_pad", "replication_pad", "fractional_max_pool", "mkldnn_max_pool")
_NORMS = ("native_batch_norm", "_native_batch_norm", "cudnn_batch_norm", "_batch_norm", "batch_norm", "miopen_batch")

__all__ = ["moves", "products", "rule_for", "windows"]
