import cv2
import numpy as np
import pytest
import torch

from derain.commands.option_values import scale_factor
from derain.errors import DerainError
from derain.methods import PReNetModule
from derain.restoration import Restorer
from derain.scaling import automatic_factor, reduce, subtract_rain


@pytest.fixture(scope="module")
def method():
    torch.manual_seed(0)
    return PReNetModule(stages=1, variant="PRN")


def image_of(height, width):
    return np.random.default_rng(0).random((height, width, 3), np.float32)


def test_full_size_is_exactly_the_method(method):
    image = image_of(70, 65)
    plain = Restorer(method, device="cpu")(image)
    np.testing.assert_array_equal(Restorer(method, device="cpu", scale=1)(image), plain)
    np.testing.assert_array_equal(Restorer(method, device="cpu", scale="auto")(image), plain)  # small


@pytest.mark.parametrize("factor", [2, 3, 5])
@pytest.mark.parametrize("size", [(64, 80), (67, 93), (3, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8])
def test_a_constant_veil_of_rain_is_removed_exactly(method, monkeypatch, factor, size, dtype):
    """All details stay, at any size."""
    monkeypatch.setattr(method, "forward", lambda rainy: rainy - 0.2)
    clean = image_of(*size) * 0.7 + 0.05
    rainy = clean + np.float32(0.2)
    restorer = Restorer(method, device="cpu", scale=factor)
    if dtype == np.uint8:
        rainy = np.rint(rainy * 255).astype(np.uint8)
        np.testing.assert_array_equal(restorer(rainy), rainy - 51)
    else:
        np.testing.assert_allclose(restorer(rainy), clean, atol=2e-6)


def test_reduction_is_the_mean_over_areas():
    image = image_of(12, 20)
    expected = cv2.resize(image.astype(np.float64), (5, 3), interpolation=cv2.INTER_AREA)
    reduced = reduce(torch.from_numpy(image).permute(2, 0, 1), 4).permute(1, 2, 0)
    np.testing.assert_allclose(reduced, expected, atol=1e-6)


def cubic_matrix(count, size, a=-0.75):
    """Return the matrix of bicubic interpolation (Keys, 1981) along one axis, with repeated borders, in float64."""
    matrix = np.zeros((size, count))
    for row in range(size):
        position = (row + 0.5) * count / size - 0.5
        first = int(np.floor(position))
        for column in range(first - 1, first + 3):
            x = abs(position - column)
            near = (a + 2) * x**3 - (a + 3) * x**2 + 1
            far = a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a
            matrix[row, min(max(column, 0), count - 1)] += near if x <= 1 else far
    return matrix


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_the_formula_equals_its_float64_version(strength):
    rng = np.random.default_rng(1)
    rainy, reduced, derained = rng.random((3, 13, 21)), rng.random((3, 5, 7)), rng.random((3, 5, 7))
    rows, columns = cubic_matrix(5, 13), cubic_matrix(7, 21)
    expected = np.clip(rainy - strength * (rows @ (reduced - derained) @ columns.T), 0, 1)
    tensors = [torch.from_numpy(array) for array in (rainy, reduced, derained)]
    np.testing.assert_allclose(subtract_rain(*tensors, strength), expected, atol=1e-12)


def test_strength_blends_rainy_and_derained(method):
    image = image_of(40, 50)
    derained = Restorer(method, device="cpu")(image)
    blended = Restorer(method, device="cpu", strength=0.25)(image)
    np.testing.assert_allclose(blended, 0.75 * image + 0.25 * derained, atol=1e-6)
    np.testing.assert_allclose(Restorer(method, device="cpu", strength=0.0)(image), image, atol=1e-7)


def test_automatic_scale_depends_on_the_shorter_side(method, monkeypatch, caplog):
    assert [automatic_factor(side, 9000) for side in (1, 999, 1000, 1999, 2000, 2999, 3000)] == [1, 1, 1, 1, 2, 2, 3]
    assert {-(-side // automatic_factor(side, 9000)) for side in range(2000, 9000)} == set(range(1000, 1501))
    sizes = []
    monkeypatch.setattr(method, "forward", lambda rainy: sizes.append(tuple(rainy.shape[2:])) or rainy)
    caplog.set_level("INFO", "derain")
    Restorer(method, device="cpu", scale="auto")([np.zeros((2060, 2200, 3), np.uint8)] * 2)
    assert sizes == [(1030, 1100)] * 2
    assert sum("1030" in record.message for record in caplog.records) == 1


def test_images_at_once_are_those_of_the_reduced_size(method, monkeypatch):
    restorer, sizes = Restorer(method, device="cpu", scale=4), []
    monkeypatch.setattr(restorer.scheduler, "images_at_once", lambda *size: sizes.append(size) or 7)
    assert restorer.images_at_once(400, 602) == 7
    assert sizes == [(100, 151)]


def test_a_result_that_is_not_finite_is_refused(method, monkeypatch):
    monkeypatch.setattr(method, "forward", lambda rainy: torch.where(rainy > 2, rainy, np.nan))
    with pytest.raises(DerainError, match=r"scene\.png"):
        Restorer(method, device="cpu", scale=2, strength=0.5)(image_of(20, 20), name="scene.png")


def test_wrong_scales_and_strengths_are_refused(method):
    for options, value in (({"scale": 0}, "0"), ({"strength": 1.5}, "1.5"), ({"strength": float("nan")}, "nan")):
        with pytest.raises(DerainError, match=value):
            Restorer(method, device="cpu", **options)
    for text in ("0", "-1", "half", "1.5"):
        with pytest.raises(DerainError, match=text):
            scale_factor(text)


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize(("translucent", "bound"), [(False, 0.02), (True, 0.12)])
def test_a_bright_edge_has_no_halo(method, monkeypatch, factor, translucent, bound):
    """Beside an edge of the photo, nothing is darker than the clean photo or brighter than the rainy one.

    Translucent rain hides bright areas less: its own edge there is blurred by the reduction.
    """
    columns = np.arange(97)
    clean = np.where(columns < 50, 0.15, 0.9).astype(np.float32)
    streak = 0.4 * np.exp(-(((columns - 44) / (2 * factor)) ** 2))
    rainy = clean + streak * (1 - clean) if translucent else np.minimum(clean + 0.2 * streak, 1)
    clean, rainy = (np.tile(row[None, :, None], (40, 1, 3)).astype(np.float32) for row in (clean, rainy))
    target = reduce(torch.from_numpy(clean).permute(2, 0, 1), factor)[None]
    monkeypatch.setattr(method, "forward", lambda image: target)
    restored = Restorer(method, device="cpu", scale=factor)(rainy)
    assert (np.minimum(clean, rainy) - restored).max() < bound
    assert (restored - np.maximum(clean, rainy)).max() < bound
    assert np.abs(restored - clean).mean() < 0.2 * np.abs(rainy - clean).mean()
