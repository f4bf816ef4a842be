"""Random numbers of a batch depend on seed, epoch, batch and rank alone."""

import itertools
import random
from unittest.mock import Mock

import numpy as np
import torch
from lightning import LightningModule, Trainer

from derain.callbacks.seeds import BatchSeeds


def drawn(seed, epoch, rank, batch):
    """What each generator draws in a batch."""
    random.random(), np.random.rand(), torch.rand(1)  # whatever was drawn before
    trainer = Mock(spec=Trainer, current_epoch=epoch, global_rank=rank)
    BatchSeeds(seed).on_train_batch_start(trainer, Mock(spec=LightningModule), None, batch)
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_every_batch_has_its_own_random_numbers():
    cases = list(itertools.product(range(2), range(2), range(2), range(4)))
    numbers = [drawn(*case) for case in cases]
    assert numbers[::-1] == [drawn(*case) for case in reversed(cases)]  # whatever batches came before
    for generator in zip(*numbers, strict=True):
        assert len(set(generator)) == len(cases)
