import math

import pytest

from derain.nn.schedule import warm_up_then_cosine


def test_it_rises_evenly_then_falls_along_a_cosine():
    factor = warm_up_then_cosine(200, 0.1)
    assert [factor(step) for step in range(20)] == pytest.approx([n / 20 for n in range(1, 21)])
    for step in range(20, 200):
        assert factor(step) == pytest.approx(math.cos(math.pi / 2 * (step - 20) / 180) ** 2, abs=1e-12)
    assert factor(200) == factor(300) == 0


def test_without_warm_up_it_starts_at_the_top():
    factor = warm_up_then_cosine(50, 0.0)
    assert factor(0) == 1
    assert factor(25) == pytest.approx(0.5)


@pytest.mark.parametrize("steps", [1, 2])
def test_the_shortest_trainings_have_a_rate(steps):
    factor = warm_up_then_cosine(steps, 0.05)
    assert factor(0) == 1
    assert 0 <= factor(steps - 1) <= 1
