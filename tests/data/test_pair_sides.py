import numpy as np
import pytest

from derain.data.pair_sides import rain_cues, rain_scores
from derain.data.pairs import find_pairs
from tests.factories import add_rain, photo


@pytest.fixture(scope="module")
def pairs():
    pytest.importorskip("skimage")
    names = ("astronaut", "chelsea", "coffee", "rocket", "motorcycle_left", "camera")
    return [(add_rain(photo(name), seed), photo(name)) for seed, name in enumerate(names)]


def test_swapping_the_images_negates_every_cue(pairs):
    for rainy, clean in pairs:
        assert rain_cues(rainy, clean) == pytest.approx(-rain_cues(clean, rainy), abs=1e-5)


def test_the_rainy_image_is_recognised(pairs):
    scores = rain_scores([rain_cues(rainy, clean) for rainy, clean in pairs])
    assert scores.min() > 2
    swapped = rain_scores([rain_cues(clean, rainy) for rainy, clean in pairs])
    assert swapped == pytest.approx(-scores)


def test_a_darkened_or_veiled_rainy_image_is_recognised(pairs):
    for rainy, clean in pairs:
        darkened = (rainy * 0.6).astype(np.uint8)
        veiled = (rainy * 0.7 + 70).astype(np.uint8)
        scores = rain_scores([rain_cues(changed, clean) for changed in (darkened, veiled)])
        assert (scores > 0).all()


def test_brightness_counts_only_if_it_agrees_throughout_the_set():
    faint = np.array([0.0, 0.0, 0.0, 0.9])
    assert rain_scores([faint] * 10)[0] == pytest.approx(5.4)
    assert rain_scores([faint] * 5)[0] == 0  # too few pairs
    assert rain_scores([faint, -faint] * 5)[0] == 0  # no agreement
    scores = rain_scores([faint] * 19 + [-faint])
    assert scores[-1] == pytest.approx(-5.4)


def test_tiny_and_blank_images_have_score_zero():
    blank = np.zeros((1, 1, 3), np.uint8)
    assert rain_scores([rain_cues(blank, blank)])[0] == pytest.approx(0, abs=1e-6)
    assert rain_scores([rain_cues(np.zeros((5, 40, 3), np.uint8), np.zeros((5, 40, 3), np.uint8))])[0] == 0


@pytest.mark.slow
def test_few_correct_pairs_of_real_sets_look_swapped(real_data):
    for name, split, most in [("Rain800", "test", 0), ("Rain100L", "test", 0), ("Rain100H", "test", 0)]:
        pairs = find_pairs(name, split, data_root=real_data).pairs
        scores = rain_scores([rain_cues(rainy, clean) for pair in pairs for rainy, clean in [pair.read()]])
        assert (scores < 0).sum() <= most, name
