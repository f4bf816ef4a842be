"""Seeds for every batch, so that a resumed training draws the same random numbers."""

import random
from typing import Any

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer


class BatchSeeds(Callback):
    """Seed the global random generators before each batch with a hash of seed, epoch, batch and rank.

    The random numbers of a batch thus do not depend on earlier validations, or on whether the run was resumed.

    Args:
        seed: Seed of the run.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed Python's, NumPy's and torch's generators."""
        entropy = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
