"""How fast training goes, and whether it waits for data."""

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer


class Throughput(Callback):
    """Logs ``train/images_per_second`` over all devices and ``train/data_wait``, the share of time spent waiting.

    Both are means over an epoch, whatever interrupts it. Time between two batches, when the loop asks for data, counts
    as waiting.
    """

    def __init__(self) -> None:
        self._begin(0.0)
        self._resumed: dict[str, Any] = {}

    def _begin(self, spent: float) -> None:
        self._free = time.perf_counter()
        self._start = self._free - spent
        self._waited, self._images = 0.0, 0

    def state_dict(self) -> dict[str, float | int]:
        """Return what was measured of the epoch."""
        return {"spent": self._free - self._start, "waited": self._waited, "images": self._images}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the means of the epoch."""
        self._resumed = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks; a resumed epoch has no start of its own."""
        self._begin(self._resumed.get("spent", 0.0))
        self._waited, self._images = self._resumed.get("waited", 0.0), self._resumed.get("images", 0)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks."""
        self._begin(0.0)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A batch has come."""
        self._wait = time.perf_counter() - self._free

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch, which is not trained on where a signal stops it; the next one is asked for."""
        self._waited += self._wait
        self._images += len(batch["name"])
        self._free = time.perf_counter()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clocks."""
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the validation's time out."""
        if not trainer.sanity_checking:
            pause = time.perf_counter() - self._paused
            self._start += pause
            self._free += pause

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the epoch's means; validation in between does not count."""
        busy = max(self._free - self._start, 1e-9)
        pl_module.log_dict(
            {
                "train/images_per_second": self._images * trainer.world_size / busy,
                "train/data_wait": self._waited / busy,
            },
            sync_dist=False,
        )
