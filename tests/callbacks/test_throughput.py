"""Images a second, whatever interrupts an epoch."""

import pytest
import torch
from lightning import Trainer
from lightning.pytorch.plugins import MixedPrecision

from derain.callbacks.throughput import Throughput
from derain.errors import DerainError
from derain.methods import PReNetModule


def test_a_batch_that_a_signal_stops_is_counted_once():
    first, resumed = Throughput(), Throughput()
    run = (Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"), PReNetModule(stages=1))
    batch = {"name": ["a", "b"]}
    first.on_train_start(*run)
    first.on_train_batch_start(*run, batch, 0)
    first.on_train_batch_end(*run, None, batch, 0)
    before = first.state_dict()
    first.on_train_batch_start(*run, batch, 1)
    assert first.state_dict() == before
    resumed.load_state_dict(before)
    resumed.on_train_start(*run)
    resumed.on_train_batch_start(*run, batch, 1)
    resumed.on_train_batch_end(*run, None, batch, 1)
    assert resumed.state_dict()["images"] == 4


@pytest.mark.parametrize("scaled", [True, False])
def test_half_added_gradients_may_overflow_while_losses_are_scaled(scaled, monkeypatch):
    module = PReNetModule(stages=1)
    plugins = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu")) if scaled else None
    module.trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", plugins=plugins)
    module.trainer.state.fn = "fit"
    monkeypatch.setattr(module, "_added_gradients", lambda: {"network.x": torch.tensor([float("inf")])})
    checkpoint = {}
    if scaled:
        module.on_save_checkpoint(checkpoint)
        assert "gradients" in checkpoint
    else:
        with pytest.raises(DerainError, match="not finite"):
            module.on_save_checkpoint(checkpoint)
