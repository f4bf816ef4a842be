import struct
import zlib
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from derain.errors import DerainError
from derain.images import Photo, image_files, image_size, read_photo, read_rgb, replacing, write_image

RNG = np.random.default_rng(0)


def noise(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max + 1, shape, dtype=dtype)


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff"])
def test_lossless_formats_round_trip(tmp_path, suffix):
    pixels = noise(5, 7, 3)
    write_image(tmp_path / f"a{suffix}", pixels)
    assert (read_rgb(tmp_path / f"a{suffix}") == pixels).all()


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".JPG"])
def test_lossy_formats_keep_size_and_colours(tmp_path, suffix):
    pixels = np.full((20, 30, 3), (200, 100, 50), np.uint8)
    write_image(tmp_path / f"a{suffix}", pixels)
    assert np.abs(read_rgb(tmp_path / f"a{suffix}").astype(int) - pixels).max() <= 6


def test_grey_is_repeated_and_written_back_as_grey(tmp_path):
    grey = noise(4, 6)
    Image.fromarray(grey).save(tmp_path / "g.png")
    photo = read_photo(tmp_path / "g.png")
    assert photo.grey
    assert (read_rgb(tmp_path / "g.png") == grey[..., None]).all()
    photo.write(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "L"
        assert (np.asarray(image) == grey).all()


def test_alpha_is_kept(tmp_path):
    rgba = noise(4, 6, 4)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    photo = read_photo(tmp_path / "a.png")
    photo.write(tmp_path / "out.png", photo.rgb)
    with Image.open(tmp_path / "out.png") as image:
        assert (np.asarray(image) == rgba).all()
    photo.write(tmp_path / "out.jpg")  # a format without alpha gets the colours
    with Image.open(tmp_path / "out.jpg") as image:
        assert image.mode == "RGB"


def test_grey_with_alpha(tmp_path):
    la = noise(4, 6, 2)
    Image.fromarray(la, "LA").save(tmp_path / "a.png")
    read_photo(tmp_path / "a.png").write(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as image:
        assert image.mode == "LA"
        assert (np.asarray(image) == la).all()


def test_palette_and_transparent_palette(tmp_path):
    image = Image.fromarray(noise(8, 8, 3)).quantize(16)
    image.save(tmp_path / "p.png")
    assert (read_rgb(tmp_path / "p.png") == np.asarray(image.convert("RGB"))).all()
    image.save(tmp_path / "t.png", transparency=3)
    assert read_photo(tmp_path / "t.png").alpha is not None


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_round_trips(tmp_path, suffix, channels):
    deep = noise(5, 7, channels, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / f"d{suffix}"), deep)
    photo = read_photo(tmp_path / f"d{suffix}")
    assert photo.bits == 16
    assert photo.grey == (channels == 1)
    expected = deep[..., 2::-1] if channels >= 3 else np.repeat(deep, 3, 2)
    np.testing.assert_allclose(photo.rgb, expected / 65535, atol=1e-6)
    photo.write(tmp_path / f"out{suffix}")
    again = cv2.imread(str(tmp_path / f"out{suffix}"), cv2.IMREAD_UNCHANGED)
    assert (np.atleast_3d(again) == deep).all()


def test_rotation_by_exif_is_applied_once(tmp_path):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right to see it upright
    Image.fromarray(pixels).save(tmp_path / "r.png", exif=exif)
    assert (read_rgb(tmp_path / "r.png") == np.rot90(pixels, -1)).all()
    assert image_size(tmp_path / "r.png") == (6, 4)
    read_photo(tmp_path / "r.png").write(tmp_path / "out.png")
    assert (read_rgb(tmp_path / "out.png") == np.rot90(pixels, -1)).all()


@pytest.mark.parametrize("turn", range(1, 9))
def test_16_bit_photos_are_turned_as_8_bit_ones(tmp_path, turn):
    pixels = noise(4, 6, 3)
    exif = Image.Exif()
    exif[0x0112] = turn
    Image.fromarray(pixels).save(tmp_path / "shallow.png", exif=exif)
    cv2.imwrite(str(tmp_path / "d.png"), pixels[..., ::-1].astype(np.uint16) * 257)
    data, chunk = (tmp_path / "d.png").read_bytes(), exif.tobytes().removeprefix(b"Exif\0\0")
    head = struct.pack(">I", len(chunk)) + b"eXIf" + chunk + struct.pack(">I", zlib.crc32(b"eXIf" + chunk))
    (tmp_path / "deep.png").write_bytes(data[:33] + head + data[33:])
    assert (read_rgb(tmp_path / "deep.png") == read_rgb(tmp_path / "shallow.png")).all()
    assert image_size(tmp_path / "deep.png") == read_rgb(tmp_path / "deep.png").shape[:2]


def test_profile_and_exif_are_handed_on(tmp_path):
    exif = Image.Exif()
    exif[0x010E] = "a rainy day"
    Image.fromarray(noise(4, 6, 3)).save(tmp_path / "a.jpg", exif=exif, icc_profile=b"profile")
    read_photo(tmp_path / "a.jpg").write(tmp_path / "b.jpg")
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.info["icc_profile"] == b"profile"
        assert image.getexif()[0x010E] == "a rainy day"


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("length", [200, 201])
def test_16_bit_photos_keep_their_profile(tmp_path, suffix, channels, length):
    profile = bytes(16) + (b"GRAY" if channels == 1 else b"RGB ") + RNG.bytes(length)
    deep = noise(5, 7, channels, dtype=np.uint16)
    cv2.imwrite(str(tmp_path / f"plain{suffix}"), deep)
    photo = read_photo(tmp_path / f"plain{suffix}")
    replace(photo, info={"icc_profile": profile}).write(tmp_path / f"a{suffix}")
    read_photo(tmp_path / f"a{suffix}").write(tmp_path / f"b{suffix}")
    with Image.open(tmp_path / f"b{suffix}") as image:
        image.load()
        assert image.info["icc_profile"] == profile
    assert (np.atleast_3d(cv2.imread(str(tmp_path / f"b{suffix}"), cv2.IMREAD_UNCHANGED)) == deep).all()


def test_a_grey_profile_is_not_given_to_colours(tmp_path, caplog):
    grey = bytes(16) + b"GRAY" + bytes(200)
    values = np.full((4, 6), 0.3, np.float32)
    photo = Photo(np.repeat(values[..., None], 3, 2), values, True, 16, {"icc_profile": grey})
    photo.write(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert "icc_profile" not in image.info
    assert len(caplog.messages) == 1
    assert "a.png: ICC profile dropped" in caplog.messages[0]


def test_one_pixel(tmp_path):
    write_image(tmp_path / "a.png", noise(1, 1, 3))
    assert read_rgb(tmp_path / "a.png").shape == (1, 1, 3)


def test_refusals_name_the_file(tmp_path):
    (tmp_path / "text.png").write_text("no image")
    write_image(tmp_path / "whole.png", noise(60, 60, 3))
    data = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(data[: len(data) // 2])
    for name in ("text.png", "cut.png", "absent.png"):
        with pytest.raises(DerainError, match=name):
            read_rgb(tmp_path / name)
    with pytest.raises(DerainError, match=r"text\.png"):
        image_size(tmp_path / "text.png")
    with pytest.raises(DerainError, match=r"out\.xyz.*end it in"):
        read_photo(tmp_path / "whole.png").write(tmp_path / "out.xyz")


def test_files_are_listed_in_natural_order_without_hidden_ones(tmp_path):
    for name in ("10.png", "2.JPG", "b/1.png", ".hidden.png", ".dir/3.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in image_files(tmp_path)] == ["2.JPG", "10.png"]
    below = [p.relative_to(tmp_path) for p in image_files(tmp_path, recursive=True)]
    assert below == [Path("2.JPG"), Path("10.png"), Path("b/1.png")]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write():
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
