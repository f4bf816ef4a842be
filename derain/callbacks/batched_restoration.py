"""Restoration of the images of ``derain test`` and ``derain predict`` in batches and tiles that fit into memory."""

import time
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from derain.batching import LARGEST_BATCH, Scheduler, check_tile
from derain.methods import DerainModule

OVERLAP = 64
"""Minimum overlap of tiles in pixels, as for `derain.Restorer`."""


class BatchedRestoration(Callback):
    """Restore images in ``derain test`` and ``derain predict`` by a `Scheduler`, and measure the time.

    Args:
        tile: Side of the tiles in pixels, ``auto`` or None (whole images), as for `derain.Restorer`.

    Raises:
        ArgumentError: If the side of the tiles is too small.

    Attributes:
        seconds: Seconds of restoration on this rank in the last test or prediction, without data loading and scoring.
        images: Number of images restored on this rank in the last test or prediction.
    """

    def __init__(self, tile: int | Literal["auto"] | None = None) -> None:
        check_tile(tile)
        self.tile = tile
        self.seconds, self.images = 0.0, 0

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore by a scheduler that clips to [-1, 2], as ``validation_step`` does; protocols then clip further."""
        self._start(trainer, pl_module, limits=(-1.0, 2.0))

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore by a scheduler that clips to [0, 1]."""
        self._start(trainer, pl_module, limits=(0.0, 1.0))

    def _start(self, trainer: Trainer, pl_module: LightningModule, limits: tuple[float, float]) -> None:
        self.seconds, self.images = 0.0, 0
        method = cast(DerainModule, pl_module)
        precision: Literal["float32", "bf16"] = "bf16" if trainer.precision == "bf16-mixed" else "float32"
        scheduler = Scheduler(method, method.device, precision, self.tile, OVERLAP, ensemble=False)
        scheduler.limits = limits
        batch_size: int | str = getattr(trainer.datamodule, "eval_batch_size", "auto")  # type: ignore[attr-defined]
        if isinstance(batch_size, int):
            scheduler.largest_batch = max(LARGEST_BATCH, batch_size)  # also limits tiles at once

        def now() -> float:
            if method.device.type != "cpu":
                torch.accelerator.synchronize(method.device)
            return time.perf_counter()

        def restore(rainy: Tensor, forward: Callable[..., Tensor], conditions: dict[str, Any] | None) -> Tensor:
            start = now()
            restored = scheduler.run_batch(rainy, forward, conditions)
            self.seconds += now() - start
            self.images += len(rainy)
            return restored

        method.restore_batch = restore

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remove the scheduler, so that the method restores each batch in one pass again."""
        cast(DerainModule, pl_module).restore_batch = None

    on_predict_end = on_test_end
