"""The best candidate once more: made with all checks, healed, trained, and written as a file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchtrim.autopilot.building import Builder, Step
from torchtrim.autopilot.files import FileOf
from torchtrim.autopilot.finishing import norms_distilled, recovered, trained
from torchtrim.autopilot.plans import TrimPlan
from torchtrim.autopilot.result import Candidate
from torchtrim.autopilot.search import best_of
from torchtrim.errors import CheckFailed, EditError, ExportError, InputError
from torchtrim.graph.summary import summary
from torchtrim.train.outcome import FineTuning

if TYPE_CHECKING:
    from torchtrim.autopilot.trimming import Trimming

_WORTH = 0.98  # an error on data held back has to fall to this share; less may be chance
_UNTOUCHED = TrimPlan(0, "none", None, "float32")


@dataclass(frozen=True)
class Best:
    """The candidate that is given back.

    Attributes:
        plan: Its plan.
        steps: The steps to it.
        training: Its training.
        file: Its file.
    """

    plan: TrimPlan
    steps: list[Step]
    training: FineTuning | None
    file: FileOf | None


def best_made(work: Trimming, builder: Builder, tried: list[Candidate]) -> Best:
    """The best candidate, made once more; the next best where that fails.

    Args:
        work: What was asked, the score, the files.
        builder: Makes candidates.
        tried: What the study holds.

    Raises:
        EditError: No plan could be made and scored.
        TorchTrimError: As a training, or the user's functions, raise.
    """
    budget = work.asked.budget
    only_drop = not budget.computed and budget.latency_ms is None
    left = list(tried)
    while left:
        chosen = best_of(left, work.cost, work.noise, baseline=work.baseline, smallest=only_drop)
        if chosen is None:
            break
        if only_drop and chosen.excess:
            work.notes.append("every plan loses more than is allowed: the model is given back as it was")
            return _made(work, builder, None)
        try:
            return _made(work, builder, chosen)
        except (CheckFailed, EditError, ExportError) as error:
            work.notes.append(f"{chosen.plan}: passed over, for in the end {error.message}")
            left.remove(chosen)
    if not tried:
        return _made(work, builder, None)
    whys = list(dict.fromkeys(each.why for each in tried if each.why))
    raise EditError(
        "no plan could be made and scored",
        found="; ".join(whys[:3]) or f"{len(tried)} plans",
        hint="more trials, another pruning=, or removal=False",
    )


def _made(work: Trimming, builder: Builder, chosen: Candidate | None) -> Best:
    """A candidate, or the model as it is."""
    asked = work.asked
    plan = _UNTOUCHED if chosen is None else chosen.plan
    work.say(f"with all checks: {plan}", 0.9)
    share, size = (None, None) if chosen is None else (chosen.share, chosen.size)
    steps = builder.steps(plan, share, size=size, check=True)
    if steps[-1].name != "untouched" and asked.heal:
        steps = _healed(work, builder, plan, share, size, steps)
    training = None
    if asked.train_data is not None:
        folder = None if asked.folder is None else work.folder / "training"
        step, training = trained(
            steps[-1].model, work.original, work.inputs, asked.train_data, work.val_data, asked.training or {}, folder
        )
        steps.append(step)
    if asked.recover is not None:
        steps.append(recovered(asked.recover, steps[-1].model))
    file = None
    if work.files is not None:
        work.say("the file of the best", 0.97)
        file = work.files.of(steps[-1].model, plan.scheme, work.folder / "model.onnx", timed=work.timed)
    return Best(plan, steps, training, file)


def _healed(
    work: Trimming, builder: Builder, plan: TrimPlan, share: float | None, size: float | None, steps: list[Step]
) -> list[Step]:
    """The steps with the joints of removed blocks healed and norm layers distilled, where that helps."""
    if plan.remove:
        try:
            mended = builder.steps(plan, share, size=size, check=True, heal="linear")
        except (CheckFailed, EditError, InputError) as error:
            work.notes.append(f"the joints are not healed: {error.message}")
        else:
            if _costs_no_more(builder, mended, steps) and (
                work.judge.error(mended[-1].model) < _WORTH * work.judge.error(steps[-1].model)
            ):
                steps = mended
    step = norms_distilled(steps[-1].model, work.original, work.inputs, work.data, work.judge, work.say)
    if step is not None and work.scored(step.model) >= work.scored(steps[-1].model) - work.noise:
        steps.append(step)
    return steps


def _costs_no_more(builder: Builder, mended: list[Step], plain: list[Step]) -> bool:
    """Whether what was put in at the joints is paid for: within the limits, or by as much that went elsewhere."""
    now, before = (summary(each[-1].model, builder.inputs) for each in (mended, plain))
    if builder.limits and builder.keeps(now, builder.limits):
        return True
    return now.macs <= 1.01 * before.macs and now.params <= 1.01 * before.params
