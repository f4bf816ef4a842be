"""Images per second of a training, and the share of time spent waiting for data."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Log ``train/images_per_second`` of all devices, and ``train/data_wait``, the share of time without data.

    Both are means over an epoch, also of one that was interrupted and resumed. The time between two batches, in which
    the loop fetches the next one, counts as waiting; validation does not count.
    """

    def __init__(self) -> None:
        self._begin(0.0)
        self._resumed: dict[str, Any] = {}

    def _begin(self, spent: float) -> None:
        self._free = time.perf_counter()
        self._start = self._free - spent
        self._waited, self._images = 0.0, 0

    def state_dict(self) -> dict[str, float | int]:
        """Return seconds and images of the epoch so far."""
        return {"spent": self._free - self._start, "waited": self._waited, "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore them; `on_train_start` uses them."""
        self._resumed = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks; Lightning calls no ``on_train_epoch_start`` for a resumed epoch."""
        self._begin(self._resumed.get("spent", 0.0))
        self._waited, self._images = self._resumed.get("waited", 0.0), self._resumed.get("images", 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._begin(0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Measure how long the batch was waited for."""
        self._wait = time.perf_counter() - self._free

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch; one that a signal stops before training is not counted."""
        self._waited += self._wait
        self._images += len(batch["name"])
        self._free = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clocks."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start them again."""
        if not trainer.sanity_checking:
            pause = time.perf_counter() - self._paused
            self._start += pause
            self._free += pause

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log the means of the epoch."""
        busy = max(self._free - self._start, 1e-9)
        pl_module.log_dict(
            {
                "train/images_per_second": self._images * trainer.world_size / busy,
                "train/data_wait": self._waited / busy,
            },
            sync_dist=False,
        )
