import itertools
import logging

import lightning
import pytest
import torch

from derain.data.datamodule import RainDataModule
from derain.errors import DerainError
from tests.factories import clean_image, make_set, save


@pytest.fixture
def root(tmp_path):
    make_set(tmp_path, "Rain800", "train", count=8)
    make_set(tmp_path, "Rain100L", "test", count=2, seed=90)
    for index in range(3):
        save(tmp_path / "photos" / f"{index}.png", clean_image(200 + index))
    return tmp_path


def data(root, **options):
    options = {"root": str(root), "workers": 0, "crop": 16, "batch_size": 4, "train": "Rain800", **options}
    return RainDataModule(**options)


def batches(module, epoch=0):
    module.setup("fit")
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return [module.on_after_batch_transfer(module.on_before_batch_transfer(batch, 0), 0) for batch in loader]


def test_rain_is_added_to_clean_crops(root, caplog):
    caplog.set_level(logging.INFO)
    plain = batches(data(root, val="none", flips=False))
    rainy = batches(data(root, val="none", flips=False, rain="heavy"))
    assert [batch["name"] for batch in plain] == [batch["name"] for batch in rainy]
    for without, added in zip(plain, rainy, strict=True):
        assert set(without) == set(added)
        assert torch.allclose(without["clean"], added["clean"])
        assert not torch.equal(without["rainy"], added["rainy"])
        assert (added["rainy"] - added["clean"]).mean() > 0.02
    assert any("heavy" in record.getMessage() for record in caplog.records)


def test_batches_depend_on_seed_epoch_and_sample_alone(root):
    first, again, epoch, seed = (
        batches(data(root, val="none", rain="varied", **options), number)
        for options, number in (({}, 0), ({}, 0), ({}, 1), ({"seed": 1}, 0))
    )
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a["rainy"], b["rainy"])
        assert torch.equal(a["clean"], b["clean"])
    for other in (epoch, seed):
        assert not torch.equal(first[0]["rainy"], other[0]["rainy"])


@pytest.mark.slow
def test_share_keeps_the_rain_of_the_pairs(root):
    plain = batches(data(root, val="none", repeat=20, cache="ram"))
    mixed = batches(data(root, val="none", repeat=20, cache="ram", rain="heavy", rain_share=0.3))
    kept = [
        torch.equal(a, b)
        for before, after in zip(plain, mixed, strict=True)
        for a, b in zip(before["rainy"], after["rainy"], strict=True)
    ]
    assert len(kept) == 160
    assert 0.55 < sum(kept) / 160 < 0.85


def test_clean_photos_are_a_training_set(root):
    module = data(root, train=["Rain800", "photos"], rain="heavy", rain_share=0.01, val_share=0.3, repeat=4)
    found = batches(module)
    assert not any(pair.is_photo for pair in module.pairs["val"])
    assert sum(pair.is_photo for pair in module.pairs["train"]) == 3
    for batch in found:
        for name, rainy, clean in zip(batch["name"], batch["rainy"], batch["clean"], strict=True):
            if name.startswith("photos/"):
                assert (rainy - clean).abs().mean() > 0.01

    with pytest.raises(DerainError, match="data"):
        data(root, train="photos", rain="heavy").setup("fit")
    with pytest.raises(DerainError, match="photos"):
        data(root, train="photos", val="none").setup("fit")


def test_validation_is_unchanged(root):
    plain, rainy = (data(root, val="Rain100L", rain=rain) for rain in ("off", "varied"))
    for module in (plain, rainy):
        module.setup("fit")
    for a, b in itertools.zip_longest(plain.val_dataloader(), rainy.val_dataloader()):
        a, b = (
            module.on_after_batch_transfer(module.on_before_batch_transfer(x, 0), 0)
            for module, x in ((plain, a), (rainy, b))
        )
        assert torch.equal(a["rainy"], b["rainy"])


def test_bare_off_in_yaml_is_false(root):
    assert data(root, rain=False).rain_ranges is None


@pytest.mark.parametrize(
    ("options", "value"),
    [({"rain": "stormy"}, "stormy"), ({"rain": True}, "True"), ({"rain_share": 0.0}, "0"), ({"rain_share": 2.0}, "2")],
)
def test_invalid_options(options, value, root):
    with pytest.raises(DerainError, match=value):
        data(root, **options)


class Recorder(lightning.LightningModule):
    """Linear model that stores the rainy batches it is trained on."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 1)
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch["rainy"].clone())
        return (self.layer(batch["rainy"]) - batch["clean"]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


def train(root, workers):
    module = data(root, val="none", rain="varied", workers=workers)
    recorder = Recorder()
    trainer = lightning.Trainer(
        max_epochs=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
        accelerator="cpu",
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=module)
    return recorder.seen


@pytest.mark.slow
def test_trainer_gets_the_same_rain_for_any_number_of_workers(root):
    alone, workers = train(root, 0), train(root, 1)
    assert len(alone) == len(workers) == 4
    assert all(torch.equal(a, b) for a, b in zip(alone, workers, strict=True))
