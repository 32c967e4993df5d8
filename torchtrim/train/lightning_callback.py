"""`LightningTrim`: gradual sparsity and staged unfreezing inside a Lightning `Trainer`."""

from __future__ import annotations

from typing import Any

from torch import nn

from torchtrim.errors import MissingDependency
from torchtrim.graph.inputs import ExampleInputs, Inputs
from torchtrim.train.pruner_choice import PrunerChoice, pruner_of
from torchtrim.train.stages import Stages, Unfreeze

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as _error:
    raise MissingDependency("Lightning is not installed", hint='pip install "torchtrim[lightning]"') from _error


class LightningTrim(Callback):  # type: ignore[misc]
    """A callback that prunes weights after the optimizer's steps, and unfreezes a model in stages.

    Make the optimizer of all parameters (`configure_optimizers` runs before the first stage freezes any). Under DDP,
    stages need `strategy="ddp_find_unused_parameters_true"`. The masks are in Lightning's checkpoints.
    A `Distiller` needs no callback: call it in `training_step`.

    Args:
        network: The path of the network in the LightningModule; left out, all of it.
        pruner: A schedule of sparsity, or a function of the network and the optimizer that makes a `MagnitudePruner`.
        unfreeze: As for `finetune`.
        example_inputs: What the network takes, where its history does not know and a stage is the head's.

    Example:
        >>> import torchtrim as tt
        >>> callback = LightningTrim("net", pruner=tt.ConstantSparsity(0.5), unfreeze={0: "all"})
        >>> callback.pruner is None  # made when the training starts
        True
    """

    def __init__(
        self,
        network: str = "",
        *,
        pruner: PrunerChoice = None,
        unfreeze: Unfreeze = None,
        example_inputs: ExampleInputs | None = None,
    ) -> None:
        super().__init__()
        self.pruner: Any = None
        self._network, self._pruner, self._unfreeze, self._inputs = network, pruner, unfreeze, example_inputs
        self._stages: Stages | None = None
        self._steps = 0
        self._state: dict[str, Any] | None = None

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Make the pruner and the stages; the optimizer is there by now."""
        model = pl_module.get_submodule(self._network)
        inputs = None if self._inputs is None else Inputs.of(self._inputs)
        self._stages = Stages(model, self._unfreeze, trainer.max_epochs or 1, inputs)
        optimizers = trainer.optimizers
        self.pruner = pruner_of(self._pruner, model, *(optimizers or [None]))
        if self.pruner is not None and self._state is not None:
            self.pruner.load_state_dict(self._state)
        self._steps = trainer.global_step

    def on_train_epoch_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Enter the stage of this epoch."""
        if self._stages is not None:
            self._stages.enter(trainer.current_epoch)

    def on_train_batch_end(self, trainer: Any, pl_module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Prune, where this batch ended with a step of the optimizer."""
        if self.pruner is not None and trainer.global_step > self._steps:
            self.pruner.step()
        self._steps = trainer.global_step

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Prune to the final sparsity, record it in the network's history, and let everything learn again."""
        if self.pruner is not None:
            self.pruner.finish()
        if self._stages is not None:
            self._stages.leave()

    def on_exception(self, trainer: Any, pl_module: nn.Module, exception: BaseException) -> None:
        """Let everything learn again after a training that was broken off."""
        if self._stages is not None:
            self._stages.leave()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into its checkpoints."""
        return {} if self.pruner is None else {"pruner": self.pruner.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning found in a checkpoint; it is used when the training starts."""
        self._state = state_dict.get("pruner")
