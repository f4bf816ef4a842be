import logging
from pathlib import Path

import pytest

from derain.data.pairs import Pair
from derain.data.sequences import consecutive_frames


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
    ],
)
def test_frames_follow_each_other_within_a_sequence(names, consecutive):
    assert sorted(consecutive_frames(frames(*names))) == consecutive


def test_gaps_are_reported(caplog):
    caplog.set_level(logging.INFO, "derain")
    consecutive_frames(frames("a/1", "a/2", "a/3", "a/5"))
    assert "a/5" in caplog.text
    caplog.clear()
    consecutive_frames(frames("a/1", "a/2", "a/3", "b/9"))
    assert not caplog.text
    consecutive_frames(frames("a/1", "a/2", "street/one", "street/two"))
    assert "street" in caplog.text
