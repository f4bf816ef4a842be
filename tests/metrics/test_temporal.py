import numpy as np
import pytest
import torch

from derain.errors import DerainError
from derain.metrics.temporal import (
    consistent,
    estimate_flow,
    split_temporal,
    temporal_notes,
    temporal_scores,
    warping_error,
)
from derain.metrics.temporal_quality import COLUMNS, TemporalQuality
from tests.factories import clean_image
from tests.forks import CONTEXT


def bilinear(image, x, y):
    """Return the value of a float64 image at a position, by the definition of bilinear interpolation."""
    left, top = int(np.floor(x)), int(np.floor(y))
    a, b = x - left, y - top
    right, bottom = min(left + 1, image.shape[1] - 1), min(top + 1, image.shape[0] - 1)
    upper = (1 - a) * image[top, left] + a * image[top, right]
    lower = (1 - a) * image[bottom, left] + a * image[bottom, right]
    return (1 - b) * upper + b * lower


def test_warping_error_is_that_of_lai_et_al():
    rng = np.random.default_rng(0)
    before, after = rng.integers(0, 256, (2, 20, 24, 3)).astype(np.uint8)
    flow = (rng.integers(-12, 13, (20, 24, 2)) / 4).astype(np.float32)  # OpenCV interpolates at multiples of 1/32
    y, x = np.indices((20, 24))
    target_x, target_y = x + flow[..., 0], y + flow[..., 1]
    visible = (target_x >= 0) & (target_x <= 23) & (target_y >= 0) & (target_y <= 19) & (rng.random((20, 24)) < 0.7)
    current, following = before.astype(np.float64) / 255, after.astype(np.float64) / 255
    squares = [
        (current[row, column] - bilinear(following, target_x[row, column], target_y[row, column])) ** 2
        for row, column in np.argwhere(visible)
    ]
    assert warping_error(before, after, flow, visible) == pytest.approx(np.sum(squares) / (3 * visible.sum()), rel=1e-9)


def test_pixels_that_leave_the_image_or_are_hidden_are_not_visible():
    forwards = np.full((20, 30, 2), (3, 0), np.float32)
    visible = consistent(forwards, -forwards)
    assert visible[:, :27].all()
    assert not visible[:, 27:].any()
    backwards = -forwards
    backwards[:, 13:17] = (5, 0)  # another object covers the columns that 10 to 13 move to
    visible = consistent(forwards, backwards)
    assert not visible[:, 10:14].any()
    assert visible[:, :10].all()
    # |f + b|² = e² against 0.01 (|f|² + |b|²) + 0.5 with |f| = 3
    for error, expected in ((0.75, True), (0.85, False)):
        assert consistent(forwards, (-forwards + (error, 0)).astype(np.float32))[10, 10] == expected


def shifted(count, step=2):
    """Return frames of a camera that moves to the right."""
    scene = clean_image(3, (64, 128))
    return [scene[:, step * index : step * index + 96] for index in range(count)]


def test_flow_follows_a_moving_camera():
    before, after = shifted(2)
    flow, visible = estimate_flow(before, after)
    assert np.median(flow, axis=(0, 1)) == pytest.approx((-2, 0), abs=0.25)
    assert visible.mean() > 0.8
    assert warping_error(before, after, flow, visible) < 1e-3


def test_a_static_scene_has_the_errors_of_the_flickering_video():
    clean = clean_image(0, (32, 40))
    brighter = clean + np.uint8(6)
    scores = temporal_scores((clean, clean), {"": (clean, brighter), "rainy_": (clean / 255, brighter / 255)})
    assert scores == {
        "flicker": 6.0,
        "warping_error": pytest.approx((6 / 255) ** 2),
        "rainy_flicker": 6.0,
        "rainy_warping_error": pytest.approx((6 / 255) ** 2),
        "clean_flicker": 0.0,
        "clean_warping_error": 0.0,
    }


def test_noise_raises_the_warping_error_of_a_moving_scene_by_its_variance():
    rng = np.random.default_rng(0)
    clean = shifted(2)
    noisy = [np.clip(frame + rng.normal(0, 10, frame.shape), 0, 255).round().astype(np.uint8) for frame in clean]
    scores = temporal_scores(tuple(clean), {"": tuple(noisy)})
    added = scores["warping_error"] - scores["clean_warping_error"]
    assert added == pytest.approx(2 * (10 / 255) ** 2, rel=0.25)


def test_frames_without_common_pixels_have_no_warping_error(monkeypatch):
    monkeypatch.setattr("derain.metrics.temporal.consistent", lambda *flows: np.zeros((32, 40), bool))
    clean = clean_image(0, (32, 40))
    scores = temporal_scores((clean, clean), {"": (clean, clean)})
    assert (scores["warping_error"], scores["clean_warping_error"], scores["flicker"]) == (None, None, 0.0)
    first = {"name": "a/1", "flicker": None, "warping_error": None}
    assert (
        "1 of 2 pairs"
        in temporal_notes([first, {"name": "a/2", **scores}, {**first, "flicker": 1.0, "warping_error": 0.1}])[1]
    )
    assert len(temporal_notes([first])) == 1
    assert temporal_notes([{"name": "1"}]) == []


@pytest.mark.parametrize("sizes", [((15, 40), (15, 40)), ((32, 40), (32, 41))])
def test_small_frames_and_changing_sizes_are_refused(sizes):
    clean = tuple(clean_image(0, size) for size in sizes)
    with pytest.raises(DerainError, match=str(sizes[1][1])):
        temporal_scores(clean, {"": clean})


def test_temporal_needs_a_protocol_and_a_command_that_computes_it():
    assert split_temporal(["rgb", "temporal", "prenet"]) == (["rgb", "prenet"], True)
    assert split_temporal(["rgb"], supported=False) == (["rgb"], False)
    with pytest.raises(DerainError, match="temporal"):
        split_temporal(["temporal"])
    with pytest.raises(DerainError, match="temporal"):
        split_temporal(["rgb", "temporal"], supported=False)


@pytest.fixture
def frames():
    """Derained, rainy and clean frames of two sequences of three frames."""
    clean = [*shifted(3), *shifted(3, step=0)]
    rng = np.random.default_rng(1)
    videos = [clean, *([frame + rng.integers(0, 5, frame.shape).astype(np.uint8) for frame in clean] for _ in range(2))]
    return [torch.from_numpy(np.stack(video)).movedim(-1, 1) / 255 for video in videos[::-1]]


LINKS = (1, 2, 4, 5)


def expected(frames, index):
    derained, rainy, clean = (video.movedim(1, -1).numpy() for video in frames)
    return temporal_scores(
        tuple(clean[index - 1 : index + 1]),
        {"": tuple(derained[index - 1 : index + 1]), "rainy_": tuple(rainy[index - 1 : index + 1])},
    )


@pytest.mark.parametrize("batches", [[[0, 1, 2, 3, 4, 5]], [[0], [1], [2], [3], [4], [5]], [[5, 0], [4, 2], [3, 1]]])
def test_frames_are_compared_in_any_order(frames, batches):
    quality = TemporalQuality(LINKS)
    for batch in batches:
        quality.update(*(video[batch] for video in frames), torch.tensor(batch))
    scores = quality.compute()
    assert sorted(scores) == list(LINKS)
    for index in LINKS:
        assert scores[index] == pytest.approx(expected(frames, index))
        assert set(scores[index]) == set(COLUMNS)
    assert not quality._waiting


def test_frames_are_kept_only_until_they_have_been_compared(frames):
    quality = TemporalQuality(LINKS)
    for index in range(6):
        quality.update(*(video[[index]] for video in frames), torch.tensor([index]))
        assert len(quality._waiting) <= 1


def test_sequences_of_several_devices_are_gathered(frames):
    parts = [TemporalQuality(LINKS) for _ in range(3)]
    for part, indices in zip(parts, ([0, 1, 2], [3, 4, 5], []), strict=True):
        for index in indices:
            part.update(*(video[[index]] for video in frames), torch.tensor([index]))
    assert [len(part.rows) for part in parts] == [2, 2, 0]
    parts[0].rows = [row for part in parts for row in part.rows]
    assert sorted(parts[0].compute()) == list(LINKS)


def evaluate(rank, folder, frames):
    """Evaluate a sequence on each of ranks 0 and 1; rank 2 has no frame that follows another."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
    quality = TemporalQuality(LINKS)
    for index in ([0, 1, 2], [3, 4, 5], [0])[rank]:
        quality.update(*(video[[index]] for video in frames), torch.tensor([index]))
    scores = quality.compute()
    assert sorted(scores) == list(LINKS)
    for index in LINKS:
        assert scores[index] == pytest.approx(expected(frames, index))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_ranks_have_the_scores_of_all_sequences(tmp_path, frames):
    ranks = [CONTEXT.Process(target=evaluate, args=(rank, tmp_path, frames)) for rank in range(3)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(300)
    assert [rank.exitcode for rank in ranks] == [0, 0, 0]
