"""Samplers: the order of training samples, and each rank's share of evaluation images."""

import bisect
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler


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


class TrainingBatches(Sampler[list[Sample]]):
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
        >>> batches = TrainingBatches(4, rank=0, world=1, seed=0, stages=[Stage(0, 64, 2)])
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

    @property
    def sampler(self) -> "TrainingBatches":
        """Where Lightning looks for ``set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch; the epoch that `resume_at` named keeps its position."""
        if epoch != self.epoch:
            self.resume_at(epoch, 0)

    def resume_at(self, epoch: int, batch: int) -> None:
        """Skip the first batches of an epoch."""
        self.epoch, self.first = epoch, batch

    def stage(self, epoch: int, batch: int) -> Stage:
        """Return the crop and batch size of a batch of an epoch."""
        done = epoch * (len(self) if self.limit is None else min(self.limit, len(self))) + batch
        return self.stages[bisect.bisect_right([stage.first for stage in self.stages], done) - 1]

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


class Strided(Sampler[int]):
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
