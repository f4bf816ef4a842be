"""Exponential moving average of the restoration network."""

import copy
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import nn

from derain.errors import DerainError
from derain.methods import TrainableModule


class EMA(Callback):
    """Exponential moving average (EMA) of the network's weights, saved in checkpoints in addition to the raw weights.

    The n-th update is ``average = d * average + (1 - d) * weights`` with ``d = min(decay, (1 + n) / (10 + n))``, the
    warm-up of TensorFlow's ``ExponentialMovingAverage``. Buffers are copied. Batches are counted instead of optimiser
    steps, so that methods with two optimisers need no other settings. In a checkpoint, ``state_dict`` contains the raw
    weights, and ``ema`` the average, which tests, restoration and weights files use.

    Args:
        decay: Fraction of the old average that an update keeps after the warm-up, in [0, 1).
        every: Number of batches between updates, at least 1.
        evaluate: Whether to validate with the average instead of the raw weights.

    Raises:
        DerainError: If ``decay`` or ``every`` is out of range.
    """

    def __init__(self, decay: float = 0.999, every: int = 1, evaluate: bool = True) -> None:
        if not 0 <= decay < 1:
            raise DerainError(f"EMA: decay {decay}: expected at least 0 and below 1")
        if every < 1:
            raise DerainError(f"EMA: every {every}: expected at least 1")
        self.decay, self.every, self.evaluate = decay, every, evaluate
        self.batches = 0
        self.updates = 0
        self.average: nn.Module | None = None
        self._swapped = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Copy the network as the initial average when training starts."""
        if self.average is None and stage == "fit":
            self.average = copy.deepcopy(_network(pl_module)).requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move the average to the network's device."""
        if self.average is not None:
            self.average.to(pl_module.device)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after every ``every`` batches."""
        if self.average is None:
            return
        self.batches += 1
        if self.batches % self.every:
            return
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        network = _network(pl_module)
        for average, weight in zip(self.average.parameters(), network.parameters(), strict=True):
            average.lerp_(weight.to(average.dtype), 1 - decay)
        for average_buffer, buffer in zip(self.average.buffers(), network.buffers(), strict=True):
            average_buffer.copy_(buffer)

    def _swap(self, pl_module: LightningModule) -> None:
        """Exchange the tensors of the network and the average, if ``evaluate`` is set."""
        if self.average is None or not self.evaluate:
            return
        self.average.to(pl_module.device)  # sanity checking runs before on_train_start
        network = _network(pl_module)
        weights = [*network.parameters(), *network.buffers()]
        averages = [*self.average.parameters(), *self.average.buffers()]
        for weight, average in zip(weights, averages, strict=True):
            weight.data, average.data = average.data, weight.data
        self._swapped = not self._swapped

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Load the average into the network, if ``evaluate`` is set."""
        self._swap(pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the raw weights."""
        self._swap(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Restore the raw weights if a validation was stopped, before a checkpoint is saved."""
        if self._swapped:
            self._swap(pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the average in the entry ``ema``."""
        if self.average is not None:
            network = {name: value.cpu() for name, value in self.average.state_dict().items()}
            checkpoint["ema"] = {"network": network, "updates": self.updates, "batches": self.batches}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Restore the average when training resumes.

        Raises:
            DerainError: If the checkpoint was saved without EMA.
        """
        if trainer.state.fn != "fit":
            return
        if "ema" not in checkpoint:
            raise DerainError(
                "EMA: the checkpoint contains no average; resume without the EMA callback, or start a new run"
            )
        assert self.average is not None
        self.average.load_state_dict(checkpoint["ema"]["network"])
        self.updates, self.batches = checkpoint["ema"]["updates"], checkpoint["ema"]["batches"]


def _network(pl_module: LightningModule) -> nn.Module:
    assert isinstance(pl_module, TrainableModule)
    return pl_module.network
