"""Random numbers that do not depend on interruptions."""

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.seed import seed_everything


class EpochSeeds(Callback):
    """Seeds every generator at the start of each epoch from (seed, epoch, rank), so that a resumed run is exact.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seeds this epoch."""
        mixed = (self.seed * 1_000_003 + trainer.current_epoch * 1_009 + trainer.global_rank) % 2**32
        seed_everything(mixed, verbose=False)
