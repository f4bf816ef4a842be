"""Position of a training: saved with a checkpoint at any moment, restored exactly.

Lightning restarts its loops from the counters of a checkpoint, but not from all of them: within an epoch it repeats or
skips validations and counts a step of the loggers twice or not at all; between two epochs it may skip the next one
where ``max_steps`` is set. Here the counters are put where a clean position has them.
"""

from typing import Any, NamedTuple

from lightning import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.loops.loop import _Loop


class Position(NamedTuple):
    """Where a training is.

    Attributes:
        epoch: Epochs before this one.
        batch: Batches of this epoch that were trained on.
        trained: Batches that were trained on in all epochs, which may have had other numbers of them.
    """

    epoch: int
    batch: int
    trained: int


def describe(trainer: Trainer) -> dict[str, Any]:
    """Return what a checkpoint must say of the position beside Lightning's counters.

    Returns:
        ``steps``: steps that loggers have counted, with the batch that was trained on last; ``log``: metrics of this
        step that are logged only after the checkpoint is written.
    """
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.current
    after_batch = progress.processed > progress.completed
    uncounted = (after_batch or trainer.validating) and not loop._should_accumulate()
    return {"steps": loop._batches_that_stepped + int(uncounted), "log": _unlogged(trainer, after_batch)}


def _unlogged(trainer: Trainer, after_batch: bool) -> dict[str, float | int]:
    connector = trainer._logger_connector
    epoch: Any = trainer.fit_loop.epoch_progress.current
    accumulating = trainer.fit_loop._should_accumulate() and trainer.lightning_module.automatic_optimization
    step = after_batch and connector.should_update_logs and not accumulating
    if not trainer.training or not (step or epoch.processed > epoch.completed):
        return {}
    return {name: float(value) for name, value in connector.metrics["log"].items()} | {"epoch": trainer.current_epoch}


def settle(loops: dict[str, Any]) -> Position:
    """Put the counters of a checkpoint (its entry ``loops``) to a clean position, before a trainer loads them."""
    counters = loops["fit_loop"]
    epoch, batches = counters["epoch_progress"], counters["epoch_loop.batch_progress"]
    validation = counters["epoch_loop.val_loop.batch_progress"]
    images = validation["current"]
    validated = batches["current"]["processed"] == batches["current"]["completed"] and (
        images["ready"] == images["completed"]  # else stopped within a validation
    )
    _complete(batches)
    if epoch["current"]["started"] == epoch["current"]["processed"]:  # between two epochs
        _complete(epoch)
        return Position(epoch["current"]["processed"], 0, batches["total"]["processed"])
    if not validated:  # a validation that is due here is begun, as Lightning sees it
        for tracker in (validation["total"], validation["current"]):
            tracker |= dict.fromkeys(tracker, 0)
        validation["total"] |= {"ready": 1, "started": 1}
    return Position(epoch["current"]["processed"], batches["current"]["processed"], batches["total"]["processed"])


def _complete(progress: dict[str, Any]) -> None:
    """Count what was processed as completed, and forget what was begun."""
    for tracker in (progress["total"], progress["current"]):
        tracker |= dict.fromkeys(tracker, tracker["processed"])


def accumulation(trainer: Trainer, epoch: int) -> int:
    """Return the batches of an optimiser step in an epoch: Lightning's callback sets them when an epoch begins."""
    schedules = [one for one in trainer.callbacks if isinstance(one, GradientAccumulationScheduler)]  # type: ignore[attr-defined]
    if schedules:
        return schedules[0].get_accumulate_grad_batches(epoch)
    return int(trainer.accumulate_grad_batches)


def begin(trainer: Trainer, saved: dict[str, Any]) -> None:
    """Let loops and loggers continue from a position, when the training starts.

    Args:
        trainer: The trainer, which has loaded settled counters.
        saved: What `describe` returned when the checkpoint was saved.
    """
    fit, loop = trainer.fit_loop, trainer.fit_loop.epoch_loop
    epoch: Any = fit.epoch_progress.current
    trainer.accumulate_grad_batches = accumulation(trainer, epoch.processed)
    loop._batches_that_stepped = saved["steps"]
    for logger in trainer.loggers if saved["log"] else ():
        logger.log_metrics(saved["log"], step=saved["steps"] - 1)
        logger.save()
    if epoch.started == epoch.processed:
        _Loop.restarting.fset(fit, False)  # type: ignore[attr-defined]  # else max_steps ends the epoch again
        return
    assert fit._data_fetcher is not None
    if loop._should_check_val_fx(fit._data_fetcher) and not loop._should_accumulate():
        loop._batches_that_stepped -= 1  # the end of the last batch, with its validation, is to come
