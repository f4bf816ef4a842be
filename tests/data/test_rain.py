import dataclasses
import hashlib
import itertools
import json
import math
import re
import shutil

import cv2
import numpy as np
import pytest
from PIL import Image

from derain.data.pairs import find_pairs
from derain.data.rain import PRESETS, Rain, add_rain, image_rng, sample_rain, streaks, synthesize
from derain.data.verify import verify
from derain.errors import DerainError
from derain.images import read_rgb
from derain.listing import image_files

SIZES = [(1, 1), (1, 40), (40, 1), (2, 3), (31, 37), (200, 130)]


def rng(seed=0):
    return np.random.default_rng(seed)


def scene(height=240, width=320, seed=0):
    """Return a smooth image with edges."""
    small = rng(seed).uniform(20, 200, (6, 8, 3)).astype(np.float32)
    image = cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)
    image[height // 3 : height // 2, width // 4 : width // 2] *= 0.5
    return np.clip(image, 0, 255).astype(np.uint8)


def psnr(first, second):
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return 10 * math.log10(255**2 / np.mean(((first.astype(float) - second) @ weights) ** 2))


def fall(layer):
    """Return the angle of streaks from the vertical and their coherence, by the structure tensor."""
    smooth = cv2.GaussianBlur(layer.astype(float), (0, 0), 2)  # differences see slopes well only when gentle
    dy, dx = np.gradient(smooth)
    xx, yy, xy = (dx * dx).sum(), (dy * dy).sum(), (dx * dy).sum()
    across = 0.5 * math.atan2(2 * xy, xx - yy)  # of the gradient; streaks run at right angles to it
    return -math.degrees(across), math.hypot(xx - yy, 2 * xy) / (xx + yy)


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for index in range(4):
        Image.fromarray(scene(40 + index, 50, index)).save(folder / f"photo-{index}.png")
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in image_files(folder, recursive=True)}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("shape", SIZES)
def test_any_size(preset, shape):
    rain = dataclasses.replace(PRESETS[preset][1], drops=5, veil=0.3)
    clean = scene(*shape)
    before = clean.copy()
    rainy = add_rain(clean, rain, rng())
    assert rainy.shape == clean.shape
    assert rainy.dtype == np.uint8
    np.testing.assert_array_equal(clean, before)


def test_same_seed_same_pixels_other_seed_other_pixels():
    rain = Rain(veil=0.2, drops=3)
    first = add_rain(scene(), rain, rng(1))
    np.testing.assert_array_equal(first, add_rain(scene(), rain, rng(1)))
    assert (first != add_rain(scene(), rain, rng(2))).mean() > 0.3


def test_threads_do_not_change_pixels():
    threads = cv2.getNumThreads()
    try:
        cv2.setNumThreads(1)
        single = add_rain(scene(), Rain(veil=0.2, drops=3), rng(1))
    finally:
        cv2.setNumThreads(threads)
    np.testing.assert_array_equal(single, add_rain(scene(), Rain(veil=0.2, drops=3), rng(1)))


def test_pixels_follow_the_formula():
    clean = scene()
    rain = Rain(density=0.5, layers=2)
    opacity = streaks(clean.shape[:2], rain, rng(3)).astype(np.float64)[..., None]
    sky = round(min(max(1.5 * np.percentile(clean[::4, ::4], 95), 128), 242))
    expected = (1 - opacity) * clean + opacity * sky
    assert np.abs(add_rain(clean, rain, rng(3)) - expected).max() <= 0.51


@pytest.mark.parametrize("preset", PRESETS)
def test_streaks_are_an_opacity(preset):
    layer = streaks((120, 160), PRESETS[preset][1], rng())
    assert layer.shape == (120, 160)
    assert layer.dtype == np.float32
    assert layer.min() >= 0
    assert layer.max() < 1


@pytest.mark.parametrize("preset", PRESETS)
def test_rain_brightens(preset):
    clean = scene()
    for seed in range(5):
        rainy = add_rain(clean, sample_rain(*PRESETS[preset], rng(seed)), rng(seed))
        assert (rainy.astype(float) - clean).mean() > 0.5


def test_density_is_the_share_covered():
    def opacity(density):
        rain = Rain(density=density, layers=1, width=3.0, brightness=0.7)
        return np.mean([streaks((300, 300), rain, rng(seed)) for seed in range(6)])

    flank = math.sqrt(2 * math.pi) / 2.35  # area of a Gaussian over its height times its width at half height
    assert opacity(0.05) == pytest.approx(0.05 * 0.7 * 0.65 * flank, rel=0.1)  # 0.65: mean of 0.3 to 1
    assert 3 * opacity(0.05) < opacity(0.2) < opacity(0.8)
    assert opacity(0.0) == 0


def test_length_and_width_of_streaks():
    def reach(rain, axis):
        """Return the mean correlation length of vertical streaks along an axis, in pixels."""
        layer = np.mean([autocorrelation(streaks((256, 256), rain, rng(seed)), axis) for seed in range(4)], axis=0)
        return int(np.argmax(layer < 0.5))

    def autocorrelation(layer, axis):
        spectrum = np.fft.rfft(layer - layer.mean(), axis=axis)
        moments = np.fft.irfft(np.abs(spectrum) ** 2, axis=axis).mean(axis=1 - axis)
        return (moments / moments[0])[:100]

    thin = Rain(density=0.2, length=20.0, width=1.5, layers=1, spread=0.0)
    assert reach(dataclasses.replace(thin, length=60.0), 0) > 2 * reach(thin, 0)
    assert reach(dataclasses.replace(thin, width=8.0), 1) > 2 * reach(thin, 1)


@pytest.mark.parametrize("angle", [-60.0, -25.0, 0.0, 10.0, 45.0, 80.0])
@pytest.mark.parametrize("shape", [(160, 240), (240, 160)])
def test_angle(angle, shape):
    measured, one_way = fall(streaks(shape, Rain(angle=angle, spread=0.0, length=40.0), rng()))
    assert measured == pytest.approx(angle, abs=2)
    assert one_way > 0.8


def test_streaks_reach_every_part_of_the_image():
    for angle in (0.0, 30.0, -70.0, 90.0):
        layer = np.mean([streaks((90, 120), Rain(angle=angle, density=1.0), rng(seed)) for seed in range(8)], axis=0)
        parts = cv2.resize(layer, (4, 3), interpolation=cv2.INTER_AREA)
        assert parts.min() > 0.6 * parts.max()


def test_spread_lets_streaks_cross():
    one_way = [fall(streaks((200, 200), Rain(layers=8, spread=spread), rng()))[1] for spread in (0.0, 30.0)]
    assert one_way[1] < one_way[0] - 0.1


def test_brightness():
    faint, bright = (streaks((100, 100), Rain(brightness=value), rng()) for value in (0.2, 0.9))
    assert 3 * faint.mean() < bright.mean()
    assert streaks((100, 100), Rain(brightness=0.2, layers=1), rng()).max() <= 0.2 + 1e-6


def test_near_streaks_are_longer_and_fewer_than_far_ones():
    single = Rain(density=0.4, layers=1, length=60.0)
    many = dataclasses.replace(single, layers=8)
    edges = [np.abs(np.diff(streaks((256, 256), rain, rng()) > 0.15, axis=0)).mean() for rain in (single, many)]
    assert edges[1] > 1.2 * edges[0], "more, shorter streaks have more ends"


def test_streaks_grow_with_large_photos():
    small, large = (streaks((side, side), Rain(layers=1, spread=0.0), rng()) for side in (512, 1024))
    ends = [np.abs(np.diff(layer > 0.3, axis=0)).sum() for layer in (small, large)]
    assert ends[1] < 3 * ends[0], "as many streaks, each twice as wide"


def test_veil_lowers_contrast_and_brightens():
    clean, dry = scene(), Rain(density=0.0)
    np.testing.assert_array_equal(add_rain(clean, dry, rng()), clean)
    contrast = [
        add_rain(clean, dataclasses.replace(dry, veil=veil), rng()).astype(float).std() for veil in (0.0, 0.3, 0.7)
    ]
    assert contrast[0] > 1.15 * contrast[1] > 1.3 * contrast[2]
    assert add_rain(clean, dataclasses.replace(dry, veil=0.5), rng()).mean() > clean.mean() + 10


def test_drops_show_the_scene_upside_down():
    clean = np.zeros((200, 200, 3), np.uint8)
    clean[100:] = 200  # dark above, bright below
    changed = add_rain(clean, Rain(density=0.0, drops=12), rng(1))
    differs = (changed != clean).any(axis=2)
    assert 0.005 < differs.mean() < 0.5
    assert changed[:80].max() > 100, "drops in the dark half show the bright one"
    assert changed[120:].min() < 60, "and the other way round"
    np.testing.assert_array_equal(add_rain(clean, Rain(density=0.0, drops=0), rng(1)), clean)


def test_presets_match_the_public_sets():
    scenes = [scene(320, 480, seed) for seed in range(6)]
    means = {
        name: np.mean(
            [psnr(add_rain(clean, sample_rain(*rain, rng(i)), rng(i)), clean) for i, clean in enumerate(scenes)]
        )
        for name, rain in PRESETS.items()
    }
    assert 25 < means["light"] < 33
    assert 19 < means["medium"] < 25
    assert 12 < means["heavy"] < 18


def test_sampled_rain_varies_within_its_limits():
    drawn = [sample_rain(*PRESETS["heavy"], rng(seed)) for seed in range(20)]
    low, high = PRESETS["heavy"]
    for part in dataclasses.fields(Rain):
        values = [getattr(rain, part.name) for rain in drawn]
        assert all(getattr(low, part.name) <= value <= getattr(high, part.name) for value in values)
        assert type(values[0]) in (int, float)
    assert len({rain.density for rain in drawn}) == 20
    assert len({rain.layers for rain in drawn}) == 3
    assert sample_rain(low, low, rng()) == low


def test_generator_depends_on_seed_and_name():
    draws = {(seed, name): image_rng(seed, name).random() for seed, name in itertools.product((0, 1), ("a", "b"))}
    assert len(set(draws.values())) == 4
    assert image_rng(1, "a").random() == draws[1, "a"]


@pytest.mark.parametrize(
    "wrong",
    [{"density": -1.0}, {"layers": 0}, {"brightness": 1.1}, {"angle": math.nan}, {"veil": 2.0}],
)
def test_values_outside_their_range_are_rejected(wrong):
    with pytest.raises(DerainError, match=f"rain: {next(iter(wrong))} "):
        Rain(**wrong)


def test_synthesize_writes_a_set_of_pairs(photos, tmp_path):
    out = tmp_path / "new" / "set"
    assert synthesize(photos, out) == []
    found = find_pairs(out, "train")
    assert found.layout == "folder"
    assert [pair.name for pair in found.pairs] == [f"photo-{index}" for index in range(4)]
    for pair in found.pairs:
        rainy, clean = pair.read()
        np.testing.assert_array_equal(clean, read_rgb(photos / f"{pair.name}.png"))
        assert (rainy.astype(float) - clean).mean() > 0
    assert sorted(path.name for path in out.iterdir()) == [
        "contact_sheet.png",
        "input",
        "rain.json",
        "target",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["set"], "nothing temporary is left"


def test_the_record_reproduces_the_set(photos, tmp_path):
    synthesize(photos, tmp_path / "set", PRESETS["heavy"], seed=7)
    record = json.loads((tmp_path / "set" / "rain.json").read_text())
    low, high = (Rain(**record[key]) for key in ("lower_limits", "upper_limits"))
    synthesize(photos, tmp_path / "again", (low, high), seed=record["seed"], per_image=record["per_image"])
    assert contents(tmp_path / "again") == contents(tmp_path / "set")
    assert set(record["images"]) == {f"photo-{index}" for index in range(4)}
    assert all(Rain(**drawn) for drawn in record["images"].values())


def test_rain_of_an_image_does_not_depend_on_the_others(photos, tmp_path):
    synthesize(photos, tmp_path / "all", seed=3)
    some = tmp_path / "some"
    some.mkdir()
    shutil.copy(photos / "photo-2.png", some)
    synthesize(some, tmp_path / "one", seed=3)
    whole, one = contents(tmp_path / "all"), contents(tmp_path / "one")
    assert whole["input/photo-2.png"] == one["input/photo-2.png"]
    synthesize(photos, tmp_path / "other", seed=4)
    assert contents(tmp_path / "other")["input/photo-2.png"] != one["input/photo-2.png"]


def test_several_rains_for_each_photo(photos, tmp_path):
    synthesize(photos, tmp_path / "set", per_image=3)
    rains = [hashlib.sha256(data).digest() for name, data in contents(tmp_path / "set" / "input").items()]
    assert len(set(rains)) == 12
    assert len(image_files(tmp_path / "set" / "target")) == 4
    found = find_pairs(tmp_path / "set", "train")
    assert len(found.pairs) == 12
    for pair in found.pairs:
        assert pair.clean == tmp_path / "set" / "target" / f"{pair.name.rpartition('_rain')[0]}.png"


@pytest.mark.parametrize("preset", PRESETS)
def test_verify_accepts_the_set(preset, tmp_path):
    (tmp_path / "photos").mkdir()
    for index in range(3):
        Image.fromarray(scene(150, 200, index)).save(tmp_path / "photos" / f"photo-{index}.png")
    low, high = PRESETS[preset]
    synthesize(tmp_path / "photos", tmp_path / "set", (low, dataclasses.replace(high, drops=9)), per_image=2)
    sets, findings = verify(tmp_path / "set")
    assert [len(split.files.pairs) for split in sets] == [6]
    assert findings == []


def test_subfolders_and_photos_of_any_kind(tmp_path):
    photos = tmp_path / "photos"
    (photos / "a").mkdir(parents=True)
    (photos / "b").mkdir()
    Image.fromarray(scene(9, 7)).convert("L").save(photos / "a" / "one.jpg")
    Image.fromarray(scene(1, 1)).convert("RGBA").save(photos / "b" / "one.png")
    synthesize(photos, tmp_path / "set")
    found = find_pairs(tmp_path / "set", "train")
    assert [pair.name for pair in found.pairs] == ["input/a/one", "input/b/one"]
    assert [pair.read()[0].shape for pair in found.pairs] == [(9, 7, 3), (1, 1, 3)]


def test_a_damaged_photo_is_skipped_and_reported(photos, tmp_path):
    broken = photos / "photo-1.png"
    broken.write_bytes(broken.read_bytes()[:200])
    lines = synthesize(photos, tmp_path / "set")
    assert len(lines) == 1
    assert str(broken) in lines[0]
    assert [pair.name for pair in find_pairs(tmp_path / "set", "train").pairs] == [
        "photo-0",
        "photo-2",
        "photo-3",
    ]


def test_nothing_is_written_if_no_photo_can_be_read(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"no image")
    with pytest.raises(DerainError, match=r"photos: .*a\.png"):
        synthesize(tmp_path / "photos", tmp_path / "set")
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_an_interrupted_run_keeps_the_old_set(photos, tmp_path, monkeypatch):
    synthesize(photos, tmp_path / "set")
    before = contents(tmp_path / "set")
    monkeypatch.setattr("derain.data.rain.contact_sheet", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        synthesize(photos, tmp_path / "set", seed=1, overwrite=True)
    assert contents(tmp_path / "set") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["photos", "set"]


def test_only_synthetic_sets_are_overwritten(photos, tmp_path):
    out = tmp_path / "set"
    synthesize(photos, out)
    first = contents(out)
    with pytest.raises(DerainError, match="--overwrite"):
        synthesize(photos, out, seed=1)
    assert contents(out) == first
    synthesize(photos, out, seed=1, overwrite=True)
    assert contents(out) != first
    (out / "rain.json").unlink()
    with pytest.raises(DerainError, match=re.escape(str(out))):
        synthesize(photos, out, overwrite=True)


def test_invalid_arguments_are_rejected(photos, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DerainError, match="empty: "):
        synthesize(tmp_path / "empty", tmp_path / "set")
    with pytest.raises(DerainError, match="absent: "):
        synthesize(tmp_path / "absent", tmp_path / "set")
    with pytest.raises(DerainError, match="set: "):
        synthesize(photos, photos / "set")
    with pytest.raises(DerainError, match=re.escape(f"{tmp_path}: ")):
        synthesize(photos, tmp_path)
    with pytest.raises(DerainError, match=r"photo-0\.png: "):
        synthesize(tmp_path / "empty", photos / "photo-0.png")
    with pytest.raises(DerainError, match="rain: 0 "):
        synthesize(photos, tmp_path / "set", per_image=0)
    with pytest.raises(DerainError, match="rain: density from "):
        synthesize(photos, tmp_path / "set", PRESETS["light"][::-1])
    shutil.copy(photos / "photo-0.png", photos / "photo-0.bmp")
    with pytest.raises(DerainError, match=r"photo-0\.(bmp|png) and .*photo-0\.(bmp|png)"):
        synthesize(photos, tmp_path / "set")
    assert not (tmp_path / "set").exists()
