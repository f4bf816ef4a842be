"""The one data module: named sets or folders in, batches out."""

import hashlib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset

from derain.batch import PairBatch
from derain.data.cache import CacheMode, PixelCache, fingerprint, open_cache, read_pair
from derain.data.captions import Caption, match_captions, read_captions
from derain.data.pairs import Pair, find_pairs, merge_pairs
from derain.data.quickstart import quickstart_set
from derain.data.samplers import CropStage, Sample, Stage, StridedSampler, TrainingBatchSampler, to_batch_stages
from derain.data.transforms import Augmentation, Flips
from derain.errors import DerainError
from derain.folders import cache_folder
from derain.images import Pixels, image_size
from derain.loops import Position, accumulation
from derain.memory import free_memory

BYTES_PER_CROP_PIXEL = 2 * 3 * 4
"""Rainy and clean, three channels, float32."""

log = logging.getLogger("derain")


def to_tensor(pixels: Pixels) -> torch.Tensor:
    """``(h, w, 3)`` pixels to a ``(3, h, w)`` uint8 tensor."""
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))


class TrainingPairs(Dataset[dict[str, Any]]):
    """Random crops of pairs.

    Args:
        pairs: The pairs.
        cache: Their decoded pixels; without it every sample decodes two files.
        augmentations: Augmentation for each side of a crop.
        seed: Seed of the run.
        captions: Of the pairs, in order.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        cache: PixelCache | None,
        augmentations: Mapping[int, Augmentation],
        seed: int,
        captions: Sequence[Caption] = (),
    ) -> None:
        self.pairs, self.cache, self.augmentations, self.seed = pairs, cache, augmentations, seed
        self.captions = captions

    def __getitem__(self, sample: Sample) -> dict[str, Any]:
        index = sample.number % len(self.pairs)
        rainy, clean = self.cache[index] if self.cache is not None else read_pair(self.pairs[index])
        seed = (self.seed, sample.epoch, sample.number)
        rainy, clean = self.augmentations[sample.crop](rainy, clean, seed)
        return {
            "rainy": to_tensor(rainy),
            "clean": to_tensor(clean),
            "name": self.pairs[index].name,
            "index": index,
        } | _told(self.captions, index)


class TrainingLoader(DataLoader[dict[str, Any]]):
    """Data loader that Lightning knows to be resumable; the position is the data module's."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignore the state."""


class WholePairs(Dataset[dict[str, Any]]):
    """Whole images, with the clean one where there is one."""

    def __init__(
        self, pairs: Sequence[Pair], cache: PixelCache | None = None, captions: Sequence[Caption] = ()
    ) -> None:
        self.pairs, self.cache, self.captions = pairs, cache, captions

    def __getitem__(self, index: int) -> dict[str, Any]:
        pair = self.pairs[index]
        rainy, clean = self.cache[index] if self.cache is not None else pair.read()
        item = {"rainy": to_tensor(rainy), "name": pair.name, "index": index} | _told(self.captions, index)
        return item if clean is None else {**item, "clean": to_tensor(clean)}


class RainDataModule(LightningDataModule):
    """Paired rain images for training and evaluation, rainy images alone for prediction.

    A set is named as in ``derain data list`` and looked up below ``root``, or given as a folder
    (``path``, its layout is detected and told, or ``layout:path``). Several sets are mixed by a list.
    ``Quickstart`` is made on the spot from photos that scikit-image ships.

    Args:
        train: Set or sets to train on.
        val: Set or sets to validate on; by default a seeded slice of ``train``; ``none``: train on all pairs of
            ``train`` and do not validate.
        test: Set or sets to test on.
        predict: Folder of rainy images, or a set, for ``derain predict``.
        root: Where named sets stand; ``$DERAIN_DATA`` by default.
        crop: Side of the training crops in pixels.
        batch_size: Crops a batch and device.
        repeat: Crops an image in one epoch.
        schedule: Crops and batches that change in the course of training, instead of ``crop`` and ``batch_size``; an
            epoch has as many batches as one of the first stage.
        flips: Random flips, horizontal and vertical; ``horizontal``: these alone.
        transpose: Random transposition too.
        val_share: Share of ``train`` that validates when ``val`` names no set, in clean images (at least one):
            all rains on a held-out image are held out.
        captions: Table or tables of captions of the training and validation pairs, as ``derain caption`` writes
            them; for `DACLIPModule`.
        val_limit: Validate on the first so many pairs only; all by default.
        workers: Loading processes; by default none where pixels are cached (a crop takes a seventh of a
            millisecond, less than sending it between processes), else one less than the cores, at most 8.
        cache: Where decoded training pixels are kept: ``auto``, ``ram``, ``disk`` or ``off``.
        split_seed: Seed of that slice.
        seed: Seed of order and crops; the command line links it to ``seed_everything``.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        root: str | None = None,
        crop: int = 128,
        batch_size: int = 8,
        repeat: int = 1,
        schedule: list[CropStage] | None = None,
        flips: Flips = True,
        transpose: bool = False,
        val_share: float = 0.05,
        captions: str | list[str] | None = None,
        val_limit: int | None = None,
        workers: int | None = None,
        cache: CacheMode = "auto",
        split_seed: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        counts = {"crop": crop, "batch_size": batch_size, "repeat": repeat, "val_limit": val_limit}
        for option, value in counts.items():
            if value is not None and value < 1:
                raise DerainError(f"--data.{option} {value}: must be at least 1")
        if workers is not None and workers < 0:
            raise DerainError(f"--data.workers {workers}: must be at least 0")
        if not 0 < val_share < 1:
            raise DerainError(f"--data.val_share {val_share}: must be between 0 and 1")
        self.sets = {"train": train, "val": val, "test": test, "predict": predict}
        self.root = Path(root or os.environ.get("DERAIN_DATA") or "data")
        self.crop, self.batch_size, self.repeat = crop, batch_size, repeat
        if schedule is not None and not schedule:
            raise DerainError("--data.schedule []: must have at least one stage; leave it out for a constant crop")
        self.schedule = schedule
        self.flips, self.transpose = flips, transpose
        self.val_share, self.val_limit = val_share, val_limit
        self.workers = workers
        self.captions = [Path(table) for table in _as_list(captions)]
        self._captions: dict[str, list[Caption]] = {}
        self.cache, self.split_seed, self.seed = cache, split_seed, seed
        self.pairs: dict[str, tuple[Pair, ...]] = {}
        self._counts: dict[str, int] = {}
        self._pixels: dict[str, PixelCache | None] = {}
        self._position: Position | None = None  # that training resumes at
        self._counted: Position | None = None  # from which the batches of a schedule are counted
        self._saved_order: dict[str, Any] = {}

    @property
    def train_sets(self) -> list[str]:
        """Names of the training sets."""
        return _as_list(self.sets["train"])

    def fingerprint(self, stage: str, indices: Sequence[int] | None = None) -> str:
        """Hash of the images of ``train``, ``val``, ``test`` or ``predict``, or of some of them."""
        pairs = self.pairs[stage]
        return fingerprint(pairs if indices is None else [pairs[index] for index in indices])

    def count(self, stage: str) -> int:
        """Return how many images a stage's sets have, before ``val_limit``."""
        return self._counts.get(stage, len(self.pairs.get(stage, ())))

    @property
    def degradations(self) -> list[str]:
        """Words for degradations in the table of captions; none without one."""
        return sorted({caption.degradation for captions in self._captions.values() for caption in captions})

    def setup(self, stage: str) -> None:
        """Finds the pairs that this stage needs, and opens the cache for training.

        Raises:
            DerainError: If no set is named, or one is absent, empty or damaged.
        """
        if stage == "fit" and "train" not in self.pairs:
            self._split_train()
            self._check_crop()
            for part in ("train", "val"):
                self._pixels[part] = open_cache(self.pairs[part], self.cache) if self.pairs[part] else None
            self._caption()
            if self.sets["val"] == "none":
                log.info("--data.val none: all %d pairs train, and nothing validates", len(self.pairs["train"]))
                if self.trainer is not None:
                    self.trainer.limit_val_batches = 0  # no validation loop at all
            if self.schedule is not None:
                sides = " → ".join(str(stage.crop) for stage in self.schedule)
                log.info("--data.schedule: crops of %s pixels; --data.crop and --data.batch_size are ignored", sides)
        elif stage == "validate" and "val" not in self.pairs:
            if self.sets["val"] == "none":
                raise DerainError(
                    "--data.val none: nothing to validate; name a set, or null for a slice of --data.train"
                )
            self._split_train()
            self._pixels["val"] = None
            self._caption()
        elif stage in {"test", "predict"} and stage not in self.pairs:
            self.pairs[stage] = self._find(stage, "test" if stage == "test" else "predict")

    def _check_crop(self) -> None:
        """Refuse crops that are mostly padding, or that memory cannot hold a batch of."""
        stages = self.schedule or [CropStage(1, self.crop, self.batch_size)]
        largest = max(stage.crop for stage in stages)
        if not any(largest <= 2 * max(image_size(pair.rainy)) for pair in self.pairs["train"]):
            longest = max(max(image_size(pair.rainy)) for pair in self.pairs["train"])
            raise DerainError(
                f"--data.crop {largest}: the longest side of a training image is {longest} pixels; "
                f"give at most {2 * longest} (smaller images are padded by reflection)"
            )
        heaviest = max(stages, key=lambda stage: stage.batch_size * stage.crop**2)
        need = heaviest.batch_size * heaviest.crop**2 * BYTES_PER_CROP_PIXEL
        if need > free_memory():
            raise DerainError(
                f"--data.crop {heaviest.crop}: a batch of {heaviest.batch_size} takes {need / 1e9:.1f} GB without the "
                f"network, and {free_memory() / 1e9:.1f} GB of memory are free; reduce --data.crop or --data.batch_size"
            )

    def _split_train(self) -> None:
        if self.sets["val"] == "none":
            self.pairs["train"], self.pairs["val"] = self._find("train", "train"), ()
        elif self.sets["val"] is not None:
            self.pairs["val"] = self._find("val", "test")
            if self.sets["train"] is not None:
                self.pairs["train"] = self._find("train", "train")
        else:
            pairs = self._find("train", "train")
            clean = list(dict.fromkeys(pair.clean for pair in pairs))
            if len(clean) < 2:
                raise DerainError("--data.train: one clean image cannot both train and validate; name --data.val")
            order = np.random.default_rng(self.split_seed).permutation(len(clean))
            count = min(len(clean) - 1, max(1, round(self.val_share * len(clean))))
            held_out = {clean[place] for place in order[:count]}
            self.pairs["val"] = tuple(pair for pair in pairs if pair.clean in held_out)
            self.pairs["train"] = tuple(pair for pair in pairs if pair.clean not in held_out)
        self._counts["val"] = len(self.pairs["val"])
        self.pairs["val"] = self.pairs["val"][: self.val_limit]

    def _caption(self) -> None:
        if self.captions:
            tables = {table: read_captions(table) for table in self.captions}
            parts = [part for part in ("train", "val") if self.pairs.get(part)]
            self._captions = {part: match_captions(self.pairs[part], tables) for part in parts}

    def _find(self, option: str, split: Any) -> tuple[Pair, ...]:
        names = _as_list(self.sets[option])
        if not names:
            raise DerainError(f"--data.{option}: no set is named; give a name of `derain data list` or a folder")
        found = [find_pairs(self._place(name, split), split, data_root=self.root) for name in names]
        for one in found:
            for note in one.notes:
                log.info("%s: %s", one.name, note)
        return merge_pairs(found, repeats=option == "train")

    def _place(self, name: str, split: str) -> str:
        if name.lower() != "quickstart":
            return name
        return f"folder:{quickstart_set(cache_folder()) / ('train' if split == 'train' else 'test')}"

    def rainy_images(self, stage: str) -> Iterator[Pixels]:
        """Whole rainy images of ``train``, ``val``, ``test`` or ``predict``, in the order of a batch's ``index``."""
        cache = self._pixels.get(stage)
        for index, pair in enumerate(self.pairs[stage]):
            yield cache[index][0] if cache is not None else pair.read()[0]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Shuffled random crops."""
        pairs, trainer = self.pairs["train"], self.trainer
        stages = self._stages()
        crops = {stage.crop for stage in stages}
        augmentations = {crop: Augmentation(crop, flips=self.flips, transpose=self.transpose) for crop in crops}
        dataset = TrainingPairs(pairs, self._pixels["train"], augmentations, self.seed, self._captions.get("train", ()))
        batches = TrainingBatchSampler(len(pairs) * self.repeat, *self._rank_and_world(), self.seed, stages)
        if self._counted is not None:
            batches.count_from(self._counted.epoch, self._counted.trained - self._counted.batch)
        if trainer is not None:
            batches.limit = _batches_of(len(batches), trainer.limit_train_batches)
            batches.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        if self._position is not None:  # Lightning may ask for the loader before it restores its own counters
            batches.resume_at(self._position.epoch, self._position.batch)
            self._require_order()
            self._position = None
        return TrainingLoader(dataset, batch_sampler=batches, **self._loading("train"))

    def resume_at(self, position: Position) -> None:
        """Let the next training data loader start at a batch of an epoch."""
        self._position = self._counted = position

    def state_dict(self) -> dict[str, Any]:
        """Return all that decides which samples a batch of an epoch has."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return self._order(epoch) if "train" in self.pairs else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the order of the checkpoint, to compare it with that of this run."""
        self._saved_order = state_dict

    def _require_order(self) -> None:
        """Refuse another order within an epoch."""
        if self._position is None or not self._position.batch:
            return
        for option, value in self._order(self._position.epoch).items():
            saved = self._saved_order.get(option, value)
            if saved != value:
                name = "seed_everything" if option == "data.seed" else option
                raise DerainError(
                    f"--{name} {value}: the checkpoint was saved within an epoch that has {saved}; resume with that, "
                    "or from the end of an epoch"
                )

    def _stages(self) -> list[Stage]:
        """Return crop and batch sizes over the training."""
        if self.schedule is None:
            return [Stage(0, self.crop, self.batch_size)]
        trainer = self.trainer
        if trainer is None:
            return to_batch_stages(self.schedule, 1, 1)
        return to_batch_stages(self.schedule, trainer.accumulate_grad_batches, self._epoch_batches())

    def _epoch_batches(self) -> int:
        """Return the batches of an epoch that the trainer takes."""
        size = self.batch_size if self.schedule is None else self.schedule[0].batch_size
        samples = -(-len(self.pairs["train"]) * self.repeat // self._rank_and_world()[1])
        batches = -(-samples // size)
        return batches if self.trainer is None else _batches_of(batches, self.trainer.limit_train_batches)

    def _order(self, epoch: int) -> dict[str, Any]:
        """Return all that decides which samples a batch of an epoch has, and at which one the optimiser steps."""
        names = [pair.name for pair in self.pairs["train"]]
        digest = hashlib.sha256("\0".join(names).encode(errors="surrogateescape")).hexdigest()[:8]
        return {
            "data.train": f"{' + '.join(self.train_sets)} ({len(names)} pairs, {digest})",
            "data.repeat": self.repeat,
            "data.seed": self.seed,
            "data.batch_size": self.batch_size if self.schedule is None else "of the schedule",
            "data.schedule": ", ".join(map(str, self.schedule or ())),
            "trainer.devices": self._rank_and_world()[1],
            "trainer.limit_train_batches": self._epoch_batches(),
            "trainer.accumulate_grad_batches": 1 if self.trainer is None else accumulation(self.trainer, epoch),
        }

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """Return whole validation images, one at a time; no loader without any."""
        return self._whole("val") if self.pairs["val"] else []

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Whole test images, one at a time."""
        return self._whole("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Whole rainy images, one at a time."""
        return self._whole("predict")

    def _whole(self, stage: str) -> DataLoader[dict[str, Any]]:
        pairs = self.pairs[stage]
        sampler = StridedSampler(len(pairs), *self._rank_and_world())
        dataset = WholePairs(pairs, self._pixels.get(stage), self._captions.get(stage, ()))
        return DataLoader(dataset, batch_size=1, sampler=sampler, **self._loading(stage))

    def _loading(self, stage: str) -> dict[str, Any]:
        """Options of a data loader."""
        workers = self.workers
        if workers is None:
            workers = 0 if self._pixels.get(stage) is not None else min(8, max(0, (os.cpu_count() or 1) - 1))
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _rank_and_world(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer is not None else (0, 1)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> PairBatch:
        """Turns bytes into [0, 1] where the network runs, so that workers send a quarter of the data."""
        for key in ("rainy", "clean"):
            if key in batch:
                batch[key] = batch[key].float().div_(255)
        return batch  # type: ignore[no-any-return]


def _batches_of(count: int, limit: int | float) -> int:
    """Batches that a trainer takes of so many: a number of them or a share."""
    return min(count, limit) if isinstance(limit, int) else int(count * limit)


def _told(captions: Sequence[Caption], index: int) -> dict[str, str]:
    """What a batch says of an image that has a caption."""
    return {"caption": captions[index].text, "degradation": captions[index].degradation} if captions else {}


def _as_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else [value] if isinstance(value, str) else list(value)
