"""Options of optimisers and schedules when training is resumed."""

from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from torch.optim.lr_scheduler import LambdaLR

from derain.errors import DerainError

LENGTHS = ("T_max", "total_steps", "total_iters")
"""Arguments and attributes of PyTorch's schedules; in derain, their default is the length of the training."""


def use_configured(trainer: Trainer, changed: Sequence[str]) -> None:
    """Apply the options of the present run to optimisers and schedules that were restored from a checkpoint.

    An optimiser whose schedule is a ``LambdaLR``, or that has none, receives the options of the present run, such as
    weight decay, and the learning rate that the schedule of the present run has at the restored step. An optimiser with
    another schedule keeps all restored options, since the schedule may change more than the learning rate, such as the
    betas (``OneCycleLR``).

    Args:
        trainer: The trainer, after it has loaded a checkpoint.
        changed: Names of the hyper-parameters that differ from those of the checkpoint.

    Raises:
        DerainError: If a hyper-parameter, or one of `LENGTHS`, was changed, and a schedule is not a ``LambdaLR``.
    """
    configured_optimizers, configs = _init_optimizers_and_lr_schedulers(trainer.lightning_module)
    restored = [config.scheduler for config in trainer.lr_scheduler_configs]
    for optimizer, configured_optimizer in zip(trainer.optimizers, configured_optimizers, strict=True):
        schedules_of_optimizer = [schedule for schedule in restored if schedule.optimizer is optimizer]
        if not all(isinstance(schedule, LambdaLR) for schedule in schedules_of_optimizer):
            continue
        for group, options in zip(optimizer.param_groups, configured_optimizer.param_groups, strict=True):
            for name, value in options.items():
                if name != "params" and not (name == "lr" and schedules_of_optimizer):
                    group[name] = value
    for schedule, config in zip(restored, configs, strict=True):
        configured = config.scheduler
        if isinstance(schedule, LambdaLR) and isinstance(configured, LambdaLR):
            schedule.base_lrs, schedule.lr_lambdas = configured.base_lrs, configured.lr_lambdas
            _set_rates(schedule)
        else:
            _refuse_changes(schedule, configured, changed)


def _refuse_changes(schedule: Any, configured: Any, changed: Sequence[str]) -> None:
    """Check that no hyper-parameter, and none of `LENGTHS` of a schedule, has changed.

    Args:
        schedule: The restored schedule.
        configured: The schedule of the present run.
        changed: Names of the hyper-parameters that differ from those of the checkpoint.

    Raises:
        DerainError: If a hyper-parameter, or one of `LENGTHS`, has changed.
    """
    name = type(schedule).__name__
    if changed:
        raise DerainError(
            f"--model.{changed[0]}: {name} cannot resume with another value; use that of the checkpoint, or a LambdaLR"
        )
    for length in LENGTHS:
        old, new = getattr(schedule, length, None), getattr(configured, length, None)
        if old != new:
            raise DerainError(
                f"--trainer.max_epochs: cannot resume: {name} has {length} {new}; the run was started with {old}; "
                "train as many epochs or steps as that run, or use a LambdaLR"
            )


def _set_rates(schedule: Any) -> None:
    """Set the learning rates of an optimiser to those of its schedule at the current step."""
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
