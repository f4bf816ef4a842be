"""Checkpoints of a training run."""

from types import SimpleNamespace
from typing import Any, cast

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class Checkpoint(ModelCheckpoint):
    """``ModelCheckpoint`` that works the same for methods with manual optimisation.

    Lightning ignores ``train_time_interval`` there, and warns at length that a checkpoint holds the state after the
    optimiser's step, which is the state that a resumed run needs.
    """

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save by steps or time, as Lightning does for automatic optimisation."""
        automatic = SimpleNamespace(automatic_optimization=True)  # all that Lightning reads of the module here
        super().on_train_batch_end(trainer, cast(LightningModule, automatic), outputs, batch, batch_idx)


class BestCheckpoint(Checkpoint):
    """``best.ckpt``: the epoch with the highest validation score.

    A class of its own, so that its state never collides with a ``ModelCheckpoint`` of the configuration.

    Args:
        dirpath: Folder of the checkpoints.
        monitor: The logged metric, higher is better.
    """

    def __init__(self, dirpath: Any, monitor: str) -> None:
        super().__init__(dirpath, "best", monitor=monitor, mode="max", enable_version_counter=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save by the score, unless nothing is validated: Lightning would warn that there is no score."""
        if trainer.enable_validation:
            super().on_train_epoch_end(trainer, pl_module)
