"""Options of a resumed training: learning rates, schedules and weight decay as configured now."""

from collections.abc import Sequence
from typing import Any

from lightning import Trainer
from lightning.pytorch.core.optimizer import _init_optimizers_and_lr_schedulers
from torch.optim.lr_scheduler import LambdaLR

from derain.errors import DerainError


def use_configured(trainer: Trainer, changed: Sequence[str]) -> None:
    """Set optimisers and schedules that a checkpoint filled to the options of this run, at the step they are at.

    Where no option was changed, this changes no bit: a schedule of derain is a function of the step alone.

    Args:
        trainer: The trainer, after it has loaded a checkpoint.
        changed: Names of the options that differ from those of the checkpoint.

    Raises:
        DerainError: If an option was changed, and a schedule is not a ``LambdaLR``, whose rate at a step is unknown.
    """
    optimizers, schedules = _init_optimizers_and_lr_schedulers(trainer.lightning_module)
    for optimizer, fresh in zip(trainer.optimizers, optimizers, strict=True):
        for group, options in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            scheduled = any(config.scheduler.optimizer is optimizer for config in trainer.lr_scheduler_configs)
            kept = {"params", "lr"} if scheduled else {"params"}
            group |= {name: value for name, value in options.items() if name not in kept}
    for config, fresh_config in zip(trainer.lr_scheduler_configs, schedules, strict=True):
        schedule, wanted = config.scheduler, fresh_config.scheduler
        if isinstance(schedule, LambdaLR) and isinstance(wanted, LambdaLR):
            schedule.base_lrs, schedule.lr_lambdas = wanted.base_lrs, wanted.lr_lambdas
            _set_rates(schedule)
        elif changed:
            raise DerainError(
                f"--model.{changed[0]}: {type(schedule).__name__} cannot be resumed with another value; resume with "
                "the one of the checkpoint, or use LambdaLR"
            )


def _set_rates(schedule: Any) -> None:
    factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
    schedule._last_lr = [rate * factor for rate, factor in zip(schedule.base_lrs, factors, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, schedule._last_lr, strict=True):
        group["lr"] = rate
