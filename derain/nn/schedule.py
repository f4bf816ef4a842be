"""Schedules of the learning rate."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence


def warm_up_then_cosine(steps: int, share: float, least: float = 0.0) -> Callable[[int], float]:
    """Factor of the learning rate at each optimiser step: it rises evenly to 1, then falls along a cosine.

    Args:
        steps: Optimiser steps of the whole training.
        share: Share of them in which it rises, in [0, 1).
        least: Where it falls to.

    Example:
        >>> factor = warm_up_then_cosine(100, 0.1)
        >>> factor(0), factor(9), factor(10), round(factor(55), 3), round(factor(100), 3)
        (0.1, 1.0, 1.0, 0.5, 0.0)
    """
    rising = round(share * steps)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        falling = (1 + math.cos(math.pi * min(1.0, (step - rising) / max(1, steps - rising)))) / 2
        return least + (1 - least) * falling

    return factor


def multiplied_at(milestones: Sequence[int], factor: float) -> Callable[[int], float]:
    """Return the factor of the learning rate at each step or epoch: multiplied by ``factor`` after each milestone.

    The rates are those of PyTorch's ``MultiStepLR``, as a function of the step alone.

    Args:
        milestones: Steps or epochs, in any order.
        factor: What the rate is multiplied by.

    Example:
        >>> rate = multiplied_at([2, 3], 0.1)
        >>> [round(rate(epoch), 3) for epoch in range(5)]
        [1.0, 1.0, 0.1, 0.01, 0.01]
    """
    ordered = sorted(milestones)
    return lambda step: factor ** bisect_right(ordered, step)
