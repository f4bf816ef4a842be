"""Samplers: the order of training samples, and each rank's share of evaluation images."""

import bisect
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from derain.errors import DerainError


class Sample(NamedTuple):
    """All that a training sample depends on besides the run's seed.

    Attributes:
        epoch: Epoch that draws it.
        number: Number of the sample in the epoch's data; pair ``number % pairs`` is read.
        crop: Side of the crop in pixels.
    """

    epoch: int
    number: int
    crop: int


class Stage(NamedTuple):
    """Crop and batch size from a batch of the training on.

    Attributes:
        first: Number of batches that were trained on before.
        crop: Side of the crops in pixels.
        batch_size: Crops a batch and rank.
    """

    first: int
    crop: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class CropStage:
    """Part of a training with crops and batches of its own, as options give it.

    Attributes:
        steps: Optimiser steps; the last stage lasts to the end.
        crop: Side of the crops in pixels.
        batch_size: Crops a batch and device.

    Raises:
        DerainError: If one is below 1.
    """

    steps: int
    crop: int
    batch_size: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise DerainError(f"--data.schedule: {name} {value}: must be at least 1")

    def __str__(self) -> str:
        """Return the stage in words.

        Example:
            >>> str(CropStage(steps=92_000, crop=128, batch_size=8))
            '92000 steps of 8 crops of 128'
        """
        return f"{self.steps} steps of {self.batch_size} crops of {self.crop}"


def to_batch_stages(schedule: Sequence[CropStage], accumulate: int, batches: int) -> list[Stage]:
    """Return the stages by the batch that each starts at.

    Args:
        schedule: By optimiser steps.
        accumulate: Batches of a step.
        batches: Of an epoch.

    Raises:
        DerainError: If an epoch ends with a step of fewer batches, so that steps cannot be converted.

    Example:
        >>> to_batch_stages([CropStage(10, 128, 8), CropStage(5, 160, 5)], accumulate=2, batches=4)
        [Stage(first=0, crop=128, batch_size=8), Stage(first=20, crop=160, batch_size=5)]
    """
    if len(schedule) > 1 and batches % accumulate:
        raise DerainError(
            f"--trainer.accumulate_grad_batches {accumulate}: does not divide the {batches} batches of an epoch, so "
            "that --data.schedule has no exact steps; choose a divisor, or limit the batches by "
            "--trainer.limit_train_batches"
        )
    starts = itertools.accumulate((stage.steps * accumulate for stage in schedule[:-1]), initial=0)
    return [Stage(first, stage.crop, stage.batch_size) for first, stage in zip(starts, schedule, strict=True)]


class TrainingBatchSampler(Sampler[list[Sample]]):
    """Batches of shuffled samples of one rank, a function of (seed, epoch, batch) alone.

    Nothing is drawn from a generator that other code shares, and the position in the epoch is a number: after
    `resume_at`, the remaining batches are those of an uninterrupted run, with any number of workers.

    With one stage, an epoch visits every sample once; its last batch is smaller, and ranks get equally many samples
    (the next permutation fills up). With several, every epoch has as many batches as one of the first stage, whatever
    their size: it starts a new permutation, and draws the next one where it needs more samples.

    Args:
        count: Samples in an epoch over all ranks.
        rank: Rank of this process.
        world: Number of ranks.
        seed: Seed of the run.
        stages: Crop and batch sizes in order; the first one starts at batch 0.
        limit: Batches that the trainer takes of an epoch, if fewer than there are.

    Example:
        >>> batches = TrainingBatchSampler(4, rank=0, world=1, seed=0, stages=[Stage(0, 64, 2)])
        >>> whole = list(batches)
        >>> batches.resume_at(epoch=0, batch=1)
        >>> list(batches) == whole[1:]
        True
    """

    def __init__(
        self, count: int, rank: int, world: int, seed: int, stages: Sequence[Stage], limit: int | None = None
    ) -> None:
        self.count, self.rank, self.world, self.seed = count, rank, world, seed
        self.stages, self.limit = list(stages), limit
        self.epoch = self.first = 0
        self._counted = (0, 0)  # an epoch, and the batches that were trained on before it

    @property
    def sampler(self) -> "TrainingBatchSampler":
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch; the epoch that `resume_at` named keeps its position."""
        if epoch != self.epoch:
            self.resume_at(epoch, 0)

    def count_from(self, epoch: int, trained: int) -> None:
        """Begin an epoch's stage after so many batches, where earlier epochs may have had more or fewer than now."""
        self._counted = (epoch, trained)

    def resume_at(self, epoch: int, batch: int) -> None:
        """Skip the first batches of an epoch."""
        self.epoch, self.first = epoch, batch

    def stage(self, epoch: int, batch: int) -> Stage:
        """Return the crop and batch size of a batch of an epoch."""
        counted, before = self._counted
        done = before + (epoch - counted) * self.batches + batch
        return self.stages[bisect.bisect_right([stage.first for stage in self.stages], done) - 1]

    @property
    def batches(self) -> int:
        """Batches that are trained on in an epoch."""
        return len(self) if self.limit is None else min(self.limit, len(self))

    @property
    def _share(self) -> int:
        return -(-self.count // self.world)

    def __len__(self) -> int:
        """Return the number of batches of a whole epoch."""
        return -(-self._share // self.stages[0].batch_size)

    def __iter__(self) -> Iterator[list[Sample]]:
        # Computed at once: a lazy generator would read the epoch and the position after they were changed.
        return iter(self._batches(self.epoch)[self.first :])

    def _batches(self, epoch: int) -> list[list[Sample]]:
        stages = [self.stage(epoch, batch) for batch in range(len(self))]
        order = self._permutations(epoch, sum(stage.batch_size for stage in stages) * self.world)
        own, start, batches = order[self.rank :: self.world], 0, []
        if len(self.stages) == 1:
            own = own[: self._share]
        for stage in stages:
            numbers = own[start : start + stage.batch_size]
            batches.append([Sample(epoch, number, stage.crop) for number in numbers])
            start += stage.batch_size
        return batches

    def _permutations(self, epoch: int, least: int) -> list[int]:
        """At least so many numbers; those of the n-th permutation are raised by ``n * count``."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = []
        while len(order) < least:
            order += (torch.randperm(self.count, generator=generator) + len(order)).tolist()
        return order


class StridedSampler(Sampler[int]):
    """Every image once over all ranks: rank r evaluates images r, r + world, …; counts may differ by one.

    With fewer images than ranks, the surplus ranks evaluate one again (scores count an image once): a rank without any
    would skip the loop, and the others would wait for it for ever.
    """

    def __init__(self, count: int, rank: int, world: int) -> None:
        self.indices = range(rank, count, world) if rank < count else range(rank % count, rank % count + 1)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)
