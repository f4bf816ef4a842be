import numpy as np
import pytest

from derain.errors import DerainError
from derain.metrics import flicker


def test_flicker_is_the_mean_absolute_difference_of_consecutive_frames():
    frames = np.random.default_rng(0).integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    total = sum(
        abs(int(frames[t + 1, y, x, c]) - int(frames[t, y, x, c])) for t, y, x, c in np.ndindex(3, *frames.shape[1:])
    )
    expected = total / frames[1:].size
    assert flicker(iter(frames)) == pytest.approx(expected, rel=1e-12)
    assert flicker(frames / 255) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("frames", [[], [np.zeros((2, 2, 3))], [np.zeros((2, 2, 3)), np.zeros((2, 3, 3))]])
def test_flicker_needs_two_frames_of_equal_size(frames):
    with pytest.raises(DerainError, match="flicker"):
        flicker(frames)
