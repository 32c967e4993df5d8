"""What is done to the candidate that was chosen: norm layers distilled, and a training where the user wants one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.autopilot.building import Step
from torchtrim.edits.heal_data import Calibration
from torchtrim.edits.heal_norms import Judge, distilled, norm_parameters
from torchtrim.errors import InputError
from torchtrim.graph.copying import full_copy, kept_random_state, structural_copy
from torchtrim.graph.inputs import Inputs
from torchtrim.search.measured import content_of, key_of
from torchtrim.train.finetune import finetune
from torchtrim.train.outcome import FineTuning

_WORTH = 0.97  # an error on data held back has to fall to this share; less may be chance


def norms_distilled(
    net: nn.Module,
    original: nn.Module,
    inputs: Inputs,
    data: list[Any],
    judge: Judge,
    say: Callable[[str, float], Any],
) -> Step | None:
    """Distil the scales and biases of the norm layers towards the original's outputs, where that helps.

    A few hundred inputs forward and backward, without labels (see `torchtrim.edits.heal_norms`); judged on one row in
    five, which was held back. None where it does not help, or there is no norm layer.
    """
    if not norm_parameters(net):
        return None
    started = time.perf_counter()
    calibration = Calibration.of(data, original, inputs, what="distillation")
    with kept_random_state():
        whole = structural_copy(original, own_buffers=True, user_hooks=False).eval()
        better = full_copy(net).eval()
        learn = {name: held.requires_grad for name, held in better.named_parameters()}
        before = judge.error(better)
        values, after, _ = distilled(
            better, whole, calibration.to_fit, judge, lambda step: say("norm layers distilled", step / 100)
        )
    if not values or not after < _WORTH * before:
        return None
    with torch.no_grad():
        for name, held in better.named_parameters():
            if name in values:
                held.copy_(values[name])
            held.requires_grad_(learn[name])
            held.grad = None
    note = f"{len(values)} tensors, error on data held back {before:.4f} -> {after:.4f}"
    return Step("norm layers distilled", better, time.perf_counter() - started, note)


def trained(
    net: nn.Module,
    original: nn.Module,
    inputs: Inputs,
    train_data: Iterable[Any],
    val_data: Iterable[Any] | None,
    options: Mapping[str, Any],
    folder: Path | None,
) -> tuple[Step, FineTuning]:
    """Train a candidate, by default with the original as its teacher.

    Raises:
        TorchTrimError: As `finetune`.
    """
    started = time.perf_counter()
    better = full_copy(net)
    asked: dict[str, Any] = {"teacher": original, "example_inputs": inputs, **options}
    if folder is not None:
        # Another candidate, or other options, are another training, which does not go on with this one.
        asked = {"folder": folder / key_of(content_of(net), dict(options)), "resume": True, **asked}
    done = finetune(better, train_data, val_data, **asked)
    return Step("fine-tuned", better.eval(), time.perf_counter() - started, f"{len(done.epochs)} epochs"), done


def recovered(recover: Callable[[nn.Module], Any], net: nn.Module) -> Step:
    """Hand a candidate to the user's function, which trains it in place or gives another back.

    Raises:
        InputError: The function fails.
    """
    started = time.perf_counter()
    better = full_copy(net)
    try:
        given = recover(better)
    except Exception as error:  # the user's function raises what it likes
        raise InputError(
            f"recover failed: {type(error).__name__}: {error}", path="recover", found=type(error).__name__
        ) from error
    better = given if isinstance(given, nn.Module) else better
    return Step("recovered", better.eval(), time.perf_counter() - started)
