"""Options of optimisers and schedules when a training is resumed."""

from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from torch.optim.lr_scheduler import LambdaLR

from derain.errors import DerainError


def use_configured(trainer: Trainer, changed: Sequence[str]) -> None:
    """Apply the options of the present run to optimisers and schedules that were restored from a checkpoint.

    Learning rates, schedules and weight decay become those of the present run at the restored step. If no option was
    changed, nothing changes, since the schedules of derain are functions of the step.

    Args:
        trainer: The trainer, after it has loaded a checkpoint.
        changed: Names of the options that differ from those of the checkpoint.

    Raises:
        DerainError: If an option was changed and a schedule is not a ``LambdaLR``, whose learning rate is known at any
            step.
    """
    optimizers, schedules = _init_optimizers_and_lr_schedulers(trainer.lightning_module)
    for optimizer, configured_optimizer in zip(trainer.optimizers, optimizers, strict=True):
        for group, options in zip(optimizer.param_groups, configured_optimizer.param_groups, strict=True):
            scheduled = any(config.scheduler.optimizer is optimizer for config in trainer.lr_scheduler_configs)
            for name, value in options.items():
                if name != "params" and not (name == "lr" and scheduled):
                    group[name] = value
    for config, fresh_config in zip(trainer.lr_scheduler_configs, schedules, strict=True):
        schedule, configured = config.scheduler, fresh_config.scheduler
        if isinstance(schedule, LambdaLR) and isinstance(configured, LambdaLR):
            schedule.base_lrs, schedule.lr_lambdas = configured.base_lrs, configured.lr_lambdas
            _set_rates(schedule)
        elif changed:
            raise DerainError(
                f"--model.{changed[0]}: {type(schedule).__name__} cannot resume with another value; use that of the "
                "checkpoint, or a LambdaLR"
            )


def _set_rates(schedule: Any) -> None:
    """Set the learning rates of a schedule's optimiser to those at its current step."""
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
