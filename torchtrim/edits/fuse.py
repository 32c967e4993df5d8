"""`fuse_batchnorm`: fold batch norms into the convolutions and linear layers next to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from torchtrim.edits.apply import run
from torchtrim.edits.edit import Edit
from torchtrim.edits.fuse_fold import Fold, fold_of
from torchtrim.edits.neighbours import neighbours
from torchtrim.edits.norms import is_norm
from torchtrim.edits.rewire import call_by_name
from torchtrim.edits.work import Joint, Work
from torchtrim.errors import CheckFailed, EditError, InputError
from torchtrim.graph import check as checks
from torchtrim.graph.copying import is_meta, unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.graph.paths import What, find, resolve


def fuse_batchnorm(
    model: nn.Module,
    example_inputs: ExampleInputs | None,
    paths: What | None = None,
    *,
    copy: bool = True,
    check: bool = True,
) -> nn.Module:
    """Fold batch norms into the layers next to them: the same function in eval mode, with less to compute.

    A batch norm in eval mode multiplies each channel by a number and adds another. Where its input comes from one
    convolution, transposed convolution or linear layer and nothing else uses that, the layer's weight and bias take it
    over; where its output goes to one convolution without padding, or linear layer, and nowhere else, those of the
    layer behind it. In the norm's place is then an `nn.Identity`, or what the norm's class does besides (an
    activation). What feeds what is seen by running the model, in both modes.

    In train mode the folded norm no longer normalises by the batch, and its statistics no longer move: fold it before
    shipping, or to train with the statistics frozen.

    Args:
        model: Any `nn.Module`. It is left as it was.
        example_inputs: As for `cut`.
        paths: The batch norms to fold: paths, globs, types, predicates. By default all that can be; the history notes
            the others, and why not.
        copy: Copy the parameters. Without it the model itself is changed, as for `cut`.
        check: Compare with the original in eval mode, at several batch sizes and another input size.

    Raises:
        PathError: No such path.
        SelectionError: Nothing fits `paths`.
        EditError: None can be folded, or one that was named by its path cannot be; says why.
        CheckFailed: The result does not compute the same.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> fuse_batchnorm(net, torch.zeros(1, 3, 8, 8))
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
          (2): ReLU()
        )
    """
    model = unwrap(model)
    found: tuple[str, ...] | None = None
    if paths is not None:
        named = [each for each in _items(paths) if isinstance(each, str)]
        found = tuple(find(model, paths, where=lambda path, module: path in named or is_norm(module)))
    return run(model, example_inputs, [FuseBatchNorm(found)], copy=copy, check=check)


@dataclass(frozen=True)
class FuseBatchNorm(Edit):
    """Batch norms folded into the layers next to them.

    Attributes:
        paths: The batch norms that were asked for: paths and globs; `None` for all that can be folded.
        folded: The path of each that was, and of the layer that took it over; decided when it is done.
    """

    kind: ClassVar[str] = "fuse_batchnorm"
    paths: tuple[str, ...] | None = None
    folded: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        asked = "" if self.paths is None else ", ".join(self.paths[:2]) + (", ..." if len(self.paths) > 2 else "")
        return f"fuse_batchnorm({asked or 'all'})" + (f": {len(self.folded)} folded" if self.folded else "")

    def perform(self, work: Work) -> FuseBatchNorm:
        """Fold them in `work.model`."""
        model = work.model
        names = {module: path for path, module in model.named_modules()}  # a shared one by its first name
        asked = [norm for norm, _ in self.folded] or list(find(model, "**" if self.paths is None else self.paths))
        asked = [names[resolve(model, path)] for path in asked]
        norms = [path for path in asked if is_norm(model.get_submodule(path))]
        given = set(self.paths or ()) | {norm for norm, _ in self.folded}
        for path in [path for path in asked if path in given and path not in norms]:
            kind = type(model.get_submodule(path)).__name__
            raise EditError("not a batch norm with running statistics", path=path, found=kind)
        around = neighbours(model, work.inputs, _is_tracked)
        folds: dict[str, Fold] = {}
        skipped: dict[str, str] = {}
        for path in norms:
            fold = fold_of(model, path, around, taken={each.layer for each in folds.values() if not each.behind})
            if isinstance(fold, str):
                skipped[path] = fold
            else:
                folds[path] = fold
        refused = [path for path in given if path in skipped]
        if refused or not folds:
            first = refused[0] if refused else next(iter(skipped), None)
            reason = f"it cannot be folded: {skipped[first]}" if first else "there is no batch norm in the model"
            raise EditError(reason, path=first, found=f"{len(skipped)} of {len(norms)} cannot be" if first else None)
        call_by_name(work, folds)
        for path, fold in folds.items():
            fold.do(work)
            work.joints.append(Joint(path, None, None, f"folded into {fold.layer!r}"))
        work.notes += [f"{path!r} was not folded: {reason}" for path, reason in skipped.items()]
        if work.check:
            work.checked += _compare(work)
        return replace(self, folded=tuple((path, fold.layer) for path, fold in folds.items()))


def _items(paths: What) -> Sequence[object]:
    return paths if isinstance(paths, Sequence) and not isinstance(paths, str) else [paths]


def _is_tracked(module: nn.Module) -> bool:
    return is_norm(module) or isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def _compare(work: Work) -> list[str]:
    """Compare in eval mode; in train mode it only has to run."""
    if is_meta(work.model):
        return ["not run: the model is on the meta device"]
    done: list[str] = []
    for variant in checks.variants(work.inputs):
        try:
            expected = checks.run(checks.Side(work.before), variant)
        except Exception as error:
            if not done:
                raise InputError(f"the model does not run on the example inputs: {error}") from error
            done.append(f"{variant.name}: not checked, the original refuses it")
            continue
        found = checks.run(checks.Side(work.model), variant)
        difference = None if variant.training else checks.differs(expected.outputs, found.outputs)
        if difference is not None:
            raise CheckFailed(f"it does not compute what the original does in {variant.name}: {difference}")
        done.append(f"{variant.name}: {'runs' if variant.training else 'equal'}")
    return done
