import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate
from scipy.signal import convolve2d
from torchmetrics.functional.image import structural_similarity_index_measure

from derain.errors import DerainError
from derain.images import read_rgb
from derain.listing import image_files
from derain.metrics import PROTOCOLS, bootstrap_interval, psnr_ssim, resolve
from derain.metrics.full_reference import _shrunk

NAMES = [*PROTOCOLS, "matlab-y+down", "rgb+down", "ir-sde-y+down"]

# Independent definition of each protocol: luma, rounded luma, 8-bit conversion, border, padding of SSIM.
SPEC = {
    "matlab-y": (True, False, np.round, 0, False),
    "prenet": (True, False, np.floor, 0, False),
    "restormer": (True, True, np.round, 0, False),
    "plnlin": (False, False, None, 0, True),
    "ir-sde-rgb": (False, False, np.round, 4, False),
    "ir-sde-y": (True, False, np.round, 4, False),
    "rgb": (False, False, np.round, 0, False),
}


def window():
    grid = np.arange(11.0) - 5
    weights = np.exp(-(grid[:, None] ** 2 + grid[None] ** 2) / 4.5)
    return weights / weights.sum()


def reference_ssim(x, y, mode):
    c1, c2 = 0.01**2, 0.03**2  # range 1
    x, y, w = x / 255, y / 255, window()
    mx, my = convolve2d(x, w, mode), convolve2d(y, w, mode)
    sx, sy = convolve2d(x**2, w, mode) - mx**2, convolve2d(y**2, w, mode) - my**2
    sxy = convolve2d(x * y, w, mode) - mx * my
    return np.mean((2 * mx * my + c1) * (2 * sxy + c2) / ((mx**2 + my**2 + c1) * (sx + sy + c2)))


def reference(derained, clean, name):
    """Return PSNR and SSIM by plain NumPy and SciPy in float64, from floats in about [0, 1]."""
    use_luma, round_luma, quantise, border, padded = SPEC[name.removesuffix("+down")]
    x, y = 255 * derained.astype(np.float64), 255 * clean.astype(np.float64)
    if quantise is not None:
        x = quantise(np.clip((255 * derained).astype(np.float64), 0, 255))
        y = np.round(y)
    if border:
        x, y = x[border:-border, border:-border], y[border:-border, border:-border]
    if use_luma:
        x, y = ((65.481 * i[..., 0] + 128.553 * i[..., 1] + 24.966 * i[..., 2]) / 255 + 16 for i in (x, y))
        x, y = (np.round(i) if round_luma else i for i in (x, y))
        x, y = x[..., None], y[..., None]
    psnr = 10 * np.log10(255**2 / np.mean((np.clip(x, 0, 255) - y) ** 2))
    shrink = max(1, int(np.floor(min(x.shape[:2]) / 256 + 0.5))) if name.endswith("+down") else 1
    if shrink > 1:
        # The centre of even filters is before the middle in MATLAB, after it in SciPy.
        kernel = np.ones((shrink, shrink, 1)) / shrink**2
        origin = (-1 if shrink % 2 == 0 else 0, -1 if shrink % 2 == 0 else 0, 0)
        x, y = (correlate(i, kernel, mode="reflect", origin=origin)[::shrink, ::shrink] for i in (x, y))
    mode = "same" if padded else "valid"
    return psnr, np.mean([reference_ssim(x[..., c], y[..., c], mode) for c in range(x.shape[2])])


def images(rng, size, noise=0.08):
    """Return a derained image that slightly exceeds [0, 1], and an 8-bit clean one."""
    clean = rng.integers(0, 256, (*size, 3)).astype(np.float32) / np.float32(255)
    clean = np.round((clean + np.roll(clean, 1, 0) + np.roll(clean, 1, 1)) / 3 * 255) / 255
    derained = clean + noise * rng.standard_normal(clean.shape)
    return derained.astype(np.float32), clean.astype(np.float32)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(37, 31), (19, 150)])
def test_agrees_with_plain_float64(rng, name, size):
    derained, clean = images(rng, size)
    scores = psnr_ssim(derained, clean, resolve([name])[0])
    assert scores == pytest.approx(reference(derained, clean, name), abs=1e-9)


@pytest.mark.parametrize("size", [(385, 391), (700, 645), (901, 899)])
def test_down_sampling_agrees_with_plain_float64(rng, size):
    derained, clean = images(rng, size)
    protocol = resolve(["matlab-y+down"])[0]
    expected = reference(derained, clean, "matlab-y+down")
    assert psnr_ssim(derained, clean, protocol) == pytest.approx(expected, abs=1e-9)
    assert abs(psnr_ssim(derained, clean, resolve(["matlab-y"])[0])[1] - expected[1]) > 0.01


@pytest.mark.parametrize("factor", [2, 3, 4, 5])
def test_down_sampling_equals_imfilter(rng, factor):
    plane = rng.random((23, 17))
    padded = np.pad(plane, factor, mode="symmetric")
    before = int(np.floor((factor + 1) / 2)) - 1  # imfilter: centre floor((size + 1) / 2), from 1
    expected = [
        [padded[factor + i - before :, factor + j - before :][:factor, :factor].mean() for j in range(0, 17, factor)]
        for i in range(0, 23, factor)
    ]
    np.testing.assert_allclose(_shrunk(plane, factor), expected, atol=1e-12)


def test_ssim_is_that_of_torchmetrics_without_its_border(rng):
    derained, clean = images(rng, (61, 47))
    x, y = (torch.from_numpy(np.rint(np.clip(i, 0, 1) * 255)).double().movedim(-1, 0) for i in (derained, clean))
    _, full = structural_similarity_index_measure(x[None], y[None], sigma=1.5, data_range=255.0, return_full_image=True)
    expected = full[..., 5:-5, 5:-5].mean().item()
    assert psnr_ssim(derained, clean, resolve(["rgb"])[0])[1] == pytest.approx(expected, abs=1e-9)


def test_floats_converted_from_bytes_are_restored_exactly():
    levels = np.arange(256, dtype=np.uint8)
    image = np.stack([np.tile(levels.reshape(16, 16), (2, 2))] * 3, axis=-1)
    for protocol in PROTOCOLS.values():
        for floats in (
            image / np.float32(255),
            image / 255.0,
            (torch.from_numpy(image).float() / 255).numpy(),
        ):
            assert psnr_ssim(floats, image, protocol) == pytest.approx((100, 1), abs=1e-6), protocol.name


def test_bytes_and_floats_have_equal_scores(rng):
    derained, clean = (rng.integers(0, 256, (24, 25, 3)).astype(np.uint8) for _ in range(2))
    for protocol in PROTOCOLS.values():
        floats = psnr_ssim(derained / np.float32(255), clean / np.float32(255), protocol)
        assert floats == pytest.approx(psnr_ssim(derained, clean, protocol), abs=1e-5)


def test_truncation_and_rounding_of_derained_values():
    clean = np.full((16, 16, 3), 100, np.uint8)
    derained = np.full((16, 16, 3), 101.9 / 255, np.float32)
    prenet, matlab = (psnr_ssim(derained, clean, resolve([name])[0])[0] for name in ("prenet", "matlab-y"))
    assert prenet - matlab == pytest.approx(20 * np.log10(2))  # 101 against 102


def test_clean_values_are_rounded_by_every_8_bit_protocol():
    derained = np.full((24, 24, 3), 101, np.uint8)
    clean = np.full((24, 24, 3), 100.6 / 255, np.float32)
    for protocol in PROTOCOLS.values():
        is_equal = psnr_ssim(derained, clean, protocol)[0] == 100
        assert is_equal == (protocol.output != "none"), protocol.name


@pytest.mark.parametrize(("value", "level"), [(0.4, 0), (0.6, 1), (1.5, 2), (254.6, 255)])
def test_derained_values_are_rounded_to_the_nearest_level(value, level):
    derained = np.full((16, 16, 3), value / 255, np.float64)
    clean = np.full((16, 16, 3), level, np.uint8)
    assert psnr_ssim(derained, clean, resolve(["rgb"])[0])[0] == 100


def test_luma_is_rounded_by_restormer_only():
    """Luma of grey 100 is 101.88: with grey 101 it differs by 0.86 exactly, and by 1 rounded to integers."""
    clean, derained = np.full((16, 16, 3), 100, np.uint8), np.full((16, 16, 3), 101, np.uint8)
    exact, rounded = (psnr_ssim(derained, clean, resolve([name])[0])[0] for name in ("matlab-y", "restormer"))
    assert exact == pytest.approx(20 * np.log10(255 / (219 / 255)))
    assert rounded == pytest.approx(20 * np.log10(255))


def test_unclipped_values_count_in_the_authors_ssim_only(rng):
    _, clean = images(rng, (32, 32))
    beyond = np.where(clean > 0.5, np.float32(1.5), clean).astype(np.float32)
    plnlin = resolve(["plnlin"])[0]
    inside, outside = (psnr_ssim(image, clean, plnlin) for image in (np.clip(beyond, 0, 1), beyond))
    assert inside[0] == outside[0]
    assert inside[1] > outside[1] + 0.01


def test_equal_images_count_as_100_db():
    image = np.full((16, 16, 3), 7, np.uint8)
    assert psnr_ssim(image, image, resolve(["matlab-y"])[0]) == (100.0, pytest.approx(1.0))


def test_strips_of_large_images_have_no_seams(rng):
    derained, clean = images(rng, (300, 40))  # three strips
    expected = reference(derained, clean, "rgb")
    assert psnr_ssim(derained, clean, resolve(["rgb"])[0]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("name", "minimum"), [("matlab-y", 11), ("ir-sde-y", 19), ("plnlin", 1)])
def test_images_smaller_than_the_window_are_rejected(name, minimum):
    protocol = resolve([name])[0]
    image = np.zeros((minimum, minimum + 9, 3), np.uint8)
    assert psnr_ssim(image, image, protocol)[1] == pytest.approx(1)
    if minimum > 1:
        with pytest.raises(DerainError, match=f"{name} .*{minimum}x{minimum}"):
            psnr_ssim(image[1:], image[1:], protocol)


def test_other_sizes_and_types_are_rejected():
    image = np.zeros((16, 20, 3), np.uint8)
    protocol = resolve(["rgb"])[0]
    with pytest.raises(DerainError, match="19x16 and 20x16"):
        psnr_ssim(image[:, 1:], image, protocol)
    with pytest.raises(DerainError, match="float16"):
        psnr_ssim(image.astype(np.float16), image, protocol)


def test_the_bootstrap_interval_agrees_with_theory_and_is_deterministic(rng):
    values = rng.normal(30, 4, 400)
    low, high = bootstrap_interval(values)
    spread = 1.96 * values.std() / np.sqrt(400)
    assert (low, high) == pytest.approx((values.mean() - spread, values.mean() + spread), abs=0.05)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval(values, seed=1) != (low, high)


def test_importing_metrics_imports_no_torch():
    code = "import sys, derain.metrics; sys.exit(any(m in sys.modules for m in ('torch', 'torchmetrics')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("folder", "expected"),
    [
        (
            ("Rain100H/rain", "Rain100H/norain"),
            {"matlab-y": (13.556, 0.3787), "restormer": (13.556, 0.3786), "plnlin": (12.131, 0.3623)},
        ),
        (
            ("Rain100L/rainy", "Rain100L"),
            {"matlab-y": (26.901, 0.8384), "restormer": (26.898, 0.8382), "plnlin": (25.521, 0.8291)},
        ),
    ],
)
def test_golden_numbers_of_real_rainy_images(real_data, folder, expected):
    if not (real_data / folder[0]).is_dir():
        pytest.skip(f"{folder[0]} is not in DERAIN_DATA")
    rainy, clean = (image_files(real_data / name) for name in folder)
    assert len(rainy) == len(clean) == 100
    names = [*expected, "rgb"]
    protocols = resolve(names)
    scores = np.array(
        [
            [psnr_ssim(x, y, protocol) for protocol in protocols]
            for x, y in ((read_rgb(a), read_rgb(b)) for a, b in zip(rainy, clean, strict=True))
        ]
    ).mean(axis=0)
    for name, (psnr, ssim) in zip(names, scores, strict=True):
        golden = expected.get(name, (expected["plnlin"][0], None))  # RGB's PSNR of 8-bit images is the same
        assert psnr == pytest.approx(golden[0], abs=0.005), name
        if golden[1] is not None:
            assert ssim == pytest.approx(golden[1], abs=0.0005), name


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", ["matlab-y", "plnlin", "ir-sde-rgb"])
def test_floats_out_of_range_are_rejected(rng, dtype, name):
    (protocol,) = resolve([name])
    clean = rng.random((32, 32, 3)).astype(dtype)
    derained = np.clip(clean + dtype(0.1), 0, 1)
    assert psnr_ssim(derained, clean, protocol)[0] < 30
    for images, pattern in [
        ((derained * 255, clean * 255), "255"),  # all white once clipped: a perfect score
        ((derained * 255, clean), "derained.*255"),
        ((derained, clean * 255), "clean"),
        ((derained * 2 - 1, clean * 2 - 1), "clean.*-0.99"),
        ((np.where(derained > 0.5, np.nan, derained).astype(dtype), clean), "derained.*NaN"),
        ((derained, np.where(clean > 0.5, np.inf, clean).astype(dtype)), "clean.*inf"),
    ]:
        with pytest.raises(DerainError, match=pattern):
            psnr_ssim(*images, protocol)
