"""Exponential moving average of the restoration network."""

import copy
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from derain.errors import DerainError
from derain.methods import TrainableModule


class EMA(Callback):
    """Averages the network's weights, validates and saves the average beside the raw weights.

    After batch n (counted in batches, whatever the number of optimisers):
    ``average = d * average + (1 - d) * weights`` with ``d = min(decay, (1 + n) / (10 + n))``, the warm-up
    of TensorFlow's ExponentialMovingAverage. Buffers are copied. The checkpoint's ``state_dict`` holds the
    raw weights, its key ``ema`` the average, which is what `derain.methods.catalog.load` takes for testing and
    restoring.

    Args:
        decay: Share of the old average that one update keeps.
        every: Batches between updates.
        evaluate: Validate with the average instead of the raw weights.
    """

    def __init__(self, decay: float = 0.999, every: int = 1, evaluate: bool = True) -> None:
        if not 0 <= decay < 1 or every < 1:
            raise DerainError(f"EMA: decay {decay} must be in [0, 1) and every {every} at least 1")
        self.decay, self.every, self.evaluate = decay, every, evaluate
        self.batches = self.updates = 0
        self.average: nn.Module | None = None
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Starts from a copy of the network."""
        if self.average is None and stage == "fit":
            self.average = copy.deepcopy(_network(pl_module)).requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Moves the average to the network's device."""
        if self.average is not None:
            self.average.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Updates the average."""
        if self.average is None:
            return
        self.batches += 1
        if self.batches % self.every:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        network = _network(pl_module)
        for mean, value in zip(self.average.parameters(), network.parameters(), strict=True):
            mean.lerp_(value.to(mean.dtype), 1 - decay)
        for copied, buffer in zip(self.average.buffers(), network.buffers(), strict=True):
            copied.copy_(buffer)

    def _swap(self, pl_module: LightningModule) -> None:
        if self.average is not None and self.evaluate:
            network = _network(pl_module)
            self.average.to(pl_module.device)  # the sanity check comes before training starts
            for one, other in zip(
                [*network.parameters(), *network.buffers()],
                [*self.average.parameters(), *self.average.buffers()],
                strict=True,
            ):
                one.data, other.data = other.data, one.data
            self._swapped = not self._swapped

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the average into the network."""
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Puts the raw weights back."""
        self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Put the raw weights back where a validation was stopped, before a checkpoint is saved."""
        if self._swapped:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the average under its own key."""
        if self.average is not None:
            network = {name: value.cpu() for name, value in self.average.state_dict().items()}
            checkpoint["ema"] = {"network": network, "updates": self.updates, "batches": self.batches}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Takes the average back.

        Raises:
            DerainError: If the checkpoint was made without EMA.
        """
        if trainer.state.fn != "fit":
            return
        if "ema" not in checkpoint:
            raise DerainError(
                "EMA is configured, but the checkpoint holds no average; resume without the EMA callback or start anew"
            )
        assert self.average is not None
        self.average.load_state_dict(checkpoint["ema"]["network"])
        self.updates, self.batches = checkpoint["ema"]["updates"], checkpoint["ema"]["batches"]


def _network(pl_module: LightningModule) -> nn.Module:
    assert isinstance(pl_module, TrainableModule)
    return pl_module.network
