import logging
from pathlib import Path

import pytest

from derain.data.pairs import Pair
from derain.data.sequences import consecutive_frames, frame_gaps


def frames(*names):
    return [Pair(name, Path(f"{name}.png"), sequence=name.rpartition("/")[0]) for name in names]


@pytest.mark.parametrize(
    ("names", "consecutive"),
    [
        (("a/1", "a/2", "b/3", "b/4", "c"), [1, 3]),
        (("a/0", "a/5", "a/10", "a/20"), [1, 2]),
        (("a/x", "a/y"), [1]),
        (("a/1", "a/5", "a/6"), [2]),
        (("scene-Webcam-R-000", "scene-Webcam-R-001"), []),
        (("a/1", "a/2", "a/4", "a/6"), [1]),
        (("a/1_720p", "a/2_720p", "a/9_720p"), [1]),
        (("a/1_720p", "a/2_720p", "a/3_1080p", "a/7_1080p"), [1, 2]),
        (("a/take2_7", "a/take2_8", "a/x"), [1]),
        (("a/720p", "b/1", "b/3", "b/5"), [2, 3]),
    ],
)
def test_frames_follow_each_other_within_a_sequence(names, consecutive):
    assert sorted(consecutive_frames(frames(*names))) == consecutive


@pytest.mark.parametrize(
    ("names", "gaps"),
    [(("a/1", "a/2", "a/4", "a/6"), [2, 3]), (("a/1", "a/2", "a/4", "a/5"), [2]), (("a/10", "a/20", "a/40"), [2])],
)
def test_the_smallest_step_is_the_usual_one(names, gaps):
    assert frame_gaps(frames(*names)) == gaps


def test_gaps_are_reported(caplog):
    caplog.set_level(logging.INFO, "derain")
    consecutive_frames(frames("a/1", "a/2", "a/3", "a/5"))
    assert "a/5" in caplog.text
    caplog.clear()
    consecutive_frames(frames("a/1", "a/2", "a/3", "b/9"))
    assert not caplog.text
    consecutive_frames(frames("a/1", "a/2", "street/one", "street/two"))
    assert "street" in caplog.text
