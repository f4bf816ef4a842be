import cv2
import numpy as np
import pytest

from derain.errors import DerainError
from derain.metrics import flicker
from derain.video.fusion import SIGMA, agreement, fuse_aligned, fuse_neighbours, warp
from tests.factories import clean_image

SIZE = (96, 128)


def pan(count, step=(3, 1), seed=1):
    texture = cv2.GaussianBlur(np.random.default_rng(seed).normal(0, 60, (160, 240, 1)), None, 1.5)[..., None]
    picture = np.clip(clean_image(seed, (160, 240)) + texture, 0, 255).astype(np.uint8)
    return [
        picture[20 + step[1] * i : 20 + step[1] * i + SIZE[0], 20 + step[0] * i : 20 + step[0] * i + SIZE[1]].copy()
        for i in range(count)
    ]


def with_streaks(frames, seed=0):
    """Return frames with fresh remains of streaks, 40 levels bright."""
    rng = np.random.default_rng(seed)
    rainy = []
    for frame in frames:
        streaks = cv2.blur((rng.random(SIZE) < 0.012).astype(np.float32), (1, 9)) * 9
        rainy.append(np.clip(frame + 40 * np.minimum(streaks, 1)[..., None], 0, 255).astype(np.uint8))
    return rainy


def psnr(frames, clean):
    error = np.mean([(a.astype(float) - b) ** 2 for a, b in zip(frames, clean, strict=True)])
    return 10 * np.log10(255**2 / error)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 6, 17])
def test_the_robust_mean_follows_its_formula(count):
    rng = np.random.default_rng(0)
    stack = rng.integers(90, 140, (count, 4, 6, 3), dtype=np.uint8)
    stack[-1] = rng.integers(0, 256, stack[-1].shape)
    valid = rng.random((count, 4, 6)) < 0.6
    valid[0] = True
    fused = fuse_aligned(stack, valid)
    for y, x, c in np.ndindex(4, 6, 3):
        values = [float(stack[k, y, x, c]) for k in range(count)]
        median = sorted(values[k] if valid[k, y, x] else values[0] for k in range(count))[count // 2]
        weights = [np.exp(-((v - median) ** 2) / 2 / SIGMA**2) * valid[k, y, x] for k, v in enumerate(values)]
        total = sum(weights)
        expected = sum(w * v for w, v in zip(weights, values, strict=True)) / total if total > 1e-6 else median
        assert fused[y, x, c] == pytest.approx(expected, abs=0.501)


def test_warping_moves_by_the_flow():
    image = clean_image(2, SIZE)
    flow = np.zeros((*SIZE, 2), np.float32)
    flow[..., 0], flow[..., 1] = 5, -2
    np.testing.assert_array_equal(warp(image, flow)[2:, :-5], image[:-2, 5:])


def test_agreement_checks_position_consistency_and_colour():
    image = np.full((*SIZE, 3), 100, np.uint8)
    flow = np.zeros((*SIZE, 2), np.float32)
    flow[..., 0] = 10
    assert agreement(image, image, flow, -flow)[:, :-10].all()
    assert not agreement(image, image, flow, -flow)[:, -10:].any()  # outside
    assert not agreement(image, image, flow, flow).any()
    assert not agreement(image, image + 100, flow, -flow).any()


@pytest.mark.parametrize("step", [(0, 0), (3, 1)])
def test_fusion_removes_what_covers_a_pixel_for_a_moment(step):
    clean = pan(7, step)
    rainy = with_streaks(clean)
    fused = list(fuse_neighbours(iter(rainy), 2))
    assert len(fused) == 7
    assert psnr(fused, clean) > psnr(rainy, clean) + 1
    if step == (0, 0):
        assert flicker(fused) < 0.5 * flicker(rainy)


def test_nothing_is_fused_across_a_cut():
    first, second = with_streaks(pan(4)), with_streaks(pan(5, (-2, 1), seed=7)[::-1], 1)
    fused = list(fuse_neighbours(iter([*first, *second]), 2))
    alone = [*fuse_neighbours(iter(first), 2), *fuse_neighbours(iter(second), 2)]
    np.testing.assert_array_equal(fused, alone)


def test_a_moving_object_leaves_no_ghost():
    clean = []
    for index, frame in enumerate(pan(6, (1, 0))):
        picture = frame.copy()
        picture[30:70, 10 + 5 * index : 50 + 5 * index] = pan(1, seed=9)[0][:40, :40]
        clean.append(picture)
    rainy = with_streaks(clean)
    fused = list(fuse_neighbours(iter(rainy), 2))

    def inside(frames):
        return [frame[30:70, 10 + 5 * index : 50 + 5 * index] for index, frame in enumerate(frames)]

    assert psnr(inside(fused), inside(clean)) >= psnr(inside(rainy), inside(clean))
    assert psnr(fused, clean) > psnr(rainy, clean) + 1


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_short_videos_keep_their_frames(count):
    frames = pan(count)
    assert len(list(fuse_neighbours(iter(frames), 3))) == count
    assert list(fuse_neighbours(iter(frames), 0)) == frames


def test_large_frames_are_aligned_at_reduced_size():
    picture = cv2.GaussianBlur(clean_image(1, (90, 1400)), None, 2)
    frames = [picture[:, 10 * i : 10 * i + 1300].copy() for i in range(3)]
    assert psnr(list(fuse_neighbours(iter(frames), 1)), frames) > 35


def test_only_the_window_is_kept(monkeypatch):
    read = []

    def source():
        for number, frame in enumerate(pan(9, (1, 0))):
            read.append(number)
            yield frame

    for number, _ in enumerate(fuse_neighbours(source(), 2)):
        assert len(read) <= number + 3


def test_small_frames_are_refused():
    with pytest.raises(DerainError, match="20×40"):
        list(fuse_neighbours(iter([np.zeros((40, 20, 3), np.uint8)]), 1))
