import math

import pytest
import torch

from derain.nn.schedule import multiplied_at, warm_up_then_cosine


def test_linear_warm_up_and_cosine_decay():
    factor = warm_up_then_cosine(200, 0.1)
    assert [factor(step) for step in range(20)] == pytest.approx([n / 20 for n in range(1, 21)])
    for step in range(20, 200):
        assert factor(step) == pytest.approx(math.cos(math.pi / 2 * (step - 20) / 180) ** 2, abs=1e-12)
    assert factor(200) == factor(300) == 0


def test_without_warm_up_the_first_factor_is_1():
    factor = warm_up_then_cosine(50, 0.0)
    assert factor(0) == 1
    assert factor(25) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2])
def test_trainings_of_one_or_two_steps(steps):
    factor = warm_up_then_cosine(steps, 0.05)
    assert factor(0) == 1
    assert 0 <= factor(steps - 1) <= 1


def test_restormers_schedule_equals_its_cosine_restarts():
    """BasicSR's CosineAnnealingRestartCyclicLR: periods 92,000 and 208,000, minima 3e-4 and 1e-6."""

    def published(step):
        minimum, start, period = (3e-4, 0, 92_000) if step < 92_000 else (1e-6, 92_000, 208_000)
        return minimum + (3e-4 - minimum) / 2 * (1 + math.cos(math.pi * (step - start) / period))

    factor = warm_up_then_cosine(300_000, 0.0, 1e-6 / 3e-4, 92 / 300)
    for step in (0, 1, 50_000, 91_999, 92_000, 92_001, 196_000, 299_999):
        assert 3e-4 * factor(step) == pytest.approx(published(step), rel=1e-9)


def test_the_factor_is_held_after_warm_up():
    factor = warm_up_then_cosine(100, 0.1, 0.2, 0.3)
    assert [factor(step) for step in (9, 10, 40)] == [1, 1, 1]
    assert factor(41) < 1
    assert factor(70) == pytest.approx(0.6)
    assert factor(100) == pytest.approx(0.2)


def test_milestones_are_those_of_pytorch():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 5, 5], gamma=0.1)
    factor = multiplied_at([5, 2, 5], 0.1)
    for epoch in range(8):
        assert factor(epoch) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
