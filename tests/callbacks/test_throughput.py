"""Images a second, whatever interrupts an epoch."""

from lightning import Trainer

from derain.callbacks.throughput import Throughput
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
