"""Frames of videos: which of them directly follow each other."""

import logging
import re
from collections.abc import Sequence
from itertools import zip_longest

from derain.data.pairs import Pair

log = logging.getLogger("derain")


def consecutive_frames(pairs: Sequence[Pair]) -> frozenset[int]:
    """Return the indices of the frames that directly follow the frame at the previous index.

    Frames follow each other if their numbers differ by the usual step of the sequence; see `frame_gaps`. The count of
    gaps, and that of sequences without frame numbers, are logged.

    Args:
        pairs: Frames; those of a sequence are neighbours, in the order of the sequence.

    Example:
        >>> from pathlib import Path
        >>> names = ["a/1", "a/2", "a/3", "a/7", "b/1", "b/2"]
        >>> sorted(consecutive_frames([Pair(name, Path(name), sequence=name[0]) for name in names]))
        [1, 2, 5]
    """
    steps = _steps(pairs)
    gaps = frame_gaps(pairs)
    consecutive = frozenset(steps) - frozenset(gaps)
    if gaps:
        log.info("gaps in the numbers of frames: %d, the first before %s: not compared", len(gaps), pairs[gaps[0]].name)
    unnumbered = {pairs[i].sequence for i in consecutive if steps[i] == 0}
    if unnumbered:
        log.info(
            "%d sequences without frame numbers in their names, such as %s: all neighbours are compared",
            len(unnumbered),
            min(unnumbered),
        )
    return consecutive


def frame_gaps(pairs: Sequence[Pair]) -> list[int]:
    """Return the indices of the frames whose number does not follow that of the previous frame of their sequence.

    If names have several numbers, the frame number is the one with the most different values in the sequence, and the
    last one of those with equally many. The usual step of a sequence is its smallest step above 0, and not the most
    frequent one: in a sequence that has lost many frames, most steps may be gaps.

    Args:
        pairs: Frames; those of a sequence are neighbours, in the order of the sequence.
    """
    steps = _steps(pairs)
    usual: dict[str, int] = {}
    for i, step in steps.items():
        if step > 0:
            sequence = pairs[i].sequence
            usual[sequence] = min(step, usual.get(sequence, step))
    return [i for i, step in steps.items() if step != usual.get(pairs[i].sequence, 0)]


def _steps(pairs: Sequence[Pair]) -> dict[int, int]:
    """Return the steps between the numbers of neighbouring frames of a sequence, by the index of the later frame."""
    numbers = _frame_numbers(pairs)
    neighbours = [i for i in range(1, len(pairs)) if pairs[i].sequence and pairs[i].sequence == pairs[i - 1].sequence]
    return {i: numbers[i] - numbers[i - 1] for i in neighbours}


def _frame_numbers(pairs: Sequence[Pair]) -> list[int]:
    """Return the frame number of each image; 0 for names without a number, and for images that are not in a video."""
    sequences: dict[str, list[int]] = {}
    for i, pair in enumerate(pairs):
        if pair.sequence:
            sequences.setdefault(pair.sequence, []).append(i)
    frame_numbers = [0] * len(pairs)
    for indices in sequences.values():
        from_the_end = [[int(text) for text in reversed(re.findall(r"\d+", pairs[i].rainy.stem))] for i in indices]
        candidates = [*zip_longest(*from_the_end, fillvalue=0), (0,) * len(indices)]
        chosen = max(candidates, key=lambda numbers: len(set(numbers)))
        for i, number in zip(indices, chosen, strict=True):
            frame_numbers[i] = number
    return frame_numbers
