import lightning
import pytest
import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn

from derain.callbacks import EMA
from derain.errors import DerainError
from derain.methods import DerainModule


class Tiny(DerainModule):
    """One weight, one buffer, one frozen part outside the network."""

    def __init__(self):
        super().__init__()
        self.network = nn.Conv2d(3, 3, 1, bias=False)
        self.network.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.frozen = nn.Linear(2, 2)

    def forward(self, rainy):
        return self.network(rainy)

    def training_step(self, batch, batch_idx):
        self.network.seen += 1
        return self(batch["rainy"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.network.parameters(), 0.1)


class Record(lightning.Callback):
    """Record the weights after every batch and in validation."""

    def __init__(self):
        self.weights, self.validated = [], []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.weights.append(pl_module.network.weight.detach().double().clone())

    def on_validation_batch_end(self, trainer, pl_module, *args):
        self.validated.append(pl_module.network.weight.detach().clone())


def run(tmp_path, ema, *, batches=7, epochs=1, resume=None):
    torch.manual_seed(0)
    image = torch.rand(3, 12, 12)
    pair = {"rainy": image, "clean": image, "name": "a", "index": 0}
    record = Record()
    trainer = lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        max_epochs=epochs,
        default_root_dir=tmp_path,
        callbacks=[record, *([ema] if ema else [])],
    )
    module = Tiny()
    start = module.network.weight.detach().double().clone()
    train, val = (torch.utils.data.DataLoader([pair] * n, batch_size=1) for n in (batches, 1))
    trainer.fit(module, train, val, ckpt_path=resume, weights_only=True)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    return trainer, module, record, start


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_average_follows_the_formula(tmp_path, every):
    ema = EMA(decay=0.5, every=every)
    _, _, record, expected = run(tmp_path, ema)
    updates = 0
    for batch, weight in enumerate(record.weights, start=1):
        if batch % every == 0:
            updates += 1
            decay = min(0.5, (1 + updates) / (10 + updates))
            expected = decay * expected + (1 - decay) * weight
    assert ema.updates == updates == 7 // every
    torch.testing.assert_close(ema.average.weight.double(), expected, atol=1e-6, rtol=0)
    assert ema.average.seen == 7 // every * every


def test_validation_uses_the_average_and_training_the_raw_weights(tmp_path):
    ema = EMA(decay=0.9)
    _, module, record, _ = run(tmp_path, ema)
    assert torch.equal(record.validated[-1], ema.average.weight)
    assert torch.equal(module.network.weight.double(), record.weights[-1])
    assert not torch.equal(module.network.weight, ema.average.weight)


def test_the_checkpoint_contains_raw_weights_and_the_average_of_the_network(tmp_path):
    ema = EMA(decay=0.9)
    _, module, _, _ = run(tmp_path, ema)
    saved = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert torch.equal(saved["state_dict"]["network.weight"], module.network.weight)
    assert torch.equal(saved["ema"]["network"]["weight"], ema.average.weight)
    assert set(saved["ema"]["network"]) == {"weight", "seen"}


def test_a_resumed_average_equals_an_uninterrupted_one(tmp_path):
    whole = EMA(decay=0.9)
    run(tmp_path, whole, epochs=2)
    run(tmp_path, EMA(decay=0.9), epochs=1)
    resumed = EMA(decay=0.9)
    run(tmp_path, resumed, epochs=2, resume=tmp_path / "a.ckpt")
    assert resumed.updates == whole.updates == 14
    assert torch.equal(resumed.average.weight, whole.average.weight)


def test_a_checkpoint_without_average_is_an_error(tmp_path):
    run(tmp_path, None)
    with pytest.raises(DerainError, match="EMA"):
        run(tmp_path, EMA(), epochs=2, resume=tmp_path / "a.ckpt")


def test_resuming_without_the_average_is_an_error(tmp_path):
    run(tmp_path, EMA())
    with pytest.raises(DerainError, match="EMA"):
        run(tmp_path, None, epochs=2, resume=tmp_path / "a.ckpt")


def test_updates_are_counted_over_epochs(tmp_path):
    ema = EMA(every=5)
    run(tmp_path, ema, batches=3, epochs=4)
    assert ema.updates == 2


def test_options_out_of_range_are_errors():
    for name, value in (("decay", 1.0), ("decay", -0.1), ("every", 0)):
        with pytest.raises(DerainError, match=f"{name} {value}"):
            EMA(**{name: value})


def test_the_checkpoint_has_the_counters():
    """A resumed average is updated at the batches of an uninterrupted one, also after a batch without an update."""
    ema, resumed = EMA(every=2), EMA(every=2)
    ema.average, resumed.average = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    ema.batches, ema.updates = 5, 2
    checkpoint = {}
    trainer = lightning.Trainer(accelerator="cpu", barebones=True)
    trainer.state.fn = TrainerFn.FITTING
    ema.on_save_checkpoint(trainer, Tiny(), checkpoint)
    resumed.on_load_checkpoint(trainer, Tiny(), checkpoint)
    assert (resumed.batches, resumed.updates) == (5, 2)
    assert torch.equal(resumed.average.weight, ema.average.weight)
