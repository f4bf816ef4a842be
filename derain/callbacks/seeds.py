"""Random numbers that do not depend on interruptions."""

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer


class BatchSeeds(Callback):
    """Seeds every generator before each batch from (seed, epoch, batch, rank): a run resumed anywhere is exact.

    What else draws from these generators, as validation or the start of a data loader, changes nothing.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed this batch."""
        named = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        mixed = int(np.random.SeedSequence(named).generate_state(1)[0])
        random.seed(mixed)
        np.random.seed(mixed)
        torch.manual_seed(mixed)
