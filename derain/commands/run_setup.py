"""Loggers and callbacks of a run, and which of the trainer's options derain refuses."""

import logging
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
    BatchSeeds,
    BestCheckpoint,
    Checkpoint,
    FinalWeights,
    ImagePanels,
    LastCheckpoint,
    PartNote,
    SaveImages,
    TestResults,
    Throughput,
)
from derain.checkpoints import WholeCheckpointIO
from derain.errors import DerainError

log = logging.getLogger("derain")

PRECISIONS = ("32-true", "16-mixed", "bf16-mixed")
"""Of the arithmetic of a network; its weights are always float32."""

LIMITS = {
    "validate": "limit_val_batches",
    "test": "limit_test_batches",
    "predict": "limit_predict_batches",
}
"""The options that let a command evaluate a part of the images."""


def check_options(trainer: Any, command: str) -> None:
    """Refuse values that Lightning accepts, but that fail or do nothing.

    Args:
        trainer: The configured options of the trainer.
        command: ``fit``, ``validate``, ``test`` or ``predict``.

    Raises:
        DerainError: If there is one.
    """
    for option in ("accumulate_grad_batches", "check_val_every_n_epoch"):
        value = trainer[option]
        if value is not None and value < 1:
            raise DerainError(f"--trainer.{option} {value}: must be at least 1")
    clip = trainer.gradient_clip_val
    if clip is not None and not 0 <= clip < float("inf"):
        raise DerainError(f"--trainer.gradient_clip_val {clip}: must be a finite number of at least 0; 0 clips nothing")
    if trainer.overfit_batches:
        raise DerainError(
            f"--trainer.overfit_batches {trainer.overfit_batches}: crops are drawn anew in every epoch; to overfit, "
            "give --data.train and --data.val the same folder of few pairs, and --data.crop their size"
        )
    if trainer.use_distributed_sampler:
        raise DerainError(
            "--trainer.use_distributed_sampler true: derain's samplers share images between processes; leave it out"
        )
    if trainer.barebones:
        raise DerainError("--trainer.barebones true: a run of derain logs and saves checkpoints; leave it out")
    limit = LIMITS.get(command)
    if limit and trainer[limit] == 0:
        raise DerainError(f"--trainer.{limit} 0: no image is left; give at least 1, or leave it out")


def check_trainer(trainer: Trainer) -> None:
    """Refuse what derain's methods do not support: precisions, strategies, callbacks; let checkpoints be written whole.

    Raises:
        DerainError: If the trainer has one.
    """
    if trainer.precision not in PRECISIONS:
        raise DerainError(
            f"--trainer.precision {trainer.precision}: not supported, since images are scored in float32; use "
            f"{', '.join(PRECISIONS[:-1])} or {PRECISIONS[-1]}"
        )
    if not isinstance(trainer.strategy, SingleDeviceStrategy | DDPStrategy):
        raise DerainError(
            f"--trainer.strategy {type(trainer.strategy).__name__}: not supported; use auto, ddp or "
            "ddp_find_unused_parameters_true"
        )
    if isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):  # it cannot pass on messages and exit codes
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
            "when the training continues; leave it out, or derive a class from derain.checkpoints.WholeCheckpointIO"
        )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
            raise DerainError(
                f"--trainer.callbacks {name}: its average would be missing in best.ckpt and weights.safetensors; use "
                "derain.callbacks.EMA"
            )
        if isinstance(callback, ModelPruning):
            raise DerainError(f"--trainer.callbacks {name}: pruned networks cannot be resumed; leave it out")


def loggers(configured: Any, folder: Path, checkpoint: str | None) -> list[Logger] | bool:
    """Return the CSV log of the run and the configured loggers; False if logging is turned off.

    Args:
        configured: The trainer's ``logger``, instantiated.
        folder: Of the run.
        checkpoint: What the run resumes from.
    """
    if configured is False:
        return False
    given = configured if isinstance(configured, list) else [configured]
    csv = CSVLogger(str(folder), name="", version="", flush_logs_every_n_steps=10)
    past = folder / "metrics.csv"
    if past.exists() and checkpoint and rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        _keep_history(csv, past, Path(checkpoint))
    return [csv, *(logger for logger in given if isinstance(logger, Logger))]


def _keep_history(csv: CSVLogger, past: Path, checkpoint: Path) -> None:
    """Keep the metrics of a resumed run up to the step of its checkpoint; the logger would delete the file.

    Incomplete rows, of a run that was killed while the logger wrote the file, are dropped.
    """
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    loops = content["loops"]["fit_loop"]
    position = {"steps": loops["epoch_loop.state_dict"]["_batches_that_stepped"], "log": {}}  # as loggers count
    position = content.get("position", position)
    header, *rows = past.read_text().splitlines() or [""]
    columns = header.split(",")
    if "step" not in columns:
        log.warning("%s was truncated when the run was interrupted: its metrics start anew", past)
        return
    number = columns.index("step")
    whole = [row for row in rows if row.count(",") == header.count(",") and row.split(",")[number].isdecimal()]
    again = [columns.index(name) for name in position["log"] if name in columns and name != "epoch"]

    def keep(values: list[str]) -> bool:
        step, last = int(values[number]), position["steps"] - 1
        # What was logged after the checkpoint was saved is logged again.
        return step < last or (step == last and not any(values[index] for index in again))

    kept = [row for row in whole if keep(row.split(","))]
    experiment = csv.experiment
    past.write_text("\n".join([header, *kept]) + "\n")
    experiment.metrics_keys = header.split(",")


def save_during_manual_optimization(callback: ModelCheckpoint) -> None:
    """Let a configured ``ModelCheckpoint``, or a subclass of it, work the same for methods with manual optimisation.

    Its class becomes ``derain.callbacks.Checkpoint``, or derives from it beside the user's class.
    """
    own = type(callback)
    if own is ModelCheckpoint:
        callback.__class__ = Checkpoint
    elif not issubclass(own, Checkpoint):
        names = {"__module__": own.__module__, "__qualname__": own.__qualname__}  # states are saved by this name
        callback.__class__ = type(own.__name__, (own, Checkpoint), names)


def callbacks(
    given: list[Callback], command: str, config: Any, folder: Path, monitor: str, commit: str | None
) -> list[Callback]:
    """Return the configured callbacks, and those that save a run's checkpoints, weights, pictures and results.

    Args:
        given: Those of the configuration.
        command: ``fit``, ``validate``, ``test`` or ``predict``.
        config: Of the command.
        folder: Of the run.
        monitor: The metric whose highest value names the best checkpoint.
        commit: What results belong to.
    """
    chosen = list(given)
    for callback in chosen:
        if isinstance(callback, ModelCheckpoint):
            save_during_manual_optimization(callback)
    if config.trainer.enable_progress_bar is not False and not any(isinstance(bar, ProgressBar) for bar in chosen):
        chosen.append(RichProgressBar(leave=False))
    if command != "fit":
        for search in [callback for callback in chosen if isinstance(callback, BatchSizeFinder | LearningRateFinder)]:
            log.info("%s: ignored, since it is for training", type(search).__name__)
            chosen.remove(search)
    if command == "test":
        chosen += [TestResults(config.weights, commit), ImagePanels()]
    if command == "predict":
        chosen += [SaveImages(), PartNote()]
    if command == "validate":
        chosen.append(PartNote())
    if command != "fit":
        return chosen
    chosen += [BatchSeeds(config.seed_everything), ImagePanels()]
    if config.trainer.enable_checkpointing is not False:
        checkpoints = folder / "checkpoints"
        chosen += [BestCheckpoint(checkpoints, monitor), LastCheckpoint(checkpoints), FinalWeights()]
    if config.trainer.logger is not False:
        chosen += [Throughput(), LearningRateMonitor("epoch")]
    return chosen
