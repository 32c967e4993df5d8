"""`hints="auto"`: the ends of the stages that student and teacher both have."""

from __future__ import annotations

from itertools import groupby

from torch import nn

from torchtrim.edits.apply import lies_in
from torchtrim.edits.history import history
from torchtrim.errors import SelectionError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.execution import run_fake
from torchtrim.graph.inputs import Inputs
from torchtrim.graph.watch import Call
from torchtrim.train.hints import Hint

_MOST = 4


def auto_hints(student: nn.Module, teacher: nn.Module, inputs: Inputs) -> dict[str, Hint]:
    """Up to four hints along the depth of a model that was made from its teacher by edits.

    Edits leave the paths of what they keep as they were, so that the same path in the untouched original is the same
    place. Paths that the histories say were taken away are left out, also where something new has the name. Of the
    paths that both call once, those at the smallest depth in the tree that sees every picture size are looked at
    (`layer1` to `layer4`; `features.0` to `features.18`), and the last is taken before the size or width changes.
    Where sizes do not change (transformers), blocks of one kind are taken at equal distances. The values are compared
    normalised.

    Args:
        student: The edited model.
        teacher: The model that it was made from.
        inputs: Example inputs.

    Raises:
        SelectionError: They have no such places in common.

    Example:
        >>> import torch
        >>> import torchtrim as tt
        >>> teacher = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1),
        ...     nn.Conv2d(8, 16, 3, stride=2), nn.Flatten(), nn.Linear(144, 5))
        >>> x = torch.zeros(1, 3, 16, 16)
        >>> student = tt.remove(teacher, x, "2")
        >>> list(auto_hints(student, teacher, Inputs.of(x))), list(auto_hints(teacher, teacher, Inputs.of(x)))
        (['0', '3'], ['2', '3'])
    """
    student, teacher = unwrap(student), unwrap(teacher)
    ours, theirs = _calls(student, inputs), _calls(teacher, inputs)
    gone = [path for model in (student, teacher) for entry in history(model).entries for path in entry.removed]
    head = _last_with_weights(teacher, theirs)
    both = {
        path: call
        for path, call in theirs.items()
        if path in ours
        and not lies_in(head, path)
        and not any(lies_in(path, each) for each in gone)
        and len(ours[path].outputs[0].shape) == len(call.outputs[0].shape)
        and any(True for _ in teacher.get_submodule(path).parameters())
    }
    tokens = sum(len(call.outputs[0].shape) == 3 for call in both.values())
    stages = _stages(both, inputs) if 2 * tokens <= len(both) else []
    chosen = stages or _blocks(teacher, both) or _layers(both)
    if not chosen:
        raise SelectionError(
            "student and teacher have no places in common to line up",
            found=f"{len(both)} paths that both call, of {len(ours)} and {len(theirs)}",
            hint='hints={"path in the student": "path in the teacher"}',
        )
    return {path: Hint(path, normalize=True) for path in chosen}


def _calls(model: nn.Module, inputs: Inputs) -> dict[str, Call]:
    """The calls of modules that are called once and give a tensor for each sample, by path."""
    execution = run_fake(model, inputs)
    count: dict[str, int] = {}
    for call in execution.calls:
        count[call.path] = count.get(call.path, 0) + 1
    return {
        call.path: call
        for call in execution.calls
        if call.path
        and count[call.path] == 1
        and call.outputs
        and len(call.outputs[0].shape) >= 2
        and call.outputs[0].shape[0] == inputs.batch
    }


def _depth(path: str) -> int:
    return path.count(".")


def _by_end(calls: dict[str, Call]) -> list[str]:
    return sorted(calls, key=lambda path: calls[path].end)


def _last_with_weights(model: nn.Module, calls: dict[str, Call]) -> str:
    """The head's last layer: what it gives is compared as the output, and what holds it is no feature."""
    own = [path for path in _by_end(calls) if any(True for _ in model.get_submodule(path).parameters(recurse=False))]
    return own[-1] if own else ""


def _stages(both: dict[str, Call], inputs: Inputs) -> list[str]:
    """The ends of stages, where there are pictures (or sounds, films) that get smaller."""
    maps = {path: call for path, call in both.items() if len(call.outputs[0].shape) >= 4}
    sizes = {path: _size(call.outputs[0].shape) for path, call in maps.items()}
    given = [tuple(tensor.shape[2:]) for tensor in inputs.tensors if tensor.dim() >= 4][:1]
    sizes = {path: size for path, size in sizes.items() if all(_shrunk(each, size) for each in given)}
    every = set(sizes.values())
    if len(every) < 2:
        return []
    depths = sorted({_depth(path) for path in sizes})
    seen = {depth: {size for path, size in sizes.items() if _depth(path) == depth} for depth in depths}
    most = max(len(found) for found in seen.values())
    depth = next(depth for depth in depths if len(seen[depth]) >= min(most, max(2, len(every) - 1)))
    order = [path for path in _by_end(maps) if path in sizes and _depth(path) == depth]
    ends = [list(run)[-1] for _, run in groupby(order, key=lambda path: both[path].outputs[0].shape[1:])]
    if len(ends) > _MOST:
        ends = [list(run)[-1] for _, run in groupby(order, key=lambda path: sizes[path])]
    return ends[-_MOST:]


def _shrunk(before: tuple[int, ...], after: tuple[int, ...]) -> bool:
    """Whether all sides were divided by one number, give or take rounding: windows and unfolded patches are not."""
    if len(before) != len(after):
        return True
    ratio = before[-1] / after[-1]
    return all(abs(a - b / ratio) <= 1 for a, b in zip(after, before, strict=True))


def _size(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The picture's size, wherever the channels are: a square one, or the dimensions in the middle."""
    if len(set(shape[1:-1])) == 1 and len(set(shape[2:])) > 1:
        return shape[1:-1]
    return shape[2:]


def _blocks(teacher: nn.Module, both: dict[str, Call]) -> list[str]:
    """Blocks of one kind, one after the other, at equal distances: the last of each third."""
    families: dict[tuple[str, object, tuple[int, ...]], list[str]] = {}
    for path in _by_end(both):
        shape = both[path].outputs[0].shape
        key = (path.rpartition(".")[0], type(teacher.get_submodule(path)), shape)
        if len(shape) >= 3 and max(shape[1:-1]) > 1 and path.rpartition(".")[2].isdigit():
            families.setdefault(key, []).append(path)
    found = [family for family in families.values() if len(family) > 1]
    if not found:
        return []
    family = min(found, key=lambda paths: (_depth(paths[0]), -len(paths)))
    count = min(3, len(family))
    return [family[round((number + 1) * len(family) / count) - 1] for number in range(count)]


def _layers(both: dict[str, Call]) -> list[str]:
    """Otherwise the layers before the width changes."""
    order = _by_end(both)
    depth = min(map(_depth, order), default=0)
    order = [path for path in order if _depth(path) == depth]
    return [list(run)[-1] for _, run in groupby(order, key=lambda path: both[path].outputs[0].shape[1:])][-_MOST:]
