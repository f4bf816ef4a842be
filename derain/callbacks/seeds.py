"""Random numbers that do not depend on interruptions."""

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.seed import seed_everything


class EpochSeeds(Callback):
    """Seeds every generator before the first batch of an epoch from (seed, epoch, rank): a resumed run is exact.

    Not earlier: a data loader draws from the same generator when it starts, which a resumed run does after the start of
    its first epoch, and others before.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seeds this epoch."""
        if batch_idx == 0:
            mixed = (self.seed * 1_000_003 + trainer.current_epoch * 1_009 + trainer.global_rank) % 2**32
            seed_everything(mixed, verbose=False)
