import pytest

from derain.data.rain import PRESETS
from derain.data.rain_ranges import RAIN_RANGES, RainRanges, read_rain
from derain.errors import DerainError


def test_presets_are_those_of_synthesize():
    assert set(RAIN_RANGES) == {*PRESETS, "varied"}
    for name, (low, high) in PRESETS.items():
        assert RAIN_RANGES[name].density == (low.density, high.density)
        assert RAIN_RANGES[name].jpeg_share == RAIN_RANGES[name].clear_share == 0


def test_file(tmp_path):
    file = tmp_path / "rain.yaml"
    file.write_text("preset: heavy\nlength: [5, 60]\njpeg_share: 0.5\n")
    ranges = read_rain(str(file))
    assert (ranges.length, ranges.jpeg_share, ranges.density) == ((5, 60), 0.5, RAIN_RANGES["heavy"].density)


def test_folder_of_streak_images(tmp_path):
    ranges = read_rain(f"folder:{tmp_path}")
    assert (ranges.measured_share, ranges.streak_images) == (1, str(tmp_path))
    (tmp_path / "streaks").mkdir()
    (tmp_path / "rain.yaml").write_text("streak_images: streaks\nmeasured_share: 0.3\n")
    ranges = read_rain(str(tmp_path / "rain.yaml"))
    assert (ranges.measured_share, ranges.streak_images) == (0.3, str(tmp_path / "streaks"))


@pytest.mark.parametrize(
    ("content", "value"),
    [
        ("lenght: [5, 60]", "lenght"),
        ("length: [60, 5]", "60"),
        ("length: 5", "length"),
        ("length: [.nan, 60]", "nan"),
        ("noise: [0, 1000]", "1000"),
        ("jpeg_share: 2", "2"),
        ("added_share: 0.8\nscreened_share: 0.5", "0.8"),
        ("measured_share: 0.5", "measured_share"),
        ("streak_images: nowhere", "nowhere"),
        ("preset: stormy", "stormy"),
        ("preset: [light]", "preset"),
        ("layers: [1.5, 3]", "1.5"),
        ("drops: [1, 2.5]", "2.5"),
        ("streak_images: .\nmeasured_share: 0", "streak_images"),
        ("- 1", "rain.yaml"),
        ("a: [", "rain.yaml"),
    ],
)
def test_invalid_files(content, value, tmp_path):
    file = tmp_path / "rain.yaml"
    file.write_text(content)
    with pytest.raises(DerainError, match=value):
        read_rain(str(file))


@pytest.mark.parametrize("value", ["stormy", "folder:nowhere", "missing.yaml"])
def test_unknown(value):
    with pytest.raises(DerainError, match=value):
        read_rain(value)


def test_ranges_are_checked():
    with pytest.raises(DerainError, match="100"):
        RainRanges(layers=(1, 100))
