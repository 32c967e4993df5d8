"""`sparsify`: set the least important weights to zero; the shapes stay."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from torchtrim.edits.apply import run
from torchtrim.edits.budget import plain_number
from torchtrim.edits.edit import Edit
from torchtrim.edits.sparse_decide import Masks, decide, numbers_of
from torchtrim.edits.sparse_record import Sparsified
from torchtrim.edits.sparse_weights import choose, held_at
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import CheckFailed, EditError, InputError
from torchtrim.graph import check as checks
from torchtrim.graph.check import Side
from torchtrim.graph.copying import is_meta, unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import What, several, spelled
from torchtrim.importance.weights import Pool, check_importance

SparseScope = Literal["uniform", "global"]


def sparsify(
    model: nn.Module,
    example_inputs: ExampleInputs | None = None,
    sparsity: float | Mapping[Any, float] | None = None,
    *,
    thresholds: Mapping[Any, float] | None = None,
    pattern: str | None = None,
    block: Iterable[int] | None = None,
    pool: Pool = "avg",
    scope: SparseScope = "uniform",
    importance: str = "magnitude",
    include: What | Iterable[What] | None = None,
    exclude: What | Iterable[What] = (),
    max_sparsity: float = 0.99,
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Set the least important weights of a model to zero, at once. The shapes stay, and so do all names.

    To do so little by little while the model is trained, which keeps far more accuracy, see `MagnitudePruner`.

    Weights are ranked by their absolute values (Han et al., *Learning both weights and connections for efficient neural
    networks*, 2015). Taken are those of layers: matrices and kernels, once where they are shared. Biases, norms and
    embeddings are left out, and so are the first and the last layer; `tt.history` says so. Weights that are zero stay
    zero, and count.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`; here they are only needed to tell the first and the last layer by the order of
            execution, and to run the result. Without any the order is that of registration.
        sparsity: The fraction of the weights that are zero afterwards, to the nearest whole number; or fractions by
            path, glob, type or predicate, of which the first counts that fits (weights that none fits stay).
        thresholds: Numbers by path, in place of it: weights whose absolute value is smaller go.
        pattern: `"2:4"` and the like, in place of it: of 4 neighbours along the input dimension the 2 largest stay
            (Mishra et al., *Accelerating sparse deep neural networks*, 2021, which GPUs compute faster from Ampere on).
            Weights whose inputs are no multiple are left out.
        block: Weights go in blocks of this shape: of outputs and inputs, and of a kernel's sides where there are more
            numbers (without them kernels go as a whole). The fraction is one of blocks then.
        pool: Whether a block is ranked by its mean (`"avg"`) or its largest (`"max"`).
        scope: `"uniform"`: each weight loses the same fraction. `"global"`: all are ranked together.
        importance: `"magnitude"`; `"random"` or `"random:SEED"`, a baseline.
        include: Only these, the first and last layers and embeddings too where they are among them: paths (those of
            parameters too), globs, types, predicates.
        exclude: What is left out besides.
        max_sparsity: The largest fraction that one weight may lose with `scope="global"`.
        copy: As for `cut`.
        check: Run the result in eval mode, where inputs are given or known.

    Returns:
        The sparse model.

    Raises:
        EditError: What is asked for is no sparsity, or nothing can be pruned so.
        PathError: A path that does not exist; the nearest are named.
        SelectionError: A glob, type or predicate that nothing fits.
        ModelError: A weight is lazy, not finite, parametrized, or masked by `torch.nn.utils.prune`.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sparse = sparsify(net, torch.zeros(1, 4), 0.75)
        >>> int((sparse[2].weight == 0).sum()), int((net[2].weight == 0).sum())
        (48, 0)
    """
    model = unwrap(model)
    edit = asked_for(
        model,
        sparsity,
        thresholds=thresholds,
        pattern=pattern,
        block=block,
        pool=pool,
        scope=scope,
        importance=importance,
        include=include,
        exclude=exclude,
        max_sparsity=max_sparsity,
    )
    return run(model, example_inputs, [edit], copy=copy, check=check)


@dataclass(frozen=True)
class Sparsify(Edit):
    """Weights that are zero.

    Attributes:
        sparsity: The fraction of the weights that are zero, or fractions by path or glob.
        thresholds: By path or glob the absolute value below which weights go.
        pattern: `"2:4"`: how many of how many neighbours stay.
        block: The shape of the blocks that go together.
        pool: What blocks are ranked by: `"avg"` or `"max"`.
        scope: `"uniform"` or `"global"`.
        importance: `"magnitude"`, `"random"` or `"random:SEED"`.
        include: Paths and globs of what takes part; `None` for the default.
        exclude: Paths and globs of what does not.
        max_sparsity: The largest fraction that one weight may lose with `scope="global"`.
        decided: The masks, in the record of what was done.
    """

    kind: ClassVar[str] = "sparsify"
    joins: ClassVar[bool] = False
    needs_inputs: ClassVar[bool] = False
    sparsity: float | dict[str, float] | None = None
    thresholds: dict[str, float] | None = None
    pattern: str | None = None
    block: tuple[int, ...] | None = None
    pool: Pool = "avg"
    scope: SparseScope = "uniform"
    importance: str = "magnitude"
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    max_sparsity: float = 0.99
    decided: Sparsified | None = field(default=None, metadata={"decided": True})

    def __post_init__(self) -> None:
        plain: dict[str, Any] = {}
        if isinstance(self.sparsity, Mapping):
            plain["sparsity"] = {_key(key): fraction(number, str(key)) for key, number in self.sparsity.items()}
        elif self.sparsity is not None:
            plain["sparsity"] = fraction(self.sparsity, "sparsity")
        if self.thresholds is not None:
            if not isinstance(self.thresholds, Mapping):
                raise EditError("values by path", path="thresholds", found=repr(self.thresholds), hint='{"**": 0.01}')
            plain["thresholds"] = {_key(key): _threshold(number, str(key)) for key, number in self.thresholds.items()}
        if self.pattern is not None:
            kept, of = self.groups
            own = 1 - kept / of
            if plain.get("sparsity", own) != own and not _near(plain["sparsity"], own):
                raise EditError(
                    f"the pattern {self.pattern} is a sparsity of its own",
                    path="sparsity",
                    found=self.sparsity,
                    expected=own,
                )
            plain["sparsity"] = own
        if (self.sparsity is None and self.pattern is None) == (self.thresholds is None):
            raise EditError(
                "how much is to be zero?",
                found="both" if self.thresholds is not None else "nothing",
                expected="a sparsity, thresholds or a pattern",
            )
        if self.block is not None:
            plain["block"] = _sides(self.block)
            if self.pattern is not None:
                raise EditError("blocks or a pattern, not both", found=f"block={self.block}, pattern={self.pattern}")
        for name, choices in (("pool", get_args(Pool)), ("scope", get_args(SparseScope))):
            if getattr(self, name) not in choices:
                raise EditError(f"no such {name}", path=name, found=getattr(self, name), expected=" or ".join(choices))
        if self.scope == "global" and (self.thresholds is not None or isinstance(self.sparsity, Mapping)):
            raise EditError("numbers by path leave nothing to rank together", path="scope", found="global")
        check_importance(self.importance)
        if self.thresholds is not None and self.importance != "magnitude":
            raise EditError("thresholds are magnitudes", path="importance", found=self.importance)
        if self.include is not None:
            plain["include"] = tuple(map(_key, several(self.include)))
        plain["exclude"] = tuple(map(_key, several(self.exclude)))
        plain["max_sparsity"] = fraction(self.max_sparsity, "max_sparsity", most=1.0)
        for name, value in plain.items():
            object.__setattr__(self, name, value)

    @property
    def groups(self) -> tuple[int, int]:
        """How many of how many neighbours a pattern keeps.

        Raises:
            EditError: It is no pattern.
        """
        found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", self.pattern) if isinstance(self.pattern, str) else None
        kept, of = (int(found[1]), int(found[2])) if found else (0, 0)
        if not 0 < kept < of:
            raise EditError(
                "no pattern of N of M weights that stay",
                path="pattern",
                found=repr(self.pattern),
                expected='like "2:4"',
            )
        return kept, of

    @property
    def by_path(self) -> dict[str, float]:
        """Numbers that are given by path."""
        given = self.thresholds if self.thresholds is not None else self.sparsity
        return dict(given) if isinstance(given, Mapping) else {}

    def perform(self, work: Work) -> Sparsify:
        """Do it on `work.model`; returns the record with the masks."""
        if self.decided is not None:
            gone, decided = self.decided.gone(), self.decided
        else:
            chosen = choose(work.model, self.include, self.exclude, also=self.by_path, inputs=work.inputs)
            taking, numbers, left = numbers_of(self, work.model, chosen.weights)
            whole = self.sparsity if isinstance(self.sparsity, float) else 0.0
            gone, thresholds = decide(self, taking, numbers, sparsity=whole)
            decided = Sparsified.of(gone, thresholds, chosen.left_out | left)
        put(work, gone)
        work.notes += decided.told()
        work.joints += [
            Joint(name, None, None, f"sparsity {float(mask.float().mean()):.2%}") for name, mask in gone.items()
        ]
        if work.check:
            work.checked += finite_still(work)
        return replace(self, decided=decided)


def asked_for(model: nn.Module, sparsity: float | Mapping[Any, float] | None, **settings: Any) -> Sparsify:
    """The record of what is asked for, selections written as paths and globs.

    Raises:
        EditError: A value is none.
        SelectionError: A type or predicate that nothing fits.
    """
    include, exclude = settings.pop("include", None), settings.pop("exclude", ())
    block, thresholds = settings.pop("block", None), settings.pop("thresholds", None)
    return Sparsify(
        sparsity=_by_path(model, sparsity),
        thresholds=_by_path(model, thresholds),
        block=tuple(block) if isinstance(block, Iterable) else block,
        include=None if include is None else spelled(model, include),
        exclude=spelled(model, exclude),
        **settings,
    )


def put(work: Work, gone: Masks) -> None:
    """Set weights to zero in a model that is edited, and their gradients.

    Raises:
        PathError: The model has no such parameter.
        EditError: It has another shape.
    """
    held = held_at(work.model, gone)
    for name, mask in gone.items():
        if held[name].shape != mask.shape:
            raise EditError(
                "it has another shape than where this was recorded",
                path=name,
                found=list(held[name].shape),
                expected=list(mask.shape),
                hint="the model that the record was made of",
            )
    for name, mask in gone.items():
        weight = held[name]
        if has_no_values(weight):
            continue  # they are read later
        path, _, key = name.rpartition(".")
        mask = mask.to(weight.device)
        new = work.reshape(work.model.get_submodule(path), key, weight.detach().masked_fill(mask, 0))
        new.grad = None if weight.grad is None else weight.grad.detach().masked_fill(mask, 0)


def fraction(given: object, path: str, most: float = 0.0) -> float:
    """A sparsity: from 0 to below 1.

    Raises:
        EditError: It is none.

    Example:
        >>> fraction(0.5, "sparsity")
        0.5
    """
    number = plain_number(given)
    if number is None or (not 0 <= number < 1 and number != most):
        raise EditError(
            "a sparsity is the fraction of the weights that are zero",
            path=path,
            found=repr(given),
            expected="0 to 1" if most == 1 else "0 to 1, without 1",
        )
    return float(number)


def has_no_values(weight: torch.Tensor) -> bool:
    """Whether a weight is on the meta device, or one zero that stands for all values."""
    return weight.is_meta or (
        weight.numel() > 1 and not any(weight.stride()) and not bool(weight.detach()[(0,) * weight.dim()])
    )


def _by_path(model: nn.Module, given: Any) -> Any:
    if not isinstance(given, Mapping):
        return given
    found: dict[str, float] = {}
    for what, number in given.items():
        for path in spelled(model, what):
            found.setdefault(path, number)
    return found


def _near(one: Any, other: float) -> bool:
    return isinstance(one, float) and math.isclose(one, other, abs_tol=1e-9)


def _key(given: object) -> str:
    if not isinstance(given, str):
        raise EditError(
            "a record names weights by paths and globs", found=repr(given), hint="tt.sparsify, which takes types"
        )
    return given


def _threshold(given: object, path: str) -> float:
    number = plain_number(given)
    if number is None or not 0 <= number < math.inf:
        raise EditError("a threshold is a magnitude", path=path, found=repr(given), expected="0 or more")
    return float(number)


def _sides(given: object) -> tuple[int, ...]:
    sides = tuple(plain_number(side) for side in given) if isinstance(given, (tuple, list)) else ()
    whole = [side for side in sides if isinstance(side, int) and side >= 1]
    if not sides or len(whole) != len(sides):
        raise EditError("no shape of a block", path="block", found=repr(given), expected="like (4, 1): outputs, inputs")
    return tuple(whole)


def finite_still(work: Work) -> list[str]:
    """Run the result once, in eval mode.

    Raises:
        CheckFailed: An output that was finite is not any more.
    """
    if is_meta(work.model):
        return ["not run: the model is on the meta device"]
    if not work.inputs.tensors:
        return ["not run: there are no example inputs"]
    variant = checks.variants(work.inputs)[0]
    try:
        expected = checks.run(Side(work.before), variant, gradients=False)
    except Exception as error:
        raise InputError(f"the model does not run on the example inputs: {error}") from error
    found = checks.run(Side(work.model), variant, gradients=False)
    for name, value in checks.flatten(found.outputs).items():
        before = checks.flatten(expected.outputs).get(name)
        if _is_finite(before) and not _is_finite(value):
            raise CheckFailed("an output is not finite any more", path=name)
    return [f"{variant.name}: runs"]


def _is_finite(value: Any) -> bool:
    return not isinstance(value, torch.Tensor) or not value.is_floating_point() or bool(torch.isfinite(value).all())
