"""Frames of videos: which of them directly follow each other."""

import logging
import re
from collections import Counter
from collections.abc import Sequence

from derain.data.pairs import Pair

log = logging.getLogger("derain")


def frame_links(pairs: Sequence[Pair]) -> frozenset[int]:
    """Return the indices of the frames that directly follow the frame of the previous index in their sequence.

    Frames follow each other if the last numbers of their names differ by the sequence's usual step. Other neighbours
    are gaps, which are reported.

    Args:
        pairs: Frames, in the order of their sequences.

    Example:
        >>> from pathlib import Path
        >>> names = ["a/1", "a/2", "a/3", "a/7", "b/1", "b/2"]
        >>> sorted(frame_links([Pair(name, Path(name), sequence=name[0]) for name in names]))
        [1, 2, 5]
    """
    neighbours = [i for i in range(1, len(pairs)) if pairs[i].sequence and pairs[i].sequence == pairs[i - 1].sequence]
    steps = {i: _frame_number(pairs[i]) - _frame_number(pairs[i - 1]) for i in neighbours}
    by_sequence: dict[str, Counter[int]] = {}
    for i, step in steps.items():
        by_sequence.setdefault(pairs[i].sequence, Counter())[step] += 1
    usual = {sequence: counts.most_common(1)[0][0] for sequence, counts in by_sequence.items()}
    gaps = [i for i, step in steps.items() if step != usual[pairs[i].sequence]]
    if gaps:
        log.info("%d gaps in the numbers of frames, the first before %s: not compared", len(gaps), pairs[gaps[0]].name)
    return frozenset(steps) - frozenset(gaps)


def _frame_number(pair: Pair) -> int:
    """Return the last number in the name of a frame; 0 without a number."""
    numbers = re.findall(r"\d+", pair.rainy.stem)
    return int(numbers[-1]) if numbers else 0
