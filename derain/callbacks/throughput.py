"""Training throughput: images per second, and the fraction of time spent waiting for data."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log ``train/images_per_second`` of all devices, and ``train/data_wait``, the fraction of time waiting for data.

    Both are means over an epoch. If the run was resumed within the epoch, they include the part before the
    interruption. The time between two batches, in which the loop fetches the next batch, counts as waiting. Time of
    validation is excluded. Both are measured on rank 0; its number of images is multiplied by the number of devices.
    """

    def __init__(self) -> None:
        self._begin(0.0)
        self._resumed: dict[str, Any] = {}

    def _begin(self, spent: float) -> None:
        """Start the clocks of an epoch, of which ``spent`` seconds have passed already."""
        self._last_end = time.perf_counter()
        self._start = self._last_end - spent
        self._waited, self._images = 0.0, 0

    def state_dict(self) -> dict[str, float | int]:
        """Return seconds (in total and waiting) and number of images of the epoch so far."""
        return {"spent": self._last_end - self._start, "waited": self._waited, "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state of an interrupted epoch for `on_train_start`, which continues from it."""
        self._resumed = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start or continue the clocks: Lightning does not call ``on_train_epoch_start`` for a resumed epoch."""
        self._begin(self._resumed.get("spent", 0.0))
        self._waited, self._images = self._resumed.get("waited", 0.0), self._resumed.get("images", 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._begin(0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure the time spent waiting for the batch."""
        self._wait = time.perf_counter() - self._last_end

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the batch and the wait before it.

        Both are added only after the batch: if a signal stops the run earlier, the resumed run counts the batch.
        """
        self._waited += self._wait
        self._images += len(batch["name"])
        self._last_end = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the clocks."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Continue the clocks."""
        if not trainer.sanity_checking:
            pause = time.perf_counter() - self._paused
            self._start += pause
            self._last_end += pause

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means of the epoch."""
        spent = max(self._last_end - self._start, 1e-9)
        pl_module.log_dict(
            {
                "train/images_per_second": self._images * trainer.world_size / spent,
                "train/data_wait": self._waited / spent,
            },
            sync_dist=False,
        )
