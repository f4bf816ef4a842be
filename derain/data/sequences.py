"""Frames of videos: which of them directly follow each other."""

import logging
import re
from collections import Counter
from collections.abc import Sequence

from derain.data.pairs import Pair

log = logging.getLogger("derain")


def consecutive_frames(pairs: Sequence[Pair]) -> frozenset[int]:
    """Return the indices of the frames whose predecessor in their sequence is at the previous index (no gap).

    Frames follow each other if the last numbers of their names differ by the sequence's usual step. Other neighbours
    are gaps, which are reported.

    Args:
        pairs: Frames, in the order of their sequences.

    Example:
        >>> from pathlib import Path
        >>> names = ["a/1", "a/2", "a/3", "a/7", "b/1", "b/2"]
        >>> sorted(consecutive_frames([Pair(name, Path(name), sequence=name[0]) for name in names]))
        [1, 2, 5]
    """
    neighbours = _neighbours(pairs)
    gaps = frame_gaps(pairs)
    if gaps:
        log.info("gaps in the numbers of frames: %d, the first before %s: not compared", len(gaps), pairs[gaps[0]].name)
    unnumbered = {pairs[i].sequence for i in neighbours if _step(pairs, i) == 0}
    if unnumbered:
        log.info(
            "%d sequences without frame numbers at the end of names, such as %s: all neighbours are compared",
            len(unnumbered),
            min(unnumbered),
        )
    return frozenset(neighbours) - frozenset(gaps)


def frame_gaps(pairs: Sequence[Pair]) -> list[int]:
    """Return the indices of the frames whose number does not follow that of the previous frame of their sequence.

    The usual step of a sequence is the most frequent one; of equally frequent ones, the smallest.

    Args:
        pairs: Frames, in the order of their sequences.
    """
    steps = {i: _step(pairs, i) for i in _neighbours(pairs)}
    by_sequence: dict[str, Counter[int]] = {}
    for i, step in steps.items():
        by_sequence.setdefault(pairs[i].sequence, Counter())[step] += 1
    usual = {sequence: min(counts, key=lambda step: (-counts[step], step)) for sequence, counts in by_sequence.items()}
    return [i for i, step in steps.items() if step != usual[pairs[i].sequence]]


def _neighbours(pairs: Sequence[Pair]) -> list[int]:
    """Return the indices of the frames whose sequence is that of the previous index."""
    return [i for i in range(1, len(pairs)) if pairs[i].sequence and pairs[i].sequence == pairs[i - 1].sequence]


def _step(pairs: Sequence[Pair], index: int) -> int:
    return _frame_number(pairs[index]) - _frame_number(pairs[index - 1])


def _frame_number(pair: Pair) -> int:
    """Return the last number in the name of a frame; 0 without a number."""
    numbers = re.findall(r"\d+", pair.rainy.stem)
    return int(numbers[-1]) if numbers else 0
