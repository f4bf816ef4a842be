"""The checkpoint that a training is resumed from."""

import logging
import os
import signal
import subprocess
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

log = logging.getLogger("derain")


class LastCheckpoint(ModelCheckpoint):
    """Saves ``last.ckpt`` after every epoch, and where a signal ends the training between two batches.

    Batch systems send SIGTERM before they end or pre-empt a job. Under SLURM, the signal of ``sbatch --signal``
    (SIGUSR1) also puts the job into the queue again. No other exception saves a checkpoint: a position within a batch
    cannot be resumed.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(filename="last", save_on_train_epoch_end=True, **options)
        self._requeued = self._watching = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take SLURM's signal before Lightning does, which would save in the middle of a batch."""
        super().setup(trainer, pl_module, stage)
        environment = trainer._accelerator_connector.cluster_environment
        if stage == "fit" and isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._watching = True
            signal.signal(environment.requeue_signal or signal.SIGUSR1, self._note_signal)

    def _note_signal(self, *_: Any) -> None:
        self._requeued = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before this batch, on all ranks, if SLURM has sent its signal to any."""
        if self._watching and trainer.strategy.reduce_boolean_decision(self._requeued, all=False):
            if trainer.is_global_zero:
                job = os.environ.get("SLURM_ARRAY_JOB_ID", os.environ["SLURM_JOB_ID"])
                task = f"_{os.environ['SLURM_ARRAY_TASK_ID']}" if "SLURM_ARRAY_JOB_ID" in os.environ else ""
                log.warning("SLURM's signal: requeueing job %s", job + task)
                subprocess.run(["scontrol", "requeue", job + task], check=False)
            raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the position where a signal stopped."""
        self.save_on_exception = isinstance(exception, SIGTERMException) and trainer.training
        super().on_exception(trainer, pl_module, exception)
