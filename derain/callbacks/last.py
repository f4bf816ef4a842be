"""Callback that saves the checkpoint from which training resumes."""

import logging
import os
import signal
import subprocess
import threading
from typing import Any

from lightning import LightningModule, Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException

from derain.callbacks.checkpoints import Checkpoint
from derain.callbacks.image_counts import common_batches

log = logging.getLogger("derain")


class LastCheckpoint(Checkpoint):
    """Save ``last.ckpt`` after every epoch, and when SIGTERM or a signal of SLURM stops the training.

    Batch systems send SIGTERM before they end or pre-empt a job. Under SLURM, if Lightning's ``SLURMEnvironment`` has
    ``auto_requeue``, its ``requeue_signal`` (SIGUSR1 by default) has the same effect and also requeues the job. Both
    signals stop the run between two batches of training or validation. Other exceptions save no checkpoint, since
    training cannot resume within a batch.

    Args:
        dirpath: Folder of the checkpoints.
    """

    def __init__(self, dirpath: Any) -> None:
        super().__init__(dirpath, "last", save_on_train_epoch_end=True, enable_version_counter=False)
        self._received: int | None = None
        self._requeue_signal: int | None = None
        self._requeueing = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's signal handlers, which communicate between ranks or save a checkpoint within a batch."""
        super().on_train_start(trainer, pl_module)
        environment = trainer._accelerator_connector.cluster_environment
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue_signal = environment.requeue_signal or signal.SIGUSR1
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._note_signal)
            if self._requeue_signal is not None:
                signal.signal(self._requeue_signal, self._note_signal)

    def _note_signal(self, number: int, frame: Any) -> None:
        self._received = number

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop all ranks before this batch if any rank has received a signal.

        Raises:
            SIGTERMException: If any rank has received a signal.
        """
        self._stop_if_signalled(trainer)

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop all ranks during validation too, since it may take long; a resumed run repeats the validation.

        Raises:
            SIGTERMException: If any rank has received a signal.
        """
        # All ranks must take part in the decision, so that it is made only before batches that every rank has.
        if not trainer.sanity_checking and batch_idx < common_batches(trainer):
            self._stop_if_signalled(trainer)

    def _stop_if_signalled(self, trainer: Trainer) -> None:
        if not trainer.strategy.reduce_boolean_decision(self._received is not None, all=False):
            return
        requeue = self._received is not None and self._received == self._requeue_signal
        self._requeueing = trainer.strategy.reduce_boolean_decision(requeue, all=False)
        raise SIGTERMException

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save a checkpoint if a signal stopped the training; then requeue the job if the signal asks for it."""
        self.save_on_exception = isinstance(exception, SIGTERMException) and (trainer.training or trainer.validating)
        super().on_exception(trainer, pl_module, exception)
        if self._requeueing and trainer.is_global_zero:
            _requeue()


def _requeue() -> None:
    """Requeue the SLURM job of this process; warn on failure."""
    job = os.environ["SLURM_JOB_ID"]
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    log.warning("signal from SLURM: requeueing job %s", job)
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        log.warning("job %s was not requeued (%s); submit it again with --ckpt_path last", job, error)
