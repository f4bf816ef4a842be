"""Samplers: order of the training samples, and distribution of the evaluated images over ranks."""

import bisect
import dataclasses
import heapq
import itertools
import math
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch.utils.data import Sampler

from derain.errors import DerainError


class Sample(NamedTuple):
    """Index of a training sample; with the seed of the run, it determines pair, crop and flips.

    Attributes:
        epoch: Index of the epoch.
        number: Index of the sample; in the n-th further permutation of an epoch, n times the number of samples is
            added.
        crop: Side of the crop in pixels.
    """

    epoch: int
    number: int
    crop: int


class BatchStage(NamedTuple):
    """Stage of a training schedule, counted in batches.

    Attributes:
        start: Index of the first batch of the stage, counted from the start of training.
        crop: Side of the crops in pixels.
        batch_size: Crops per batch and rank.
    """

    start: int
    crop: int
    batch_size: int


@dataclasses.dataclass(frozen=True)
class CropStage:
    """Stage of a training schedule, counted in optimiser steps.

    Attributes:
        steps: Number of optimiser steps; the last stage lasts until the end of training.
        crop: Side of the crops in pixels.
        batch_size: Crops per batch and device.

    Raises:
        DerainError: If a value is below 1.
    """

    steps: int
    crop: int
    batch_size: int

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise DerainError(f"--data.schedule: {name} {value}: must be at least 1")

    def __str__(self) -> str:
        """Return a description of the stage.

        Example:
            >>> str(CropStage(steps=92_000, crop=128, batch_size=8))
            '92000 steps of 8 crops of 128'
        """
        return f"{self.steps} steps of {self.batch_size} crops of {self.crop}"


def to_batch_stages(schedule: Sequence[CropStage], accumulate: int, batches: int) -> list[BatchStage]:
    """Convert a schedule from optimiser steps to batches.

    Args:
        schedule: Stages in optimiser steps.
        accumulate: Batches per optimiser step.
        batches: Batches per epoch.

    Raises:
        DerainError: If there are several stages and ``batches`` is not a multiple of ``accumulate``, since the number
            of batches per step would vary.

    Example:
        >>> to_batch_stages([CropStage(10, 128, 8), CropStage(5, 160, 5)], accumulate=2, batches=4)
        [BatchStage(start=0, crop=128, batch_size=8), BatchStage(start=20, crop=160, batch_size=5)]
    """
    if len(schedule) > 1 and batches % accumulate:
        raise DerainError(
            f"--trainer.accumulate_grad_batches {accumulate}: does not divide the {batches} batches of an epoch, as "
            "--data.schedule requires; use a divisor, or set --trainer.limit_train_batches to a multiple"
        )
    starts = itertools.accumulate((stage.steps * accumulate for stage in schedule[:-1]), initial=0)
    return [BatchStage(start, stage.crop, stage.batch_size) for start, stage in zip(starts, schedule, strict=True)]


class TrainingBatchSampler(Sampler[list[Sample]]):
    """Batches of shuffled samples for one rank, determined by the arguments and the position in training.

    The sampler shares no random number generator with other code. So the batches after `resume_at` equal those of an
    uninterrupted run, for any number of workers.

    Every epoch starts with a new permutation of the samples. With one stage, an epoch contains every sample once over
    all ranks, and the last batch may be smaller. If the ranks cannot share the samples equally, samples of a second
    permutation fill the gap. With several stages, every epoch has as many batches as an epoch of the first stage, and
    draws as many permutations as these batches need.

    Args:
        count: Number of samples in a permutation, over all ranks.
        rank: Rank of this process.
        world: Number of ranks.
        seed: Seed of the run.
        stages: Crop and batch sizes in order; the first stage starts at batch 0.
        limit: Number of batches after which an epoch ends (``limit_train_batches``); None for all. The starts of
            stages count only these batches.

    Example:
        >>> sampler = TrainingBatchSampler(4, rank=0, world=1, seed=0, stages=[BatchStage(0, 64, 2)])
        >>> batches = list(sampler)
        >>> sampler.resume_at(epoch=0, batch=1)
        >>> list(sampler) == batches[1:]
        True
    """

    def __init__(
        self, count: int, rank: int, world: int, seed: int, stages: Sequence[BatchStage], limit: int | None = None
    ) -> None:
        self.count, self.rank, self.world, self.seed = count, rank, world, seed
        self.stages, self.limit = list(stages), limit
        self.epoch = self.first_batch = 0
        self._reference = (0, 0)  # an epoch, and the number of batches before it

    @property
    def sampler(self) -> "TrainingBatchSampler":
        """The sampler itself; Lightning calls ``set_epoch`` on this attribute."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Start at the first batch of an epoch; for the current epoch, keep the first batch that `resume_at` set."""
        if epoch != self.epoch:
            self.resume_at(epoch, 0)

    def count_from(self, epoch: int, batches_before: int) -> None:
        """Set the number of batches trained before an epoch; needed if earlier epochs had other numbers of batches."""
        self._reference = (epoch, batches_before)

    def resume_at(self, epoch: int, batch: int) -> None:
        """Start iterating at a batch of an epoch."""
        self.epoch, self.first_batch = epoch, batch

    def stage(self, epoch: int, batch: int) -> BatchStage:
        """Return the stage of a batch."""
        reference_epoch, batches_before = self._reference
        index = batches_before + (epoch - reference_epoch) * self.batches_per_epoch + batch
        starts = [stage.start for stage in self.stages]
        return self.stages[bisect.bisect_right(starts, index) - 1]

    @property
    def batches_per_epoch(self) -> int:
        """Number of batches per epoch that the sampler yields: at most ``limit``."""
        return len(self) if self.limit is None else min(self.limit, len(self))

    @property
    def _samples_per_rank(self) -> int:
        return math.ceil(self.count / self.world)

    def __len__(self) -> int:
        """Return the number of batches per epoch; ``limit`` is ignored."""
        return math.ceil(self._samples_per_rank / self.stages[0].batch_size)

    def __iter__(self) -> Iterator[list[Sample]]:
        # Computed eagerly: a generator would read epoch and position at its first batch, when they may have changed.
        # Without the limit, a trainer that resumes after the last batch of an epoch would train on one more.
        return iter(self._draw_batches(self.epoch)[self.first_batch : self.batches_per_epoch])

    def _draw_batches(self, epoch: int) -> list[list[Sample]]:
        stages = [self.stage(epoch, batch) for batch in range(len(self))]
        order = self._permutations(epoch, sum(stage.batch_size for stage in stages) * self.world)
        own_numbers = order[self.rank :: self.world]
        if len(self.stages) == 1:
            own_numbers = own_numbers[: self._samples_per_rank]
        batches = []
        start = 0
        for stage in stages:
            numbers = own_numbers[start : start + stage.batch_size]
            batches.append([Sample(epoch, number, stage.crop) for number in numbers])
            start += stage.batch_size
        return batches

    def _permutations(self, epoch: int, minimum: int) -> list[int]:
        """Return at least ``minimum`` sample indices (`Sample.number`), from as many random permutations as needed."""
        generator = torch.Generator().manual_seed(self.seed + epoch)
        order: list[int] = []
        while len(order) < minimum:
            order += (torch.randperm(self.count, generator=generator) + len(order)).tolist()
        return order


class BalancedSampler(Sampler[int]):
    """Sampler of evaluated images: each group of images is assigned to one rank, so that the ranks have similar work.

    The groups are assigned in order of decreasing cost, each to the rank with the least cost so far. The cost of the
    slowest rank is then at most 4/3 of the lowest cost that is possible for the slowest rank (Graham, 1969). If each
    image is a group and all costs are equal, rank r gets images r, r + world, ….

    With fewer groups than ranks, each rank without a group evaluates an image of another rank again; metrics count the
    image once. A rank without an image would skip the loop, and the other ranks would wait for it forever.

    Args:
        costs: Cost of each image, such as its number of pixels, above 0.
        rank: Rank of this process.
        world: Number of ranks.
        groups: Group of each image, such as the sequence of a frame; the images of a group are evaluated by one rank.
            By default, each image is a group.

    Example:
        >>> [list(BalancedSampler([4, 1, 2, 1], rank, world=2)) for rank in range(2)]
        [[0], [1, 2, 3]]
    """

    def __init__(self, costs: Sequence[int], rank: int, world: int, groups: Sequence[Hashable] = ()) -> None:
        members: dict[Hashable, list[int]] = {}
        for index, group in enumerate(groups or range(len(costs))):
            members.setdefault(group, []).append(index)
        if rank >= len(members):
            self.indices = [rank % len(costs)]
            return
        group_members = list(members.values())
        group_costs = [sum(costs[index] for index in indices) for indices in group_members]
        assigned = _assign(group_costs, world)[rank]
        self.indices = sorted(itertools.chain.from_iterable(group_members[group] for group in assigned))

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def _assign(costs: Sequence[int], world: int) -> list[list[int]]:
    """Return the sorted indices of the groups that each rank gets, given the cost of each group."""
    loads = [(0, rank) for rank in range(world)]  # a heap
    ranks: list[list[int]] = [[] for _ in range(world)]
    for index in sorted(range(len(costs)), key=lambda index: -costs[index]):
        load, rank = loads[0]
        heapq.heapreplace(loads, (load + costs[index], rank))
        ranks[rank].append(index)
    return [sorted(indices) for indices in ranks]
