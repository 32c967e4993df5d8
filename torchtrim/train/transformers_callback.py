"""`TransformersTrim`: gradual sparsity and staged unfreezing inside Hugging Face's `Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchtrim.checkpoint.atomic import replacing
from torchtrim.errors import CheckpointError, MissingDependency
from torchtrim.graph.copying import unwrap
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.train.pruner_choice import PrunerChoice, pruner_of
from torchtrim.train.stages import Stages, Unfreeze

try:
    from transformers import TrainerCallback
except ImportError as _error:
    raise MissingDependency("transformers is not installed", hint='pip install "torchtrim[transformers]"') from _error

FILE = "torchtrim.pt"


class TransformersTrim(TrainerCallback):  # type: ignore[misc]
    """A callback that prunes weights after the optimizer's steps, and unfreezes a model in stages.

    The masks are saved with the `Trainer`'s checkpoints, in `torchtrim.pt`, and read from there when a training is
    resumed. A `Distiller` goes into the `compute_loss` of a `Trainer` of one's own.

    Args:
        pruner: A schedule of sparsity, or a function of the model and the optimizer that makes a `MagnitudePruner`.
        unfreeze: As for `finetune`; epochs are whole ones.
        example_inputs: What the model takes, where its history does not know and a stage is the head's.

    Example:
        >>> import torchtrim as tt
        >>> callback = TransformersTrim(pruner=tt.ConstantSparsity(0.5), unfreeze={0: "all"})
        >>> callback.pruner is None  # made when the training starts
        True
    """

    def __init__(
        self,
        *,
        pruner: PrunerChoice = None,
        unfreeze: Unfreeze = None,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        self.pruner: Any = None
        self._pruner, self._unfreeze, self._inputs = pruner, unfreeze, example_inputs
        self._stages: Stages | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Make the pruner and the stages, or go on with those of a checkpoint."""
        network = unwrap(model)
        inputs = None if self._inputs is None else Inputs.of(self._inputs)
        self._stages = Stages(network, self._unfreeze, max(int(state.num_train_epochs), 1), inputs)
        self.pruner = pruner_of(self._pruner, network, getattr(optimizer, "optimizer", optimizer))
        if self.pruner is not None and state.global_step:
            self.pruner.load_state_dict(_read(_place(args, state)))

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter the stage of this epoch."""
        if self._stages is not None:
            self._stages.enter(int(state.epoch or 0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune: the optimizer has made a step."""
        if self.pruner is not None:
            self.pruner.step()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the masks beside the checkpoint that was written."""
        if self.pruner is not None and state.is_world_process_zero and not self.pruner.finished:
            with replacing(_place(args, state)) as file:
                torch.save(self.pruner.state_dict(), file)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Prune to the final sparsity, record it in the model's history, and let everything learn again."""
        if self.pruner is not None:
            self.pruner.finish()
        if self._stages is not None:
            self._stages.leave()


def _place(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / FILE


def _read(place: Path) -> dict[str, Any]:
    try:
        with place.open("rb") as file:
            found: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
            return found
    except OSError as error:
        raise CheckpointError(
            "the checkpoint that is resumed from has no masks",
            path=place,
            hint="one that was written with this callback",
        ) from error
