import cv2
import numpy as np
import pytest

from derain.data.backgrounds import BackgroundMatch, compute_signature, find_matches
from tests.factories import add_rain, photo

NAMES = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "camera", "brick", "grass")


SIDE = 400


def jpeg(pixels, quality):
    data = cv2.imencode(".jpg", pixels[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return np.ascontiguousarray(cv2.imdecode(data, cv2.IMREAD_COLOR)[..., ::-1])


def crop(pixels, share, seed=0):
    h, w = (round(length * share**0.5) for length in pixels.shape[:2])
    rng = np.random.default_rng(seed)
    y, x = (int(rng.integers(0, whole - part + 1)) for whole, part in zip(pixels.shape[:2], (h, w), strict=True))
    return np.ascontiguousarray(pixels[y : y + h, x : x + w])


def resized(pixels, w, h):
    return cv2.resize(pixels, (w, h), interpolation=cv2.INTER_AREA)


@pytest.fixture(scope="module")
def photos():
    pytest.importorskip("skimage")
    found = [photo(name) for name in NAMES]
    return [resized(p, round(p.shape[1] * SIDE / max(p.shape)), round(p.shape[0] * SIDE / max(p.shape))) for p in found]


@pytest.fixture(scope="module")
def known(photos):
    return [compute_signature(pixels) for pixels in photos]


CHANGES = {
    "a copy": (lambda p: p, "unchanged"),
    "JPEG of quality 50": (lambda p: jpeg(p, 50), "unchanged"),
    "half the size": (lambda p: resized(p, p.shape[1] // 2, p.shape[0] // 2), "unchanged"),
    "another aspect ratio": (lambda p: resized(p, 300, 300), "unchanged"),
    "left to right": (lambda p: p[:, ::-1], "flipped left to right"),
    "upside down": (lambda p: p[::-1], "flipped upside down"),
    "transposed": (lambda p: p.transpose(1, 0, 2), "transposed"),
    "transposed and rotated": (lambda p: np.rot90(p.transpose(1, 0, 2), 2), "transposed and rotated by 180°"),
    "rotated clockwise": (lambda p: np.rot90(p, -1), "rotated by 90°"),
    "rotated by half": (lambda p: np.rot90(p, 2), "rotated by 180°"),
    "half the area": (lambda p: crop(p, 0.5), "cropped to 50% of its area"),
    "a quarter of the area": (lambda p: crop(p, 0.25), "cropped to 25% of its area"),
    "all at once": (lambda p: jpeg(np.rot90(crop(p, 0.3)[:, ::-1]), 75), "transposed, cropped to 30% of its area"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changed_copies_are_found(photos, known, change):
    make, expected = CHANGES[change]
    changed = [compute_signature(np.ascontiguousarray(make(pixels))) for pixels in photos]
    found = find_matches(known, changed)
    assert [(match.first, match.second) for match in found] == [(i, i) for i in range(len(NAMES))]
    assert all(match.score > 0.99 for match in found)
    words = [str(match) for match in found]
    close = sum(
        orientation(word) == orientation(expected) and abs(share(word) - share(expected)) <= 0.02 for word in words
    )
    assert close >= len(NAMES) - 1, words  # a grass or brick may look alike however it is rotated


def orientation(words):
    return words.partition("cropped")[0].rstrip(", ").replace("unchanged", "")


def share(words):
    return int(words.split("%")[0].split()[-1]) / 100 if "%" in words else 1.0


@pytest.mark.parametrize("make", [lambda p: p, lambda p: p[:, ::-1], lambda p: crop(p, 0.5)])
def test_rain_does_not_hide_a_background(photos, known, make):
    rainy = [
        compute_signature(np.ascontiguousarray(make(add_rain(p, i, share=0.03))), rainy=True)
        for i, p in enumerate(photos)
    ]
    found = {(match.first, match.second) for match in find_matches(known, rainy)}
    assert found <= {(i, i) for i in range(len(NAMES))}
    assert len(found) >= len(NAMES) - 2  # streaks hide the lawn and the bricks


def test_a_photo_from_a_step_aside_does_not_match(photos, known):
    right = photo("motorcycle_right")
    right = resized(right, 400, round(right.shape[0] * 400 / right.shape[1]))
    assert find_matches(known, [compute_signature(right)]) == []
    assert len(find_matches(known, [compute_signature(photos[NAMES.index("motorcycle_left")])])) == 1


def test_each_pair_in_one_list_is_found_once(photos, known):
    images = [known[0], known[1], compute_signature(np.ascontiguousarray(photos[0][::-1])), known[1]]
    assert [(match.first, match.second) for match in find_matches(images)] == [(0, 2), (1, 3)]


def test_whole_images_need_no_features(photos):
    images = [compute_signature(photos[0], features=False), compute_signature(photos[1], features=False)]
    rotated = [
        compute_signature(np.ascontiguousarray(np.rot90(photos[1])), features=False),
        compute_signature(crop(photos[0], 0.5), features=False),
    ]
    assert [(match.first, match.second) for match in find_matches(images, rotated, features=False)] == [(1, 0)]


def test_the_same_comparison_gives_the_same_matches(photos, known):
    cropped = [compute_signature(crop(pixels, 0.3, seed)) for seed, pixels in enumerate(photos)]
    assert find_matches(known, cropped) == find_matches(known, cropped)


def test_blank_images_do_not_match():
    blank = [compute_signature(np.full((40, 50, 3), value, np.uint8)) for value in (0, 0, 255)]
    assert find_matches(blank) == []
    assert find_matches([], blank) == find_matches(blank, []) == find_matches([]) == []
    assert find_matches([compute_signature(np.zeros((1, 1, 3), np.uint8))] * 2) == []


def test_shares_of_both_images(photos, known):
    (found,) = find_matches([known[0]], [compute_signature(crop(photos[0], 0.5))])
    assert found.share == pytest.approx(0.5, abs=0.02)
    assert found.second_share == pytest.approx(1, abs=0.02)
    (rotated,) = find_matches([compute_signature(crop(photos[0], 0.5))], [known[0]])
    assert (rotated.share, rotated.second_share) == pytest.approx((found.second_share, found.share), abs=0.02)
    assert str(BackgroundMatch(0, 1, 1.0, True, 90, 1.0, 0.4)) == "transposed, cropped to 40% of its area"
