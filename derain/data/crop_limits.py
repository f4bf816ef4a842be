"""Limits of the size of training crops."""

from collections.abc import Mapping, Sequence

from derain.data.pairs import Pair
from derain.data.samplers import CropStage
from derain.errors import DerainError
from derain.memory import free_memory

BYTES_PER_CROP_PIXEL = 2 * 3 * 4
"""Bytes of a batch per pixel of a crop: rainy and clean, three channels each, float32; without unlabelled crops."""


def check_crops(stages: Sequence[CropStage], option: str, pairs_by_option: Mapping[str, Sequence[Pair]]) -> None:
    """Check that crops are not mostly padding, and that a batch fits into memory.

    Args:
        stages: Stages of training.
        option: Option that sets the side of the crops, for messages.
        pairs_by_option: Pairs by the option that names their data set, such as ``train``.

    Raises:
        DerainError: If the side of a crop is more than twice the longest side of all images of an option, an image
            cannot be opened, or a batch needs more than the free main memory.
    """
    largest = max(stage.crop for stage in stages)
    for name, pairs in pairs_by_option.items():
        # any() reads few image headers: usually the first image is large enough.
        if pairs and not any(largest <= 2 * max(pair.size()) for pair in pairs):
            longest = max(max(pair.size()) for pair in pairs)
            raise DerainError(
                f"{option} {largest}: the longest side of the images of --data.{name} is {longest} pixels; "
                f"use at most {2 * longest} (smaller images are padded by reflection)"
            )
    heaviest = max(stages, key=lambda stage: stage.batch_size * stage.crop**2)
    need = heaviest.batch_size * heaviest.crop**2 * BYTES_PER_CROP_PIXEL
    if need > free_memory():
        raise DerainError(
            f"{option} {heaviest.crop}: a batch of {heaviest.batch_size} needs {need / 1e9:.1f} GB without the "
            f"network, but {free_memory() / 1e9:.1f} GB of memory are free; reduce crop or batch_size"
        )
