"""`trim`: a model within a budget at the least loss: which blocks and channels go, in which numbers it computes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from torchtrim.autopilot.asked import Asked, prunings_of, schemes_of
from torchtrim.autopilot.result import TrimResult
from torchtrim.autopilot.trimming import Trimming
from torchtrim.edits.budget import Budget
from torchtrim.graph.copying import unwrap
from torchtrim.graph.inputs import ExampleInputs
from torchtrim.importance.ranking import Ranking
from torchtrim.search.evaluation import Evaluate
from torchtrim.search.sensitivity import Sensitivity


def trim(
    model: nn.Module,
    data: Iterable[Any],
    evaluate: Evaluate | None = None,
    example_inputs: ExampleInputs | None = None,
    *,
    budget: Budget | Mapping[str, float],
    target: str = "cpu",
    quantize: str | Sequence[str] | None = None,
    removal: bool = True,
    pruning: Sequence[str] | None = None,
    heal: bool = True,
    order: str | None = None,
    metric: str = "sampled",
    ranking: Ranking | None = None,
    train_data: Iterable[Any] | None = None,
    val_data: Iterable[Any] | None = None,
    training: Mapping[str, Any] | None = None,
    recover: Callable[[nn.Module], Any] | None = None,
    trials: int = 12,
    seconds: float | None = None,
    rows: int = 512,
    folder: str | os.PathLike[str] | None = None,
    storage: str | os.PathLike[str] | None = None,
    study: str = "trim",
    sensitivity: Sensitivity | None = None,
    threads: int | None = None,
    seed: int = 0,
) -> TrimResult:
    """Bring a model within a budget at the least loss.

    A plan says how many blocks go (in an order that is ranked or searched for on the data), how channels are pruned
    until the budget is met, and in which numbers the file computes. A study of optuna goes through the plans: each is
    made, its statistics of batch norms are moved, and its outputs are compared with the original's on rows held back.
    Where that error is good enough beside the others, its norm layers are distilled towards the original's outputs (if
    that helps), and it is scored, and where a latency or a file is asked for, exported and measured. The best is made
    once more with all checks (the next best, where one of them fails), its joints are healed, it is trained where that
    is asked for, and measured at the end.

    With a `folder` the study lies there, in a file: a search that was killed goes on when the same call is made again,
    to the same plans, and processes that make the same call at the same time share it; no plan is tried twice. The same
    call has the same data in the same order, too: not shuffled. The folder also gets `net.trim`, the model's file where
    one is made, and the report.

    Time: a plan costs about as much as one pruning (with `"reconstruction"` a minute and more on a CPU for an
    EfficientNet), an error on a fifth of the rows and sometimes a score; with a latency some exports and measurements,
    too. Searching for the order costs blocks times steps runs on a fifth of the rows; ranking one pass. Memory: up to
    twice `rows` rows of the data, and three models or four.

    Args:
        model: The model; left as it was.
        data: Batches: tensors, `(inputs, targets)` pairs or dicts. Where there is neither `evaluate` nor `val_data`,
            every second row is scored on and the others are calibrated on.
        evaluate: Gives a model's score, higher is better: `lambda net: accuracy(net, loader)`. The model is in eval
            mode, gradients are off; an int8 candidate is an ONNX file that is called like the model. Left out: accuracy
            where there are labels, else agreement with the untouched model.
        example_inputs: As for `cut`; the first batch where they are left out and the history does not know them. A
            latency is measured at their batch size (at 1, where the first batch is taken).
        budget: The limits. Up to 1, `macs` and `params` are shares of the original's. `size_mb` is that of the file
            where one is made. `max_drop` by itself asks for the smallest model (the fastest, with `quantize`) that
            loses no more.
        target: Where the file will run, as for `export_onnx`.
        quantize: The schemes to choose from: one or several of `export_onnx`'s; `"auto"`: those that are near enough
            and faster on the original here. None: float32. Files are made where this or a latency is given. Where
            neither time nor size is limited, the scheme with the best score is kept, which mostly is float32.
        removal: Whether blocks may be taken out.
        pruning: The ways to prune channels to choose from: `"magnitude"` (the same fraction of each layer),
            `"magnitude:global"`, `"magnitude:reconstruct"` (what reads pruned channels is solved anew), `"isomorphic"`,
            `"activation"`, `"reconstruction"` (all layers ranked together by what the outputs lose, and solved anew:
            the best and the slowest without training), and with labels `"taylor"`. Left out: `"magnitude"` and
            `"reconstruction"`; empty: no channels are pruned.
        heal: Whether statistics of batch norms are moved, and in the end the joints of removed blocks are fitted
            (`remove(heal="linear")`) and norm layers are distilled, each where it helps on rows held back.
        order: `"ranked"`: blocks go in the order of `metric`. `"search"`: each is tried, the one that is missed least
            goes, and so on. Left out: `"search"` for at most 16 blocks.
        metric: What they are ranked by, see `rank_blocks`.
        ranking: A ranking of this model's blocks, in place of `metric`.
        train_data: Train the chosen candidate on these batches, with the untouched model as its teacher, by
            `tt.finetune`.
        val_data: Labelled batches for the score, and for the training.
        training: Options of `tt.finetune`: `{"epochs": 10, "lr": 1e-3}`.
        recover: In place of a training: a function that trains a model, in place or giving another back.
        trials: How many plans to try, with those that the study holds already.
        seconds: Begin no more plans so long after the search over plans began (which is after ranking, and choosing
            schemes).
        rows: How many rows to calibrate on at most, and as many again to score on.
        folder: Where to put the study, the model, the file and the report; made where it is missing.
        storage: Where the study lies instead: a file, or the URL of a database (`sqlite:///trim.db`).
        study: The study's name there.
        sensitivity: A sensitivity of the model, for the report.
        threads: Threads that latencies are measured with; PyTorch's present number by default.
        seed: Of the search.

    Returns:
        The best candidate, which limits it meets and which it misses by how much, the Pareto front, and the report.

    Raises:
        EditError: A bad budget; or no plan can be made: nothing can be removed or pruned.
        InputError: A bad option, too little data, a study of something else in the storage; or `evaluate` fails (a
            `TrimStopped` whose `candidates` hold what was measured, where that was on the way; the study goes on).
        ExportError: A file is asked for, and the original cannot be exported.
        MissingDependency: optuna is not installed; or what a training needs.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU(), nn.Flatten(),
        ...                     nn.Linear(512, 4))
        >>> data = [torch.randn(40, 3, 8, 8)]
        >>> result = trim(net, data, budget=Budget(macs=0.5), pruning=["magnitude"], trials=1)
        >>> list(result.met), result.missed, result.score_name
        (['macs'], {}, 'agreement with the untouched model')
    """
    asked = Asked(
        budget=Budget.of(budget),
        evaluate=evaluate,
        target=target,
        schemes=schemes_of(quantize),
        removal=removal,
        pruning=prunings_of(pruning),
        heal=heal,
        order=order,
        metric=metric,
        ranking=ranking,
        train_data=train_data,
        val_data=val_data,
        training=training,
        recover=recover,
        trials=trials,
        seconds=seconds,
        rows=rows,
        folder=None if folder is None else Path(folder),
        storage=storage,
        study=study,
        sensitivity=sensitivity,
        threads=threads,
        seed=seed,
    )
    asked.check()
    with ExitStack() as stack:
        return Trimming(unwrap(model), data, example_inputs, asked, stack).result()
