"""Learning rate schedules for PyTorch's ``LambdaLR``: functions that return a factor of the learning rate."""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence


def warm_up_then_cosine(steps: int, warm_up: float, minimum: float = 0.0, hold: float = 0.0) -> Callable[[int], float]:
    """Return a schedule with linear warm-up and cosine decay, for PyTorch's ``LambdaLR``.

    Args:
        steps: Number of optimiser steps of the training.
        warm_up: Fraction of the steps in which the factor rises to 1, in [0, 1).
        minimum: Factor that the decay reaches after ``steps`` steps, in [0, 1].
        hold: Fraction of the steps, between warm-up and decay, in which the factor is 1, in [0, 1 - ``warm_up``].

    Returns:
        Function of the step, from 0, that returns the factor of the learning rate.

    Example:
        >>> schedule = warm_up_then_cosine(100, 0.1)
        >>> [round(schedule(step), 3) for step in (0, 9, 10, 55, 100)]
        [0.1, 1.0, 1.0, 0.5, 0.0]
    """
    warm_up_steps = round(warm_up * steps)
    decay_start = warm_up_steps + round(hold * steps)

    def factor(step: int) -> float:
        if step < warm_up_steps:
            return (step + 1) / warm_up_steps
        progress = max(0, step - decay_start) / max(1, steps - decay_start)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return minimum + (1 - minimum) * cosine

    return factor


def multiplied_at(milestones: Sequence[int], factor: float) -> Callable[[int], float]:
    """Return a schedule that multiplies the learning rate by ``factor`` at each milestone, for PyTorch's ``LambdaLR``.

    The learning rates are those of ``MultiStepLR``, but computed from the number of the step alone, not from the
    previous learning rate.

    Args:
        milestones: Steps or epochs, in any order.
        factor: Factor at each milestone.

    Returns:
        Function of the step or epoch, from 0, that returns the factor of the learning rate.

    Example:
        >>> schedule = multiplied_at([2, 3], 0.1)
        >>> [round(schedule(epoch), 3) for epoch in range(5)]
        [1.0, 1.0, 0.1, 0.01, 0.01]
    """
    ordered = sorted(milestones)
    return lambda step: factor ** bisect_right(ordered, step)
