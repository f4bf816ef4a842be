import dataclasses

import numpy as np
import pytest
import torch
from kornia.augmentation import AugmentationSequential

from derain.data.rain_operators import (
    RainDegradation,
    RandomCompression,
    RandomDefocus,
    RandomLensDrops,
    RandomMist,
    RandomRain,
    RandomSensorNoise,
    add_veil,
)
from derain.data.rain_ranges import RAIN_RANGES, RainRanges
from derain.data.rain_streaks import Lanes, StreakLayers, draw_lanes, measured_opacity, streak_opacity
from derain.errors import DerainError
from tests.factories import clean_image, save


@pytest.fixture
def photos():
    images = [clean_image(seed, (64, 80)) for seed in range(4)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float().div(255)


def luma_psnr(first, second):
    return float(-10 * ((first - second) ** 2).mean((1, 2, 3)).log10().mean())


def degraded(ranges, photos, seed=0):
    return RainDegradation(ranges)(photos, seed)


def layers(**values):
    defaults = {"angle": [0.3, -0.7], "length": [12.0, 30.0], "width": [0.6, 3.5], "coverage": [0.3, 0.5]}
    return StreakLayers(**{name: torch.tensor(values.get(name, default)) for name, default in defaults.items()})


def lane_in_float64(lanes, layer, lane, pixel):
    """Opacity in the middle of a lane at a pixel along it, in Python floats."""
    position = float(lanes.phase[layer, lane]) + pixel * float(lanes.scale[layer, lane])
    cell = int(position)
    streak = float(lanes.streak[layer, lane, cell])
    if streak < 0:
        return 0.0
    length = 0.5 + 0.5 * ((61 * streak) % 1)
    from_end = length / 2 - abs(position - cell - 0.5)
    return float(np.clip(from_end / (0.25 * length), 0, 1)) * (0.3 + 0.7 * streak)


def opacity_in_float64(parameters, lanes, layer, y, x, size):
    """Opacity of one pixel: the lanes and pixels around it, interpolated."""
    angle, width = float(parameters.angle[layer]), float(parameters.width[layer])
    x, y = x - (size[1] - 1) / 2, y - (size[0] - 1) / 2
    column = np.sin(angle) * x + np.cos(angle) * y + np.ceil(np.hypot(*size)) / 2
    row = (np.cos(angle) * x - np.sin(angle) * y) / max(width, 1) + float(lanes.offset[layer])
    row += (lanes.streak.shape[1] - 1) / 2
    total = 0.0
    for lane in (int(row), int(row) + 1):
        for pixel in (int(column), int(column) + 1):
            share = (1 - abs(row - lane)) * (1 - abs(column - pixel))
            total += share * lane_in_float64(lanes, layer, lane, pixel)
    return total * min(width, 1)


def test_opacity_matches_float64():
    torch.manual_seed(3)
    size = (33, 47)
    parameters = layers()
    lanes = draw_lanes(parameters, size, torch.device("cpu"))
    opacity = streak_opacity(parameters, lanes, size)
    assert opacity.max() > 0.3
    rng = np.random.default_rng(0)
    for _ in range(150):
        layer, y, x = int(rng.integers(2)), int(rng.integers(33)), int(rng.integers(47))
        expected = opacity_in_float64(parameters, lanes, layer, y, x, size)
        assert float(opacity[layer, y, x]) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize(("length", "width"), [(1.0, 1.0), (0.2, 0.2)])
def test_short_streaks_have_cells_for_all_pixels(length, width):
    parameters = layers(angle=[0.3, -0.3], length=[length] * 2, width=[width] * 2, coverage=[0.2, 0.2])
    for seed, side in enumerate((7, 16, 33, 64)):
        torch.manual_seed(seed)
        opacity = streak_opacity(parameters, draw_lanes(parameters, (side, side), torch.device("cpu")), (side, side))
        assert opacity.isfinite().all()


def test_rain_falls_along_its_angle():
    """A positive angle falls to the right: the opacity is constant along (sin, cos), not along (-sin, cos)."""
    lanes = Lanes(
        offset=torch.zeros(1),
        scale=torch.full((1, 65), 1e-3),
        phase=torch.full((1, 65), 0.5),
        streak=torch.where(torch.arange(65) == 32, 0.5, -1.0)[None, :, None],
    )
    parameters = layers(angle=[0.5], length=[900.0], width=[3.0], coverage=[0.5])
    opacity = streak_opacity(parameters, lanes, (41, 41))[0]
    centre = 20
    for step in (-15, 15):
        along = centre + round(np.tan(0.5) * step)
        assert opacity[centre + step, along] > 0.5 * opacity[centre, centre] > 0
        assert opacity[centre + step, 2 * centre - along] == 0


def test_width_and_coverage():
    """The mean opacity of a layer is coverage times the mean brightness, for streaks of any width and length."""
    torch.manual_seed(0)
    for width, length in ((1.0, 10.0), (3.0, 40.0), (5.0, 25.0)):
        parameters = layers(angle=[0.2] * 8, length=[length] * 8, width=[width] * 8, coverage=[0.3] * 8)
        size = (256, 256)
        opacity = streak_opacity(parameters, draw_lanes(parameters, size, torch.device("cpu")), size)
        assert float(opacity.mean()) == pytest.approx(0.3 * 0.65, rel=0.06)


@pytest.mark.parametrize("preset", RAIN_RANGES)
def test_same_seed_same_pair_and_untouched_generators(preset, photos):
    degradation = RainDegradation(RAIN_RANGES[preset])
    state = torch.get_rng_state()
    first, again, other = (degradation(photos, seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])
    for image in (*first, *other):
        assert image.shape == photos.shape
        assert torch.equal((image * 255).round() / 255, image)
        assert 0 <= image.min() <= image.max() <= 1


def test_presets_add_rain_alone_and_become_heavier(photos):
    similarities = []
    for preset in ("light", "medium", "heavy"):
        pairs = [degraded(RAIN_RANGES[preset], photos, seed) for seed in range(6)]
        assert all(torch.allclose(clean, photos, atol=0.6 / 255) for _, clean in pairs)
        similarities.append(np.mean([luma_psnr(rainy, clean) for rainy, clean in pairs]))
    assert similarities[0] > similarities[1] + 2 > similarities[2] + 4


def test_camera_degrades_both_alike(photos):
    """Without rain, the rainy image equals the clean one, whatever the camera does."""
    ranges = dataclasses.replace(
        RainRanges(), clear_share=1, drops_share=0, noise_share=1, defocus_share=1, jpeg_share=1
    )
    rainy, clean = degraded(ranges, photos)
    assert torch.equal(rainy, clean)
    assert (clean - photos).abs().mean() > 2 / 255


def test_wide_defocus_has_its_standard_deviation():
    """A point becomes a Gaussian, whose variance is the mean square of the distance."""
    ranges = dataclasses.replace(RAIN_RANGES["light"], defocus=(4, 4), defocus_share=1)
    point = torch.zeros(1, 6, 65, 65)
    point[..., 32, 32] = 1
    blurred = RainDegradation(ranges).camera[0](point)
    distance = torch.arange(65) - 32
    assert float((blurred[0, 0].sum(0) * distance**2).sum()) == pytest.approx(4**2, rel=0.04)


def test_shares_of_samples():
    photos = torch.full((400, 3, 8, 8), 0.3)
    ranges = dataclasses.replace(RAIN_RANGES["heavy"], clear_share=0.25)
    rainy, clean = degraded(ranges, photos)
    unchanged = (rainy == clean).all(1).all(1).all(1).float().mean()
    assert float(unchanged) == pytest.approx(0.25, abs=0.09)


@pytest.mark.parametrize(("added", "screened", "kind"), [(1, 0, "added"), (0, 1, "screened"), (0, 0, "sky")])
def test_blends(added, screened, kind):
    operator = RandomRain(dataclasses.replace(RainRanges(), added_share=added, screened_share=screened), 1)
    scene = torch.full((1, 3, 8, 8), 0.4, dtype=torch.float64)
    opacity = torch.full((1, 1, 8, 8), 0.25, dtype=torch.float64)
    params = {"tint": torch.ones(1, 3), "sky": torch.tensor([2.0]), "blend": torch.tensor([0.5])}
    expected = {"added": 0.4 + 0.25, "screened": 0.4 + 0.25 * 0.6, "sky": 0.4 * 0.75 + 0.8 * 0.25}[kind]
    assert torch.allclose(operator.blend(scene, opacity, params), torch.full_like(scene, expected), atol=1e-7)


def test_veil_of_uniform_images():
    """A veil of opacity a moves every pixel by a towards the light, 1.15 times the 90 % quantile."""
    image = torch.full((2, 3, 16, 16), 0.6, dtype=torch.float64)
    veiled = add_veil(image, torch.tensor([0.0, 0.5]), torch.ones(2, 4, 4))
    assert torch.allclose(veiled[0], image[0])
    assert torch.allclose(veiled[1], torch.full_like(image[1], 0.5 * 0.6 + 0.5 * 0.69), atol=1e-7)


def test_noise_has_the_drawn_deviation():
    image = torch.full((2, 3, 128, 128), 0.5)
    noisy = RandomSensorNoise((5, 5), 1)(image)
    assert float((noisy - 0.5).std() * 255) == pytest.approx(5, rel=0.03)


def test_defocus_matches_float64():
    """A bright pixel becomes the Gaussian of the drawn deviation, on the 7 × 7 pixels around it."""
    image = torch.zeros(1, 6, 15, 15)
    image[:, :, 7, 7] = 1
    profile = np.exp(-0.5 * (np.arange(-3, 4) / 0.8) ** 2)
    expected = np.zeros((15, 15))
    expected[4:11, 4:11] = np.outer(profile, profile) / profile.sum() ** 2
    blurred = RandomDefocus((0.8, 0.8), 1)(image)
    assert np.allclose(blurred[0].numpy(), expected, atol=1e-6)


def test_noise_and_compression_of_pairs_are_those_of_each_image(photos):
    pair = torch.cat((photos, photos.flip(0)), 1)
    noise = RandomSensorNoise((5, 5), 1)(pair) - pair
    inside = ((pair > 0.1) & (pair < 0.9)).float()
    inside = inside[:, :3] * inside[:, 3:]
    assert torch.allclose(noise[:, :3] * inside, noise[:, 3:] * inside, atol=1e-6)
    operator = RandomCompression((30, 30), 1)
    compressed = operator(pair)
    assert torch.equal(compressed[:, :3], operator(photos))
    assert torch.equal(compressed[:, 3:], operator(photos.flip(0)))


def test_operators_are_kornia_operators(photos):
    sequence = AugmentationSequential(RandomMist((0.2, 0.3), 1), RandomLensDrops((8, 8), 1))
    torch.manual_seed(0)
    degraded = sequence(photos)
    assert degraded.shape == photos.shape
    assert torch.equal(sequence(photos, params=sequence._params), degraded)
    changed = (RandomLensDrops((8, 8), 1)(photos) - photos).abs().amax(1).gt(0.02).float().mean()
    assert 0.005 < float(changed) < 0.6


def test_measured_streaks(tmp_path, photos):
    streaks = np.zeros((60, 90, 3), np.uint8)
    streaks[:, ::9] = 200
    save(tmp_path / "a.png", streaks)
    save(tmp_path / "b.png", streaks[:40, :50])
    ranges = dataclasses.replace(
        RAIN_RANGES["light"], measured_share=1, streak_images=str(tmp_path), added_share=1, screened_share=0
    )
    rainy, clean = degraded(ranges, photos)
    assert (rainy - clean).mean() > 0.02
    assert (rainy >= clean - 0.06).all()  # the tint alone can darken

    save(tmp_path / "c.png", np.full((20, 20, 3), 200, np.uint8))
    with pytest.raises(DerainError, match=str(tmp_path)):
        RainDegradation(ranges)


def test_measured_opacity_of_a_uniform_image_is_its_contrast():
    torch.manual_seed(0)
    opacity = measured_opacity(torch.full((1, 1, 50, 70), 51, dtype=torch.uint8), 40, (20, 30))
    flat = opacity.flatten(1)
    assert torch.allclose(flat.amin(1), flat.amax(1), atol=1e-6)
    assert float(flat.min()) >= 0.6 * 0.2 - 1e-6
    assert float(flat.max()) <= 2.2 * 0.2 + 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(photos):
    degradation = RainDegradation(RainRanges()).cuda()
    first, again = (degradation(photos.cuda(), 3) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
