import itertools

import lightning
import numpy as np
import pytest
import torch

from derain.data.datamodule import RainDataModule
from derain.data.pairs import find_pairs
from derain.data.samplers import CropStage
from derain.errors import DerainError
from derain.loops import Position
from tests.factories import make_set
from tests.test_images import png_header


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
    if stage == "train":
        loader.batch_sampler.set_epoch(epoch)
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


def test_validation_is_a_seeded_share_of_train(root):
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


@pytest.mark.parametrize(("name", "sequences"), [("NTURain", 4), ("GT-RAIN", 2), ("VRDS", 2)])
def test_no_sequence_both_trains_and_validates(root, name, sequences):
    make_set(root, name, "train", count=4)
    module = data(root, train=name, val_share=0.3)
    module.setup("fit")
    parts = {part: {pair.sequence for pair in module.pairs[part]} for part in ("train", "val")}
    assert len(parts["train"] | parts["val"]) == sequences
    assert parts["train"]
    assert parts["val"]
    assert not parts["train"] & parts["val"]
    clean = {part: {pair.clean for pair in module.pairs[part]} for part in ("train", "val")}
    assert not clean["train"] & clean["val"]


def test_validation_without_training_uses_the_same_share(root):
    fit, alone = (data(root, train="Rain800", val_share=0.3) for _ in range(2))
    fit.setup("fit")
    alone.setup("validate")
    assert fit.pairs["val"] == alone.pairs["val"]


def test_a_named_validation_set_and_a_limit(root):
    module = data(root, train="Rain800", val="Rain100L", val_limit=2)
    module.setup("fit")
    assert len(module.pairs["train"]) == 10
    assert module.pairs["val"] == find_pairs("Rain100L", "test", data_root=root).pairs[:2]


def test_whole_images_are_in_batches_of_one(root):
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


def test_names_of_mixed_sets_are_distinct(root):
    module = data(root, test=["Rain800", "Rain100L"])
    module.setup("test")
    names = [pair.name for pair in module.pairs["test"]]
    assert len(set(names)) == 7
    assert {name.split("/")[0] for name in names} == {"Rain800", "Rain100L"}


def test_samples_depend_on_seed_epoch_and_index_alone(root):
    def tensors(epoch, workers=0, **options):
        module = data(root, train="Rain800", workers=workers, repeat=2, **options)
        module.setup("fit")
        return torch.cat([batch["rainy"] for batch in batches(module, "train", epoch)])

    first = tensors(0)
    assert torch.equal(first, tensors(0, workers=2))
    assert torch.equal(first, tensors(0, cache="off"))
    assert not torch.equal(first, tensors(1))
    assert not torch.equal(first, tensors(0, seed=1))


def test_repeat_gives_several_crops_per_image(root):
    module = data(root, train="Rain800", repeat=3, val_share=0.2)
    module.setup("fit")
    assert sum(len(batch["name"]) for batch in batches(module, "train")) == 24


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_resumes_within_an_epoch(root, workers):
    module = data(root, train="Rain800", batch_size=2, workers=workers)
    module.setup("fit")
    whole = batches(module, "train", epoch=1)
    module.resume_at(Position(1, 3, 0))
    loader = module.train_dataloader()
    rest = list(loader)
    assert [batch["name"] for batch in rest] == [batch["name"] for batch in whole[3:]]
    assert all(torch.equal(a["rainy"], b["rainy"]) for a, b in zip(rest, whole[3:], strict=True))
    loader.batch_sampler.set_epoch(2)
    assert len(list(loader)) == len(loader) == len(whole)


@pytest.mark.parametrize(("option", "value"), [("batch_size", 3), ("repeat", 2), ("seed", 1), ("train", "Rain1400")])
def test_other_options_are_rejected_within_an_epoch_only(root, option, value):
    make_set(root, "Rain1400", "train", count=5)
    options = {"train": "Rain800", "batch_size": 2}
    modules = []
    for module_options in (options, options | {option: value}):
        module = data(root, **module_options)
        module.setup("fit")
        modules.append(module)
    state = modules[0].state_dict()
    for module in modules:
        module.load_state_dict(state)
        module.resume_at(Position(2, 0, 0))
        module.train_dataloader()
        module.resume_at(Position(2, 1, 0))
    modules[0].train_dataloader()
    name = "seed_everything" if option == "seed" else f"data.{option}"
    with pytest.raises(DerainError, match=f"--{name} {value}"):
        modules[1].train_dataloader()


def test_a_batch_size_that_a_schedule_ignores_may_change_within_an_epoch(root):
    modules = [data(root, train="Rain800", batch_size=size, schedule=[CropStage(9, 16, 2)]) for size in (2, 3)]
    for module in modules:
        module.setup("fit")
    modules[1].load_state_dict(modules[0].state_dict())
    modules[1].resume_at(Position(2, 1, 9))
    modules[1].train_dataloader()


def test_a_schedule_counts_the_trained_batches(root):
    """It does not assume that earlier epochs had as many batches as this one."""
    schedule = [CropStage(6, 16, 2), CropStage(9, 24, 2)]
    module = data(root, train="Rain800", batch_size=2, schedule=schedule)
    module.setup("fit")
    module.resume_at(Position(3, 1, 5))
    sampler = module.train_dataloader().batch_sampler
    assert [sampler.stage(3, batch).crop for batch in (1, 2)] == [16, 24]


def test_invalid_options_are_rejected(root):
    for option, value in (("crop", 0), ("batch_size", -1), ("val_share", 1.5)):
        with pytest.raises(DerainError, match=f"--data.{option} {value}"):
            data(root, **{option: value})
    for stage, option in (("fit", "train"), ("test", "test"), ("predict", "predict")):
        with pytest.raises(DerainError, match=f"--data.{option}: "):
            data(root).setup(stage)
    with pytest.raises(DerainError, match=r"Rain12.*below"):
        data(root, test="Rain12").setup("test")


# Training on all pairs, and crops that grow.


def test_all_pairs_train_without_validation(root):
    module = data(root, train="Rain800", val="none")
    module.setup("fit")
    assert len(module.pairs["train"]) == 10
    assert module.pairs["val"] == ()
    assert module.val_dataloader() == []
    names = [name for batch in batches(module, "train") for name in batch["name"]]
    assert len(set(names)) == 10


def test_validate_without_validation_set_is_rejected(root):
    with pytest.raises(DerainError, match=r"--data\.val none"):
        data(root, train="Rain800", val="none").setup("validate")


def test_a_folder_named_none_can_be_a_validation_set(root, monkeypatch):
    make_set(root, "folder", "test", count=2).rename(root / "none")
    monkeypatch.chdir(root)
    module = data(root, train="Rain800", val="./none")
    module.setup("fit")
    assert len(module.pairs["val"]) == 2


SCHEDULE = [CropStage(3, 16, 4), CropStage(2, 24, 2), CropStage(1, 32, 1)]


class Shapes(lightning.LightningModule):
    """Records the shapes of batches and the number of optimiser steps."""

    needs_unlabelled = False

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.global_step, *batch["rainy"].shape[::3]))
        return self.weight * batch["rainy"].mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append("validation")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def fit(module, method=None, **options):
    method = method or Shapes()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "use_distributed_sampler": False}
    lightning.Trainer(**quiet, **options).fit(method, module)
    return method.seen


@pytest.mark.parametrize("accumulate", [1, 3])
def test_crops_and_batches_follow_the_steps(root, accumulate):
    module = data(root, train="Rain800", val="none", schedule=SCHEDULE)
    seen = fit(module, max_steps=8, accumulate_grad_batches=accumulate)
    expected = [(4, 16)] * 3 + [(2, 24)] * 2 + [(1, 32)] * 3
    assert seen == [(step, *shape) for step, shape in enumerate(expected) for _ in range(accumulate)]


def test_incomplete_steps_at_the_end_of_an_epoch_are_rejected(root):
    module = data(root, train="Rain800", val="none", schedule=SCHEDULE)
    with pytest.raises(DerainError, match=r"accumulate_grad_batches 2: .* 3 batches"):
        fit(module, max_steps=8, accumulate_grad_batches=2)


@pytest.mark.parametrize("stage", [(0, 16, 4), (3, 0, 4), (3, 16, 0), (-1, 16, 4)])
def test_stages_without_steps_or_crops_are_rejected(stage):
    with pytest.raises(DerainError, match=r"--data\.schedule"):
        CropStage(*stage)


def test_a_schedule_without_stages_is_rejected(root):
    with pytest.raises(DerainError, match=r"--data\.schedule \[\]"):
        data(root, train="Rain800", schedule=[])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"crop": 100_000}, r"--data\.crop 100000"),
        ({"batch_size": 10**9}, "10000000"),
        ({"schedule": [CropStage(1, 16, 2), CropStage(1, 100_000, 2)]}, r"--data\.schedule: crop 100000"),
    ],
)
def test_crops_that_exceed_images_or_memory_are_rejected(root, options, named):
    with pytest.raises(DerainError, match=named):
        data(root, train="Rain800", **options).setup("fit")


@pytest.mark.parametrize("cache", ["ram", "disk", "off"])
def test_a_decompression_bomb_is_rejected(root, cache):
    found = data(root, train="Rain800", cache=cache)
    (root / "Rain800/training/3.jpg").write_bytes(png_header(40_000, 40_000))
    with pytest.raises(DerainError, match=r"3\.jpg: "):
        found.setup("fit") or batches(found, "train")


def test_batches_are_scaled_to_0_to_1():
    pixels = torch.tensor([0, 1, 127, 255], dtype=torch.uint8).expand(1, 3, 1, 4)
    batch = RainDataModule().on_after_batch_transfer({"rainy": pixels, "name": ["a"]}, 0)
    assert batch["rainy"].dtype == torch.float32
    assert batch["rainy"][0, 0, 0].tolist() == pytest.approx([0, 1 / 255, 127 / 255, 1], abs=1e-7)


# Rainy images without ground truth.


@pytest.fixture
def photos(root):
    return str(make_set(root, "images", "predict", count=3, seed=7))


def test_every_sample_has_a_crop_of_an_unlabelled_image(root, photos):
    module = data(root, train="Rain800", unlabelled=photos, flips=False)
    module.setup("fit")
    images = {pair.name: pair.read()[0] for pair in module.pairs["unlabelled"]}
    assert len(images) == module.count("unlabelled") == 3
    drawn = set()
    for batch in batches(module, "train"):
        assert batch["unlabelled"].shape == batch["rainy"].shape
        assert batch["unlabelled"].dtype == torch.uint8
        for name, crop in zip(batch["unlabelled_name"], batch["unlabelled"], strict=True):
            windows = np.lib.stride_tricks.sliding_window_view(images[name], (16, 16), axis=(0, 1))
            assert (windows == crop.numpy()).all(axis=(2, 3, 4)).any()
            drawn.add(name)
    assert len(drawn) > 1
    scaled = module.on_after_batch_transfer(batch, 0)["unlabelled"]
    assert 0 <= scaled.min() < scaled.max() <= 1


def test_unlabelled_crops_depend_on_seed_epoch_and_index_alone(root, photos):
    def tensors(epoch, key="unlabelled", unlabelled=photos, workers=0, **options):
        module = data(root, train="Rain800", unlabelled=unlabelled, workers=workers, repeat=2, **options)
        module.setup("fit")
        return torch.cat([batch[key] for batch in batches(module, "train", epoch)])

    first = tensors(0)
    assert torch.equal(first, tensors(0, workers=2))
    assert torch.equal(first, tensors(0, cache="off"))
    assert torch.equal(first, tensors(0, batch_size=1))
    assert not torch.equal(first, tensors(1))
    assert not torch.equal(first, tensors(0, seed=1))
    assert torch.equal(tensors(0, "rainy"), tensors(0, "rainy", unlabelled=None))


def test_unlabelled_images_may_have_clean_ones_which_are_not_used(root):
    module = data(root, train="Rain800", unlabelled="Rain100L")
    module.setup("fit")
    assert len(module.pairs["unlabelled"]) == 4
    assert {pair.clean for pair in module.pairs["unlabelled"]} == {None}
    assert "unlabelled" in batches(module, "train")[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_unlabelled_crops_resume_within_an_epoch(root, photos, workers):
    module = data(root, train="Rain800", unlabelled=photos, batch_size=2, workers=workers)
    module.setup("fit")
    whole = batches(module, "train", epoch=1)
    module.resume_at(Position(1, 3, 0))
    for batch, expected in zip(module.train_dataloader(), whole[3:], strict=True):
        assert batch["unlabelled_name"] == expected["unlabelled_name"]
        assert torch.equal(batch["unlabelled"], expected["unlabelled"])


@pytest.mark.parametrize("given", [True, False])
def test_other_unlabelled_images_are_rejected_within_an_epoch(root, photos, given):
    first, second = (
        data(root, train="Rain800", batch_size=2, unlabelled=photos if on else None) for on in (given, not given)
    )
    for module in (first, second):
        module.setup("fit")
    second.load_state_dict(first.state_dict())
    second.resume_at(Position(2, 1, 0))
    with pytest.raises(DerainError, match=r"--data\.unlabelled"):
        second.train_dataloader()


def test_crops_that_exceed_unlabelled_images_are_rejected(root):
    make_set(root, "images", "predict", count=2, size=(8, 8))
    with pytest.raises(DerainError, match=r"--data\.crop 17: .*unlabelled is 8"):
        data(root, train="Rain800", unlabelled=str(root / "images"), crop=17).setup("fit")


class Unlabelled(Shapes):
    """Needs rainy images without ground truth."""

    needs_unlabelled = True

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(batch["unlabelled"].shape))
        return self.weight * batch["unlabelled"].mean()


def test_methods_that_need_unlabelled_images_get_them(root, photos):
    module = data(root, train="Rain800", val="none", unlabelled=photos)
    assert fit(module, Unlabelled(), max_steps=2) == [(4, 3, 16, 16)] * 2


def test_methods_that_need_unlabelled_images_require_them(root):
    with pytest.raises(DerainError, match=r"--data\.unlabelled.*Unlabelled"):
        fit(data(root, train="Rain800"), Unlabelled(), max_steps=2)


def test_methods_without_use_for_unlabelled_images_report_and_ignore_them(root, photos, caplog):
    caplog.set_level("INFO", logger="derain")
    module = data(root, train="Rain800", val="none", unlabelled=photos)
    assert fit(module, max_steps=1) == [(0, 4, 16)]
    assert "unlabelled" not in module.pairs
    assert any(photos in message and "Shapes" in message for message in caplog.messages)
