"""How much each channel matters: one score for each unit, by name, by torch-pruning's criteria or by a callable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from torchtrim.channels.groups import Dependencies
from torchtrim.errors import EditError, InputError, ModelError, TorchTrimError, nearest
from torchtrim.graph.copying import is_meta, kept_random_state
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.importance.activations import mean_size, observations, share_of_nonzero
from torchtrim.importance.gradients import Loss, gradients
from torchtrim.importance.matrices import ChannelGroup, groups_of
from torchtrim.importance.stand_in import Item, observed, stand_ins

FloatArray: TypeAlias = npt.NDArray[np.float64]
Importance: TypeAlias = "str | Callable[..., Any]"

NAMES = (
    *("magnitude", "l1", "l2", "bn_scale", "lamp", "fpgm", "taylor", "hessian", "apoz", "activation", "random"),
    "reconstruction",
)
NEED_DATA = ("taylor", "hessian", "apoz", "activation", "reconstruction")
NEED_LABELS = ("taylor", "hessian")  # or a loss that does without


def scores(
    model: nn.Module,
    dependencies: Dependencies,
    importance: Importance = "magnitude",
    *,
    data: Iterable[Any] | None = None,
    loss: Loss | None = None,
    inputs: ExampleInputs | None = None,
) -> FloatArray:
    """How much each unit of channels matters; higher = keep.

    A *unit* is the smallest set of channels that can only go together: a score is worked out of every layer that one
    touches, as in DepGraph (Fang 2023, https://arxiv.org/abs/2301.12900). The arithmetic is torch-pruning's
    (https://github.com/VainF/Torch-Pruning, MIT) unless it says otherwise.

    | name | a unit's score in one tensor | source |
    | --- | --- | --- |
    | `magnitude`, `l2` | the sum of its squared weights | DepGraph, Fang 2023 |
    | `l1` | the sum of its absolute weights | Li 2017 [1] |
    | `bn_scale` | the size of its batch-norm scale | network slimming, Liu 2017 [2] |
    | `lamp` | its squared weights, as a share of those of all units that have no less | Lee 2021 [3] |
    | `fpgm` | the distances of its weights from those of all others, summed up | He 2019 [4] |
    | `taylor` | the sum of abs(weight * gradient) | Molchanov 2019 [5] |
    | `hessian` | the sum of weight^2 * mean(gradient of one sample ^ 2) | optimal brain damage, LeCun 1990 [6] |
    | `apoz` | how many of its values are not zero where it is read: a share | Hu 2016 [7] |
    | `activation` | the mean size of its values where it is read | torch-pruning |
    | `random` | a number from 0 to 1; `"random:7"` with the seed 7 | |
    | `reconstruction` | what the layers that read it lose, solved again without it | |

    [1] https://arxiv.org/abs/1608.08710 [2] https://arxiv.org/abs/1708.06519 [3] https://arxiv.org/abs/2010.07611
    [4] https://arxiv.org/abs/1811.00250 [5] https://arxiv.org/abs/1906.10771 [7] https://arxiv.org/abs/1607.03250
    [6] https://proceedings.neurips.cc/paper/1989/hash/6c9882bbac1c7093bd25041881277658-Abstract.html

    A unit's scores in the tensors of its group are averaged. Then, but for `lamp` and `apoz`, whose scores can be
    compared as they are, each group's are divided by their mean: 1 is a group's average unit. So units of all groups
    can be ranked together (`scope="global"`).

    `apoz` tells channels apart where activation functions give zeros (ReLU); behind GELU or SiLU `activation` does.

    Weights that write or read a unit count, and the scales of batch norms and layer norms; biases do not, nor do
    tokens and embeddings. Of a weight that reads several groups (behind a concatenation) each group counts its own
    columns. As in torch-pruning, `taylor` leaves batch norms out. Unlike there, weights of depthwise convolutions
    count; `fpgm` takes the distances of the weights themselves, not of their squares (a `tp.importance.FPGMImportance`
    that is handed over does as it always did); and `hessian` averages over all samples, not over the last one.

    Args:
        model: The model that the dependencies were made of. It is left as it was: gradients, modes, buffers and the
            random state too.
        dependencies: Its units, in groups.
        importance: A name, an instance of a criterion of torch-pruning (`tp.importance.LAMPImportance()`), or a
            function that is given a `ChannelGroup` and returns a score for each of its units: a tensor, an array or a
            list, higher = keep. A function's scores are taken as they are.
        data: Batches for `taylor`, `hessian`, `apoz` and `activation`: tensors, `(inputs, targets)` pairs or dicts.
            All of them are gone through once, in the mode (train or eval) that the model is in.
        loss: For `taylor` and `hessian`: `loss(output, target)`, or `loss(model, batch)` where its first argument is
            called `model` or `net`. By default the output's own `loss` where it has one, cross-entropy for
            whole-number targets, and the mean squared error for others.
        inputs: Example inputs: which part of a batch is for the forward.

    Returns:
        One score for each unit, `(dependencies.count,)`. Units of a group about which the criterion says nothing are
        NaN (see `silent`); all others are finite.

    Raises:
        EditError: No such criterion, or what it returns are not as many finite numbers as there are units.
        InputError: The criterion needs data and there is none; or the data or the loss does not fit the model.
        ModelError: Weights that are not finite, or have no values (the meta device).

    Example:
        >>> from torchtrim.channels.follow import follow
        >>> from torchtrim.channels.groups import dependencies
        >>> net = nn.Sequential(nn.Linear(4, 3, bias=False), nn.ReLU(), nn.Linear(3, 2, bias=False))
        >>> for layer, weight in (net[0], [[1.0] * 4, [2.0] * 4, [3.0] * 4]), (net[2], [[0.0, 1, 0]] * 2):
        ...     _ = layer.weight.data.copy_(torch.tensor(weight))
        >>> found = dependencies(net, follow(net, Inputs.of(torch.zeros(1, 4))))
        >>> scores(net, found, "l1").round(3)  # 4, 8 + 2 and 12, divided by their mean
        array([0.462, 1.154, 1.385])
    """
    _check(importance)
    inputs = Inputs() if inputs is None else Inputs.of(inputs)
    if importance == "reconstruction":
        from torchtrim.importance.reconstruction import reconstruction

        return reconstruction(model, dependencies, _needed(data, importance), inputs)
    if isinstance(importance, str) and importance.partition(":")[0] == "random":
        return _random(dependencies, importance)
    if is_meta(model):
        raise ModelError("the model is on the meta device: there are no values to rank by", hint='importance="random"')
    with kept_random_state():
        found = np.full(dependencies.count, np.nan)
        told = _by_group(model, dependencies, importance, data, loss, inputs)
        for group, (seen, values) in zip(dependencies.groups, told, strict=True):
            if values is not None:
                found[group.units] = _finite(values, seen, strict=not _known(importance))
        if not _known(importance) and found.size and np.isnan(found).all():
            raise EditError(
                "the criterion says nothing of any group: it returned None",
                path=f"importance={_name_of(importance)}",
                hint="a return with a score for each of group.units",
            )
        return found


def silent(importance: Importance) -> str:
    """Why the units of a group have no score (are NaN), in words.

    Example:
        >>> silent("bn_scale")
        'it has no batch norm to rank its channels by'
    """
    if importance == "bn_scale":
        return "it has no batch norm to rank its channels by"
    if importance in ("apoz", "activation", "reconstruction"):
        return "no layer that reads it was seen in the data"
    if importance in ("taylor", "hessian"):
        return "the loss does not depend on it"
    return f"{_name_of(importance)!r} says nothing of it"


def _by_group(
    model: nn.Module,
    dependencies: Dependencies,
    importance: Importance,
    data: Iterable[Any] | None,
    loss: Loss | None,
    inputs: Inputs,
) -> Iterator[tuple[ChannelGroup, Any]]:
    """What the criterion says of each group, in their order."""
    if not isinstance(importance, str) and not _known(importance):
        for group in groups_of(model, dependencies):
            yield group, _called(importance, group)
        return
    from torch_pruning.pruner import importance as criteria

    criterion: Any = _criterion(importance) if isinstance(importance, str) else importance
    if isinstance(criterion, criteria.ActivationImportance):
        statistic = share_of_nonzero if importance == "apoz" else mean_size
        for group, readings in zip(
            groups_of(model, dependencies, buffers=False, biases=False),
            observations(model, dependencies, _needed(data, importance), inputs, statistic),
            strict=True,
        ):
            yield group, _asked(criterion, [observed(*each) for each in readings])
        return
    slopes = None
    if isinstance(criterion, criteria.GroupHessianImportance):
        slopes = gradients(model, _needed(data, importance), loss, inputs, "squared")
    elif isinstance(criterion, criteria.GroupTaylorImportance):
        kind = "signed" if criterion.multivariable else "absolute"
        slopes = gradients(model, _needed(data, importance), loss, inputs, kind)
    biases = bool(getattr(criterion, "bias", False))
    for group in groups_of(model, dependencies, slopes, buffers=False, biases=biases):
        reached = slopes is None or any(each.gradient is not None for each in group.tensors)
        items = stand_ins(group, shifted=importance == "fpgm") if reached else []
        yield group, _asked(criterion, items)


def _called(importance: Callable[..., Any], group: ChannelGroup) -> Any:
    """What a function of the user's says of a group."""
    try:
        return importance(group)
    except (TorchTrimError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise EditError(
            f"the criterion {_name_of(importance)!r} raised {type(error).__name__}: {error}",
            path=group.name,
            expected="a function that is given a ChannelGroup and returns a score for each of its units",
        ) from error


def _asked(criterion: Any, items: list[Item]) -> Any:
    """What a criterion of torch-pruning says of a group; nothing of one without layers."""
    try:
        return criterion(items) if items else None
    except (AttributeError, KeyError) as error:  # one that has to be prepared on a graph of its own (OBDC)
        raise EditError(
            f"this criterion asks for more than the layers of a group: {type(error).__name__}: {error}",
            path=f"importance={_name_of(criterion)}",
            expected=_EXPECTED,
        ) from error


def _known(importance: Importance) -> bool:
    """Whether it is a name or a criterion of torch-pruning, not a function of the user's."""
    return isinstance(importance, str) or any(
        kind.__module__.startswith("torch_pruning.") for kind in type(importance).__mro__
    )


def _needed(data: Iterable[Any] | None, importance: Importance) -> Iterable[Any]:
    if data is None:
        raise InputError(
            f"importance {_name_of(importance)!r} looks at what flows through the model, so it needs data",
            expected="data=, an iterable of batches (tensors, (inputs, targets) pairs or dicts)",
            hint='data=loader, or importance="magnitude"',
        )
    return data


def _criterion(name: str) -> Any:
    from torch_pruning.pruner import importance as criteria

    made = {
        "magnitude": lambda: criteria.GroupMagnitudeImportance(p=2),
        "l2": lambda: criteria.GroupMagnitudeImportance(p=2),
        "l1": lambda: criteria.GroupMagnitudeImportance(p=1),
        "bn_scale": criteria.BNScaleImportance,
        "lamp": criteria.LAMPImportance,
        "fpgm": lambda: criteria.FPGMImportance(p=1),
        "taylor": criteria.GroupTaylorImportance,
        "hessian": criteria.GroupHessianImportance,
        "apoz": lambda: criteria.ActivationImportance(normalizer=None),
        "activation": criteria.ActivationImportance,
    }
    return made[name]()


def _check(importance: Importance) -> None:
    if not isinstance(importance, str):
        if not callable(importance):
            raise EditError("no such importance", path="importance", found=importance, expected=_EXPECTED)
        if isinstance(importance, type):
            raise EditError(
                "a criterion is an instance, and this is a class",
                path="importance",
                found=importance.__name__,
                hint=f"{importance.__name__}()",
            )
        return
    name, _, seed = importance.partition(":")
    if name not in NAMES or (seed and (name != "random" or not seed.isdecimal())):
        raise EditError(
            "no such importance", path="importance", found=importance, expected=_EXPECTED, hint=nearest(name, NAMES)
        )


_EXPECTED = f"{', '.join(NAMES)}, a criterion of torch-pruning, or a function of a ChannelGroup"


def _random(dependencies: Dependencies, importance: str) -> FloatArray:
    seed = int(importance.partition(":")[2] or 0)
    return np.random.default_rng(seed).random(dependencies.count)


def _finite(values: Any, group: ChannelGroup, *, strict: bool) -> FloatArray:
    """The scores of a group as numbers. Where a whole group is zero, so is its mean: its scores are zero then."""
    try:
        if torch.is_complex(torch.as_tensor(values)):
            raise TypeError("they are complex")
        found = np.asarray(torch.as_tensor(values).detach().double().cpu().reshape(-1))
    except (TypeError, ValueError, RuntimeError) as error:
        raise EditError(f"these are no scores: {error}", path=group.name, found=type(values).__name__) from error
    if found.size != group.units:
        raise EditError("as many scores as units are needed", path=group.name, found=found.size, expected=group.units)
    if np.isfinite(found).all():
        return found
    for tensor in group.tensors:
        for what, each in (("values", tensor.values), ("gradients", tensor.gradient)):
            if each is not None and not bool(torch.isfinite(each).all()):
                raise ModelError(f"its {what} are not finite: nothing can be ranked by them", path=tensor.path)
    if strict:
        raise EditError("a score is a finite number", path=group.name, found=found.tolist())
    return np.where(np.isfinite(found), found, 0.0)


def _name_of(importance: Any) -> str:
    return (
        importance if isinstance(importance, str) else str(getattr(importance, "__name__", type(importance).__name__))
    )
