"""Batches of images of equal size for ``derain test`` and ``derain predict``."""

import sys
from collections.abc import Iterator, Sequence

from lightning import Trainer
from torch.utils.data import Sampler

from derain.data.cache import pair_sizes
from derain.data.pairs import Pair
from derain.evaluation import is_limited

BATCH_PIXELS = 2**22
"""Maximum number of pixels of a batch of several images; it limits the memory of loader processes."""


def evaluation_costs(pairs: Sequence[Pair], split: str, trainer: Trainer | None) -> list[int]:
    """Return the cost of each image, by which images are distributed over ranks: its number of pixels, or 1.

    Costs are 1 with a single rank, and if all ranks must get the same number of images: in validation, since DDP
    synchronises the ranks before each batch, and with a limit on batches, which counts the batches of each rank.

    Args:
        pairs: The images.
        split: ``val``, ``test`` or ``predict``.
        trainer: The trainer; None for a single rank.
    """
    if trainer is None or trainer.world_size == 1 or split == "val" or is_limited(split, trainer):
        return [1] * len(pairs)
    pixels: list[int] = pair_sizes(pairs).prod(axis=1).tolist()
    return pixels


def rank_groups(pairs: Sequence[Pair], split: str) -> list[str | int]:
    """Return the group of each image; one rank evaluates all images of a group.

    The frames of a video are a group, named by its sequence. Any other image is a group of its own, named by its index.
    In validation, every frame is a group of its own, too, since all ranks must get the same number of images.

    Args:
        pairs: The images.
        split: ``val``, ``test`` or ``predict``.
    """
    if split == "val":
        return list(range(len(pairs)))
    return [pair.sequence or index for index, pair in enumerate(pairs)]


class EqualSizeBatches(Sampler[list[int]]):
    """Batches of images of equal size, in the order of the first image of each batch.

    Args:
        indices: Indices of the images.
        sizes: Height and width of each image, by index.
        batch_size: Maximum number of images in a batch.
        pixels: Maximum number of pixels in a batch of several images; by default, there is no limit.

    Example:
        >>> sizes = [(4, 6), (6, 4), (4, 6), (4, 6)]
        >>> list(EqualSizeBatches([0, 1, 2, 3], sizes, batch_size=2))
        [[0, 2], [1], [3]]
    """

    def __init__(
        self, indices: Sequence[int], sizes: Sequence[tuple[int, int]], batch_size: int, pixels: int = sys.maxsize
    ) -> None:
        groups: dict[tuple[int, int], list[int]] = {}
        for index in indices:
            groups.setdefault(sizes[index], []).append(index)
        batches = []
        for (height, width), group in groups.items():
            count = max(1, min(batch_size, pixels // (height * width)))
            batches += [group[start : start + count] for start in range(0, len(group), count)]
        position = {index: number for number, index in enumerate(indices)}
        self.batches = sorted(batches, key=lambda batch: position[batch[0]])

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)
