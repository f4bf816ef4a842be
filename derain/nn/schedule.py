"""Schedules of the learning rate."""

import math
from collections.abc import Callable


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
