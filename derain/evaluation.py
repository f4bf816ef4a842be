"""Size of the batches in validation, test and prediction."""

import logging
from typing import Literal

from lightning import Trainer

log = logging.getLogger("derain")

GPU_BATCH = 32
"""Maximum number of images in a batch by default, on all devices but a CPU."""


def evaluation_batch_size(option: int | Literal["auto"], split: str, trainer: Trainer | None) -> int:
    """Return the maximum number of images in a batch; always 1 in validation, and with a limit on batches.

    Args:
        option: Value of ``--data.eval_batch_size``; ``auto``: 1 on a CPU, `GPU_BATCH` on other devices.
        split: ``val``, ``test`` or ``predict``.
        trainer: The trainer; None for a CPU and no limit on batches.
    """
    if split == "val":  # DDP expects the same number of batches on each rank
        return 1
    if is_limited(split, trainer):
        if option not in ("auto", 1):
            log.info("--data.eval_batch_size %s: ignored: with a limit on batches, each batch is one image", option)
        return 1
    if option != "auto":
        return option
    return 1 if trainer is None or trainer.strategy.root_device.type == "cpu" else GPU_BATCH


def is_limited(split: str, trainer: Trainer | None) -> bool:
    """Return whether the trainer limits the number of batches of a split: 1.0 means all batches, but 1 means one."""
    limit = 1.0 if trainer is None else getattr(trainer, f"limit_{split}_batches")
    return isinstance(limit, int) or limit != 1.0
