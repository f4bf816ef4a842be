"""The checkpoint that a training is resumed from."""

from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException


class LastCheckpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` after every epoch, and when SIGTERM ends the training between two batches.

    Batch systems send SIGTERM before they end or pre-empt a job. No other exception saves a checkpoint: the state
    within a batch cannot be resumed.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(filename="last", save_on_train_epoch_end=True, **options)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the position where SIGTERM stopped."""
        self.save_on_exception = isinstance(exception, SIGTERMException) and trainer.training
        super().on_exception(trainer, pl_module, exception)
