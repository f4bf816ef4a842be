"""EXIF and ICC profiles are copied to the restored image; floating-point files are scaled by white."""

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image
from PIL.ExifTags import IFD

from derain.errors import DerainError
from derain.image_metadata import has_location
from derain.images import Photo, read_photo
from tests.mutated_images import camera_exif

PIXELS = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
MAKER, DATE, DATE_TAKEN = 0x010F, 0x0132, 0x9003


def photo_file(path, bits=8):
    """Write a photo with EXIF of a camera."""
    with Image.open(_upright_jpeg(path.with_name("camera.jpg"))) as image:
        exif = image.info["exif"]
    Photo(PIXELS / np.float32(255), bits=bits, info={"exif": exif}).write(path)
    return path


def _upright_jpeg(path):
    exif = Image.Exif()
    exif.load(camera_exif())
    del exif[0x0112]
    Image.fromarray(PIXELS).save(path, exif=exif.tobytes())
    return path


def exif_of(path):
    """Return maker, date taken and whether there is a latitude in EXIF, read by Pillow."""
    with Image.open(path) as image:
        exif = image.getexif()
        return exif.get(MAKER), exif.get_ifd(IFD.Exif).get(DATE_TAKEN), 2 in exif.get_ifd(IFD.GPSInfo)


ALL_EXIF = ("Maker", "2020:01:01 00:00:00", True)
NO_EXIF = (None, None, False)


@pytest.mark.parametrize("source", [".jpg", ".png", ".webp", ".tif", ".avif"])
@pytest.mark.parametrize("target", [".jpg", ".png", ".webp", ".tif", ".avif"])
def test_formats_with_exif_keep_it(tmp_path, caplog, source, target):
    photo = read_photo(photo_file(tmp_path / f"a{source}"))
    assert photo.has_location
    written = photo.write(tmp_path / f"b{target}")
    assert exif_of(tmp_path / f"b{target}") == ALL_EXIF
    assert has_location(written)
    assert not caplog.records


def test_a_png_of_16_bits_keeps_exif(tmp_path, caplog):
    photo = read_photo(photo_file(tmp_path / "a.png", bits=16))
    assert photo.bits == 16
    written = photo.write(tmp_path / "b.png")
    assert exif_of(tmp_path / "b.png") == ALL_EXIF
    assert has_location(written)
    assert read_photo(tmp_path / "b.png").bits == 16
    assert cv2.imread(str(tmp_path / "b.png"), cv2.IMREAD_UNCHANGED).dtype == np.uint16
    assert not caplog.records


@pytest.mark.parametrize("options", [{}, {"bigtiff": True}, {"byteorder": ">"}])
def test_a_tiff_of_16_bits_keeps_maker_and_date_in_other_formats(tmp_path, options):
    tags = [(MAKER, 2, 0, "Maker", True), (DATE, 2, 0, "2020:01:01 00:00:00", True)]
    tifffile.imwrite(tmp_path / "a.tif", PIXELS.astype(np.uint16) * 257, photometric="rgb", extratags=tags, **options)
    read_photo(tmp_path / "a.tif").write(tmp_path / "b.png")
    with Image.open(tmp_path / "b.png") as image:
        exif = image.getexif()
        assert (exif[MAKER], exif[DATE]) == ("Maker", "2020:01:01 00:00:00")
        assert 0x0100 not in exif  # the layout of the TIFF


@pytest.mark.parametrize(("target", "bits"), [("b.tif", 16), ("b.bmp", 8)])
def test_one_warning_names_metadata_that_a_format_does_not_support(tmp_path, caplog, target, bits):
    photo = read_photo(photo_file(tmp_path / "a.png", bits))
    assert photo.write(tmp_path / target) == {}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{tmp_path / target}: EXIF ")
    assert exif_of(tmp_path / target) == NO_EXIF


def test_one_warning_names_exif_and_profile(tmp_path, caplog):
    photo = Photo(PIXELS / np.float32(255), info={"exif": bytes(70_000), "icc_profile": bytes(16) + b"GRAY"})
    assert photo.write(tmp_path / "b.jpg") == {}
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "70000" in warning
    assert "ICC" in warning


def test_location_is_dropped_with_exif_that_is_too_long(tmp_path):
    exif = Image.Exif()
    exif.load(camera_exif())
    exif[0x010E] = "x" * 70_000
    Image.fromarray(PIXELS).save(tmp_path / "a.png", exif=exif.tobytes())
    photo = read_photo(tmp_path / "a.png")
    assert photo.has_location
    assert not has_location(photo.write(tmp_path / "b.jpg"))
    assert has_location(photo.write(tmp_path / "b.webp"))


@pytest.mark.parametrize("kind", [5, 10, 11, 12])
def test_text_with_the_type_of_numbers_is_dropped(tmp_path, caplog, kind):
    """Pillow raises AttributeError when it writes text with the type of a rational or a float."""
    data = camera_exif()
    entry = data.index(b"\x01\x0f\x00\x02")  # maker, text
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg", exif=data[: entry + 2] + bytes([0, kind]) + data[entry + 4 :])
    photo = read_photo(tmp_path / "a.jpg")
    photo.write(tmp_path / "b.jpg")
    assert str(tmp_path / "a.jpg") in caplog.text


# White of floating-point files.


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_white_does_not_scale_integers(tmp_path, suffix):
    array = np.dstack([np.full((6, 7, 3), 40_000, np.uint16), np.full((6, 7), 30_000, np.uint16)])
    cv2.imwrite(str(tmp_path / f"a{suffix}"), array)
    photo = read_photo(tmp_path / f"a{suffix}", white=255)
    np.testing.assert_allclose(photo.rgb, 40_000 / 65_535, atol=1e-6)
    np.testing.assert_allclose(photo.alpha, 30_000 / 65_535, atol=1e-6)


def test_white_scales_colours_not_alpha(tmp_path):
    array = np.dstack([np.full((6, 7, 3), 100), np.full((6, 7), 0.5)]).astype(np.float32)
    cv2.imwrite(str(tmp_path / "a.tif"), array)
    photo = read_photo(tmp_path / "a.tif", white=255)
    np.testing.assert_allclose(photo.rgb, 100 / 255, atol=1e-6)
    np.testing.assert_allclose(photo.alpha, 0.5)
    cv2.imwrite(str(tmp_path / "b.tif"), np.full((6, 7, 4), 200, np.float32))
    with pytest.raises(DerainError, match=r"b\.tif.*200"):
        read_photo(tmp_path / "b.tif", white=255)


@pytest.mark.parametrize(("maximum", "white", "warned"), [(1, 255, True), (0.9, 1, False), (0, 255, False)])
def test_a_warning_names_photos_that_are_nearly_black(tmp_path, caplog, maximum, white, warned):
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((6, 7, 3), maximum, np.float32))
    read_photo(tmp_path / "a.tif", white=white)
    assert (str(tmp_path / "a.tif") in caplog.text) is warned


def test_the_option_is_suggested_where_there_is_one(tmp_path):
    cv2.imwrite(str(tmp_path / "a.tif"), np.full((6, 7, 3), 200, np.float32))
    with pytest.raises(DerainError, match="200") as caught:
        read_photo(tmp_path / "a.tif")
    assert "--white" not in str(caught.value)
    with pytest.raises(DerainError, match="--white"):
        read_photo(tmp_path / "a.tif", white=1)
