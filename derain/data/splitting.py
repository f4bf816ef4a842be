"""Split pairs into training and validation pairs, and limit their number."""

import itertools
import logging
from collections.abc import Sequence

import numpy as np

from derain.data.pairs import Pair
from derain.errors import DerainError

log = logging.getLogger("derain")


def hold_out(pairs: Sequence[Pair], share: float, seed: int) -> tuple[tuple[Pair, ...], tuple[Pair, ...]]:
    """Split pairs at random into training and validation pairs that share no clean image or video.

    Clean photos without a rainy image are used for training only. Photos that are clean images of held-out pairs are
    omitted, except frames of held-out videos. The number of omitted photos, and the data sets without validation pairs,
    are logged.

    Args:
        pairs: Pairs and clean photos.
        share: Share of the clean images and videos, counted together, that are held out; at least one is held out, and
            at least one is not.
        seed: Seed of the random choice.

    Returns:
        Training and validation pairs, each in the given order.

    Raises:
        DerainError: If the pairs have fewer than two clean images or videos.
    """
    scenes = list(dict.fromkeys(pair.scene for pair in pairs if not pair.is_photo))
    if not scenes:
        raise DerainError(
            "--data.train: only clean photos, and no pairs to hold out for validation; set --data.val to a data "
            "set, or to none"
        )
    if len(scenes) < 2:
        raise DerainError(
            "--data.train: only 1 clean image or video, too few to hold one out for validation; set --data.val"
        )
    order = np.random.default_rng(seed).permutation(len(scenes))
    count = min(len(scenes) - 1, max(1, round(share * len(scenes))))
    held_out = {scenes[index] for index in order[:count]}
    training = tuple(pair for pair in pairs if pair.scene not in held_out)
    validation = tuple(pair for pair in pairs if pair.scene in held_out and not pair.is_photo)
    omitted = len(pairs) - len(training) - len(validation)
    if omitted:
        log.info("--data.train: omitted photos that are clean images held out for validation: %d", omitted)
    missing = {pair.data_set for pair in pairs if not pair.is_photo} - {pair.data_set for pair in validation}
    if missing:
        log.info("--data.val_share %s: no validation images of %s; increase it", share, ", ".join(sorted(missing)))
    return training, validation


def by_data_set(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Return the indices of pairs by data set, in order of appearance."""
    indices: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        indices.setdefault(pair.data_set, []).append(index)
    return indices


def first_pairs(pairs: Sequence[Pair], limit: int | None) -> tuple[Pair, ...]:
    """Return the first pairs of each data set in the given order: about equally many of each that has enough pairs.

    Args:
        pairs: The pairs.
        limit: Maximum number of pairs of all data sets together; None for all.

    Example:
        >>> from pathlib import Path
        >>> pairs = [Pair(name, Path(name), data_set=name[0]) for name in ("a1", "a2", "a3", "b1", "b2")]
        >>> [pair.name for pair in first_pairs(pairs, 3)]
        ['a1', 'a2', 'b1']
    """
    rounds = itertools.zip_longest(*by_data_set(pairs).values())
    chosen = [index for round_ in rounds for index in round_ if index is not None]
    return tuple(pairs[index] for index in sorted(chosen[:limit]))
