import itertools

import numpy as np
import pytest
import torch

from derain.data.datamodule import RainDataModule, Strided, Tickets
from derain.data.pairs import find_pairs
from derain.errors import DerainError
from tests.factories import make_set
from tests.test_images import png_head


@pytest.fixture
def root(tmp_path):
    make_set(tmp_path, "Rain800", "train", count=10)
    make_set(tmp_path, "Rain800", "test", count=3, seed=50)
    make_set(tmp_path, "Rain100L", "test", count=4, seed=90)
    return tmp_path


def data(root, **options):
    options = {"root": str(root), "workers": 0, "crop": 16, "batch_size": 4, **options}
    return RainDataModule(**options)


def batches(module, stage, epoch=0):
    loader = getattr(module, f"{stage}_dataloader")()
    loader.sampler.set_epoch(epoch)
    return list(loader)


def test_training_batches(root):
    module = data(root, train="Rain800", val_share=0.2)
    module.setup("fit")
    found = batches(module, "train")
    assert [len(batch["name"]) for batch in found] == [4, 4]
    names = list(itertools.chain.from_iterable(batch["name"] for batch in found))
    assert len(set(names)) == 8
    batch = module.on_after_batch_transfer(found[0], 0)
    assert batch["rainy"].shape == batch["clean"].shape == (4, 3, 16, 16)
    assert batch["rainy"].dtype == torch.float32
    assert 0 <= batch["clean"].min() < batch["clean"].max() <= 1
    assert (batch["rainy"] - batch["clean"]).mean() > 0


def test_validation_is_a_seeded_slice_of_train(root):
    slices = []
    for seed in (0, 0, 1, 2):
        module = data(root, train="Rain800", val_share=0.3, split_seed=seed)
        module.setup("fit")
        parts = {part: {pair.name for pair in module.pairs[part]} for part in ("train", "val")}
        assert len(parts["val"]) == 3
        assert not parts["train"] & parts["val"]
        assert len(parts["train"] | parts["val"]) == 10
        slices.append(parts["val"])
    assert slices[0] == slices[1]
    assert len({frozenset(s) for s in slices}) > 1


def test_no_background_both_trains_and_validates(root):
    make_set(root, "Rain1400", "train", count=5)
    module = data(root, train="Rain1400", val_share=0.4)
    module.setup("fit")
    clean = {part: {pair.clean for pair in module.pairs[part]} for part in ("train", "val")}
    assert (len(clean["train"]), len(clean["val"])) == (3, 2)
    assert not clean["train"] & clean["val"]


def test_validating_alone_sees_the_same_slice(root):
    fit, alone = (data(root, train="Rain800", val_share=0.3) for _ in range(2))
    fit.setup("fit")
    alone.setup("validate")
    assert fit.pairs["val"] == alone.pairs["val"]


def test_a_named_validation_set_and_a_limit(root):
    module = data(root, train="Rain800", val="Rain100L", val_limit=2)
    module.setup("fit")
    assert len(module.pairs["train"]) == 10
    assert module.pairs["val"] == find_pairs("Rain100L", "test", data_root=root).pairs[:2]


def test_whole_images_come_one_by_one(root):
    module = data(root, test="Rain800")
    module.setup("test")
    found = batches(module, "test")
    assert [int(batch["index"]) for batch in found] == [0, 1, 2]
    for batch, pair in zip(found, module.pairs["test"], strict=True):
        rainy, clean = pair.read()
        np.testing.assert_array_equal(batch["rainy"][0].permute(1, 2, 0).numpy(), rainy)
        np.testing.assert_array_equal(batch["clean"][0].permute(1, 2, 0).numpy(), clean)


def test_prediction_needs_no_clean_images(root):
    make_set(root, "images", "predict", count=2)
    module = data(root, predict=str(root / "images"))
    module.setup("predict")
    assert all("clean" not in batch for batch in batches(module, "predict"))
    assert len(module.pairs["predict"]) == 2


def test_sets_are_mixed_under_names_that_tell_them_apart(root):
    module = data(root, test=["Rain800", "Rain100L"])
    module.setup("test")
    names = [pair.name for pair in module.pairs["test"]]
    assert len(set(names)) == 7
    assert {name.split("/")[0] for name in names} == {"Rain800", "Rain100L"}


def test_samples_depend_on_seed_epoch_and_place_alone(root):
    def tensors(epoch, workers=0, **options):
        module = data(root, train="Rain800", workers=workers, repeat=2, **options)
        module.setup("fit")
        return torch.cat([batch["rainy"] for batch in batches(module, "train", epoch)])

    first = tensors(0)
    assert torch.equal(first, tensors(0, workers=2))
    assert torch.equal(first, tensors(0, cache="off"))
    assert not torch.equal(first, tensors(1))
    assert not torch.equal(first, tensors(0, seed=1))


def test_repeat_draws_several_crops_of_an_image(root):
    module = data(root, train="Rain800", repeat=3, val_share=0.2)
    module.setup("fit")
    assert sum(len(batch["name"]) for batch in batches(module, "train")) == 24


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_evaluation_counts_every_image_once(world):
    shares = [list(Strided(101, rank, world)) for rank in range(world)]
    assert [len(share) for share in shares] == [len(Strided(101, r, world)) for r in range(world)]
    assert sorted(itertools.chain.from_iterable(shares)) == list(range(101))


def test_no_rank_is_left_without_an_image():
    assert [list(Strided(2, rank, 5)) for rank in range(5)] == [[0], [1], [0], [1], [0]]


def test_ranks_train_on_different_images_equally_many():
    shares = [list(Tickets(11, rank, 2, seed=0)) for rank in range(2)]
    assert [len(share) for share in shares] == [6, 6]
    assert {place for share in shares for _, place in share} == set(range(11))
    sampler = Tickets(11, 0, 1, seed=0)
    sampler.set_epoch(3)
    later = list(sampler)
    assert {epoch for epoch, _ in later} == {3}
    sampler.set_epoch(4)
    assert [place for _, place in later] != [place for _, place in sampler]


def test_refusals(root):
    for option, value in (("crop", 0), ("batch_size", -1), ("val_share", 1.5)):
        with pytest.raises(DerainError, match=f"--data.{option} {value}"):
            data(root, **{option: value})
    for stage, option in (("fit", "train"), ("test", "test"), ("predict", "predict")):
        with pytest.raises(DerainError, match=f"--data.{option}: no set is named"):
            data(root).setup(stage)
    with pytest.raises(DerainError, match=r"Rain12.*below"):
        data(root, test="Rain12").setup("test")


@pytest.mark.parametrize(
    ("options", "named"), [({"crop": 100_000}, "crop 100000"), ({"batch_size": 10**9}, "10000000")]
)
def test_crops_that_nothing_can_hold_are_refused(root, options, named):
    with pytest.raises(DerainError, match=named):
        data(root, train="Rain800", **options).setup("fit")


@pytest.mark.parametrize("cache", ["ram", "disk", "off"])
def test_a_decompression_bomb_is_refused(root, cache):
    found = data(root, train="Rain800", cache=cache)
    (root / "Rain800/training/3.jpg").write_bytes(png_head(40_000, 40_000))
    with pytest.raises(DerainError, match=r"3\.jpg: .*megapixels"):
        found.setup("fit") or batches(found, "train")
