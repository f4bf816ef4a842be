from collections import Counter

import lightning
import numpy as np
import pytest
import torch

from derain.data.datamodule import RainDataModule
from derain.data.mixing import Mixture
from derain.data.samplers import BatchStage, CropStage, Sample, TrainingBatchSampler
from derain.data.splitting import by_data_set, first_pairs
from derain.errors import DerainError
from derain.loops import Position
from derain.methods import PReNetModule
from tests.factories import make_set

SETS = ["Rain800", "Rain1400", "Rain200L"]


@pytest.fixture
def root(tmp_path):
    make_set(tmp_path, "Rain800", "train", count=10)
    make_set(tmp_path, "Rain1400", "train", count=1, seed=20)
    make_set(tmp_path, "Rain200L", "train", count=4, seed=40)
    for name, count, seed in (("Rain100L", 3, 60), ("Rain100H", 1, 80)):
        make_set(tmp_path, name, "test", count=count, seed=seed)
    return tmp_path


def data(root, **options):
    options = {"root": str(root), "train": SETS, "val": "Rain100L", "workers": 0, "crop": 16, **options}
    module = RainDataModule(**options)
    module.setup("fit")
    return module


def names_of_epoch(module, epoch=0):
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(epoch)
    return [name for batch in loader for name in batch["name"]]


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0], [5.0, 1.0, 2.0], [0.4, 7.3, 0.3]])
@pytest.mark.parametrize("count", [30, 97])
def test_each_set_has_its_share_and_each_pair_its_turn(weights, count):
    sizes = [10, 14, 4]
    mixture = Mixture(sizes, weights, count, seed=3)
    exact = np.array(weights) / sum(weights) * count
    assert sum(mixture.counts) == count
    assert np.abs(np.array(mixture.counts) - exact).max() < 1
    epochs = 7
    pairs = [mixture.pair(Sample(epoch, number, 16)) for epoch in range(epochs) for number in range(count)]
    used = Counter(pairs)
    first = 0
    for size, share in zip(sizes, mixture.counts, strict=True):
        times = [used[pair] for pair in range(first, first + size)]
        assert sum(times) == epochs * share
        assert max(times) - min(times) <= 1
        first += size


def test_the_seed_determines_the_order_within_sets():
    orders = []
    for seed in (0, 0, 1):
        mixture = Mixture([10, 30], [1.0, 1.0], 20, seed)
        orders.append([mixture.pair(Sample(0, number, 16)) for number in range(20)])
    assert orders[0] == orders[1] != orders[2]


def test_a_set_without_samples_is_rejected():
    with pytest.raises(DerainError, match="data set 2"):
        Mixture([10, 10], [1000.0, 1.0], 20, seed=0)


@pytest.mark.parametrize("world", [1, 2])
def test_batches_of_all_ranks_have_the_shares(root, world):
    module = data(root, train_weights=[2.0, 1.0, 1.0])
    pairs = module.pairs["train"]
    sizes = [len(indices) for indices in by_data_set(pairs).values()]
    mixture = Mixture(sizes, [2.0, 1.0, 1.0], len(pairs), seed=0)
    found = Counter()
    for rank in range(world):
        sampler = TrainingBatchSampler(len(pairs), rank, world, 0, [BatchStage(0, 16, 4)])
        found.update(pairs[mixture.pair(sample)].data_set for batch in sampler for sample in batch)
    for name, count in zip(SETS, mixture.counts, strict=True):
        assert count <= found[name] <= count + world - 1  # all ranks get as many samples
    assert abs(mixture.counts[0] - len(pairs) / 2) < 1
    if world == 1:
        assert Counter(name.split("/")[0] for name in names_of_epoch(module)) == found


def test_crops_of_a_repeated_pair_differ(root):
    module = data(root, train_weights=[1.0, 1.0, 8.0])
    batches = list(module.train_dataloader())
    crops = [
        image.numpy().tobytes()
        for batch in batches
        for name, image in zip(batch["name"], batch["rainy"], strict=True)
        if name.startswith("Rain200L/")
    ]
    assert len(crops) > 2 * 4
    assert len(set(crops)) == len(crops)


@pytest.mark.parametrize("schedule", [None, [CropStage(3, 16, 4), CropStage(9, 24, 2)]])
def test_a_mixture_resumes_within_an_epoch(root, schedule):
    module = data(root, train_weights=[2.0, 1.0, 1.0], schedule=schedule)
    loader = module.train_dataloader()
    loader.batch_sampler.set_epoch(1)
    whole = list(loader)
    batches_before = len(whole)
    module.resume_at(Position(1, 2, batches_before + 2))
    rest = list(module.train_dataloader())
    assert [batch["name"] for batch in rest] == [batch["name"] for batch in whole[2:]]
    assert all(torch.equal(a["clean"], b["clean"]) for a, b in zip(rest, whole[2:], strict=True))


def test_other_weights_are_rejected_within_an_epoch(root):
    state = data(root, train_weights=[2.0, 1.0, 1.0]).state_dict()
    for weights in (None, [1.0, 1.0, 1.0]):
        module = data(root, train_weights=weights)
        module.load_state_dict(state)
        module.resume_at(Position(2, 1, 0))
        with pytest.raises(DerainError, match=r"--data\.train_weights"):
            module.train_dataloader()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"train_weights": [1.0, 2.0]}, "has 3"),
        ({"train_weights": [1.0, 2.0, 0.0]}, r"0\.0"),
        ({"train_weights": [1.0, 2.0, float("nan")]}, "nan"),
        ({"train_weights": [1.0, 2.0, float("inf")]}, "inf"),
        ({"train": "Rain800", "train_weights": [1.0]}, "has 1"),
        ({"train": ["Rain800", "Rain800"], "train_weights": [1.0, 1.0]}, "Rain800, Rain800"),
    ],
)
def test_wrong_weights_are_rejected(root, options, named):
    with pytest.raises(DerainError, match=named):
        data(root, **options)


def test_a_set_that_only_validates_is_rejected(root):
    with pytest.raises(DerainError, match="Rain800"):
        data(root, train=["Rain800", "Rain1400"], train_weights=[1.0, 1.0], val=None, val_share=0.99).train_dataloader()


def test_a_limit_takes_pairs_of_every_set(root):
    module = data(root, val=["Rain100L", "Rain100H"], val_limit=3)
    assert [len(indices) for indices in module.data_sets("val").values()] == [2, 1]
    pairs = module.pairs["train"]
    assert [len(indices) for indices in by_data_set(first_pairs(pairs, 10)).values()] == [4, 3, 3]
    assert first_pairs(pairs, None) == pairs


class Doubling(PReNetModule):
    """Method whose score differs by data set, since it doubles the brightness."""

    def forward(self, rainy):
        return (2 * rainy).clamp(0, 1)


@pytest.mark.parametrize("mean", ["images", "sets"])
def test_validation_reports_each_set_and_the_mean(root, mean):
    module = data(root, val=["Rain100L", "Rain100H"], val_mean=mean)
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False
    )
    method = Doubling(stages=1)
    method.protocols = ("matlab-y", "rgb")
    (logged,) = trainer.validate(method, datamodule=module, verbose=False)
    for prefix in ("val", "val/rgb"):
        for key in ("psnr", "ssim", "rainy_psnr"):
            light, heavy = (logged[f"{prefix}/{name}/{key}"] for name in ("Rain100L", "Rain100H"))
            assert light != heavy
            expected = (light + heavy) / 2 if mean == "sets" else (3 * light + heavy) / 4
            assert logged[f"{prefix}/{key}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("val", "limit", "reported"),
    [
        (["Rain100L", "Rain100H"], 1, True),  # one batch, unlike 1.0
        (["Rain100L", "Rain100H"], 1.0, False),
        ("none", 1.0, False),
    ],
)
def test_limits_on_the_mean_over_sets_are_reported(root, caplog, val, limit, reported):
    caplog.set_level("INFO", logger="derain")
    module = RainDataModule(root=str(root), train=SETS, val=val, val_mean="sets", workers=0, crop=16)
    module.trainer = lightning.Trainer(accelerator="cpu", logger=False, limit_val_batches=limit)
    module.setup("fit")
    assert any("--trainer.limit_val_batches" in message for message in caplog.messages) is reported


def test_a_single_set_has_no_means_of_its_own(root):
    module = data(root)
    assert module.data_sets("val") == {}
