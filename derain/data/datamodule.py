"""Lightning data module for paired rain images."""

import dataclasses
import hashlib
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader

from derain.batch import PairBatch
from derain.data.cache import CacheMode, PixelCache, fingerprint, open_cache, pair_sizes
from derain.data.captions import Caption, match_captions, read_captions
from derain.data.crop_limits import check_crops
from derain.data.datasets import TrainingLoader, TrainingPairs, UnlabelledCrops, WholePairs
from derain.data.evaluation_batches import BATCH_PIXELS, EqualSizeBatches, evaluation_costs, rank_groups
from derain.data.layouts import Split
from derain.data.mixing import check_weights, mix
from derain.data.pairs import Pair, find_pairs, find_pairs_or_photos, merge_pairs
from derain.data.quickstart import resolve_quickstart
from derain.data.rain_ranges import read_rain
from derain.data.samplers import BalancedSampler, BatchStage, CropStage, TrainingBatchSampler, to_batch_stages
from derain.data.sequences import consecutive_frames
from derain.data.splitting import by_data_set, first_pairs, hold_out
from derain.data.transforms import Augmentation, Flips
from derain.errors import DerainError
from derain.evaluation import evaluation_batch_size, is_limited
from derain.images import Pixels
from derain.loops import Position, accumulation
from derain.memory import without_garbage_collection

log = logging.getLogger("derain")


class RainDataModule(LightningDataModule):
    """Data module of image pairs for training and evaluation, and of rainy images for prediction.

    A data set is a name from ``derain data list`` (looked up in ``root``), ``Quickstart`` (generated from photos of
    scikit-image), a folder (its layout is detected and logged), ``NAME:FOLDER``, or a folder or URL of shards. A list
    concatenates several data sets.

    Args:
        train: Training data set, or a list.
        train_weights: Weight of each data set of ``train``, in the same order, such as 3 and 1: three of four samples
            of an epoch are then of the first set, however many pairs it has. By default, all pairs count the same.
        val: Validation data set, or a list. None (``null``) and the string ``none`` differ: None, the default, holds
            out a random share of ``train``; ``none`` trains on all pairs of ``train`` without validation.
        test: Test data set, or a list.
        predict: Folder of rainy images, or a data set, or a list, for ``derain predict``.
        unlabelled: Rainy images without ground truth for semi-supervised methods, given like ``predict``. Every
            training batch contains one random crop of these images for each of its pairs. Other methods ignore it.
        root: Folder that contains the data sets; by default ``$DERAIN_DATA``, or ``data`` if that is not set.
        crop: Side of the training crops in pixels.
        batch_size: Crops per batch and device.
        repeat: Crops per pair and epoch; with ``train_weights``, the average over all pairs.
        schedule: Stages of training with different crop and batch sizes, instead of ``crop`` and ``batch_size``;
            every epoch has as many batches as an epoch of the first stage.
        flips: Random horizontal and vertical flips; ``horizontal``: horizontal flips only.
        transpose: Random transposition (swap of rows and columns).
        val_share: Share of the clean images of ``train`` used for validation (at least one) if ``val`` is not set;
            all rainy images of these clean images are held out. A video counts as one clean image.
        captions: Table or tables of captions of the training and validation pairs, as written by ``derain caption``;
            for `DACLIPModule`.
        eval_batch_size: Maximum number of images of equal size that ``derain test`` and ``derain predict`` restore at
            once; fewer if the images are large or memory does not suffice. ``auto``: 32 on a GPU, 1 on a CPU. With a
            limit on batches, such as ``trainer.limit_test_batches``, each batch has one image.
        val_limit: Maximum number of validation pairs, by default all. With several data sets, the first pairs of each
            are used, about equally many if the sets allow it.
        val_mean: With several validation sets, whether the mean that selects the best checkpoint gives equal weight to
            all ``images`` or to all ``sets``. Means of each set are logged as ``val/SET/psnr`` in both cases.
        workers: Number of loader processes; by default 0 if pixels are cached, else the number of cores less one, at
            most 8.
        cache: Cache of the decoded images during training, including those for validation: ``disk``, ``ram``, ``off``,
            or ``auto``: disk if the cache exists or needs at most half of the free disk space; else RAM if it needs at
            most half of the free memory and of the free ``/dev/shm``; else off. Of shards behind a URL, ``auto``
            creates no cache.
        split_seed: Seed of the random share for validation.
        seed: Seed of the sample order, the crops and the rain; the command line sets it to ``seed_everything``.
        rain: Rain added to the clean images during training: ``off``, a preset (``light``, ``medium``, ``heavy``;
            ``varied`` also adds other degradations, such as lens drops and noise), ``folder:PATH`` with images of
            streaks, or a YAML file of ranges. With ``rain``, ``train`` also accepts folders of clean photos.
        rain_share: Share of the pairs' samples whose rain is replaced by added rain; the others keep their own. It
            does not apply to clean photos.

    Raises:
        DerainError: If a number is out of its range, ``train_weights`` do not match ``train``, ``schedule`` is empty,
            or ``rain`` cannot be read.
    """

    def __init__(
        self,
        train: str | list[str] | None = None,
        train_weights: list[float] | None = None,
        val: str | list[str] | None = None,
        test: str | list[str] | None = None,
        predict: str | list[str] | None = None,
        unlabelled: str | list[str] | None = None,
        root: str | None = None,
        crop: int = 128,
        batch_size: int = 8,
        repeat: int = 1,
        schedule: list[CropStage] | None = None,
        flips: Flips = True,
        transpose: bool = False,
        val_share: float = 0.05,
        captions: str | list[str] | None = None,
        eval_batch_size: int | Literal["auto"] = "auto",
        val_limit: int | None = None,
        val_mean: Literal["images", "sets"] = "images",
        workers: int | None = None,
        cache: CacheMode = "auto",
        split_seed: int = 0,
        seed: int = 0,
        rain: str | bool = "off",
        rain_share: float = 1.0,
    ) -> None:
        super().__init__()
        counts = {"crop": crop, "batch_size": batch_size, "repeat": repeat, "val_limit": val_limit}
        _check_counts(counts | {"eval_batch_size": None if eval_batch_size == "auto" else eval_batch_size})
        if workers is not None and workers < 0:
            raise DerainError(f"--data.workers {workers}: must be at least 0")
        if not 0 < val_share < 1:
            raise DerainError(f"--data.val_share {val_share}: must be above 0 and below 1")
        if not 0 < rain_share <= 1:
            raise DerainError(f"--data.rain_share {rain_share}: must be above 0 and at most 1")
        self.rain, self.rain_share = rain, rain_share
        self.rain_ranges = None if rain in ("off", False) else read_rain(str(rain))  # YAML reads a bare off as false
        self._degradation: torch.nn.Module | None = None
        self.sets = {"train": train, "val": val, "test": test, "predict": predict, "unlabelled": unlabelled}
        self.train_weights = train_weights
        if train_weights is not None:
            check_weights(train_weights, self.train_sets)
        self.root = Path(root or os.environ.get("DERAIN_DATA") or "data")
        self.crop, self.batch_size, self.repeat = crop, batch_size, repeat
        if schedule is not None and not schedule:
            raise DerainError("--data.schedule []: must have at least one stage; omit the option for a constant crop")
        self.schedule = schedule
        self.flips, self.transpose = flips, transpose
        self.val_share, self.val_limit, self.val_mean = val_share, val_limit, val_mean
        self.eval_batch_size, self.workers = eval_batch_size, workers
        self.caption_tables = [Path(table) for table in _as_list(captions)]
        self._captions: dict[str, list[Caption]] = {}
        self.cache, self.split_seed, self.seed = cache, split_seed, seed
        self.pairs: dict[str, tuple[Pair, ...]] = {}
        self._counts: dict[str, int] = {}
        self._caches: dict[str, PixelCache | None] = {}
        self._resume_position: Position | None = None  # where the next training loader starts, if it resumes a run
        self._schedule_start: Position | None = None  # the batches of a schedule are counted from here
        self._saved_sampling_options: dict[str, Any] = {}

    @property
    def train_sets(self) -> list[str]:
        """Names of the training data sets."""
        return _as_list(self.sets["train"])

    @without_garbage_collection()
    def fingerprint(self, split: str, indices: Sequence[int] | None = None) -> str:
        """Return a hash of the pairs of ``train``, ``val``, ``test`` or ``predict``, or of those with given indices."""
        pairs = self.pairs[split]
        return fingerprint(pairs if indices is None else [pairs[index] for index in indices])

    def count(self, split: str) -> int:
        """Return the number of pairs of ``train``, ``val`` (ignoring ``val_limit``) or another key of ``pairs``."""
        return self._counts.get(split, len(self.pairs.get(split, ())))

    @property
    def degradations(self) -> list[str]:
        """Sorted words for the degradations of training and validation pairs; empty without captions."""
        return sorted({caption.degradation for captions in self._captions.values() for caption in captions})

    @without_garbage_collection()
    def setup(self, stage: str) -> None:
        """Find the pairs for ``fit``, ``validate``, ``test`` or ``predict``, and open the pixel caches for ``fit``.

        Raises:
            DerainError: If a required data set is not given; a data set is missing, empty or damaged; captions are
                missing; or crop or cache do not fit.
        """
        if stage == "fit" and "train" not in self.pairs:
            self._setup_fit()
        elif stage == "validate" and "val" not in self.pairs:
            if self.sets["val"] == "none":
                raise DerainError(
                    "--data.val none: no validation set (none and null differ); give a data set, or null to hold out "
                    "a random share of --data.train"
                )
            self._find_train_and_val()
            self._caches["val"] = None
            self._read_captions()
        elif stage == "test" and "test" not in self.pairs:
            self.pairs["test"] = self._find("test", "test")
        elif stage == "predict" and "predict" not in self.pairs:
            self.pairs["predict"] = self._find("predict", "predict")

    def _setup_fit(self) -> None:
        self._find_unlabelled()
        self._find_train_and_val()
        self._setup_rain()
        stages = self.schedule or [CropStage(1, self.crop, self.batch_size)]
        option = "--data.crop" if self.schedule is None else "--data.schedule: crop"
        check_crops(stages, option, {split: self.pairs.get(split, ()) for split in ("train", "unlabelled")})
        for split in ("train", "val", "unlabelled"):
            pairs = self.pairs.get(split)
            self._caches[split] = open_cache(pairs, self.cache, paired=split != "unlabelled") if pairs else None
        self._read_captions()
        if self.sets["val"] == "none":
            log.info("--data.val none: training on all %d pairs without validation", len(self.pairs["train"]))
            if self.trainer is not None:
                self.trainer.limit_val_batches = 0  # skips the validation loop
        elif self.val_mean == "sets" and is_limited("val", self.trainer):
            log.info("--trainer.limit_val_batches: the mean over sets ignores sets without any validated image")
        if self.schedule is not None:
            crops = " → ".join(str(stage.crop) for stage in self.schedule)
            log.info("--data.schedule: crops of %s pixels; --data.crop and --data.batch_size are ignored", crops)

    def _find_unlabelled(self) -> None:
        """Find the rainy images without ground truth, if the method trains on them.

        Raises:
            DerainError: If the method needs them and none are given.
        """
        names = _as_list(self.sets["unlabelled"])
        method: Any = getattr(self.trainer, "lightning_module", None)
        title = getattr(method, "title", type(method).__name__)
        needed = getattr(method, "needs_unlabelled", False)
        if needed and not names:
            raise DerainError(
                f"--data.unlabelled: not set; {title} also trains on rainy images without ground truth; give a folder "
                "of photos"
            )
        if method is not None and not needed and names:
            log.info("--data.unlabelled %s: ignored, since %s trains on pairs alone", " + ".join(names), title)
        elif names:
            found = self._find("unlabelled", "predict")
            self.pairs["unlabelled"] = tuple(dataclasses.replace(pair, clean=None) for pair in found)
            log.info("%d rainy images without ground truth: %s", len(found), " + ".join(names))

    def _setup_rain(self) -> None:
        """Build the module that adds rain to training images, if ``rain`` is on."""
        if self.rain_ranges is None:
            return
        from derain.data.rain_operators import RainDegradation  # only now: importing kornia takes a while

        self._degradation = RainDegradation(self.rain_ranges)
        pairs = self.pairs["train"]
        photos = sum(pair.is_photo for pair in pairs)
        kept = f"; {1 - self.rain_share:.0%} of the pairs' samples keep their own rain" if self.rain_share < 1 else ""
        log.info("--data.rain: %s, for %d pairs and %d clean photos%s", self.rain, len(pairs) - photos, photos, kept)

    def _find_train_and_val(self) -> None:
        """Find the training and validation pairs; hold out validation pairs if ``val`` is not set."""
        if self.sets["val"] == "none":
            self.pairs["train"], self.pairs["val"] = self._find("train", "train"), ()
        elif self.sets["val"] is not None:
            self.pairs["val"] = self._find("val", "test")
            if self.sets["train"] is not None:
                self.pairs["train"] = self._find("train", "train")
        else:
            found = self._find("train", "train")
            self.pairs["train"], self.pairs["val"] = hold_out(found, self.val_share, self.split_seed)
        self._counts["val"] = len(self.pairs["val"])
        self.pairs["val"] = first_pairs(self.pairs["val"], self.val_limit)

    def _read_captions(self) -> None:
        if self.caption_tables:
            tables = {table: read_captions(table) for table in self.caption_tables}
            splits = [split for split in ("train", "val") if self.pairs.get(split)]
            self._captions = {split: match_captions(self.pairs[split], tables) for split in splits}

    def _find(self, option: str, split: Split) -> tuple[Pair, ...]:
        names = _as_list(self.sets[option])
        if not names:
            raise DerainError(f"--data.{option}: not set; give a name from `derain data list`, or a folder")
        find = find_pairs_or_photos if option == "train" and self.rain_ranges is not None else find_pairs
        sets = [find(resolve_quickstart(name, split), split, data_root=self.root) for name in names]
        for pair_set in sets:
            for note in pair_set.notes:
                log.info("%s: %s", pair_set.name, note)
        return merge_pairs(sets, allow_repeated_sets=option == "train")

    def rainy_images(self, split: str) -> Iterator[Pixels]:
        """Yield the whole rainy images of ``train``, ``val``, ``test`` or ``predict``, in order of their index.

        Each is ``(h, w, 3)`` in 0 to 255.
        """
        cache = self._caches.get(split)
        for index, pair in enumerate(self.pairs[split]):
            yield cache[index][0] if cache is not None else pair.read()[0]

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return shuffled batches of random crops."""
        pairs, trainer = self.pairs["train"], self.trainer
        stages = self._stages()
        crops = {stage.crop for stage in stages}
        augmentations = {crop: Augmentation(crop, flips=self.flips, transpose=self.transpose) for crop in crops}
        unlabelled = None
        if "unlabelled" in self.pairs:
            unlabelled = UnlabelledCrops(self.pairs["unlabelled"], self._caches["unlabelled"], augmentations, self.seed)
        captions = self._captions.get("train", ())
        rain_share = None if self.rain_ranges is None else self.rain_share
        samples = len(pairs) * self.repeat
        mixture = None if self.train_weights is None else mix(pairs, self.train_weights, samples, self.seed)
        dataset = TrainingPairs(
            pairs, self._caches["train"], augmentations, self.seed, captions, unlabelled, rain_share, mixture
        )
        sampler = TrainingBatchSampler(samples, *self._rank_and_world(), self.seed, stages)
        if self._schedule_start is not None:
            sampler.count_from(self._schedule_start.epoch, self._schedule_start.trained - self._schedule_start.batch)
        if trainer is not None:
            sampler.limit = _limited(len(sampler), trainer.limit_train_batches)
            sampler.set_epoch(trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        if self._resume_position is not None:  # Lightning may create the loader before it restores its counters
            sampler.resume_at(self._resume_position.epoch, self._resume_position.batch)
            self._check_sampling_options()
            self._resume_position = None
        return TrainingLoader(dataset, batch_sampler=sampler, **self._loader_options("train"))

    def data_sets(self, split: str) -> dict[str, list[int]]:
        """Return the indices of the pairs of a split by data set; empty unless there are several data sets."""
        sets = by_data_set(self.pairs.get(split, ()))
        return sets if len(sets) > 1 else {}

    def consecutive_frames(self, split: str) -> frozenset[int]:
        """Return the indices of the frames whose predecessor in the video is at the previous index (no gap).

        Raises:
            DerainError: If the split has no videos.
        """
        if not any(pair.sequence for pair in self.pairs[split]):
            raise DerainError(
                f"--protocol temporal: no videos in --data.{split}; give a set of videos, or video:FOLDER"
            )
        return consecutive_frames(self.pairs[split])

    def resume_at(self, position: Position) -> None:
        """Start the next training data loader at a position within an epoch."""
        self._resume_position = self._schedule_start = position

    def state_dict(self) -> dict[str, Any]:
        """Return the sampling options, to compare them when the run resumes; empty if there are no training pairs."""
        epoch = 0 if self.trainer is None else self.trainer.current_epoch
        return self._sampling_options(epoch) if "train" in self.pairs else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the options of the checkpoint, to compare them with those of this run."""
        self._saved_sampling_options = state_dict

    def _check_sampling_options(self) -> None:
        """Check that a run that resumes within an epoch has the sampling options of the checkpoint.

        Raises:
            DerainError: If an option differs.
        """
        if self._resume_position is None or not self._resume_position.batch:
            return
        for option, value in self._sampling_options(self._resume_position.epoch).items():
            saved = self._saved_sampling_options.get(option, value)
            if saved != value:
                name = "seed_everything" if option == "data.seed" else option
                raise DerainError(
                    f"--{name} {_or_null(value)}: cannot resume within an epoch, since the checkpoint was saved with "
                    f"{_or_null(saved)}; use that value, or a checkpoint from the end of an epoch"
                )

    def _stages(self) -> list[BatchStage]:
        """Return the stages of training, whose starts are counted in batches."""
        if self.schedule is None:
            return [BatchStage(0, self.crop, self.batch_size)]
        trainer = self.trainer
        if trainer is None:
            return to_batch_stages(self.schedule, 1, 1)
        return to_batch_stages(self.schedule, trainer.accumulate_grad_batches, self._epoch_batches())

    def _epoch_batches(self) -> int:
        """Return the number of batches per epoch and rank, within ``trainer.limit_train_batches``."""
        size = self.batch_size if self.schedule is None else self.schedule[0].batch_size
        _, world = self._rank_and_world()
        samples = math.ceil(len(self.pairs["train"]) * self.repeat / world)
        batches = math.ceil(samples / size)
        return batches if self.trainer is None else _limited(batches, self.trainer.limit_train_batches)

    def _sampling_options(self, epoch: int) -> dict[str, Any]:
        """Return the options that must not change within an epoch.

        They determine the pairs and the added rain of each batch, and when the optimiser steps.
        """
        return {
            "data.train": self._summary("train", "pairs"),
            "data.unlabelled": self._summary("unlabelled", "images") if "unlabelled" in self.pairs else "",
            "data.train_weights": "" if self.train_weights is None else str(self.train_weights),
            "data.repeat": self.repeat,
            "data.rain": "off" if self.rain_ranges is None else f"{self.rain} ({_digest(str(self.rain_ranges))})",
            "data.rain_share": self.rain_share,
            "data.seed": self.seed,
            # Before the batch size: options are compared in this order, and a message should name the schedule.
            "data.schedule": ", ".join(map(str, self.schedule or ())),
            "data.batch_size": self.batch_size if self.schedule is None else "of the schedule",
            "trainer.devices": self._rank_and_world()[1],
            "trainer.limit_train_batches": self._epoch_batches(),
            "trainer.accumulate_grad_batches": 1 if self.trainer is None else accumulation(self.trainer, epoch),
        }

    def _summary(self, split: str, kind: str) -> str:
        """Return the names of the data sets, the number of pairs or images, and a hash of the names of these."""
        names = [pair.name for pair in self.pairs[split]]
        return f"{' + '.join(_as_list(self.sets[split]))} ({len(names)} {kind}, {_digest(chr(0).join(names))})"

    def val_dataloader(self) -> DataLoader[dict[str, Any]] | list[Any]:
        """Return whole validation pairs in batches of one; an empty list without validation."""
        return self._evaluation_loader("val") if self.pairs["val"] else []

    def test_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return whole test pairs, in batches of images of equal size or one by one."""
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Return whole rainy images, in batches of images of equal size or one by one."""
        return self._evaluation_loader("predict")

    def _evaluation_loader(self, split: str) -> DataLoader[dict[str, Any]]:
        pairs = self.pairs[split]
        costs, groups = evaluation_costs(pairs, split, self.trainer), rank_groups(pairs, split)
        sampler = BalancedSampler(costs, *self._rank_and_world(), groups)
        dataset = WholePairs(pairs, self._caches.get(split), self._captions.get(split, ()))
        batch_size = evaluation_batch_size(self.eval_batch_size, split, self.trainer)
        if batch_size == 1:
            return DataLoader(dataset, batch_size=1, sampler=sampler, **self._loader_options(split))
        sizes = [(height, width) for height, width in pair_sizes(pairs).tolist()]
        batches = EqualSizeBatches(sampler.indices, sizes, batch_size, BATCH_PIXELS)
        return DataLoader(dataset, batch_sampler=batches, **self._loader_options(split))

    def _loader_options(self, split: str) -> dict[str, Any]:
        """Return the options of a data loader."""
        workers = self.workers
        if workers is None:
            splits = [split, "unlabelled"] if split == "train" and "unlabelled" in self.pairs else [split]
            cached = all(self._caches.get(name) is not None for name in splits)
            workers = 0 if cached else min(8, (os.cpu_count() or 1) - 1)
        return {
            "num_workers": workers,
            "persistent_workers": workers > 0,
            "pin_memory": torch.cuda.is_available(),
        }

    def _rank_and_world(self) -> tuple[int, int]:
        if self.trainer is None:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Convert ``rain_seed`` to a number, ``rain_added`` to indices; after the transfer, this waits for the GPU."""
        if "rain_seed" in batch:
            batch["rain_seed"] = int(batch["rain_seed"][0])
            batch["rain_added"] = batch["rain_added"].nonzero().flatten().tolist()
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> PairBatch:
        """Scale the uint8 images to float32 in [0, 1] on the device, and add rain."""
        for key in ("rainy", "clean", "unlabelled"):
            if key in batch:
                batch[key] = batch[key].float().div_(255)  # as uint8, workers send a quarter of the bytes of float32
        if "rain_seed" in batch:
            assert self._degradation is not None
            seed, added = batch.pop("rain_seed"), batch.pop("rain_added")
            if added:
                degradation = self._degradation.to(batch["clean"].device)
                batch["rainy"][added], batch["clean"][added] = degradation(batch["clean"][added], seed)
        return batch  # type: ignore[no-any-return]


def _check_counts(counts: dict[str, int | None]) -> None:
    for option, value in counts.items():
        if value is not None and value < 1:
            raise DerainError(f"--data.{option} {value}: must be at least 1")


def _digest(text: str) -> str:
    """Return eight hexadecimal digits that identify a text."""
    return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]


def _limited(count: int, limit: int | float) -> int:
    """Apply Lightning's ``limit_*_batches`` (a count or a fraction) to a number of batches."""
    return min(count, limit) if isinstance(limit, int) else int(count * limit)


def _or_null(value: object) -> object:
    """Return the value of an option for a message: ``null`` for the empty text of an option that is not set."""
    return "null" if value == "" else value


def _as_list(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else list(value)
