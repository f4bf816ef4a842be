"""Loggers, callbacks and git commit of a run; checks of the trainer's options."""

import logging
import subprocess
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    ProgressBar,
    RichProgressBar,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_only

from derain.callbacks import (
    BatchedRestoration,
    BatchSeeds,
    BestCheckpoint,
    Checkpoint,
    FinalWeights,
    ImagePanels,
    LastCheckpoint,
    PartialEvaluationWarning,
    SaveImages,
    TestResults,
    Throughput,
)
from derain.checkpoints import WholeCheckpointIO
from derain.errors import DerainError

log = logging.getLogger("derain")

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
"""Supported values of ``Trainer.precision``; with all of them, weights are float32."""

LIMITS = {
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
"""Trainer option that limits the number of batches, by command."""


def commit() -> str | None:
    """Return the output of ``git describe`` for the current folder: tag or commit, ``-dirty`` if files have changed.

    Return None without git, outside a repository, or before the first commit.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return result.stdout.strip()


def check_options(trainer: Any, command: str) -> None:
    """Check the trainer's options for values that derain does not support.

    Args:
        trainer: Configured options of the trainer.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        DerainError: If an option has such a value.
    """
    for option in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        value = trainer[option]
        if value is not None and value < 1:
            raise DerainError(f"--trainer.{option} {value}: must be at least 1")
    clip = trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < float("inf"):
        raise DerainError(f"--trainer.gradient_clip_val {clip}: must be a finite number of at least 0 (0: no clipping)")
    if trainer.overfit_batches:
        raise DerainError(
            f"--trainer.overfit_batches {trainer.overfit_batches}: not supported, since every epoch draws new "
            "crops; to overfit, set --data.train and --data.val to a folder with a few pairs, and --data.crop to their "
            "size"
        )
    if trainer.use_distributed_sampler:
        raise DerainError(
            "--trainer.use_distributed_sampler true: not supported, since derain uses its own samplers; omit it"
        )
    if trainer.barebones:
        raise DerainError(
            "--trainer.barebones true: not supported, since it turns off logging and checkpoints; omit it"
        )
    limit = LIMITS.get(command)
    if limit and trainer[limit] == 0:
        raise DerainError(
            f"--trainer.{limit} 0: must be a number of batches of at least 1, or a fraction above 0; or omit the option"
        )


def check_trainer(trainer: Trainer) -> None:
    """Check precision, strategy, checkpoint plugin and callbacks; make the trainer write checkpoints atomically.

    Raises:
        DerainError: If precision, strategy, checkpoint plugin or a callback is not supported.
    """
    if trainer.precision not in PRECISIONS:
        raise DerainError(
            f"--trainer.precision {trainer.precision}: not supported, since weights must be float32; use "
            f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise DerainError(
            f"--trainer.strategy {type(trainer.strategy).__name__}: not supported; use auto, ddp or "
            "ddp_find_unused_parameters_true"
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # it loses messages and exit codes
        raise DerainError(
            f"--trainer.strategy ddp_{trainer.strategy.launcher._start_method}: not supported on the command line; use "
            "ddp or ddp_find_unused_parameters_true"
        )
    checkpoint_io = trainer.strategy.checkpoint_io
    if type(checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO()
    elif not isinstance(checkpoint_io, WholeCheckpointIO):
        raise DerainError(
            f"--trainer.plugins {type(checkpoint_io).__name__}: not supported, since a checkpoint must be complete "
            "to resume from it; omit the plugin, or derive its class from derain.checkpoints.WholeCheckpointIO"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise DerainError(
                f"--trainer.callbacks {name}: not supported, since best.ckpt and weights.safetensors would lack its "
                "average; use derain.callbacks.EMA"
            )
        if isinstance(callback, ModelPruning):
            raise DerainError(
                f"--trainer.callbacks {name}: not supported, since training cannot resume with it; omit it"
            )


def configured_loggers(configured: Any, folder: Path, checkpoint: str | None) -> list[Logger] | bool:
    """Return a CSV logger for ``metrics.csv`` and the configured loggers; False if logging is turned off.

    Args:
        configured: Value of ``--trainer.logger``: False (no logging), True or None (CSV only), a logger or a list.
        folder: Folder of the run; if the run resumes in it, the rows of ``metrics.csv`` up to the checkpoint are kept.
        checkpoint: Value of ``--ckpt_path``; None without the option.
    """
    if configured is False:
        return False
    loggers = configured if isinstance(configured, list) else [configured]
    csv = CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=10)
    metrics = folder / "metrics.csv"
    if metrics.exists() and checkpoint and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        _keep_metrics(csv, metrics, Path(checkpoint))
    return [csv, *(logger for logger in loggers if isinstance(logger, Logger))]


def _keep_metrics(csv: CSVLogger, file: Path, checkpoint: Path) -> None:
    """Keep the metrics of a resumed run up to the step of its checkpoint; the logger alone would delete the file.

    Incomplete rows are dropped; a run leaves them if it is killed while the logger writes the file.

    Args:
        csv: Logger of the resumed run.
        file: ``metrics.csv`` of the run.
        checkpoint: Checkpoint from which the run resumes.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    loops = content["loops"]["fit_loop"]
    # Checkpoints of earlier versions of derain have no position.
    position = content.get("position", {"steps": loops["epoch_loop.state_dict"]["_batches_that_stepped"], "log": {}})
    header, *rows = file.read_text().splitlines() or [""]
    columns = header.split(",")
    if "step" not in columns:
        log.warning("%s: no column 'step', since the run was killed while writing it; its metrics are discarded", file)
        return
    step_column = columns.index("step")
    relogged = [columns.index(name) for name in position["log"] if name in columns and name != "epoch"]
    last_step = position["steps"] - 1

    def is_kept(row: str) -> bool:
        values = row.split(",")
        if len(values) != len(columns) or not values[step_column].isdecimal():
            return False
        step = int(values[step_column])
        if step == last_step:  # the resumed run logs again what was logged after the checkpoint was saved
            return not any(values[column] for column in relogged)
        return bool(step < last_step)

    kept = [row for row in rows if is_kept(row)]
    experiment = csv.experiment  # deletes the file
    file.write_text("\n".join([header, *kept]) + "\n")
    experiment.metrics_keys = columns


def save_during_manual_optimization(callback: ModelCheckpoint) -> None:
    """Make a configured ``ModelCheckpoint`` save by time with manual optimisation too.

    The class of the callback becomes ``derain.callbacks.Checkpoint``. A callback of a subclass of ``ModelCheckpoint``
    gets a new class that derives from the subclass and from ``Checkpoint``, unless the subclass derives from
    ``Checkpoint``.
    """
    configured = type(callback)
    if configured is ModelCheckpoint:
        callback.__class__ = Checkpoint
    elif not issubclass(configured, Checkpoint):
        # Checkpoints contain the state of a callback under the name of its class, which must not change.
        names = {"__module__": configured.__module__, "__qualname__": configured.__qualname__}
        callback.__class__ = type(configured.__name__, (configured, Checkpoint), names)


def run_callbacks(
    configured: list[Callback], command: str, config: Any, folder: Path, monitor: str, commit: str | None
) -> list[Callback]:
    """Return the configured callbacks and those that derain adds for a command.

    Configured callbacks that search for a batch size or learning rate affect only ``fit``; other commands omit them and
    log that.

    Args:
        configured: Callbacks of the configuration.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: Configuration of the command.
        folder: Folder of the run.
        monitor: Metric whose highest value selects the best checkpoint; used only by ``fit``.
        commit: Result of `commit`, which ``test`` saves with its results.
    """
    for callback in configured:
        if isinstance(callback, ModelCheckpoint):
            save_during_manual_optimization(callback)
    callbacks = list(configured)
    if config.trainer.enable_progress_bar is not False and not any(isinstance(bar, ProgressBar) for bar in callbacks):
        callbacks.append(RichProgressBar(leave=False))
    if command == "fit":
        return callbacks + _training_callbacks(config, folder, monitor)
    for callback in list(callbacks):
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            log.info("%s: ignored, since it affects training only", type(callback).__name__)
            callbacks.remove(callback)
    if command == "test":
        restoration = BatchedRestoration(config.tile)
        return [*callbacks, restoration, TestResults(restoration, config.weights, commit), ImagePanels()]
    if command == "predict":
        callbacks += [BatchedRestoration(config.tile), SaveImages()]
    return [*callbacks, PartialEvaluationWarning()]


def _training_callbacks(config: Any, folder: Path, monitor: str) -> list[Callback]:
    """Return derain's callbacks for training, without those that options turn off."""
    callbacks: list[Callback] = [BatchSeeds(config.seed_everything), ImagePanels()]
    if config.trainer.enable_checkpointing is not False:
        checkpoints = folder / "checkpoints"
        callbacks += [BestCheckpoint(checkpoints, monitor), LastCheckpoint(checkpoints), FinalWeights()]
    if config.trainer.logger is not False:
        callbacks += [Throughput(), LearningRateMonitor("epoch")]
    return callbacks
