import numpy as np
import pytest

from derain.data.transforms import Augmentation


@pytest.fixture
def pair(rng):
    rainy = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    return rainy, 255 - rainy


def test_rainy_and_clean_stay_together(pair):
    cut = Augmentation(16, flips=True, transpose=True)
    for place in range(50):
        rainy, clean = cut(*pair, (0, 0, place))
        assert rainy.shape == clean.shape == (16, 16, 3)
        np.testing.assert_array_equal(rainy, 255 - clean)


def test_a_seed_decides(pair):
    cut, other = Augmentation(16), Augmentation(16)
    other(*pair, (9, 9, 9))
    np.testing.assert_array_equal(cut(*pair, (0, 1, 2))[0], other(*pair, (0, 1, 2))[0])
    assert any((cut(*pair, (0, 1, 2))[0] != cut(*pair, (0, 1, n))[0]).any() for n in (3, 4))


def test_crops_come_from_everywhere_and_all_flips_occur():
    rows, columns = np.mgrid[:12, :12].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=2)
    cut = Augmentation(4, flips=True, transpose=True)
    corners, views = set(), set()
    for place in range(1500):
        crop, _ = cut(image, image, (0, 0, place))
        corners.add((int(crop[..., 0].min()), int(crop[..., 1].min())))
        relative = crop[..., :2].astype(int) - crop[..., :2].min((0, 1))
        views.add(relative.tobytes())
    assert len(corners) == 9 * 9
    assert len(views) == 8


@pytest.mark.parametrize(
    ("flips", "transpose", "views"),
    [(False, False, 1), (True, False, 4), ("horizontal", False, 2), ("horizontal", True, 4)],
)
def test_only_what_was_asked_for(flips, transpose, views):
    rows, columns = np.mgrid[:4, :4].astype(np.uint8)
    image = np.stack([rows, columns, rows], axis=2)
    cut = Augmentation(4, flips=flips, transpose=transpose)
    assert len({cut(image, image, (0, 0, n))[0].tobytes() for n in range(200)}) == views


def test_horizontal_flips_keep_rows():
    image = np.broadcast_to(np.arange(4, dtype=np.uint8)[:, None, None], (4, 4, 3)).copy()
    cut = Augmentation(4, flips="horizontal")
    assert all((cut(image, image, (0, 0, n))[0] == image).all() for n in range(50))


@pytest.mark.parametrize("size", [(5, 50), (50, 5), (7, 7), (1, 1)])
def test_small_images_are_reflected_not_dropped(rng, size):
    image = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    crop, _ = Augmentation(16, flips=False)(image, image, (0,))
    assert crop.shape == (16, 16, 3)
    assert {tuple(v) for v in crop.reshape(-1, 3)} <= {tuple(v) for v in image.reshape(-1, 3)}
