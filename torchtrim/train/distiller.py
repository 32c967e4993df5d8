"""`Distiller`: a student learns from a teacher, in a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, Literal

import torch
from torch import nn

from torchtrim.edits.budget import plain_number
from torchtrim.errors import InputError, ModelError, SelectionError
from torchtrim.graph.copying import unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.train.balance import Balance
from torchtrim.train.distil_batch import Signatures, batch_of, checked_logits, class_axis_of, wide
from torchtrim.train.distilled import Distilled, Term, Terms
from torchtrim.train.hint_joint import scalar
from torchtrim.train.hint_set import HintSet, Layers, asked_hints
from torchtrim.train.hints import Hint, Hints, merged_weights
from torchtrim.train.model_output import Pick, output_of
from torchtrim.train.soft_targets import (
    TASKS,
    Criterion,
    Task,
    check_criterion,
    fitted_targets,
    hard_loss,
    soft_classes,
    soft_labels,
    soft_values,
)
from torchtrim.train.teacher import Teacher, device_of, dtype_of, refuse_same
from torchtrim.train.teacher_cache import TeacherCache

_RESERVED = ("hard", "soft")
_KIND_OF = {"classes": "KL, T={:g}", "labels": "Bernoulli KL, T={:g}", "values": "mean squared error"}


class Distiller(nn.Module):
    """Runs a student and its teacher on a batch, and gives the loss that the student learns from.

    The loss is the sum of named parts times their weights. With labels and no `weights`:

        (1 - alpha) * hard + alpha * soft + the hints and `losses`, each times its own weight (1)

    where `hard` is the loss against the labels and `soft` that against the teacher's outputs, which has the factor T
    squared in it (Hinton, Vinyals and Dean 2015). Without labels the hard part is left out, and the others keep their
    weights. `weights` replaces any of them by name; `distiller.weights` is a dict that may be changed between steps.

    It is an `nn.Module`, to be trained as a whole: wrap the distiller (not the student) in `DistributedDataParallel`
    or `accelerator.prepare`. Its children are `student`, `projections` (layers between widths that differ, to be given
    to the optimizer too; empty where there are none) and, with `balance`, the running means. The teacher is no child:
    it is not in `parameters()`, `state_dict()` and `train()`, but follows `.to(device)`. While it is asked it is in
    eval mode, without gradients; its flags, its hooks and the random state are as before afterwards. The student is not
    changed either: what watches it is there for the forward only, its `state_dict` keys stay, and `distiller.student`
    is yours.

    Args:
        student: The model that is trained.
        teacher: The model that it learns from, such as the untouched original of an edited student. On the same device.
        temperature: T, above 0: higher ones show more of what the teacher thinks of the wrong classes.
        alpha: The share of the soft targets, 0 to 1; without `task`'s soft loss 0.
        hints: Pairs of places inside the two: `{"layer3": "layer3"}` (an address in the student, as `tt.cut` takes it,
            to one in the teacher), a list of addresses that both have, `tt.Hint`s (other losses, options), or `"auto"`:
            the ends of the stages, lined up through the student's history. `print(distiller.terms)` says which.
        weights: Weights by name: `{"hard": 0.3, "soft": 0.7, "layer3": 10.0}`. A part whose weight is 0 here is left
            out for good.
        task: What the outputs are: `"classes"` (logits of exclusive classes; softmax), `"labels"` (logits that are yes
            or no each: binary, multi-label; sigmoid) or `"values"` (regression; no temperature).
        criterion: The hard loss, called with the student's output and the targets; by default cross-entropy, binary
            cross-entropy, or the mean squared error. An `nn.Module` follows `.to(device)`; it is not trained.
        label_smoothing: For the default one, 0 to 1.
        class_axis: Which dimension of the outputs is the classes'. By default 1; of three dimensions it has to be said:
            -1 for sequences (N, L, C), 1 for (N, C, L).
        output: Which output is meant, where a model returns several: a name, a number, or a function of what was
            returned. By default the tensor itself, `"logits"`, `"out"`, or the only one.
        teacher_output: The same for the teacher, where it differs.
        losses: Further losses by name: functions of the two outputs, student first, that return a scalar.
        balance: Divide each part by a running mean of its own size, so that weights are shares.
        teacher_dtype: Ask a copy of the teacher in this type, such as `torch.bfloat16`; yours stays as it is.
        cache: Keep the teacher's outputs: `True` (in memory), a path, or a `tt.TeacherCache`, where the limits are. It
            has no hints' values, so it goes without hints.
        example_inputs: What the forward takes, for hints: one forward of each model, without gradients, tells the
            widths. May be left out where a history knows the shapes.

    Raises:
        InputError: An option out of range, hints that do not fit, no example inputs.
        PathError: A hint's place does not exist; where an edit took it away, says which.
        SelectionError: A weight without a loss, or nothing left to learn.
        ModelError: Student and teacher share parameters, or are on different devices.

    Example:
        >>> teacher = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
        >>> student = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> x, y = torch.randn(16, 8), torch.randint(0, 3, (16,))
        >>> distiller = Distiller(student, teacher, hints={"1": "1"}, example_inputs=x)
        >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.1)  # the student's, and the projections'
        >>> result = distiller(x, y)
        >>> result.loss.backward()
        >>> optimizer.step()
        >>> list(result.parts), result.output.shape, [p.shape for p in distiller.projections.parameters()]
        (['hard', 'soft', '1'], torch.Size([16, 3]), [torch.Size([32, 4]), torch.Size([32])])
    """

    student: nn.Module
    projections: nn.ModuleDict

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        temperature: float = 4.0,
        alpha: float = 0.5,
        hints: Hints | Literal["auto"] | None = None,
        *,
        weights: Mapping[str, float] | None = None,
        task: Task = "classes",
        criterion: Criterion | None = None,
        label_smoothing: float = 0.0,
        class_axis: int | None = None,
        output: Pick = None,
        teacher_output: Pick = None,
        losses: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] | None = None,
        balance: bool = False,
        teacher_dtype: torch.dtype | None = None,
        cache: bool | str | PathLike[str] | TeacherCache | None = None,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        super().__init__()
        inner = unwrap(student)
        refuse_same(inner, unwrap(teacher))
        self.temperature = _number("temperature", temperature, above=0)
        alpha = _number("alpha", alpha, low=0, high=1)
        self.label_smoothing = _number("label_smoothing", label_smoothing, low=0, high=1)
        if task not in TASKS:
            raise InputError("no such kind of output", path="task", found=repr(task), expected=" or ".join(TASKS))
        if criterion is not None:
            check_criterion(criterion)
            if label_smoothing:
                raise InputError("a criterion has its own label smoothing", path="label_smoothing", found=criterion)
        self.task: Task = task
        self.class_axis = class_axis
        self.output, self.teacher_output = output, output if teacher_output is None else teacher_output
        self.student = student
        self._teacher: Teacher | None = Teacher(teacher, teacher_dtype)
        # In tuples, since a module of a module would be trained and saved with it.
        self._criterion = (criterion,)
        self._losses = _losses(losses)

        found = asked_hints(inner, self._taught.model, hints, example_inputs)
        for name in [*found, *self._losses]:
            if name in _RESERVED or (name in found and name in self._losses):
                raise InputError("this name is taken", path=name, hint='hints={"another name": tt.Hint(...)}')
        defaults = {"hard": 1 - alpha, "soft": alpha}
        defaults |= {name: hint.weight for name, hint in found.items()} | dict.fromkeys(self._losses, 1.0)
        self.weights: dict[str, float] = merged_weights(defaults, weights)
        self._terms = tuple(self.weights)
        found = {name: hint for name, hint in found.items() if name in self.weights}
        self._losses = {name: loss for name, loss in self._losses.items() if name in self.weights}
        self._hints = HintSet(student, self._taught, found, example_inputs)
        self._layers = Layers(self._hints.joints, self._losses)
        self.projections = self._layers.like(student)
        if balance:
            self.balance = Balance(self._terms).to(device_of(inner))
        self._cache = self._cache_of(cache)
        self._signatures = Signatures(inner, self._taught.model)
        self._looked = False
        self._check_device()

    def forward(
        self,
        inputs: Any,
        targets: torch.Tensor | None = None,
        *,
        mask: torch.Tensor | None = None,
        index: torch.Tensor | Sequence[int] | None = None,
    ) -> Distilled:
        """Run both on a batch.

        Args:
            inputs: A tensor, or a tuple or dict of the forward's arguments. Of a dict each model gets what it takes.
            targets: Class numbers (-100: none), class probabilities (mixup, cutmix) in the shape of the outputs, yes or
                no for `"labels"`, values for `"values"`; `None` without labels.
            mask: Which positions of the outputs count (not padding), as truth values: in the shape of the outputs
                without the classes. For the soft part and the default hard one.
            index: The number of each sample, for the cache.

        Raises:
            InputError: No batch, targets or a mask that do not fit, an output that cannot be told.
            ModelError: The teacher's outputs do not fit the student's or are not finite (on a GPU that is seen one
                batch later), or it is on another device.
        """
        given = batch_of(inputs)
        teacher = self._taught
        if set(self.weights) != set(self._terms):
            raise SelectionError(
                "weights are there for the terms of this distiller",
                found=sorted(self.weights),
                expected=sorted(self._terms),
            )
        theirs, seen = self._ask(teacher, given, index)
        with self._hints.watching(self.student) as capture:
            returned = self._signatures.for_student(given).call(self.student)
        answer = output_of(returned, self.output, "student")
        pairs = self._hints.pairs(capture, seen, self._layers)
        with torch.autocast(answer.device.type, enabled=False):
            parts = self._outputs_parts(wide(answer), theirs, targets, mask)
            for joint, ours, taught in pairs:
                parts[joint.name] = joint.loss(ours, taught)
            if theirs is not None:
                parts |= {name: scalar(loss(wide(answer), theirs), name) for name, loss in self._losses.items()}
            if not parts:
                raise InputError("without targets nothing is left to learn from", path="targets", found=None)
            return self._weighted(answer, parts)

    def _outputs_parts(
        self,
        answer: torch.Tensor,
        theirs: torch.Tensor | None,
        targets: torch.Tensor | None,
        mask: torch.Tensor | None,
    ) -> dict[str, torch.Tensor]:
        """The hard and the soft part."""
        parts: dict[str, torch.Tensor] = {}
        axis = class_axis_of(answer, self.task, self.class_axis)
        if targets is not None and "hard" in self.weights:
            parts["hard"] = self._hard(answer, targets, axis, mask)
        if theirs is not None and "soft" in self.weights:
            checked_logits(answer, theirs, self.task)
            if self.task == "classes":
                parts["soft"] = soft_classes(answer, theirs, self.temperature, class_axis=axis, mask=mask)
            elif self.task == "labels":
                parts["soft"] = soft_labels(answer, theirs, self.temperature, mask=mask)
            else:
                parts["soft"] = soft_values(answer, theirs, mask=mask)
        return parts

    def _hard(self, answer: torch.Tensor, targets: torch.Tensor, axis: int, mask: torch.Tensor | None) -> torch.Tensor:
        (criterion,) = self._criterion
        if criterion is not None:
            return scalar(criterion(answer, targets), "hard")
        # On a GPU looking at the labels waits for it: only the first batch is looked at there.
        look = answer.device.type == "cpu" or not self._looked
        look = look and (self.task == "classes" or mask is None)  # what a mask leaves out may be anything
        targets = fitted_targets(self.task, answer, targets, axis, look=look)
        self._looked = True
        return hard_loss(self.task, answer, targets, class_axis=axis, label_smoothing=self.label_smoothing, mask=mask)

    def _weighted(self, answer: torch.Tensor, parts: dict[str, torch.Tensor]) -> Distilled:
        weights: dict[str, float | torch.Tensor] = {name: self.weights[name] for name in parts}
        if "balance" in self._modules:
            weights = {name: weights[name] * factor for name, factor in self.balance(parts).items()}
        loss = sum((parts[name] * weight for name, weight in weights.items()), start=answer.new_zeros(()).float())
        return Distilled(loss, answer, parts, weights)

    def _ask(
        self, teacher: Teacher, given: Inputs, index: torch.Tensor | Sequence[int] | None
    ) -> tuple[torch.Tensor | None, dict[str, torch.Tensor]]:
        """The teacher's output for a batch, and its values at the hints."""
        if not (self._hints.joints or self._losses or "soft" in self.weights):
            return None, {}
        self._check_device()
        given = self._signatures.for_teacher(given)
        student_dtype = dtype_of(self.student)

        def answered(inputs: Inputs) -> torch.Tensor:
            returned, _ = teacher.answer(inputs, student_dtype=student_dtype)
            return wide(output_of(returned, self.teacher_output, "teacher"))

        if self._cache is not None:
            self._cache.belongs_to(teacher.model, f"{teacher.own_dtype} {self.teacher_output}")
            seen: dict[str, torch.Tensor] = {}
            theirs = self._cache.answers(given, index, answered)
        else:
            returned, seen = teacher.answer(given, self._hints.teacher_places, self._hints.copies[1], student_dtype)
            if not (self._losses or "soft" in self.weights):
                return None, seen
            theirs = wide(output_of(returned, self.teacher_output, "teacher"))
        teacher.refuse_nan(theirs)
        return theirs, seen

    @property
    def teacher(self) -> nn.Module:
        """The teacher (with `teacher_dtype`, the copy that is asked)."""
        return self._taught.model

    @property
    def criterion(self) -> Criterion | None:
        """The hard loss that was given; `None` for the task's own."""
        return self._criterion[0]

    @property
    def cache(self) -> TeacherCache | None:
        """What the teacher said before; `None` where that is not kept."""
        return self._cache

    @property
    def hints(self) -> dict[str, Hint]:
        """The hints by name, as they were found."""
        return {joint.name: joint.hint for joint in self._hints.joints}

    @property
    def terms(self) -> Terms:
        """The parts of the loss, where they come from, and their weights: a table."""
        joints = {joint.name: joint for joint in self._hints.joints}
        found = []
        for name in self._terms:
            joint, weight = joints.get(name), self.weights.get(name, 0.0)
            if joint is not None:
                ours, theirs = (f"{side.place.text} {list(side.shape)}" for side in (joint.student, joint.teacher))
                layer = self._layers.projection(name)
                found.append(Term(name, joint.hint.kind, weight, ours, theirs, "" if layer is None else str(layer)))
            elif name == "hard":
                (criterion,) = self._criterion
                kind = "labels" if criterion is None else getattr(criterion, "__name__", type(criterion).__name__)
                found.append(Term(name, kind, weight))
            else:
                soft = name == "soft"
                found.append(Term(name, _KIND_OF[self.task].format(self.temperature) if soft else "function", weight))
        notes = ["balanced: each divided by a running mean of its size"] if "balance" in self._modules else []
        return Terms(tuple(found), tuple(notes))

    def close(self) -> None:
        """Let go of the teacher, and write the cache's file where there is one. The student can go on by itself."""
        if self._teacher is not None and self._cache is not None and self._cache.path is not None:
            self._cache.save()
        self._teacher = None

    def __enter__(self) -> Distiller:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def extra_repr(self) -> str:
        """One line for `print`."""
        return ", ".join(f"{name}={weight:g}" for name, weight in self.weights.items())

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Distiller:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        device = device_of(self.student)
        if device is not None:
            (criterion,) = self._criterion
            if isinstance(criterion, nn.Module) and device.type != "meta":
                criterion.to(device)
            if self._teacher is not None:
                self._teacher.to(device)
        return self

    @property
    def _taught(self) -> Teacher:
        if self._teacher is None:
            raise ModelError("this distiller was closed", hint="a new tt.Distiller(student, teacher)")
        return self._teacher

    def _check_device(self) -> None:
        ours, theirs = device_of(self.student), self._taught.device
        if ours is not None and theirs is not None and ours != theirs:
            raise ModelError(
                "the teacher is on another device than the student",
                path="teacher",
                found=theirs,
                expected=ours,
                hint=f"teacher.to({str(ours)!r}), or distiller.to({str(ours)!r}), which moves both",
            )

    def _cache_of(self, cache: bool | str | PathLike[str] | TeacherCache | None) -> TeacherCache | None:
        if cache is None or cache is False:
            return None
        if self._hints.joints:
            raise InputError(
                "a cache keeps the teacher's outputs, and hints need what is inside it",
                path="cache",
                found=f"{len(self._hints.joints)} hints",
                hint="one of the two",
            )
        if isinstance(cache, TeacherCache):
            return cache
        return TeacherCache(None if cache is True else cache)


def _number(
    name: str, given: object, *, above: float | None = None, low: float | None = None, high: float | None = None
) -> float:
    number = plain_number(given)
    fits = (
        number is not None
        and (above is None or above < number < float("inf"))
        and (low is None or low <= number)
        and (high is None or number <= high)
    )
    if number is None or not fits:
        expected = f"a number above {above:g}" if above is not None else f"a number from {low:g} to {high:g}"
        raise InputError("out of range", path=name, found=repr(given)[:60], expected=expected)
    return float(number)


def _losses(given: Any) -> dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    if given is None:
        return {}
    if not isinstance(given, Mapping) or not all(isinstance(n, str) and callable(f) for n, f in given.items()):
        raise InputError(
            "losses are functions by name", path="losses", found=repr(given)[:60], hint='{"name": function}'
        )
    return dict(given)
