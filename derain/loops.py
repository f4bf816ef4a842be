"""Resuming of training from the exact position of a checkpoint.

Lightning restores only some counters of a checkpoint. If it resumes within an epoch, it may repeat or skip a
validation, and count a step of the loggers twice or not at all. If it resumes between two epochs and ``max_steps`` is
set, it may skip the next epoch. The functions here correct the counters.
"""

from typing import Any, NamedTuple

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loops.loop import _Loop


class Position(NamedTuple):
    """Position of a training run.

    Attributes:
        epoch: Index of the current epoch.
        batch: Number of batches trained on in this epoch.
        trained: Number of batches trained on in all epochs, which may differ in length.
    """

    epoch: int
    batch: int
    trained: int


def logging_state(trainer: Trainer) -> dict[str, Any]:
    """Return the state of the loggers, which Lightning's counters in a checkpoint lack.

    Returns:
        ``steps``: number of logger steps, including that of the last batch. ``log``: metrics of this step that
        Lightning would log only after it has saved the checkpoint.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.current
    after_batch = progress.processed > progress.completed
    uncounted = (after_batch or trainer.validating) and not loop._should_accumulate()
    return {"steps": loop._batches_that_stepped + int(uncounted), "log": _unlogged(trainer, after_batch)}


def _unlogged(trainer: Trainer, after_batch: bool) -> dict[str, float | int]:
    """Return the metrics that Lightning has collected but not yet logged.

    Args:
        trainer: The trainer.
        after_batch: Whether a batch was processed, but is not yet counted as completed.
    """
    connector = trainer._logger_connector
    epoch: Any = trainer.fit_loop.epoch_progress.current
    accumulating = trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization
    step = after_batch and connector.should_update_logs and not accumulating
    if not trainer.training or not (step or epoch.processed > epoch.completed):
        return {}
    metrics: dict[str, float | int] = {name: float(value) for name, value in connector.metrics["log"].items()}
    metrics["epoch"] = trainer.current_epoch
    return metrics


def correct_counters(loops: dict[str, Any]) -> Position:
    """Correct the counters of a checkpoint, so that Lightning resumes from the right position.

    Args:
        loops: Entry ``loops`` of the checkpoint; changed in place, before a trainer loads it.

    Returns:
        The position.
    """
    counters = loops["fit_loop"]
    epoch, batches = counters["epoch_progress"], counters["epoch_loop.batch_progress"]
    validation = counters["epoch_loop.val_loop.batch_progress"]
    batch_completed = batches["current"]["processed"] == batches["current"]["completed"]
    validation_completed = validation["current"]["ready"] == validation["current"]["completed"]
    _complete(batches)
    if epoch["current"]["started"] == epoch["current"]["processed"]:  # between two epochs
        _complete(epoch)
        return Position(epoch["current"]["processed"], 0, batches["total"]["processed"])
    if not (batch_completed and validation_completed):  # make Lightning run a due validation: pretend that it started
        for counts in (validation["total"], validation["current"]):
            counts |= dict.fromkeys(counts, 0)
        validation["total"] |= {"ready": 1, "started": 1}
    return Position(epoch["current"]["processed"], batches["current"]["processed"], batches["total"]["processed"])


def _complete(progress: dict[str, Any]) -> None:
    """Set all counts of a progress tracker to the number of processed items."""
    for counts in (progress["total"], progress["current"]):
        counts |= dict.fromkeys(counts, counts["processed"])


def accumulation(trainer: Trainer, epoch: int) -> int:
    """Return the number of batches per optimiser step in an epoch, also with a `GradientAccumulationScheduler`."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler):
            return callback.get_accumulate_grad_batches(epoch)
    return int(trainer.accumulate_grad_batches)


def restore_position(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Restore the state of loops and loggers when training resumes, and log the metrics that were not yet logged.

    Args:
        trainer: Trainer that has loaded the counters from `correct_counters`.
        saved: Result of `logging_state` when the checkpoint was saved.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch: Any = fit.epoch_progress.current
    trainer.accumulate_grad_batches = accumulation(trainer, epoch.processed)
    loop._batches_that_stepped = saved["steps"]
    if saved["log"]:
        for logger in trainer.loggers:
            logger.log_metrics(saved["log"], step=saved["steps"] - 1)
            logger.save()
    if epoch.started == epoch.processed:
        _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]  # otherwise max_steps may end the epoch
        return
    assert fit._data_fetcher is not None
    if loop._should_check_val_fx(fit._data_fetcher) and not loop._should_accumulate():
        loop._batches_that_stepped -= 1  # counted again after the validation that is due
